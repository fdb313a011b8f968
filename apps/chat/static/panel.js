// Settings: the memory slider with what it would mean, the system prompt and presets, and the parameters.

import { del, get, patch, post } from "./api.js";
import { $, bytes, count, h, iconButton, notice, speed } from "./dom.js";
import { ask } from "./dialogs.js";
import { guarded } from "./messages.js";
import { changed, modelOf, on, state } from "./state.js";

const STEPS = 200; // of the slider, from its least to all memory by equal ratios
const LEAST_BYTES = 128 * 2 ** 20;
const PARAMETERS = [["temperature", "Temperature", 0, 2, 0.05, 0.8], ["top_p", "Top p", 0, 1, 0.01, 0.95], ["top_k", "Top k", 0, 200, 1, 40],
  ["min_p", "Min p", 0, 1, 0.01, 0.05], ["repeat_penalty", "Repeat penalty", 0.5, 2, 0.05, 1]];
const WORDS = { fits: "fits in memory", streams: "streams from disk", "too slow": "too slow to use" };
let presets = [];
let asked = 0;

export function startPanel() {
  $("panel-button").addEventListener("click", toggle);
  on("chat", () => { if (!$("panel").hidden) show(); });
  on("models", () => { if (!$("panel").hidden && !$("panel").contains(document.activeElement)) show(); }); // nobody's typing is lost
  on("server", showFacts);
}

export function toggle() {
  const panel = $("panel");
  panel.hidden = !panel.hidden;
  $("layout").classList.toggle("with-panel", !panel.hidden);
  $("panel-button").setAttribute("aria-expanded", String(!panel.hidden));
  if (panel.hidden) { $("panel-button").focus(); return; }
  show();
  panel.querySelector("button").focus();
  get("/edgert/presets").then((reply) => { presets = reply.presets; listPresets(); }); // the rest stays: somebody may be typing
}

const target = () => state.chat ?? state.draft;

async function save(values) {
  Object.assign(target(), values);
  if (state.chat) await guarded(() => patch(`/edgert/chats/${state.chat.id}`, values));
}

function show() {
  const { system, settings } = target();
  const area = h("textarea", { value: system ?? "", placeholder: "How the model should behave in this conversation", onchange: () => save({ system: area.value }) });
  const choice = h("select", { id: "presets", "aria-label": "Preset", onchange: () => apply(choice.value) });
  $("panel").replaceChildren(
    h("div", { class: "panel-head" }, h("h2", {}, "Settings"), iconButton("close", "Close settings", toggle)),
    memory(),
    h("h3", {}, "System prompt"), h("label", { class: "field" }, h("span", { class: "visually-hidden" }, "System prompt"), area),
    h("div", { class: "pair" }, choice, h("button", { type: "button", class: "button", onclick: keep }, "Save as…")),
    h("details", { class: "advanced" }, h("summary", {}, "Advanced"), PARAMETERS.map((one) => parameter(one, settings)),
      numberField("max_tokens", "Longest answer, in tokens", settings, 1), numberField("seed", "Seed", settings, 0),
      h("button", { type: "button", class: "quiet", onclick: async () => { await save({ settings: {} }); show(); } }, "Back to the defaults")),
    h("h3", {}, "Now"), h("dl", { class: "facts-list", id: "facts" }));
  listPresets();
  showFacts();
}

function listPresets() {
  $("presets")?.replaceChildren(h("option", { value: "" }, "Presets…"), ...presets.map((preset) => h("option", { value: preset.id }, preset.name)));
}

function parameter([name, label, low, high, step, usual], settings) {
  const value = settings?.[name] ?? usual;
  const output = h("output", {}, String(value));
  const input = h("input", { type: "range", min: low, max: high, step, value, oninput: () => { output.textContent = input.value; },
    onchange: () => save({ settings: { ...target().settings, [name]: Number(input.value) } }) });
  return h("label", { class: "field" }, h("span", {}, label, output), input);
}

function numberField(name, label, settings, low) {
  const input = h("input", { type: "number", min: low, step: 1, value: settings?.[name] ?? "", placeholder: "any", onchange: () => {
    const { [name]: _, ...rest } = target().settings ?? {};
    save({ settings: input.value === "" ? rest : { ...rest, [name]: Math.max(low, Math.round(Number(input.value))) } });
  } });
  return h("label", { class: "field" }, h("span", {}, label), input);
}

async function apply(id) {
  const preset = presets.find((one) => one.id === id);
  if (!preset) return;
  await save({ system: preset.system, settings: preset.settings });
  show();
}

async function keep() {
  const name = await ask("Save as a preset", "Name", "");
  if (!name) return;
  await guarded(async () => {
    const same = presets.find((one) => one.name === name);
    if (same) await del(`/edgert/presets/${same.id}`);
    await post("/edgert/presets", { name, system: target().system ?? "", settings: target().settings ?? {} });
    presets = (await get("/edgert/presets")).presets;
  });
  show();
}

// ---- memory

function memory() {
  const model = modelOf();
  const total = state.models?.total_bytes ?? 2 ** 33;
  const toBytes = (step) => Math.round(LEAST_BYTES * (total / LEAST_BYTES) ** (step / STEPS));
  const toStep = (n) => Math.round(Math.log(Math.max(1, n / LEAST_BYTES)) / Math.log(total / LEAST_BYTES) * STEPS);
  const now = state.server?.budget_bytes ?? null;
  const output = h("output", {}, now ? bytes(now) : `${bytes(state.models?.budget_bytes ?? total)} (all that is free)`);
  const plan = h("div", { "aria-live": "polite" });
  const use = h("button", { type: "button", class: "button main", disabled: true, onclick: () => load(toBytes(Number(slider.value))) }, "Use this budget");
  const free = h("button", { type: "button", class: "button", disabled: now === null, onclick: () => load(null) }, "Use what is free");
  const slider = h("input", { type: "range", id: "memory", min: 0, max: STEPS, value: toStep(now ?? state.models?.budget_bytes ?? total), oninput: () => {
    output.textContent = bytes(toBytes(Number(slider.value)));
    use.disabled = false;
    predict(model, toBytes(Number(slider.value)), plan);
  } });
  slider.setAttribute("aria-valuetext", output.textContent);
  if (model) predict(model, now ?? state.models?.budget_bytes ?? total, plan);
  return h("div", {}, h("h3", {}, "Memory"), h("label", { class: "field" }, h("span", {}, "Budget", output), slider), plan, h("div", { class: "buttons" }, use, free));
}

async function predict(model, budget, box) {
  if (!model) return;
  asked += 1;
  const mine = asked;
  const told = await get(`/edgert/forecast?model=${encodeURIComponent(model)}&memory=${budget}`).catch(() => null);
  if (!told || mine !== asked) return; // a newer question is on its way
  const rows = [["pinned", "Weights that stay", told.pinned_bytes], ["kv", "Conversation (when full)", told.kv_bytes], ["other", "Program", told.other_bytes],
    ["streamed", "Read from disk per token", told.streamed_bytes]];
  const whole = rows.reduce((sum, [, , n]) => sum + n, 0);
  const bar = h("div", { class: "plan-bar", "aria-hidden": "true" }, rows.map(([kind, , n]) => { const part = h("span", { class: kind }); part.style.width = `${n / whole * 100}%`; return part; }));
  box.replaceChildren(
    h("div", { class: "speed" }, `≈ ${speed(told.tokens_per_s)} `, h("small", {}, `${WORDS[told.verdict]}${told.measured ? "" : ", estimated"}`)), bar,
    h("div", { class: "legend" }, rows.filter(([, , n]) => n).flatMap(([kind, label, n]) => [h("i", { class: kind }), h("span", {}, label), h("span", {}, bytes(n))])));
}

async function load(budget) {
  await guarded(async () => {
    notice("Loading the model within this budget…");
    await post("/edgert/models/load", { model: modelOf(), memory: budget });
    notice("");
    state.server = await get("/edgert/state");
    changed("reload-models");
    show();
    $("memory").focus();
  });
}

function showFacts() {
  const list = $("facts");
  const now = state.server;
  if (!list || !now) return;
  const { memory: held } = now;
  const rows = [["Model", now.loading ? `loading ${now.loading}` : now.model ?? "none loaded"], ["Process", now.process ? `${bytes(held.rss_bytes)} resident` : "not running"],
    ["Weights that stay", held.pinned_bytes ? bytes(held.pinned_bytes) : "–"], ["Streamed per token", now.plan?.streamed_bytes_per_pass ? bytes(now.plan.streamed_bytes_per_pass) : "nothing"],
    ["Context", now.context_length ? `${count(now.context_length)} tokens` : "–"], ["Free memory", bytes(held.available_bytes)], ["Requests waiting", String(now.waiting)]];
  for (const device of now.cluster?.devices ?? []) rows.push([device.name, `${Math.round(device.share * 100)} % of each layer`]);
  list.replaceChildren(...rows.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}
