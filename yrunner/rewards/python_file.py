"""A reward that the user wrote in Python: its parameters, its call, its errors in one sentence."""

import ast
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from yrunner.console import counted
from yrunner.data.formats.columns import EVERY_COLUMN, Need
from yrunner.errors import DataError, YRunnerError
from yrunner.rewards.completion import Completion
from yrunner.text_files import functions_of

GIVEN: dict[str, Callable[[Completion], Any]] = {
    "completions": lambda completion: completion.text,
    "prompts": lambda completion: [
        {"role": message.role, "content": message.content} for message in completion.prompt
    ],
    "num_tokens": lambda completion: completion.num_tokens,
    "truncated": lambda completion: completion.is_truncated,
}
"""What a function can ask for besides columns: a list with a value for each answer."""

MOST_CHARACTERS = 300
"""Of the message of an error."""


def needs_of_function(function: str, name: str) -> list[Need]:
    """The columns that a function reads, by its parameters; the file is not run.

    `function` is `file:name`. A parameter with a default is a column that a row may lack.
    """
    arguments = _parameters(function)
    if arguments is None:
        return [Need(EVERY_COLUMN, name, "optional")]
    plain = [*arguments.posonlyargs, *arguments.args]
    num_needed = len(plain) - len(arguments.defaults)
    by_name = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    needed = {
        **{each.arg: number < num_needed for number, each in enumerate(plain)},
        **{each.arg: default is None for each, default in by_name},
    }
    found = [
        Need(column, name, "value" if is_needed else "optional")
        for column, is_needed in needed.items()
        if column not in GIVEN
    ]
    return found + [Need(EVERY_COLUMN, name, "optional")] * (arguments.kwarg is not None)


def _parameters(function: str) -> ast.arguments | None:
    """None for a function that the file imports or makes."""
    file, _, name = function.rpartition(":")
    return functions_of(Path(file)).get(name)


class PythonScores:
    """A function of the user's."""

    def __init__(self, function: str, name: str, weight: float) -> None:
        """Runs the file. Raises `YRunnerError` if it cannot be run, or has no such function."""
        self.name, self.weight = name, weight
        file, _, self.function_name = function.rpartition(":")
        self.file = Path(file)
        found = getattr(self._module(), self.function_name, None)
        if not callable(found):
            raise YRunnerError(
                f'{self.file}: "{self.function_name}" is not a function', remedy="define it there"
            )
        self.function: Callable[..., Any] = found
        arguments = _parameters(function)
        self.parameters = None
        if arguments is not None and arguments.kwarg is None:
            names = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            self.parameters = {each.arg for each in names}

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        """What the function returns for the answers.

        Raises `DataError` for the first row where it raises, or returns anything but a finite
        number or None.
        """
        if not completions:
            return []
        try:
            returned = self._call(completions)
        except (Exception, SystemExit) as error:
            raise self._explained(completions, error) from error
        return self._checked(returned, completions)

    def _module(self) -> Any:
        name = f"yrunner_rewards_{self.file.stem}_{abs(hash(self.file))}"
        spec = importlib.util.spec_from_file_location(name, self.file)
        if spec is None or spec.loader is None:
            raise YRunnerError(f"{self.file} is not a Python file", remedy="name it something.py")
        module = importlib.util.module_from_spec(spec)
        # Its own imports, and pickle, look there.
        sys.modules[name] = module
        if str(self.file.parent) not in sys.path:
            sys.path.append(str(self.file.parent))
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise YRunnerError(
                f'the reward "{self.name}" cannot be loaded: {self._where(error)}: {_said(error)}',
                remedy="correct the file",
            ) from error
        return module

    def _call(self, completions: Sequence[Completion]) -> Any:
        columns = dict.fromkeys(name for each in completions for name in each.columns)
        arguments: dict[str, list[Any]] = {
            name: [each.columns.get(name) for each in completions] for name in columns
        }
        for name, value_of in GIVEN.items():
            arguments[name] = [value_of(each) for each in completions]
        if self.parameters is not None:
            arguments = {name: arguments[name] for name in self.parameters & arguments.keys()}
        return self.function(**arguments)

    def _explained(self, completions: Sequence[Completion], error: BaseException) -> DataError:
        """The error of the first answer for which the function also raises alone."""
        culprit = completions[0]
        for completion in completions if len(completions) > 1 else ():
            try:
                self._call([completion])
            except (Exception, SystemExit) as alone:  # noqa: BLE001 - reported below
                culprit, error = completion, alone
                break
        return DataError(
            culprit.origin,
            f'the reward "{self.name}" failed on an answer to this row: '
            f"{self._where(error)}: {_said(error)}",
            remedy="correct the function",
        )

    def _where(self, error: BaseException) -> str:
        """The line of the user's file that raised, or called what did."""
        if isinstance(error, SyntaxError) and error.filename is not None:
            return f"{error.filename}:{error.lineno}"
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame.lineno for frame in frames if Path(frame.filename) == self.file]
        return f"{self.file}:{own[-1]}" if own else str(self.file)

    def _checked(self, returned: Any, completions: Sequence[Completion]) -> list[float | None]:
        # Tensors and arrays.
        scores = returned.tolist() if hasattr(returned, "tolist") else returned
        if not isinstance(scores, (list, tuple)):
            raise self._refused(
                completions[0], f"returned {_kind(returned)}, not a list of numbers"
            )
        if len(scores) != len(completions):
            raise self._refused(
                completions[0],
                f"returned {counted(len(scores), 'score')} for "
                f"{counted(len(completions), 'answer')}, the first of them to this row",
            )
        return [
            self._one(score, completion)
            for score, completion in zip(scores, completions, strict=True)
        ]

    def _one(self, score: Any, completion: Completion) -> float | None:
        if hasattr(score, "tolist"):
            score = score.tolist()
        if score is None:
            return None
        if not isinstance(score, (int, float)):
            raise self._refused(completion, f"returned {_kind(score)}, not a number or None,")
        try:
            number = float(score)
        except OverflowError:
            number = float("inf")
        if not isfinite(number):
            raise self._refused(completion, f"returned {number}, not a finite number or None,")
        return number

    def _refused(self, completion: Completion, what: str) -> DataError:
        ending = " for an answer to this row" if what.endswith(",") else ""
        return DataError(
            completion.origin,
            f'the reward "{self.name}" ({self.file}:{self._line()}) {what.rstrip(",")}{ending}',
            remedy="return one number for each answer, or None for no opinion",
        )

    def _line(self) -> int:
        """Where the function is defined."""
        code = getattr(self.function, "__code__", None)
        return getattr(code, "co_firstlineno", 1)


def _said(error: BaseException) -> str:
    """The type and the message of an error, on one short line: it may hold a whole answer."""
    message = " ".join(str(error)[:MOST_CHARACTERS].split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _kind(value: Any) -> str:
    name = type(value).__name__
    if name == "NoneType":
        return "None"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
