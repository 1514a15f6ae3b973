// Draws all rows: loss against entropy as points, and the distribution of each score.

const TICKS = [0, 0.1, 0.25, 0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 40, 64, 100];
const MARGIN = { left: 40, right: 12, top: 12, bottom: 34 };
const LEVELS = ["--plot-grid", "--heat-3", "--heat-4", "--heat-5", "--heat-6"];
const NUM_BARS = 36;
const REACH = 14;
const SVG = "http://www.w3.org/2000/svg";

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);
const highest = (values) => values.reduce((most, value) => Math.max(most, value ?? 0), 0.1);

class Scatter {
  constructor(canvas) {
    this.canvas = canvas;
    this.ends = { x: 1.06 * highest(rows.entropy), y: 1.06 * highest(rows.loss) };
    this.x = new Float32Array(numRows);
    this.y = new Float32Array(numRows);
  }

  // Square root scale: most rows are near zero, few are far out.
  place(value, axis) {
    const { width, height } = this;
    const share = Math.sqrt(Math.max(0, value ?? 0) / this.ends[axis]);
    return axis === "x"
      ? MARGIN.left + share * (width - MARGIN.left - MARGIN.right)
      : height - MARGIN.bottom - share * (height - MARGIN.top - MARGIN.bottom);
  }

  measure() {
    this.width = this.canvas.clientWidth;
    this.height = this.canvas.clientHeight;
    this.canvas.width = this.width * devicePixelRatio;
    this.canvas.height = this.height * devicePixelRatio;
    for (let row = 0; row < numRows; row += 1) {
      this.x[row] = this.place(rows.entropy[row], "x");
      this.y[row] = this.place(rows.loss[row], "y");
    }
  }

  draw(shares, isFound, opened) {
    this.isFound = isFound;
    this.measure();
    const pen = this.canvas.getContext("2d");
    pen.scale(devicePixelRatio, devicePixelRatio);
    this.drawAxes(pen);
    // Draw the most suspicious last, so that the others do not hide them.
    const levels = Uint8Array.from(shares, levelOf);
    for (const [level, name] of LEVELS.entries()) this.drawLevel(pen, level, name, levels);
    if (opened !== null) this.drawRing(pen, opened);
  }

  drawAxes(pen) {
    const { width, height } = this;
    pen.font = "12px system-ui, sans-serif";
    pen.fillStyle = colour("--soft");
    pen.strokeStyle = colour("--line");
    pen.lineWidth = 1;
    for (const tick of TICKS) {
      const x = this.place(tick, "x");
      const y = this.place(tick, "y");
      if (tick <= this.ends.x) {
        pen.textAlign = "center";
        pen.fillText(tick, x, height - MARGIN.bottom + 16);
      }
      if (tick <= this.ends.y) {
        pen.textAlign = "right";
        pen.fillText(tick, MARGIN.left - 8, y + 4);
        pen.beginPath();
        pen.moveTo(MARGIN.left, y);
        pen.lineTo(width - MARGIN.right, y);
        pen.stroke();
      }
    }
    // The line on which the loss equals the entropy.
    const end = Math.min(this.ends.x, this.ends.y);
    pen.setLineDash([4, 4]);
    pen.strokeStyle = colour("--soft");
    pen.beginPath();
    pen.moveTo(this.place(0, "x"), this.place(0, "y"));
    pen.lineTo(this.place(end, "x"), this.place(end, "y"));
    pen.stroke();
    pen.setLineDash([]);
  }

  drawLevel(pen, level, name, levels) {
    const size = numRows > 5000 ? 2 : 3.2;
    const kept = new Path2D();
    const dropped = new Path2D();
    for (let row = 0; row < numRows; row += 1) {
      if (!this.isFound[row] || levels[row] !== level) continue;
      const [x, y] = [this.x[row], this.y[row]];
      if (row in rows.dropped) {
        dropped.moveTo(x - size, y - size);
        dropped.lineTo(x + size, y + size);
        dropped.moveTo(x - size, y + size);
        dropped.lineTo(x + size, y - size);
      } else {
        kept.moveTo(x + size, y);
        kept.arc(x, y, size, 0, 2 * Math.PI);
      }
    }
    pen.fillStyle = pen.strokeStyle = colour(name);
    pen.lineWidth = 1.6;
    pen.globalAlpha = level === 0 ? 0.55 : 0.85;
    pen.fill(kept);
    pen.stroke(dropped);
    pen.globalAlpha = 1;
  }

  drawRing(pen, row) {
    pen.strokeStyle = colour("--accent");
    pen.lineWidth = 2.5;
    pen.beginPath();
    pen.arc(this.x[row], this.y[row], 8, 0, 2 * Math.PI);
    pen.stroke();
  }

  // The nearest row to a position in the window; null where none is near.
  rowAt(clientX, clientY) {
    const { left, top } = this.canvas.getBoundingClientRect();
    let nearest = null;
    let least = REACH * REACH;
    for (let row = 0; row < numRows; row += 1) {
      if (!this.isFound[row]) continue;
      const distance = (this.x[row] + left - clientX) ** 2 + (this.y[row] + top - clientY) ** 2;
      if (distance < least) [nearest, least] = [row, distance];
    }
    return nearest;
  }
}

class Distribution {
  constructor(svg, score) {
    this.svg = svg;
    this.values = rows.scores[score];
    const rising = Float64Array.from(this.values.filter((value) => value !== null)).sort();
    const at = (share) => rising[Math.round(share * (rising.length - 1))] ?? 0;
    // Values beyond the outermost 1 % are counted in the outermost bar.
    this.low = at(0.01) - (at(0.99) - at(0.01)) * 0.02;
    this.high = at(0.99) + (at(0.99) - at(0.01)) * 0.02;
    const counts = new Uint32Array(NUM_BARS);
    for (const value of rising) counts[this.barOf(value)] += 1;
    const most = Math.max(1, ...counts);
    counts.forEach((count, bar) => {
      // A single row must be visible.
      const height = count && Math.max(1.5, (48 * count) / most);
      this.add("rect", { x: bar, y: 50 - height, width: 0.86, height, class: "bin" });
    });
    this.mark = this.add("rect", { y: 0, width: 0.4, height: 50, class: "mark" });
    svg.setAttribute("viewBox", `0 0 ${NUM_BARS} 50`);
    svg.nextElementSibling.replaceChildren(
      Object.assign(document.createElement("span"), { textContent: short(at(0.01)) }),
      Object.assign(document.createElement("span"), { textContent: short(at(0.99)) }),
    );
    this.point(null);
  }

  barOf(value) {
    const share = (value - this.low) / (this.high - this.low || 1);
    return Math.min(NUM_BARS - 1, Math.max(0, Math.floor(share * NUM_BARS)));
  }

  add(name, attributes) {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return this.svg.appendChild(element);
  }

  point(row) {
    const value = row === null ? null : this.values[row];
    this.mark.style.visibility = value === null ? "hidden" : "visible";
    if (value !== null) this.mark.setAttribute("x", this.barOf(value) + 0.23);
  }
}
