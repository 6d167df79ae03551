// Elements and words: what all parts of the page have in common. Text goes in as text, never as markup.

export const find = (id) => document.getElementById(id);

export function el(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

export function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

// Makes an element show these parts. What it shows already is left alone: focus, scrolling and selections stay in it.
export function renew(place, ...parts) {
  const wanted = parts.map((part) => (part instanceof Node ? part : document.createTextNode(part)));
  const left = [...place.childNodes];
  const take = (fits) => {
    const i = left.findIndex(fits);
    return i < 0 ? null : left.splice(i, 1)[0];
  };
  const same = wanted.map((part) => take((old) => old.isEqualNode(part)));
  const shown = wanted.map((part, i) => same[i] ?? become(take((old) => old.nodeName === part.nodeName), part));
  for (const old of left) old.remove();
  let next = place.firstChild;
  for (const part of shown) {
    if (part === next) next = next.nextSibling;
    else place.insertBefore(part, next);
  }
}

// Of an element or text, if there is one, and another of the same name: the old one, which says what the other does.
function become(old, part) {
  if (!old) return part;
  if (old.nodeType === Node.TEXT_NODE) {
    old.data = part.data;
    return old;
  }
  for (const name of old.getAttributeNames()) if (!part.hasAttribute(name)) old.removeAttribute(name);
  for (const name of part.getAttributeNames()) if (old.getAttribute(name) !== part.getAttribute(name)) old.setAttribute(name, part.getAttribute(name));
  renew(old, ...part.childNodes);
  return old;
}

const NONE = { text: "–", unit: "" };

function scaled(value, steps) {
  const [limit, factor, unit] = steps.find(([limit]) => Math.abs(value) < limit) ?? steps.at(-1);
  const shown = value * factor;
  const digits = shown === 0 || Math.abs(shown) >= 99.95 ? 0 : Math.abs(shown) >= 9.995 ? 1 : 2;
  return { text: shown.toLocaleString("en", { minimumFractionDigits: 0, maximumFractionDigits: digits }), unit };
}

const SECONDS = [[0.9995, 1000, "ms"], [120, 1, "s"], [Infinity, 1 / 60, "min"]];
const COUNTS = [[9999.5, 1, ""], [999_950, 1e-3, "k"], [999.95e6, 1e-6, "M"], [Infinity, 1e-9, "G"]];
const BYTES = [[1000, 1, "B"], [1e6, 1e-3, "kB"], [1e9, 1e-6, "MB"], [Infinity, 1e-9, "GB"]];

export const seconds = (value) => (value === null || value === undefined ? NONE : scaled(value, SECONDS));
export const count = (value) => (value === null || value === undefined ? NONE : scaled(value, COUNTS));
export const bytes = (value) => scaled(value, BYTES);
export const percent = (value) => (value === null || value === undefined ? NONE : { text: (value * 100).toFixed(value > 0 && value < 0.0995 ? 1 : 0), unit: "%" });
export const say = ({ text, unit }) => (unit === "" ? text : unit === "%" ? `${text} %` : `${text} ${unit}`);
export const times = (n, one, many = `${one}s`) => `${count(n).text}${count(n).unit} ${n === 1 ? one : many}`;

export function clock(unixSeconds) {
  return new Date(unixSeconds * 1000).toLocaleTimeString("en-GB");
}

export function lasting(value) {
  return value < 100 ? `${Math.round(value)} s` : `${Math.round(value / 60)} min`;
}

// The first sentence, cut where it is long.
export function inShort(words, most = 80) {
  const [first] = words.split(/(?<=[.!?;])\s|\n/);
  return first.length > most ? `${first.slice(0, most - 1).trimEnd()}…` : first;
}

// HAProxy takes 16 KiB of headers, and a browser sends some of its own.
const LONGEST_KEY = 8000;

// Why no header can carry a key, if none can: what is pasted from a page may have dashes or spaces, or be no key at all.
export function faultOf(key) {
  if (key.length > LONGEST_KEY) return `The key has ${key.length.toLocaleString("en")} characters, and no header carries more than ${LONGEST_KEY.toLocaleString("en")}`;
  if (!/^[\x21-\x7e]+$/.test(key)) return "The key has a character that no key has, such as a long dash or an unseen space: type it, or copy it anew";
  return null;
}
