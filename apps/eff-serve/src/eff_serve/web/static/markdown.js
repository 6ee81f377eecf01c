// Markdown as page elements. Text goes in as text, never as HTML: an answer cannot bring markup, scripts or pictures.

export function make(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

export async function copy(text, button) {
  const before = button.textContent;
  try {
    if (navigator.clipboard) await navigator.clipboard.writeText(text);
    else copyBySelection(text); // pages from other machines without TLS have no clipboard
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not copied";
  }
  setTimeout(() => (button.textContent = before), 1500);
}

function copyBySelection(text) {
  const area = make("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) throw new Error("refused");
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const CELLS = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

export function markdown(text) {
  return blocks(text.replaceAll("\r\n", "\n").split("\n"), 0);
}

function blocks(lines, depth) {
  const out = document.createDocumentFragment();
  let i = 0;
  while (i < lines.length) {
    const line = lines[i];
    const fence = line.match(FENCE);
    const heading = line.match(/^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/);
    if (!line.trim()) {
      i += 1;
    } else if (fence) {
      const body = [];
      for (i += 1; i < lines.length && !closes(lines[i], fence[1]); i += 1) body.push(lines[i]);
      i += 1;
      out.append(code(body.join("\n"), fence[2].trim().split(/\s+/)[0]));
    } else if (heading) {
      out.append(make(`h${Math.min(6, heading[1].length + 2)}`, "", inline(heading[2])));
      i += 1;
    } else if (RULE.test(line)) {
      out.append(make("hr"));
      i += 1;
    } else if (/^ {0,3}>/.test(line) && depth < 8) {
      const body = [];
      for (; i < lines.length && /^ {0,3}>/.test(lines[i]); i += 1) body.push(lines[i].replace(/^ {0,3}> ?/, ""));
      out.append(make("blockquote", "", blocks(body, depth + 1)));
    } else if (ITEM.test(line) && depth < 8) {
      i = list(lines, i, depth, out);
    } else if (line.includes("|") && CELLS.test(lines[i + 1] ?? "") && lines[i + 1].includes("-")) {
      i = table(lines, i, out);
    } else {
      const body = [line];
      for (i += 1; i < lines.length && goesOn(lines[i]); i += 1) body.push(lines[i]);
      out.append(make("p", "", inline(body.join("\n"))));
    }
  }
  return out;
}

const closes = (line, fence) => line.trim().startsWith(fence) && !line.trim().replaceAll(fence[0], "");
const goesOn = (line) =>
  line.trim() && !FENCE.test(line) && !ITEM.test(line) && !RULE.test(line) && !/^ {0,3}(>|#{1,6}\s)/.test(line);

function list(lines, i, depth, out) {
  const first = lines[i].match(ITEM);
  const ordered = /\d/.test(first[2]);
  const node = make(ordered ? "ol" : "ul");
  if (ordered) node.start = Number.parseInt(first[2], 10);
  while (i < lines.length) {
    const item = lines[i].match(ITEM);
    if (!item || item[1].length !== first[1].length || /\d/.test(item[2]) !== ordered) break;
    const body = [item[3]];
    const inside = (line) => /^\s/.test(line) && line.search(/\S/) > first[1].length;
    for (i += 1; i < lines.length; i += 1) {
      const next = lines[i];
      if (next.trim() ? !inside(next) && (ITEM.test(next) || !goesOn(next)) : !inside(lines[i + 1] ?? "")) break;
      body.push(next.replace(new RegExp(`^\\s{0,${first[1].length + first[2].length + 1}}`), ""));
    }
    while (i < lines.length && !lines[i].trim() && ITEM.test(lines[i + 1] ?? "")) i += 1;
    const inner = blocks(body, depth + 1);
    const only = inner.childNodes.length === 1 && inner.firstChild.nodeName === "P" ? [...inner.firstChild.childNodes] : [inner];
    node.append(make("li", "", ...only));
  }
  out.append(node);
  return i;
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

function table(lines, i, out) {
  const row = (line, tag) => make("tr", "", ...cells(line).map((cell) => make(tag, "", inline(cell))));
  const body = make("tbody");
  const node = make("table", "", make("thead", "", row(lines[i], "th")), body);
  for (i += 2; i < lines.length && lines[i].includes("|"); i += 1) body.append(row(lines[i], "td"));
  out.append(make("div", "wide", node));
  return i;
}

function code(text, language) {
  const button = make("button", "small", "Copy");
  button.type = "button";
  button.addEventListener("click", () => copy(text, button));
  const bar = make("div", "code-bar quiet", make("span", "", language || "text"), button);
  return make("div", "code", bar, make("pre", "", make("code", "", text)));
}

const INLINE =
  /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|\*\*(?=\S)([\s\S]*?\S)\*\*|__(?=\S)([\s\S]*?\S)__(?!\w)|\*(?=[^\s*])([^*]*?[^\s*])\*(?!\*)|(?<!\w)_(?=\S)([^_]*?\S)_(?!\w)|~~(?=\S)([\s\S]*?\S)~~|\[([^\]\n]+)\]\(([^\s)]+)\)|(https?:\/\/[^\s<>()]*[^\s<>().,;:!?'"])|\\([\\`*_{}[\]()#+\-.!|~>])|(?: {2,}|\\)?\n/;

function inline(text, depth = 0) {
  const out = document.createDocumentFragment();
  let rest = text;
  while (rest) {
    const found = depth < 8 ? rest.match(INLINE) : null;
    if (!found) break;
    out.append(rest.slice(0, found.index));
    rest = rest.slice(found.index + found[0].length);
    const [whole, ticks, coded, strong1, strong2, em1, em2, struck, label, target, bare, escaped] = found;
    const inner = (part) => inline(part, depth + 1);
    if (ticks) out.append(make("code", "", coded.replace(/^ (.*) $/s, "$1")));
    else if (strong1 ?? strong2) out.append(make("strong", "", inner(strong1 ?? strong2)));
    else if (em1 ?? em2) out.append(make("em", "", inner(em1 ?? em2)));
    else if (struck) out.append(make("s", "", inner(struck)));
    else if (target ?? bare) out.append(link(target ?? bare, label ? inner(label) : bare, whole));
    else if (escaped) out.append(escaped);
    else out.append(make("br"));
  }
  out.append(rest);
  return out;
}

function link(target, label, whole) {
  if (!/^(https?:\/\/|mailto:)/i.test(target)) return whole; // no javascript:, no address of this server
  const node = make("a", "", label);
  node.href = target;
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
  return node;
}
