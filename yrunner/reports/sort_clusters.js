// The clusters of the rows: a picture of all rows by their hidden states, and a line for each.

const planeCanvas = document.getElementById("plane");
const chosenCluster = () =>
  document.querySelector("input[name=cluster]:checked")?.value ?? "all";

// Draw the rows of the chosen cluster strong, the others pale.
function drawPlane() {
  if (!rows.plane) return;
  const number = chosenCluster();
  const clusterOf = (row) => rows.cluster[row];
  const isStrong = (row) => number === "all" || Number(number) === clusterOf(row);
  drawClusters(planeCanvas, rows.plane, clusterOf, isStrong);
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
}
