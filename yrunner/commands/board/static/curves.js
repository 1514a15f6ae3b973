// Curves over the updates, in groups of figures that belong together.

import { el, number } from "./page.js";
import { word } from "./words.js";

// refused: the share with weight 0, which zone_refused shows.
const PASSED_OVER = new Set(["epoch", "targets", "pairs", "eval_targets", "step", "refused"]);
const ZONES = ["zone_easy", "zone_learning", "zone_hard", "zone_refused"];

// In this order; a figure belongs to the first group that takes it.
const GROUPS = [
  ["chart_loss", (name) => ["loss", "weighted_loss", "eval_loss"].includes(name)],
  ["chart_zones", (name) => ZONES.includes(name)],
  ["chart_drift", (name) => /drift|^keep_|(^|_)kl(_|$)/.test(name)],
  ["chart_accuracy", (name) => /accuracy|longer_wins/.test(name)],
  ["chart_reward", (name) => /reward|margin|advantage/.test(name)],
  ["chart_ratio", (name) => /ratio/.test(name)],
  ["chart_lr", (name) => name === "learning_rate"],
  ["chart_memory", (name) => name === "memory_gib"],
  ["chart_speed", (name) => name.endsWith("per_second")],
  ["chart_norm", (name) => name === "grad_norm"],
  ["chart_entropy", (name) => name.includes("entropy")],
  ["chart_weight", (name) => name === "mean_weight"],
  ["chart_gradient", (name) => name.startsWith("gradient_")],
  ["chart_loss_parts", (name) => name.endsWith("_loss")],
  ["chart_other", () => true],
];

function grouped(names) {
  const groups = GROUPS.map(([title]) => [title, []]);
  for (const name of names) {
    if (!PASSED_OVER.has(name)) groups[GROUPS.findIndex(([, takes]) => takes(name))][1].push(name);
  }
  return groups.filter(([, members]) => members.length);
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function colourOf(name, index) {
  const zone = /^(?:zone|gradient)_(\w+)$/.exec(name)?.[1];
  return colour(zone ? `--${zone}` : `--plot-${index % 6}`) || colour("--plot-0");
}

// `sets`: [{label, curves}], one for each run; curves: {figure: {steps, values}}.
export class Charts {
  constructor(place, sets) {
    this.place = place;
    this.sets = sets;
    this.charts = [];
    this.redraw = () => this.draw();
    this.dark = matchMedia("(prefers-color-scheme: dark)");
    this.dark.addEventListener("change", this.redraw);
    this.resizing = new ResizeObserver(() => this.resize());
    this.resizing.observe(place);
    this.draw();
  }

  close() {
    this.dark.removeEventListener("change", this.redraw);
    this.resizing.disconnect();
    for (const { plot } of this.charts) plot.destroy();
  }

  get names() {
    return [...new Set(this.sets.flatMap(({ curves }) => Object.keys(curves)))];
  }

  draw() {
    for (const { plot } of this.charts) plot.destroy();
    this.charts = [];
    this.place.replaceChildren();
    this.drawn = this.names.join();
    for (const [title, members] of grouped(this.names)) {
      const box = el("div");
      const said = el("p", { class: "sr" });
      const figure = el("figure", { class: "card" }, el("figcaption", {}, word(title)), box, said);
      this.place.append(figure);
      const lines = this.sets.flatMap((set, run) => members.filter((name) => set.curves[name])
        .map((name) => ({ set, name, run })));
      const plot = this.plotOf(box, lines);
      this.charts.push({ plot, lines, box, said });
      this.describe(said, lines);
    }
  }

  plotOf(box, lines) {
    const several = this.sets.length > 1;
    const names = [...new Set(lines.map(({ name }) => name))];
    const axis = { stroke: colour("--soft"), grid: { stroke: colour("--grid"), width: 1 },
      ticks: { show: false }, font: "12px system-ui", size: 34 };
    const series = lines.map(({ set, name, run }) => ({
      label: several ? `${name} (${set.label})` : name,
      stroke: colourOf(name, several ? 2 * names.indexOf(name) + run : names.indexOf(name)),
      width: name.startsWith("eval_") ? 2 : 1.5, dash: several && run ? [6, 4] : [], spanGaps: true,
      points: { show: name.startsWith("eval_"), size: 5 },
      value: (_, value) => number(value) }));
    return new uPlot({
      width: Math.max(240, box.clientWidth), height: 210, series: [{ label: word("update") }, ...series],
      scales: { x: { time: false } }, cursor: { points: { size: 6 }, drag: { x: true, y: false } },
      axes: [axis, { ...axis, size: 56, values: (_, ticks) => ticks.map((value) => number(value, 3)) }],
      legend: { live: true } }, this.dataOf(lines), box);
  }

  dataOf(lines) {
    const tables = lines.map(({ set, name }) => [set.curves[name].steps, set.curves[name].values]);
    return uPlot.join(tables.map(([steps, values]) => [[...steps], [...values]]));
  }

  describe(said, lines) {
    said.textContent = lines.map(({ set, name }) =>
      `${name}${this.sets.length > 1 ? ` (${set.label})` : ""}: ${number(set.curves[name].values.at(-1))}`).join("; ");
  }

  // New records of the first run.
  add(records) {
    const { curves } = this.sets[0];
    for (const { step, ...figures } of records) {
      for (const [name, value] of Object.entries(figures)) {
        if (value === null) continue;
        const curve = curves[name] ??= { steps: [], values: [] };
        if (curve.steps.at(-1) === step) curve.values[curve.values.length - 1] = value;
        else { curve.steps.push(step); curve.values.push(value); }
      }
    }
    this.refresh();
  }

  refresh() {
    if (this.names.join() !== this.drawn) return void this.draw();
    for (const { plot, lines, said } of this.charts) {
      plot.setData(this.dataOf(lines));
      this.describe(said, lines);
    }
  }

  resize() {
    for (const { plot, box } of this.charts) {
      const width = Math.max(240, box.clientWidth);
      if (width !== plot.width) plot.setSize({ width, height: 210 });
    }
  }
}
