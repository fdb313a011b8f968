// Choosing a model, with what each would do here; and the first run, when there is none.

import { del, get, patch, post } from "./api.js";
import { $, bytes, count, estimate, h, seconds } from "./dom.js";
import { dialog } from "./dialogs.js";
import { setText } from "./composer.js";
import { guarded } from "./messages.js";
import { changed, modelOf, on, state } from "./state.js";

const IDEAS = [["Explain", "Explain how a bicycle stays upright, as to a curious child."], ["Write", "Write a friendly message that moves a meeting to Thursday."],
  ["Code", "Write a Python function that says whether a word is a palindrome, with tests."]];
const POLL_MS = 500;

export function startModels() {
  $("model-button").addEventListener("click", choose);
  on("models", show);
  on("chat", show);
  on("reload-models", () => guarded(reload));
}

export async function reload(fresh = false) {
  state.models = await get(`/edgert/models${fresh ? "?fresh=1" : ""}`);
  changed("models");
}

export function badge(forecast) {
  if (!forecast) return null;
  const kind = { fits: "fits", streams: "streams", "too slow": "slow" }[forecast.verdict];
  return h("span", { class: `badge ${kind}` }, `${forecast.verdict} · ${estimate(forecast.tokens_per_s)}`);
}

function show() {
  const name = modelOf();
  const model = state.models?.models.find((one) => one.name === name);
  $("model-name").textContent = name ?? "No model";
  const mark = badge(model?.forecast);
  $("model-badge").hidden = !mark;
  if (mark) { $("model-badge").className = mark.className; $("model-badge").textContent = model.forecast.verdict; $("model-badge").title = mark.textContent; }
  welcome();
}

function choose() {
  const pick = async (name) => {
    box.close();
    state.draft.model = name;
    localStorage.setItem("edgert-model", name);
    if (state.chat) { state.chat.model = name; await guarded(() => patch(`/edgert/chats/${state.chat.id}`, { model: name })); }
    changed("models");
  };
  const list = h("ul", { class: "choices" }, (state.models?.models ?? []).map((model) => h("li", {}, h("button", {
    type: "button", class: "choice", "aria-pressed": String(model.name === modelOf()), disabled: Boolean(model.problem), onclick: () => pick(model.name) },
  h("strong", {}, model.name), h("small", {}, model.problem ?? [model.architecture, model.quantisation, bytes(model.size_bytes), model.context_length && `${count(model.context_length)} tokens of context`].filter(Boolean).join(" · ")),
  h("span", { class: "right" }, badge(model.forecast), stateOf(model))))));
  const box = dialog("Model", state.models?.models.length ? list : h("p", {}, "There is no model yet."), h("div", { class: "buttons" },
    h("button", { type: "button", class: "button", onclick: () => { box.close(); guarded(() => offer(true)); } }, "Get another model"),
    h("button", { type: "button", class: "button", onclick: () => box.close() }, "Close")));
}

function stateOf(model) {
  if (state.server?.loading === model.name) return h("small", {}, "loading…");
  return model.loaded ? h("small", {}, "loaded") : null;
}

// ---- when there is nothing to show

function welcome() {
  const box = $("welcome");
  box.hidden = Boolean(state.chat);
  $("messages").hidden = !box.hidden;
  if (box.hidden || !state.models) return;
  if (!state.models.models.length) { if (!box.dataset.offer) guarded(() => offer(false)); return; }
  delete box.dataset.offer;
  box.replaceChildren(h("h2", {}, "What shall we work on?"), h("p", {}, `${modelOf()} answers on this machine. Nothing that you write leaves it.`),
    h("div", { class: "cards" }, IDEAS.map(([title, text]) => h("button", { type: "button", class: "card", onclick: () => setText(text) }, h("strong", {}, title), h("p", {}, text)))));
}

async function offer(inDialog) {
  if (!inDialog) $("welcome").dataset.offer = "1";
  const [first, { download }] = await Promise.all([get("/edgert/first-run"), get("/edgert/download")]);
  const running = h("div", { class: "own", role: "status" });
  const cards = h("div", { class: "cards" }, first.suggestions.map((one) => h("div", { class: "card" }, h("strong", {}, one.title), badge(one.forecast), h("p", {}, one.about),
    h("span", { class: "facts" }, `${bytes(one.size_bytes)} to fetch`), h("button", { type: "button", class: "button main", onclick: () => fetchModel(one.model, running) }, "Get it"))));
  const own = h("p", { class: "own" }, "Or use a file of your own: put a .gguf file into ", h("code", {}, first.models_dir), ", or start ", h("code", {}, "edgert chat FILE.gguf"), ". ",
    h("button", { type: "button", class: "link", onclick: () => guarded(() => reload(true)) }, "Look again"));
  if (download && !download.finished) guarded(() => followDownload(running)); // it goes on, whoever looks
  if (inDialog) {
    const box = dialog("Get a model", cards, running, own, h("div", { class: "buttons" }, h("button", { type: "button", class: "button", onclick: () => box.close() }, "Close")));
  } else {
    $("welcome").replaceChildren(h("h2", {}, "Choose a model to begin with"), h("p", {}, "It is fetched once and then works without a network. These three suit this device; the speeds are estimates."), cards, running, own);
  }
}

async function fetchModel(model, box) {
  await guarded(async () => {
    await post("/edgert/download", { model });
    await followDownload(box);
  });
}

async function followDownload(box) {
  const line = h("p", {}, "Fetching…");
  const bar = h("progress", { "aria-label": "Download" });
  box.replaceChildren(line, bar, h("button", { type: "button", class: "link", onclick: () => guarded(() => del("/edgert/download")) }, "Stop"));
  let first = null; // where it was when somebody began to look: speed is measured from there
  for (;;) {
    const { download } = await get("/edgert/download");
    if (download.finished) {
      box.replaceChildren(h("p", {}, download.error ? "What has arrived is kept." : "It is here."));
      if (download.error) throw new Error(download.error);
      break;
    }
    if (first?.total !== download.total_bytes) first = { total: download.total_bytes, done: download.done_bytes, atMs: performance.now() };
    line.textContent = [download.text || `Fetching ${download.model}`, download.total_bytes && howFar(download, first)].filter(Boolean).join(" · ");
    if (download.total_bytes) { bar.max = download.total_bytes; bar.value = download.done_bytes; }
    await new Promise((resolve) => { setTimeout(resolve, POLL_MS); });
  }
  await reload(true);
}

function howFar({ done_bytes: done, total_bytes: total }, first) {
  const perMs = (done - first.done) / (performance.now() - first.atMs);
  return `${bytes(done)} of ${bytes(total)}${perMs > 0 ? `, ${seconds((total - done) / perMs)} left` : ""}`;
}
