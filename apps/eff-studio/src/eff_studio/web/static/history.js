// The history: every job of the server, newest first, with its settings.

import { get, pictureUrl } from "./api.js";

const list = document.getElementById("history");
const more = document.getElementById("more");
const shown = new Map();
let oldest = null;
let open = () => {};

export function onOpen(listener) {
  open = listener;
}

export async function loadHistory(before) {
  const { jobs } = await get(`/api/jobs?count=40${before ? `&before=${before}` : ""}`);
  for (const job of jobs) await put(job, false);
  if (jobs.length) oldest = jobs[jobs.length - 1].created;
  more.hidden = jobs.length < 40;
  return jobs;
}

more.addEventListener("click", () => loadHistory(oldest));

// Adds a job or brings it up to date.
export async function put(job, first = true) {
  let row = shown.get(job.id);
  if (!row) {
    row = document.createElement("li");
    shown.set(job.id, row);
    if (first) list.prepend(row);
    else list.append(row);
  }
  const cells = await Promise.all(job.pictures.map((picture) => cell(job, picture)));
  row.replaceChildren(...(cells.length ? cells : [empty(job)]));
}

async function cell(job, picture) {
  const found = document.createElement("button");
  found.type = "button";
  found.dataset.picture = picture;
  found.title = describe(job);
  const image = document.createElement("img");
  image.alt = describe(job);
  image.loading = "lazy";
  image.src = await pictureUrl(picture);
  found.append(image);
  found.addEventListener("click", () => open(job, picture));
  return found;
}

function empty(job) {
  const found = document.createElement("button");
  found.type = "button";
  found.className = "state";
  found.textContent = job.state === "waiting" && job.ahead ? `waiting, ${job.ahead} before it` : job.error || job.state;
  found.title = describe(job);
  found.addEventListener("click", () => open(job, null));
  return found;
}

export function mark(picture) {
  for (const found of list.querySelectorAll("button")) found.classList.toggle("shown", found.dataset.picture === picture);
}

function describe({ kind, settings }) {
  if (kind === "segment") return `find ${settings.phrase}`;
  const layers = (settings.layers || []).map((layer) => layer.prompt).join(", ");
  return `${settings.prompt || layers}, seed ${settings.seed}, ${settings.steps} steps`;
}
