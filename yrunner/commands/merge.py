"""`yrun merge`: one model of base and adapter, checked to answer as the two did."""

from pathlib import Path
from typing import Any

import torch

from yrunner.commands.finished import base_model, finished_run, tuned_model, tuned_tokenizer
from yrunner.commands.measure import Measured
from yrunner.commands.train_data import first_examples
from yrunner.commands.train_story import model_card
from yrunner.console import say
from yrunner.data.conversation import TokenizedExample
from yrunner.errors import RunError, YRunnerError
from yrunner.models.adapters import attach_adapter
from yrunner.models.export import save_model
from yrunner.recipe.load import load_recipe

NUM_PROBES = 8
LARGEST_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
"""Of a logit, by dtype: merging rounds each weight once more than keeping the adapter apart."""


def merge(path: Path, overrides: list[str]) -> None:
    """Merge the adapter of a finished run into its base and save that beside it.

    Raises `RunError`, and saves nothing, where the merged model answers differently.
    """
    recipe = load_recipe(path, overrides)
    if recipe.tuning.kind != "lora":
        raise YRunnerError(
            f"tuning.kind {recipe.tuning.kind} leaves whole weights", remedy="nothing needs merging"
        )
    run_dir = finished_run(recipe)
    tokenizer = tuned_tokenizer(run_dir)
    probes = first_examples(recipe, tokenizer, NUM_PROBES)
    adapted = attach_adapter(base_model(recipe), run_dir.model, trainable=False)
    expected = [_logits(adapted, probe) for probe in probes]
    del adapted
    merged = tuned_model(recipe, run_dir)
    pairs = zip(probes, expected, strict=True)
    difference = max((_logits(merged, probe) - known).abs().max().item() for probe, known in pairs)
    allowed = LARGEST_DIFFERENCE[merged.dtype]
    if not difference <= allowed:
        raise RunError(
            f"merged and adapted logits differ by {difference:.3g}, more than {allowed:g}",
            remedy="nothing was saved; please report this",
        )
    card = model_card(recipe, run_dir, Measured.load(run_dir.before), Measured.load(run_dir.after))
    save_model(merged, tokenizer, run_dir.merged, card)
    say(f"largest difference of a logit on {len(probes)} rows: {difference:.3g}")
    say(f"merged model: {run_dir.merged}")


@torch.no_grad()
def _logits(model: Any, example: TokenizedExample) -> torch.Tensor:
    input_ids = torch.tensor([example.input_ids], device=model.device)
    return model.eval()(input_ids).logits.float().cpu()
