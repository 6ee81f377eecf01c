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

async function answer(question, shown, asked) {
  const box = show("assistant", "");
  const mine = conversation;
  const start = performance.now();
  let first = null;
  let usage = null;
  let text = "";
  let reason = null;
  const system = element("system").value.trim();
  const turns = [...history, turn(question, shown)];
  running = new AbortController();
  element("send").textContent = "Stop";
  element("status").textContent = "";
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal: running.signal,
      body: JSON.stringify({
        messages: [...(system ? [{ role: "system", content: system }] : []), ...turns],
        temperature: Number(element("temperature").value),
        max_tokens: Number(element("max-tokens").value),
        stream: true,
        stream_options: { include_usage: true },
      }),
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      const choice = event.choices?.[0];
      if (!choice) continue;
      reason = choice.finish_reason ?? reason;
      if (!choice.delta.content) continue;
      first ??= performance.now();
      text += choice.delta.content;
      const atEnd = messages.scrollHeight - messages.scrollTop - messages.clientHeight < 60;
      box.textContent = text;
      if (atEnd) messages.scrollTop = messages.scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      if (mine === conversation) show("error", error.message);
      reason = "error";
    } else {
      reason = "stopped";
    }
  } finally {
    running = null;
    element("send").textContent = "Send";
  }
  if (mine !== conversation) return;
  if (text) {
    history = [...turns, { role: "assistant", content: text }];
  } else {
    box.remove();
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
  } catch (error) {
    element("model").textContent = error.message;
    element("settings").open = true;
  }
}

element("key").addEventListener("change", connect);
connect();
