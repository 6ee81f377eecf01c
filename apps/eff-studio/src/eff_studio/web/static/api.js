// Calls of the server. A key, where one is asked for, goes with each.

let key = sessionStorage.getItem("eff-studio-key") || "";

export function setKey(value) {
  key = value;
  sessionStorage.setItem("eff-studio-key", value);
}

export function getKey() {
  return key;
}

function headers(more) {
  return key ? { ...more, authorization: `Bearer ${key}` } : more || {};
}

async function checked(response) {
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // The body is no error of ours; the status has to do.
  }
  throw new Error(message);
}

export async function get(path) {
  return (await checked(await fetch(path, { headers: headers() }))).json();
}

export async function post(path, body) {
  const options = { method: "POST", headers: headers({ "content-type": "application/json" }) };
  if (body !== undefined) options.body = JSON.stringify(body);
  return (await checked(await fetch(path, options))).json();
}

export async function sendPicture(blob, path = "/api/pictures") {
  const kind = { "content-type": blob.type || "image/png" };
  return (await checked(await fetch(path, { method: "POST", headers: headers(kind), body: blob }))).json();
}

export async function remove(job) {
  await checked(await fetch(`/api/jobs/${job}`, { method: "DELETE", headers: headers() }));
}

const urls = new Map();

// Address of a stored picture for <img>. With a key the picture is fetched, since <img> sends none.
export async function pictureUrl(id) {
  const path = `/api/pictures/${id}.png`;
  if (!key) return path;
  if (!urls.has(id)) {
    const blob = await (await checked(await fetch(path, { headers: headers() }))).blob();
    urls.set(id, URL.createObjectURL(blob));
  }
  return urls.get(id);
}

// Calls `each` with the news of a job until it has ended; returns the last. EventSource cannot send a key.
export async function follow(job, each) {
  const response = await checked(await fetch(`/api/jobs/${job}/events`, { headers: headers() }));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  let last = null;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return last;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return last;
      last = JSON.parse(data);
      if (last.error && !last.type) throw new Error(last.error.message);
      each(last);
    }
  }
}
