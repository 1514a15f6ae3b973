"""The models behind the page give the figures of a plain forward pass, and answer one by one."""

import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from yrunner.commands.board.worker import TypedTexts, serve
from yrunner.errors import RunError, YRunnerError
from yrunner.losses.nlirg import ZONES, nlirg_weight

PROMPT, ANSWER = "Capital of Aru, question 0?", "Belo is the <|im_end|> capital. 😀"


@pytest.fixture
def texts(trained_base: Path) -> TypedTexts:
    """Of a tuned run and its base."""
    from yrunner.commands.train import train

    train(Path("tuned.yaml"), ["train.max_steps=2"], resume=False, overwrite=False)
    return TypedTexts(trained_base / "outputs/tuned")


def score(texts: TypedTexts) -> dict[str, Any]:
    return texts.answer({"do": "score", "prompt": PROMPT, "answer": ANSWER})


def test_figures_are_those_of_full_logits_for_base_and_tuned(texts: TypedTexts):
    scored = score(texts)
    example = texts._example(PROMPT, ANSWER)
    ids = torch.tensor([example.input_ids])
    places = torch.tensor(example.target_positions)
    assert list(scored["models"]) == ["base", "tuned"]
    for name, figures in scored["models"].items():
        with torch.no_grad():
            logits_NV = texts._load(name)(input_ids=ids).logits[0, places - 1].float()
        loss_N = cross_entropy(logits_NV, ids[0, places], reduction="none")
        probabilities_NV = logits_NV.softmax(-1)
        entropy_N = -(probabilities_NV * probabilities_NV.log()).sum(-1)
        torch.testing.assert_close(torch.tensor(figures["loss"]), loss_N, rtol=2e-3, atol=1e-4)
        torch.testing.assert_close(
            torch.tensor(figures["entropy"]), entropy_N, rtol=2e-3, atol=1e-4
        )
        torch.testing.assert_close(
            torch.tensor(figures["weight"]), nlirg_weight(loss_N), rtol=5e-3, atol=1e-4
        )
        assert set(figures["zone"]) <= set(range(len(ZONES)))
        assert len(figures["top"]) == len(figures["patterns"]) == len(places)
    assert scored["models"]["base"]["loss"] != scored["models"]["tuned"]["loss"]
    assert sum(token["targets"] for token in scored["tokens"]) == len(places)
    shown = "".join(token["text"] for token in scored["tokens"])
    assert PROMPT in shown and "😀" in shown


def test_attention_is_the_mean_of_heads_and_last_layers_before_the_token(texts: TypedTexts):
    example = texts._example(PROMPT, ANSWER)
    position = example.target_positions[3]
    request = {"do": "attend", "prompt": PROMPT, "answer": ANSWER, "position": position}
    weights = texts.answer({**request, "model": "tuned"})["weights"]
    with torch.no_grad():
        whole = texts._load("tuned").base_model(
            input_ids=torch.tensor([example.input_ids]), output_attentions=True
        )
    rows = [layer[0, :, position - 1, :position].mean(0) for layer in whole.attentions[-4:]]
    torch.testing.assert_close(
        torch.tensor(weights), torch.stack(rows).mean(0), rtol=2e-3, atol=1e-5
    )
    assert sum(weights) == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("kind", ["greedy", "sample", "dynamic"])
def test_answers_are_as_many_as_asked_and_the_same_for_a_seed(texts: TypedTexts, kind: str):
    request = {
        "do": "answers",
        "prompt": PROMPT,
        "number": 3,
        "max_new_tokens": 6,
        "seed": 5,
        "how": {"kind": kind},
    }
    first, second = texts.answer(request), texts.answer(request)
    assert first == second
    assert len(first["answers"]) == 3
    assert first["messages"][-1] == {"role": "user", "content": PROMPT}


def test_a_click_never_runs_code_that_comes_with_a_model(texts: TypedTexts):
    path = texts._run.folder.recipe
    path.write_text(path.read_text().replace("remote_code: false", "remote_code: true"))
    again = TypedTexts(path.parent)
    assert not again._run.recipe.model.trust_remote_code


WRONG = [
    ({"do": "nothing"}, "unknown request"),
    ({"do": "score", "prompt": "", "answer": "x"}, "write a prompt first"),
    ({"do": "score", "prompt": "x", "answer": " "}, "write an answer first"),
    ({"do": "score", "prompt": "x", "answer": 5}, "write an answer first"),
    ({"do": "score", "prompt": "x" * 200_000, "answer": "y"}, "too long for the page"),
    ({"do": "attend", "prompt": "x", "answer": "y", "position": 10**6}, "no such token"),
    ({"do": "attend", "prompt": "x", "answer": "y", "position": "1"}, "must be a whole number"),
    (
        {"do": "attend", "prompt": "x", "answer": "y", "position": 1, "model": "m"},
        "has no m model",
    ),
    (
        {"do": "answers", "prompt": "x", "number": 1, "max_new_tokens": 9, "seed": 0, "how": {}},
        "kind",
    ),
    (
        {
            **{"do": "answers", "prompt": "x", "number": 1, "max_new_tokens": 9, "seed": 0},
            "how": {"kind": "sample", "temperature": -1},
        },
        "temperature",
    ),
    (
        {
            **{"do": "answers", "prompt": "x", "number": 1, "max_new_tokens": 2048, "seed": 0},
            "how": {"kind": "greedy"},
        },
        "do not fit",
    ),
]


def test_a_request_that_makes_no_sense_is_answered_with_a_sentence(texts: TypedTexts):
    for request, sentence in WRONG:
        with pytest.raises(YRunnerError) as raised:
            texts.answer(request)
        assert sentence in str(raised.value), request


def answer_of(request: Any) -> dict[str, Any]:
    if request == {"fail": 1}:
        raise RunError("no", remedy="yes")
    return {"got": request}


def test_each_line_gets_one_line_and_the_end_of_the_input_ends_it():
    reading, writing = os.pipe()
    os.write(writing, b'{"a": 1}\n')
    out = io.StringIO()
    with os.fdopen(reading, buffering=1) as asked:
        worker = threading.Thread(target=serve, args=(answer_of, asked, out, 60))
        worker.start()
        while not out.getvalue():
            pass
        os.write(writing, b'{"fail": 1}\n')
        os.close(writing)
        worker.join(timeout=60)
    assert [json.loads(line) for line in out.getvalue().splitlines()] == [
        {"ok": {"got": {"a": 1}}},
        {"error": "no. Yes"},
    ]


def test_it_ends_when_nobody_asks():
    reading, writing = os.pipe()
    with os.fdopen(reading, buffering=1) as asked:
        serve(answer_of, asked, io.StringIO(), 0.01)
    os.close(writing)


def test_what_libraries_print_is_no_answer(tmp_path: Path, forks: None):
    request = json.dumps({"do": "score", "prompt": "x", "answer": "y"}) + "\n"
    command = [sys.executable, "-m", "yrunner.commands.board.worker", str(tmp_path)]
    ended = subprocess.run(command, input=request, capture_output=True, text=True, check=True)
    said = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(said) == 1 and "recipe.resolved.yaml" in said[0]["error"]
