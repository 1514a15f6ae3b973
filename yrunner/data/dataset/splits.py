"""The training and validation examples of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
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

Policy = Literal["refuse", "drop", "cut", "split", "allow"]


def no_examples() -> Examples:
    """No examples."""
    return Examples.of([])


@dataclass
class Prepared:
    """The examples of a run, and what became of every row."""

    train: Examples = field(default_factory=no_examples)
    validation: Examples = field(default_factory=no_examples)
    reports: list[FileReport] = field(default_factory=list)
    unused: list[Path] = field(default_factory=list)
    """Files in the folders of the recipe that are of other splits."""

    def add(self, purpose: Literal["train", "validation"], examples: Examples) -> None:
        """Append examples."""
        setattr(self, purpose, Examples.joined([getattr(self, purpose), examples]))

    def set_validation_aside(self, share: float, seed: int) -> None:
        """Move a random share of the training examples to validation: at least one, never all.

        Raises `YRunnerError` if there are fewer than two.
        """
        if len(self.train) < 2:
            raise YRunnerError(
                "data.validation_share needs at least two rows, one to train on and one to "
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
        """Possible faults among the rows, see quality.py."""
        return find(self.train, self.validation)

    def check(self, *, too_long: Policy, invalid: Policy, altered: Policy = "refuse") -> None:
        """Raise `YRunnerError` if the rules refuse a row, or no row is left for a purpose."""
        refusals = [row for report in self.reports for row in report.refusals]
        stop_on(refusals, too_long=too_long, invalid=invalid, altered=altered)
        self._check_any_left("train", self.train, "to train on")
        self._check_any_left("validation", self.validation, "to validate on")

    def _check_any_left(self, purpose: str, examples: Examples, use: str) -> None:
        reports = [report for report in self.reports if report.purpose == purpose]
        if len(examples) or not reports:
            return
        refusals = [row for report in reports for row in report.refusals]
        too_long = any(refusal.kind == "too_long" for refusal in refusals)
        raise YRunnerError(
            describe_refusals(refusals, f"no rows are left {use}"),
            remedy="fix the rows, or raise data.max_length" if too_long else "fix the rows",
        )


def stop_on(
    refusals: Sequence[Refusal], *, too_long: Policy, invalid: Policy, altered: Policy
) -> None:
    """Raise `YRunnerError` if the recipe does not drop these rows."""
    policy = {"too_long": too_long, "invalid": invalid, "altered": altered}
    # Under cut and split only rows that these cannot shorten are refused; they stop the run, too.
    stopping = [refusal for refusal in refusals if policy[refusal.key] != "drop"]
    if stopping:
        raise YRunnerError(
            describe_refusals(stopping, f"{num_rows(len(stopping))} cannot be used"),
            remedy=refusal_remedy(stopping),
        )
