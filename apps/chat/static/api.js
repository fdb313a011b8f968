// Talking to the server: JSON in and out, errors with the server's own words.

export class ApiError extends Error {
  constructor(status, error) {
    super(error.message ?? `the server answered ${status}`);
    this.status = status;
    this.code = error.code;
  }
}

let askKey = null;
let tellOffline = () => {};

// `ask` shows the dialog for the API key and resolves once the server has taken it.
export function onKeyNeeded(ask) { askKey = ask; }

// `tell` hears of every request that no server has answered.
export function onOffline(tell) { tellOffline = tell; }

async function request(method, path, body, headers = {}) {
  const options = { method, headers: { ...headers } };
  if (body instanceof Blob) options.body = body;
  else if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers["Content-Type"] = "application/json";
  }
  let reply;
  try {
    reply = await fetch(path, options);
  } catch {
    tellOffline();
    throw new ApiError(0, { message: "The server does not answer. Is edgert still running?", code: "offline" });
  }
  if (reply.status === 401 && askKey && path !== "/edgert/session") {
    await askKey();
    return request(method, path, body, headers);
  }
  const data = await reply.json().catch(() => ({}));
  if (!reply.ok) throw new ApiError(reply.status, data.error ?? {});
  return data;
}

export const get = (path) => request("GET", path);
export const post = (path, body = {}, headers = {}) => request("POST", path, body, headers);
export const patch = (path, body) => request("PATCH", path, body);
export const del = (path) => request("DELETE", path);
export const openSession = (key) => request("POST", "/edgert/session", {}, { Authorization: `Bearer ${key}` });

// Follow an answer. The browser connects again by itself, and then a new snapshot comes first; `lost` says that it tries.
export function follow(messageId, handlers) {
  const source = new EventSource(`/edgert/messages/${messageId}/events`);
  for (const name of ["snapshot", "delta", "progress", "end"]) {
    source.addEventListener(name, (event) => {
      handlers.found?.();
      if (name === "end") source.close();
      handlers[name]?.(JSON.parse(event.data));
    });
  }
  source.onerror = () => {
    if (source.readyState === EventSource.CLOSED) handlers.gone?.();
    else handlers.lost?.();
  };
  return () => source.close();
}
