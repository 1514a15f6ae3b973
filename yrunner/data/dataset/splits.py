"""What a run learns from and is watched on, and the check that nothing stands in its way."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from yrunner.data.dataset.examples import Examples
from yrunner.data.dataset.quality import Finding, find
from yrunner.data.dataset.row_report import (
    FileReport,
    Refusal,
    describe_refusals,
    num_rows,
    refusal_remedy,
)
from yrunner.errors import YRunnerError

Policy = Literal["refuse", "drop", "cut", "split"]


def no_examples() -> Examples:
    """Examples of no file."""
    return Examples.of([])


@dataclass
class Prepared:
    """Everything that a run learns from, is watched on, and left out."""

    train: Examples = field(default_factory=no_examples)
    validation: Examples = field(default_factory=no_examples)
    reports: list[FileReport] = field(default_factory=list)

    def add(self, purpose: Literal["train", "validation"], examples: Examples) -> None:
        """Put more examples behind those that are there."""
        setattr(self, purpose, Examples.joined([getattr(self, purpose), examples]))

    def set_validation_aside(self, share: float, seed: int) -> None:
        """Move a random share of the training examples to validation, at least one of each.

        Raises `YRunnerError` where there are fewer than two.
        """
        if len(self.train) < 2:
            raise YRunnerError(
                "data.validation_share needs two rows or more, one to learn from and one to "
                f"validate on; there is {len(self.train)}",
                remedy="add rows, or remove data.validation_share",
            )
        number = min(max(1, round(len(self.train) * share)), len(self.train) - 1)
        is_chosen = np.zeros(len(self.train), bool)
        is_chosen[np.random.default_rng(seed).permutation(len(self.train))[:number]] = True
        aside = self.train.select(np.flatnonzero(is_chosen))
        self.train = self.train.select(np.flatnonzero(~is_chosen))
        self.validation = Examples.joined([self.validation, aside])
        # The files of the training examples are those of the training reports, in order.
        reports = [report for report in self.reports if report.purpose == "train"]
        for index, report in enumerate(reports):
            report.set_aside = int((aside.file_E == index).sum())

    @cached_property
    def findings(self) -> list[Finding]:
        """What stands out among the rows, see findings.py."""
        return find(self.train, self.validation)

    def check(self, *, too_long: Policy, invalid: Policy) -> None:
        """Raise `YRunnerError` with the counts and the first faulty rows where the rules stop the
        run, or where nothing is left to learn from or to validate on.
        """
        refusals = [row for report in self.reports for row in report.refusals]
        stop_on(refusals, too_long=too_long, invalid=invalid)
        self._check_something_is_left("train", self.train, "to learn from")
        self._check_something_is_left("validation", self.validation, "to validate on")

    def _check_something_is_left(self, purpose: str, examples: Examples, use: str) -> None:
        reports = [report for report in self.reports if report.purpose == purpose]
        if len(examples) or not reports:
            return
        refusals = [row for report in reports for row in report.refusals]
        too_long = any(refusal.kind == "too_long" for refusal in refusals)
        raise YRunnerError(
            describe_refusals(refusals, f"no row is left {use}"),
            remedy="mend the rows, or raise data.max_length" if too_long else "mend the rows",
        )


def stop_on(refusals: Sequence[Refusal], *, too_long: Policy, invalid: Policy) -> None:
    """Raise `YRunnerError` where the recipe stops a run for one of these rows."""
    policy = {"too_long": too_long, "invalid": invalid}
    # What cannot be cut or split (a conversation that is too long to be split) stops the run, too.
    stopping = [refusal for refusal in refusals if policy[refusal.key] != "drop"]
    if stopping:
        raise YRunnerError(
            describe_refusals(stopping, f"{num_rows(len(stopping))} cannot be learned from"),
            remedy=refusal_remedy(stopping),
        )
