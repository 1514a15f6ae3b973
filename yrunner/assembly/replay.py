"""What a recipe holds a model to: the rows that its base wrote or that a file brings, tokenized.

The rows that a base wrote: found on disk, or written now where they are too few.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from yrunner.assembly.run import Run
from yrunner.assembly.trainer import has_base_beneath, untrained_model
from yrunner.console import progress, say, warn
from yrunner.data.conversation import TokenizedExample
from yrunner.data.dataset.prepare import Rules, Source
from yrunner.data.dataset.row_report import num_rows
from yrunner.errors import DataError, RunError
from yrunner.evaluation.self_replay import (
    FAULTS,
    ReplayFault,
    ReplayRow,
    ReplayWriter,
    SeenTexts,
    find_fault,
)
from yrunner.models.load import check_vocabulary, load_tokenizer
from yrunner.recipe.schema.keep import Ewc, HeldToRows, KeepRows, ReplayWriting, SelfReplay
from yrunner.recipe.schema.recipe import Recipe
from yrunner.scoring.base_predictions import CachedPredictions, cache_predictions
from yrunner.scoring.score_file import row_hashes
from yrunner.storage.run_dir import ReplayDir, read_json, write_json, write_text
from yrunner.tokens import IGNORE_INDEX

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


def replay_folder(run: Run, writing: ReplayWriting) -> ReplayDir:
    """Where the rows of the recipe's base are; the base has to exist by now."""
    recipe, base = run.recipe, run.recipe.model.base
    how = [run.base_key, recipe.data.system, _turn_length(recipe, writing), writing.temperature]
    text = json.dumps([*how, writing.openings], ensure_ascii=False)
    name = Path(run.base_source).name if run.base is None else Path(str(base)).stem
    digest = sha256(text.encode()).hexdigest()[:8]
    return ReplayDir(run.folder.replay / f"{name}-{digest}")


def written_rows(run: Run, writing: ReplayWriting, wanted: Wanted) -> Written:
    """The rows that the recipe's base wrote; those that are missing are written now.

    Another process that wants them, too, waits and finds them. Raises `RunError` where the base
    does not write enough that is of use.
    """
    folder = replay_folder(run, writing)
    folder.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.lock):
        desk = _ReplayStore.open(folder)
        if desk.lacks(wanted):
            _write(run, writing, wanted, desk)
    return Written(folder, wanted)


@dataclass
class _ReplayStore:
    """The files of a folder, and what is known of them."""

    folder: ReplayDir
    num_drafts: int = 0
    fates: Counter[str] = field(default_factory=Counter)
    asked: dict[str, int] = field(default_factory=dict)
    """The most rows that were ever wanted of each file: a file with fewer is all there is."""
    known: SeenTexts = field(default_factory=SeenTexts)

    @classmethod
    def open(cls, folder: ReplayDir) -> "_ReplayStore":
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

    def take(self, drafts: Sequence[ReplayRow]) -> None:
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

    def _place_of(self, fault: ReplayFault | None) -> Path:
        if fault is not None:
            return self.folder.dropped
        is_held_out = self.fates["kept"] % HELD_OUT_EVERY == 0
        return self.folder.held_out if is_held_out else self.folder.rows


def _write(run: Run, writing: ReplayWriting, wanted: Wanted, desk: _ReplayStore) -> None:
    """Let the base write until there is enough, or until it says nothing new."""
    recipe, source = run.recipe, run.base_source
    record = {"base": source, "key": run.base_key, "writing": writing.model_dump()}
    write_json(desk.folder.record, record)
    desk.save()
    model = run.load_base()
    tokenizer = load_tokenizer(source, trust_remote_code=recipe.model.trust_remote_code)
    check_vocabulary(model, tokenizer)
    author = ReplayWriter(
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


def _batches(desk: _ReplayStore, wanted: Wanted, last: int, size: int) -> Iterator[list[int]]:
    """Numbers of the next drafts, until there is enough or there were too many."""
    while desk.num_drafts < last:
        there = desk.counts()
        if there.rows >= wanted.rows and there.held_out >= wanted.held_out:
            return
        if desk.num_drafts >= FIRST_LOOK and desk.fates["kept"] < FEWEST * desk.num_drafts:
            return
        yield list(range(desk.num_drafts, desk.num_drafts + size))


def _say_what_was_written(desk: _ReplayStore, wanted: Wanted) -> None:
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


def _turn_length(recipe: Recipe, writing: ReplayWriting) -> int:
    return writing.max_new_tokens or min(LONGEST_TURN, max(8, recipe.data.max_length // 2))


def _line(draft: ReplayRow, fault: ReplayFault | None) -> str:
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


@dataclass(frozen=True)
class KeptData:
    """What a run is held to and measured on; nothing where the recipe keeps nothing."""

    folder: ReplayDir | None = None
    rows: list[TokenizedExample] = field(default_factory=list)
    """To be held to."""
    held_out: list[TokenizedExample] = field(default_factory=list)
    """For the gauge."""
    row_tops: CachedPredictions | None = None
    """What the base predicts for the rows, where it is not beneath an adapter."""
    held_out_tops: CachedPredictions | None = None


def writing_of(recipe: Recipe) -> ReplayWriting:
    """How the recipe's base writes its rows."""
    return recipe.keep if isinstance(recipe.keep, ReplayWriting) else ReplayWriting()


def wanted_rows(recipe: Recipe) -> Wanted:
    """What the recipe asks its base to write."""
    if recipe.model.scratch is not None:
        return Wanted()
    keep, data = recipe.keep, recipe.data
    rows = 0
    if isinstance(keep, SelfReplay) or (isinstance(keep, Ewc) and keep.file is None):
        rows = keep.rows
    validates = bool(data.validation) or data.validation_share is not None
    return Wanted(rows, recipe.drift.rows if validates else 0)


def check_keep_file(run: Run) -> None:
    """Raise what is wrong with the recipe's file of kept rows, before anything is loaded."""
    for source in run.keep_sources:
        _examples(run, source, run.rules)


def prepare_keep(run: Run) -> KeptData:
    """The rows that a run is held to, written now where they are missing.

    Comes before TrainingArguments: under DeepSpeed ZeRO-3 those decide how weights load, and here
    the base is needed whole. Raises `YRunnerError` for rows that are of no use.
    """
    recipe = run.recipe
    wanted, writing = wanted_rows(recipe), writing_of(recipe)
    if not (wanted.rows or wanted.held_out or run.keep_sources):
        return KeptData()
    folder = replay_folder(run, writing)
    rows: list[TokenizedExample] = []
    held_out: list[TokenizedExample] = []
    if wanted.rows or wanted.held_out:
        written = written_rows(run, writing, wanted)
        folder = written.folder
        if wanted.rows:
            rows = _tokenized(run, folder.rows)[: wanted.rows]
        if written.held_out:
            held_out = _tokenized(run, folder.held_out)[: wanted.held_out]
    for source in run.keep_sources:
        rows = _examples(run, source, run.rules)
    if isinstance(recipe.keep, HeldToRows):
        say(f"held to {num_rows(len(rows))}, {recipe.keep.share:.0%} of each update")
    return _with_tops(run, KeptData(folder, rows, held_out))


def rows_key(run: Run, rows: Sequence[TokenizedExample], *what: Any) -> str:
    """Changes with the rows, with the model as it is before training, and with `what`."""
    tuning = run.recipe.tuning.model_dump(mode="json")
    facts = [run.base_key, tuning.get("adapter"), row_hashes(rows), *what]
    return sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _with_tops(run: Run, kept: KeptData) -> KeptData:
    recipe = run.recipe
    if has_base_beneath(recipe) or kept.folder is None:
        return kept
    keep = recipe.keep
    by_kl = isinstance(keep, SelfReplay | KeepRows) and keep.by == "kl"
    tops = [
        _tops(run, kept.folder, rows, top) if rows and top else None
        for rows, top in (
            (kept.rows, keep.top if by_kl and isinstance(keep, SelfReplay | KeepRows) else 0),
            (kept.held_out, recipe.drift.top),
        )
    ]
    return KeptData(kept.folder, kept.rows, kept.held_out, *tops)


def _tops(
    run: Run, folder: ReplayDir, rows: Sequence[TokenizedExample], top: int
) -> CachedPredictions:
    """What the model predicts for rows before it is trained: computed once, then read from disk."""
    dtype = run.dtype
    path = folder.tops(rows_key(run, rows, top, str(dtype)))
    folder.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.lock):
        if not path.exists():
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model = untrained_model(run).to(device)
            autocast = torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32)
            with autocast, progress("what the base predicts, rows", len(rows)) as advance:
                tops = cache_predictions(
                    model,
                    rows,
                    top=top,
                    pad_token_id=run.tokenizer.pad_token_id,
                    max_tokens=run.max_tokens,
                    advance=advance,
                )
            partial = path.with_suffix(".partial")
            tops.save(partial)
            partial.rename(path)
        tops = CachedPredictions.load(path)
    say(
        f"the base's {top:,} likeliest tokens for {num_rows(len(rows))}; all others together have "
        f"{tops.mean_rest:.2%} of its probability"
    )
    return tops


def _tokenized(run: Run, file: Path) -> list[TokenizedExample]:
    """Rows that the base wrote; learned is what it wrote, not the opening that it was given."""
    rules = Rules(
        max_length=run.recipe.data.max_length,
        too_long="drop",
        invalid="drop",
        system=run.recipe.data.system,
        targets="all",
    )
    return without_opening(_examples(run, Source((file,)), rules))


def _examples(run: Run, source: Source, rules: Rules) -> list[TokenizedExample]:
    prepared = run.prepare([source], rules)
    left_out = sum(len(report.refusals) for report in prepared.reports)
    if left_out and rules.too_long == "drop":
        say(f"{source.files[0].name}: {num_rows(left_out)} left out, longer than data.max_length")
    else:
        prepared.check(too_long=rules.too_long, invalid=rules.invalid)
    examples = list(prepared.train)
    if not examples:
        raise DataError(source.files[0], "no row is left to hold", remedy="raise data.max_length")
    return examples


def without_opening(examples: Sequence[TokenizedExample]) -> list[TokenizedExample]:
    """The examples without what all of them begin with, which was given, as a target."""
    if len(examples) < 2:
        return list(examples)
    # What the first and the last in order have in common, all have.
    first, last = (pick(example.input_ids for example in examples) for pick in (min, max))
    same = (left == right for left, right in zip(first, last, strict=False))
    given = sum(takewhile(bool, same))
    return [
        TokenizedExample(
            example.input_ids,
            [IGNORE_INDEX] * given + example.labels[given:],
            example.origin,
        )
        for example in examples
    ]
