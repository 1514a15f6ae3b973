// Rows of a sort that a person keeps, edits or drops; they are written as a new file.

import { card, doing, el, get, notice, number, post, select } from "./page.js";
import { showClusters } from "./clusters.js";
import { word } from "./words.js";

const CHOICES = ["keep", "edit", "drop"];

export async function showRows(place, { run }) {
  const changes = new Map(), shares = new Map();
  const list = el("div", { class: "rows" });
  const more = el("button", { type: "button" }, word("more"));
  const count = el("span", { class: "soft", role: "status" });
  const write = el("button", { type: "button", class: "main", disabled: true }, word("write_file"));
  const written = el("p", { class: "soft small", role: "status" });
  const order = el("select");
  let start = 0;

  const drawCount = () => {
    const parts = [changes.size ? word("num_changes", changes.size) : "",
      shares.size ? word("num_shares", shares.size) : ""].filter(Boolean);
    count.textContent = parts.join(", ") || word("nothing_changed");
    write.disabled = !parts.length;
  };
  const change = (row, what) => {
    if (what) changes.set(row.key, what);
    else changes.delete(row.key);
    drawCount();
  };
  async function load(from) {
    const found = await get("/api/rows", { id: run.id, start: from, ...(order.value ? { by: order.value } : {}) });
    if (!order.options.length) {
      order.append(...found.scores.map((name) => el("option", { value: name, selected: name === found.by }, name)));
    }
    if (from === 0) list.replaceChildren();
    list.append(...found.rows.map((row) => rowCard(row, changes.get(row.key), change)));
    start = from + found.rows.length;
    more.hidden = start >= found.number;
    return found;
  }
  order.addEventListener("change", () => load(0).catch((error) => notice(error.message, true)));
  more.addEventListener("click", () => doing(more, () => load(start)));
  write.addEventListener("click", () => doing(write, async () => {
    for (const [key, what] of changes) if (what.broken) throw new Error(`${key}: ${word("not_json")}`);
    const made = await post("/api/mend", { id: run.id, changes: Object.fromEntries(changes),
      shares: Object.fromEntries(shares) });
    written.textContent = word("mended", made.rows, made.file, made.log);
  }));
  const total = el("span", { class: "soft" });
  const clusters = el("div");
  place.append(
    el("div", { class: "card" }, el("div", { class: "row" }, el("label", {}, word("by_score"), order), total,
      el("span", { class: "push row" }, count, write)), written),
    clusters, list, more);
  drawCount();
  total.textContent = word("rows_total", number((await load(0)).number, 9));
  await showClusters(clusters, run, (cluster, share) => {
    if (share < 1) shares.set(cluster, share);
    else shares.delete(cluster);
    drawCount();
  });
}

function rowCard(row, known, change) {
  const box = el("section", { class: "card", ariaLabel: row.key });
  const fields = el("div");
  const name = `choice ${row.key}`;
  const drawn = { do: known?.do ?? (row.why_dropped === null ? "keep" : "drop"), row: known?.row ?? row.row };
  const original = drawn.do;

  function mark() {
    box.className = `card${drawn.do === "edit" ? " mended" : drawn.do === "drop" ? " mended drop" : ""}`;
    for (const area of fields.querySelectorAll("textarea")) area.readOnly = drawn.do !== "edit";
  }
  function tell() {
    const first = row.why_dropped === null ? "keep" : "drop";
    const isNew = drawn.do === "edit" || drawn.do !== first;
    change(row, isNew ? { do: drawn.do, ...(drawn.do === "edit" ? { row: drawn.row } : {}),
      ...(drawn.broken ? { broken: true } : {}) } : null);
    mark();
  }
  const radios = CHOICES.map((choice) => el("label", {}, el("input", {
    type: "radio", name, value: choice, checked: choice === original,
    onchange: () => { drawn.do = choice; tell(); } }), word(choice)));
  const isFlat = row.row !== null && typeof row.row === "object" && !Array.isArray(row.row) &&
    Object.values(row.row).every((value) => typeof value === "string");
  if (isFlat) {
    for (const [key, value] of Object.entries(drawn.row)) {
      const area = el("textarea", { value, readOnly: true, oninput: () => {
        drawn.row = { ...drawn.row, [key]: area.value };
        tell();
      } });
      fields.append(el("label", { class: "block" }, el("span", {}, key), area));
    }
  } else {
    const area = el("textarea", { value: JSON.stringify(drawn.row, null, 2), readOnly: true, rows: 8, oninput: () => {
      try {
        drawn.row = JSON.parse(area.value);
        drawn.broken = false;
      } catch {
        drawn.broken = true;
      }
      area.ariaInvalid = String(drawn.broken);
      tell();
    } });
    fields.append(el("label", { class: "block" }, el("span", {}, word("raw")), area));
  }
  box.append(
    el("div", { class: "row" }, el("strong", {}, row.key), el("span", { class: "soft" }, number(row.score)),
      el("fieldset", { class: "push" }, el("legend", { class: "sr" }, row.key), radios)),
    row.why_dropped === null ? "" : el("p", { class: "soft small" }, word("was_dropped", row.why_dropped)),
    fields);
  mark();
  return box;
}
