// Starts the page: which conversation the address names, what the keys do, and how the server is.

import { get, onKeyNeeded, onOffline } from "./api.js";
import { startComposer } from "./composer.js";
import { askKey, showKeys } from "./dialogs.js";
import { $, notice } from "./dom.js";
import { stop, toEnd, watchScrolling } from "./messages.js";
import { reload as reloadModels, startModels } from "./models.js";
import { reloadPresets, startPanel, toggle as togglePanel } from "./panel.js";
import { reload as reloadChats, remove, rename, startSidebar, toggle as toggleSidebar } from "./sidebar.js";
import { changed, on, renewDraft, state, writing } from "./state.js";

const POLL_MS = 2000;

async function open() {
  const [, chatId, messageId] = /^#\/chat\/(\w+)(?:\/(\w+))?/.exec(location.hash) ?? [];
  try {
    state.chat = chatId ? await get(`/edgert/chats/${chatId}`) : null;
    notice("");
  } catch (error) {
    state.chat = null;
    notice(error.message, true);
  }
  if (messageId) showBranchOf(messageId);
  changed("chat");
  if (messageId) $(`m-${messageId}`)?.scrollIntoView({ block: "center" });
  else toEnd();
  $("composer-text").focus();
}

function showBranchOf(messageId) {
  const messages = state.chat?.messages ?? [];
  let here = messages.find((one) => one.id === messageId);
  while (here) {
    const parent = here.id;
    state.chat.leaf_id = parent;
    here = messages.findLast((one) => one.parent_id === parent);
  }
}

async function reopen(chatId) {
  if (state.chat && (!chatId || chatId === state.chat.id) && !document.querySelector(".edit")) {
    const scroll = $("scroll").scrollTop;
    state.chat = await get(`/edgert/chats/${state.chat.id}`).catch(() => state.chat);
    changed("chat");
    if (!writing()) $("scroll").scrollTop = scroll;
  }
}

// Whoever asks in vain notes it: a server that is killed and started again between two looks was away too.
let wasAway = false;

async function look() {
  if (document.hidden) return;
  try {
    const now = await get("/edgert/state");
    const other = now.model !== state.server?.model || now.budget_bytes !== state.server?.budget_bytes;
    state.server = now;
    changed("server");
    if (wasAway) { wasAway = false; notice(""); await Promise.all([reloadChats(), reloadModels(), state.chat ? reopen() : open()]); }
    else if (other) await reloadModels();
  } catch (error) {
    wasAway = true;
    notice(error.message, true);
  }
}

function keys(event) {
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName ?? "");
  const command = event.ctrlKey || event.metaKey;
  if (document.querySelector("dialog[open], .menu")) return;
  if (event.key === "Escape" && writing()) stop();
  else if (command && event.shiftKey && event.code === "KeyO") location.hash = "#/";
  else if (command && event.shiftKey && event.code === "KeyE") rename();
  else if (command && event.shiftKey && event.code === "KeyD") remove();
  else if (command && event.code === "KeyK") { if ($("layout").classList.contains("no-side")) toggleSidebar(); $("search").focus(); $("search").select(); }
  else if (command && event.code === "KeyB") toggleSidebar();
  else if (command && event.key === ".") togglePanel();
  else if (event.key === "?" && !typing) showKeys();
  else return;
  event.preventDefault();
}

function flipTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
  localStorage.setItem("edgert-theme", document.documentElement.dataset.theme);
}

async function start() {
  onKeyNeeded(askKey);
  onOffline(() => { wasAway = true; });
  startSidebar();
  startModels();
  startPanel();
  startComposer();
  watchScrolling();
  document.addEventListener("keydown", keys);
  $("theme-button").addEventListener("click", flipTheme);
  $("help-button").addEventListener("click", showKeys);
  window.addEventListener("hashchange", open);
  document.addEventListener("visibilitychange", () => { look(); if (!document.hidden) reloadChats().catch(() => {}); });
  on("other:chat", (chatId) => reopen(chatId));
  on("reload", () => reopen());
  on("finished", () => { look(); reloadModels().catch(() => {}); reloadChats().catch(() => {}); });
  await Promise.all([reloadModels(), reloadChats(), reloadPresets().then(renewDraft), open(), look()].map((one) => one.catch((error) => notice(error.message, true))));
  document.documentElement.dataset.ready = "true";
  setInterval(look, POLL_MS);
}

start();
