"""Replay rows: written by the base or read from a file, stored on disk, tokenized for a run."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from yrunner.assembly.replay_store import (
    DraftQueue,
    Pace,
    ReplayStore,
    Wanted,
    check_counts,
    is_finished,
    lines_of,
)
from yrunner.assembly.run import Run
from yrunner.assembly.trainer import has_base_beneath, untrained_model
from yrunner.console import counted, progress, say
from yrunner.data.chat.tokenize import tokens_without_end
from yrunner.data.conversation import Message, TokenizedExample
from yrunner.data.dataset.prepare import Rules, Source
from yrunner.data.dataset.row_report import num_rows
from yrunner.data.dataset.splits import stop_on
from yrunner.errors import DataError, RunError
from yrunner.evaluation.self_replay import SERIES, ReplayWriter
from yrunner.models.load import check_vocabulary, load_tokenizer
from yrunner.recipe.schema.keep import Ewc, HeldToRows, KeepRows, ReplayWriting, SelfReplay
from yrunner.recipe.schema.recipe import Recipe
from yrunner.recipe.schema.section import Section
from yrunner.scoring.base_predictions import CachedPredictions, cache_predictions
from yrunner.scoring.score_file import row_hashes
from yrunner.storage.run_dir import ReplayDir
from yrunner.tokens import IGNORE_INDEX

LONGEST_TURN = 64
"""Default for the tokens of a question or an answer: many short rows say more than few long."""
LONGEST_FINISHED_TURN = 256
"""The same where rows must have an end."""
BATCH_SIZE = 32
"""Rows written side by side on a CPU, where each step reads all weights once for all of them."""


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
class Written:
    """The rows of a base on disk."""

    folder: ReplayDir
    drift_folder: ReplayDir
    """The same unless the recipe changes how the base writes."""
    wanted: Wanted

    @property
    def rows(self) -> list[str]:
        """The replay rows, as many as wanted or available."""
        lines = lines_of(self.folder.rows)
        if self.wanted.finished:
            lines = [line for line in lines if is_finished(line)]
        return lines[: self.wanted.rows]

    @property
    def drift_rows(self) -> list[str]:
        """The rows that drift is measured on."""
        return lines_of(self.drift_folder.held_out)[: self.wanted.drift_rows]


def replay_folder(run: Run, writing: ReplayWriting) -> ReplayDir:
    """The folder of the base's rows; the base must exist."""
    recipe, base = run.recipe, run.recipe.model.base
    how: list[Any] = [run.base_key, recipe.data.system]
    how += [_turn_length(recipe, writing), writing.temperature]
    if recipe.model.template_args:
        how.append(recipe.model.template_args)
    text = json.dumps([*how, writing.openings, *SERIES], ensure_ascii=False)
    name = Path(run.base_source).name if run.base is None else Path(str(base)).stem
    digest = sha256(text.encode()).hexdigest()[:8]
    return ReplayDir(run.folder.replay / f"{name}-{digest}")


def written_rows(run: Run, writing: ReplayWriting, wanted: Wanted) -> Written:
    """The rows of the recipe's base; missing ones are written now.

    Drift is measured on rows that the base writes by default, so that all recipes with this base
    share them. Other processes that need the rows wait and then find them. Raises `RunError` if the
    base writes too few valid rows, or too slowly.
    """
    by_default = ReplayWriting(write_minutes=writing.write_minutes)
    folder, drift_folder = replay_folder(run, writing), replay_folder(run, by_default)
    if folder.folder == drift_folder.folder:
        _write_missing(run, writing, wanted, folder)
    else:
        _write_missing(run, by_default, replace(wanted, rows=0), drift_folder)
        only_rows = replace(wanted, drift_rows=0)
        _write_missing(run, writing, only_rows, folder, apart_from=lines_of(drift_folder.held_out))
    return Written(folder, drift_folder, wanted)


def _write_missing(
    run: Run,
    writing: ReplayWriting,
    wanted: Wanted,
    folder: ReplayDir,
    apart_from: Sequence[str] = (),
) -> None:
    """Let the base write the rows that a folder lacks, none of them like those of `apart_from`."""
    if not (wanted.rows or wanted.drift_rows):
        return
    with _locked(folder):
        store = ReplayStore.open(folder, apart_from)
        if store.lacks(wanted, writing.write_minutes):
            _write(run, writing, wanted, store)
        elif wanted.rows and not store.count("rows", wanted):
            raise RunError(
                f"the base wrote no usable rows ({folder.folder})",
                remedy="raise keep.max_new_tokens, or use rows of a file with keep.kind: rows",
            )


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


def _write(run: Run, writing: ReplayWriting, wanted: Wanted, store: ReplayStore) -> None:
    """Let the base write until there are enough rows, until it repeats itself, or out of time."""
    recipe, source = run.recipe, run.base_source
    store.origin = {"base": source, "key": run.base_key, "writing": writing.model_dump()}
    store.save()
    model = run.load_base()
    tokenizer = load_tokenizer(
        source,
        template_args=recipe.model.template_args,
        strict=False,  # the base writes in its own template
        trust_remote_code=recipe.model.trust_remote_code,
    )
    check_vocabulary(model, tokenizer)
    writer = ReplayWriter(
        model,
        tokenizer,
        system=recipe.data.system,
        temperature=writing.temperature,
        openings=writing.openings,
        max_new_tokens=_turn_length(recipe, writing),
        batch_size=recipe.eval.batch_size if torch.cuda.is_available() else BATCH_SIZE,
    )
    queue = DraftQueue(store, wanted)
    pace = Pace(queue, writing.write_minutes)
    description = f"{store.name} writes replay rows"
    with progress(description, queue.missing, detail=pace.describe) as advance:
        for row in writer.write(pace.next_draft, advance=pace.count, is_over=pace.is_over):
            before = queue.missing
            queue.take(row)
            advance(before - queue.missing)
            if queue.all_over:
                break
    check_counts(queue, writing.write_minutes)
    queue.close(writing.write_minutes)


def _turn_length(recipe: Recipe, writing: ReplayWriting) -> int:
    longest = LONGEST_FINISHED_TURN if _needs_finished(writing) else LONGEST_TURN
    return writing.max_new_tokens or min(longest, max(8, recipe.data.max_length // 2))


def _needs_finished(keep: Section) -> bool:
    return isinstance(keep, SelfReplay) and keep.by == "text"


def writing_of(recipe: Recipe) -> ReplayWriting:
    """How the recipe's base writes its rows."""
    return recipe.keep if isinstance(recipe.keep, ReplayWriting) else ReplayWriting()


def wanted_rows(recipe: Recipe) -> Wanted:
    """How many rows the recipe needs from its base."""
    if recipe.model.scratch is not None or recipe.train.stage == "reward":
        return Wanted()
    keep = recipe.keep
    rows = 0
    if isinstance(keep, SelfReplay) or (isinstance(keep, Ewc) and keep.file is None):
        rows = keep.rows
    drift_rows = recipe.drift.rows if recipe.data.validates else 0
    return Wanted(rows, drift_rows, finished=_needs_finished(keep))


def writing_note(recipe: Recipe) -> str | None:
    """What the base writes before training, for how long, and what to use instead."""
    wanted, minutes = wanted_rows(recipe), writing_of(recipe).write_minutes
    parts = [
        f"{num_rows(number)} for {purpose}"
        for number, purpose in ((wanted.rows, "keep"), (wanted.drift_rows, "drift"))
        if number
    ]
    if not parts:
        return None
    note = f"before training the base writes {' and '.join(parts)}, unless they are there"
    if wanted.rows:
        note += (
            f"; in at most {minutes:g} {'minute' if minutes == 1 else 'minutes'} "
            "(keep.write_minutes). A few dozen general instructions of your own are better and "
            "need no writing: keep={kind: rows, file: FILE}"
        )
    return note


def check_keep_file(run: Run) -> None:
    """Raise `YRunnerError` for a faulty file in `keep`, before anything is loaded."""
    for source in run.keep_sources:
        _examples(run, source, run.keep_rules)


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
            rows = _tokenized(run, folder.rows, finished=wanted.finished)[: wanted.rows]
        if written.drift_rows:
            drift_rows = _tokenized(run, written.drift_folder.held_out)[: wanted.drift_rows]
    for source in run.keep_sources:
        rows = _examples(run, source, run.keep_rules)
    if isinstance(recipe.keep, HeldToRows):
        say(f"replaying {num_rows(len(rows))}, {recipe.keep.share:.0%} of each update")
    return _with_tops(run, RegulariserData(folder, rows, drift_rows))


def rows_key(run: Run, rows: Iterable[TokenizedExample], *what: Any) -> str:
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


def _tokenized(run: Run, file: Path, *, finished: bool = False) -> list[TokenizedExample]:
    """Rows that the base wrote; targets are what it wrote, not the opening that it was given.

    Unfinished rows have no end mark, or are left out where all must be `finished`.
    """
    rules = Rules(
        max_length=run.recipe.data.max_length,
        # As text, a row without its end would teach to stop anywhere.
        too_long="drop" if finished else "cut",
        invalid="drop",
        altered="allow",
        system=run.recipe.data.system,
        targets="all",
    )
    # As the reader of JSON lines counts them.
    lines = dict(enumerate(file.read_text("utf-8").split("\n"), start=1))
    unfinished = {row for row, line in lines.items() if line.strip() and not is_finished(line)}
    examples = []
    for example in _examples(run, Source((file,)), rules):
        if example.origin.row not in unfinished:
            examples.append(example)
        elif not finished:
            examples.append(_without_end(run, example, json.loads(lines[example.origin.row])))
    return without_opening(examples)


def _without_end(run: Run, example: TokenizedExample, row: dict[str, Any]) -> TokenizedExample:
    """The example up to where the base was cut off; a row in another form stays as it is."""
    if "messages" in row:
        messages = [Message(one["role"], one["content"]) for one in row["messages"]]
        ids = tokens_without_end(messages, run.tokenizer, run.recipe.data.system)
    else:
        end = run.tokenizer.eos_token_id
        ids = example.input_ids[: -1 if example.input_ids[-1] == end else None]
    ids = ids[: run.recipe.data.max_length]
    return TokenizedExample(ids, [IGNORE_INDEX, *ids[1:]], example.origin)


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
