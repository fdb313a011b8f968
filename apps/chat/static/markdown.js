// A model's text as a page may show it. Raw HTML is shown as the text that it is; images become links, so that no
// answer can make the browser fetch anything; and what marked makes passes DOMPurify all the same.

import { Marked } from "./vendor/marked.esm.js";
import DOMPurify from "./vendor/purify.js";
import hljs from "./vendor/highlight.js";
import { copy, h } from "./dom.js";

const HIGHLIGHT_UP_TO_CHARS = 40_000;
const SAFE_LINK = /^(https?:|mailto:)/i;
const escaped = (text) => text.replace(/[&<>"']/g, (char) => `&#${char.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html({ text }) { return escaped(text); },
    link({ href, title, tokens }) {
      const inner = this.parser.parseInline(tokens);
      if (!SAFE_LINK.test(href.trim())) return `${inner} (${escaped(href)})`;
      return `<a href="${escaped(href)}"${title ? ` title="${escaped(title)}"` : ""}>${inner}</a>`;
    },
    image({ href, text }) {
      const label = `[image: ${escaped(text || href)}]`;
      return SAFE_LINK.test(href.trim()) ? `<a href="${escaped(href)}">${label}</a>` : label;
    },
  },
});
const ALLOWED = {
  ALLOWED_TAGS: ["a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "input", "li", "ol", "p",
    "pre", "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul"],
  ALLOWED_ATTR: ["align", "checked", "class", "disabled", "href", "start", "title", "type"],
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

// The rendered text as a fragment.
export function render(text) {
  const fragment = DOMPurify.sanitize(marked.parse(text), ALLOWED);
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const box of fragment.querySelectorAll("input")) {
    if (box.type === "checkbox") { box.disabled = true; box.setAttribute("aria-label", box.checked ? "done" : "to do"); } else box.remove();
  }
  for (const table of fragment.querySelectorAll("table")) {
    const wrapper = h("div", { class: "table", tabIndex: 0, role: "region", "aria-label": "Table" });
    table.replaceWith(wrapper);
    wrapper.append(table);
  }
  for (const code of fragment.querySelectorAll("pre > code")) dress(code);
  return fragment;
}

function dress(code) {
  const language = /language-([\w+#-]+)/.exec(code.className)?.[1] ?? "";
  const text = code.textContent;
  code.className = "";
  if (hljs.getLanguage(language) && text.length < HIGHLIGHT_UP_TO_CHARS) {
    code.innerHTML = hljs.highlight(text, { language, ignoreIllegals: true }).value; // escaped by highlight.js
  }
  const button = h("button", {
    type: "button",
    onclick: async () => {
      await copy(text);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    },
  }, "Copy");
  const pre = code.parentElement;
  const box = h("div", { class: "code" }, h("div", { class: "code-head" }, h("span", {}, language || "text"), button));
  pre.replaceWith(box);
  pre.tabIndex = 0;
  box.append(pre);
}

// A model's reasoning comes first, between <think> and </think>; while it thinks, the end is missing.
export function parts(text) {
  const match = /^\s*<think>([\s\S]*?)(<\/think>|$)/.exec(text);
  if (!match) return { thought: null, thinking: false, answer: text };
  return { thought: match[1].trim(), thinking: !match[2], answer: text.slice(match[0].length) };
}
