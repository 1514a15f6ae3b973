// The rows as columns of figures: rank them by suspicion, order and search them.

const rows = JSON.parse(document.getElementById("rows").textContent);
const maps = document.getElementById("maps").textContent.split("\n");
const numRows = rows.number.length;
const placeOf = (row) => `${rows.files[rows.file[row]]}:${rows.number[row]}`;

// For each score and row, the share of rows that are less suspicious: from 0 to just under 1.
// A row without a score counts as the least suspicious.
const sharesBelow = new Map();

function sharesOf(score) {
  if (!sharesBelow.has(score)) {
    const sign = rows.low.includes(score) ? -1 : 1;
    const suspicion = Float64Array.from(rows.scores[score], (value) =>
      value === null ? -Number.MAX_VALUE : sign * value);
    const rising = Uint32Array.from(suspicion.keys())
      .sort((one, other) => suspicion[one] - suspicion[other] || one - other);
    const shares = new Float64Array(numRows);
    let first = 0;
    rising.forEach((row, place) => {
      if (suspicion[row] !== suspicion[rising[first]]) first = place;
      shares[row] = first / numRows;
    });
    sharesBelow.set(score, shares);
  }
  return sharesBelow.get(score);
}

const levelOf = (share) => rows.shares.filter((border) => share >= border).length;

// All rows in the order of a column; equal rows stay in the order of the file.
function inOrder(column, score, isFalling) {
  const figures = column === "suspicion" ? sharesOf(score) : rows[column];
  const figureOf = (row) => (column === "row" ? row : figures[row]);
  const sign = isFalling ? -1 : 1;
  return Array.from({ length: numRows }, (_, row) => row)
    .sort((one, other) => sign * (figureOf(one) - figureOf(other)) || one - other);
}

let smallTexts = null;

// For each row, 1 where it contains the words, has the chosen fate and is in the chosen cluster.
function findRows(words, fate, cluster) {
  smallTexts ??= rows.text.map((text, row) => `${placeOf(row)} ${text}`.toLowerCase());
  const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
  const fits = (row) =>
    (cluster === "all" || rows.cluster[row] === Number(cluster)) &&
    (fate === "all" ||
      (fate === "marked" ? Boolean(markOf(row)) : (fate === "dropped") === row in rows.dropped)) &&
    wanted.every((word) => smallTexts[row].includes(word));
  return Uint8Array.from({ length: numRows }, (_, row) => fits(row));
}
