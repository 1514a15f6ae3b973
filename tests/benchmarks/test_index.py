"""The index of the benchmarks is complete."""

import re
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_every_benchmark_is_in_the_index():
    files = [path for path in FOLDER.glob("*.py") if "__main__" in path.read_text("utf-8")]
    packages = [path.parent for path in FOLDER.glob("*/__main__.py")]
    rows = re.findall(r"^\| `(\w+)", (FOLDER / "README.md").read_text("utf-8"), re.MULTILINE)
    assert {path.stem for path in [*files, *packages]} == {*rows}
