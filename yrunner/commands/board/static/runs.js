// The list of runs.

import { ago, bytes, duration, el, follow, get, number, select, stateOf } from "./page.js";
import { word } from "./words.js";

const STATES = ["running", "finished", "interrupted", "failed"];
const SVG = "http://www.w3.org/2000/svg";

export async function showRuns(place) {
  const { runs, folder } = await get("/api/runs");
  const byId = new Map(runs.map((run) => [run.id, run]));
  const chosen = new Set();
  const filter = el("input", { type: "search", placeholder: word("filter"), ariaLabel: word("filter") });
  const state = select([["", word("all_states")], ...STATES.map((name) => [name, word(name)])],
    { ariaLabel: word("state") });
  const compare = el("a", { class: "push" }, "");
  const body = el("tbody");
  const none = el("p", { class: "empty" });

  const fits = (run) => (!state.value || run.state === state.value) &&
    `${run.id} ${run.stage} ${run.loss_kind} ${run.tuning} ${run.base}`.toLowerCase()
      .includes(filter.value.trim().toLowerCase());
  function draw() {
    const shown = [...byId.values()].filter(fits).sort((one, other) => other.changed - one.changed);
    body.replaceChildren(...shown.map((run) => rowOf(run, chosen, drawChoice)));
    none.hidden = shown.length > 0;
    none.textContent = byId.size ? word("none_fit") : word("no_runs", folder);
  }
  function drawChoice() {
    const two = [...chosen].map(encodeURIComponent);
    compare.textContent = two.length === 2 ? word("compare_two") : word("choose_two");
    if (two.length === 2) compare.href = `#/compare/${two.join("/")}`;
    else compare.removeAttribute("href");
    compare.className = two.length === 2 ? "push" : "push soft small";
  }
  filter.addEventListener("input", draw);
  state.addEventListener("change", draw);
  const heads = ["name", "state", "base", "progress", "loss", "validation", "left", "changed", "size"];
  const right = new Set(["validation", "left", "size"]);
  place.append(
    el("h1", {}, word("runs")), el("p", { class: "lead" }, folder),
    el("div", { class: "row card" }, filter, state, compare),
    el("div", { class: "card scroll" },
      el("table", { class: "runs" },
        el("caption", { class: "sr" }, word("runs_in", folder)),
        el("thead", {}, el("tr", {}, el("td"),
          heads.map((name) => el("th", { scope: "col", class: right.has(name) ? "number" : "" }, word(name))))),
        body), none));
  draw();
  drawChoice();

  const drawAgain = () => {
    const focused = document.activeElement?.id;
    draw();
    if (focused) document.getElementById(focused)?.focus();
  };
  follow(place, "/events", { runs: ({ changed, gone }) => {
    for (const run of changed) byId.set(run.id, run);
    for (const id of gone) byId.delete(id);
    drawAgain();
  } }, async () => {
    const now = await get("/api/runs");
    byId.clear();
    for (const run of now.runs) byId.set(run.id, run);
    drawAgain();
  });
}

function rowOf(run, chosen, drawChoice) {
  const pick = el("input", {
    type: "checkbox", id: `pick-${run.id}`, checked: chosen.has(run.id), ariaLabel: word("pick", run.id),
    onchange: () => {
      if (pick.checked) chosen.add(run.id);
      else chosen.delete(run.id);
      while (chosen.size > 2) {
        const [first] = chosen;
        chosen.delete(first);
        const box = document.getElementById(`pick-${first}`);
        if (box) box.checked = false;
      }
      drawChoice();
    } });
  const what = run.kind === "train" ? [run.stage, run.loss_kind, run.tuning].filter(Boolean).join(" · ")
    : word(run.kind);
  const isPartial = run.num_steps && run.kind === "train";
  return el("tr", {},
    el("td", {}, pick),
    el("th", { scope: "row", class: "wrap" },
      el("a", { id: `run-${run.id}`, href: `#/run/${encodeURIComponent(run.id)}` }, run.id),
      el("div", { class: "soft small" }, what)),
    el("td", {}, stateOf(run)),
    el("td", { class: "wrap soft" }, run.base || "–"),
    el("td", {}, isPartial ? el("progress", {
      max: run.num_steps, value: run.step, ariaLabel: word("step_of", run.step, run.num_steps) }) : null,
      el("div", { class: "soft small" }, isPartial
        ? word("step_of", number(run.step, 9), number(run.num_steps, 9)) : "–")),
    el("td", {}, el("span", { class: "losses" }, spark(run.spark), number(run.loss))),
    el("td", { class: "number" }, number(run.validation_loss)),
    el("td", { class: "number" }, duration(run.seconds_left)),
    el("td", { class: "soft small" }, ago(run.changed)),
    el("td", { class: "number soft" }, bytes(run.num_bytes)));
}

function spark(values) {
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("class", "spark");
  drawing.setAttribute("viewBox", "0 0 100 30");
  drawing.setAttribute("preserveAspectRatio", "none");
  drawing.setAttribute("aria-hidden", "true");
  if (values.length > 1) {
    const low = Math.min(...values), span = Math.max(...values) - low || 1;
    const points = values.map((value, index) =>
      `${(100 * index / (values.length - 1)).toFixed(1)},${(28 - 26 * (value - low) / span).toFixed(1)}`);
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("d", `M${points.join("L")}`);
    drawing.append(path);
  }
  return drawing;
}
