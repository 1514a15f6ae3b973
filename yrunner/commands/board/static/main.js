// Which place is shown, by the address behind the #.

import { card, doing, el, get, leave, notice, onLeave, post, select } from "./page.js";
import { showCompare } from "./compare.js";
import { showRun } from "./run.js";
import { showRuns } from "./runs.js";
import { locale, switchLanguage, word } from "./words.js";

const STARTS = ["train", "sort", "check", "eval"];
const SECONDS_BETWEEN_LOOKS = 3;
let visit = 0;

async function show() {
  const mine = ++visit;
  leave();
  const [where, ...parts] = location.hash.replace(/^#\/?/, "").split("/").map(decodeURIComponent);
  drawFrame(where);
  const place = el("div");
  const content = document.getElementById("content");
  content.replaceChildren(place);
  document.title = ["yrunner", parts[0] ?? (where ? word(where) : word("runs"))].join(" · ");
  try {
    if (where === "run") await showRun(place, parts[0], parts[1]);
    else if (where === "compare") await showCompare(place, parts[0], parts[1]);
    else if (where === "commands") await showCommands(place);
    else await showRuns(place);
  } catch (error) {
    if (mine === visit) place.replaceChildren(el("p", { class: "empty" }, error.message));
  }
}

function drawFrame(where) {
  document.documentElement.lang = locale();
  document.getElementById("skip").textContent = word("skip");
  document.getElementById("language").textContent = word("other");
  const isRuns = where !== "commands";
  document.getElementById("places").replaceChildren(
    el("a", { href: "#/", ...(isRuns ? { ariaCurrent: "page" } : {}) }, word("runs")),
    el("a", { href: "#/commands", ...(isRuns ? {} : { ariaCurrent: "page" }) }, word("commands")));
}

async function showCommands(place) {
  const found = await get("/api/jobs");
  const recipe = select(found.recipes.map((name) => [name, name]));
  const command = select(STARTS.map((name) => [name, `yrun ${name}`]));
  const overrides = el("textarea", { spellcheck: false });
  const overwrite = el("input", { type: "checkbox" });
  const button = el("button", { class: "main", disabled: !found.recipes.length }, word("start"));
  const jobs = el("div");
  const open = new Set();
  const draw = (list) => {
    jobs.replaceChildren(...list.map((job) => jobCard(job, open, refresh)));
    if (!list.length) jobs.append(el("p", { class: "empty" }, word("no_jobs")));
  };
  const refresh = async () => draw((await get("/api/jobs")).jobs);
  place.append(
    el("h1", {}, word("commands")), el("p", { class: "lead" }),
    el("form", { class: "card", onsubmit: (event) => {
      event.preventDefault();
      doing(button, async () => {
        const lines = overrides.value.split("\n").map((line) => line.trim()).filter(Boolean);
        const { id } = await post("/api/start", { command: command.value, recipe: recipe.value,
          overrides: lines, overwrite: overwrite.checked });
        open.add(id);
        notice(word("started"));
        await refresh();
      });
    } },
    found.recipes.length ? "" : el("p", { class: "soft" }, word("no_recipes")),
    el("div", { class: "row" }, el("label", {}, word("command"), command), el("label", {}, word("recipe"), recipe),
      el("label", {}, overwrite, word("overwrite")), button),
    el("label", { class: "block" }, el("span", {}, word("overrides")), overrides)), jobs);
  draw(found.jobs);
  const timer = setInterval(() => {
    // Not while somebody reads a log with the keyboard: a new one would take the focus away.
    if (!jobs.contains(document.activeElement)) refresh().catch(() => {});
  }, 1000 * SECONDS_BETWEEN_LOOKS);
  onLeave(place, () => clearInterval(timer));
}

function jobCard(job, open, refresh) {
  const stop = el("button", { type: "button", class: "danger", onclick: () => doing(stop, async () => {
    await post("/api/stop", { job: job.id });
    await refresh();
  }) }, word("stop"));
  stop.hidden = !job.is_running;
  const state = job.is_running ? "running" : job.exit_code === 0 ? "finished"
    : job.exit_code === null ? "interrupted" : "failed";
  const said = job.is_running ? word("running") : job.exit_code === null ? word("ended") : word("exit", job.exit_code);
  const log = el("details", { open: open.has(job.id), ontoggle: () => (log.open ? open.add(job.id) : open.delete(job.id)) },
    el("summary", {}, word("output")), el("pre", {}, job.log || word("nothing_printed")));
  return card("", el("div", { class: "row" }, el("code", {}, job.command.join(" ")),
    el("span", { class: `state ${state}` }, said), el("span", { class: "push" }, stop)), log);
}

document.getElementById("language").addEventListener("click", () => { switchLanguage(); show(); });
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  document.getElementById("content").focus();
});
addEventListener("hashchange", async () => {
  await show();
  document.getElementById("content").focus({ preventScroll: true });
});
addEventListener("state-changed", show);
show();
