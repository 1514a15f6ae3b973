"""Constants shared by all modules."""

IGNORE_INDEX = -100
"""Label of a token that is only context and not a target; PyTorch's default."""
