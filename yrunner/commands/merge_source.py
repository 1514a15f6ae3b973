"""What a merge is made of: the right base, and the adapters that go onto it."""

from dataclasses import dataclass

from yrunner.commands.base import base_source
from yrunner.commands.base_record import check_base
from yrunner.errors import YRunnerError
from yrunner.models.adapters import find_adapter
from yrunner.models.checkpoint import Checkpoint, open_checkpoint
from yrunner.models.merging import FourBits, Weighted
from yrunner.recipe.schema import Recipe
from yrunner.run_dir import RunDir, read_json

WITH_ADAPTER = ("lora", "qlora")
"""Kinds of tuning whose result is an adapter; that of the others is a whole model."""

ON_QUANTIZED_BASE = ("qlora",)
"""Those of them that store their base in fewer bits while they train."""


@dataclass(frozen=True)
class MergeSource:
    """A model, and what is added to it."""

    base: Checkpoint
    """What the run started from; the run's own result, where that is a whole model."""
    base_key: str | None
    """A hash of what the run started from; None of a run from scratch."""
    adapters: list[Weighted]
    """None at all where whole weights are only written in another form."""
    as_trained: FourBits | None
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


def merge_source(recipe: Recipe, run_dir: RunDir) -> MergeSource:
    """Find base and adapters of a finished run; no weight is read.

    Raises `RunError` for a base that is not the one of the run, `YRunnerError` for settings that
    leave nothing to do, and `ModelError` for a base that cannot be read.
    """
    own = recipe.tuning.kind in WITH_ADAPTER
    _check_there_is_work(recipe, own=own)
    adapters = [Weighted(run_dir.model, recipe.merge.weight)] if own else []
    for added in recipe.merge.adapters:
        folder = find_adapter(added.adapter)
        if folder is None:
            raise YRunnerError(
                f"merge.adapters: {added.adapter} holds no adapter",
                remedy="name a folder with an adapter_config.json",
            )
        adapters.append(Weighted(folder, added.weight))
    if not own:
        key = read_json(run_dir.base)["key"] if run_dir.base.exists() else None
        return MergeSource(open_checkpoint(str(run_dir.model)), key, adapters, None)
    key = check_base(recipe, run_dir)
    return MergeSource(
        open_checkpoint(base_source(recipe)),
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


def _four_bits(recipe: Recipe) -> FourBits | None:
    settings = recipe.merge.as_trained
    if settings is None:
        return None
    return FourBits(settings.quant_type, settings.double_quant)
