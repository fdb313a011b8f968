// The box to write in: sending, stopping, files with their token counts.

import { ApiError, post } from "./api.js";
import { $, count, h, icon, iconButton, speed } from "./dom.js";
import { adopt, editLast, guarded, liveFigures, stop } from "./messages.js";
import { branch, changed, modelOf, on, renewDraft, state, tellOtherTabs, writing } from "./state.js";

const LONG_PASTE_CHARS = 6000; // becomes a file, so that the box stays readable
let files = []; // {name, id?, n_tokens?, error?, busy}
let sending = false;
let warmed = null;

export function startComposer() {
  const area = $("composer-text");
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("stop").addEventListener("click", stop);
  $("attach").addEventListener("click", () => $("attach-file").click());
  $("attach-file").addEventListener("change", (event) => { attach(event.target.files); event.target.value = ""; });
  area.addEventListener("input", () => { update(); warm(); });
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
    if (event.key === "ArrowUp" && !area.value && !writing()) { event.preventDefault(); editLast(); }
  });
  area.addEventListener("paste", (event) => {
    const text = event.clipboardData.getData("text");
    if (event.clipboardData.files.length) { event.preventDefault(); attach(event.clipboardData.files); }
    else if (text.length > LONG_PASTE_CHARS) { event.preventDefault(); attach([new File([text], "pasted.txt")]); }
  });
  for (const name of ["dragover", "dragleave", "drop"]) {
    $("main").addEventListener(name, (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      $("composer").classList.toggle("drop", name === "dragover");
      if (name === "drop") attach(event.dataTransfer.files);
    });
  }
  for (const what of ["branch", "writing", "models", "server"]) on(what, update);
  update();
}

export function setText(text) { $("composer-text").value = text; update(); $("composer-text").focus(); }

// Who writes will send: a model that is not in memory is loaded meanwhile. Nobody else's makes room for it.
function warm() {
  const model = modelOf();
  if (!model || warmed === model || !state.server || state.server.model || state.server.loading) return;
  warmed = model;
  post("/edgert/tokens", { model, texts: [""] }).catch(() => {}); // what fails is told when the message is sent
}

async function attach(list) {
  for (const file of [...list]) { // the list itself is emptied when its event is over
    const entry = { name: file.name, busy: true };
    files.push(entry);
    showFiles();
    try {
      const model = modelOf();
      Object.assign(entry, await post(`/edgert/attachments${model ? `?model=${encodeURIComponent(model)}` : ""}`, file,
        { "X-File-Name": encodeURIComponent(file.name) }));
    } catch (error) { entry.error = error.message; }
    entry.busy = false;
    showFiles();
  }
}

function showFiles() {
  $("chips").replaceChildren(...files.map((file) => h("li", { class: `file${file.error ? " bad" : ""}` }, icon("file"), h("span", {}, file.name),
    h("small", {}, file.busy ? "reading…" : file.error ?? `${file.exact ? "" : "about "}${count(file.n_tokens)} tokens`),
    iconButton("close", `Remove ${file.name}`, () => { files = files.filter((one) => one !== file); showFiles(); $("composer-text").focus(); }))));
  update();
}

function update() {
  const area = $("composer-text");
  area.placeholder = state.models && !modelOf() ? "Choose a model first" : "Ask anything";
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
  const busy = Boolean(writing());
  const ready = files.filter((file) => file.id);
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("send").disabled = sending || !modelOf() || files.some((file) => file.busy) || !(area.value.trim() || ready.length);
  showStatus(ready.reduce((sum, file) => sum + file.n_tokens, 0));
}

function showStatus(fileTokens) {
  const now = liveFigures();
  const last = branch().findLast((message) => message.figures)?.figures;
  const memory = state.server?.memory;
  const told = [];
  if (now?.speed) told.push(`${speed(now.speed)}, ${count(now.tokens)} tokens`);
  else if (last?.timings?.predicted_per_second) told.push(speed(last.timings.predicted_per_second));
  if (memory?.pinned_bytes) told.push(`${mib(memory.rss_bytes)} in memory`);
  const perToken = state.server?.plan?.streamed_bytes_per_pass;
  if (perToken) told.push(`${mib(perToken)} streamed per token`);
  $("status-text").textContent = told.join(" · ");
  const limit = state.server?.context_length ?? last?.context_length;
  const before = now?.promptTokens || (last ? last.prompt_tokens + last.completion_tokens : 0);
  const used = before + fileTokens + (now?.tokens ?? 0);
  $("context-text").textContent = limit && used ? `${count(used)} of ${count(limit)} tokens` : "";
  $("context-bar").style.width = limit ? `${Math.min(100, used / limit * 100)}%` : "0";
  document.querySelector(".meter").hidden = !(limit && used);
}

const mib = (n) => (n >= 2 ** 30 ? `${(n / 2 ** 30).toFixed(1)} GiB` : `${Math.round(n / 2 ** 20)} MiB`);

async function send() {
  if ($("send").disabled || $("send").hidden) return;
  sending = true;
  update();
  const area = $("composer-text");
  await guarded(async () => {
    const isNew = !state.chat;
    if (isNew) {
      const { model, system, settings } = state.draft;
      state.chat = { ...await post("/edgert/chats", { model: model ?? modelOf(), system, settings }), messages: [] };
    }
    const content = area.value;
    const made = await post(`/edgert/chats/${state.chat.id}/messages`, {
      content, parent_id: state.chat.leaf_id, attachments: files.filter((file) => file.id).map((file) => file.id) });
    area.value = "";
    files = [];
    showFiles();
    adopt(made.message, made.answer);
    if (isNew) { renewDraft(); history.replaceState(null, "", `#/chat/${state.chat.id}`); changed("opened"); }
    tellOtherTabs("chats");
    changed("reload-chats");
    if (made.error) throw new ApiError(0, made.error);
  });
  sending = false;
  update();
  area.focus();
}

