"""`yrun merge`: one model of base and adapter, proven to answer as the two did, and exported."""

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from yrunner.commands.finished import finished_run, tuned_tokenizer
from yrunner.commands.merge_card import merged_card
from yrunner.commands.merge_export import check_exports, export
from yrunner.commands.merge_proof import BARS, figure_of, judge, probes_of, say_likeness
from yrunner.commands.merge_source import MergeSource, merge_source
from yrunner.console import progress, say
from yrunner.models.checkpoint import Checkpoint
from yrunner.models.export import complete_folder
from yrunner.models.folder_logits import folder_logits, merge_logits
from yrunner.models.freed_memory import give_back_freed_memory
from yrunner.models.load import DTYPES
from yrunner.models.merged_weights import changed_weights, merged_sizes, write_merged
from yrunner.models.merging import Merge, Weighted, prepare_merge
from yrunner.models.proof import Likeness, compare
from yrunner.recipe.load import load_recipe
from yrunner.recipe.schema import Recipe
from yrunner.run_dir import RunDir, whole_folder, write_json


def merge(path: Path, overrides: list[str]) -> None:
    """Merge the adapter of a finished run into its base, prove that, and export it.

    The result of a run that trained whole weights is written anew, in the form that is asked for.
    Raises `ProofError`, and leaves no merged model, where it answers differently. All that can be
    known to fail is looked for before the first weight is read.
    """
    recipe = load_recipe(path, overrides)
    run_dir = finished_run(recipe)
    run_dir.check(run_dir.merged, run_dir.gguf)
    source = merge_source(recipe, run_dir)
    check_exports(recipe, source.base)
    give_back_freed_memory()
    prepared = prepare_merge(
        source.base,
        source.adapters,
        as_trained=source.as_trained,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    say(f"base: {source.base.folder} ({source.described})")
    run_dir.merge_figures.unlink(missing_ok=True)  # those of a model that is about to go
    figures = _write(recipe, run_dir, prepared, source)
    write_json(run_dir.merge_figures, figures)
    say(f"merged model: {run_dir.merged}")
    export(recipe, run_dir, figures)


def _write(recipe: Recipe, run_dir: RunDir, prepared: Merge, source: MergeSource) -> dict[str, Any]:
    """Write the merged model, and give the figures of its proof; it is there when proven."""
    tokenizer = tuned_tokenizer(run_dir)
    card = merged_card(recipe, run_dir, source.base_key)
    dtype = None if recipe.merge.dtype == "auto" else DTYPES[recipe.merge.dtype]
    result_dtype = dtype or source.base.main_dtype()
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
            likeness = _prove(recipe, prepared, source.adapters, partial, tokenizer)
            say_likeness(source.result, likeness)
            judge(likeness, BARS[result_dtype], "the merged model")
            card.figures.append(figure_of(source.result, likeness))
        complete_folder(partial, _generation_config(run_dir, source.base), tokenizer, card)
    return {
        "base": str(source.base.folder),
        "base_key": source.base_key,
        "base_as": source.described,
        "adapters": {str(adapter.folder): adapter.weight for adapter in source.adapters},
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


def _generation_config(run_dir: RunDir, base: Checkpoint) -> GenerationConfig | None:
    """That of the run's result, which save_model wrote there; else that of the base."""
    for folder in (run_dir.model, base.folder):
        if (folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(folder)
    return None
