// Opens rows, and keeps the points, the list and the open row in sync.

const scatter = new Scatter(document.getElementById("scatter"));
const panel = document.getElementById("panel");
const search = document.getElementById("search");
const distributions = new Map();
const state = { column: "suspicion", isFalling: true, opened: null, found: [], isFound: [] };

const list = new LongList(
  document.getElementById("lines"), document.getElementById("more-rows"), ROWS_AT_ONCE,
  (row) => rowLine(row, chosen("score"), row === state.opened));
const pairs = new LongList(
  document.getElementById("pairs"), document.getElementById("more-pairs"), PAIRS_AT_ONCE,
  pairBlock);

function drawPoints() {
  scatter.draw(sharesOf(chosen("score")), state.isFound, state.opened);
}

// List the rows that were found, in the chosen order.
function listRows() {
  const score = chosen("score");
  state.isFound = findRows(search.value, chosen("fate"), chosenCluster());
  state.found = inOrder(state.column, score, state.isFalling).filter((row) => state.isFound[row]);
  for (const header of document.querySelectorAll("#list th[data-column]")) {
    const isChosen = header.dataset.column === state.column;
    header.ariaSort = isChosen ? (state.isFalling ? "descending" : "ascending") : "none";
  }
  document.querySelector("#list .score").replaceChildren(word(score));
  document.getElementById("num-found").textContent = state.found.length.toLocaleString("en");
  list.show(state.found);
  markOpened();
  drawPoints();
  drawPlane();
}

function markOpened() {
  for (const line of document.querySelectorAll("#lines tr")) {
    line.ariaCurrent = Number(line.dataset.row) === state.opened;
  }
}

// The heat map of a row; heat_map.js colours the elements that `shown` holds.
function tokensOf(map) {
  const box = element("div", { className: "tokens", dir: "auto" });
  const top = Array.from({ length: map.loss.length }, (_, token) => map.top[token] ?? "");
  const agrees = top.map((_, token) => Number(!(token in map.top)));
  const nats = (hundredths) => hundredths / 100;
  const model = { loss: map.loss.map(nats), entropy: map.entropy.map(nats), top, agrees };
  model.excess = model.loss.map((loss, token) => Number((loss - model.entropy[token]).toFixed(2)));
  model.zone = [...map.patterns].map(Number);
  if (map.knn_loss) {
    model.knn_loss = map.knn_loss.map(nats);
    model.unexplained = model.loss.map((loss, token) => Math.min(loss, model.knn_loss[token]));
    if (map.outlier) model.outlier = map.outlier.map(nats);
    model.told = top.map((_, token) => map.told[token] ?? NONE);
  }
  if (map.against) model.against = map.against.map(nats);
  let first = 0;
  map.texts.forEach((text, number) => {
    const kind = parseInt(map.kinds[number], 20);
    const count = kind % 10;
    const piece = element("span", { className: kind < 10 ? "" : "special" }, text);
    if (count) {
      const tokens = Array.from({ length: count }, (_, place) => first + place);
      piece.classList.add("target");
      piece.tabIndex = first === 0 ? 0 : -1;
      // The last token of a character completes it.
      if (agrees[tokens.at(-1)]) top[tokens.at(-1)] = text;
      shown.set(piece, { readings: { model }, tokens });
      first += count;
    }
    box.append(piece);
  });
  return box;
}

function scoreLine(score) {
  const share = 100 * sharesOf(score)[state.opened];
  return element("tr", {},
    element("th", { scope: "row" }, word(score)),
    element("td", { className: "number" }, short(rows.scores[score][state.opened])),
    element("td", { className: "number" }, `${Math.floor(share * 10) / 10} %`));
}

function openRow(row) {
  state.opened = row;
  hideCard();
  shown.clear();
  const map = maps[row] && JSON.parse(maps[row]);
  panel.querySelector("h2").textContent = placeOf(row);
  panel.querySelector(".marking").replaceChildren(markButtons(row));
  panel.querySelector(".reason").hidden = !(row in rows.dropped);
  panel.querySelector(".why").textContent = rows.dropped[row] ?? "";
  for (const part of panel.querySelectorAll(".with-map")) part.hidden = !map;
  panel.querySelector(".without-map").hidden = Boolean(map);
  const plain = () => element("div", { className: "tokens", dir: "auto" }, rows.text[row]);
  document.getElementById("tokens").replaceChildren(map ? tokensOf(map) : plain());
  document.getElementById("scores").replaceChildren(...Object.keys(rows.scores).map(scoreLine));
  panel.hidden = false;
  panel.scrollTop = 0;
  for (const distribution of distributions.values()) distribution.point(row);
  markOpened();
  drawPoints();
  if (map) paint();
}

function closeRow() {
  hideCard();
  panel.hidden = true;
  state.opened = null;
  for (const distribution of distributions.values()) distribution.point(null);
  markOpened();
  drawPoints();
}

// Open the next or previous row of the list; the first if the open row is not in it.
function walk(step) {
  const place = state.found.indexOf(state.opened);
  const next = state.found[place === -1 ? 0 : place + step];
  if (next !== undefined) openRow(next);
}

function sortBy(column) {
  state.isFalling = column === state.column ? !state.isFalling : column !== "row";
  state.column = column;
  listRows();
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button.row");
  const line = !event.target.closest("button.mark") && event.target.closest("#lines tr");
  if (button) openRow(Number(button.value));
  else if (line && !String(getSelection())) openRow(Number(line.dataset.row));
});
for (const header of document.querySelectorAll("#list th[data-column]")) {
  header.firstElementChild.addEventListener("click", () => sortBy(header.dataset.column));
}
for (const input of document.querySelectorAll("input[name=score], input[name=fate], input[name=cluster]")) {
  input.addEventListener("change", listRows);
}
search.addEventListener("input", listRows);
panel.querySelector(".previous").addEventListener("click", () => walk(-1));
panel.querySelector(".next").addEventListener("click", () => walk(1));
panel.querySelector(".close").addEventListener("click", closeRow);

scatter.canvas.addEventListener("click", ({ clientX, clientY }) => {
  const row = scatter.rowAt(clientX, clientY);
  if (row !== null) openRow(row);
});
scatter.canvas.addEventListener("mousemove", ({ clientX, clientY }) => {
  const row = scatter.rowAt(clientX, clientY);
  scatter.canvas.style.cursor = row === null ? "default" : "pointer";
  scatter.canvas.title = row === null ? "" : `${placeOf(row)}\n${rows.text[row].slice(0, 200)}`;
});
document.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const place = event.target.closest?.("#scatter, #lines");
  if (!step || !place) return;
  event.preventDefault();
  walk(step);
  if (place.id === "lines") place.querySelector("[aria-current=true] button")?.focus();
});
new ResizeObserver(drawPoints).observe(scatter.canvas);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawPoints);

for (const svg of document.querySelectorAll("svg[data-score]")) {
  distributions.set(svg.dataset.score, new Distribution(svg, svg.dataset.score));
}
listRows();
pairs.show(rows.pairs);
// Only a wide window has room for a row beside the list.
if (numRows && matchMedia("(min-width: 75rem)").matches) openRow(state.found[0]);
