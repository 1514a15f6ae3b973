"""How each command begins: a faulty recipe is answered before anything heavy is imported."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from yrunner.console import fail
from yrunner.exits import STOPPED


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """For heavy imports: inside a C++ module, KeyboardInterrupt would abort the process."""

    def stop(_number: int, _frame: object) -> None:
        fail(STOPPED)
        os._exit(128 + signal.SIGINT)

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def check_recipe(recipe: Path, overrides: list[str] | None) -> None:
    """Answer a faulty recipe at once, before torch is imported."""
    from yrunner.recipe.load import load_recipe
    from yrunner.recipe.trust import alert_of_code

    alert_of_code(load_recipe(recipe, overrides or []))
