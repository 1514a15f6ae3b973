"""Why a training run failed: causes and remedies for exploding losses and lack of memory."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from yrunner.assembly.memory import find_savings
from yrunner.assembly.run import Run
from yrunner.console import as_gigabytes, counted
from yrunner.distributed.collectives import this_rank
from yrunner.errors import RunError
from yrunner.recipe.schema.recipe import Recipe
from yrunner.scoring.base_predictions import to_device
from yrunner.storage.run_dir import write_json
from yrunner.training.loop import Trainer
from yrunner.training.spike_guard import Exploded

SHOWN_ROWS = 5
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""In torch's messages, lower case: on a CPU it raises only a RuntimeError."""


@dataclass(frozen=True)
class UpdateRow:
    """A row of an update, and its loss and gradient when trained on alone."""

    file: str
    row: int
    loss: float | None
    gradient_norm: float | None
    is_finite: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.row}"


@contextmanager
def explaining_stops(trainer: Trainer, run: Run) -> Iterator[None]:
    """Raise `RunError` with rows, causes and remedies if training fails."""
    try:
        yield
    except Exploded as exploded:
        if trainer.zero is not None:
            # DeepSpeed has already applied the update, and cannot run single rows.
            raise RunError(
                f"update {exploded.update:,}: {exploded.what}",
                remedy="restart with a lower train.learning_rate; the checkpoints are older",
            ) from exploded
        raise _explain_explosion(exploded, trainer, run) from exploded
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        # The traceback holds the tensors of the failed update; the explanation needs none of them.
        error.__traceback__ = None
        raise _explain_memory(trainer, run) from None


def _explain_explosion(exploded: Exploded, trainer: Trainer, run: Run) -> RunError:
    run_dir = run.folder
    broken = _broken_weight(trainer)
    rows = _rows_alone(trainer)
    non_finite = [row for row in rows if not row.is_finite]
    causes = _causes(run.recipe, broken, non_finite, rows)
    content = {
        "update": exploded.update,
        "what": exploded.what,
        "causes": causes,
        "figures": exploded.figures,
        "rows": [asdict(row) for row in rows],
    }
    if this_rank() == 0:
        write_json(run_dir.explosion, content)
    saved = ""
    if broken is None and trainer.state.global_step:
        trainer.save()
        saved = f"; update {exploded.update - 1:,} is saved in {run_dir.checkpoints}"
    shown = non_finite or rows
    places = ", ".join(map(str, shown[:SHOWN_ROWS]))
    more = f" and {len(shown) - SHOWN_ROWS:,} more" if len(shown) > SHOWN_ROWS else ""
    which = "rows that cause it alone" if non_finite else "rows of this update"
    return RunError(
        f"{exploded.message}{saved}; {which}: {places}{more}. Likely causes: {'; '.join(causes)}",
        remedy=f"inspect a row with yrun inspect RECIPE --row {shown[0]}; all rows and figures are "
        f"in {run_dir.explosion}",
    )


def _broken_weight(trainer: Trainer) -> str | None:
    """The name of a weight with a value that is not finite."""
    model: Any = trainer.model
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            return str(name)
    return None


def _rows_alone(trainer: Trainer) -> list[UpdateRow]:
    """Loss and gradient of each row of the aborted update, run alone."""
    model: Any = trainer.model
    found = []
    for row in trainer.plan.rows_of(trainer.state.global_step):
        examples = trainer.batches.train.__getitems__([row])
        batch = to_device(trainer.batches.collate(examples), trainer.device)
        model.zero_grad()
        total, loss = trainer.objective.alone(model, batch)
        total.backward()  # type: ignore[no-untyped-call]
        norm = _gradient_norm(model)
        finite = math.isfinite(loss) and math.isfinite(norm)
        found += [
            UpdateRow(origin.file.name, origin.row, _number(loss), _number(norm), finite)
            for origin in dict.fromkeys(
                example.origin for example in trainer.batches.examples_of(examples)
            )
        ]
    model.zero_grad()
    return found


def _gradient_norm(model: Any) -> float:
    norms = [weight.grad.norm() for weight in model.parameters() if weight.grad is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0


def _number(value: float) -> float | None:
    """The value; None (null in JSON) if it is not finite."""
    return value if math.isfinite(value) else None


def _causes(
    recipe: Recipe, broken: str | None, non_finite: list[UpdateRow], rows: list[UpdateRow]
) -> list[str]:
    if broken is not None:
        return [f"the weights are already broken: {broken} has a value that is not finite"]
    causes = []
    if non_finite and len(non_finite) < len(rows):
        causes.append("the data of these rows")
    if recipe.model.dtype == "float16":
        causes.append("float16 overflows (set model.dtype to bfloat16 or float32)")
    if recipe.train.max_grad_norm == 0:
        causes.append("gradients are not clipped (set train.max_grad_norm to 1.0)")
    rate = f"train.learning_rate {recipe.train.learning_rate:g} is too high"
    warmup = "" if recipe.train.warmup_ratio else " or needs train.warmup_ratio"
    return [*causes, rate + warmup]


def _is_lack_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error).lower() for words in NO_MEMORY)


def _explain_memory(trainer: Trainer, run: Run) -> RunError:
    model: Any = trainer.model
    model.zero_grad()
    rows = trainer.plan.largest_micro_batch()
    micro_batch = trainer.batches.examples_of(trainer.batches.train.__getitems__(rows))
    savings = find_savings(run, micro_batch)
    longest = max(len(example.input_ids) for example in micro_batch)
    done = trainer.state.global_step
    when = f"after update {done:,}" if done else "before the first update"
    helps = "; ".join(f"{it.change} saves about {as_gigabytes(it.saved)}" for it in savings)
    return RunError(
        f"out of memory {when}: the largest micro-batch has "
        f"{counted(len(micro_batch), 'example')} of up to {counted(longest, 'token')}",
        remedy=f"most effective: {helps}" if helps else "make train.batch_size smaller",
    )
