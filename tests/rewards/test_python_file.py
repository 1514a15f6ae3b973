"""Rewards in Python: what a function gets, and one sentence for whatever it does wrong."""

from pathlib import Path

import pytest

from tests.rewards.conftest import answer, section
from yrunner.data.formats.columns import EVERY_COLUMN, Need
from yrunner.errors import DataError, RunError, YRunnerError
from yrunner.rewards.make import make_rewards, needs_of


@pytest.fixture
def reward(tmp_path):
    """The reward of a file with this text."""

    def make(text: str, name: str = "judge"):
        file = tmp_path / "rewards.py"
        file.write_text(text)
        sections = [section(kind="python", function=f"{file}:{name}")]
        (found,) = make_rewards(sections, trust_code=True)
        return found

    return make


def test_a_function_gets_answers_prompts_and_the_columns_it_names(reward):
    scores = reward(
        "def judge(completions, answer, prompts, truncated, level=None):\n"
        "    assert prompts[0] == [{'role': 'user', 'content': 'How much?'}]\n"
        "    assert truncated == [False, False] and level == ['hard', None]\n"
        "    return [float(c == a) for c, a in zip(completions, answer)]\n"
    ).score([answer("4", answer="4", level="hard"), answer("5", answer="4", other=1)])
    assert scores == [1.0, 0.0]


def test_keyword_arguments_get_every_column(reward):
    judge = reward("def judge(completions, **columns):\n    return [len(columns)] * 2\n")
    # answer, level, prompts, num_tokens, truncated
    assert judge.score([answer("a", answer="4"), answer("b", level=1)]) == [5.0, 5.0]


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("[1, 0.5]", [1.0, 0.5]),
        ("(True, None)", [1.0, None]),
        ("numpy.array([1, 2])", [1.0, 2.0]),
        ("torch.tensor([0.5, 1])", [0.5, 1.0]),
        ("[numpy.float32(0.5), torch.tensor(2)]", [0.5, 2.0]),
    ],
)
def test_scores_may_come_in_any_form_of_numbers(reward, returned, expected):
    judge = reward(f"import numpy, torch\ndef judge(completions):\n    return {returned}\n")
    assert judge.score([answer("a"), answer("b")]) == expected
    assert judge.score([]) == []


@pytest.mark.parametrize(
    ("body", "row", "sentence"),
    [
        ("return [1]", 5, "returned 1 score for 2 answers, the first of them to this row"),
        ("return [1, 2, 3]", 5, "returned 3 scores for 2 answers, the first of them to this row"),
        ("return [1, float('nan')]", 6, "returned nan, not a finite number or None"),
        ("return [float('-inf'), 1]", 5, "returned -inf, not a finite number or None"),
        ("return [10 ** 400, 1]", 5, "returned inf, not a finite number or None"),
        ("return [1, '1']", 6, "returned a str, not a number or None"),
        ("return [1, [1]]", 6, "returned a list, not a number or None"),
        ("return [1, 1 + 2j]", 6, "returned a complex, not a number or None"),
        ("return None", 5, "returned None, not a list of numbers"),
        ("return 1.0", 5, "returned a float, not a list of numbers"),
        ("return '11'", 5, "returned a str, not a list of numbers"),
        ("return {'a': 1}", 5, "returned a dict, not a list of numbers"),
        ("yield 1", 5, "returned a generator, not a list of numbers"),
        ("import numpy; return numpy.array([[1, 2], [1, 2]])", 5, "returned a list, not a number"),
    ],
)
def test_a_wrong_result_is_one_sentence_with_the_row(reward, body, row, sentence):
    judge = reward(f"def judge(completions):\n    {body}\n")
    with pytest.raises(DataError) as caught:
        judge.score([answer("a", row=5), answer("b", row=6)])
    text = str(caught.value)
    assert text.startswith(f'sums.jsonl row {row}: the reward "python" ({judge.file}:1) {sentence}')
    assert text.endswith("Return one number for each answer, or None for no opinion")
    assert "\n" not in text and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("body", "row", "line", "error"),
    [
        ("return [int(c) for c in completions]", 6, 4, "ValueError: invalid literal for int()"),
        ("return [deeper(c) for c in completions]", 6, 2, "KeyError: 'b'"),
        ("raise RuntimeError('two\\nlines')", 5, 4, "RuntimeError: two lines"),
        ("import sys; sys.exit(3)", 5, 4, "SystemExit: 3"),
        ("return judge(completions)", 5, 4, "RecursionError"),
        ("import no_such_thing", 5, 4, "ModuleNotFoundError"),
        ("import json; json.loads('{')", 5, 4, "JSONDecodeError"),
        ("assert len(completions) == 1; return [1]", 5, 4, "AssertionError"),
    ],
)
def test_what_a_function_raises_is_one_sentence_with_row_and_line(reward, body, row, line, error):
    judge = reward(
        f"def deeper(c):\n    return {{'1': 1}}[c]\ndef judge(completions):\n    {body}\n"
    )
    with pytest.raises(DataError) as caught:
        judge.score([answer("1", row=5), answer("b", row=6)])
    text = str(caught.value)
    start = f'sums.jsonl row {row}: the reward "python" failed on an answer to this row: '
    assert text.startswith(f"{start}{judge.file}:{line}: {error}")
    assert "\n" not in text


def test_a_parameter_that_no_row_has_fails_before_any_answer_by_what_rows_need(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(
        "import json\n"
        "def judge(completions, answer, *, unit='m', truncated): ...\n"
        "def free(completions, level, **columns): ...\n"
        "made = json.loads\n"
    )

    def needs(name):
        return list(needs_of([section(kind="python", name="r", function=f"{file}:{name}")]))

    assert needs("judge") == [Need("answer", "r"), Need("unit", "r", "optional")]
    assert needs("free") == [Need("level", "r"), Need(EVERY_COLUMN, "r", "optional")]
    assert needs("made") == [Need(EVERY_COLUMN, "r", "optional")]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1 / 0\ndef judge(c): ...\n", ":1: ZeroDivisionError: division by zero"),
        ("x = 1\nimport no_such\ndef judge(c): ...\n", ":2: ModuleNotFoundError"),
        ("raise SystemExit\ndef judge(c): ...\n", ":1: SystemExit"),
        ("judge = 3\n", '"judge" is not a function. Define it there'),
    ],
)
def test_a_file_that_cannot_be_run_is_one_sentence(reward, text, sentence):
    with pytest.raises(YRunnerError) as caught:
        reward(text)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_file_may_import_its_neighbours(reward, tmp_path):
    (tmp_path / "beside_rewards.py").write_text("POINTS = 3\n")
    text = "def judge(completions):\n    from beside_rewards import POINTS\n    return [POINTS]\n"
    assert reward(text).score([answer("a")]) == [3.0]


def test_code_runs_only_if_it_is_trusted(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text("open('was_run', 'w')\ndef judge(completions): ...\n")
    sections = [section(kind="python", function=f"{file}:judge")]
    needs_of(sections)
    with pytest.raises(RunError) as caught:
        make_rewards(sections)
    assert str(caught.value) == (
        f"rewards: {file}:judge would run here with all your permissions. "
        "Read the code, then add --trust-code"
    )
    assert not Path("was_run").exists()
