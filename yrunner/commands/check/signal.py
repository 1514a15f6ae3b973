"""A sample of training rows scored by the base: its losses, and the weights they would get."""

# N = targets of the sample, B = bins of the histogram, G = bins or zones

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from yrunner.assembly.distillation.teacher import has_teacher_here, load_teacher_model
from yrunner.assembly.measure import score_rows
from yrunner.assembly.run import Run
from yrunner.data.conversation import TokenizedExample
from yrunner.data.dataset.examples import Examples, Item, Pairs, StoredRows
from yrunner.errors import ModelError
from yrunner.losses.nlirg import ZONES, zone_of
from yrunner.machine import free_memory
from yrunner.models.adapters import CONFIG_FILE, attach_adapter, read_base
from yrunner.models.load import choose_dtype, load_model
from yrunner.models.local import count_weights, local_folder, weight_files
from yrunner.recipe.load import base_recipe_path
from yrunner.recipe.schema.model import AdapterTuning
from yrunner.recipe.schema.recipe import Recipe
from yrunner.reports.plots import HIGHEST_LOSS
from yrunner.scoring.half_products import halve_products

SAMPLE_ROWS = 64
LEAST_ROWS = 8
"""Fewer only if they would take more than `MOST_WORK`."""
MOST_TARGETS = 20_000
USUAL_WORK = {"cpu": 2e11, "cuda": 3e14}
"""Floating-point operations by default: a few seconds on two cores or a GPU."""
MOST_WORK = {"cpu": 2e12, "cuda": 2e15}
"""The most for `LEAST_ROWS` by default: about half a minute."""
BIN_WIDTH = 1.0
ROOM_BESIDE_WEIGHTS = 1.25
"""Memory for scoring, per byte of weights."""


@dataclass(frozen=True)
class BaseWins:
    """How often the base finds the better answer of a pair likelier than the worse one."""

    pairs: int
    whole: float
    """Share of the pairs, by the likelihood of whole answers; a draw counts half."""
    per_token: float
    """The same by the likelihood per token."""


@dataclass(frozen=True)
class Sample:
    """Losses and weights of the targets of some rows."""

    rows: int
    loss_N: Tensor
    weight_N: Tensor
    base_wins: BaseWins | None = None
    """Of a sample of pairs."""
    teacher_loss_N: Tensor | None = None
    """Losses of the same targets under the teacher, if there is one here."""


@dataclass(frozen=True)
class NotScored:
    """Why the base was not scored."""

    skipped: str


@dataclass(frozen=True)
class LossBin:
    """Targets with losses in one range."""

    start: float
    end: float | None
    """None for the last bin."""
    zone: str
    """The zone of the bin's centre."""
    share: float
    """Of all targets."""
    mean_weight: float | None
    """None for an empty bin."""


@dataclass(frozen=True)
class Zone:
    """The targets of one zone and their weight."""

    name: str
    start: float
    end: float | None
    share: float
    mean_weight: float | None
    weight_share: float
    """Share of the sum of all weights."""


@dataclass(frozen=True)
class Signal:
    """Histogram and zones of a sample."""

    rows: int
    targets: int
    mean_weight: float
    refused: float
    """Share of the targets with a weight of 0."""
    bins: list[LossBin]
    zones: list[Zone]
    base_wins: BaseWins | None = None
    mean_loss: float = 0.0
    """Of the base, per target."""
    teacher_loss: float | None = None
    """Of the teacher, on the same targets."""


def score_sample(
    run: Run, stored: StoredRows[Any], rows: int | None, tuned: Any = None
) -> Sample | NotScored:
    """Score `rows` of the examples with the base and the recipe's weight; both answers of pairs.

    None: a number that takes a few seconds, or eight rows if they take half a minute. `tuned`: the
    base beneath the adapter of its recipe before its first update; None: it is loaded. Raises
    `ModelError` if it cannot be.
    """
    if rows == 0:
        return NotScored("switched off (--sample 0)")
    examples = stored.examples
    if not len(examples) or not examples.num_targets.sum():
        return NotScored("the data has no targets")
    base = find_base(run)
    if isinstance(base, NotScored):
        return base
    folder, num_weights = base
    if rows is None:
        rows = _affordable_rows(examples, num_weights)
    if rows == 0:
        return NotScored(
            f"too slow on this machine for a base of {num_weights:,} weights; "
            "score some anyway with --sample 8"
        )
    with _as_base(run.recipe, folder, tuned) as model:
        if run.halves_products:
            halve_products(model)
        if isinstance(stored, Pairs):
            pairs = spread(stored, max(1, rows // 2))
            return _score(
                run, model, [each for pair in pairs for each in vars(pair).values()], True
            )
        chosen = spread(examples, rows)
        sample = _score(run, model, chosen)
    if not has_teacher_here(run):
        return sample
    del model
    teacher = load_teacher_model(run)
    scores = score_rows(run, teacher, chosen, "scoring rows with the teacher")
    return replace(sample, teacher_loss_N=torch.cat([one.loss_N for one in scores]).double())


@contextmanager
def _as_base(recipe: Recipe, folder: Path, tuned: Any) -> Iterator[Any]:
    """The model that training starts from."""
    if tuned is None:
        yield load_base(recipe, folder)
        return
    tuned.to("cuda" if torch.cuda.is_available() else "cpu")
    # An adapter that is trained further belongs to it.
    is_new = getattr(recipe.tuning, "adapter", None) is None
    with tuned.disable_adapter() if is_new else nullcontext():
        yield tuned


def describe_sample(sample: Sample, edges: Sequence[float]) -> Signal:
    """Histogram and zones of the losses with their weights; `edges` separate the zones."""
    loss_N = sample.loss_N
    # A target whose weight is NaN is not trained on.
    weight_N = torch.where(sample.weight_N > 0, sample.weight_N, 0.0)
    starts = torch.arange(0, HIGHEST_LOSS + BIN_WIDTH, BIN_WIDTH, dtype=loss_N.dtype)
    zone_B = zone_of(starts + BIN_WIDTH / 2, edges[-1]).tolist()
    within_N = loss_N.nan_to_num(HIGHEST_LOSS, posinf=HIGHEST_LOSS).clamp(max=HIGHEST_LOSS)
    bin_N = (within_N / BIN_WIDTH).long()
    bin_shares = _shares(bin_N, weight_N, len(starts))
    bins = [
        LossBin(start, end, ZONES[zone], share, mean)
        for start, end, zone, (share, mean, _) in zip(
            starts.tolist(), [*starts.tolist()[1:], None], zone_B, bin_shares, strict=True
        )
    ]
    zone_shares = _shares(zone_of(loss_N, edges[-1]), weight_N, len(ZONES))
    zones = [
        Zone(name, start, end, *shares)
        for name, start, end, shares in zip(
            ZONES, [0.0, *edges], [*edges, None], zone_shares, strict=True
        )
    ]
    refused = float((weight_N == 0).double().mean())
    figures = (sample.rows, len(loss_N), float(weight_N.mean()), refused)
    teacher_N = sample.teacher_loss_N
    return Signal(
        *figures,
        bins,
        zones,
        sample.base_wins,
        mean_loss=float(loss_N.mean()),
        teacher_loss=None if teacher_N is None else float(teacher_N.mean()),
    )


def spread(rows: StoredRows[Item], number: int) -> list[Item]:
    """`number` rows at most, evenly spaced."""
    number = min(number, len(rows))
    return [rows[(2 * index + 1) * len(rows) // (2 * number)] for index in range(number)]


def find_base(run: Run) -> tuple[Path, int] | NotScored:
    """The folder of the base and its number of weights, if it is here and fits into memory."""
    recipe = run.recipe
    if recipe.model.scratch is not None:
        return NotScored("a model from scratch knows nothing yet, so its losses mean nothing")
    if run.base is not None and run.stale_base is not None:
        path = base_recipe_path(recipe)
        assert path is not None, "only a recipe can be stale"
        here = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        return NotScored(
            f"the base {run.base.recipe.name} is not trained or has changed; "
            f"train it with: yrun train {here}"
        )
    source = run.base_source
    folder = local_folder(source)
    files = [] if folder is None else weight_files(folder)
    if folder is None or not files:
        missing = source
        if folder is not None and (folder / CONFIG_FILE).is_file():
            missing = read_base(folder)
        if Path(missing).is_dir():
            return NotScored(f"{missing} has no weights")
        return NotScored(
            f"the weights of {missing} are not on this machine, and check does not download them; "
            f"get them with: hf download {missing}"
        )
    try:
        num_weights = count_weights(files)
    except ModelError as error:
        return NotScored(error.message)
    dtype = choose_dtype(recipe.model.dtype)
    needed, free = ROOM_BESIDE_WEIGHTS * num_weights * dtype.itemsize, free_memory()
    if needed > free:
        return NotScored(
            f"the base needs {needed / 1e9:.1f} GB of memory, but only {free / 1e9:.1f} GB are free"
        )
    return folder, num_weights


def _score(
    run: Run, model: Any, chosen: Sequence[TokenizedExample], in_pairs: bool = False
) -> Sample:
    # Neighbours share a batch: rows of similar length need little padding.
    order = sorted(range(len(chosen)), key=lambda number: len(chosen[number].input_ids))
    scores = score_rows(run, model, [chosen[at] for at in order], "scoring rows with the base")
    loss_N = torch.cat([scored.loss_N for scored in scores]).double()
    weight_N = torch.cat([scored.weight_N for scored in scores]).double()
    wins = None
    if in_pairs:
        found = dict(zip(order, (scored.loss_N.double() for scored in scores), strict=True))
        wins = count_wins([found[number] for number in range(len(chosen))])
    return Sample(len(chosen), loss_N, weight_N, wins)


def count_wins(losses: Sequence[Tensor]) -> BaseWins:
    """How often the first answer of each pair is likelier, from the losses of all answers."""
    margins = torch.tensor(
        [
            [float(worse_N.sum() - better_N.sum()), float(worse_N.mean() - better_N.mean())]
            for better_N, worse_N in zip(losses[0::2], losses[1::2], strict=True)
        ]
    )
    whole, per_token = ((margins > 0).double() + (margins == 0).double() / 2).mean(dim=0).tolist()
    return BaseWins(len(margins), whole, per_token)


def _affordable_rows(examples: Examples, num_weights: int) -> int:
    """Rows for a few seconds, or eight for half a minute; 0 if a single one takes longer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    targets_per_row = max(1.0, float(examples.num_targets.mean()))
    # Each weight costs one multiplication and one addition per token.
    work_per_row = 2 * num_weights * float(examples.lengths.mean())
    enough = max(1, int(MOST_TARGETS / targets_per_row))
    usual, most = (int(work[device] / work_per_row) for work in (USUAL_WORK, MOST_WORK))
    return min(SAMPLE_ROWS, enough, max(usual, min(LEAST_ROWS, most)))


def load_base(recipe: Recipe, folder: Path) -> Any:
    """The model that training starts from, in the dtype of its computation."""
    has_gpu = torch.cuda.is_available()
    # flash_attention_2 needs a GPU, which this machine may lack; sdpa computes the same.
    needs_gpu = recipe.model.attention == "flash_attention_2"
    model: Any = load_model(
        str(folder),
        dtype=choose_dtype(recipe.model.dtype),
        attention="sdpa" if needs_gpu and not has_gpu else recipe.model.attention,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    if isinstance(recipe.tuning, AdapterTuning) and recipe.tuning.adapter is not None:
        model = attach_adapter(model, Path(recipe.tuning.adapter), trainable=False)
    return model.to("cuda" if has_gpu else "cpu")


def _shares(
    group_N: Tensor, weight_N: Tensor, num_groups: int
) -> list[tuple[float, float | None, float]]:
    """For each group: share of the targets, mean weight, share of all weight."""
    count_G = group_N.bincount(minlength=num_groups).tolist()
    weight_G = group_N.bincount(weight_N, minlength=num_groups).tolist()
    # All targets may be refused.
    total = sum(weight_G) or 1.0
    return [
        (count / len(group_N), weight / count if count else None, weight / total)
        for count, weight in zip(count_G, weight_G, strict=True)
    ]
