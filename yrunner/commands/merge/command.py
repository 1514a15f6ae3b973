"""`yrun merge`: one model of base and adapter, proven to answer as the two did, and exported.

The card of a merged model: where it comes from, and what its run and evaluation measured.

What a merge is made of: the right base, and the adapters that go onto it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from yrunner.assembly.measure import Measured
from yrunner.assembly.record import check_base
from yrunner.assembly.report import model_card
from yrunner.assembly.run import Run
from yrunner.commands.merge.export import (
    BARS,
    check_exports,
    export,
    figure_of,
    judge,
    probes_of,
    say_likeness,
)
from yrunner.console import progress, say
from yrunner.errors import YRunnerError
from yrunner.evaluation.figure_lines import BASE, TUNED, figure_lines, summary_lines
from yrunner.evaluation.results import ModelResults
from yrunner.models.adapters import find_adapter
from yrunner.models.hub import read_license
from yrunner.models.load import DTYPES
from yrunner.models.local import local_folder, lower_mmap_threshold
from yrunner.models.merge.plan import BaseQuantization, Merge, WeightedAdapter, prepare_merge
from yrunner.models.merge.proof import LogitAgreement, compare, folder_logits, merge_logits
from yrunner.models.merge.safetensors_io import SafetensorsFolder, open_checkpoint
from yrunner.models.merge.write import changed_weights, merged_sizes, write_merged
from yrunner.models.save import ModelCard, complete_folder
from yrunner.recipe.schema.recipe import Recipe
from yrunner.storage.run_dir import RunDir, read_json, whole_folder, write_json


def merged_card(run: Run, base_key: str | None) -> ModelCard:
    """The card without the figures of a proof.

    What `yrun eval` measured stands in it where it was run, else the answers of the training.
    """
    run_dir = run.folder
    before, after = Measured.load(run_dir.before), Measured.load(run_dir.after)
    figures = _evaluated(read_json(run_dir.eval)) if run_dir.eval.exists() else []
    card = model_card(
        run,
        before,
        Measured({}) if figures else after,
        base_key=base_key,
        data_hashes=read_json(run_dir.fingerprint)["files"],
        license=_license(run),
    )
    card.figures.extend(figures)
    return card


def _license(run: Run) -> str | None:
    if run.recipe.model.base is None:
        return None
    folder = local_folder(run.base_source)
    return None if folder is None else read_license(folder)


def _evaluated(content: dict[str, Any]) -> list[tuple[str, str]]:
    """The main figure of each task and the summaries, of the result and of the base beside it."""
    read = [ModelResults.from_json(model) for model in content["models"]]
    models = {model.description: model for model in read}
    if TUNED not in models:
        return []
    shown = [models[name] for name in (BASE, TUNED) if name in models]
    headlines = {(name, task.headline) for name, task in models[TUNED].tasks.items()}
    lines = [line for line in figure_lines(shown) if line[:2] in headlines]
    figures = []
    for group, figure, reached in [*lines, *summary_lines(shown)]:
        *before, now = ("–" if part is None else part[0] for part in reached)
        beside = f" (base: {before[0]})" if before else ""
        figures.append((f"{group}: {figure}", f"{now}{beside}"))
    return figures


WITH_ADAPTER = ("lora", "qlora")
"""Kinds of tuning whose result is an adapter; that of the others is a whole model."""

ON_QUANTIZED_BASE = ("qlora",)
"""Those of them that store their base in fewer bits while they train."""


@dataclass(frozen=True)
class MergeSource:
    """A model, and what is added to it."""

    base: SafetensorsFolder
    """What the run started from; the run's own result, where that is a whole model."""
    base_key: str | None
    """A hash of what the run started from; None of a run from scratch."""
    adapters: list[WeightedAdapter]
    """None at all where whole weights are only written in another form."""
    as_trained: BaseQuantization | None
    trained_coarsely: bool = False
    """Whether the base was quantized while the adapter was trained."""

    @property
    def described(self) -> str:
        """How the weights of the base are taken."""
        if self.as_trained is not None:
            return f"as trained: {self.as_trained.quant_type} made exact again"
        if self.trained_coarsely:
            return "exact weights, not the quantized ones that the adapter was trained on"
        return "exact weights"

    @property
    def result(self) -> str:
        """What is proven to be what, in words."""
        if self.adapters:
            return "merged model against base and adapter"
        return "written model against the trained one"


def merge_source(run: Run) -> MergeSource:
    """Find base and adapters of a finished run; no weight is read.

    Raises `RunError` for a base that is not the one of the run, `YRunnerError` for settings that
    leave nothing to do, and `ModelError` for a base that cannot be read.
    """
    recipe, run_dir = run.recipe, run.folder
    own = recipe.tuning.kind in WITH_ADAPTER
    _check_there_is_work(recipe, own=own)
    adapters = [WeightedAdapter(run_dir.model, recipe.merge.weight)] if own else []
    for added in recipe.merge.adapters:
        folder = find_adapter(added.adapter)
        if folder is None:
            raise YRunnerError(
                f"merge.adapters: {added.adapter} holds no adapter",
                remedy="name a folder with an adapter_config.json",
            )
        adapters.append(WeightedAdapter(folder, added.weight))
    if not own:
        key = read_json(run_dir.base)["key"] if run_dir.base.exists() else None
        return MergeSource(open_checkpoint(str(run_dir.model)), key, adapters, None)
    key = check_base(run)
    return MergeSource(
        open_checkpoint(run.base_source),
        key,
        adapters,
        _four_bits(recipe),
        trained_coarsely=recipe.tuning.kind in ON_QUANTIZED_BASE,
    )


def _check_there_is_work(recipe: Recipe, *, own: bool) -> None:
    """Raise `YRunnerError` for a whole model that nothing is to be done with."""
    if own:
        return
    kind, merge = recipe.tuning.kind, recipe.merge
    for key, is_set in (
        ("merge.as_trained", merge.as_trained is not None),
        ("merge.weight", merge.weight != 1),
    ):
        if is_set:
            raise YRunnerError(
                f"{key} is for an adapter, and tuning.kind {kind} leaves whole weights",
                remedy=f"leave out {key}",
            )
    if merge.dtype == "auto" and not (merge.gguf or merge.push or merge.adapters):
        raise YRunnerError(
            f"tuning.kind {kind} leaves whole weights",
            remedy="nothing needs merging; to export them, set merge.dtype, merge.gguf or "
            "merge.push",
        )


def _four_bits(recipe: Recipe) -> BaseQuantization | None:
    settings = recipe.merge.as_trained
    if settings is None:
        return None
    return BaseQuantization(settings.quant_type, settings.double_quant)


def merge(path: Path, overrides: list[str]) -> None:
    """Merge the adapter of a finished run into its base, prove that, and export it.

    The result of a run that trained whole weights is written anew, in the form that is asked for.
    Raises `ProofError`, and leaves no merged model, where it answers differently. All that can be
    known to fail is looked for before the first weight is read.
    """
    run = Run.load(path, overrides)
    run.require_result()
    recipe, run_dir = run.recipe, run.folder
    run_dir.check(run_dir.merged, run_dir.gguf)
    source = merge_source(run)
    check_exports(run, source.base)
    lower_mmap_threshold()
    prepared = prepare_merge(
        source.base,
        source.adapters,
        as_trained=source.as_trained,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    say(f"base: {source.base.folder} ({source.described})")
    run_dir.merge_figures.unlink(missing_ok=True)  # those of a model that is about to go
    figures = _write(run, prepared, source)
    write_json(run_dir.merge_figures, figures)
    say(f"merged model: {run_dir.merged}")
    export(run, figures)


def _write(run: Run, prepared: Merge, source: MergeSource) -> dict[str, Any]:
    """Write the merged model, and give the figures of its proof; it is there when proven."""
    recipe, run_dir, tokenizer = run.recipe, run.folder, run.result_tokenizer
    card = merged_card(run, source.base_key)
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
            likeness = _prove(run, prepared, source.adapters, partial)
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
    run: Run, prepared: Merge, adapters: list[WeightedAdapter], folder: Path
) -> LogitAgreement:
    probes = probes_of(run)
    trusts = run.recipe.model.trust_remote_code
    expected_NV = merge_logits(prepared, adapters, probes, trust_remote_code=trusts)
    return compare(expected_NV, folder_logits(folder, probes, trust_remote_code=trusts))


def _generation_config(run_dir: RunDir, base: SafetensorsFolder) -> GenerationConfig | None:
    """That of the run's result, which save_model wrote there; else that of the base."""
    for folder in (run_dir.model, base.folder):
        if (folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(folder)
    return None
