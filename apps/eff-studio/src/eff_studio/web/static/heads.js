// The map of heads: a row a layer, a cell a head, filled by how much it is damaged.

import { change, onChange, state } from "./settings.js";

const grid = document.getElementById("heads");
const find = (id) => document.getElementById(id);
let cells = [];

export function buildHeads(counts) {
  const most = Math.max(...counts);
  grid.style.gridTemplateColumns = `repeat(${most}, minmax(1.4rem, 1fr))`;
  cells = [];
  for (const [layer, count] of counts.entries()) {
    for (let head = 0; head < most; head++) {
      const cell = document.createElement(head < count ? "button" : "span");
      if (head < count) {
        cell.type = "button";
        cell.title = `layer ${layer}, head ${head}`;
        cell.setAttribute("aria-label", cell.title);
        cell.addEventListener("click", () => toggle(layer, head));
        cells.push([layer, head, cell]);
      }
      grid.append(cell);
    }
  }
  for (const [id, set] of [
    ["head-scale", (heads, v) => (heads.scale = v)],
    ["head-start", (heads, v) => (heads.window = [Math.min(v, heads.window[1]), heads.window[1]])],
    ["head-stop", (heads, v) => (heads.window = [heads.window[0], Math.max(v, heads.window[0])])],
  ])
    find(id).addEventListener("change", () => change((s) => set(s.generate.heads, Number(find(id).value))));
  find("no-heads").addEventListener("click", () => change((s) => (s.generate.heads.weights = [])));
  onChange(show);
  show();
}

function toggle(layer, head) {
  change((s) => {
    const { weights } = s.generate.heads;
    const place = weights.findIndex(([l, h]) => l === layer && h === head);
    if (place >= 0) weights.splice(place, 1);
    else weights.push([layer, head, Number(find("damage").value)]);
  });
}

function show() {
  const { weights, scale, window: range } = state.generate.heads;
  for (const [layer, head, cell] of cells) {
    const found = weights.find(([l, h]) => l === layer && h === head);
    cell.setAttribute("aria-pressed", String(Boolean(found)));
    cell.textContent = found ? found[2].toFixed(2).replace(/^0/, "") : "";
    cell.style.background = found ? `color-mix(in srgb, var(--accent) ${20 + 60 * found[2]}%, transparent)` : "";
  }
  find("head-scale").value = scale;
  find("head-start").value = range[0];
  find("head-stop").value = range[1];
}
