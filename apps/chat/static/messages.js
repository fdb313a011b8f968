// The conversation on the screen: turns, their branches, an answer while it is written, and what to do when it fails.

import { follow, patch, post } from "./api.js";
import { $, announce, bytes, copy, count, h, icon, iconButton, notice, seconds, speed } from "./dom.js";
import { parts, render } from "./markdown.js";
import { branch, changed, leafBelow, modelOf, on, siblings, state, tellOtherTabs, writing } from "./state.js";

let unfollow = null;
let followed = null;
let live = null; // of the answer that is being written: its text, figures and elements
let editing = null;
const unfolded = new Set();
const LONG_CHARS = 1200;
const LONG_LINES = 14;

on("chat", show);

// Draw the branch anew. Elements are few: a conversation of a thousand turns takes some ten milliseconds.
export function show() {
  const list = $("messages");
  const path = branch();
  const atEnd = isAtEnd();
  list.replaceChildren(...path.map(draw));
  const unfinished = writing();
  if (unfinished?.id !== followed) watch(unfinished);
  else if (live) place(unfinished);
  if (atEnd || unfinished) toEnd();
  changed("branch");
}

function draw(message) {
  const mine = message.role === "user";
  const body = h("div", { class: mine ? "text" : "prose text" });
  const item = h("li", { class: `message ${message.role}`, id: `m-${message.id}`, "data-id": message.id },
    h("h2", { class: "visually-hidden" }, mine ? "You" : "Assistant"),
    message.attachments.length ? h("ul", { class: "files" }, message.attachments.map((file) => h("li", { class: "file" },
      icon("file"), h("span", {}, file.name), h("small", {}, `${count(file.n_tokens)} tokens`)))) : null, body);
  if (editing === message.id) {
    body.replaceWith(editor(message));
    return item;
  }
  if (mine) body.textContent = message.content;
  else if (message.status !== "writing") fill(body, message.content);
  if (mine && !message.content) body.remove();
  else if (mine && isLong(message.content)) item.append(folded(body, message.id));
  if (message.status === "failed") item.append(trouble(message));
  if (message.figures?.left_out) item.append(h("p", { class: "said" }, `The ${message.figures.left_out} oldest messages were left out: they did not fit the context.`));
  if (message.status === "interrupted") item.append(h("p", { class: "said" }, "The server ended before this answer did."));
  if (message.status === "stopped" && !message.content) item.append(h("p", { class: "said" }, "Stopped before the first word."));
  if (message.figures?.finish_reason === "length" && message.status === "done") item.append(cutShort(message.figures));
  item.append(tools(message));
  return item;
}

const isLong = (text) => text.length > LONG_CHARS || text.split("\n", LONG_LINES + 1).length > LONG_LINES;

// A long text of one's own is known: its beginning is enough, until somebody wants all of it.
function folded(body, id) {
  const fold = () => {
    body.classList.toggle("long", !unfolded.has(id));
    button.textContent = unfolded.has(id) ? "Show less" : "Show all";
    button.setAttribute("aria-expanded", String(unfolded.has(id)));
  };
  const button = h("button", { type: "button", class: "link", onclick: () => { if (!unfolded.delete(id)) unfolded.add(id); fold(); } });
  fold();
  return button;
}

function fill(body, text) {
  const { thought, thinking, answer } = parts(text);
  const content = [render(answer)];
  if (thought) {
    const open = body.querySelector("details")?.open ?? false;
    const box = h("div", { class: "prose" }, render(thought));
    content.unshift(h("details", { class: "think", open }, h("summary", {}, thinking ? "Thinking…" : "Thought"), box));
  }
  body.replaceChildren(...content);
}

function tools(message) {
  const bar = h("div", { class: "tools" });
  const versions = siblings(message);
  if (versions.length > 1) {
    const at = versions.findIndex((one) => one.id === message.id);
    bar.append(h("span", { class: "branch" },
      iconButton("left", "Previous version", () => flip(versions[at - 1]), { disabled: at === 0 }), `${at + 1}/${versions.length}`,
      iconButton("right", "Next version", () => flip(versions[at + 1]), { disabled: at === versions.length - 1 })));
  }
  if (message.status === "writing") return bar;
  const hover = h("span", { class: "on-hover" });
  hover.append(iconButton("copy", "Copy", async (event) => {
    await copy(message.content);
    announce("Copied");
    const button = event.currentTarget ?? hover.firstElementChild;
    button.classList.add("done");
  }), iconButton("edit", "Edit", () => edit(message.id)));
  if (message.role === "assistant") hover.append(iconButton("again", "Answer again", () => again(message)));
  bar.append(hover);
  if (message.figures) bar.append(figures(message));
  return bar;
}

// One line, which opens into all that is known.
function figures(message) {
  const { timings = {}, memory = {}, completion_tokens: n, prompt_tokens: asked, cached_tokens: kept, context_length: limit } = message.figures;
  const first = timings.time_to_first_token_ms;
  const line = [speed(timings.predicted_per_second), `${count(n)} tokens`, first && `first after ${seconds(first)}`];
  const read = (timings.prompt_read_bytes ?? 0) + (timings.predicted_read_bytes ?? 0);
  const rows = [["Prompt", `${count(asked)} tokens${kept ? `, ${count(kept)} of them known from before` : ""}`],
    ["Prompt read at", speed(timings.prompt_per_second)], ["First token after", first && seconds(first)], ["Written at", speed(timings.predicted_per_second)],
    ["Guessed rightly", timings.draft_n && `${count(timings.draft_n_accepted)} of ${count(timings.draft_n)} tokens`],
    ["Context", limit && `${count(asked + n)} of ${count(limit)} tokens`], ["Peak memory", memory.peak_rss_bytes && bytes(memory.peak_rss_bytes)],
    ["Read from disk", read && bytes(read)], ["Model", message.model]].filter(([, value]) => value);
  return h("details", { class: "meta" }, h("summary", {}, line.filter(Boolean).join(" · ")),
    h("dl", { class: "facts-list" }, rows.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])));
}

function cutShort({ prompt_tokens: asked, completion_tokens: n, context_length: limit }) {
  if (!limit || asked + n < limit) return h("p", { class: "said" }, "The answer ends here because it has reached the length that was set.");
  return h("div", { class: "said" }, h("p", {}, `The answer ends here because the context is full: ${count(limit)} tokens.`),
    h("button", { type: "button", class: "button", onclick: summarise }, "New chat with a summary"));
}

function trouble(message) {
  const error = message.error ?? {};
  const box = h("div", { class: "trouble", role: "alert" }, h("p", {}, error.message ?? "The answer failed."));
  const buttons = h("div", { class: "buttons" });
  if (error.code === "context_length_exceeded") {
    box.classList.add("mild");
    box.firstElementChild.textContent = `The conversation is longer than the model can read: ${count(error.n_prompt_tokens)} tokens, and the context holds ${count(error.n_ctx)}.`;
    buttons.append(
      h("button", { type: "button", class: "button", onclick: () => { state.chat.settings.leave_out = true; again(message, { leave_out: true }); } }, "Go on without the oldest turns"),
      h("button", { type: "button", class: "button", onclick: summarise }, "New chat with a summary"));
    const trained = state.models?.models.find((one) => one.name === modelOf())?.context_length ?? 0;
    if (trained > error.n_ctx) buttons.append(h("button", { type: "button", class: "button", onclick: () => changed("want-context") }, "A longer context…"));
  } else buttons.append(h("button", { type: "button", class: "button", onclick: () => again(message) }, "Try again"));
  box.append(buttons);
  return box;
}

// ---- an answer while it is written

function watch(message) {
  unfollow?.();
  followed = message?.id ?? null;
  live = null;
  unfollow = null;
  if (!message) return;
  live = { text: message.content, tokens: 0, speed: null, progress: null, promptTokens: 0, frame: 0, costMs: 0 };
  place(message);
  unfollow = follow(message.id, {
    snapshot(data) { live.text = data.content; paintSoon(); },
    delta(data) { live.text += data.text; live.progress = null; live.speed = data.tokens_per_second; live.tokens = data.n_tokens; paintSoon(); },
    progress(data) { live.progress = data; live.promptTokens = data.n_total ?? 0; paintSoon(); },
    end(data) { finish(data.message); },
    lost() { notice("The server does not answer; trying again.", true); },
    found() { if ($("notice").classList.contains("bad")) notice(""); },
    gone() { changed("reload"); },
  });
  changed("writing");
}

function place(message) {
  live.body = document.querySelector(`#m-${message.id} .text`);
  paint();
}

function paintSoon() {
  if (live.frame) return;
  live.frame = setTimeout(() => requestAnimationFrame(() => { if (live) { live.frame = 0; paint(); } }), Math.min(400, live.costMs * 4));
}

function paint() {
  const { body, text } = live;
  if (!body) return;
  const began = performance.now();
  const atEnd = isAtEnd();
  if (text) fill(body, text);
  else body.replaceChildren(waiting(live));
  body.classList.toggle("caret", Boolean(text));
  if (atEnd) toEnd();
  live.costMs = performance.now() - began;
  changed("writing");
}

function waiting({ progress }) {
  const box = h("div", { class: "waiting" });
  const loading = progress ? progress.loading : state.server?.loading;
  if (progress?.kind === "prefill" && progress.time_ms) { // not for a moment only
    box.append(h("span", {}, `Reading: ${count(progress.n_done)} of ${count(progress.n_total)} tokens${timeLeft(progress)}`),
      h("progress", { max: progress.n_total, value: progress.n_done, "aria-label": "Prompt read" }));
  } else if (loading) box.append(h("span", {}, `Loading ${loading}…`), h("progress", { "aria-label": "Loading" }));
  else if (progress?.kind === "waiting" && progress.place) box.append(h("span", {}, `Waiting: ${progress.place === 1 ? "one answer is" : `${progress.place} answers are`} ahead of this one`), h("progress", { "aria-label": "Waiting" }));
  else box.append(h("span", { class: "caret" }, ""));
  return box;
}

// Tokens that were known before have cost nothing.
function timeLeft({ n_done: done, n_total: total, n_cached: cached, time_ms: ms }) {
  const perMs = (done - cached) / ms;
  return perMs > 0 ? `, ${seconds((total - done) / perMs)} left` : "";
}

function finish(message) {
  unfollow?.();
  unfollow = followed = live = null;
  const at = state.chat?.messages.findIndex((one) => one.id === message.id) ?? -1;
  if (at >= 0) state.chat.messages[at] = message;
  show();
  announce(message.status === "failed" ? "The answer failed." : "The answer is complete.");
  tellOtherTabs("chat", message.chat_id);
  changed("finished");
}

export const liveFigures = () => (live ? { speed: live.speed, tokens: live.tokens, promptTokens: live.promptTokens } : null);

export async function stop() {
  const message = writing();
  if (message) await guarded(() => post(`/edgert/messages/${message.id}/stop`));
}

// ---- branches

// Take new messages into the tree and show the last of them.
export function adopt(...messages) {
  const fresh = messages.filter(Boolean);
  state.chat.messages.push(...fresh.filter((one) => !state.chat.messages.some((old) => old.id === one.id)));
  state.chat.leaf_id = fresh.at(-1).id;
  editing = null;
  show();
  toEnd();
  tellOtherTabs("chat", state.chat.id);
}

async function flip(message) {
  state.chat.leaf_id = leafBelow(message).id;
  show();
  $(`m-${message.id}`)?.querySelector("button:not(:disabled)")?.focus();
  await guarded(() => patch(`/edgert/chats/${state.chat.id}`, { leaf_id: state.chat.leaf_id }));
}

async function again(message, more = {}) {
  await guarded(async () => adopt((await post(`/edgert/messages/${message.id}/regenerate`, more)).answer));
}

async function summarise() {
  await guarded(async () => {
    const { chat } = await post(`/edgert/chats/${state.chat.id}/summarise`);
    tellOtherTabs("chats");
    location.hash = `#/chat/${chat.id}`;
  });
}

export function edit(messageId) {
  editing = messageId;
  show();
  const area = document.querySelector(".edit textarea");
  area?.focus();
  area?.setSelectionRange(area.value.length, area.value.length);
}

export const editLast = () => { const mine = branch().findLast((one) => one.role === "user"); if (mine) edit(mine.id); };

function editor(message) {
  const mine = message.role === "user";
  const area = h("textarea", { value: message.content, "aria-label": mine ? "Edit your message" : "Edit the answer" });
  const close = () => { editing = null; show(); };
  const save = () => guarded(async () => {
    const made = await post(`/edgert/messages/${message.id}/edit`, { content: area.value });
    adopt(made.message, made.answer);
    if (made.error) notice(made.error.message, true);
  });
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); close(); }
    if (event.key === "Enter" && !event.shiftKey && mine && !event.isComposing) { event.preventDefault(); save(); }
  });
  return h("div", { class: "edit" }, area, h("div", { class: "buttons" },
    h("button", { type: "button", class: "button main", onclick: save }, mine ? "Send" : "Save"),
    h("button", { type: "button", class: "button", onclick: close }, "Cancel")));
}

export async function guarded(work) {
  try { notice(""); await work(); } catch (error) { notice(error.message, true); }
}

// ---- scrolling: the end stays in sight while an answer grows, unless the reader has gone up

const isAtEnd = () => { const box = $("scroll"); return box.scrollHeight - box.scrollTop - box.clientHeight < 90; };
export function toEnd() { const box = $("scroll"); box.scrollTop = box.scrollHeight; }
export function watchScrolling() {
  const box = $("scroll");
  box.addEventListener("scroll", () => { $("to-end").hidden = isAtEnd(); }, { passive: true });
  $("to-end").addEventListener("click", toEnd);
}
