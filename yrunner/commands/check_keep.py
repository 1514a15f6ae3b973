"""What holding on to the base costs, for `yrun check`: memory and disk beside those of training."""

from yrunner.commands.keep_data import has_base_beneath
from yrunner.recipe.schema import Recipe
from yrunner.recipe.schema_keep import Ewc, KeepRows, SelfReplay

BYTES_OF_A_SPRING = 8
"""Fisher information and start of a trained weight, both in float32."""
BYTES_OF_A_TOKEN = 8
"""Id and logarithm of one of the base's likeliest tokens."""
MIB = 2**20


def keep_notes(recipe: Recipe, num_trained: int) -> list[str]:
    """Sentences for the recipe's `keep`; none where it holds on to nothing."""
    match recipe.keep:
        case Ewc():
            size = num_trained * BYTES_OF_A_SPRING / MIB
            return [
                f"keep ewc: {size:,.1f} MiB more on each device, for the Fisher information and "
                f"the start of {num_trained:,} trained weights; half of that on disk"
            ]
        case SelfReplay(by="kl", top=top) | KeepRows(by="kl", top=top):
            if has_base_beneath(recipe):
                return [
                    "keep: the base is the model with its adapter off; a forward pass more for "
                    "the kept rows, and no weight"
                ]
            size = recipe.data.max_length * top * BYTES_OF_A_TOKEN / MIB
            return [
                f"keep: the base's {top:,} likeliest tokens lie on disk and in the machine's "
                f"memory, at most {size:,.2f} MiB for a row of {recipe.data.max_length:,} tokens"
            ]
    return []
