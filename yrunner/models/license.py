"""Under which licence a model was published, as its model card says."""

from pathlib import Path

import yaml
from huggingface_hub import metadata_load


def read_license(folder: Path) -> str | None:
    """The licence id in the front matter of a model's README.md; None where it names none."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        content = metadata_load(card)
    except yaml.YAMLError:
        return None  # a card that cannot be read names no licence
    named = content.get("license") if isinstance(content, dict) else None
    return named if isinstance(named, str) else None
