"""The folder of what a base has written, and its files."""

from pathlib import Path


class ReplayDir:
    """`outputs/replay/<base>-<key>`: what one base wrote, whatever is trained from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = folder / "rows.jsonl"
        """To be learned from; it may be edited by hand."""
        self.held_out = folder / "held_out.jsonl"
        """For the gauge: nothing is ever learned from these."""
        self.dropped = folder / "dropped.jsonl"
        """What was of no use, and why."""
        self.record = folder / "replay.json"
        """The base, how it wrote, how many drafts there were, and what became of them."""
        self.lock = folder / ".lock"

    def tops(self, key: str) -> Path:
        """The base's likeliest tokens for some rows; see scoring/base_answers.py."""
        return self.folder / f"tops-{key}.safetensors"

    def fisher(self, key: str) -> Path:
        """What the base depends on; see training/fisher.py."""
        return self.folder / f"fisher-{key}.safetensors"
