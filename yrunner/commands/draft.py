"""`yrun init --base ... --data ...`: write a small recipe for this model and these rows."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from yrunner.assembly.dataset import conversations_of
from yrunner.assembly.run import Run
from yrunner.console import say
from yrunner.data.chat.reply_text import answer_behind_thinking
from yrunner.data.dataset.row_report import num_rows
from yrunner.data.readers.files import split_of
from yrunner.errors import DataError, RecipeError, YRunnerError
from yrunner.models.templates.choose import MARKS, arguments_read_by, set_known_template
from yrunner.storage.run_dir import write_text

STAGES = ("sft", "preference", "cpt")
"""What rows may teach, in the order in which it is tried."""
LOOKED_AT = 500
"""Rows that are searched for thinking."""
LENGTHS = (256, 512, 1024, 2048, 4096)
TOKENS_AT_ONCE = 8192
"""Of a micro-batch; a GPU of 24 GB holds them with LoRA on a model of a few billion weights."""
FEWEST_ROWS_TO_SORT = 100
"""Of fewer rows the worst are easily read by a person."""
UPDATES_OF_AN_EPOCH = 50
FEWEST_ROWS_AT_ONCE = 4
UPDATES = 100
"""Of a whole training of few rows; fewer teach little."""
MOST_EPOCHS = 10
FEW_REPLAY_ROWS = 16
"""As many as measure forgetting: on a CPU the base writes both in one batch."""
OUTPUTS = Path("outputs")
"""Where the runs of a recipe without `output` go, and a GGUF base is unpacked for all of them."""
GLOB = set("*?[")
THINKING_ARGUMENTS = ("enable_thinking", "thinking")
"""Arguments by which templates switch thinking (Qwen3, DeepSeek V3.1)."""


@dataclass(frozen=True)
class DraftFacts:
    """What was measured of the rows and the base."""

    stage: str
    format: str
    rows: int
    refused: int
    lengths: Any
    """Tokens of each example, shape [E]."""
    thinks: bool
    """Whether a reply has thinking."""
    switch: str | None
    """The template's argument that switches thinking, if it has one."""
    template: str | None
    """A known template for a base that has none."""
    positions: int
    validates: bool
    """Whether the folder has a validation split."""
    on_gpu: bool

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return int(self.lengths.max())

    @property
    def max_length(self) -> int:
        """The shortest usual length that holds all, or almost all, examples and the model takes."""
        wanted = self.longest if self.longest <= LENGTHS[-1] else np.percentile(self.lengths, 99)
        fitting = (length for length in LENGTHS if length >= min(wanted, LENGTHS[-1]))
        return min(next(fitting), self.positions)

    @property
    def num_too_long(self) -> int:
        """Examples above `max_length`."""
        return int((self.lengths > self.max_length).sum())

    @property
    def packs(self) -> bool:
        """Whether most rows would be mostly padding."""
        return self.stage != "preference" and 4 * float(np.median(self.lengths)) < self.max_length

    @property
    def batch_size(self) -> int:
        """Rows at once: what memory allows, but few of few rows."""
        per_row = 2 if self.stage == "preference" else 1
        few = max(FEWEST_ROWS_AT_ONCE, self._units // UPDATES_OF_AN_EPOCH)
        return max(1, min(16, few, TOKENS_AT_ONCE // (self.max_length * per_row)))

    @property
    def accumulation(self) -> int:
        """Micro-batches of an update: up to 32 rows, but some 50 updates of an epoch."""
        wanted = min(32, max(self.batch_size, self._units // UPDATES_OF_AN_EPOCH))
        return max(1, wanted // self.batch_size)

    @property
    def epochs(self) -> int:
        """More for fewer rows, up to some 100 updates; of texts and pairs one."""
        if self.stage != "sft":
            return 1
        updates = max(1, self._units // (self.batch_size * self.accumulation))
        return min(MOST_EPOCHS, max(3, -(-UPDATES // updates)))

    @property
    def writes_few(self) -> bool:
        """Whether writing the default number of replay rows would take longer than the training."""
        return not self.on_gpu and self.rows < FEWEST_ROWS_TO_SORT

    @property
    def _units(self) -> int:
        """Rows, or packed rows, of an epoch."""
        if not self.packs:
            return len(self.lengths)
        return max(1, int(self.lengths.sum()) // self.max_length)

    @property
    def sorts(self) -> bool:
        """Whether there are enough single answers or texts to sort."""
        return self.stage != "preference" and self.rows >= FEWEST_ROWS_TO_SORT


def draft(base: str, data: str, path: Path) -> None:
    """Write a recipe to `path`, and one that sorts its rows beside it, and say what was found.

    Raises `YRunnerError` for a file that exists, a base or rows that cannot be used.
    """
    sorting = path.with_name(f"{path.stem}-sort{path.suffix}")
    for file in (path, sorting):
        if file.exists():
            raise YRunnerError(
                f"{file} already exists",
                remedy=f"name another: yrun init {path.stem}-2.yaml --base ... --data ...",
            )
    if not os.path.exists(data) and not GLOB & set(data):
        raise YRunnerError(f"--data: there is no file {data}", remedy="check the path")
    found = measure(base, data)
    place = path.absolute().parent
    place.mkdir(parents=True, exist_ok=True)
    if found.sorts:
        write_text(sorting, _sort_text(found, base, data, sorting))
    write_text(path, recipe_text(found, base, data, path, sorting.name))
    lengths = found.lengths
    say(f"{num_rows(found.rows)} of the format {found.format}, for train.stage: {found.stage}")
    say(
        f"{int(lengths.min()):,} to {found.longest:,} tokens, half of them up to "
        f"{int(np.median(lengths)):,}"
    )
    if found.refused:
        say(f"{num_rows(found.refused)} cannot be used: yrun check {path} says why")
    say(f"recipe: {path}" + (f", with {sorting}" if found.sorts else ""))
    say(f"next: yrun check {path}")


def measure(base: str, data: str) -> DraftFacts:
    """Read rows and base as a recipe would. Raises `YRunnerError` if they cannot be used."""
    faults: list[YRunnerError] = []
    best: DraftFacts | None = None
    for stage in STAGES:
        try:
            with _draft_folder(base) as folder:
                found = _measure(base, data, stage, folder)
        except DataError as error:
            faults.append(error)
            continue
        if found is not None and (best is None or found.rows > best.rows):
            best = found
        if best is not None and not best.refused:
            break
    if best is None:
        raise faults[0] if faults else DataError(Path(data), "has no usable row", remedy="fix it")
    return best


@contextmanager
def _draft_folder(base: str) -> Iterator[Path]:
    """The folder of the draft's run, which is gone afterwards.

    Of a GGUF file beside the runs to come: what is unpacked there is not unpacked again.
    """
    if not base.lower().endswith(".gguf"):
        with TemporaryDirectory(prefix="yrun-init-") as folder:
            yield Path(folder) / "draft"
        return
    OUTPUTS.mkdir(exist_ok=True)
    try:
        with TemporaryDirectory(prefix=".yrun-init-", dir=OUTPUTS) as folder:
            yield OUTPUTS.absolute() / Path(folder).name
    finally:
        with suppress(OSError):
            OUTPUTS.rmdir()  # if nothing is in it


def _measure(base: str, data: str, stage: str, folder: Path) -> DraftFacts | None:
    """What a recipe of this stage makes of the rows; None if no row is left."""
    run, template = _run(base, data, stage, folder), None
    tokenizer = run.tokenizer
    if not tokenizer.chat_template and stage != "cpt":
        template = _fitting_template(tokenizer)
        set_known_template(tokenizer, template)
    prepared = run.dataset
    reports = [report for report in prepared.reports if report.purpose == "train"]
    if not len(prepared.train):
        return None
    source = str(tokenizer.chat_template or "")
    reads = arguments_read_by(source, tokenizer) if source else set()
    talks = islice(conversations_of(run.sources, run.rules), LOOKED_AT)
    positions = getattr(run.config.get_text_config(), "max_position_embeddings", None)
    return DraftFacts(
        stage=stage,
        format=reports[0].format,
        rows=sum(report.kept for report in reports),
        refused=sum(len(report.refusals) for report in reports),
        lengths=prepared.train.examples.lengths,
        thinks=any(_thinks(talk.messages) for talk in talks),
        switch=next((name for name in THINKING_ARGUMENTS if name in reads), None),
        template=template,
        positions=positions or LENGTHS[-1],
        validates=any(
            split_of(Path(file.parent.name, file.name)) == "validation"
            for source in run.sources
            for file in source.unused
        ),
        on_gpu=torch.cuda.is_available(),
    )


def _run(base: str, data: str, stage: str, folder: Path) -> Run:
    """A run on all rows, whatever their length."""
    content: dict[str, Any] = {
        "name": "draft",
        # The folders that runs share are beside a run's own.
        "output": str(folder),
        "model": {"base": os.path.abspath(base) if os.path.exists(base) else base},
        "tuning": {"kind": "lora"},
        "data": {
            "max_length": 10**6,
            "invalid": "drop",
            "altered": "allow",
            "train": [{"file": os.path.abspath(data)}],
        },
        "train": {"stage": stage},
    }
    if stage == "preference":
        content["loss"] = {"kind": "dpo"}
    folder.mkdir(exist_ok=True)
    path = folder / "draft.yaml"
    path.write_text(json.dumps(content), "utf-8")  # JSON is YAML
    try:
        return Run.load(path)
    except RecipeError as error:
        problem = error.problems[0]
        option = "--data" if problem.path.startswith("data") else "--base"
        message = problem.message.partition("; paths are relative")[0]
        raise YRunnerError(f"{option}: {message}", remedy="check it") from error


def _fitting_template(tokenizer: Any) -> str:
    """The first known template whose control tokens the tokenizer has."""
    for name, marks in MARKS.items():
        vocabulary = tokenizer.get_vocab()
        if marks.needed and all(token in vocabulary for token in marks.needed):
            return name
    if tokenizer.eos_token:
        return "mistral"
    raise YRunnerError(
        "--base: its tokenizer has no chat template, and no known one fits",
        remedy="write a recipe with model.chat_template: a .jinja file",
    )


def _thinks(messages: Any) -> bool:
    return any(
        message.role == "assistant"
        and (
            answer_behind_thinking(message.content) != message.content.strip()
            or "thinking" in (message.extras or {})
        )
        for message in messages
    )


def recipe_text(found: DraftFacts, base: str, data: str, path: Path, sorting: str) -> str:
    """The recipe, with the reasons of its values."""
    source = _data_line(data, path)
    lines = [
        f"# Written by yrun init: {num_rows(found.rows)} of the format {found.format}.",
        "# Next:",
        f"#   yrun check {path}    # rows, steps, memory; --memory 24GB plans for a GPU",
        f"#   yrun train {path}",
        f"#   yrun chat {path}",
        f"name: {_name(path)}",
        "",
        *_model_lines(found, base, path),
        "",
        "tuning:",
        _with_reason("  kind: lora", "qlora for a base that does not fit; full for all weights"),
        "",
        "data:",
        _with_reason(f"  max_length: {found.max_length}", _length_reason(found)),
    ]
    if found.num_too_long:
        policy = "split" if found.stage == "cpt" else "cut"
        lines.append(_with_reason(f"  too_long: {policy}", f"{found.num_too_long:,} are longer"))
    if found.refused:
        reason = f"{num_rows(found.refused)} cannot be used: yrun check says why"
        lines.append(_with_reason("  invalid: drop", reason))
    if found.packs:
        lines.append(_with_reason("  packing: true", "most rows are short"))
    if found.stage == "cpt":
        lines.append("  targets: all")
    lines.append("  train:")
    if found.sorts:
        reason = "its rows without the most suspicious twentieth"
        lines.append(_with_reason(f"    - sorted: {json.dumps(sorting)}", reason))
        lines.append(f"    # - {source}  # all of them")
    else:
        lines.append(f"    - {source}")
    if found.validates:
        lines += ["  validation:", f"    - {source}    # its validation split"]
    else:
        share = 0.05 if found.rows >= 200 else 0.1
        reason = "set aside, to see what is learned"
        lines.append(_with_reason(f"  validation_share: {share}", reason))
    return "\n".join([*lines, "", *_training_lines(found)]) + "\n"


def _model_lines(found: DraftFacts, base: str, path: Path) -> list[str]:
    lines = ["model:", f"  base: {_place(base, path)}"]
    if found.template is not None and found.stage != "cpt":
        reason = "the base has no template of its own"
        lines.append(_with_reason(f"  chat_template: {found.template}", reason))
    if found.switch is not None and found.stage != "cpt":
        value = "true" if found.thinks else "false"
        reason = "the replies have thinking" if found.thinks else "no reply has thinking"
        lines += ["  template_args:", _with_reason(f"    {found.switch}: {value}", reason)]
    return lines


def _training_lines(found: DraftFacts) -> list[str]:
    what = "pairs" if found.stage == "preference" else "packed rows" if found.packs else "rows"
    rows = found.batch_size * found.accumulation
    lines = []
    match found.stage:
        case "sft":
            lines += ["loss:", _with_reason("  kind: nlirg", "plain: ordinary cross-entropy"), ""]
            lines += ["keep:"]
            reason = "hold it to rows that the base writes first; none: do not"
            lines += [_with_reason("  kind: self_replay", reason)]
            if found.writes_few:
                reason = "few rows on a CPU; the default of 64 holds better, and is written longer"
                lines += [_with_reason(f"  rows: {FEW_REPLAY_ROWS}", reason)]
            lines += [""]
        case "preference":
            lines += ["loss:", _with_reason("  kind: dpo", "or simpo, orpo"), ""]
    lines += ["train:"]
    if found.stage != "sft":
        lines.append(f"  stage: {found.stage}")
    rate = {"sft": "1.0e-4", "cpt": "5.0e-5", "preference": "5.0e-6"}[found.stage]
    return [
        *lines,
        _with_reason(f"  epochs: {found.epochs}", "fewer if the validation loss rises again"),
        f"  batch_size: {found.batch_size}",
        _with_reason(
            f"  gradient_accumulation_steps: {found.accumulation}", f"{rows} {what} per update"
        ),
        _with_reason(f"  learning_rate: {rate}", "for LoRA; full tuning takes a tenth"),
        "  warmup_ratio: 0.05",
        _with_reason("  gradient_checkpointing: true", "slower, with far less memory"),
    ]


def _sort_text(found: DraftFacts, base: str, data: str, path: Path) -> str:
    return "\n".join(
        [
            f"# Written by yrun init. The rows are scored by the base: yrun sort {path}",
            f"name: {_name(path)}",
            "",
            *_model_lines(found, base, path),
            "",
            "data:",
            f"  max_length: {found.max_length}",
            *(
                [f"  too_long: {'split' if found.stage == 'cpt' else 'cut'}"]
                if found.num_too_long
                else []
            ),
            *(["  invalid: drop"] if found.refused else []),
            *(["  targets: all"] if found.stage == "cpt" else []),
            "  train:",
            f"    - {_data_line(data, path)}",
            *(["", "train:", "  stage: cpt"] if found.stage == "cpt" else []),
            "",
            "sort:",
            _with_reason("  drop_share: 0.05", "read its page, and mark the rows yourself"),
            "",
        ]
    )


def _name(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or "my-run"


def _length_reason(found: DraftFacts) -> str:
    return (
        f"the longest row has {found.longest:,} tokens, the median {np.median(found.lengths):,.0f}"
    )


def _data_line(data: str, path: Path) -> str:
    return f"file: {_place(data, path)}"


def _place(name: str, path: Path) -> str:
    """A folder or file as the recipe at `path` names it; a Hub id unchanged."""
    if os.path.exists(name) or GLOB & set(name):
        name = os.path.relpath(name, path.absolute().parent)
        name = name if name.startswith(".") else f"./{name}"
    return json.dumps(name, ensure_ascii=False)


def _with_reason(line: str, reason: str) -> str:
    return f"{line:<33} # {reason}" if len(line) < 33 else f"{line}  # {reason}"
