"""Where right and faulty targets lie for a model: what a curve by loss or entropy can tell apart.

    yrun train recipes/legal_compare.yaml output=outputs/plain train.checkpoint.keep=6
    python -m benchmarks.fault_losses outputs/tiny-base/model outputs/plain/checkpoints/step-*

*right* are all targets of the sound rows. *news* are those of them that the first model, which
knows nothing of the field, finds hard (a loss above 3 nats): what the field has to teach. *faulty*
is one target of each row that is known to be wrong: the first that departs from the right answer.
For each model it prints percentiles of their loss, and of the loss beyond the entropy, in nats;
what NLIRG and NLIRG with entropy, as the options set them, weigh them with on average; and how far
its weights lie from those of the first model, as a share of their length.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.sort_quality import ROOT
from yrunner.assembly.dataset import first_examples
from yrunner.assembly.run import Run
from yrunner.console import print_table
from yrunner.data.conversation import TokenizedExample
from yrunner.losses.nlirg import nlirg_weight
from yrunner.losses.token_weights import nlirg_entropy_weight
from yrunner.models.load import load_tokenizer
from yrunner.scoring.measure import score_tokens

# N = targets of all rows

RECIPE = ROOT / "recipes/legal_compare.yaml"
DATA = ROOT / "recipes/data"
BATCH_SIZE = 16
NEWS_ABOVE = 3.0
PERCENTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True)
class Groups:
    """Which targets are right, and which faulty; the others stand in faulty rows."""

    right_N: Tensor
    faulty_N: Tensor


def main() -> None:
    """Print a table for each model."""
    arguments = _parse()
    run = Run.load(RECIPE)
    tokenizer = load_tokenizer(arguments.models[0])
    rows = [json.loads(line) for line in (DATA / "legal_train.jsonl").read_text().splitlines()]
    faults = [json.loads(line) for line in (DATA / "legal_faults.jsonl").read_text().splitlines()]
    right_answers = {fault["row"]: fault["right"] for fault in faults}
    examples = _examples(run, tokenizer, len(rows))
    groups = group_targets(examples, _mended(tokenizer, rows, right_answers))
    first = run.load_model(arguments.models[0])
    is_hard_N = _score(first, tokenizer, examples)[0] > NEWS_ABOVE
    news_N = groups.right_N & is_hard_N
    places = {"right": groups.right_N, "news": news_N, "faulty": groups.faulty_N}
    for source in arguments.models:
        model = run.load_model(source)
        title = f"{source}, moved by {moved(first, model):.3f}"
        _print(title, places, *_score(model, tokenizer, examples), arguments)


@torch.no_grad()
def moved(first: Any, model: Any) -> float:
    """The distance of a model's weights from those of another, over the length of these."""
    before, now = first.state_dict(), model.state_dict()
    distance = sum(float((now[name] - before[name]).square().sum()) for name in before)
    length = sum(float(weight.square().sum()) for weight in before.values())
    return math.sqrt(distance / length)


def group_targets(
    examples: Sequence[TokenizedExample], mended: Mapping[int, TokenizedExample]
) -> Groups:
    """Sort the targets of all rows; `mended` holds the faulty ones, by row, as they should be."""
    right: list[bool] = []
    faulty: list[bool] = []
    for example in examples:
        said = _targets(example)
        should = mended.get(example.origin.row or 0)
        departs = None if should is None else _common_start(said, _targets(should))
        right += [should is None] * len(said)
        faulty += [place == departs for place in range(len(said))]
    return Groups(torch.tensor(right), torch.tensor(faulty))


def _common_start(said: Sequence[int], should: Sequence[int]) -> int:
    """How many tokens are alike before the two depart."""
    pairs = enumerate(zip(said, should, strict=False))
    return next(place for place, (one, other) in pairs if one != other)


def _targets(example: TokenizedExample) -> list[int]:
    return [example.labels[place] for place in example.target_positions]


def _examples(run: Run, tokenizer: Any, number: int) -> list[TokenizedExample]:
    return first_examples(run.sources[0], tokenizer, number, system=run.recipe.data.system)


def _mended(
    tokenizer: Any, rows: Sequence[dict[str, str]], right: Mapping[int, str]
) -> dict[int, TokenizedExample]:
    lines = [
        json.dumps({**row, "output": right.get(number, row["output"])}, ensure_ascii=False)
        for number, row in enumerate(rows, start=1)
    ]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "mended.jsonl"
        file.write_text("\n".join(lines), "utf-8")
        mended = Run.load(RECIPE, [f"data.train.0.file={file}"])
        examples = _examples(mended, tokenizer, len(rows))
    return {number: examples[number - 1] for number in right}


def _score(
    model: Any, tokenizer: Any, examples: Sequence[TokenizedExample]
) -> tuple[Tensor, Tensor]:
    pad_token_id = tokenizer.pad_token_id
    scores = list(score_tokens(model, examples, pad_token_id=pad_token_id, batch_size=BATCH_SIZE))
    return (
        torch.cat([scored.loss_N for scored in scores]),
        torch.cat([scored.entropy_N for scored in scores]),
    )


def _print(
    title: str,
    places: Mapping[str, Tensor],
    loss_N: Tensor,
    entropy_N: Tensor,
    arguments: argparse.Namespace,
) -> None:
    nlirg_N = nlirg_weight(loss_N, **arguments.nlirg)
    with_entropy_N = nlirg_entropy_weight(loss_N, entropy_N, **arguments.nlirg_entropy)
    rows = []
    for name, is_N in places.items():
        cells = [name, int(is_N.sum())]
        for values_N in (loss_N, loss_N - entropy_N):
            shares = torch.tensor(PERCENTILES) / 100
            found = values_N[is_N].double().quantile(shares.double()).tolist()
            cells.append(" ".join(f"{value:6.2f}" for value in found))
        cells += [f"{weight_N[is_N].mean():.2f}" for weight_N in (nlirg_N, with_entropy_N)]
        rows.append(cells)
    named = ", ".join(map(str, PERCENTILES))
    columns = ["targets", "number", f"loss: {named} %", f"loss - entropy: {named} %"]
    print_table(title, [*columns, "nlirg", "nlirg_entropy"], rows)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="the base first")
    for name in ("nlirg", "nlirg-entropy"):
        help_text = 'its parameters as JSON, such as {"sure_center": 2.0}'
        parser.add_argument(f"--{name}", type=json.loads, default={}, help=help_text)
    return parser.parse_args()


if __name__ == "__main__":
    main()
