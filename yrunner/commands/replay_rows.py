"""The rows that a base wrote: found on disk, or written now where they are too few."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock

from yrunner.commands.base import base_source
from yrunner.commands.finished import base_model
from yrunner.commands.model_key import model_key
from yrunner.console import progress, say, warn
from yrunner.errors import RunError
from yrunner.evaluation.draft_faults import FAULTS, Fault, Known, find_fault
from yrunner.evaluation.drafts import Author, Draft
from yrunner.models.load import check_vocabulary, load_tokenizer
from yrunner.recipe.load import base_recipe_path
from yrunner.recipe.schema import Recipe
from yrunner.recipe.schema_keep import Writing
from yrunner.replay_dir import ReplayDir
from yrunner.run_dir import RunDir, read_json, write_json, write_text

LONGEST_TURN = 256
"""Tokens of a question or an answer, unless the recipe says otherwise."""
HELD_OUT_EVERY = 4
"""One draft in so many that are kept is held out for the gauge, whatever is asked for: so the rows
are the same for every recipe that holds on to this base."""
TRIES = 12
"""Drafts for each row that is wanted, at the most: a base that says little has few rows."""
FEWEST = 0.1
"""Share of the drafts that has to be of use: a base below it has never learned to write."""
FIRST_LOOK = 128
"""Drafts after which that is looked at."""


@dataclass(frozen=True)
class Wanted:
    """How many rows a run asks a base for."""

    rows: int = 0
    held_out: int = 0


@dataclass(frozen=True)
class Written:
    """What a base has written, in the files of a folder."""

    folder: ReplayDir
    wanted: Wanted

    @property
    def rows(self) -> list[str]:
        """The lines to be learned from, as many as were wanted or as there are."""
        return _lines(self.folder.rows)[: self.wanted.rows]

    @property
    def held_out(self) -> list[str]:
        """The lines for the gauge."""
        return _lines(self.folder.held_out)[: self.wanted.held_out]


def replay_folder(recipe: Recipe, writing: Writing) -> ReplayDir:
    """Where the rows of the recipe's base are; the base has to exist by now."""
    key = model_key(base_source(recipe))
    how = [key, recipe.data.system, _turn_length(recipe, writing), writing.temperature]
    text = json.dumps([*how, writing.openings], ensure_ascii=False)
    path = base_recipe_path(recipe)
    name = path.stem if path else Path(base_source(recipe)).name
    digest = sha256(text.encode()).hexdigest()[:8]
    return ReplayDir(RunDir(recipe.run_folder).replay / f"{name}-{digest}")


def written_rows(recipe: Recipe, writing: Writing, wanted: Wanted) -> Written:
    """The rows that the recipe's base wrote; those that are missing are written now.

    Another process that wants them, too, waits and finds them. Raises `RunError` where the base
    does not write enough that is of use.
    """
    folder = replay_folder(recipe, writing)
    folder.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.lock):
        desk = _Desk.open(folder)
        if desk.lacks(wanted):
            _write(recipe, writing, wanted, desk)
    return Written(folder, wanted)


@dataclass
class _Desk:
    """The files of a folder, and what is known of them."""

    folder: ReplayDir
    num_drafts: int = 0
    fates: Counter[str] = field(default_factory=Counter)
    asked: dict[str, int] = field(default_factory=dict)
    """The most rows that were ever wanted of each file: a file with fewer is all there is."""
    known: Known = field(default_factory=Known)

    @classmethod
    def open(cls, folder: ReplayDir) -> "_Desk":
        """Take up what is on disk."""
        if not folder.record.exists():
            for path in (folder.rows, folder.held_out, folder.dropped):
                path.unlink(missing_ok=True)
            return cls(folder)
        record = read_json(folder.record)
        desk = cls(folder, record["drafts"], Counter(record["fates"]), record["asked"])
        for path in (folder.rows, folder.held_out, folder.dropped):
            desk._cut_off(path)
        for path in (folder.rows, folder.held_out):
            for line in _lines(path):
                desk.known.add(_text_of(line))
        return desk

    def _cut_off(self, path: Path) -> None:
        """Remove what was written when the record was not: those drafts will be written again."""
        lines = _lines(path)
        whole = [line for line in lines if json.loads(line).get("draft", -1) < self.num_drafts]
        if len(whole) < len(lines):
            write_text(path, "".join(f"{line}\n" for line in whole))

    @property
    def name(self) -> str:
        """How a person calls the base."""
        return self.folder.folder.name.rpartition("-")[0]

    def counts(self) -> Wanted:
        """How many rows there are."""
        return Wanted(len(_lines(self.folder.rows)), len(_lines(self.folder.held_out)))

    def lacks(self, wanted: Wanted) -> bool:
        """Whether more were wanted than ever before: rows that a person took out stay away."""
        return any(
            number > self.asked.get(name, 0) for name, number in vars(wanted).items() if number
        )

    def take(self, drafts: Sequence[Draft]) -> None:
        """Judge drafts, and write each to the file that it belongs to, then the record."""
        lines: dict[Path, list[str]] = {}
        for draft in drafts:
            fault = find_fault(draft, self.known)
            if fault is None:
                self.known.add(draft.text)
            path = self._place_of(fault)
            self.fates[fault or "kept"] += 1
            lines.setdefault(path, []).append(_line(draft, fault))
        self.num_drafts += len(drafts)
        for path, added in lines.items():
            write_text(path, "".join(f"{line}\n" for line in [*_lines(path), *added]))
        self.save()

    def save(self) -> None:
        """Write the record, which says what of the files is whole."""
        record = read_json(self.folder.record) if self.folder.record.exists() else {}
        content = {"drafts": self.num_drafts, "fates": dict(self.fates), "asked": self.asked}
        write_json(self.folder.record, record | content)

    def _place_of(self, fault: Fault | None) -> Path:
        if fault is not None:
            return self.folder.dropped
        is_held_out = self.fates["kept"] % HELD_OUT_EVERY == 0
        return self.folder.held_out if is_held_out else self.folder.rows


def _write(recipe: Recipe, writing: Writing, wanted: Wanted, desk: _Desk) -> None:
    """Let the base write until there is enough, or until it says nothing new."""
    source = base_source(recipe)
    record = {"base": source, "key": model_key(source), "writing": writing.model_dump()}
    write_json(desk.folder.record, record)
    desk.save()
    model = base_model(recipe)
    tokenizer = load_tokenizer(source, trust_remote_code=recipe.model.trust_remote_code)
    check_vocabulary(model, tokenizer)
    author = Author(
        model,
        tokenizer,
        system=recipe.data.system,
        temperature=writing.temperature,
        openings=writing.openings,
        max_new_tokens=_turn_length(recipe, writing),
        batch_size=recipe.eval.batch_size,
    )
    there = desk.counts()
    goal = max(
        wanted.rows * HELD_OUT_EVERY // (HELD_OUT_EVERY - 1), wanted.held_out * HELD_OUT_EVERY
    )
    last = desk.num_drafts + TRIES * goal
    with progress(f"{desk.name} writes rows of its own", goal) as advance:
        advance(min(goal, there.rows + there.held_out))
        for numbers in _batches(desk, wanted, last, author.batch_size):
            before = desk.fates["kept"]
            desk.take(author.write(numbers))
            advance(desk.fates["kept"] - before)
    for name, number in vars(wanted).items():
        desk.asked[name] = max(number, desk.asked.get(name, 0))
    desk.save()
    _say_what_was_written(desk, wanted)


def _batches(desk: _Desk, wanted: Wanted, last: int, size: int) -> Iterator[list[int]]:
    """Numbers of the next drafts, until there is enough or there were too many."""
    while desk.num_drafts < last:
        there = desk.counts()
        if there.rows >= wanted.rows and there.held_out >= wanted.held_out:
            return
        if desk.num_drafts >= FIRST_LOOK and desk.fates["kept"] < FEWEST * desk.num_drafts:
            return
        yield list(range(desk.num_drafts, desk.num_drafts + size))


def _say_what_was_written(desk: _Desk, wanted: Wanted) -> None:
    dropped = ", ".join(f"{desk.fates[fault]:,} {fault}" for fault in FAULTS if desk.fates[fault])
    say(
        f"{desk.num_drafts:,} drafts: {desk.fates['kept']:,} kept"
        + (f"; dropped: {dropped}" if dropped else "")
        + f"; in {desk.folder.folder}"
    )
    there = desk.counts()
    if there.rows < FEWEST * wanted.rows:
        raise RunError(
            f"the base wrote {there.rows:,} rows that are of use, of {wanted.rows:,} ({dropped})",
            remedy="raise keep.max_new_tokens, or name a file with rows: keep.kind: rows",
        )
    for found, number in ((there.rows, wanted.rows), (there.held_out, wanted.held_out)):
        if found < number:
            warn(f"the base has no more to say: {found:,} rows instead of {number:,}")


def _turn_length(recipe: Recipe, writing: Writing) -> int:
    return writing.max_new_tokens or min(LONGEST_TURN, max(8, recipe.data.max_length // 2))


def _line(draft: Draft, fault: Fault | None) -> str:
    messages = draft.messages
    if messages[0].role == "text":
        row: dict[str, Any] = {"text": messages[0].content}
    else:
        row = {"messages": [{"role": one.role, "content": one.content} for one in messages]}
    row |= {"draft": draft.number}
    return json.dumps(row if fault is None else {"why": fault} | row, ensure_ascii=False)


def _text_of(line: str) -> str:
    """All that a row says; a person may have written it in another form."""
    row = json.loads(line)
    if "messages" in row:
        return "\n".join(message["content"] for message in row["messages"])
    return "\n".join(value for value in row.values() if isinstance(value, str))


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    # Not splitlines: JSON leaves alone what Unicode takes for the end of a line.
    return [line for line in path.read_text("utf-8").split("\n") if line.strip()]
