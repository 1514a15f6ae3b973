"""What can go wrong for a user: each error says where, what, and what to do."""

from dataclasses import dataclass
from pathlib import Path

REPORT_A_BUG = "this is a bug of yrunner; please report it with the lines above"


@dataclass(frozen=True, order=True)
class Origin:
    """The place of a row: the file that it was read from and its number there, counted from 1."""

    file: Path
    row: int

    def __str__(self) -> str:
        return f"{self.file} row {self.row}"


class YRunnerError(Exception):
    """Something that the user can mend. `cli.py` prints it as one sentence, without a traceback.

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
    """One fault of a recipe: `where` is `file:line:column` or the override that brought it in."""

    where: str
    path: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.path, self.message) if part)


class RecipeError(YRunnerError):
    """Everything that is wrong with a recipe, a clickable line for each."""

    def __init__(self, problems: list[Problem]) -> None:
        assert problems, "a recipe error needs at least one problem"
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


class DataError(YRunnerError):
    """A data file, or a row of one, that cannot be used."""

    def __init__(self, origin: Origin | Path, message: str, *, remedy: str = "") -> None:
        super().__init__(f"{origin}: {message}", remedy=remedy)
        self.origin = origin


class ModelError(YRunnerError):
    """A model, tokenizer or chat template that does not fit the recipe."""


class RunError(YRunnerError):
    """A run folder that cannot be used as asked."""


class ProofError(YRunnerError):
    """A result that does not answer as it should; it has been removed."""

    exit_code = 1


class Interrupted(YRunnerError):
    """A signal stopped the run after it had saved a checkpoint."""

    def __init__(self, signal_number: int, step: int, folder: Path, *, remedy: str) -> None:
        super().__init__(f"stopped; update {step:,} is saved in {folder}", remedy=remedy)
        self.exit_code = 128 + signal_number


class Stopped(YRunnerError):
    """A signal stopped work that goes on when the same command, or that of `remedy`, is run."""

    def __init__(
        self, signal_number: int, *, remedy: str = "run the same command again to go on"
    ) -> None:
        super().__init__("stopped", remedy=remedy)
        self.exit_code = 128 + signal_number


class MissingError(YRunnerError):
    """Something that this machine lacks; the remedy is the command that adds it."""

    exit_code = 3
