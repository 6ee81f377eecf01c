// The list of layers beside the picture: names, order, removal; and the chosen one by keyboard.

import { choose, chosen, colour, moved } from "./canvas.js";
import { change, onChange, state } from "./settings.js";

const list = document.getElementById("layers");

function button(text, title, act) {
  const found = document.createElement("button");
  found.type = "button";
  found.textContent = text;
  found.title = title;
  found.setAttribute("aria-label", title);
  found.addEventListener("click", act);
  return found;
}

function swap(i, j) {
  if (j < 0 || j >= state.generate.layers.length) return;
  change(({ generate: { layers } }) => ([layers[i], layers[j]] = [layers[j], layers[i]]));
  choose(j);
}

export function removeLayer(i) {
  change((s) => s.generate.layers.splice(i, 1));
  choose(-1);
}

function makeRow(i) {
  const row = document.createElement("li");
  const dot = document.createElement("span");
  dot.className = "dot";
  dot.style.background = colour(i);
  const name = document.createElement("input");
  name.type = "text";
  name.placeholder = "what is here";
  name.setAttribute("aria-label", `Layer ${i + 1}`);
  name.addEventListener("focus", () => choose(i));
  name.addEventListener("change", () => change((s) => (s.generate.layers[i].prompt = name.value)));
  row.append(
    dot,
    name,
    button("\u2191", "Further to the front", () => swap(i, i - 1)),
    button("\u2193", "Further to the back", () => swap(i, i + 1)),
    button("\u00d7", "Remove", () => removeLayer(i)),
  );
  return row;
}

function mark() {
  for (const [i, row] of [...list.children].entries()) row.classList.toggle("chosen", i === chosen);
}

// Rows stay as they are: a field that is left by a click on a button must not take the button away under the click.
function show() {
  const { layers } = state.generate;
  while (list.children.length > layers.length) list.lastChild.remove();
  while (list.children.length < layers.length) list.append(makeRow(list.children.length));
  mark();
  for (const [i, row] of [...list.children].entries()) {
    const name = row.querySelector("input");
    if (name.value !== layers[i].prompt) name.value = layers[i].prompt;
  }
}

export function focusLast() {
  list.querySelector("li:last-child input")?.focus();
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

document.getElementById("stage").addEventListener("keydown", (event) => {
  if (state.mode !== "generate" || chosen < 0 || !state.generate.layers[chosen]) return;
  if (event.key === "Delete" || event.key === "Backspace") removeLayer(chosen);
  else if (event.key in ARROWS) {
    const [dx, dy] = ARROWS[event.key].map((v) => v * 0.02);
    change((s) => (s.generate.layers[chosen].box = moved(s.generate.layers[chosen].box, dx, dy)));
  } else return;
  event.preventDefault();
});

document.addEventListener("layer-added", focusLast);
document.addEventListener("layer-chosen", mark);
onChange(show);
