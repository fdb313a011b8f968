// What the page knows, and who wants to hear when it changes. Other tabs of the same browser hear of it too.

export const state = {
  chats: [],
  chat: null, // with `messages`: the whole tree, in the order of writing
  models: null, // /edgert/models
  server: null, // /edgert/state
  presets: [],
  draft: { model: null, system: "", settings: {} }, // of a chat that is not there yet
};

// The preset that new chats begin with, where the user has saved one.
export const USUAL = "Default";
export function renewDraft() {
  const usual = state.presets.find((one) => one.name === USUAL);
  state.draft = { model: state.draft.model, system: usual?.system ?? "", settings: usual?.settings ?? {} };
}

const listeners = new Map();
const otherTabs = new BroadcastChannel("edgert");

export function on(what, listener) {
  if (!listeners.has(what)) listeners.set(what, []);
  listeners.get(what).push(listener);
}

export function changed(what) {
  for (const listener of listeners.get(what) ?? []) listener();
}

export function tellOtherTabs(what, chatId = null) { otherTabs.postMessage({ what, chatId }); }

otherTabs.onmessage = ({ data }) => {
  for (const listener of listeners.get(`other:${data.what}`) ?? []) listener(data.chatId);
};

// The messages of the branch that is shown, from the first to the leaf.
export function branch() {
  const byId = new Map(state.chat?.messages.map((message) => [message.id, message]));
  const path = [];
  let here = byId.get(state.chat?.leaf_id);
  while (here) { path.unshift(here); here = byId.get(here.parent_id); }
  return path;
}

export const siblings = (message) => state.chat.messages.filter((one) => one.parent_id === message.parent_id && one.role === message.role);

// The end of the branch that begins with this message, by the newest children.
export function leafBelow(message) {
  let here = message;
  for (;;) {
    const children = state.chat.messages.filter((one) => one.parent_id === here.id);
    if (!children.length) return here;
    here = children.at(-1);
  }
}

export const writing = () => branch().find((message) => message.status === "writing") ?? null;

// The model that answers here: the chat's, else what was chosen in this tab, what the server was started with, what was chosen last.
export function modelOf() {
  const all = state.models?.models ?? [];
  const last = all.find((one) => one.name === localStorage.getItem("edgert-model"));
  return state.chat?.model ?? state.draft.model ?? state.models?.default ?? (last ?? all[0])?.name ?? null;
}
