// A text typed in and scored token by token, and answers that become training rows.

import { card, doing, el, notice, number, post, select } from "./page.js";
import { word } from "./words.js";

const BORDERS = { loss: [0.05, 0.3, 1.45, 3, 6.6, 15], entropy: [0.05, 0.3, 1, 2, 3.5, 5],
  weight: [0.05, 0.2, 0.4, 0.6, 0.8, 0.95] };
const REFUSED = 3;
const NAMES = { base: "base_model", tuned: "tuned" };

const field = (name, control) => el("label", { class: "block" }, el("span", {}, word(name)), control);

export function showText(place, { run }) {
  const prompt = el("textarea", { required: true }), answer = el("textarea", { required: true });
  const button = el("button", { class: "main" }, word("score"));
  const wait = el("p", { class: "soft", role: "status" });
  const result = el("div");
  const form = el("form", { class: "card", onsubmit: (event) => {
    event.preventDefault();
    wait.textContent = word("working");
    result.replaceChildren();
    doing(button, async () => {
      const typed = { id: run.id, prompt: prompt.value, answer: answer.value };
      const scored = await post("/api/ask", { do: "score", ...typed });
      new Scored(result, typed, scored);
    }).finally(() => { wait.textContent = ""; });
  } }, field("prompt", prompt), field("answer", answer), button, wait);
  if (!run.has_model) form.prepend(el("p", { class: "soft" }, word("needs_model")));
  place.append(form, result);
}

class Scored {
  constructor(place, typed, { tokens, models }) {
    Object.assign(this, { typed, tokens, models });
    const names = Object.keys(models);
    this.model = select(names.map((name) => [name, word(NAMES[name])]).reverse(), { onchange: () => this.draw() });
    this.figure = select(Object.keys(BORDERS).map((name) => [name, word(name)]), { onchange: () => this.draw() });
    this.box = el("div", { class: "tokens", role: "group", ariaLabel: word("answer"),
      onkeydown: (event) => this.move(event) });
    this.about = el("div", { role: "status" });
    this.legend = el("div", { class: "legend" });
    this.mean = el("span", { class: "soft" });
    this.chosen = null;
    place.append(
      card("", el("div", { class: "row" },
        el("label", {}, word("by_model"), this.model), el("label", {}, word("coloured_by"), this.figure), this.mean),
        el("p", { class: "soft small" }, word("hint_tokens")), this.box, this.legend, this.about),
      card(word("own_answer"), el("div", { class: "two" },
        names.map((name) => el("div", {}, el("div", { class: "soft small" }, word(NAMES[name])),
          el("p", {}, models[name].answer || "–"))),
        el("div", {}, el("div", { class: "soft small" }, word("given")), el("p", {}, typed.answer)))));
    this.draw();
  }

  draw() {
    const figures = this.models[this.model.value];
    const by = this.figure.value;
    let target = 0;
    this.mean.textContent = word("mean_loss", number(figures.mean_loss));
    this.pieces = this.tokens.map((token) => {
      const places = [...Array(token.targets)].map(() => target++);
      if (!places.length) {
        const node = el("span", { class: token.special ? "context special" : "context" }, token.text);
        return { token, node, places };
      }
      const value = Math.max(...places.map((place) => figures[by][place] ?? 0));
      const heat = BORDERS[by].filter((border) => value >= border).length;
      const marks = [`heat-${heat}`];
      if (places.some((place) => figures.zone[place] === REFUSED)) marks.push("refused");
      if (places.some((place) => figures.patterns[place] === "confident error")) marks.push("confident");
      const node = el("button", { type: "button", class: marks.join(" "), tabIndex: -1,
        ariaLabel: `${token.text.trim() || "␣"}: ${word(by)} ${number(value, 3)}` }, token.text);
      node.addEventListener("click", () => this.choose(places[0]));
      return { token, node, places };
    });
    this.targets = this.pieces.filter(({ places }) => places.length);
    this.box.replaceChildren(...this.pieces.map(({ node }) => node));
    const edges = ["0", ...BORDERS[by].map(String)];
    this.legend.replaceChildren(...edges.map((edge, heat) => el("span", { class: `heat-${heat}` }, `≥ ${edge}`)),
      el("span", { class: "soft" }, word("refused_note")), el("span", { class: "soft" }, word("confident_note")));
    if (this.targets.length) this.targets[0].node.tabIndex = 0;
    if (this.chosen !== null) this.choose(this.chosen);
  }

  move(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const at = this.targets.findIndex(({ node }) => node === document.activeElement);
    const next = this.targets[Math.min(this.targets.length - 1, Math.max(0, at + step))];
    for (const { node } of this.targets) node.tabIndex = -1;
    next.node.tabIndex = 0;
    next.node.focus();
  }

  async choose(place) {
    this.chosen = place;
    const found = this.targets.find(({ places }) => places.includes(place));
    for (const { node } of this.targets) node.ariaPressed = String(node === found.node);
    const figures = this.models[this.model.value];
    const seen = el("p", { class: "soft small" }, "…");
    const rows = found.places.map((at) => [
      figures.loss[at], figures.entropy[at], figures.weight[at], word(`zone_${figures.zone[at]}`),
      figures.top[at] || "–", figures.patterns[at]]);
    const heads = ["loss", "entropy", "weight", "zone", "expected", "pattern"];
    this.about.replaceChildren(el("div", { class: "scroll" }, el("table", {},
      el("caption", { class: "sr" }, found.token.text),
      el("thead", {}, el("tr", {}, heads.map((name) => el("th", { scope: "col" }, word(name))))),
      el("tbody", {}, rows.map((row) => el("tr", {}, row.map((value) =>
        el("td", {}, typeof value === "number" ? number(value) : value))))))), seen);
    for (const { node } of this.pieces) node.classList.remove("seen-1", "seen-2", "seen-3", "seen-4");
    try {
      const { weights } = await post("/api/ask", { do: "attend", ...this.typed, model: this.model.value,
        position: found.token.position });
      if (this.chosen === place) this.shade(weights, seen);
    } catch (error) {
      seen.textContent = error.message;
    }
  }

  shade(weights, seen) {
    const shares = this.pieces.filter(({ token }) => token.position < weights.length).map((piece) => {
      const { position, length } = piece.token;
      return { ...piece, share: weights.slice(position, position + length).reduce((sum, one) => sum + one, 0) };
    });
    // The first token takes what attention has no use for, and would hide all others.
    const most = Math.max(...shares.slice(1).map(({ share }) => share), 1e-9);
    for (const { node, share } of shares) {
      const level = Math.min(4, Math.ceil(4 * share / most - 0.25));
      if (level > 0) node.classList.add(`seen-${level}`);
    }
    const top = [...shares].sort((one, other) => other.share - one.share).slice(0, 6);
    seen.textContent = `${word("looked_at")}: ${top.map(({ token, share }) =>
      `${token.text.trim() || "␣"} ${number(100 * share, 2)} %`).join(" · ")}`;
  }
}

export function showAnswers(place, { run }) {
  const prompt = el("textarea", { required: true });
  const whole = (value, min, max) => el("input", { type: "number", value, min, max, required: true });
  const amount = whole(4, 1, 16), longest = whole(256, 1, 2048), seed = whole(0, 0, 1e9);
  const temperature = el("input", { type: "number", value: 0.8, min: 0.05, max: 3, step: "any", required: true });
  const way = select([["sample", word("sample")], ["dynamic", word("dynamic")]]);
  const names = [...(run.has_model ? ["tuned"] : []), ...(run.base ? ["base"] : [])];
  const model = select(names.map((name) => [name, word(NAMES[name])]));
  const button = el("button", { class: "main" }, word("write"));
  const wait = el("p", { class: "soft", role: "status" });
  const result = el("div");
  const labelled = (name, control) => el("label", {}, word(name), control);
  place.append(el("form", { class: "card", onsubmit: (event) => {
    event.preventDefault();
    wait.textContent = word("working");
    result.replaceChildren();
    doing(button, async () => {
      const written = await post("/api/ask", { do: "answers", id: run.id, prompt: prompt.value,
        number: amount.valueAsNumber, max_new_tokens: longest.valueAsNumber, model: model.value,
        seed: seed.valueAsNumber, how: { kind: way.value, temperature: temperature.valueAsNumber } });
      result.append(...written.answers.map((answer) => candidate(run, written.messages, answer)));
    }).finally(() => { wait.textContent = ""; });
  } }, field("prompt", prompt),
  el("div", { class: "row" }, labelled("by_model", model), labelled("number", amount), labelled("way", way),
    labelled("temperature", temperature), labelled("longest", longest), labelled("seed", seed), button), wait), result);
}

// One answer: mended where it is wrong, and saved.
function candidate(run, messages, { text, stopped }) {
  const answer = el("textarea", { value: text, ariaLabel: word("answer") });
  const button = el("button", { type: "button", onclick: () => doing(button, async () => {
    const row = [...messages, { role: "assistant", content: answer.value }];
    const saved = await post("/api/save", { id: run.id, messages: row });
    notice(word("saved", saved.rows, saved.file));
  }) }, word("save_row"));
  return el("div", { class: "card" }, answer,
    el("div", { class: "row" }, button, stopped ? null : el("span", { class: "soft small" }, word("cut_off"))));
}
