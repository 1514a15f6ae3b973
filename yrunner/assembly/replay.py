"""Replay rows: written by the base or read from a file, stored on disk, tokenized for a run."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from yrunner.assembly.run import Run
from yrunner.assembly.trainer import has_base_beneath, untrained_model
from yrunner.console import counted, progress, say, warn
from yrunner.data.conversation import TokenizedExample
from yrunner.data.dataset.prepare import Rules, Source
from yrunner.data.dataset.row_report import num_rows
from yrunner.data.dataset.splits import stop_on
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
"""Default for the tokens of a question or an answer."""
DRIFT_ROW_EVERY = 4
"""One valid draft in this many measures drift, whatever the recipe requests, so that all recipes
with this base share the same rows."""
MOST_TRIES = 12
"""Drafts per requested row, at most: some bases write few different rows."""
LEAST_VALID = 0.1
"""Share of drafts that must be valid: a base below it has never learned to write."""
FIRST_CHECK = 128
"""Drafts before that share is checked."""


@dataclass(frozen=True)
class RegulariserData:
    """The rows of a regulariser and of the drift measure; empty if the recipe has neither."""

    folder: ReplayDir | None = None
    rows: list[TokenizedExample] = field(default_factory=list)
    """Of the regulariser."""
    drift_rows: list[TokenizedExample] = field(default_factory=list)
    row_tops: CachedPredictions | None = None
    """The base's predictions for the rows; None if they come from the model without its adapter."""
    drift_tops: CachedPredictions | None = None


@dataclass(frozen=True)
class Wanted:
    """How many rows a run needs from its base."""

    rows: int = 0
    drift_rows: int = 0

    def by_file(self) -> dict[str, int]:
        """Under the names of the files and of the keys in replay.json."""
        return {"rows": self.rows, "held_out": self.drift_rows}


@dataclass(frozen=True)
class Written:
    """The rows of a base on disk."""

    folder: ReplayDir
    wanted: Wanted

    @property
    def rows(self) -> list[str]:
        """The replay rows, as many as wanted or available."""
        return _lines(self.folder.rows)[: self.wanted.rows]

    @property
    def drift_rows(self) -> list[str]:
        """The rows that drift is measured on."""
        return _lines(self.folder.held_out)[: self.wanted.drift_rows]


def replay_folder(run: Run, writing: ReplayWriting) -> ReplayDir:
    """The folder of the base's rows; the base must exist."""
    recipe, base = run.recipe, run.recipe.model.base
    how = [run.base_key, recipe.data.system, _turn_length(recipe, writing), writing.temperature]
    text = json.dumps([*how, writing.openings], ensure_ascii=False)
    name = Path(run.base_source).name if run.base is None else Path(str(base)).stem
    digest = sha256(text.encode()).hexdigest()[:8]
    return ReplayDir(run.folder.replay / f"{name}-{digest}")


def written_rows(run: Run, writing: ReplayWriting, wanted: Wanted) -> Written:
    """The rows of the recipe's base; missing ones are written now.

    Other processes that need them wait and then find them. Raises `RunError` if the base writes too
    few valid rows.
    """
    folder = replay_folder(run, writing)
    with _locked(folder):
        store = _ReplayStore.open(folder)
        if store.lacks(wanted):
            _write(run, writing, wanted, store)
        elif wanted.rows and not store.counts().rows:
            _say_counts(store, wanted)  # raises, as when the base wrote them
    return Written(folder, wanted)


@contextmanager
def _locked(folder: ReplayDir) -> Iterator[None]:
    """Hold the lock of a replay folder; wait for another run that writes there, and say so."""
    folder.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.lock)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        say(f"waiting for another run that writes in {folder.folder}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@dataclass
class _ReplayStore:
    """The files of a replay folder and their record."""

    folder: ReplayDir
    num_drafts: int = 0
    fates: Counter[str] = field(default_factory=Counter)
    requested: dict[str, int] = field(default_factory=dict)
    """The most rows ever requested per file: a file with fewer has all that the base can write."""
    seen: SeenTexts = field(default_factory=SeenTexts)

    @classmethod
    def open(cls, folder: ReplayDir) -> "_ReplayStore":
        """Read what is on disk."""
        if not folder.record.exists():
            for path in (folder.rows, folder.held_out, folder.dropped):
                path.unlink(missing_ok=True)
            return cls(folder)
        record = read_json(folder.record)
        store = cls(folder, record["drafts"], Counter(record["fates"]), record["asked"])
        for path in (folder.rows, folder.held_out, folder.dropped):
            store._remove_unrecorded(path)
        for path in (folder.rows, folder.held_out):
            for line in _lines(path):
                store.seen.add(_text_of(line))
        return store

    def _remove_unrecorded(self, path: Path) -> None:
        """Remove lines that the record does not count yet: their drafts are written again."""
        lines = _lines(path)
        whole = [line for line in lines if json.loads(line).get("draft", -1) < self.num_drafts]
        if len(whole) < len(lines):
            write_text(path, "".join(f"{line}\n" for line in whole))

    @property
    def name(self) -> str:
        """The name of the base."""
        return self.folder.folder.name.rpartition("-")[0]

    def counts(self) -> Wanted:
        """How many rows the files have."""
        return Wanted(len(_lines(self.folder.rows)), len(_lines(self.folder.held_out)))

    def lacks(self, wanted: Wanted) -> bool:
        """Whether more rows are wanted than ever before: deleted rows stay deleted."""
        return any(
            number > self.requested.get(name, 0)
            for name, number in wanted.by_file().items()
            if number
        )

    def take(self, drafts: Sequence[ReplayRow]) -> None:
        """Check drafts, append each to its file, and update the record."""
        lines: dict[Path, list[str]] = {}
        for draft in drafts:
            fault = find_fault(draft, self.seen)
            if fault is None:
                self.seen.add(draft.text)
            path = self._file_for(fault)
            self.fates[fault or "kept"] += 1
            lines.setdefault(path, []).append(_line(draft, fault))
        self.num_drafts += len(drafts)
        for path, added in lines.items():
            write_text(path, "".join(f"{line}\n" for line in [*_lines(path), *added]))
        self.save()

    def save(self) -> None:
        """Write the record, which says which lines are complete."""
        record = read_json(self.folder.record) if self.folder.record.exists() else {}
        content = {"drafts": self.num_drafts, "fates": dict(self.fates)}
        write_json(self.folder.record, record | content | {"asked": self.requested})

    def _file_for(self, fault: ReplayFault | None) -> Path:
        if fault is not None:
            return self.folder.dropped
        is_drift_row = self.fates["kept"] % DRIFT_ROW_EVERY == 0
        return self.folder.held_out if is_drift_row else self.folder.rows


def _write(run: Run, writing: ReplayWriting, wanted: Wanted, store: _ReplayStore) -> None:
    """Let the base write until there are enough rows, or until it repeats itself."""
    recipe, source = run.recipe, run.base_source
    record = {"base": source, "key": run.base_key, "writing": writing.model_dump()}
    write_json(store.folder.record, record)
    store.save()
    model = run.load_base()
    tokenizer = load_tokenizer(source, trust_remote_code=recipe.model.trust_remote_code)
    check_vocabulary(model, tokenizer)
    writer = ReplayWriter(
        model,
        tokenizer,
        system=recipe.data.system,
        temperature=writing.temperature,
        openings=writing.openings,
        max_new_tokens=_turn_length(recipe, writing),
        batch_size=recipe.eval.batch_size,
    )
    there = store.counts()
    goal = max(
        wanted.rows * DRIFT_ROW_EVERY // (DRIFT_ROW_EVERY - 1), wanted.drift_rows * DRIFT_ROW_EVERY
    )
    last = store.num_drafts + MOST_TRIES * goal
    with progress(f"{store.name} writes replay rows", goal) as advance:
        advance(min(goal, there.rows + there.drift_rows))
        for numbers in _batches(store, wanted, last, writer.batch_size):
            before = store.fates["kept"]
            store.take(writer.write(numbers))
            advance(store.fates["kept"] - before)
    for name, number in wanted.by_file().items():
        store.requested[name] = max(number, store.requested.get(name, 0))
    store.save()
    _say_counts(store, wanted)


def _batches(store: _ReplayStore, wanted: Wanted, last: int, size: int) -> Iterator[list[int]]:
    """Numbers of the next drafts, until there are enough rows or too many drafts."""
    while store.num_drafts < last:
        there = store.counts()
        if there.rows >= wanted.rows and there.drift_rows >= wanted.drift_rows:
            return
        if store.num_drafts >= FIRST_CHECK and store.fates["kept"] < LEAST_VALID * store.num_drafts:
            return
        yield list(range(store.num_drafts, store.num_drafts + size))


def _say_counts(store: _ReplayStore, wanted: Wanted) -> None:
    dropped = ", ".join(f"{store.fates[fault]:,} {fault}" for fault in FAULTS if store.fates[fault])
    say(
        f"{counted(store.num_drafts, 'draft')}: {store.fates['kept']:,} kept"
        + (f"; dropped: {dropped}" if dropped else "")
        + f"; in {store.folder.folder}"
    )
    there = store.counts()
    if there.rows < LEAST_VALID * wanted.rows:
        raise RunError(
            f"the base wrote {counted(there.rows, 'valid row')} instead of "
            f"{wanted.rows:,} ({dropped})",
            remedy="raise keep.max_new_tokens, or use rows of a file with keep.kind: rows",
        )
    for found, number in ((there.rows, wanted.rows), (there.drift_rows, wanted.drift_rows)):
        if found < number:
            warn(f"the base repeats itself: {num_rows(found)} instead of {number:,}")


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
    """The text of a row; a user may have edited it into another form."""
    row = json.loads(line)
    if "messages" in row:
        return "\n".join(message["content"] for message in row["messages"])
    return "\n".join(value for value in row.values() if isinstance(value, str))


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    # Not splitlines: JSON strings may contain line ends of Unicode.
    return [line for line in path.read_text("utf-8").split("\n") if line.strip()]


def writing_of(recipe: Recipe) -> ReplayWriting:
    """How the recipe's base writes its rows."""
    return recipe.keep if isinstance(recipe.keep, ReplayWriting) else ReplayWriting()


def wanted_rows(recipe: Recipe) -> Wanted:
    """How many rows the recipe needs from its base."""
    if recipe.model.scratch is not None:
        return Wanted()
    keep = recipe.keep
    rows = 0
    if isinstance(keep, SelfReplay) or (isinstance(keep, Ewc) and keep.file is None):
        rows = keep.rows
    return Wanted(rows, recipe.drift.rows if recipe.data.validates else 0)


def check_keep_file(run: Run) -> None:
    """Raise `YRunnerError` for a faulty file in `keep`, before anything is loaded."""
    for source in run.keep_sources:
        _examples(run, source, run.rules)


def prepare_keep(run: Run) -> RegulariserData:
    """The rows of a run's regulariser and drift measure; missing ones are written now.

    Call it before TrainingArguments are made: under DeepSpeed ZeRO-3 those decide how weights load,
    and this needs the whole base. Raises `YRunnerError` for faulty rows.
    """
    recipe = run.recipe
    wanted, writing = wanted_rows(recipe), writing_of(recipe)
    if not (wanted.rows or wanted.drift_rows or run.keep_sources):
        return RegulariserData()
    folder = replay_folder(run, writing)
    rows: list[TokenizedExample] = []
    drift_rows: list[TokenizedExample] = []
    if wanted.rows or wanted.drift_rows:
        written = written_rows(run, writing, wanted)
        folder = written.folder
        if wanted.rows:
            rows = _tokenized(run, folder.rows)[: wanted.rows]
        if written.drift_rows:
            drift_rows = _tokenized(run, folder.held_out)[: wanted.drift_rows]
    for source in run.keep_sources:
        rows = _examples(run, source, run.rules)
    if isinstance(recipe.keep, HeldToRows):
        say(f"replaying {num_rows(len(rows))}, {recipe.keep.share:.0%} of each update")
    return _with_tops(run, RegulariserData(folder, rows, drift_rows))


def rows_key(run: Run, rows: Sequence[TokenizedExample], *what: Any) -> str:
    """A hash of the rows, of the untrained model, and of `what`."""
    tuning = run.recipe.tuning.model_dump(mode="json")
    facts = [run.base_key, tuning.get("adapter"), row_hashes(rows), *what]
    return sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _with_tops(run: Run, data: RegulariserData) -> RegulariserData:
    recipe = run.recipe
    if has_base_beneath(recipe) or data.folder is None:
        return data
    keep = recipe.keep
    by_kl = isinstance(keep, SelfReplay | KeepRows) and keep.by == "kl"
    tops = [
        _tops(run, data.folder, rows, top) if rows and top else None
        for rows, top in (
            (data.rows, keep.top if by_kl and isinstance(keep, SelfReplay | KeepRows) else 0),
            (data.drift_rows, recipe.drift.top),
        )
    ]
    return RegulariserData(data.folder, data.rows, data.drift_rows, *tops)


def _tops(
    run: Run, folder: ReplayDir, rows: Sequence[TokenizedExample], top: int
) -> CachedPredictions:
    """The untrained model's predictions for rows, computed once, then read from disk."""
    dtype = run.dtype
    path = folder.tops(rows_key(run, rows, top, str(dtype)))
    with _locked(folder):
        if not path.exists():
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model = untrained_model(run).to(device)
            autocast = torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32)
            with autocast, progress("predictions of the base, rows", len(rows)) as advance:
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
        f"stored the base's {counted(top, 'most likely token')} for {num_rows(len(rows))}; "
        f"all others together have {tops.mean_rest:.2%} of its probability"
    )
    return tops


def _tokenized(run: Run, file: Path) -> list[TokenizedExample]:
    """Rows that the base wrote; targets are what it wrote, not the opening that it was given."""
    rules = Rules(
        max_length=run.recipe.data.max_length,
        too_long="drop",
        invalid="drop",
        altered="allow",
        system=run.recipe.data.system,
        targets="all",
    )
    return without_opening(_examples(run, Source((file,)), rules))


def _examples(run: Run, source: Source, rules: Rules) -> list[TokenizedExample]:
    prepared = run.prepare([source], rules)
    left_out = [row for report in prepared.reports for row in report.refusals]
    stop_on(left_out, too_long=rules.too_long, invalid=rules.invalid, altered=rules.altered)
    too_long = sum(row.kind == "too_long" for row in left_out)
    if too_long:
        say(f"{source.files[0].name}: {num_rows(too_long)} left out, longer than data.max_length")
    if len(left_out) > too_long:
        say(f"{source.files[0].name}: {num_rows(len(left_out) - too_long)} left out, not usable")
    examples = list(prepared.train)
    if not examples:
        raise DataError(source.files[0], "no row is left for keep", remedy="raise data.max_length")
    return examples


def without_opening(examples: Sequence[TokenizedExample]) -> list[TokenizedExample]:
    """The examples without their common beginning, which the base was given, as a target."""
    if len(examples) < 2:
        return list(examples)
    # What the first and the last in sorted order have in common, all have.
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
