// The list of the rows that were found, in portions, and pairs of rows side by side.

const ROWS_AT_ONCE = 50;
const PAIRS_AT_ONCE = 10;

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function rowButton(row, text) {
  return element("button", { type: "button", className: "row", value: row }, text);
}

// The lines of a list, and a button that adds more while there are any.
class LongList {
  constructor(box, more, atOnce, makeLine) {
    Object.assign(this, { box, more, atOnce, makeLine });
    more.addEventListener("click", () => this.grow());
  }

  show(things) {
    this.things = things;
    this.numShown = 0;
    this.box.replaceChildren();
    this.grow();
  }

  grow() {
    const next = this.things.slice(this.numShown, this.numShown + this.atOnce);
    this.box.append(...next.map((thing) => this.makeLine(thing)));
    this.numShown += next.length;
    this.more.hidden = this.numShown === this.things.length;
  }
}

function rowLine(row, score, isOpened) {
  const number = (text) => element("td", { className: "number" }, text);
  const line = element("tr", {},
    element("td", {}, rowButton(row, placeOf(row))),
    number(short(rows.scores[score][row])),
    number(short(rows.loss[row])),
    number(short(rows.entropy[row])),
    number(rows.targets[row].toLocaleString("en")),
    element("td", {}, markButtons(row)),
    element("td", {}, element("div", { className: "text", dir: "auto" }, rows.text[row])));
  line.dataset.row = row;
  line.ariaCurrent = isOpened;
  line.classList.toggle("dropped", row in rows.dropped);
  return line;
}

// Split two texts into common start, different middle and common end.
function difference(left, right) {
  const [one, other] = [[...left], [...right]];
  const least = Math.min(one.length, other.length);
  let start = 0;
  while (start < least && one[start] === other[start]) start += 1;
  let end = 0;
  while (end < least - start && one.at(-1 - end) === other.at(-1 - end)) end += 1;
  return [one, other].map((signs) => {
    const cut = [signs.slice(0, start), signs.slice(start, signs.length - end)];
    return [...cut, signs.slice(signs.length - end)].map((part) => part.join(""));
  });
}

function pairBlock(pair) {
  const sides = difference(...pair.texts).map(([before, own, behind], side) =>
    element("div", {},
      rowButton(pair.rows[side], placeOf(pair.rows[side])), " ", markButtons(pair.rows[side]),
      element("p", { dir: "auto" }, before, element("mark", {}, own), behind)));
  const likeness = element("span", { className: "where", dir: "auto" },
    pair.note || `${Math.floor(100 * pair.likeness)} %`);
  return element("article", { className: "pair" },
    element("h3", {}, word(pair.kind), " ", likeness),
    element("div", { className: "sides" }, ...sides));
}
