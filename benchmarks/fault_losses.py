"""Can loss or entropy tell faulty targets from correct ones that are hard to learn?

    yrun train recipes/legal_compare.yaml output=outputs/plain train.checkpoint.keep=6
    python -m benchmarks.fault_losses outputs/tiny-base/model outputs/plain/checkpoints/step-*

Compares three groups of targets. *correct*: all targets of the rows without a fault. *news*: those
of them that are hard for the first model, which knows nothing of the field (a loss above 3 nats).
*faulty*: one target of each faulty row, the first that differs from the correct answer. Prints for
each model percentiles of the loss and of loss minus entropy, in nats, and the mean weights that
NLIRG and NLIRG with entropy give them. Also prints the distance of the model's weights from those
of the first model, relative to their norm.
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

from benchmarks.paths import RECIPES, TOY_DATA
from yrunner.assembly.dataset import first_examples
from yrunner.assembly.run import Run
from yrunner.console import print_table
from yrunner.data.conversation import TokenizedExample
from yrunner.losses.nlirg import nlirg_weight
from yrunner.losses.token_weights import nlirg_entropy_weight
from yrunner.models.load import load_tokenizer
from yrunner.scoring.measure import score_tokens

# N = targets of all rows

RECIPE = RECIPES / "legal_compare.yaml"
BATCH_SIZE = 16
NEWS_ABOVE = 3.0
PERCENTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True)
class Groups:
    """Masks of correct and faulty targets; other targets of faulty rows are in neither."""

    correct_N: Tensor
    faulty_N: Tensor


def main() -> None:
    """Print a table for each model."""
    arguments = _parse()
    run = Run.load(RECIPE)
    tokenizer = load_tokenizer(arguments.models[0])
    rows, faults = (_read_rows(TOY_DATA / f"legal_{name}.jsonl") for name in ("train", "faults"))
    correct_answers = {fault["row"]: fault["right"] for fault in faults}
    examples = _examples(run, tokenizer, len(rows))
    groups = group_targets(examples, _correct_examples(tokenizer, rows, correct_answers))
    first = run.load_model(arguments.models[0])
    is_hard_N = _score(first, tokenizer, examples)[0] > NEWS_ABOVE
    news_N = groups.correct_N & is_hard_N
    masks = {"correct": groups.correct_N, "news": news_N, "faulty": groups.faulty_N}
    for source in arguments.models:
        model = run.load_model(source)
        title = f"{source}, distance {relative_distance(first, model):.3f}"
        _print(title, masks, *_score(model, tokenizer, examples), arguments)


@torch.no_grad()
def relative_distance(first: Any, model: Any) -> float:
    """Return the distance of the weights from those of the first model, relative to their norm."""
    before, after = first.state_dict(), model.state_dict()
    distance = sum(float((after[name] - before[name]).square().sum()) for name in before)
    norm = sum(float(weight.square().sum()) for weight in before.values())
    return math.sqrt(distance / norm)


def group_targets(
    examples: Sequence[TokenizedExample], corrected: Mapping[int, TokenizedExample]
) -> Groups:
    """Group the targets of all rows; `corrected` holds the correct examples of the faulty rows."""
    correct: list[bool] = []
    faulty: list[bool] = []
    for example in examples:
        targets = _targets(example)
        expected = corrected.get(example.origin.row or 0)
        first_fault = None if expected is None else _common_start(targets, _targets(expected))
        correct += [expected is None] * len(targets)
        faulty += [index == first_fault for index in range(len(targets))]
    return Groups(torch.tensor(correct), torch.tensor(faulty))


def _common_start(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of equal tokens before the first difference."""
    pairs = enumerate(zip(first, second, strict=False))
    return next(index for index, (one, other) in pairs if one != other)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _targets(example: TokenizedExample) -> list[int]:
    return [example.labels[position] for position in example.target_positions]


def _examples(run: Run, tokenizer: Any, num_rows: int) -> list[TokenizedExample]:
    return first_examples(run.sources[0], tokenizer, num_rows, run.rules)


def _correct_examples(
    tokenizer: Any, rows: Sequence[dict[str, str]], correct: Mapping[int, str]
) -> dict[int, TokenizedExample]:
    lines = [
        json.dumps({**row, "output": correct.get(number, row["output"])}, ensure_ascii=False)
        for number, row in enumerate(rows, start=1)
    ]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "corrected.jsonl"
        file.write_text("\n".join(lines), "utf-8")
        corrected = Run.load(RECIPE, [f"data.train.0.file={file}"])
        examples = _examples(corrected, tokenizer, len(rows))
    return {number: examples[number - 1] for number in correct}


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
    masks: Mapping[str, Tensor],
    loss_N: Tensor,
    entropy_N: Tensor,
    arguments: argparse.Namespace,
) -> None:
    nlirg_N = nlirg_weight(loss_N, **arguments.nlirg)
    with_entropy_N = nlirg_entropy_weight(loss_N, entropy_N, **arguments.nlirg_entropy)
    rows = []
    for name, mask_N in masks.items():
        cells = [name, int(mask_N.sum())]
        for values_N in (loss_N, loss_N - entropy_N):
            shares = torch.tensor(PERCENTILES) / 100
            percentiles = values_N[mask_N].double().quantile(shares.double()).tolist()
            cells.append(" ".join(f"{value:6.2f}" for value in percentiles))
        cells += [f"{weight_N[mask_N].mean():.2f}" for weight_N in (nlirg_N, with_entropy_N)]
        rows.append(cells)
    percents = ", ".join(map(str, PERCENTILES))
    columns = ["targets", "number", f"loss: {percents} %", f"loss - entropy: {percents} %"]
    print_table(title, [*columns, "nlirg", "nlirg_entropy"], rows)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="models to compare, the base first")
    for name in ("nlirg", "nlirg-entropy"):
        help_text = f'parameters of {name} as JSON, such as {{"sure_center": 2.0}}'
        parser.add_argument(f"--{name}", type=json.loads, default={}, help=help_text)
    return parser.parse_args()


if __name__ == "__main__":
    main()
