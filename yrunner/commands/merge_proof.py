"""What a merge is proven on, how near it has to come, and what a person is told of it."""

from typing import Any

import torch

from yrunner.commands.train_data import first_examples
from yrunner.console import say
from yrunner.errors import ProofError
from yrunner.models.proof import Bar, Likeness, Probes
from yrunner.recipe.schema import Recipe

NUM_ROWS = 16
MOST_TOKENS = 128
"""Of each text that is looked at."""

FIXED_TEXTS = (
    "The harbour was quiet that morning. Nobody had told the new keeper that the lamp on the "
    "eastern pier had not been lit for seven years.",
    "第三条 本规定自公布之日起施行。有下列情形之一的，由主管部门责令改正，并处一万元以上三万元以下"
    "罚款。",
    "def mean(values):\n    return sum(values) / len(values)\n\nprint(mean([1, 2, 3.5]))\n",
    "12 + 30 = 42; 7 * 8 = 56; 1,000,000 / 4 = 250,000. 2026-03-01, 09:45.",
)
"""Texts of kinds that a recipe's own rows may lack."""

BARS = {
    torch.float32: Bar(top1_agreement=0.999, mean_kl=1e-6, largest_difference=1e-3),
    torch.float16: Bar(top1_agreement=0.99, mean_kl=1e-3),
    torch.bfloat16: Bar(top1_agreement=0.97, mean_kl=1e-2),
}
"""By the dtype of the merged weights: each is rounded to 24, 11 or 8 bits."""


def probes_of(recipe: Recipe, tokenizer: Any) -> Probes:
    """The first rows of the recipe's data, as they are learned, and some fixed texts."""
    rows = [example.input_ids for example in first_examples(recipe, tokenizer, NUM_ROWS)]
    fixed = [tokenizer(text).input_ids for text in FIXED_TEXTS]
    return Probes([ids[:MOST_TOKENS] for ids in [*rows, *fixed] if ids])


def judge(likeness: Likeness, bar: Bar, what: str) -> None:
    """Raise `ProofError`, with the figures, for a result that falls short of its bar."""
    faults = bar.faults(likeness)
    if faults:
        raise ProofError(
            f"{what} does not answer as it should: {'; '.join(faults)}",
            remedy="it was not kept; please report this, or see what it is with merge.verify=false",
        )


def say_likeness(what: str, likeness: Likeness) -> None:
    """Print the figures in one line."""
    say(f"{what}, {likeness.tokens:,} tokens: {_in_words(likeness)}")


def figure_of(what: str, likeness: Likeness) -> tuple[str, str]:
    """The same for a model card."""
    return f"{what}, {likeness.tokens:,} tokens", _in_words(likeness)


def _in_words(likeness: Likeness) -> str:
    return (
        f"same likeliest token {likeness.top1_agreement:.2%}, "
        f"divergence {likeness.mean_kl:.2g} nats, "
        f"logits differ by {likeness.mean_difference:.2g} on average and "
        f"{likeness.largest_difference:.2g} at most"
    )
