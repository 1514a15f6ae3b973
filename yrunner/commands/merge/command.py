"""`yrun merge`: merge base and adapter into one model, verify its outputs, and export it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from yrunner.assembly.measure import Measured
from yrunner.assembly.record import check_base
from yrunner.assembly.report import model_card, result_in_words
from yrunner.assembly.run import Run
from yrunner.commands.merge.export import check_exports, export
from yrunner.commands.merge.verify import BARS, figure_of, judge, probes_of, say_likeness
from yrunner.console import progress, say
from yrunner.errors import ModelError, YRunnerError
from yrunner.evaluation.figure_lines import BASE, TUNED, figure_lines, summary_lines
from yrunner.evaluation.results import ModelResults
from yrunner.machine import lower_mmap_threshold
from yrunner.models.adapters import find_adapter
from yrunner.models.hub import read_license
from yrunner.models.load import DTYPES
from yrunner.models.local import local_folder
from yrunner.models.merge.plan import BaseQuantization, Merge, WeightedAdapter, prepare_merge
from yrunner.models.merge.proof import LogitAgreement, compare, folder_logits, merge_logits
from yrunner.models.merge.safetensors_io import SafetensorsFolder, open_checkpoint
from yrunner.models.merge.write import changed_weights, merged_sizes, write_merged
from yrunner.models.quantization import StoredQuantization
from yrunner.models.save import ModelCard, complete_folder
from yrunner.recipe.schema.recipe import Recipe
from yrunner.storage.run_dir import RunDir, read_json, whole_folder, write_json

WITH_ADAPTER = ("lora", "qlora")
"""Kinds of tuning whose result is an adapter, not a whole model."""
ON_QUANTIZED_BASE = ("qlora",)
"""Kinds of tuning whose base is quantized during training."""


@dataclass(frozen=True)
class MergeSource:
    """A base model, and the adapters to merge into it."""

    base: SafetensorsFolder
    """The base of the run, or its result if that is a whole model."""
    base_key: str | None
    """The key of the run's base; None for a run from scratch."""
    adapters: list[WeightedAdapter]
    """Empty if whole weights are only exported."""
    as_trained: BaseQuantization | None
    trained_coarsely: bool = False
    """Whether the base was quantized during training."""
    stored: StoredQuantization | None = None
    """How the files of the base are quantized."""

    @property
    def described(self) -> str:
        """How the base's weights are loaded."""
        if self.stored is not None:
            return f"as trained: dequantized from its files, {self.stored}"
        if self.as_trained is not None:
            return f"as trained: dequantized from {self.as_trained.quant_type}"
        if self.trained_coarsely:
            return "exact weights, not the quantized ones of the training"
        return "exact weights"

    @property
    def result(self) -> str:
        """What is compared with what."""
        if self.adapters:
            return "merged model against base and adapter"
        return "written model against the trained one"


def merge(path: Path, overrides: list[str]) -> None:
    """Merge the adapter of a finished run into its base, verify the result, and export it.

    Whole weights are only exported. Raises `ProofError`, and leaves no merged model, if its outputs
    differ. Everything that can be checked first is checked before weights are read.
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
    which = result_in_words(run_dir)
    if which and recipe.tuning.kind in WITH_ADAPTER:
        say(f"adapter: {which}")
    run_dir.merge_figures.unlink(missing_ok=True)  # of a model that is about to be replaced
    card = merged_card(run, source.base_key)
    figures = _write(run, prepared, source, card)
    write_json(run_dir.merge_figures, figures)
    say(f"merged model: {run_dir.merged}")
    export(run, figures, card)


def _write(run: Run, prepared: Merge, source: MergeSource, card: ModelCard) -> dict[str, Any]:
    """Write the merged model, which appears only when verified; return its figures."""
    recipe, run_dir, tokenizer = run.recipe, run.folder, run.result_tokenizer
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
    if not expected_NV.isfinite().all():
        raise ModelError(
            f"the trained model in {run.folder.model} predicts NaN or infinity, so the merge "
            "cannot be verified",
            remedy="train it again with a lower train.learning_rate",
        )
    return compare(expected_NV, folder_logits(folder, probes, trust_remote_code=trusts))


def _generation_config(run_dir: RunDir, base: SafetensorsFolder) -> GenerationConfig | None:
    """That of the run's result, if any, else that of the base."""
    for folder in (run_dir.model, base.folder):
        if (folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(folder)
    return None


def merge_source(run: Run) -> MergeSource:
    """Find base and adapters of a finished run without reading weights.

    Raises `RunError` for another base than that of the run, `YRunnerError` if there is nothing to
    do, and `ModelError` for an unreadable base.
    """
    recipe, run_dir = run.recipe, run.folder
    own = recipe.tuning.kind in WITH_ADAPTER
    _check_there_is_work(recipe, own=own)
    adapters = [WeightedAdapter(run_dir.model, recipe.merge.weight)] if own else []
    for added in recipe.merge.adapters:
        folder = find_adapter(added.adapter)
        if folder is None:
            raise YRunnerError(
                f"merge.adapters: {added.adapter} has no adapter",
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
        stored=run.stored_quantization,
    )


def _check_there_is_work(recipe: Recipe, *, own: bool) -> None:
    """Raise `YRunnerError` for a whole model with nothing to do."""
    if own:
        return
    kind, merge = recipe.tuning.kind, recipe.merge
    for key, is_set in (
        ("merge.as_trained", merge.as_trained is not None),
        ("merge.weight", merge.weight != 1),
    ):
        if is_set:
            raise YRunnerError(
                f"{key} needs an adapter, but tuning.kind {kind} trains whole weights",
                remedy=f"remove {key}",
            )
    if merge.dtype == "auto" and not (merge.gguf or merge.push or merge.adapters):
        raise YRunnerError(
            f"tuning.kind {kind} trains whole weights, which need no merging",
            remedy="to export them, set merge.dtype, merge.gguf or merge.push",
        )


def _four_bits(recipe: Recipe) -> BaseQuantization | None:
    settings = recipe.merge.as_trained
    if settings is None:
        return None
    return BaseQuantization(settings.quant_type, settings.double_quant)


def merged_card(run: Run, base_key: str | None) -> ModelCard:
    """The card before verification: figures of `yrun eval` if it ran, else of the training."""
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
    """The main figure of each task and the summaries, of result and base."""
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
