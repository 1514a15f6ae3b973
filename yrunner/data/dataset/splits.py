"""The training and validation examples of a run."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from yrunner.data.dataset.examples import Examples, StoredRows
from yrunner.data.dataset.preference import answer_facts, find_among_answers
from yrunner.data.dataset.prompts import Prompts, find_among_prompts
from yrunner.data.dataset.quality import Finding, find
from yrunner.data.dataset.row_report import (
    FileReport,
    Refusal,
    as_json,
    describe_refusals,
    num_rows,
    refusal_remedy,
)
from yrunner.errors import YRunnerError

Policy = Literal["refuse", "drop", "cut", "split", "allow"]


Rows = TypeVar("Rows", bound=StoredRows[Any])


class Prepared(Generic[Rows]):
    """What a run learns from, and what became of every row."""

    def __init__(self, kind: type[Rows]) -> None:
        self.train: Rows = kind.of([])
        self.validation: Rows = kind.of([])
        self.reports: list[FileReport] = []
        self.unused: list[Path] = []
        """Files in the folders of the recipe that are of other splits."""
        self.is_set_aside = False
        """Whether rows were moved from training to validation."""

    def add(self, purpose: Literal["train", "validation"], rows: Rows) -> None:
        """Append rows."""
        setattr(self, purpose, type(rows).joined([getattr(self, purpose), rows]))

    def set_validation_aside(self, share: float, seed: int) -> None:
        """Move a random share of the training rows to validation, once; see `rows_aside`."""
        if self.is_set_aside:
            return
        is_aside_E = self._chosen_aside(share, seed)
        aside = self.train.select(np.flatnonzero(is_aside_E))
        self.train = self.train.select(np.flatnonzero(~is_aside_E))
        self.validation = type(aside).joined([self.validation, aside])
        self.is_set_aside = True
        # The files of the training rows are those of the training reports, in order.
        reports = [report for report in self.reports if report.purpose == "train"]
        for index, report in enumerate(reports):
            report.set_aside = int((aside.file_E == index).sum())

    def rows_aside(self, share: float, seed: int) -> Rows:
        """The rows that `set_validation_aside` moves, or has moved: at least one, never all.

        Pairs with equal prompts stay together. Raises `YRunnerError` if there are fewer than two
        rows, or prompts.
        """
        if self.is_set_aside:
            return self.validation
        return self.train.select(np.flatnonzero(self._chosen_aside(share, seed)))

    def _chosen_aside(self, share: float, seed: int) -> Any:
        group_E = self.train.split_E
        sizes = np.bincount(group_E)
        if len(sizes) < 2:
            is_one_prompt = len(self.train) > 1
            raise YRunnerError(
                f"data.validation_share needs at least two {'prompts' * is_one_prompt or 'rows'}, "
                f"one to train on and one to validate on; there is {len(sizes)}",
                remedy="add rows, or remove data.validation_share",
            )
        number = min(max(1, round(len(self.train) * share)), len(self.train) - 1)
        order = np.random.default_rng(seed).permutation(len(sizes))
        return np.isin(group_E, _first_that_fit(order, sizes, number))

    @cached_property
    def findings(self) -> list[Finding]:
        """Possible faults among the rows, see quality.py and preference.py."""
        if isinstance(self.train, Examples) and isinstance(self.validation, Examples):
            return find(self.train, self.validation)
        if isinstance(self.train, Prompts) and isinstance(self.validation, Prompts):
            return find_among_prompts(self.train, self.validation)
        return find_among_answers(self.train, self.validation)

    def as_json(self) -> dict[str, Any]:
        """The content of `data_report.json`: what became of every row, and facts about answers."""
        rows = {"train": self.train, "validation": self.validation}
        facts = {name: found for name, part in rows.items() if (found := answer_facts(part))}
        answers = {"answers": {name: asdict(found) for name, found in facts.items()}}
        return as_json(self.reports, self.findings) | (answers if facts else {})

    def check(self, *, too_long: Policy, invalid: Policy, altered: Policy = "refuse") -> None:
        """Raise `YRunnerError` if the rules refuse a row, or no row is left for a purpose."""
        refusals = [row for report in self.reports for row in report.refusals]
        stop_on(refusals, too_long=too_long, invalid=invalid, altered=altered)
        self._check_any_left("train", self.train, "to train on")
        self._check_any_left("validation", self.validation, "to validate on")

    def _check_any_left(self, purpose: str, rows: Rows, use: str) -> None:
        reports = [report for report in self.reports if report.purpose == purpose]
        if len(rows) or not reports:
            return
        refusals = [row for report in reports for row in report.refusals]
        too_long = any(refusal.kind == "too_long" for refusal in refusals)
        raise YRunnerError(
            describe_refusals(refusals, f"no rows are left {use}"),
            remedy="fix the rows, or raise data.max_length" if too_long else "fix the rows",
        )


def _first_that_fit(order: Any, sizes: Any, number: int) -> list[int]:
    """The groups, in this order, that have at most this many rows together; at least one."""
    chosen: list[int] = []
    left = number
    for group in order.tolist():
        if sizes[group] <= left:
            chosen.append(group)
            left -= int(sizes[group])
    return chosen or [int(sizes.argmin())]


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
