"""`yrun inspect --html` of a run on rewards shows its answers, coloured by what they taught."""

import json
import re
from pathlib import Path
from statistics import mean

import pytest

from yrunner.assembly.run import Run
from yrunner.commands.inspect.heat_map import inspect_html
from yrunner.commands.train import train
from yrunner.errors import RunError, YRunnerError
from yrunner.reports.token_text import TokenText
from yrunner.training.rl import token_samples

REWARDED = Path("rewarded.yaml")
ROLLOUTS = Path("outputs/rewarded/rollouts.jsonl")
TOKENS = Path("outputs/rewarded/rollout_tokens.jsonl")
TRAINING = [
    "rollout={generations: 4, max_new_tokens: 8, updates_per_rollout: 2, truncated: keep}",
    "train.max_steps=4",
    "train.learning_rate=3e-2",
    "data.validation=[]",
    "eval.tasks=[]",
    "drift.rows=0",
]


def page_of(number=50, row=None):
    inspect_html(REWARDED, TRAINING, number=number, row=row, page=Path("page.html"))
    return Path("page.html").read_text("utf-8")


def test_answers_of_a_run_are_shown_with_their_rewards_and_the_push_of_each_token(
    rewarded, monkeypatch
):
    with pytest.raises(RunError, match="has not written any answers yet"):
        page_of()
    monkeypatch.setattr(token_samples, "TOKENS", 6)
    train(REWARDED, TRAINING, resume=False, overwrite=False)
    answers = [json.loads(line) for line in ROLLOUTS.read_text("utf-8").splitlines()]
    kept = [json.loads(line) for line in TOKENS.read_text("utf-8").splitlines()]
    assert all(len(line["ids"]) <= 6 for line in kept)

    page = page_of()
    groups = {(line["cycle"], line["row"]) for line in kept}
    assert page.count("<article>") == len(groups)
    for name in ("pattern", "repetition", "advantage"):
        assert f">{name}</th>" in page
    for line in answers:
        if (line["cycle"], line["row"]) in groups:
            assert f"advantage {line['advantage']:+.2f}" in page
    # A later line of the same answer replaces an earlier one: that of the second pass.
    last = {(line["cycle"], line["row"], line["generation"]): line for line in kept}
    assert page.count(" more</p>") == sum(len(line["ids"]) == 6 for line in last.values())
    # Tokens of one character, which a young model leaves incomplete, are shown as one.
    text = TokenText(Run.load(REWARDED, TRAINING).result_tokenizer)
    ratios, clipped = [], 0
    for line in last.values():
        start = 0
        for ids in text.characters(line["ids"]):
            places = range(start, start := start + len(ids))
            ratios.append(mean(line["ratio"][place] for place in places))
            clipped += any(place in line["clipped"] for place in places)
    shown = [float(ratio) for ratio in re.findall(r", ratio ([\d.]+),", page)]
    assert sorted(shown) == pytest.approx(sorted(ratios), abs=1e-3)
    assert clipped and page.count(', clipped"') == clipped

    _, row = min(groups)
    assert page_of(number=1).count("<article>") == 1
    of_row = page_of(row=f"prompts.jsonl:{row}")
    assert set(re.findall(r"prompts\.jsonl row (\d+)", of_row)) == {str(row)}
    with pytest.raises(YRunnerError, match=r"has not answered prompts\.jsonl:99"):
        page_of(row="prompts.jsonl:99")

    # Without the figures of tokens, and while a run writes its next line.
    TOKENS.unlink()
    with ROLLOUTS.open("a", encoding="utf-8") as file:
        file.write('{"cycle": 2, "fi')
    page = page_of()
    assert page.count("ratios not kept") == len(answers) and " ratio 1" not in page
