// The settings of all kinds of work, their undo, and the form that shows them.

const FIELDS = {
  generate: ["prompt", "negative", "seed", "count", "steps", "guidance", "width", "height", "opacity"],
  insert: ["prompt", "seed", "steps", "guidance", "strength"],
  segment: ["phrase"],
};
const TEXT = ["prompt", "negative", "phrase"];
const find = (id) => document.getElementById(id);

export const state = { mode: "generate", generate: {}, insert: {}, segment: {} };
const past = [];
let listeners = [];

export function onChange(listener) {
  listeners.push(listener);
}

function tell() {
  for (const listener of listeners) listener();
}

// Changes the settings by a function; what was before can be had again by undo.
export function change(edit) {
  const before = JSON.stringify(state);
  edit(state);
  if (JSON.stringify(state) === before) return;
  past.push(before);
  if (past.length > 200) past.shift();
  find("undo").disabled = false;
  tell();
}

export function undo() {
  if (!past.length) return;
  Object.assign(state, JSON.parse(past.pop()));
  find("undo").disabled = !past.length;
  tell();
}

export function begin(defaults) {
  for (const kind of Object.keys(FIELDS)) state[kind] = structuredClone(defaults[kind]);
  const kept = localStorage.getItem("eff-studio-settings");
  if (kept) {
    try {
      const found = JSON.parse(kept);
      for (const kind of Object.keys(FIELDS))
        for (const name of Object.keys(state[kind])) if (name in (found[kind] || {})) state[kind][name] = found[kind][name];
    } catch {
      localStorage.removeItem("eff-studio-settings");
    }
  }
  // Pictures of an earlier visit may be gone.
  Object.assign(state.insert, { subject: "", target: "", mask: "" });
  state.segment.picture = "";
  onChange(() => localStorage.setItem("eff-studio-settings", JSON.stringify(state)));
  onChange(show);
  for (const name of new Set(Object.values(FIELDS).flat())) {
    find(name).addEventListener("change", () => change((s) => (s[s.mode][name] = read(name))));
  }
  tell();
}

function read(name) {
  const value = find(name).value;
  return TEXT.includes(name) ? value : Number(value) || 0;
}

// What is typed counts even while its field has not been left.
export function commit() {
  change((s) => {
    for (const name of FIELDS[s.mode]) s[s.mode][name] = read(name);
  });
}

function show() {
  for (const name of FIELDS[state.mode]) {
    const field = find(name);
    if (document.activeElement !== field || read(name) !== state[state.mode][name]) field.value = state[state.mode][name];
  }
  for (const part of document.querySelectorAll("[data-for]")) {
    if (!["style-part", "words-part", "sizes"].includes(part.id)) part.hidden = !part.dataset.for.split(" ").includes(state.mode);
  }
  for (const tab of document.querySelectorAll("[data-mode]")) {
    tab.setAttribute("aria-selected", String(tab.dataset.mode === state.mode));
  }
  find("go").textContent = { generate: "Draw", insert: "Paint", segment: "Find" }[state.mode];
}
