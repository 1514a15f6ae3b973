"""`yrun merge`: one model of base and adapter, proven to answer as the two did, and exported."""

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from yrunner.commands.base import base_source
from yrunner.commands.base_record import check_base
from yrunner.commands.finished import finished_run, tuned_tokenizer
from yrunner.commands.measure import Measured
from yrunner.commands.merge_export import check_exports, export
from yrunner.commands.merge_proof import BARS, figures_of, judge, probes_of, say_likeness
from yrunner.commands.train_story import model_card
from yrunner.console import progress, say
from yrunner.errors import YRunnerError
from yrunner.models.adapters import find_adapter
from yrunner.models.at_hand import local_folder
from yrunner.models.checkpoint import Checkpoint, open_checkpoint
from yrunner.models.export import ModelCard, complete_folder
from yrunner.models.folder_logits import folder_logits, merge_logits
from yrunner.models.license import read_license
from yrunner.models.load import DTYPES
from yrunner.models.merged_weights import changed_weights, merged_sizes, write_merged
from yrunner.models.merging import FourBits, Merge, Weighted, prepare_merge
from yrunner.models.proof import Likeness, compare
from yrunner.recipe.load import load_recipe
from yrunner.recipe.schema import Recipe
from yrunner.run_dir import RunDir, read_json, whole_folder, write_json


def merge(path: Path, overrides: list[str]) -> None:
    """Merge the adapter of a finished run into its base, prove that, and export it.

    Raises `ProofError`, and leaves no merged model, where it answers differently. All that can be
    known to fail is looked for before the first weight is read.
    """
    recipe = load_recipe(path, overrides)
    if recipe.tuning.kind not in ("lora", "qlora"):
        raise YRunnerError(
            f"tuning.kind {recipe.tuning.kind} leaves whole weights", remedy="nothing needs merging"
        )
    run_dir = finished_run(recipe)
    key = check_base(recipe, run_dir)
    base = open_checkpoint(base_source(recipe))
    check_exports(recipe, base)
    adapters = _adapters(recipe, run_dir)
    prepared = prepare_merge(
        base,
        adapters,
        as_trained=_four_bits(recipe),
        trust_remote_code=recipe.model.trust_remote_code,
    )
    say(f"base: {base.folder} ({_how_the_base_is(recipe)})")
    figures = _write(recipe, run_dir, prepared, adapters, _card(recipe, run_dir, base, key))
    write_json(run_dir.merge_figures, figures)
    say(f"merged model: {run_dir.merged}")
    export(recipe, run_dir, figures)


def _write(
    recipe: Recipe,
    run_dir: RunDir,
    prepared: Merge,
    adapters: list[Weighted],
    card: ModelCard,
) -> dict[str, Any]:
    """Write the merged model, and give the figures of its proof; it is there when proven."""
    tokenizer = tuned_tokenizer(run_dir)
    dtype = None if recipe.merge.dtype == "auto" else DTYPES[recipe.merge.dtype]
    result_dtype = dtype or prepared.base.main_dtype()
    with whole_folder(run_dir.merged) as partial:
        num_weights = len(merged_sizes(prepared, changed_weights(prepared), dtype))
        with progress("merging, weights", num_weights) as advance:
            write_merged(
                prepared,
                partial,
                dtype=dtype,
                shard_size=recipe.merge.shard_size,
                advance=advance,
            )
        likeness = None
        if recipe.merge.verify:
            likeness = _prove(recipe, prepared, adapters, partial, tokenizer)
            say_likeness("merged model against base and adapter", likeness)
            judge(likeness, BARS[result_dtype], "the merged model")
            card.figures.extend(figures_of(likeness))
        complete_folder(partial, _generation_config(run_dir, prepared), tokenizer, card)
    return {
        "base": str(prepared.base.folder),
        "base_key": card.base_key,
        "base_as": _how_the_base_is(recipe),
        "adapters": {str(adapter.folder): adapter.weight for adapter in adapters},
        "dtype": str(result_dtype).removeprefix("torch."),
        "proof": likeness.as_json() if likeness else None,
    }


def _prove(
    recipe: Recipe, prepared: Merge, adapters: list[Weighted], folder: Path, tokenizer: Any
) -> Likeness:
    probes = probes_of(recipe, tokenizer)
    trusts = recipe.model.trust_remote_code
    expected_NV = merge_logits(prepared, adapters, probes, trust_remote_code=trusts)
    return compare(expected_NV, folder_logits(folder, probes, trust_remote_code=trusts))


def _adapters(recipe: Recipe, run_dir: RunDir) -> list[Weighted]:
    """The run's own adapter, and those of the recipe."""
    adapters = [Weighted(run_dir.model, recipe.merge.weight)]
    for added in recipe.merge.adapters:
        folder = find_adapter(added.adapter)
        if folder is None:
            raise YRunnerError(
                f"merge.adapters: {added.adapter} holds no adapter",
                remedy="name a folder with an adapter_config.json",
            )
        adapters.append(Weighted(folder, added.weight))
    return adapters


def _four_bits(recipe: Recipe) -> FourBits | None:
    settings = recipe.merge.as_trained
    if settings is None:
        return None
    return FourBits(settings.quant_type, settings.double_quant)


def _how_the_base_is(recipe: Recipe) -> str:
    settings = recipe.merge.as_trained
    if settings is None:
        return "exact weights"
    return f"as trained: {settings.quant_type} made exact again"


def _card(recipe: Recipe, run_dir: RunDir, base: Checkpoint, key: str) -> ModelCard:
    before, after = Measured.load(run_dir.before), Measured.load(run_dir.after)
    return model_card(
        recipe,
        run_dir,
        before,
        after,
        base_key=key,
        data_hashes=read_json(run_dir.fingerprint)["files"],
        license=read_license(local_folder(base_source(recipe)) or base.folder),
    )


def _generation_config(run_dir: RunDir, prepared: Merge) -> GenerationConfig | None:
    """That of the adapter, which save_model wrote there; else that of the base."""
    for folder in (run_dir.model, prepared.base.folder):
        if (folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(folder)
    return None
