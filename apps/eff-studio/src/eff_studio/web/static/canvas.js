// The easel: a picture, boxes over it while drawing, a hole over it while inserting.

import { change, onChange, state } from "./settings.js";

const canvas = document.getElementById("canvas");
const paper = canvas.getContext("2d");
const COLOURS = ["#e4572e", "#2e86ab", "#6a994e", "#b5179e", "#f2a541", "#5c4d9a", "#118ab2", "#8d6e63"];
const hole = document.createElement("canvas");
let picture = null;
let drag = null;
export let chosen = -1;

export const colour = (i) => COLOURS[i % COLOURS.length];

export function choose(i) {
  chosen = i;
  document.dispatchEvent(new CustomEvent("layer-chosen"));
  paint();
}

export function setSize(width, height) {
  const scale = Math.max(1, Math.round(640 / Math.max(width, height)));
  canvas.width = width * scale;
  canvas.height = height * scale;
  canvas.style.aspectRatio = `${width} / ${height}`;
  paint();
}

// Shows a picture by its address; null shows none.
export function show(address) {
  if (!address) {
    picture = null;
    paint();
    return Promise.resolve();
  }
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => {
      picture = image;
      if (image.width / image.height !== canvas.width / canvas.height) setSize(image.width, image.height);
      paint();
      resolve(image);
    };
    image.onerror = () => reject(new Error("the picture cannot be shown"));
    image.src = address;
  });
}

// An empty hole of a picture's size.
export function newHole(width, height) {
  hole.width = width;
  hole.height = height;
  const surface = hole.getContext("2d", { willReadFrequently: true });
  surface.fillStyle = "black";
  surface.fillRect(0, 0, width, height);
  paint();
}

export function holeIsEmpty() {
  if (!hole.width) return true;
  const points = hole.getContext("2d").getImageData(0, 0, hole.width, hole.height).data;
  for (let i = 0; i < points.length; i += 4) if (points[i] > 127) return false;
  return true;
}

export function holeBlob() {
  return new Promise((resolve) => hole.toBlob(resolve, "image/png"));
}

export function paint() {
  paper.clearRect(0, 0, canvas.width, canvas.height);
  if (picture) paper.drawImage(picture, 0, 0, canvas.width, canvas.height);
  if (state.mode === "insert" && picture && hole.width) {
    paper.globalAlpha = 0.55;
    paper.globalCompositeOperation = "screen";
    paper.drawImage(hole, 0, 0, canvas.width, canvas.height);
    paper.globalCompositeOperation = "source-over";
    paper.globalAlpha = 1;
  }
  if (state.mode !== "generate") return;
  const layers = state.generate.layers || [];
  for (let i = layers.length - 1; i >= 0; i--) box(layers[i].box, layers[i].prompt, colour(i), i === chosen);
  if (drag && drag.kind === "new") box(drag.box, "", colour(layers.length), true);
}

function box(shares, name, ink, strong) {
  const [x0, y0, x1, y1] = [shares[0] * canvas.width, shares[1] * canvas.height, shares[2] * canvas.width, shares[3] * canvas.height];
  paper.lineWidth = (strong ? 4 : 2) * (canvas.width / 640);
  paper.strokeStyle = ink;
  paper.strokeRect(x0, y0, x1 - x0, y1 - y0);
  if (!name) return;
  const size = Math.round(canvas.width / 34);
  paper.font = `600 ${size}px system-ui, sans-serif`;
  const wide = paper.measureText(name).width + size * 0.8;
  paper.fillStyle = ink;
  paper.fillRect(x0, y0, wide, size * 1.5);
  paper.fillStyle = "white";
  paper.fillText(name, x0 + size * 0.4, y0 + size * 1.1);
}

function place(event) {
  const bounds = canvas.getBoundingClientRect();
  const limit = (v) => Math.min(1, Math.max(0, v));
  return [limit((event.clientX - bounds.left) / bounds.width), limit((event.clientY - bounds.top) / bounds.height)];
}

function at([x, y]) {
  return (state.generate.layers || []).findIndex(({ box: b }) => x >= b[0] && x <= b[2] && y >= b[1] && y <= b[3]);
}

function stroke(event) {
  const [x, y] = place(event);
  const surface = hole.getContext("2d");
  const radius = (Number(document.getElementById("brush").value) / 640) * Math.max(hole.width, hole.height);
  surface.strokeStyle = event.shiftKey ? "black" : "white";
  surface.lineWidth = 2 * radius;
  surface.lineCap = "round";
  const [fromX, fromY] = drag.last || [x, y]; // a fast mouse leaves gaps between its places
  surface.beginPath();
  surface.moveTo(fromX * hole.width, fromY * hole.height);
  surface.lineTo(x * hole.width, y * hole.height);
  surface.stroke();
  drag.last = [x, y];
  paint();
}

canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  if (state.mode === "insert") {
    if (picture && hole.width) {
      drag = { kind: "brush" };
      stroke(event);
    }
    return;
  }
  if (state.mode !== "generate") return;
  const [x, y] = place(event);
  const hit = at([x, y]);
  if (hit >= 0 && (hit === chosen || event.shiftKey)) {
    drag = { kind: "move", from: [x, y], layer: hit, box: [...state.generate.layers[hit].box] };
  } else {
    drag = { kind: "new", from: [x, y], box: [x, y, x, y], hit };
  }
});

canvas.addEventListener("pointermove", (event) => {
  if (!drag) return;
  const [x, y] = place(event);
  if (drag.kind === "brush") stroke(event);
  if (drag.kind === "new") {
    drag.box = [Math.min(x, drag.from[0]), Math.min(y, drag.from[1]), Math.max(x, drag.from[0]), Math.max(y, drag.from[1])];
    paint();
  }
  if (drag.kind === "move") drag.to = moved(drag.box, x - drag.from[0], y - drag.from[1]);
});

canvas.addEventListener("pointerup", () => {
  const done = drag;
  drag = null;
  if (!done || done.kind === "brush") return;
  if (done.kind === "move") {
    if (done.to) change((s) => (s.generate.layers[done.layer].box = done.to));
    return;
  }
  const [x0, y0, x1, y1] = done.box;
  if (x1 - x0 < 0.04 || y1 - y0 < 0.04) {
    choose(done.hit);
    return;
  }
  if (state.generate.layers.length >= 8) return;
  change((s) => s.generate.layers.push({ prompt: "", box: done.box.map((v) => Math.round(v * 1000) / 1000) }));
  choose(state.generate.layers.length - 1);
  document.dispatchEvent(new CustomEvent("layer-added"));
});

export function moved(b, dx, dy) {
  const right = Math.min(1 - b[2], Math.max(-b[0], dx));
  const down = Math.min(1 - b[3], Math.max(-b[1], dy));
  return [b[0] + right, b[1] + down, b[2] + right, b[3] + down].map((v) => Math.round(v * 1000) / 1000);
}

onChange(paint);
