"""How closely do merged models match the tuned ones? python -m benchmarks.merge_agreement

Tunes the toy base with every kind of tuning, with packing off and on, and merges each result in
float32 and in bfloat16. Prints what the proof of `yrun merge` measures: the largest difference of a
logit in float32, and how often both models agree on the likeliest next token in bfloat16. The
tuning is short, because answers do not have to be right to be equal.
"""

import argparse
import json
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.paths import RECIPES
from yrunner.commands.merge.command import merge
from yrunner.commands.train import train

RECIPE = RECIPES / "legal_sft.yaml"
TUNINGS = {
    "lora": [],
    "dora": ["tuning.variant=dora"],
    "rslora": ["tuning.variant=rslora"],
    "freeze": ["tuning={kind: freeze}"],
    "full": ["tuning={kind: full}"],
    "qlora": ["tuning={kind: qlora, rank: 64, alpha: 128}"],
}


def main() -> None:
    """Train and merge every combination, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", choices=list(TUNINGS), nargs="*", default=list(TUNINGS))
    options = parser.parse_args()
    lines = []
    with TemporaryDirectory() as name:
        for number, (tuning, packing) in enumerate(product(options.only, ("false", "true"))):
            changes = [
                f"name=toy-{number}",
                f"output={name}/{number}",
                f"train.max_steps={options.steps}",
                f"data.packing={packing}",
                "train.epochs=null",
                "eval={}",
                *TUNINGS[tuning],
            ]
            train(RECIPE, changes, resume=False, overwrite=False)
            exact, rounded = (merge_and_prove(changes, dtype) for dtype in ("float32", "bfloat16"))
            lines.append(
                f"{tuning:<8} {packing:<8} {exact['largest_difference']:10.1e} "
                f"{rounded['top1_agreement']:10.2%} {rounded['tokens']:8,}"
            )
    print(f"{'tuning':<8} {'packing':<8} {'float32':>10} {'bfloat16':>10} {'tokens':>8}")
    print("\n".join(lines))


def merge_and_prove(changes: list[str], dtype: str) -> dict[str, float]:
    """Merge into this dtype and return what the proof measured."""
    merge(RECIPE, [*changes, f"merge.dtype={dtype}"])
    output = next(change for change in changes if change.startswith("output="))
    figures = json.loads((Path(output.removeprefix("output=")) / "merge.json").read_text("utf-8"))
    measured: dict[str, float] = figures["proof"]
    return measured


if __name__ == "__main__":
    main()
