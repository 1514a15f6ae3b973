// Marks that a person sets: rows to keep or drop. They are saved as a file for `sort.marks`.

// By the place of a row: the parts of a long row share its mark.
const marks = new Map(
  Object.entries(rows.marks).map(([row, mark]) => [placeOf(Number(row)), { row: Number(row), mark }]));
let areSaved = true;

const markOf = (row) => marks.get(placeOf(row))?.mark;

function markButtons(row) {
  const button = (mark) => Object.assign(document.createElement("button"), {
    type: "button", className: `mark ${mark}`, value: row, ariaPressed: markOf(row) === mark });
  const both = document.createElement("span");
  both.className = "marks";
  for (const mark of ["keep", "drop"]) {
    const made = button(mark);
    made.dataset.mark = mark;
    made.append(word(mark));
    both.append(made);
  }
  return both;
}

// Set a mark, or take it away if the row has it.
function setMark(row, mark) {
  if (markOf(row) === mark) marks.delete(placeOf(row));
  else marks.set(placeOf(row), { row, mark });
  areSaved = false;
  showMarks();
}

function showMarks() {
  for (const button of document.querySelectorAll("button.mark")) {
    button.ariaPressed = markOf(Number(button.value)) === button.dataset.mark;
  }
  document.getElementById("num-marked").textContent = marks.size.toLocaleString("en");
  document.getElementById("saving").hidden = !marks.size && areSaved;
}

function linesOfMarks() {
  const lines = [...marks.values()].sort((one, other) => one.row - other.row).map(({ row, mark }) =>
    JSON.stringify({
      file: rows.files[rows.file[row]], row: rows.number[row], mark, content: rows.content[row] }));
  return lines.map((line) => `${line}\n`).join("");
}

function saveMarks() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([linesOfMarks()], { type: "application/jsonl" }));
  link.download = "marks.jsonl";
  link.click();
  areSaved = true;
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button.mark");
  if (button) setMark(Number(button.value), button.dataset.mark);
});
document.getElementById("save-marks").addEventListener("click", saveMarks);
addEventListener("beforeunload", (event) => {
  if (!areSaved) event.preventDefault();
});
showMarks();
