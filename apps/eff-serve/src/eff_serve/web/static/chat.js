"use strict";

const element = (id) => document.getElementById(id);
const messages = element("messages");
let history = []; // of this page: it is gone when the page is
let conversation = 0; // an answer that belongs to an earlier one leaves no trace
let running = null; // AbortController of the answer that is being written
let pictures = []; // data URLs that go along with the next question
let seesPictures = false;

const headers = () => {
  const key = element("key").value.trim();
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
};

// Text goes in as text, never as HTML: an answer cannot bring markup or scripts.
function show(kind, text, shown = []) {
  element("hint").hidden = true;
  const box = document.createElement("div");
  box.className = `message ${kind}`;
  box.textContent = text;
  box.prepend(...shown.map((url) => picture(url, "picture that was sent")));
  messages.append(box);
  messages.scrollTop = messages.scrollHeight;
  return box;
}

function picture(url, alt) {
  const image = document.createElement("img");
  image.src = url;
  image.alt = alt;
  return image;
}

function showAttached() {
  const row = element("attached");
  row.hidden = pictures.length === 0;
  row.replaceChildren(
    ...pictures.map((url, index) => {
      const button = document.createElement("button");
      button.type = "button";
      button.title = "Take this picture out";
      button.append(picture(url, "attached picture"));
      button.addEventListener("click", () => {
        pictures.splice(index, 1);
        showAttached();
      });
      return button;
    }),
  );
}

function attach(files) {
  if (!seesPictures) return;
  for (const file of files) {
    if (!file.type.startsWith("image/")) continue;
    const reader = new FileReader();
    reader.addEventListener("load", () => {
      pictures.push(reader.result);
      showAttached();
    });
    reader.readAsDataURL(file);
  }
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

function turn(question, shown) {
  if (!shown.length) return { role: "user", content: question };
  const parts = shown.map((url) => ({ type: "image_url", image_url: { url } }));
  return { role: "user", content: [...parts, { type: "text", text: question }] };
}

// One answer into one box: its text, usage, why it ended, and when it began.
async function write(box, turns, eff, signal) {
  const result = { text: "", usage: null, reason: null, error: null, start: performance.now(), first: null };
  const system = element("system").value.trim();
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal,
      body: JSON.stringify({
        messages: [...(system ? [{ role: "system", content: system }] : []), ...turns],
        temperature: Number(element("temperature").value),
        max_tokens: Number(element("max-tokens").value),
        stream: true,
        stream_options: { include_usage: true },
        ...(eff && { eff }),
      }),
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      result.usage = event.usage ?? result.usage;
      const choice = event.choices?.[0];
      if (!choice) continue;
      result.reason = choice.finish_reason ?? result.reason;
      if (!choice.delta.content) continue;
      result.first ??= performance.now();
      result.text += choice.delta.content;
      const atEnd = messages.scrollHeight - messages.scrollTop - messages.clientHeight < 60;
      box.textContent = result.text;
      if (atEnd) messages.scrollTop = messages.scrollHeight;
    }
  } catch (error) {
    result.reason = error.name === "AbortError" ? "stopped" : "error";
    result.error = error.message;
  }
  return result;
}

// Two boxes side by side: the plain answer and the steered one.
function pair(names) {
  const row = document.createElement("div");
  row.className = "message pair";
  const boxes = names.map((name) => {
    const side = document.createElement("div");
    const title = document.createElement("div");
    title.className = "quiet";
    title.textContent = name;
    const box = document.createElement("div");
    side.append(title, box);
    row.append(side);
    return box;
  });
  messages.append(row);
  messages.scrollTop = messages.scrollHeight;
  return [row, boxes];
}

async function answer(question, shown, asked) {
  const mine = conversation;
  const turns = [...history, turn(question, shown)];
  const name = element("steering").value;
  const eff = name ? { [name]: true } : null;
  const both = eff && element("compare").checked;
  const alone = both ? null : show("assistant", "");
  const [row, boxes] = both ? pair(["plain", name]) : [alone, [alone]];
  running = new AbortController();
  element("send").textContent = "Stop";
  element("status").textContent = "";
  const { signal } = running;
  const wanted = both ? [null, eff] : [eff];
  const results = await Promise.all(wanted.map((one, i) => write(boxes[i], turns, one, signal)));
  running = null;
  element("send").textContent = "Send";
  if (mine !== conversation) return;
  const { text, usage, reason, error, start, first } = results.at(-1); // the steered one goes on
  if (error && reason === "error") show("error", error);
  if (text) {
    history = [...turns, { role: "assistant", content: text }];
  } else {
    row.remove();
    if (reason === "error") giveBack(question, shown, asked);
  }
  if (usage && first !== null) {
    const seconds = (performance.now() - first) / 1000;
    const speed = usage.completion_tokens > 1 ? (usage.completion_tokens - 1) / seconds : 0;
    const parts = [`${usage.completion_tokens} tokens`, `first after ${Math.round(first - start)} ms`];
    if (speed) parts.push(`${speed.toFixed(1)} tokens/s`);
    if (reason === "length") parts.push("cut at the limit of tokens");
    element("status").textContent = parts.join(" \u00b7 ");
  } else if (reason === "stopped") {
    element("status").textContent = "stopped";
  }
}

// A question that got no answer goes back to where it was written.
function giveBack(question, shown, asked) {
  asked.remove();
  if (!element("prompt").value) element("prompt").value = question;
  pictures = [...shown, ...pictures];
  showAttached();
}

element("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) {
    running.abort();
    return;
  }
  const prompt = element("prompt");
  const question = prompt.value.trim();
  if (!question) return;
  prompt.value = "";
  const shown = pictures;
  pictures = [];
  showAttached();
  answer(question, shown, show("user", question, shown));
});

element("picture").addEventListener("change", (event) => {
  attach(event.target.files);
  event.target.value = "";
});
document.addEventListener("paste", (event) => attach(event.clipboardData.files));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  attach(event.dataTransfer.files);
});

element("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) element("ask").requestSubmit();
});

element("reset").addEventListener("click", () => {
  conversation += 1;
  running?.abort();
  history = [];
  pictures = [];
  showAttached();
  messages.querySelectorAll(".message").forEach((box) => box.remove());
  element("hint").hidden = false;
  element("status").textContent = "";
});

async function connect() {
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    if (!response.ok) throw new Error(await failure(response));
    const model = (await response.json()).data[0];
    element("model").textContent = `${model.id}, up to ${model.max_model_len} tokens`;
    const limit = element("max-tokens");
    limit.max = model.max_model_len;
    if (Number(limit.value) > model.max_model_len / 2) limit.value = Math.floor(model.max_model_len / 2);
    seesPictures = model.input_modalities.includes("image");
    element("attach").hidden = !seesPictures;
    const steering = model.steering ?? [];
    element("steering-row").hidden = element("compare-row").hidden = steering.length === 0;
    element("steering").replaceChildren(new Option("none", ""), ...steering.map((name) => new Option(name, name)));
  } catch (error) {
    element("model").textContent = error.message;
    element("settings").open = true;
  }
}

element("key").addEventListener("change", connect);
connect();
