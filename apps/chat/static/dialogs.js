// Dialogs and menus: the browser's own <dialog> keeps the focus inside and closes on Escape.

import { openSession } from "./api.js";
import { $, h } from "./dom.js";

export function dialog(title, ...content) {
  const heading = h("h2", { id: "dialog-title" }, title);
  const box = h("dialog", { "aria-labelledby": "dialog-title" }, heading, ...content);
  box.addEventListener("close", () => box.remove());
  box.addEventListener("click", (event) => { if (event.target === box) box.close(); });
  $("dialogs").append(box);
  box.showModal();
  return box;
}

export function confirm(title, text, action) {
  return new Promise((resolve) => {
    const box = dialog(title, h("p", {}, text), h("div", { class: "buttons" },
      h("button", { type: "button", class: "button", onclick: () => box.close() }, "Cancel"),
      h("button", { type: "button", class: "button bad", onclick: () => box.close("yes") }, action)));
    box.addEventListener("close", () => resolve(box.returnValue === "yes"));
  });
}

export function ask(title, label, value = "", { type = "text", action = "Save" } = {}) {
  return new Promise((resolve) => {
    const input = h("input", { type, value, maxLength: 200, autocomplete: "off" });
    const form = h("form", { method: "dialog", onsubmit: () => { box.returnValue = "yes"; } },
      h("label", { class: "field" }, h("span", {}, label), input),
      h("div", { class: "buttons" },
        h("button", { type: "button", class: "button", onclick: () => box.close("no") }, "Cancel"),
        h("button", { type: "submit", class: "button main", value: "yes" }, action)));
    const box = dialog(title, form);
    box.addEventListener("close", () => resolve(box.returnValue === "yes" ? input.value.trim() : null));
    input.select();
  });
}

let asking = null;

export function askKey() {
  asking ??= (async () => {
    for (;;) {
      const key = await ask("API key", "The server asks for its key. It was shown where edgert was started.", "",
        { type: "password", action: "Enter" });
      if (key === null) continue;
      try { await openSession(key); asking = null; return; } catch { /* wrong: ask again */ }
    }
  })();
  return asking;
}

const KEYS = [["Enter", "send"], ["Shift Enter", "a new line"], ["Esc", "stop the answer"], ["↑", "edit your last message (in an empty box)"],
  ["Ctrl Shift O", "new chat"], ["Ctrl K", "search"], ["Ctrl B", "show or hide the list"], ["Ctrl Shift E", "rename this chat"],
  ["Ctrl Shift D", "delete this chat"], ["Ctrl .", "settings"], ["?", "this list"]];

export function showKeys() {
  const box = dialog("Keyboard", h("dl", { class: "keys" }, KEYS.flatMap(([keys, what]) => [
    h("dt", {}, keys.split(" ").map((key, i) => [i ? " " : "", h("kbd", {}, key)]).flat()), h("dd", {}, what)])),
  h("div", { class: "buttons" }, h("button", { type: "button", class: "button", onclick: () => box.close() }, "Close")));
}

// A menu below `button`; `items` are [label, action, class?], or [label, href].
export function menu(button, items) {
  const close = () => { box.remove(); button.setAttribute("aria-expanded", "false"); document.removeEventListener("pointerdown", outside, true); };
  const outside = (event) => { if (!box.contains(event.target)) close(); };
  const box = h("div", { class: "menu", role: "menu" }, items.map(([label, action, kind]) => typeof action === "string"
    ? h("a", { role: "menuitem", href: action, download: "", onclick: close, tabIndex: -1 }, label)
    : h("button", { type: "button", role: "menuitem", class: kind, tabIndex: -1, onclick: () => { close(); action(); } }, label)));
  box.addEventListener("keydown", (event) => {
    const all = [...box.children];
    const at = all.indexOf(document.activeElement);
    if (event.key === "Escape" || event.key === "Tab") { close(); button.focus(); event.preventDefault(); event.stopPropagation(); }
    if (event.key === "ArrowDown") all[(at + 1) % all.length].focus();
    if (event.key === "ArrowUp") all[(at + all.length - 1) % all.length].focus();
    if (event.key.startsWith("Arrow")) event.preventDefault();
  });
  document.body.append(box);
  const place = button.getBoundingClientRect();
  box.style.top = `${place.bottom + 4}px`;
  box.style.left = `${Math.max(8, Math.min(place.left, innerWidth - box.offsetWidth - 8))}px`;
  button.setAttribute("aria-expanded", "true");
  document.addEventListener("pointerdown", outside, true);
  box.firstElementChild.focus();
}
