// The studio's server: what is asked of it, and what went wrong in words for the page.

// What went wrong, in words for the page.
export class Trouble extends Error {
  constructor(message, status = 0, field = null) {
    super(message);
    Object.assign(this, { status, field });
  }
}

export const AWAY = "The server does not answer. Is “maisi studio” still running?";

function reason(status, text) {
  let detail;
  try {
    detail = JSON.parse(text).detail;
  } catch {
    detail = null; // no JSON: a proxy's page, or nothing
  }
  if (Array.isArray(detail)) detail = detail.map((one) => `${(one.loc ?? []).slice(1).join(" ")}: ${one.msg}`).join("; ");
  if (typeof detail === "string" && detail) return detail;
  return {
    401: "This page needs its token. Open the address that “maisi studio” printed.",
    403: "This page needs its token. Open the address that “maisi studio” printed.",
    404: "The server does not have this any more.",
    413: "The file is too large.",
    429: "Too many jobs are waiting. Cancel one, or wait for one to end.",
    507: "The disk is full. Make room, then try again.",
  }[status] ?? `The server answered with an error (${status}). Its window says more.`;
}

export async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Trouble(AWAY);
  }
  if (!answer.ok) throw new Trouble(reason(answer.status, await answer.text().catch(() => "")), answer.status);
  return answer;
}

export const get = async (path) => (await ask(path)).json();
export const post = async (path, body) =>
  (await ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) })).json();

// A file's bytes as they are; fetch() cannot say how far it is.
export function send(path, file, progress) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", path);
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.upload.onprogress = (event) => progress(event.loaded / Math.max(event.total, 1));
    request.onload = () =>
      request.status < 300
        ? resolve(JSON.parse(request.responseText))
        : reject(new Trouble(reason(request.status, request.responseText), request.status));
    request.onerror = () => reject(new Trouble(`The file was not sent. ${AWAY}`));
    request.send(file);
  });
}

// What GET /v1/options said, from the page's begin on.
export const options = {};
