// What the page knows, and who wants to hear when it changes. Other tabs of the same browser hear of it too.

export const state = {
  chats: [],
  chat: null, // with `messages`: the whole tree, in the order of writing
  models: null, // /edgert/models
  server: null, // /edgert/state
  draft: { model: null, system: "", settings: {} }, // of a chat that is not there yet
};

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
export const modelOf = () => state.chat?.model ?? state.draft.model ?? state.models?.default ?? state.models?.models[0]?.name ?? null;
