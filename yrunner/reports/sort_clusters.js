// The clusters of the rows: a picture of all rows by their hidden states, and a line for each.

const planeCanvas = document.getElementById("plane");
const chosenCluster = () =>
  document.querySelector("input[name=cluster]:checked")?.value ?? "all";

// Neighbouring numbers have colours that lie far apart.
const clusterColour = (number) =>
  number ? `hsl(${(number * 137.5) % 360} 62% 48%)` : colour("--plot-grid");

// Draw the rows of the chosen cluster last and strong, the others pale.
function drawPlane() {
  if (!rows.plane || !planeCanvas.clientWidth) return;
  const [width, height] = [planeCanvas.clientWidth, planeCanvas.clientHeight];
  planeCanvas.width = width * devicePixelRatio;
  planeCanvas.height = height * devicePixelRatio;
  const pen = planeCanvas.getContext("2d");
  pen.scale(devicePixelRatio, devicePixelRatio);
  const ends = [0, 1].map((axis) => {
    const values = rows.plane.map((point) => point[axis]);
    const low = values.reduce((least, value) => Math.min(least, value), Infinity);
    const high = values.reduce((most, value) => Math.max(most, value), -Infinity);
    return [low, high - low || 1];
  });
  const place = (row) => ends.map(([low, span], axis) => {
    const share = (rows.plane[row][axis] - low) / span;
    return axis ? height - 14 - share * (height - 28) : 14 + share * (width - 28);
  });
  const chosenNumber = chosenCluster();
  const isStrong = (row) => chosenNumber === "all" || Number(chosenNumber) === rows.cluster[row];
  const size = numRows > 5000 ? 1.6 : 3;
  for (const strong of [false, true]) {
    pen.globalAlpha = strong ? 0.85 : 0.15;
    for (let row = 0; row < numRows; row += 1) {
      if (isStrong(row) !== strong) continue;
      const [x, y] = place(row);
      pen.fillStyle = clusterColour(rows.cluster[row]);
      pen.beginPath();
      pen.arc(x, y, size, 0, 2 * Math.PI);
      pen.fill();
    }
  }
}

function clusterLine({ number, size, suspicious, words, typical }) {
  const input = element("input", { type: "radio", name: "cluster", value: number });
  input.autocomplete = "off";
  const swatch = element("i", { className: "swatch" });
  swatch.style.background = clusterColour(number);
  const name = number ? [String(number)] : [word("no cluster")];
  const cell = (text) => element("td", { className: "number" }, text);
  const text = typical.length
    ? [element("div", { className: "text", dir: "auto" }, rows.text[typical[0]])] : [];
  const rowsOf = typical.flatMap((row) => [rowButton(row, placeOf(row)), " "]);
  return element("tr", {},
    element("td", {}, element("label", {}, input, swatch, ...name)),
    cell(size.toLocaleString("en")),
    cell(`${Math.round((100 * suspicious) / size)} %`),
    element("td", { dir: "auto" }, words.join(", ")),
    element("td", {}, ...text, ...rowsOf));
}

if (rows.clusters) {
  document.getElementById("clusters").append(...rows.clusters.map(clusterLine));
  new ResizeObserver(drawPlane).observe(planeCanvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawPlane);
}
