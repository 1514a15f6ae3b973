"""Errors for the user: each says where, what and what to do."""

from dataclasses import dataclass
from pathlib import Path

REPORT_A_BUG = "this is a bug in yrunner; please report it with the lines above"
STOPPED = "stopped"
"""What a command says when a signal ends it and it has nothing more to tell."""


@dataclass(frozen=True, order=True)
class Origin:
    """Where a row comes from: its file, and its number there, from 1."""

    file: Path
    row: int

    def __str__(self) -> str:
        return f"{self.file} row {self.row}"


class YRunnerError(Exception):
    """An error that the user can fix, printed as one sentence without a traceback.

    `message` says what is wrong, `remedy` what to do about it; both without a full stop.
    """

    exit_code = 2

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        if not self.remedy:
            return self.message
        return f"{self.message}. {self.remedy[0].upper()}{self.remedy[1:]}"


@dataclass(frozen=True)
class Problem:
    """One fault of a recipe: `where` is `file:line:column` or the override that caused it."""

    where: str
    path: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.path, self.message) if part)


class RecipeError(YRunnerError):
    """All faults of a recipe, one clickable line each."""

    def __init__(self, problems: list[Problem]) -> None:
        assert problems, "a recipe error needs at least one problem"
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


class DataError(YRunnerError):
    """A data file or row that cannot be used."""

    def __init__(self, origin: Origin | Path, message: str, *, remedy: str = "") -> None:
        super().__init__(f"{origin}: {message}", remedy=remedy)
        self.origin = origin


class ModelError(YRunnerError):
    """A model, tokenizer or chat template that does not fit the recipe."""


class RunError(YRunnerError):
    """A run that cannot be started or continued as requested."""


class ProofError(YRunnerError):
    """A result failed its verification and was removed."""

    exit_code = 1


class Interrupted(YRunnerError):
    """A signal stopped the run, after it had saved a checkpoint."""

    def __init__(self, signal_number: int, step: int, folder: Path, *, remedy: str) -> None:
        super().__init__(f"stopped; update {step:,} is saved in {folder}", remedy=remedy)
        self.exit_code = 128 + signal_number


class Stopped(YRunnerError):
    """A signal stopped work; the command in `remedy`, if any, continues it."""

    def __init__(
        self, signal_number: int, *, remedy: str = "run the same command again to continue"
    ) -> None:
        super().__init__(STOPPED, remedy=remedy)
        self.exit_code = 128 + signal_number


class MissingError(YRunnerError):
    """Something is missing on this machine; the remedy is the command that installs it."""

    exit_code = 3
