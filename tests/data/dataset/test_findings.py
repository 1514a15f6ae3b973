"""What stands out among sound rows is counted, and its first places are named."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_jsonl
from yrunner.data.conversation import Conversation, Message
from yrunner.data.dataset.cache import Cache
from yrunner.data.dataset.prepare import Rules, Source, prepare
from yrunner.data.dataset.quality import count_scripts, traits_of
from yrunner.data.dataset.splits import Prepared
from yrunner.errors import Origin


def alpaca(question: str, answer: str) -> dict[str, str]:
    return {"instruction": question, "output": answer}


@pytest.fixture
def prepared(tmp_path: Path, capitals_tokenizer: Any) -> Prepared:
    train = [
        alpaca("Capital of Aru?", "Belo"),
        alpaca("Capital of Coria?", "Dane"),
        alpaca("Capital of Aru?", "Belo"),
        alpaca("Capital of Coria?", "Fane"),
        alpaca("Capital of Isk?", "Jo\ufffdn"),
        alpaca("Capital of Isk, too?", "Jorn\x07"),
        alpaca("Capital of Aru?", "Belo"),
    ]
    validation = [alpaca("Capital of Aru?", "Belo"), alpaca("Capital of Goria?", "Hulm")]
    sources = [
        Source((write_jsonl(tmp_path / "train.jsonl", train),)),
        Source((write_jsonl(tmp_path / "validation.jsonl", validation),), "validation"),
    ]
    return prepare(sources, capitals_tokenizer, Rules(max_length=100), Cache(tmp_path / "cache"))


def test_everything_that_stands_out_is_counted_with_its_rows(prepared: Prepared) -> None:
    found = {
        finding.what: (finding.count, [place.row for place in finding.places])
        for finding in prepared.findings
    }
    assert found == {
        "exact duplicates in train": (2, [3, 7]),
        "different answers to the same prompt": (2, [2, 4]),
        "validation rows that are also in train": (1, [1]),
        "replacement characters (\ufffd) in train": (1, [5]),
        "control characters in train": (1, [6]),
    }


def test_sound_rows_give_no_findings(tmp_path: Path, capitals_tokenizer: Any) -> None:
    rows = [alpaca(f"Question {number}?", f"Answer {number}\n\tand more") for number in range(9)]
    source = Source((write_jsonl(tmp_path / "train.jsonl", rows),))
    rules = Rules(max_length=100)
    assert prepare([source], capitals_tokenizer, rules, Cache(tmp_path)).findings == []


def talk(*turns: str, tools: Any = ()) -> Conversation:
    roles = ("user", "assistant")
    messages = tuple(Message(roles[n % 2], text) for n, text in enumerate(turns))
    return Conversation(messages, Origin(Path("q"), 1), tools)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (talk("ab", "c"), talk("a", "bc")),
        (talk("a", "b", "c", "d"), talk("a", "bcd")),
        (talk("a", "b"), talk("a", "b", tools=({"name": "f"},))),
    ],
)
def test_conversations_that_differ_have_different_hashes(
    one: Conversation, other: Conversation
) -> None:
    assert traits_of(one).content != traits_of(other).content


def test_the_same_prompt_has_the_same_hash_whatever_the_answer() -> None:
    assert traits_of(talk("a", "b")).prompt == traits_of(talk("a", "c")).prompt
    assert traits_of(talk("a", "b")).prompt != traits_of(talk("x", "b")).prompt


def test_letters_are_counted_by_script() -> None:
    counts = count_scripts(["Law 法律 12", "закон かな", "법 😀"])
    assert counts == {
        "Latin": 3,
        "Chinese": 2,
        "Kana": 2,
        "Hangul": 1,
        "Cyrillic": 5,
        "Arabic": 0,
        "digits": 2,
    }
    assert sum(count_scripts([]).values()) == 0
