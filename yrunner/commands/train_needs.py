"""What a training needs of this machine, looked for before any time is spent."""

from yrunner.models.quantized import need_bitsandbytes
from yrunner.recipe.schema import Recipe
from yrunner.recipe.schema_model import QloraTuning
from yrunner.training.compilation import check_compiler
from yrunner.training.memory import OF_BITSANDBYTES
from yrunner.training.trackers import check_trackers


def check_needs(recipe: Recipe) -> None:
    """Raise `MissingError` for a package or a compiler that is not there."""
    check_trackers(recipe.train.trackers)
    if recipe.train.torch_compile:
        check_compiler()
    if recipe.train.optimizer in OF_BITSANDBYTES:
        need_bitsandbytes(f"train.optimizer {recipe.train.optimizer}")
    if isinstance(recipe.tuning, QloraTuning):
        need_bitsandbytes("tuning.kind qlora")
