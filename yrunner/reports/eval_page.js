"use strict";
// Lists the answers of a task, filtered, wrong ones first, in portions.

const { models, tasks } = JSON.parse(document.getElementById("answers").textContent);
const element = (id) => document.getElementById(id);
const AT_ONCE = 50;

let found = [];
let numShown = 0;

// The search ignores case and width.
const plain = (text) => text.normalize("NFKC").toLowerCase();
const haystacks = tasks.map(() => new Map());

function haystack(task, row) {
  const known = haystacks[task];
  if (!known.has(row)) known.set(row, plain([row[0], row[1], ...row[2]].join("\n")));
  return known.get(row);
}

const WANTED = {
  all: () => true,
  wrong: (score) => score < 1,
  lost: (score, first) => score < 1 && first >= 1,
  learnt: (score, first) => score >= 1 && first < 1,
  differing: (score, first, answer, firstAnswer) => answer !== firstAnswer,
};

function find() {
  const task = Number(element("task").value);
  const judged = Number(element("judged").value);
  const isWanted = WANTED[element("shown").value];
  const words = plain(element("search").value).split(/\s+/).filter(Boolean);
  found = tasks[task].rows.filter((row) => {
    const [, , answers, scores] = row;
    return (
      isWanted(scores[judged], scores[0], answers[judged], answers[0]) &&
      words.every((word) => haystack(task, row).includes(word))
    );
  });
  // What the judged model lost comes before what no model knew.
  found.sort((a, b) => a[3][judged] - b[3][judged] || b[3][0] - a[3][0]);
  numShown = 0;
  element("list").replaceChildren();
  const total = tasks[task].rows.length.toLocaleString("en");
  element("count").textContent = `${found.length.toLocaleString("en")} of ${total}`;
  showMore();
}

function saying(who, text, verdict) {
  const box = element("saying").content.firstElementChild.cloneNode(true);
  box.className = verdict;
  box.querySelector("h4").textContent = { right: "✓ ", wrong: "✗ ", "": "" }[verdict] + who;
  box.querySelector("p").textContent = text;
  return box;
}

function card(task, [question, reference, answers, scores]) {
  const box = element("card").content.firstElementChild.cloneNode(true);
  box.querySelector("h3").textContent = question;
  const said = box.querySelector(".said");
  if (reference) said.append(saying("reference", reference, ""));
  answers.forEach((answer, model) => {
    const score = scores[model];
    const judgement = task.graded || score === null ? "" : `: ${task.score} ${score.toFixed(2)}`;
    const verdict = !task.graded || score === null ? "" : score >= 1 ? "right" : "wrong";
    said.append(saying(models[model] + judgement, answer, verdict));
  });
  return box;
}

function showMore() {
  const task = tasks[Number(element("task").value)];
  const next = found.slice(numShown, numShown + AT_ONCE);
  element("list").append(...next.map((row) => card(task, row)));
  numShown += next.length;
  element("more").hidden = numShown === found.length;
}

for (const id of ["task", "judged", "shown"]) element(id).addEventListener("change", find);
element("search").addEventListener("input", find);
element("more").addEventListener("click", showMore);
find();
