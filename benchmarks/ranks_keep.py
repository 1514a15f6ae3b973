"""What the cases of `benchmarks.ranks` hold on to: the ways of `keep`, and the gauge beside each.

The base is the model of the benchmark. Its rows are random, like those that are learned: what they
say does not matter to the question whether processes change anything.
"""

from pathlib import Path

import torch

from yrunner.data.conversation import TokenizedExample
from yrunner.data.keep_plan import make_keep_plan
from yrunner.models.load import load_model
from yrunner.models.whole import whole_weights
from yrunner.recipe.schema_model import Tuning
from yrunner.scoring.base_answers import KeptTops, keep_tops
from yrunner.training.drift import DriftGauge
from yrunner.training.fisher import Springs, estimate_fisher
from yrunner.training.keeping import HeldRows
from yrunner.training.trainer import SignalTrainer

KEPT_SHARE = {"none": 0.0, "replay": 3 / 8, "one_row": 1 / 8, "text": 3 / 8, "ewc": 0.0}
"""Share of the rows of an update. Of one row, only one process has anything to learn from."""
STRENGTH, TOP, MAX_TOKENS = 2.0, 16, 200
FIGURES = ("keep_divergence", "keep_text_loss", "keep_penalty", "eval_drift")


def hold(
    trainer: SignalTrainer,
    keep: str,
    base: Path,
    tuning: Tuning,
    rows: list[TokenizedExample],
    pack_to: int | None,
) -> None:
    """Hold a trainer, whose model is as the run starts, to the model in the folder `base`."""
    if keep == "none":
        return
    held_out, rows = rows[:4], rows[4:]
    has_base_beneath = tuning.kind == "lora"
    trainer.gauge = DriftGauge(
        held_out,
        None if has_base_beneath else tops_of(base, held_out),
        trainer.pad_token_id,
        MAX_TOKENS,
    )
    if keep == "ewc":
        fisher = estimate_fisher(trainer.model, rows, pad_token_id=trainer.pad_token_id)
        trainer.hold_back(Springs(trainer.model, fisher, 1000 * STRENGTH))
        return
    plan = make_keep_plan(
        [len(row.target_positions) for row in rows],
        [len(row.input_ids) for row in rows],
        per_update=trainer.plan.kept,
        seed=0,
        pack_to=pack_to,
    )
    trainer.hold_back(
        HeldRows(
            rows,
            plan,
            lanes=trainer.plan.lanes,
            strength=STRENGTH,
            by_text=keep == "text",
            tops=None if has_base_beneath else tops_of(base, rows),
            pad_token_id=trainer.pad_token_id,
            layout=trainer.layout,
        )
    )


def tops_of(base: Path, rows: list[TokenizedExample]) -> KeptTops:
    """What the base predicts for the rows, as it is before anything is shared out."""
    with whole_weights():
        model = load_model(str(base), dtype=torch.float32)
        return keep_tops(model, rows, top=TOP, pad_token_id=0, max_tokens=MAX_TOKENS)
