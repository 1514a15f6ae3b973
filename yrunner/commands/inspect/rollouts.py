"""`yrun inspect --html` of a run on rewards: the answers that it learned from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yrunner.assembly.report import drawn_table
from yrunner.assembly.rl.rollouts import read_rollouts
from yrunner.assembly.run import Run
from yrunner.commands.inspect.command import parse_place
from yrunner.console import print_table, say
from yrunner.errors import RunError, YRunnerError
from yrunner.reports.rollout_page import (
    RolloutPage,
    ShownGroup,
    ShownRollout,
    tokens_of,
    write_rollout_page,
)
from yrunner.reports.token_text import TokenText

Line = Mapping[str, Any]
"""A line of rollouts.jsonl or rollout_tokens.jsonl."""


def inspect_rollouts(run: Run, *, number: int, row: str | None, page: Path) -> None:
    """Write a page of `number` groups, from the first to the last of the run.

    Of those to one `row`, such as `sums.jsonl:12`, if it is given. Groups with figures of single
    tokens come before others. Raises `RunError` if the run has written no answers, `YRunnerError`
    if none is to that row.
    """
    recipe, folder = run.recipe, run.folder
    groups = _grouped(read_rollouts(folder.rollouts))
    if not groups:
        raise RunError(
            f"{recipe.name} has not written any answers yet: there is no {folder.rollouts}",
            remedy=f"train it first: yrun train {run.options.arguments}",
        )
    details = {
        (*_key(line), line["generation"]): line for line in read_rollouts(folder.rollout_tokens)
    }
    if row is not None:
        name, place = parse_place(row)
        groups = {key: group for key, group in groups.items() if key[1:] == (name, place)}
        if not groups:
            raise YRunnerError(
                f"{recipe.name} has not answered {row} yet",
                remedy=f"choose another row, or none; {folder.rollouts} has all answers",
            )
    known = {key[:3] for key in details}
    chosen = _spread([key for key in groups if key in known] or list(groups), number)
    tokenizer = run.result_tokenizer if folder.is_finished() else run.tokenizer
    text = TokenText(tokenizer)
    shown = [_group(groups[key], details, text) for key in chosen]
    page.parent.mkdir(parents=True, exist_ok=True)
    write_rollout_page(RolloutPage(recipe.name, recipe.loss.kind, shown), page)
    if drawn := drawn_table(run):
        print_table(drawn.title, drawn.columns, drawn.rows)
    say(f"answers: {page}")


def _key(line: Line) -> tuple[int, str, int]:
    return line["cycle"], line["file"], line["row"]


def _grouped(lines: Sequence[Line]) -> dict[tuple[int, str, int], list[Line]]:
    groups: dict[tuple[int, str, int], list[Line]] = {}
    for line in lines:
        groups.setdefault(_key(line), []).append(line)
    return groups


def _spread(keys: Sequence[Any], number: int) -> list[Any]:
    """At most `number` of them, from the first to the last."""
    if number >= len(keys):
        return list(keys)
    step = (len(keys) - 1) / max(number - 1, 1)
    return [keys[round(step * place)] for place in range(number)]


def _group(lines: Sequence[Line], details: Mapping[Any, Line], text: TokenText) -> ShownGroup:
    first = lines[0]
    answers = []
    steps = set()
    for line in lines:
        found = details.get((*_key(line), line["generation"]))
        tokens = [] if found is None else tokens_of(found, line["advantage"], text)
        hidden = 0
        if found is not None:
            steps.add(found["step"])
            # The end mark is a token that `tokens` does not count.
            hidden = max(0, line["tokens"] - len(found["ids"]))
        answers.append(
            ShownRollout(
                generation=line["generation"],
                fate=line["fate"],
                text=line["text"],
                reward=line["reward"],
                parts=line["rewards"],
                advantage=line["advantage"],
                tokens=tokens,
                num_hidden=hidden,
            )
        )
    update = ", ".join(str(step) for step in sorted(steps)) or f"{first['update']}"
    title = f"update {update}: {first['file']} row {first['row']}"
    return ShownGroup(title, first["prompt"], answers)
