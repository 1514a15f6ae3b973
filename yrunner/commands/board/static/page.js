// What every part of the page uses: elements, requests, figures as text.

import { locale, word } from "./words.js";

export function el(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "class") made.className = value;
    else if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

const key = document.querySelector("meta[name=request-key]").content;

async function read(answer) {
  const isJson = answer.headers.get("content-type")?.startsWith("application/json");
  const content = isJson ? await answer.json() : { error: await answer.text() };
  if (!answer.ok) throw new Error(content.error);
  return content;
}

const reached = (request) => request.catch(() => { throw new Error(word("lost")); });

export async function get(path, query = {}) {
  return read(await reached(fetch(`${path}?${new URLSearchParams(query)}`)));
}

export async function post(path, content) {
  return read(await reached(fetch(path, {
    method: "POST", body: JSON.stringify(content),
    headers: { "Content-Type": "application/json", "X-Yrun-Board": key } })));
}

let hiding;
export function notice(text, isBad = false) {
  const box = document.getElementById("notice");
  box.textContent = text;
  box.className = isBad ? "bad" : "";
  clearTimeout(hiding);
  hiding = setTimeout(() => { box.textContent = ""; }, isBad ? 12000 : 7000);
}

// Do something that a button asks for; the button waits, and a failure is said.
export async function doing(button, work) {
  button.disabled = true;
  try {
    return await work();
  } catch (error) {
    notice(error.message, true);
  } finally {
    button.disabled = false;
  }
}

export const number = (value, digits = 4) =>
  value === null || value === undefined ? "–"
    : Math.abs(value) >= 1e-3 || value === 0
      ? value.toLocaleString(locale(), { maximumSignificantDigits: digits })
      : value.toExponential(digits - 2);

export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const step = Math.min(units.length - 1, Math.floor(Math.log10(Math.max(value, 1)) / 3));
  return `${number(value / 1000 ** step, 3)} ${units[step]}`;
}

export function duration(seconds) {
  if (seconds === null) return "–";
  const minutes = Math.floor(seconds / 60), rest = String(Math.round(seconds % 60)).padStart(2, "0");
  if (minutes < 60) return `${minutes}:${rest}`;
  return `${Math.floor(minutes / 60)}:${String(minutes % 60).padStart(2, "0")}:${rest}`;
}

export function ago(time) {
  const seconds = Math.max(0, Date.now() / 1000 - time);
  const [name, size] = seconds < 60 ? ["ago_s", 1] : seconds < 3600 ? ["ago_m", 60]
    : seconds < 172800 ? ["ago_h", 3600] : ["ago_d", 86400];
  return word(name, Math.floor(seconds / size));
}

// What has to be closed when another place is shown; at once if it is shown already.
const closing = [];
export function onLeave(place, close) {
  if (place.isConnected) closing.push(close);
  else close();
}
export function leave() {
  while (closing.length) closing.pop()();
}

// Follow events while the page is seen: a browser has only six connections for all its pages.
export function follow(place, path, handlers, onReturn = () => {}) {
  let events = null;
  const open = () => {
    events = new EventSource(path);
    for (const [name, handle] of Object.entries(handlers)) {
      events.addEventListener(name, (event) => handle(JSON.parse(event.data)));
    }
  };
  const close = () => { events?.close(); events = null; };
  const look = () => {
    if (document.hidden) close();
    else if (!events) { open(); onReturn(); }
  };
  document.addEventListener("visibilitychange", look);
  if (!document.hidden) open();
  onLeave(place, () => { document.removeEventListener("visibilitychange", look); close(); });
}

export const stateOf = (run) => el("span", { class: `state ${run.state}` }, word(run.state));

export function facts(pairs) {
  return el("dl", { class: "facts" },
    pairs.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

export const card = (title, ...content) =>
  el("section", { class: "card" }, title ? el("h2", {}, title) : null, content);

export const select = (options, properties = {}) =>
  el("select", properties, options.map(([value, text]) => el("option", { value }, text)));
