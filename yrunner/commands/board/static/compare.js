// Two runs side by side: what differs in their recipes, their last figures, their curves as one.

import { card, el, get, number, onLeave } from "./page.js";
import { Charts } from "./curves.js";
import { word } from "./words.js";

export async function showCompare(place, a, b) {
  const [{ recipe, figures }, ...curves] = await Promise.all([
    get("/api/compare", { a, b }), get("/api/curves", { id: a }), get("/api/curves", { id: b })]);
  const shown = (value) => value === null ? word("not_set")
    : typeof value === "object" ? JSON.stringify(value) : String(value);
  const names = [...new Set(figures.flatMap(Object.keys))].filter((name) => name !== "epoch");
  const charts = el("div", { class: "charts" });
  const head = (...more) => el("thead", {}, el("tr", {}, more.map((text) => el("th", { scope: "col" }, text))));
  place.append(
    el("h1", {}, word("compare")),
    el("p", { class: "lead" }, [a, b].map((id, index) => [index ? " · " : "",
      el("a", { href: `#/run/${encodeURIComponent(id)}` }, id)]).flat()),
    card(word("differing"), recipe.length ? el("div", { class: "scroll" }, el("table", {},
      head(word("key"), a, b), el("tbody", {}, recipe.map(({ key, values }) => el("tr", {},
        el("th", { scope: "row" }, key), values.map((value) => el("td", { class: "wrap" }, shown(value))))))))
      : el("p", { class: "soft" }, word("same_recipe"))),
    charts,
    card(word("last_figures"), el("div", { class: "scroll" }, el("table", {},
      head(word("figure"), a, b, word("difference")), el("tbody", {}, names.map((name) => {
        const [one, other] = figures.map((of) => of[name] ?? null);
        const differs = one !== null && other !== null;
        return el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, number(one)), el("td", {}, number(other)),
          el("td", {}, differs ? number(other - one) : "–"));
      }))))));
  const drawn = new Charts(charts, [a, b].map((label, index) => ({ label, curves: curves[index] })));
  onLeave(place, () => drawn.close());
}
