// Settings: the memory slider with what it would mean, the system prompt and presets, and the parameters.

import { del, get, patch, post } from "./api.js";
import { $, announce, bytes, count, estimate, h, iconButton, notice } from "./dom.js";
import { ask } from "./dialogs.js";
import { guarded } from "./messages.js";
import { changed, modelOf, on, state, USUAL } from "./state.js";

const STEPS = 200; // of the slider, from its least to all memory by equal ratios
const LEAST_BYTES = 64 * 2 ** 20; // less than any process of ours takes
const PARAMETERS = [["temperature", "Temperature", 0, 2, 0.05, 0.8], ["top_p", "Top p", 0, 1, 0.01, 0.95], ["top_k", "Top k", 0, 200, 1, 40],
  ["min_p", "Min p", 0, 1, 0.01, 0.05], ["repeat_penalty", "Repeat penalty", 0.5, 2, 0.05, 1]];
const WORDS = { fits: "fits in memory", streams: "streams from disk", "too slow": "too slow to use" };
let chosen = ""; // the preset whose values are shown
let asked = 0;

export function startPanel() {
  $("panel-button").addEventListener("click", toggle);
  on("chat", () => { if (!$("panel").hidden) show(); });
  on("models", () => { if (!$("panel").hidden && !$("panel").contains(document.activeElement)) show(); }); // nobody's typing is lost
  on("server", showFacts);
  on("want-context", () => { if ($("panel").hidden) toggle(); $("context").focus(); });
}

export function toggle() {
  const panel = $("panel");
  panel.hidden = !panel.hidden;
  $("layout").classList.toggle("with-panel", !panel.hidden);
  $("panel-button").setAttribute("aria-expanded", String(!panel.hidden));
  if (panel.hidden) { $("panel-button").focus(); return; }
  show();
  panel.querySelector("button").focus();
  guarded(reloadPresets); // the rest stays: somebody may be typing
}

export async function reloadPresets() {
  state.presets = (await get("/edgert/presets")).presets;
  listPresets();
}

const target = () => state.chat ?? state.draft;

async function save(values) {
  chosen = "";
  listPresets();
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
    h("div", { class: "pair" }, choice, h("button", { type: "button", class: "button", onclick: () => keep() }, "Save as…")),
    h("div", { class: "buttons" }, h("button", { type: "button", class: "link", onclick: () => keep(USUAL) }, "Use for new chats"),
      h("button", { type: "button", class: "link", id: "forget-preset", onclick: forget }, "Delete this preset")),
    h("details", { class: "advanced" }, h("summary", {}, "Advanced"), PARAMETERS.map((one) => parameter(one, settings)),
      numberField("max_tokens", "Longest answer, in tokens", settings, 1), numberField("seed", "Seed", settings, 0),
      h("label", { class: "tick" }, h("input", { type: "checkbox", checked: Boolean(settings?.leave_out), onchange: (event) => save({ settings: { ...target().settings, leave_out: event.target.checked } }) }),
        h("span", {}, "Leave out the oldest turns when the context is full")),
      h("button", { type: "button", class: "quiet", onclick: async () => { await save({ settings: {} }); show(); } }, "Back to the defaults")),
    h("div", { id: "facts" }));
  listPresets();
  showFacts();
}

function listPresets() {
  if (!$("presets")) return;
  $("presets").replaceChildren(h("option", { value: "" }, "Presets…"), ...state.presets.map((preset) => h("option", { value: preset.id, selected: preset.id === chosen }, preset.name)));
  $("forget-preset").hidden = !chosen;
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
  const preset = state.presets.find((one) => one.id === id);
  if (!preset) return;
  await save({ system: preset.system, settings: preset.settings });
  chosen = id;
  show();
}

async function keep(name) {
  name ??= await ask("Save as a preset", "Name", "");
  if (!name) return;
  await guarded(async () => {
    chosen = (await post("/edgert/presets", { name, system: target().system ?? "", settings: target().settings ?? {} })).id;
    await reloadPresets();
    announce(name === USUAL ? "New chats begin like this one." : `Saved as ${name}.`);
  });
  $("presets").focus();
}

async function forget() {
  await guarded(async () => { await del(`/edgert/presets/${chosen}`); chosen = ""; await reloadPresets(); });
  $("presets").focus();
}

// ---- memory: nothing is changed before the button is pressed

function memory() {
  const model = modelOf();
  const total = state.models?.total_bytes ?? 2 ** 33;
  const toBytes = (step) => Math.round(LEAST_BYTES * (total / LEAST_BYTES) ** (step / STEPS));
  const toStep = (n) => Math.round(Math.log(Math.max(1, n / LEAST_BYTES)) / Math.log(total / LEAST_BYTES) * STEPS);
  const set = state.server?.budget_bytes ?? null; // null is all that is free
  const free = state.models?.budget_bytes ?? total;
  const output = h("output", {}, set ? bytes(set) : `${bytes(free)} (all that is free)`);
  const plan = h("div", { "aria-live": "polite" });
  let moved = false;
  const budget = () => (moved ? toBytes(Number(slider.value)) : set);
  const foretell = () => { use.disabled = false; predict(model, budget() ?? free, Number(context.value), plan); };
  const use = h("button", { type: "button", class: "button main", disabled: true, onclick: () => load(budget(), Number(context.value)) }, "Apply");
  const all = h("button", { type: "button", class: "button", disabled: set === null, onclick: () => load(null, Number(context.value)) }, "All that is free");
  const slider = h("input", { type: "range", id: "memory", min: 0, max: STEPS, value: toStep(set ?? free), oninput: () => {
    moved = true;
    output.textContent = bytes(toBytes(Number(slider.value)));
    slider.setAttribute("aria-valuetext", output.textContent);
    foretell();
  } });
  slider.setAttribute("aria-valuetext", output.textContent);
  const context = h("select", { id: "context", onchange: foretell }, contextLengths().map(([n, label]) => h("option", { value: n, selected: n === (state.server?.context_option ?? 0) }, label)));
  if (model) predict(model, set ?? free, Number(context.value), plan);
  return h("div", {}, h("h3", {}, "Memory"), h("label", { class: "field" }, h("span", {}, "Budget", output), slider), plan,
    h("label", { class: "field" }, h("span", {}, "Context, in tokens"), context), h("div", { class: "buttons" }, use, all));
}

// What the model was trained for bounds the choice; 0 lets edgert choose.
function contextLengths() {
  const trained = state.models?.models.find((one) => one.name === modelOf())?.context_length ?? 0;
  const lengths = new Set([state.server?.context_option ?? 0, trained]);
  for (let n = 512; n < trained; n *= 2) lengths.add(n);
  lengths.delete(0);
  return [[0, "automatic"], ...[...lengths].sort((a, b) => a - b).map((n) => [n, n === trained ? `${count(n)} (the model’s longest)` : count(n)])];
}

async function predict(model, budget, context, box) {
  if (!model) return;
  asked += 1;
  const mine = asked;
  const told = await get(`/edgert/forecast?model=${encodeURIComponent(model)}&memory=${budget}${context ? `&context=${context}` : ""}`).catch(() => null);
  if (!told || mine !== asked) return; // a newer question is on its way
  const rows = [["pinned", "Weights that stay", told.pinned_bytes], ["kv", "Conversation (when full)", told.kv_bytes], ["other", "Program", told.other_bytes],
    ["streamed", "Read from disk per token", told.streamed_bytes]].filter(([, , n]) => n);
  box.replaceChildren(h("div", { class: `speed ${told.verdict === "too slow" ? "slow" : told.verdict}` }, `${estimate(told.tokens_per_s)} `, h("small", {}, `${WORDS[told.verdict]}${told.measured ? "" : ", estimated"}`)),
    shares(rows.map(([kind, , n]) => [kind, n])), h("div", { class: "legend" }, rows.flatMap(([kind, label, n]) => [h("i", { class: kind }), h("span", {}, label), h("span", {}, bytes(n))])));
}

// A bar of parts: [class, size] each.
function shares(parts) {
  const whole = parts.reduce((sum, [, n]) => sum + n, 0);
  return h("div", { class: "plan-bar", "aria-hidden": "true" }, parts.map(([kind, n]) => { const part = h("span", { class: kind }); part.style.width = `${n / whole * 100}%`; return part; }));
}

async function load(budget, context) {
  await guarded(async () => {
    notice("Loading the model within this budget…");
    await post("/edgert/models/load", { model: modelOf(), memory: budget, context });
    notice("");
    state.server = await get("/edgert/state");
    changed("reload-models");
    show();
    $("memory").focus();
  });
}

function showFacts() {
  const box = $("facts");
  const now = state.server;
  if (!box || !now) return;
  const { memory: held } = now;
  const rows = [["Model", now.loading ? `loading ${now.loading}` : now.model ?? "none loaded"], ["Process", now.process ? `${bytes(held.rss_bytes)} resident` : "not running"],
    ["Weights that stay", held.pinned_bytes ? bytes(held.pinned_bytes) : "–"], ["Streamed per token", now.plan?.streamed_bytes_per_pass ? bytes(now.plan.streamed_bytes_per_pass) : "nothing"],
    ["Context", now.context_length ? `${count(now.context_length)} tokens` : "–"], ["Free memory", bytes(held.available_bytes)], ["Requests waiting", String(now.waiting)]];
  box.replaceChildren(...(now.cluster ? devices(now.cluster) : []), h("h3", {}, "Now"),
    h("dl", { class: "facts-list" }, rows.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])));
}

function devices({ devices: all, reason }) {
  return [h("h3", {}, "Devices"), shares(all.map((device, i) => [`device-${i % 4}`, device.bytes])),
    h("div", { class: "legend devices" }, all.flatMap((device, i) => [h("i", { class: `device-${i % 4}` }), h("span", {}, device.name), h("span", {}, `${Math.round(device.share * 100)} % · ${bytes(device.bytes)}`)])),
    reason ? h("p", { class: "said" }, reason) : null].filter(Boolean);
}
