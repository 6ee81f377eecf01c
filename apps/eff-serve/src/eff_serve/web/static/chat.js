import { ask, firstModel, timing } from "./api.js";
import { copy, make, markdown } from "./markdown.js";
import * as store from "./store.js";

const element = (id) => document.getElementById(id);
const messages = element("messages");
const KEPT = ["system", "temperature", "top-p", "max-tokens", "key"];
let chat = fresh(); // the conversation on the page: id, title, turns
let running = null; // AbortController of the answer that is being written
let pictures = []; // data URLs that go along with the next question
let seesPictures = false;

function fresh() {
  return { id: `${Date.now()}-${Math.random().toString(36).slice(2)}`, title: "", turns: [] };
}

const textOf = (turn) =>
  typeof turn.content === "string" ? turn.content : (turn.content.find((part) => part.type === "text")?.text ?? "");
const picturesOf = (turn) =>
  typeof turn.content === "string" ? [] : turn.content.flatMap((part) => part.image_url?.url ?? []);

function question(text, shown) {
  if (!shown.length) return { role: "user", content: text };
  const parts = shown.map((url) => ({ type: "image_url", image_url: { url } }));
  return { role: "user", content: [...parts, { type: "text", text }] };
}

// ---- the page

function button(label, title, act) {
  const node = make("button", "small", label);
  node.type = "button";
  node.title = title;
  node.addEventListener("click", () => act(node));
  return node;
}

function picture(url, alt) {
  const image = make("img");
  image.src = url;
  image.alt = alt;
  return image;
}

function show(kind, ...children) {
  element("hint").hidden = true;
  const box = make("div", `message ${kind}`, ...children);
  messages.append(box);
  messages.scrollTop = messages.scrollHeight;
  return box;
}

function fill(box, text, thoughts) {
  const atEnd = messages.scrollHeight - messages.scrollTop - messages.clientHeight < 60;
  const open = box.querySelector("details")?.open ?? !text;
  const parts = [markdown(text)];
  if (thoughts) {
    const details = make("details", "thoughts", make("summary", "quiet", "Thoughts"), make("p", "", thoughts));
    details.open = open;
    parts.unshift(details);
  }
  box.replaceChildren(...parts);
  if (atEnd) messages.scrollTop = messages.scrollHeight;
}

function draw() {
  messages.querySelectorAll(".turn, .message").forEach((box) => box.remove());
  element("hint").hidden = chat.turns.length > 0;
  chat.turns.forEach((turn, index) => drawTurn(turn, index));
  messages.scrollTop = messages.scrollHeight;
}

function drawTurn(turn, index) {
  const mine = turn.role === "user";
  const box = make("div", `message ${turn.role}`);
  const actions = make("div", "actions quiet");
  if (mine) {
    box.append(...picturesOf(turn).map((url) => picture(url, "picture that was sent")), textOf(turn));
    actions.append(button("Edit", "Change this question and ask again", () => edit(index, box, actions)));
  } else {
    fill(box, turn.content, turn.reasoning_content);
    actions.append(button("Copy", "Copy this answer", (node) => copy(turn.content, node)));
    if (index === chat.turns.length - 1) actions.append(button("Regenerate", "Answer anew", () => again(index)));
    if (turn.note) actions.append(make("span", "note", turn.note));
  }
  messages.append(make("div", `turn ${turn.role}`, box, actions));
}

function edit(index, box, actions) {
  if (running) return;
  const turn = chat.turns[index];
  const area = make("textarea");
  area.value = textOf(turn);
  area.rows = Math.min(12, area.value.split("\n").length + 1);
  area.setAttribute("aria-label", "Question");
  const send = button("Ask again", "What follows this question is replaced", () => {
    const text = area.value.trim();
    if (!text || running) return;
    chat.turns = chat.turns.slice(0, index);
    draw();
    answer(question(text, picturesOf(turn)));
  });
  box.replaceChildren(...picturesOf(turn).map((url) => picture(url, "picture that was sent")), area);
  actions.replaceChildren(send, button("Cancel", "Leave the question as it is", draw));
  area.focus();
}

function again(index) {
  if (running) return;
  const asked = chat.turns[index - 1];
  chat.turns = chat.turns.slice(0, index - 1);
  draw();
  answer(asked);
}

// Two boxes side by side: the plain answer and the steered one.
function pair(names) {
  const boxes = names.map(() => make("div"));
  const sides = names.map((name, i) => make("div", "", make("div", "quiet", name), boxes[i]));
  return [show("pair", ...sides), boxes];
}

// ---- asking

async function answer(asked) {
  const mine = chat;
  const turns = [...chat.turns, asked];
  chat.turns = turns;
  draw();
  const name = element("steering").value;
  const eff = name ? { [name]: true } : null;
  const both = eff && element("compare").checked;
  const alone = both ? null : show("assistant waiting", "\u2026");
  const [row, boxes] = both ? pair(["plain", name]) : [alone, [alone]];
  const system = element("system").value.trim();
  const body = {
    messages: [...(system ? [{ role: "system", content: system }] : []), ...turns.map(sent)],
    temperature: Number(element("temperature").value),
    top_p: Number(element("top-p").value),
    max_tokens: Number(element("max-tokens").value),
  };
  running = new AbortController();
  const { signal } = running;
  element("send").textContent = "Stop";
  const grown = (box) => (result) => {
    if (mine !== chat) return;
    fill(box, result.text, result.thoughts);
    element("status").textContent = timing(result);
  };
  const wanted = both ? [null, eff] : [eff];
  const results = await Promise.all(
    wanted.map((one, i) => ask({ ...body, ...(one && { eff: one }) }, signal, grown(boxes[i]))),
  );
  if (mine !== chat) return; // it belongs to a conversation that was left
  running = null;
  element("send").textContent = "Send";
  const result = results.at(-1); // the steered one goes on
  const note = timing(result);
  element("status").textContent = note;
  if (result.text) {
    const thoughts = result.thoughts ? { reasoning_content: result.thoughts } : {};
    chat.turns = [...turns, { role: "assistant", content: result.text, note, ...thoughts }];
    chat.title ||= textOf(turns[0]).slice(0, 60);
    store.save(chat);
    listChats();
    if (both) addActions(row);
    else draw();
  } else {
    chat.turns = turns.slice(0, -1);
    draw();
    giveBack(asked);
  }
  if (result.reason === "error") show("error", result.error);
}

const sent = ({ role, content, reasoning_content: thoughts }) => ({
  role,
  content,
  ...(thoughts && { reasoning_content: thoughts }),
});

function addActions(row) {
  const index = chat.turns.length - 1;
  const actions = make("div", "actions quiet", button("Regenerate", "Answer anew", () => again(index)));
  row.after(make("div", "turn", actions));
}

// A question that got no answer goes back to where it was written.
function giveBack(asked) {
  if (!element("prompt").value) element("prompt").value = textOf(asked);
  pictures = [...picturesOf(asked), ...pictures];
  showAttached();
}

// ---- conversations

function leave(next) {
  running?.abort();
  running = null;
  element("send").textContent = "Send";
  chat = next;
  pictures = [];
  showAttached();
  element("status").textContent = "";
  draw();
  listChats();
}

function listChats() {
  const rows = store.chats().map((kept) => {
    const open = button(kept.title || "Untitled", "Open this conversation", () => {
      leave({ ...kept });
      element("chats").hidden = true;
    });
    if (kept.id === chat.id) open.setAttribute("aria-current", "true");
    const drop = button("\u00d7", "Delete this conversation", () => {
      store.forget(kept.id);
      if (kept.id === chat.id) leave(fresh());
      else listChats();
    });
    return make("li", "", open, drop);
  });
  element("chat-list").replaceChildren(...(rows.length ? rows : [make("li", "quiet", "No conversations yet.")]));
}

// ---- pictures

function showAttached() {
  const row = element("attached");
  row.hidden = pictures.length === 0;
  row.replaceChildren(
    ...pictures.map((url, index) => {
      const node = button("", "Take this picture out", () => {
        pictures.splice(index, 1);
        showAttached();
      });
      node.append(picture(url, "attached picture"));
      return node;
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

// ---- what the reader does

element("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) {
    running.abort();
    return;
  }
  const prompt = element("prompt");
  const text = prompt.value.trim();
  if (!text) return;
  prompt.value = "";
  const shown = pictures;
  pictures = [];
  showAttached();
  answer(question(text, shown));
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

element("reset").addEventListener("click", () => leave(fresh()));
element("open-chats").addEventListener("click", () => {
  element("chats").hidden = !element("chats").hidden;
});
for (const id of KEPT) {
  element(id).addEventListener("change", () => {
    store.keep(Object.fromEntries(KEPT.map((name) => [name, element(name).value])));
    if (id === "key") connect();
  });
}

async function connect() {
  try {
    const model = await firstModel();
    const facts = [model.id, model.quantization, model.max_model_len ? `up to ${model.max_model_len} tokens` : model.state];
    element("model").textContent = facts.filter(Boolean).join(" \u00b7 ");
    const limit = element("max-tokens");
    const most = model.max_model_len;
    if (most) limit.max = most;
    if (most && Number(limit.value) > most / 2) limit.value = Math.floor(most / 2);
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

for (const [id, value] of Object.entries(store.settings())) {
  if (KEPT.includes(id) && typeof value === "string") element(id).value = value;
}
const [last] = store.chats();
if (last) chat = { ...last };
draw();
listChats();
connect();
