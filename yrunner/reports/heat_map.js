"use strict";
// Colours the targets by the chosen figure, and shows the figures of one target in a card.

const { scales, zones, examples } = JSON.parse(document.getElementById("figures").textContent);
const card = document.getElementById("card");
const NONE = "–";

// For each target element, the figures of its example and the indices of its tokens: several for a
// character of several tokens.
const shown = new Map();
document.querySelectorAll(".tokens").forEach((box, example) => {
  let first = 0;
  for (const element of box.querySelectorAll(".target")) {
    const count = Number(element.dataset.count);
    const tokens = Array.from({ length: count }, (_, number) => first + number);
    shown.set(element, { readings: examples[example], tokens });
    element.tabIndex = first === 0 ? 0 : -1;
    first += count;
  }
});

const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;

function valueOf(readings, when, figure, token) {
  if (when !== "change") return readings[when][figure][token] ?? Infinity;
  return valueOf(readings, "after", figure, token) - valueOf(readings, "before", figure, token);
}

// The token that colours its character: the hardest, or the one that changed most.
function decisiveToken({ readings, tokens }, when, figure) {
  const size = (token) =>
    when === "change"
      ? Math.abs(valueOf(readings, when, figure, token))
      : valueOf(readings, when, "loss", token);
  return tokens.reduce((most, token) => (size(token) > size(most) ? token : most));
}

function paint() {
  const figure = chosen("figure");
  const when = chosen("when");
  const [borders, changes] = scales[figure];
  for (const [element, target] of shown) {
    const token = decisiveToken(target, when, figure);
    const value = valueOf(target.readings, when, figure, token);
    delete element.dataset.heat;
    delete element.dataset.shift;
    if (when === "change") {
      element.dataset.shift =
        Math.sign(value) * changes.filter((border) => Math.abs(value) >= border).length;
    } else {
      element.dataset.heat = borders.filter((border) => value >= border).length;
    }
    const marked = target.readings[when === "change" ? "after" : when];
    element.dataset.zone = zones[marked.zone[token]];
  }
  const kind = when === "change" ? "change" : "value";
  for (const scale of document.querySelectorAll(".scale")) {
    scale.hidden = scale.dataset.figure !== figure || scale.dataset.kind !== kind;
  }
}

const word = (name) => document.querySelector(`#words [data-word="${name}"]`).cloneNode(true);
const short = (value) => (value === null ? NONE : String(Number(value.toPrecision(3))));

function cellContent(reading, what, token) {
  if (what === "probability") {
    const loss = reading.loss[token];
    return [loss === null ? NONE : `${short(100 * Math.exp(-loss))} %`];
  }
  if (what === "zone") return [word(zones[reading.zone[token]])];
  if (what === "top") {
    const text = reading.top[token];
    return [reading.agrees[token] ? "✓ " : "✗ ", text === "" ? word("half") : text];
  }
  const value = reading[what][token];
  return [typeof value === "string" ? value || word("half") : short(value)];
}

function showCard(element) {
  const { readings, tokens } = shown.get(element);
  card.querySelector(".said").textContent = element.textContent;
  const readers = tokens.map((token, number) => {
    const table = document.getElementById("reading").content.cloneNode(true);
    table.querySelector("caption").hidden = tokens.length === 1;
    table.querySelector(".number").textContent = `${number + 1} / ${tokens.length}`;
    for (const cell of table.querySelectorAll("[data-what]")) {
      cell.append(...cellContent(readings[cell.dataset.when], cell.dataset.what, token));
    }
    return table;
  });
  card.querySelector(".readings").replaceChildren(...readers);
  card.hidden = false;
  element.setAttribute("aria-describedby", "card");
  placeCard(element.getClientRects()[0]);
}

// Below the token where there is room, else above it; always inside the window.
function placeCard(token) {
  const { width, height } = card.getBoundingClientRect();
  const left = Math.min(token.left, document.documentElement.clientWidth - width - 8);
  const below = token.bottom + 8;
  const top = below + height <= window.innerHeight ? below : token.top - height - 8;
  card.style.left = `${window.scrollX + Math.max(8, left)}px`;
  card.style.top = `${window.scrollY + Math.max(8, top)}px`;
}

function hideCard() {
  card.hidden = true;
  document.querySelector("[aria-describedby]")?.removeAttribute("aria-describedby");
}

const targetOf = (event) => event.target.closest?.(".target");

for (const [begin, end] of [["mouseover", "mouseout"], ["focusin", "focusout"]]) {
  document.addEventListener(begin, (event) => targetOf(event) && showCard(targetOf(event)));
  document.addEventListener(end, (event) => targetOf(event) && hideCard());
}

// Tab stops once per example; the arrow keys move between its targets.
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideCard();
  const element = targetOf(event);
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!element || !step) return;
  event.preventDefault();
  const around = [...element.closest(".tokens").querySelectorAll(".target")];
  const next = around[around.indexOf(element) + step];
  if (!next) return;
  element.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});

function setLanguage() {
  document.documentElement.lang = chosen("language");
}

if (navigator.language.startsWith("zh")) {
  document.querySelector('input[value="zh-Hans"]').checked = true;
}
for (const input of document.querySelectorAll("input")) {
  input.addEventListener("change", input.name === "language" ? setLanguage : paint);
}
document.body.classList.add("ready");
setLanguage();
paint();
