"""From the recipe's `rewards` to objects that score answers, and the columns that these read."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from yrunner.data.formats.columns import Need
from yrunner.errors import RunError
from yrunner.recipe.schema.rewards import (
    ExactReward,
    JsonSchemaReward,
    NumberReward,
    PythonReward,
    RewardModelReward,
    RewardSection,
    XmlReward,
)
from yrunner.rewards.completion import Reward
from yrunner.rewards.form import json_schema_score, xml_score
from yrunner.rewards.python_file import PythonScores, needs_of_function
from yrunner.rewards.reward_model import ModelScores
from yrunner.rewards.text import TextScores, text_score
from yrunner.scoring.reward_model import AdapterScores


def make_rewards(
    sections: Sequence[RewardSection],
    *,
    trust_code: bool = False,
    beside: Mapping[Path, AdapterScores] | None = None,
) -> list[Reward]:
    """A reward for each section, in order.

    `beside`: reward models that are adapters on a model in memory; others are loaded.

    Models and Python files are loaded here. Raises `YRunnerError` if one cannot be used, and for a
    Python function without `trust_code`, the option `--trust-code`.
    """
    check_trust(sections, trust_code=trust_code)
    return [_make(section, beside or {}) for section in sections]


def _make(section: RewardSection, beside: Mapping[Path, AdapterScores]) -> Reward:
    name, weight = section.shown_name, section.weight
    match section:
        case XmlReward():
            return TextScores(name, weight, xml_score(section))
        case JsonSchemaReward():
            return TextScores(name, weight, json_schema_score(section))
        case RewardModelReward():
            known = beside.get(section.model)
            return ModelScores(section.model, name, weight, section.batch_size, known)
        case PythonReward():
            return PythonScores(section.function, name, weight)
        case _:
            return TextScores(name, weight, text_score(section))


def check_trust(sections: Sequence[RewardSection], *, trust_code: bool) -> None:
    """Raise `RunError` if a reward runs Python code that the user does not trust explicitly."""
    functions = [each.function for each in sections if isinstance(each, PythonReward)]
    if functions and not trust_code:
        raise RunError(
            f"rewards: {' and '.join(functions)} would run here with all your permissions",
            remedy="read the code, then add --trust-code",
        )


def needs_of(sections: Sequence[RewardSection]) -> tuple[Need, ...]:
    """The columns that the rewards read."""
    needs: list[Need] = []
    for section in sections:
        name = section.shown_name
        match section:
            case ExactReward():
                needs.append(Need(section.column, name, "texts"))
            case NumberReward():
                needs.append(Need(section.column, name, "number"))
            case JsonSchemaReward() if section.file is None and section.json_schema is None:
                needs.append(Need(section.schema_column, name, "schema"))
            case PythonReward():
                needs += needs_of_function(section.function, name)
    return tuple(dict.fromkeys(needs))
