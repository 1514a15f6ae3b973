"""Numbers that mean the same to every part of the tool."""

IGNORE_INDEX = -100
"""Label of a token that is context only: its loss never counts. PyTorch's own default."""
