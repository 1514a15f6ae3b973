// One run: its curves while it trains, and everything else that is known of it.

import { ago, bytes, card, doing, duration, el, facts, follow, get, notice, number, onLeave, post, stateOf } from "./page.js";
import { Charts } from "./curves.js";
import { showAnswers, showText } from "./text.js";
import { showRows } from "./rows.js";
import { word } from "./words.js";

const PAGES = ["report", "eval", "sort", "compare", "tokens", "check"];

export async function showRun(place, id, tab) {
  const known = await get("/api/run", { id });
  const { run } = known;
  const writes = run.kind === "train" && run.stage !== "reward" && (run.has_model || run.base);
  const tabs = [
    ...(run.kind === "train" ? ["curves"] : []),
    ...PAGES.filter((name) => run.pages.includes(name)),
    ...(known.recipe ? ["recipe"] : []),
    ...(writes ? ["text", "answers"] : []),
    ...(known.has_rows ? ["rows"] : []),
  ];
  const current = tabs.includes(tab) ? tab : tabs[0];
  const stop = el("button", { type: "button", class: "danger", onclick: () => askToStop(stop, run) }, word("stop"));
  const resume = el("button", { type: "button", onclick: () => askToResume(resume, run) }, word("resume"));
  stop.hidden = run.state !== "running";
  resume.hidden = !run.can_resume || run.state === "running";
  const content = el("div");
  place.append(
    el("div", { class: "row" }, el("h1", {}, run.id === "." ? run.name : run.id), stateOf(run),
      el("span", { class: "push row" }, stop, resume)),
    el("p", { class: "lead" }, known.folder),
    el("nav", { class: "tabs", ariaLabel: run.id }, tabs.map((name) =>
      el("a", { href: `#/run/${encodeURIComponent(id)}/${name}`,
        ...(name === current ? { ariaCurrent: "page" } : {}) }, word(name)))),
    content);
  const show = { curves: showCurves, recipe: showRecipe, text: showText, answers: showAnswers, rows: showRows };
  if (current) await (show[current] ?? showPage)(content, known, current);
}

async function askToStop(button, run) {
  if (!confirm(word("stop_sure", run.id))) return;
  await doing(button, async () => {
    await post("/api/stop", { id: run.id });
    notice(word("stopping", run.id));
  });
}

const askToResume = (button, run) => doing(button, async () => {
  await post("/api/resume", { id: run.id });
  notice(word("resumed"));
});

function showCurves(place, { run, explosion }) {
  const at = el("div");
  const drawFacts = (step) => at.replaceChildren(card("", facts([
    [word("progress"), run.num_steps ? word("step_of", number(step, 9), number(run.num_steps, 9)) : number(step, 9)],
    [word("loss"), number(run.loss)], [word("validation"), number(run.validation_loss)],
    [word("left"), duration(run.seconds_left)], [word("base"), run.base || "–"],
    [word("kind"), [run.stage, run.loss_kind, run.tuning].filter(Boolean).join(" · ")],
    [word("size"), bytes(run.num_bytes)], [word("changed"), ago(run.changed)]])));
  drawFacts(run.step);
  const none = el("p", { class: "empty" }, word("no_metrics"));
  const charts = el("div", { class: "charts" });
  place.append(at);
  if (explosion) place.append(card(word("exploded"), el("pre", {}, JSON.stringify(explosion, null, 2))));
  place.append(none, charts);
  let drawn;
  follow(place, `/events?${new URLSearchParams({ id: run.id })}`, {
    curves: (curves) => {
      none.hidden = Object.keys(curves).length > 0;
      drawn?.close();
      drawn = new Charts(charts, [{ label: run.id, curves }]);
    },
    records: (records) => {
      none.hidden = true;
      drawn?.add(records);
    },
    run: (now) => {
      const isOther = now.state !== run.state;
      Object.assign(run, now);
      drawFacts(run.step);
      if (isOther) dispatchEvent(new Event("state-changed"));
    },
  });
  onLeave(place, () => drawn?.close());
}

function showPage(place, { run }, name) {
  const query = new URLSearchParams({ id: run.id, page: name });
  place.append(el("iframe", { src: `/page?${query}`, title: word("sandbox", word(name), run.id) }));
}

function showRecipe(place, { recipe, environment, result }) {
  const about = { ...(environment ?? {}), ...(environment?.versions ?? {}), ...(result ?? {}) };
  delete about.versions;
  place.append(el("div", { class: "two" },
    card(word("recipe"), el("pre", { tabIndex: 0, ariaLabel: word("recipe") }, recipe)),
    card(word("environment"), facts(Object.entries(about).map(([name, value]) =>
      [name, Array.isArray(value) ? value.join(" ") : String(value)])))));
}
