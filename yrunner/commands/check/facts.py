"""Facts of a run before it starts: data, steps, learning rate, and faults of its model."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel

from yrunner.assembly.preflight import findings_of_base
from yrunner.assembly.run import Run
from yrunner.assembly.trainer import tune
from yrunner.data.batching.collate import SlicedExamples
from yrunner.data.batching.packing import fill_rate
from yrunner.data.batching.plan import Plan
from yrunner.data.batching.rollouts import longest_example
from yrunner.data.conversation import TokenizedExample
from yrunner.data.dataset.preference import AnswerFacts, answer_facts
from yrunner.data.dataset.row_report import FileReport
from yrunner.data.dataset.splits import Prepared
from yrunner.models.adapters import find_adapter, read_base
from yrunner.models.errors import check_weight_files
from yrunner.models.limits import check_isolation
from yrunner.models.load import check_folder, check_ids, choose_dtype, load_model
from yrunner.models.scratch import build_model
from yrunner.recipe.schema.recipe import TrainSection
from yrunner.training.arguments import count_warmup, learning_rates

SHORTEST_BIN = 16
POINTS_OF_CURVE = 60
BYTES_WORTH_LOADING = 4 * 10**9
"""Weights up to this size are loaded to test whether the model isolates packed examples."""


@dataclass(frozen=True)
class Steps:
    """The optimizer updates of a run."""

    updates: int
    updates_per_epoch: int
    """Updates of a whole epoch, also if the run ends before."""
    updates_of_epochs: list[int]
    """Updates of each epoch that the run reaches."""
    rows_per_update: int
    """Examples or packed rows of the domain."""
    kept_rows_per_update: int
    """Replay rows added to them."""
    packed_rows: int | None
    """Packed rows of an epoch; None without packing."""
    packing_fill: float | None
    """Share of the packed rows that is not padding."""


@dataclass(frozen=True)
class Schedule:
    """The learning rate over the run."""

    warmup_updates: int
    points: list[tuple[int, float]]
    """Updates, counted from 1, and their learning rates, evenly spaced."""


@dataclass(frozen=True)
class DataFacts:
    """Statistics of the training examples."""

    examples: int
    """Pairs count as one."""
    tokens: int
    targets: int
    lengths: list[tuple[int, int]]
    """Upper ends of bins in tokens, and the examples in each."""
    longest: int
    scripts: dict[str, float]
    """Share of each script among the letters and digits of the training files."""
    answers: AnswerFacts | None
    """Better and worse answers; None for a stage without them."""


def data_facts(prepared: Prepared[Any]) -> DataFacts:
    """Lengths, targets and scripts of the training examples."""
    lengths_E = prepared.train.examples.lengths
    return DataFacts(
        examples=len(prepared.train),
        tokens=int(lengths_E.sum()),
        targets=int(prepared.train.num_targets.sum()),
        lengths=count_lengths(lengths_E),
        longest=int(lengths_E.max()),
        scripts=script_shares([it for it in prepared.reports if it.purpose == "train"]),
        answers=answer_facts(prepared.train),
    )


def count_lengths(lengths_E: Any) -> list[tuple[int, int]]:
    """Examples by length: upper ends of the bins, doubling from 16, and the count of each.

    The first bin starts at 1; empty bins before the shortest example are left out.
    """
    ends = [SHORTEST_BIN]
    while ends[-1] < lengths_E.max():
        ends.append(2 * ends[-1])
    counts, _ = np.histogram(lengths_E, bins=[0.5, *(end + 0.5 for end in ends)])
    bins = [(end, int(count)) for end, count in zip(ends, counts, strict=True)]
    first = next(number for number, (_, count) in enumerate(bins) if count)
    return bins[first:]


def script_shares(reports: Sequence[FileReport]) -> dict[str, float]:
    """Share of each script, largest first, without those below one in a thousand."""
    counts: Counter[str] = sum((report.scripts for report in reports), Counter())
    total = counts.total()
    return {name: n / total for name, n in counts.most_common() if n >= total / 1000}


def count_steps(run: Run, plan: Plan) -> Steps:
    """The exact updates of the run, and how full its packed rows are."""
    ends = [min(end, plan.num_updates) for end in plan.epoch_ends]
    return Steps(
        updates=plan.num_updates,
        updates_per_epoch=plan.updates_per_epoch,
        updates_of_epochs=[after - before for before, after in pairwise([0, *ends])],
        rows_per_update=plan.rows_of_an_update,
        kept_rows_per_update=plan.kept,
        packed_rows=None if plan.packs is None else len(plan.packs),
        packing_fill=None
        if plan.packs is None
        else fill_rate(run.dataset.train.lengths, len(plan.packs), run.row_length),
    )


def largest_micro_batch(run: Run, plan: Plan) -> list[TokenizedExample]:
    """The examples of the micro-batch with the most tokens in the first epoch."""
    rows = run.dataset.train
    if run.recipe.train.stage == "rl":
        prompts = [rows[plan.data_row(at)] for row in plan.largest_micro_batch() for at, _ in row]
        longest = run.recipe.rollout.max_new_tokens
        return [longest_example(each, longest, reference=False).example for each in prompts]
    if run.recipe.learns_from_pairs:
        places = [place for row in plan.largest_micro_batch() for place, _ in row]
        return list(rows.select(np.array(places)).examples)
    return SlicedExamples(rows, run.recipe.train.token_batch).__getitems__(
        plan.largest_micro_batch()
    )


def schedule(train: TrainSection, num_updates: int) -> Schedule:
    """The learning rate over the run."""
    points = min(POINTS_OF_CURVE, num_updates)
    updates = sorted({round(it) for it in np.linspace(0, num_updates - 1, points)})
    rates = learning_rates(train, num_updates, updates)
    pairs = [(update + 1, rate) for update, rate in zip(updates, rates, strict=True)]
    return Schedule(count_warmup(train, num_updates), pairs)


@dataclass(frozen=True)
class ModelFacts:
    """What loading the model has shown."""

    findings: list[str]
    """Sentences on the base that deserve a look."""
    unchecked: str | None = None
    """What only the run itself can check."""
    base: Any = None
    """The base beneath a new adapter; None if it was not loaded, or makes way for a teacher."""


def check_model(run: Run) -> ModelFacts:
    """Load the model, unless it is large, and check it as the run does before its first update.

    Raises `ModelError` if the run would: it sees later tokens, mixes packed examples, or cannot be
    tuned so.
    """
    recipe = run.recipe
    check_ids(run.tokenizer, run.config.get_text_config().vocab_size)
    packs = ", isolates packed examples" if recipe.data.packing else ""
    model = _small_model(run)
    if model is None:
        return ModelFacts(
            [],
            f"model: whether it predicts only from earlier tokens{packs} and has learned the marks "
            "of the conversations is tested when training starts",
        )
    if packs:
        check_isolation(model)
    if recipe.model.scratch is not None or run.stale_base is not None:
        return ModelFacts([])
    tuned = tune(run, model)
    is_kept = isinstance(tuned, PeftModel) and recipe.teacher is None
    return ModelFacts(findings_of_base(run, tuned), base=tuned if is_kept else None)


def check_weights(run: Run) -> None:
    """Raise `ModelError` if the files of the base's weights are missing or incomplete.

    Other checks need only a config and a tokenizer.
    """
    if run.recipe.model.scratch is None and run.stale_base is None:
        check_folder(_whole_base(run))
        check_weight_files(Path(run.base_source))


def _whole_base(run: Run) -> Path:
    """The folder of the base's weights; of an adapter, that of its base. A Hub id stays one."""
    source = run.base_source
    adapter = find_adapter(source) if Path(source).is_dir() else None
    return Path(source if adapter is None else read_base(adapter))


def _small_model(run: Run) -> Any:
    """The recipe's model, with random weights if not trained yet; None if it is large."""
    recipe = run.recipe
    if recipe.model.scratch is not None:
        return build_model(recipe.model.scratch.config, run.tokenizer, recipe.seed)
    if run.base is not None and run.stale_base is not None:
        return _small_model(run.base)
    size = sum(file.stat().st_size for file in _whole_base(run).glob("*.safetensors"))
    if not 0 < size <= BYTES_WORTH_LOADING:
        return None
    return load_model(
        run.base_source,
        dtype=choose_dtype(recipe.model.dtype),
        attention=recipe.model.attention,
        trust_remote_code=recipe.model.trust_remote_code,
    )
