// Conversations and settings, kept in this browser alone.

const CHATS = "eff-serve chats";
const SETTINGS = "eff-serve settings";
const MOST = 100;

function read(key, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? otherwise;
  } catch {
    return otherwise; // no storage here, or something else's words in it
  }
}

export function chats() {
  const found = read(CHATS, []);
  return Array.isArray(found) ? found.filter((chat) => chat?.id && Array.isArray(chat.turns)) : [];
}

// Saves what the browser has room for: the oldest conversations go first, then the pictures of the last one.
function write(list) {
  const first = list.slice(0, 1).map((chat) => ({ ...chat, turns: chat.turns.map(withoutPictures) }));
  const shorter = Array.from({ length: Math.min(list.length, MOST) }, (_, i) => list.slice(0, Math.min(list.length, MOST) - i));
  for (const kept of [...shorter, first, []]) {
    try {
      localStorage.setItem(CHATS, JSON.stringify(kept));
      return;
    } catch {
      // no room
    }
  }
}

function withoutPictures(turn) {
  if (typeof turn.content === "string") return turn;
  return { ...turn, content: turn.content.filter((part) => part.type === "text").map((part) => part.text).join("\n") };
}

export function save(chat) {
  const others = chats().filter((other) => other.id !== chat.id);
  write(chat.turns.length ? [chat, ...others] : others);
}

export const forget = (id) => write(chats().filter((chat) => chat.id !== id));
export const settings = () => read(SETTINGS, {});

export function keep(values) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(values));
  } catch {
    // a browser that keeps nothing
  }
}
