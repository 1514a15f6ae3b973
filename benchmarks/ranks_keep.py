"""What the cases of `benchmarks.ranks` hold on to: the ways of `keep`.

The base is the model of the benchmark. Its rows are random, like those that are learned: what they
say does not matter to the question whether processes change anything.
"""

from pathlib import Path

import torch

from benchmarks.ranks_cases import PAD, TUNINGS, Case, make_examples
from yrunner.data.batching.replay_rows import make_keep_plan
from yrunner.models.load import load_model, whole_weights
from yrunner.scoring.base_predictions import KeptTops, keep_tops
from yrunner.training.ewc import EwcPenalty, estimate_fisher
from yrunner.training.replay_loss import HeldRows
from yrunner.training.trainer import SignalTrainer

KEPT_SHARE = {"none": 0.0, "replay": 3 / 8, "one_row": 1 / 8, "text": 3 / 8, "ewc": 0.0}
"""Share of the rows of an update. Of one row, only one process has anything to learn from."""
STRENGTH, TOP = 2.0, 16
PENALTY = 2000.0
"""The base is random: its predictions depend on no weight much."""
FIGURES = ("keep_divergence", "keep_text_loss", "keep_penalty")
ROWS = make_examples(9, seed=4)


def hold(trainer: SignalTrainer, case: Case, base: Path, pack_to: int | None) -> None:
    """Hold a trainer, whose model is as the run starts, to the model in the folder `base`."""
    if case.keep == "none":
        return
    if case.keep == "ewc":
        fisher = estimate_fisher(trainer.model, ROWS, pad_token_id=PAD)
        trainer.add_regulariser(EwcPenalty(trainer.model, fisher, PENALTY))
        return
    plan = make_keep_plan(
        [len(row.target_positions) for row in ROWS],
        [len(row.input_ids) for row in ROWS],
        per_update=trainer.plan.kept,
        seed=0,
        pack_to=pack_to,
    )
    trainer.add_regulariser(
        HeldRows(
            ROWS,
            plan,
            lanes=trainer.plan.lanes,
            strength=STRENGTH,
            by_text=case.keep == "text",
            # An adapter can be switched off; what another base predicted has to be kept.
            tops=None if TUNINGS[case.tuning].kind == "lora" else tops_of(base),
            pad_token_id=PAD,
            layout=trainer.layout,
        )
    )


def tops_of(base: Path) -> KeptTops:
    """What the base predicts for the rows, looked up before anything is shared out."""
    with whole_weights():
        model = load_model(str(base), dtype=torch.float32)
        return keep_tops(model, ROWS, top=TOP, pad_token_id=PAD, max_tokens=200)
