"""Learning from answers that the model writes, by rewards (GRPO, RLOO) or a teacher (GKD), as in
TRL; Axolotl and ms-swift call the same arguments by the same names."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from yrunner.commands.convert.conversion import (
    OFF,
    Conversion,
    Outcome,
    decimal,
    is_number,
    number,
    words,
)
from yrunner.commands.convert.leftovers import remedy
from yrunner.recipe.schema.rl import SHAPES_OF_SAMPLES

METHODS = ("grpo", "rloo")
NORMALIZE = {"grpo": "sequence", "dr_grpo": "length", "dapo": "tokens", "bnpo": "tokens"}
SCALES = {"group": "group", "true": "group", "none": "none", "false": "none"}
SHAPES_OFF = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Values with which nothing but the temperature shapes an answer."""
LAST_NUMBER = "compares the last number; there the parsed formula, for which write a python reward"
GIVEN_TEXTS = "called with texts, not messages, see docs/guide/rewards.md; needs --trust-code"
TEACHER_TEMPERATURE = "the divergence counts times its square here, and answers are drawn at 1"
NO_REWARD = "left out: write it as a python reward, see docs/guide/rewards.md"
OVERLONG = "from 1 down to 0; there from 0 down to -1"


def convert_rewarded(
    c: Conversion, method: str, defaults: dict[str, Any], prefix: str = ""
) -> None:
    """Convert GRPO or RLOO. `defaults`: of the tool, by its own names; `prefix`: of its keys."""
    c.put("train.stage", "rl")
    c.put("loss.kind", method)
    if prefix:
        _open_section(c, prefix)
    for key, place in (
        ("num_generations", "rollout.generations"),
        ("max_completion_length", "rollout.max_new_tokens"),
        ("num_iterations", "rollout.updates_per_rollout"),
        ("temperature", "rollout.temperature"),
        ("beta", "loss.beta"),
        ("epsilon", "loss.clip_low"),
    ):
        _number(c, prefix, key, place, defaults.get(key))
    high = number(c.get(f"{prefix}epsilon_high", c.values.get("loss.clip_low")))
    if not _number(c, prefix, "epsilon_high", "loss.clip_high", None) and is_number(high):
        c.put("loss.clip_high", high, "as below 1")
    if method == "grpo":
        _grpo(c, prefix, defaults)
    _truncated(c, prefix)
    _shapes(c, prefix)
    _writer(c, prefix)
    _rewards(c, prefix)
    if prefix:
        for key in [key for key in c.left if key.startswith(prefix)]:
            if c.left[key] in OFF:
                c.same(key, "off, as here")
            else:
                c.without(key, remedy(key.removeprefix(prefix)))


def _open_section(c: Conversion, prefix: str) -> None:
    """Put the keys of a section beside the others, with its name before theirs."""
    section = c.left.get(prefix.removesuffix("."))
    if isinstance(section, dict) and section:
        del c.left[prefix.removesuffix(".")]
        c.left.update({f"{prefix}{key}": value for key, value in section.items()})


def _number(c: Conversion, prefix: str, key: str, place: str, default: Any) -> bool:
    value = number(c.get(prefix + key))
    if is_number(value):
        whole = place.startswith("rollout.") and not place.endswith("temperature")
        return c.carry(prefix + key, place, int(value) if whole else decimal(value))
    if default is not None:
        c.fill(place, default, f"default of {c.tool}")
    return False


def _grpo(c: Conversion, prefix: str, defaults: dict[str, Any]) -> None:
    kind = str(c.get(f"{prefix}loss_type", defaults["loss_type"]))
    if kind in NORMALIZE:
        how = f"{kind} there" if kind == "bnpo" else ""
        if not c.carry(f"{prefix}loss_type", "loss.normalize", NORMALIZE[kind], how):
            c.fill("loss.normalize", NORMALIZE[kind], f"{kind}, default of {c.tool}")
    else:
        c.obstacles.append(f"loss_type {kind} has no counterpart here")
        c.without(f"{prefix}loss_type", f"use one of {', '.join(NORMALIZE)}")
    scale = str(c.get(f"{prefix}scale_rewards", "group")).lower()
    ours = SCALES.get(scale, "group")
    how = "" if scale in SCALES else f"{scale} there"
    c.carry(f"{prefix}scale_rewards", "loss.scale", ours, how)
    level = c.get(f"{prefix}importance_sampling_level")
    if level in ("token", "sequence"):
        c.carry(f"{prefix}importance_sampling_level", "loss.ratio", level)


def _truncated(c: Conversion, prefix: str) -> None:
    for key in (f"{prefix}mask_truncated_completions", f"{prefix}overlong_filter"):
        if number(c.get(key)) is True:
            c.carry(key, "rollout.truncated", "mask")
    c.fill("rollout.truncated", "keep", f"default of {c.tool}")


def _shapes(c: Conversion, prefix: str) -> None:
    for key in SHAPES_OF_SAMPLES:
        value = number(c.get(prefix + key))
        if is_number(value) and value == SHAPES_OFF.get(key):
            c.same(prefix + key, "off, as here")
        elif value is not None:
            c.without(prefix + key, "only the temperature shapes what is learned from, see rollout")


def _writer(c: Conversion, prefix: str) -> None:
    """Who writes the answers, and whether groups that teach nothing are replaced."""
    if number(c.get(f"{prefix}use_vllm")) is True:
        c.carry(f"{prefix}use_vllm", "rollout.engine", "vllm", "in the process that trains")
        share = number(c.get(f"{prefix}vllm_gpu_memory_utilization"))
        if is_number(share) and 0 < share < 1:
            c.carry(f"{prefix}vllm_gpu_memory_utilization", "rollout.gpu_share", share)
    if number(c.get(f"{prefix}dynamic_sample")) is True:
        times = int(_figure(c, f"{prefix}max_resample_times", 3))
        c.carry(f"{prefix}dynamic_sample", "rollout.resample", max(times, 1))
        c.record(f"{prefix}max_resample_times", Outcome.CARRIED, "rollout.resample")


def _rewards(c: Conversion, prefix: str) -> None:
    key = f"{prefix}reward_funcs"
    named = [str(name) for name in _list(c.get(key, []))]
    weights = [decimal(value) for value in _list(c.get(f"{prefix}reward_weights", []))]
    models = c.get("reward_model_name_or_path", c.get("reward_model"))
    found, notes = [], []
    for place, name in enumerate(named):
        reward, note = _reward(c, name)
        notes.append(f"{name}: {note}" if note else "")
        if reward is not None:
            # TRL has the reward model first, and its weight too.
            index = place + (1 if models and c.tool == "TRL" else 0)
            if index < len(weights) and is_number(weights[index]) and weights[index] != 1:
                reward["weight"] = weights[index]
            found.append(reward)
    if models:
        found += _reward_models(c, models)
    if found:
        _name_apart(found)
        c.put("rewards", found)
    else:
        c.obstacles.append(
            'it names no reward that has a counterpart; add "rewards=[{kind: exact}]" or another '
            "of docs/guide/rewards.md to the command"
        )
    said = "; ".join(filter(None, notes))
    c.record(key, Outcome.CHANGED if said else Outcome.CARRIED, "rewards", said)
    c.record(f"{prefix}reward_weights", Outcome.CARRIED, "rewards", "the weight of each")


def _name_apart(rewards: list[dict[str, Any]]) -> None:
    """Give a number to each of several rewards of one kind, which is their name otherwise."""
    kinds = Counter(reward["kind"] for reward in rewards)
    seen: Counter[str] = Counter()
    for reward in rewards:
        kind = reward["kind"]
        seen[kind] += 1
        if kinds[kind] > 1:
            reward["name"] = f"{kind}_{seen[kind]}"


def _reward(c: Conversion, name: str) -> tuple[dict[str, Any] | None, str]:
    """The section of a reward function, and what is to be said of it."""
    if name in ("accuracy_reward", "reasoning_accuracy_reward", "accuracy"):
        return {"kind": "number", "column": "solution"}, LAST_NUMBER
    if name == "format":
        return {"kind": "xml", "tags": ["think", "answer"], "grade": "whole"}, ""
    if name == "repetition":
        size = _figure(c, "repetition_n_grams", 3)
        c.record("repetition_n_grams", Outcome.CARRIED, "rewards")
        return {"kind": "repetition", "size": max(1, int(size))}, "the share of repeated n-grams"
    if name == "get_soft_overlong_punishment":
        return {"kind": "length", "maximum": 1024, "margin": 256}, OVERLONG
    if name == "soft_overlong":
        return _soft_overlong(c)
    module, _, function = name.rpartition(".")
    file = c.find(f"{module.replace('.', '/')}.py") if module else None
    if file is not None:
        return {"kind": "python", "function": f"{c.written(file)}:{function}"}, GIVEN_TEXTS
    if module:
        c.missing.append(f"{module.replace('.', '/')}.py")
    return None, NO_REWARD


def _soft_overlong(c: Conversion) -> tuple[dict[str, Any] | None, str]:
    longest = number(c.get("soft_max_length", c.values.get("rollout.max_new_tokens")))
    cache = number(c.get("soft_cache_length"))
    for key in ("soft_max_length", "soft_cache_length"):
        c.record(key, Outcome.CARRIED, "rewards")
    if not is_number(longest) or not is_number(cache) or cache >= longest:
        return None, NO_REWARD
    maximum = int(longest - cache)
    return {"kind": "length", "maximum": maximum, "margin": int(cache)}, OVERLONG


def _reward_models(c: Conversion, named: Any) -> list[dict[str, Any]]:
    for key in ("reward_model_name_or_path", "reward_model"):
        c.record(key, Outcome.CARRIED, "rewards")
    found = []
    for name in _list(named):
        place = c.find(str(name))
        if place is None:
            c.missing.append(str(name))
        model = str(name) if place is None else c.written(Path(place))
        found.append({"kind": "reward_model", "model": model})
    return found


def convert_taught(c: Conversion, teacher: str, defaults: dict[str, Any]) -> None:
    """Convert GKD, learning from a teacher what the student writes; `teacher`: the key of its name.

    The published loss has no labels, and its beta 0 is the forward, 1 the reverse KL.
    """
    c.put("train.stage", "sft")
    if c.get(teacher):
        c.carry(teacher, "teacher.model", c.model(c.get(teacher)))
    else:
        c.obstacles.append(f"it names no {teacher}; add teacher.model=... to the command")
    c.put("teacher.weight", 1.0, "labels do not count there")
    c.put("teacher.top", "all", "the teacher stays in memory, as there")
    beta = _figure(c, "beta", defaults["beta"])
    kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")
    if not c.carry("beta", "teacher.by", kind, f"beta {beta:g} there" if kind != "jsd" else ""):
        c.fill("teacher.by", kind, f"beta {beta:g}, default of {c.tool}")
    if kind == "jsd":
        c.put("teacher.beta", beta)
    if c.get("temperature") is not None:
        given = _figure(c, "temperature", defaults["temperature"])
        c.carry("temperature", "teacher.temperature", given, TEACHER_TEMPERATURE)
    else:
        c.fill("teacher.temperature", defaults["temperature"], f"default of {c.tool}")
    _student_writes(c, defaults)


def _student_writes(c: Conversion, defaults: dict[str, Any]) -> None:
    given = _figure(c, "lmbda", defaults["lmbda"])
    share = min(max(given, 0.0), 1.0)
    if not c.carry("lmbda", "teacher.on_policy", share, "" if share == given else "at most all"):
        c.fill("teacher.on_policy", share, f"default of {c.tool}")
    for key in ("max_completion_length", "max_new_tokens"):
        if share:
            c.carry(key, "teacher.max_new_tokens", int(_figure(c, key, defaults["length"])))
        else:
            c.ignored(key, "lmbda is 0: the student writes nothing")
    if share:
        c.fill("teacher.max_new_tokens", defaults["length"], f"default of {c.tool}")


def _figure(c: Conversion, key: str, default: float) -> float:
    """The number that a key has; the default for anything else."""
    value = number(c.get(key, default))
    return float(value) if is_number(value) else default


def _list(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    text = str(value)
    return words(re.sub(r"[\[\]'\"]", "", text)) if text else []
