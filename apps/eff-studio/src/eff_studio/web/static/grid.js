// X-Y grids: one picture for each pair of two settings' values, all else the same.

import { pictureUrl } from "./api.js";
import { state } from "./settings.js";

const find = (id) => document.getElementById(id);
const NAMES = ["seed", "guidance", "steps", "opacity", "head scale", "style strength", "prompt"];

export function fillGridNames() {
  for (const [id, first] of [["x-name", "guidance"], ["y-name", "seed"]]) {
    find(id).replaceChildren(...NAMES.map((name) => new Option(name, name)));
    find(id).value = first;
  }
}

function values(id, name) {
  const found = find(id).value.split(name === "prompt" ? "|" : ",").map((v) => v.trim()).filter(Boolean);
  if (!found.length) throw new Error(`say which values of ${name}, with ${name === "prompt" ? "|" : "commas"} between`);
  if (name === "prompt") return found;
  const numbers = found.map(Number);
  const wrong = numbers.findIndex((v) => !Number.isFinite(v));
  if (wrong >= 0) throw new Error(`${found[wrong]} is no number`);
  return numbers;
}

function set(settings, name, value) {
  if (name === "head scale") settings.heads.scale = value;
  else if (name === "style strength") settings.style.strength = value;
  else settings[name] = value;
}

function label(text) {
  const found = document.createElement("span");
  found.textContent = text;
  return found;
}

export async function drawGrid(run) {
  const [xName, yName] = [find("x-name").value, find("y-name").value];
  if (xName === yName) throw new Error("choose two different settings for the grid");
  const [xs, ys] = [values("x-values", xName), values("y-values", yName)];
  const grid = find("grid");
  grid.hidden = false;
  grid.style.gridTemplateColumns = `auto repeat(${xs.length}, minmax(4rem, 1fr))`;
  grid.replaceChildren(label(`${yName} \u2193 ${xName} \u2192`), ...xs.map((x) => label(x)));
  for (const y of ys) {
    grid.append(label(y));
    for (const x of xs) {
      const settings = { ...structuredClone(state.generate), count: 1 };
      set(settings, xName, x);
      set(settings, yName, y);
      const done = await run(settings);
      if (done.state !== "done") throw new Error(done.error || `the grid ended: a picture was ${done.state}`);
      const image = document.createElement("img");
      image.alt = `${xName} ${x}, ${yName} ${y}`;
      image.title = image.alt;
      image.src = await pictureUrl(done.pictures[0]);
      grid.append(image);
    }
  }
}
