// The clusters of a sorted corpus: a picture, a line for each, and the share of each to keep.

import { card, el, get, number } from "./page.js";
import { word } from "./words.js";

// Of cluster_picture.js, a script that the page of `yrun sort` has too.
/* global clusterColour, drawClusters */

export async function showClusters(place, run, change) {
  const { clusters, points } = await get("/api/clusters", { id: run.id });
  if (!clusters.length) return;
  const picture = el("canvas", { class: "picture", role: "img", ariaLabel: word("picture") });
  const inputs = new Map();
  const lines = clusters.map((cluster) => line(cluster, inputs, change));
  const all = shareInput(word("keep_all"), (share) => {
    for (const [name, input] of inputs) {
      if (name === "0") continue; // rows like no others have no double
      input.value = all.value;
      change(name, share);
    }
  });
  const head = ["cluster", "rows_of", "suspicious", "telling", "typical", "keep_share"];
  place.append(card(word("clusters"), picture,
    el("div", { class: "scroll" }, el("table", {},
      el("thead", {},
        el("tr", {}, head.map((name) => el("th", { scope: "col" }, word(name)))),
        el("tr", {}, el("td", { colSpan: head.length - 1 }), el("td", {}, all))),
      el("tbody", {}, lines))),
    el("p", { class: "soft small" }, word("clusters_note"))));
  drawClusters(picture, points, (row) => points[row][2]);
}

function line(cluster, inputs, change) {
  const name = String(cluster.cluster);
  const shown = cluster.cluster ? name : word("no_cluster");
  const input = shareInput(word("keep_of", shown), (share) => change(name, share));
  inputs.set(name, input);
  const swatch = el("i", { class: "swatch" });
  swatch.style.background = clusterColour(cluster.cluster);
  const [typical] = cluster.typical;
  return el("tr", {},
    el("th", { scope: "row" }, swatch, shown),
    el("td", {}, number(cluster.rows, 9)),
    el("td", {}, `${number((100 * cluster.suspicious) / cluster.rows, 2)} %`),
    el("td", { dir: "auto" }, cluster.words.join(", ")),
    el("td", { dir: "auto", title: cluster.typical.map(({ key }) => key).join("\n") },
      typical ? typical.text : "–"),
    el("td", {}, input));
}

function shareInput(label, changed) {
  const input = el("input", { type: "number", min: 0, max: 100, step: 5, value: 100, ariaLabel: label,
    onchange: () => {
      const percent = Math.min(100, Math.max(0, Number(input.value) || 0));
      input.value = percent;
      changed(percent / 100);
    } });
  return input;
}
