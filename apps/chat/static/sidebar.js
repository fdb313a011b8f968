// The list of conversations: by day, searched, renamed, deleted, exported and imported.

import { del, get, patch, post } from "./api.js";
import { $, h } from "./dom.js";
import { ask, confirm, menu } from "./dialogs.js";
import { guarded } from "./messages.js";
import { changed, on, state, tellOtherTabs } from "./state.js";

const SEARCH_AFTER_MS = 150;
let hits = null;
let timer = 0;

export function startSidebar() {
  $("new-chat").addEventListener("click", () => { location.hash = "#/"; narrowClose(); });
  $("search").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(() => guarded(search), SEARCH_AFTER_MS); });
  $("search").addEventListener("keydown", (event) => { if (event.key === "Escape") { $("search").value = ""; guarded(search); } });
  $("import-button").addEventListener("click", () => $("import-file").click());
  $("import-file").addEventListener("change", importFile);
  $("open-sidebar").addEventListener("click", toggle);
  $("close-sidebar").addEventListener("click", toggle);
  $("shade").addEventListener("click", toggle);
  $("chat-menu-button").addEventListener("click", () => menu($("chat-menu-button"), [
    ["Rename", rename], ["Export as Markdown", `/edgert/chats/${state.chat.id}/export?format=md`],
    ["Export as JSON", `/edgert/chats/${state.chat.id}/export?format=json`], ["Delete", remove, "bad"]]));
  on("reload-chats", reloadQuietly);
  on("other:chats", reloadQuietly);
  on("chat", show);
  on("opened", show);
  $("layout").classList.toggle("no-side", narrow());
}

const narrow = () => matchMedia("(max-width: 760px)").matches;
export function toggle() {
  const hidden = $("layout").classList.toggle("no-side");
  $("shade").hidden = hidden;
  if (!hidden && narrow()) $("new-chat").focus();
}
function narrowClose() { if (narrow() && !$("layout").classList.contains("no-side")) toggle(); }

export async function reload() {
  state.chats = (await get("/edgert/chats")).chats;
  const mine = state.chats.find((chat) => chat.id === state.chat?.id);
  if (mine) state.chat = { ...state.chat, title: mine.title };
  show();
}

// Where nobody waits for it: if the server is gone, the page says so anyway, and reloads when it is back.
const reloadQuietly = () => reload().catch(() => {});

function show() {
  const title = state.chat?.title ?? "New chat";
  document.title = state.chat ? `${title} · edgert` : "edgert";
  $("chat-title").textContent = title;
  $("chat-menu-button").hidden = !state.chat;
  const list = $("chat-list");
  if (hits) { showHits(list); return; }
  const groups = Map.groupBy ? Map.groupBy(state.chats, day) : grouped();
  const sections = [...groups].map(([name, chats]) => h("section", {}, h("h2", { class: "group" }, name), h("ul", {}, chats.map((chat) => h("li", {},
    h("a", { class: "chat-link", href: `#/chat/${chat.id}`, "aria-current": chat.id === state.chat?.id ? "page" : null, onclick: narrowClose }, chat.title))))));
  list.replaceChildren(...sections);
  if (!state.chats.length) list.append(h("p", { class: "empty" }, "Your conversations appear here. They stay on this machine."));
}

function grouped() {
  const groups = new Map();
  for (const chat of state.chats) groups.set(day(chat), [...(groups.get(day(chat)) ?? []), chat]);
  return groups;
}

function day(chat) {
  const start = new Date();
  start.setHours(0, 0, 0, 0);
  const daysAgo = (start.getTime() - chat.updated_ms) / 86_400_000;
  if (daysAgo <= 0) return "Today";
  if (daysAgo <= 1) return "Yesterday";
  if (daysAgo <= 7) return "Last seven days";
  return new Date(chat.updated_ms).toLocaleDateString("en", { month: "long", year: "numeric" });
}

async function search() {
  const text = $("search").value.trim();
  hits = text ? (await get(`/edgert/search?q=${encodeURIComponent(text)}`)).hits : null;
  show();
}

function showHits(list) {
  list.replaceChildren(h("ul", { "aria-label": "Search results" }, hits.map((hit) => h("li", {}, h("a", { class: "chat-link hit", href: `#/chat/${hit.chat_id}${hit.message_id ? `/${hit.message_id}` : ""}`,
    onclick: narrowClose }, hit.title, h("small", {}, marked(hit.snippet)))))));
  if (!hits.length) list.append(h("p", { class: "empty", role: "status" }, "Nothing found."));
}

// U+0002 and U+0003 stand around what was found.
const marked = (snippet) => snippet.split(/(\u0002[^\u0003]*\u0003)/).map((part) => (part.startsWith("\u0002") ? h("mark", {}, part.slice(1, -1)) : part));

export async function rename() {
  if (!state.chat) return;
  const title = await ask("Rename", "Title", state.chat.title);
  if (!title) return;
  await guarded(async () => { state.chat.title = (await patch(`/edgert/chats/${state.chat.id}`, { title })).title; });
  tellOtherTabs("chats");
  await reload();
}

export async function remove() {
  if (!state.chat || !await confirm("Delete this conversation?", `“${state.chat.title}” and all its branches are deleted.`, "Delete")) return;
  await guarded(async () => { await del(`/edgert/chats/${state.chat.id}`); location.hash = "#/"; });
  tellOtherTabs("chats");
  await reload();
}

async function importFile(event) {
  const [file] = event.target.files;
  event.target.value = "";
  await guarded(async () => {
    let body;
    try { body = JSON.parse(await file.text()); } catch { throw new Error(`${file.name} is not JSON.`); }
    const { chats } = await post("/edgert/import", body);
    tellOtherTabs("chats");
    await reload();
    if (chats.length) location.hash = `#/chat/${chats[0].id}`;
  });
  changed("branch");
}
