"""The regularisers of `benchmarks.ranks`, one for each kind of `keep`.

The base is the model of the benchmark. The replay rows are random, like the training rows: their
content does not matter for the comparison of processes.
"""

from pathlib import Path

import torch

from benchmarks.ranks.cases import PAD, TUNINGS, Case, make_examples
from yrunner.data.batching.replay_rows import make_keep_plan
from yrunner.models.load import load_model, without_zero3
from yrunner.scoring.base_predictions import CachedPredictions, cache_predictions
from yrunner.training.ewc import EwcPenalty, estimate_fisher
from yrunner.training.loop import Trainer
from yrunner.training.replay_loss import HeldRows

KEPT_SHARE = {"none": 0.0, "replay": 3 / 8, "one_row": 1 / 8, "text": 3 / 8, "ewc": 0.0}
"""Share of replay rows in an update. With `one_row`, only one of two processes has any."""
STRENGTH, TOP = 2.0, 16
PENALTY = 2000.0
"""Large, because the predictions of a random base hardly depend on any weight."""
FIGURES = ("keep_divergence", "keep_text_loss", "keep_penalty")
REPLAY_ROWS = make_examples(9, seed=4)


def add_regulariser(trainer: Trainer, case: Case, base: Path, pack_to: int | None) -> None:
    """Add the regulariser of a case to a trainer that has not run yet."""
    if case.keep == "none":
        return
    if case.keep == "ewc":
        fisher = estimate_fisher(trainer.model, REPLAY_ROWS, pad_token_id=PAD)
        trainer.objective.regulariser = EwcPenalty(trainer.model, fisher, PENALTY)
        return
    plan = make_keep_plan(
        [len(row.target_positions) for row in REPLAY_ROWS],
        [len(row.input_ids) for row in REPLAY_ROWS],
        per_update=trainer.plan.kept,
        seed=0,
        pack_to=pack_to,
    )
    trainer.objective.regulariser = HeldRows(
        REPLAY_ROWS,
        plan,
        lanes=trainer.plan.lanes,
        strength=STRENGTH,
        by_text=case.keep == "text",
        # An adapter can be disabled to get the base; otherwise its predictions are stored.
        tops=None if TUNINGS[case.tuning].kind == "lora" else compute_tops(base),
        pad_token_id=PAD,
        layout=trainer.batches.layout,
    )


def compute_tops(base: Path) -> CachedPredictions:
    """Compute what the base predicts for the replay rows, before weights are sharded."""
    with without_zero3():
        model = load_model(str(base), dtype=torch.float32)
        return cache_predictions(model, REPLAY_ROWS, top=TOP, pad_token_id=PAD, max_tokens=200)
