// The page: joins form, easel, history and server.

import { follow, get, getKey, pictureUrl, post, sendPicture, setKey } from "./api.js";
import * as easel from "./canvas.js";
import { drawGrid, fillGridNames } from "./grid.js";
import { buildHeads } from "./heads.js";
import { loadHistory, mark, onOpen, put } from "./history.js";
import "./layers.js";
import { begin, change, commit, onChange, state, undo } from "./settings.js";

const find = (id) => document.getElementById(id);
let running = null;
let vocabulary = []; // what the model knows, if it knows little
let shown = null; // {job, picture} on the easel

function say(text, bad = false) {
  find("status").textContent = text;
  find("status").classList.toggle("bad", bad);
}

function guard(work) {
  return async (...args) => {
    try {
      await work(...args);
    } catch (error) {
      say(error.message, true);
    }
  };
}

async function show(job, picture) {
  shown = picture ? { job, picture } : null;
  mark(picture);
  if (picture) {
    const address = await pictureUrl(picture);
    await easel.show(address);
    find("save").href = address;
  }
  find("save").hidden = !picture;
  for (const id of ["pin", "use", "into"]) find(id).disabled = !picture;
  point(job);
  if (job && job.error) say(job.error, true);
}

// Words of the shown picture's prompt; a click shows where the model sees one.
function point(job) {
  const line = find("pointers");
  line.replaceChildren();
  if (!shown || !job || job.kind !== "generate") return;
  const text = job.settings.prompt || job.settings.layers.map((layer) => layer.prompt).join(" ");
  const known = (word) => word.length > 2 && (!vocabulary.length || vocabulary.some((name) => word.startsWith(name)));
  const words = [...new Set(text.split(/[^\p{L}\p{N}-]+/u).filter(known))];
  line.append("Where is: ");
  for (const word of words) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = word;
    button.addEventListener("click", guard(() => run("segment", { picture: shown.picture, phrase: `the ${word}` })));
    line.append(button);
  }
}

// Puts work in line and follows it to its end; returns the job.
async function run(kind, settings) {
  const job = await post("/api/jobs", { kind, settings });
  running = job.id;
  find("cancel").hidden = false;
  find("progress").hidden = false;
  find("progress").removeAttribute("value");
  await put(job);
  say(job.ahead ? `${job.ahead} before it` : "");
  try {
    await follow(job.id, (news) => {
      if (news.state === "running") put({ ...job, state: "running" });
      if (news.type !== "progress") return;
      find("progress").value = news.step / news.steps;
      const left = news.seconds_left === null ? "" : `, ${Math.ceil(news.seconds_left)} s left`;
      say(`step ${news.step} of ${news.steps}${left}`);
      if (news.preview) easel.show(news.preview);
    });
  } finally {
    if (running === job.id) running = null;
    find("cancel").hidden = find("progress").hidden = running === null;
  }
  const done = await get(`/api/jobs/${job.id}`);
  await put(done);
  await show(done, done.pictures[0] || null);
  if (done.state === "done") say(done.ended ? `${(done.ended - done.started).toFixed(1)} s` : "");
  else if (done.state === "cancelled") say("cancelled");
  return done;
}

async function go() {
  commit();
  const { mode } = state;
  const settings = structuredClone(state[mode]);
  if (mode === "generate") {
    const unnamed = settings.layers.findIndex((layer) => !layer.prompt.trim());
    if (unnamed >= 0) throw new Error(`layer ${unnamed + 1} has no name; say what is in its box`);
  }
  if (mode === "insert") {
    if (!settings.target || !settings.subject) throw new Error("choose a picture to paint into and a subject");
    if (easel.holeIsEmpty()) throw new Error("paint the hole on the picture first");
    settings.mask = (await sendPicture(await easel.holeBlob())).id;
  }
  if (mode === "segment" && !settings.picture) {
    if (!shown) throw new Error("choose a picture first");
    settings.picture = shown.picture;
  }
  await run(mode, settings);
}

async function upload(field, name, kind) {
  const file = find(field).files[0];
  if (!file) return;
  const { id } = await sendPicture(file);
  change((s) => (s[kind][name] = id));
  if (name !== "subject") await takeTarget(id);
}

async function takeTarget(id) {
  const image = await easel.show(await pictureUrl(id));
  easel.newHole(image.width, image.height);
}

async function readSettings(file) {
  const { kind, settings } = await sendPicture(file, "/api/settings");
  change((s) => {
    s.mode = kind;
    Object.assign(s[kind], settings);
  });
  say("took the settings of the picture");
}

function connect() {
  find("form").addEventListener("submit", (event) => {
    event.preventDefault();
    guard(go)();
  });
  find("cancel").addEventListener("click", guard(() => running && post(`/api/jobs/${running}/cancel`)));
  find("undo").addEventListener("click", undo);
  find("dice").addEventListener("click", () => change((s) => (s[s.mode].seed = Math.floor(Math.random() * 2 ** 31))));
  for (const tab of document.querySelectorAll("[data-mode]"))
    tab.addEventListener("click", () => change((s) => (s.mode = tab.dataset.mode)));
  find("target").addEventListener("change", guard(() => upload("target", "target", "insert")));
  find("subject").addEventListener("change", guard(() => upload("subject", "subject", "insert")));
  find("source").addEventListener("change", guard(() => upload("source", "picture", "segment")));
  find("unpaint").addEventListener("click", guard(() => state.insert.target && takeTarget(state.insert.target)));
  find("pin").addEventListener("click", guard(async () => {
    find("pinned").querySelector("img").src = await pictureUrl(shown.picture);
    find("pinned").hidden = find("unpin").hidden = false;
  }));
  find("unpin").addEventListener("click", () => (find("pinned").hidden = find("unpin").hidden = true));
  find("use").addEventListener("click", () =>
    change((s) => {
      s.mode = shown.job.kind;
      Object.assign(s[s.mode], structuredClone(shown.job.settings));
    }),
  );
  find("into").addEventListener("click", guard(async () => {
    const { picture } = shown;
    change((s) => {
      s.mode = "insert";
      s.insert.target = picture;
    });
    await takeTarget(picture);
  }));
  find("draw-grid").addEventListener("click", guard(async () => {
    commit();
    await drawGrid((settings) => run("generate", settings));
  }));
  find("key").value = getKey();
  find("key").addEventListener("change", () => {
    setKey(find("key").value);
    location.reload();
  });
  document.addEventListener("keydown", (event) => {
    if ((event.ctrlKey || event.metaKey) && event.key === "Enter") guard(go)();
    else if (event.key === "Escape" && running) find("cancel").click();
    else if ((event.ctrlKey || event.metaKey) && event.key === "z" && !/INPUT|TEXTAREA/.test(document.activeElement.tagName)) undo();
    else return;
    event.preventDefault();
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("over");
  });
  document.addEventListener("dragleave", () => document.body.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("over");
    const file = event.dataTransfer.files[0];
    if (file) guard(readSettings)(file);
  });
  onOpen(guard(show));
}

function choices(id, names, kind, set) {
  const field = find(id);
  field.replaceChildren(...["", ...names].map((name) => new Option(name || "none", name)));
  field.addEventListener("change", () => change((s) => set(s.generate, field.value)));
  onChange(() => (field.value = kind(state.generate)));
}

async function start() {
  connect();
  let facts;
  try {
    facts = await get("/api/model");
  } catch (error) {
    find("model").textContent = "not connected";
    say(error.message, true);
    return;
  }
  find("model").textContent = `${facts.model}, ${facts.width} \u00d7 ${facts.height}`;
  vocabulary = facts.words;
  find("words").textContent = facts.words.join(", ");
  choices("style", facts.styles, (g) => g.style.name, (g, v) => (g.style.name = v));
  choices("concepts", facts.concepts, (g) => g.concepts, (g, v) => (g.concepts = v));
  find("style-strength").addEventListener("change", () =>
    change((s) => (s.generate.style.strength = Number(find("style-strength").value))),
  );
  onChange(() => {
    find("style-strength").value = state.generate.style.strength;
    find("style-part").hidden = state.mode !== "generate" || !(facts.styles.length + facts.concepts.length);
    find("words-part").hidden = state.mode !== "generate" || !facts.words.length;
    find("sizes").hidden = state.mode !== "generate" || !facts.resizable;
  });
  easel.setSize(facts.width, facts.height);
  begin(facts.defaults);
  buildHeads(facts.heads);
  fillGridNames();
  const jobs = await loadHistory();
  const last = jobs.find((job) => job.pictures.length);
  if (last) await show(last, last.pictures[0]);
  const open = jobs.find((job) => job.state === "running" || job.state === "waiting");
  if (open) say("the server is at work on an earlier job");
}

guard(start)();
