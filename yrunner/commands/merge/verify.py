"""How a merged model is verified: the texts, the tolerances, and the figures in words."""

import torch

from yrunner.assembly.dataset import first_examples
from yrunner.assembly.run import Run
from yrunner.console import say
from yrunner.errors import ProofError
from yrunner.models.merge.proof import LogitAgreement, Probes, Tolerance

NUM_ROWS = 16
MOST_TOKENS = 128
"""Per text."""
FIXED_TEXTS = (
    "The harbour was quiet that morning. Nobody had told the new keeper that the lamp on the "
    "eastern pier had not been lit for seven years.",
    "第三条 本规定自公布之日起施行。有下列情形之一的，由主管部门责令改正，并处一万元以上三万元以下"
    "罚款。",
    "def mean(values):\n    return sum(values) / len(values)\n\nprint(mean([1, 2, 3.5]))\n",
    "12 + 30 = 42; 7 * 8 = 56; 1,000,000 / 4 = 250,000. 2026-03-01, 09:45.",
)
"""Kinds of text that the recipe's rows may lack."""
BARS = {
    torch.float32: Tolerance(top1_agreement=0.999, mean_kl=1e-6, largest_difference=1e-3),
    torch.float16: Tolerance(top1_agreement=0.99, mean_kl=1e-3),
    torch.bfloat16: Tolerance(top1_agreement=0.97, mean_kl=1e-2),
}
"""Tolerances by the dtype of the merged weights, which round to 24, 11 or 8 bits."""


def probes_of(run: Run) -> Probes:
    """The first training rows, and some fixed texts."""
    tokenizer = run.result_tokenizer
    examples = first_examples(run.sources[0], tokenizer, NUM_ROWS, run.rules)
    rows = [example.input_ids for example in examples]
    fixed = [tokenizer(text).input_ids for text in FIXED_TEXTS]
    return Probes([ids[:MOST_TOKENS] for ids in [*rows, *fixed] if ids])


def judge(likeness: LogitAgreement, tolerance: Tolerance, what: str) -> None:
    """Raise `ProofError`, with the figures, if a result exceeds its tolerance."""
    faults = tolerance.faults(likeness)
    if faults:
        raise ProofError(
            f"the outputs of {what} differ too much: {'; '.join(faults)}",
            remedy="it was removed; please report this, or keep it with merge.verify=false",
        )


def say_likeness(what: str, likeness: LogitAgreement) -> None:
    """Print the figures in one line."""
    say(f"{what}, {likeness.tokens:,} tokens: {_in_words(likeness)}")


def figure_of(what: str, likeness: LogitAgreement) -> tuple[str, str]:
    """The figures for a model card."""
    return f"{what}, {likeness.tokens:,} tokens", _in_words(likeness)


def _in_words(likeness: LogitAgreement) -> str:
    return (
        f"same top token {likeness.top1_agreement:.2%}, "
        f"KL divergence {likeness.mean_kl:.2g} nats, "
        f"logits differ by {likeness.mean_difference:.2g} on average and "
        f"{likeness.largest_difference:.2g} at most"
    )
