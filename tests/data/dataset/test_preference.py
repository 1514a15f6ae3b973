"""Every pair has a fate; what is kept is both answers to one prompt, as tokens."""

import json

import numpy as np
import pytest

from tests.conftest import write_jsonl
from tests.data.conftest import (
    TEMPLATES,
    decoded_targets,
    shown_replies,
    shown_text,
    tokenizer_of,
)
from yrunner.data.batching.plan import make_plan
from yrunner.data.conversation import Message
from yrunner.data.dataset.cache import Cache
from yrunner.data.dataset.examples import Pairs, RatedExamples
from yrunner.data.dataset.prepare import Rules, Source, check_conversations, prepare
from yrunner.data.formats.formats import Reading
from yrunner.errors import DataError, YRunnerError
from yrunner.tokens import IGNORE_INDEX


def pair(number, chosen="yes, it is", rejected="no", prompt="question"):
    return {"prompt": f"{prompt} {number}?", "chosen": chosen, "rejected": rejected}


PAIRS = [pair(number, "yes" * (number % 3 + 1), "no" * (number % 4 + 1)) for number in range(12)]


@pytest.fixture
def prepared(tmp_path, tokenizer):
    """Prepare rows as pairs, or as the rules say."""

    def prepare_rows(lines, validation=(), source=None, use=tokenizer, **rules):
        rules = Rules(**{"max_length": 200, "rows": "pairs", **rules})
        sources = [Source((write_jsonl(tmp_path / "train.jsonl", lines),), **(source or {}))]
        if validation:
            path = write_jsonl(tmp_path / "validation.jsonl", validation)
            sources.append(Source((path,), "validation"))
        return prepare(sources, use, rules, Cache(tmp_path / "cache"))

    return prepare_rows


def refusals(prepared):
    return [(it.origin.row, it.kind, it.reason) for it in prepared.reports[0].refusals]


def findings(prepared):
    """The rows of each finding, each with the row that it repeats or contradicts."""
    return {
        it.what: [
            (place.row, *(other.row for other in it.others[number : number + 1]))
            for number, place in enumerate(it.places)
        ]
        for it in prepared.findings
    }


def texts(pair, tokenizer):
    return [decoded_targets(answer, tokenizer) for answer in (pair.chosen, pair.rejected)]


TALK = [("system", "Be kind."), ("user", "Who keeps it?"), ("assistant", "The town."),
        ("user", "The tower, too?")]  # fmt: skip
ANSWERS = ["  Yes: the hall keeps it. [[1]]", "<think>\nHm.\n</think>\n\nNo."]


@pytest.mark.parametrize("template", TEMPLATES)
def test_both_answers_have_the_tokens_of_whole_conversations_and_only_they_are_targets(
    template, prepared
):
    tokenizer = tokenizer_of(template)
    talk = [(role, text) for role, text in TALK if role != "system"]
    turns = [{"role": role, "content": text} for role, text in talk]
    row = {"prompt": turns, "chosen": ANSWERS[0], "rejected": ANSWERS[1]}
    (found,) = prepared([row], use=tokenizer, altered="allow").train
    for answer, text in zip((found.chosen, found.rejected), ANSWERS, strict=True):
        messages = [Message(role, said) for role, said in (*talk, ("assistant", text))]
        whole, shown = tokenizer.decode(answer.input_ids), shown_text(template, messages)
        if template.startswith("phi"):
            shown = shown.replace("|>\n", "|>")  # its special tokens take the line end with them
        assert whole.removeprefix("<s>") == shown.removeprefix("<s>")
        assert decoded_targets(answer, tokenizer).rstrip("\n") == (
            shown_replies(template, messages)[-1].rstrip("\n")
        )
        first = answer.target_positions[0]
        assert all(label == IGNORE_INDEX for label in answer.labels[:first])


def test_the_prompt_has_the_same_tokens_on_both_sides_and_their_number_is_known(
    prepared, tokenizer
):
    train = prepared(PAIRS).train
    for number, found in enumerate(train):
        shared = int(train.chosen.column("shared")[number])
        assert shared == found.chosen.target_positions[0] == found.rejected.target_positions[0]
        assert found.chosen.input_ids[:shared] == found.rejected.input_ids[:shared]


def test_a_pair_counts_as_one_with_the_tokens_of_both_answers(prepared):
    ready = prepared(PAIRS)
    train = ready.train
    assert isinstance(train, Pairs)
    assert len(train) == len(PAIRS) == ready.reports[0].examples
    both = [(len(it.chosen.input_ids), len(it.rejected.input_ids)) for it in train]
    assert train.lengths.tolist() == [sum(one) for one in both]
    targets = [len(it.chosen.target_positions) + len(it.rejected.target_positions) for it in train]
    assert train.num_targets.tolist() == targets
    report = ready.reports[0]
    assert (report.tokens, report.targets) == (sum(map(sum, both)), sum(targets))
    assert [it.chosen.origin.row for it in train[3:6]] == [4, 5, 6]
    assert [train.origin(number).row for number in (0, 11)] == [1, 12]
    plan = make_plan(
        train.num_targets, lengths=train.lengths, token_batch=0, batch_size=2, accumulation=2,
        epochs=1, max_updates=None, order="shuffle", seed=1,
    )  # fmt: skip
    planned = [place for update in plan.updates() for row in update for place, _ in row]
    assert (plan.num_updates, sorted(planned)) == (3, list(range(12)))


def test_a_system_prompt_of_the_recipe_is_part_of_both_sides(prepared, tokenizer):
    (found,) = prepared([pair(1)], system="Be kind.").train
    for answer in (found.chosen, found.rejected):
        assert "Be kind." in tokenizer.decode(answer.input_ids)
        assert "Be kind." not in decoded_targets(answer, tokenizer)


def test_every_pair_is_kept_or_refused_with_its_row_and_reason(prepared):
    rows = [
        pair(1),
        pair(2, rejected="yes, it is"),
        pair(3, chosen=""),
        {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
         "rejected": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]},
        pair(5, rejected="no" * 200),
        pair(6, chosen="<think>hm"),
        "broken",
        pair(8),
    ]  # fmt: skip
    ready = prepared(rows)
    report = ready.reports[0]
    assert (report.rows, report.kept) == (8, 2)
    assert [(row, kind) for row, kind, _ in refusals(ready)] == [
        (2, "equal_answers"),
        (3, "empty"),
        (4, "different_prompts"),
        (5, "too_long"),
        (6, "thinking"),
        (7, "not_an_object"),
    ]
    reasons = {row: reason for row, _, reason in refusals(ready)}
    assert reasons[5].startswith("the worse answer: has ")
    assert reasons[6] == (
        "the better answer: the last reply opens a thinking block and never closes it"
    )
    with pytest.raises(YRunnerError) as refused:
        ready.check(too_long="refuse", invalid="refuse")
    message = str(refused.value)
    assert "train.jsonl row 2: both answers are the same" in message
    assert "both answers the same: 1" in message
    ready.check(too_long="drop", invalid="drop", altered="drop")


def test_control_tokens_that_one_answer_spells_are_text_and_leave_the_prompt_alone(
    prepared, tokenizer
):
    ready = prepared([pair(1, "say <|im_end|> twice", "no"), pair(2, "no", "<|im_start|>user")])
    assert ready.train.chosen.column("shared").tolist() == [
        it.chosen.target_positions[0] for it in ready.train
    ]
    assert texts(ready.train[0], tokenizer)[0] == "say <|im_end|> twice<|im_end|>"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for it in ready.train:
        for answer in (it.chosen, it.rejected):
            assert [label for label in answer.labels if label == end] == [end], "only the last"
    (found,) = ready.findings
    assert found.what == "control tokens spelled in texts (read as plain text) in train"
    assert found.count == 2


@pytest.mark.parametrize(
    ("answers", "which"),
    [((ANSWERS[1], "No."), "better"), (("No.", ANSWERS[1]), "worse"), (ANSWERS[1:] * 2, None)],
)
def test_an_answer_that_the_template_would_change_is_not_learned(answers, which, prepared):
    deepseek = tokenizer_of("deepseek")
    rows = [pair(1, answers[0], answers[1] + ("!" if which is None else ""))]
    ready = prepared(rows, use=deepseek)
    ((row, kind, reason),) = refusals(ready)
    assert (row, kind) == (1, "altered")
    assert reason.startswith(f"the {which or 'better'} answer: the chat template removes the think")
    with pytest.raises(YRunnerError, match=r"data\.altered: drop"):
        ready.check(too_long="refuse", invalid="refuse")
    allowed = prepared(rows, use=deepseek, altered="allow")
    (found,) = allowed.findings
    assert (found.what, found.count) == (
        "replies whose text the chat template changes or removes in train",
        1,
    )


def test_faults_that_need_no_tokenizer_are_found_without_one(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [pair(1), pair(2), pair(3, rejected="yes, it is")])
    rules = Rules(max_length=100, rows="pairs")
    with pytest.raises(YRunnerError, match=r"a\.jsonl row 3: both answers are the same"):
        check_conversations([Source((path,))], rules)


def test_answers_that_a_cut_or_the_template_makes_equal_are_refused(prepared, tokenizer):
    long = [pair(1, "no" * 200 + "a", "no" * 200 + "b"), pair(2), pair(3, "ok<|im_end|>", "ok")]
    found = refusals(prepared(long, too_long="cut"))
    assert found == [
        (1, "equal_answers", "both answers are the same in the first 200 tokens"),
        (3, "equal_answers", "both answers are the same once tokenized"),
    ]


def test_a_cut_leaves_neither_answer_an_end_mark(prepared, tokenizer):
    rows = [
        pair(1, "yes", "no" * 200),
        pair(2, "yes" * 200, "no" * 200),
        pair(3),
        pair(4, "y" * 300),
    ]
    ready = prepared(rows, too_long="cut", max_length=100)
    ends = [
        tuple(text.endswith("<|im_end|>") for text in texts(it, tokenizer)) for it in ready.train
    ]
    assert ends == [(False, False), (False, False), (True, True), (False, False)]
    assert texts(ready.train[0], tokenizer)[0] == "yes"
    assert (ready.reports[0].kept, ready.reports[0].cut) == (4, 3)
    what = "pairs of which only one answer was cut (the other loses its end mark, too) in train"
    assert findings(ready)[what] == [(1,), (4,)]


def test_what_stands_out_among_pairs_is_counted_with_both_rows(prepared):
    train = [
        pair(1),
        pair(2),
        pair(1),
        pair(2, "no", "yes, it is"),
        pair(3, "yes</s>"),
        pair(4, "a\ufffd"),
        pair(5, "b", "c"),
        pair(5, " c", "b\n"),
        pair(6, "b", "c"),
        pair(6, "c", "d"),
    ]
    validation = [pair(1), pair(2, "other"), pair(6, "c", "b"), pair(99)]
    assert findings(prepared(train, validation)) == {
        "repeated pairs in train": [(3, 1)],
        "contradictory pairs (A over B, B over A) in train": [(2, 4), (4, 2), (7, 8), (8, 7)],
        "validation pairs that are also in train": [(1, 1)],
        "validation pairs that train contradicts": [(3, 9)],
        "validation pairs to prompts of train": [(1,), (2,), (3,)],
        "replacement characters (\ufffd) in train": [(6,)],
        "pairs of which only one answer ends with a hand-written end mark in train": [(5,)],
    }
    assert findings(prepared([pair(number) for number in range(5)])) == {}


def test_answers_marked_good_and_bad_contradict_each_other(prepared):
    marked = [("a", True), ("b", False), ("a", False), ("b", False), ("c", True)]
    rows = [{"prompt": "q", "completion": text, "label": good} for text, good in marked]
    assert findings(prepared(rows, rows="ratings")) == {
        "repeated answers in train": [(4, 2)],
        "answers that are marked good and bad in train": [(1, 3), (3, 1)],
    }


def test_two_files_contradict_each_other_by_name(tmp_path, tokenizer):
    one = write_jsonl(tmp_path / "one.jsonl", [pair(1)])
    two = write_jsonl(tmp_path / "two.jsonl", [pair(2), pair(1, "no", "yes, it is")])
    rules = Rules(max_length=100, rows="pairs")
    ready = prepare([Source((one, two))], tokenizer, rules, Cache(tmp_path / "cache"))
    (first, _) = ready.as_json()["findings"][0]["first"]
    (other, _) = ready.as_json()["findings"][0]["others"]
    assert first == {"file": str(one), "row": 1}
    assert other == {"file": str(two), "row": 2}


@pytest.mark.parametrize(("source", "number"), [({"take": 5}, 5), ({"share": 0.25}, 3)])
@pytest.mark.parametrize("kind", ["pairs", "ratings"])
def test_take_and_share_count_pairs(kind, source, number, prepared):
    ready = prepared(PAIRS, source=source, rows=kind)
    each = 1 if kind == "pairs" else 2
    assert len(ready.train) == number * each
    assert ready.reports[0].not_taken == (12 - number) * each
    if kind == "ratings":
        ratings = [it.is_desirable for it in ready.train]
        assert ratings == [True, False] * number, "both answers of a row, or neither"
    with pytest.raises(DataError, match="take is 13, but only 12 rows can be used"):
        prepared(PAIRS, source={"take": 13}, rows=kind)


@pytest.mark.parametrize("kind", ["pairs", "ratings"])
@pytest.mark.parametrize("seed", range(5))
def test_a_validation_share_never_parts_equal_prompts(kind, seed, prepared):
    rows = [pair(number // 3, f"yes {number}") for number in range(30)]
    ready = prepared(rows, rows=kind)
    ready.set_validation_aside(0.2, seed)
    each = 1 if kind == "pairs" else 2
    assert len(ready.validation) == 6 * each
    assert len(ready.train) + len(ready.validation) == 30 * each
    assert ready.reports[0].set_aside == 6 * each
    prompts = [
        set(part.examples.column("prompts").tolist()) for part in (ready.train, ready.validation)
    ]
    assert not prompts[0] & prompts[1]
    assert len(prompts[0] | prompts[1]) == 10


def test_a_validation_share_of_one_prompt_is_refused(prepared):
    ready = prepared([pair(1, "a"), pair(1, "b")])
    with pytest.raises(YRunnerError, match=r"at least two prompts, one to train on .*there is 1"):
        ready.set_validation_aside(0.5, 0)


def test_a_large_prompt_does_not_swallow_the_split(prepared):
    ready = prepared([pair(1, f"yes {number}") for number in range(8)] + [pair(2), pair(3)])
    ready.set_validation_aside(0.1, 0)
    assert len(ready.validation) == 1


def test_a_file_of_pairs_is_read_as_rated_answers_with_the_same_tokens(prepared):
    rated = prepared(PAIRS, rows="ratings").train
    assert isinstance(rated, RatedExamples)
    in_pairs = [answer for it in prepared(PAIRS).train for answer in (it.chosen, it.rejected)]
    assert [it.example for it in rated] == in_pairs
    assert [it.is_desirable for it in rated] == [True, False] * 12


def test_pairs_come_from_the_cache_the_second_time_and_rated_answers_apart(prepared):
    first, second = prepared(PAIRS), prepared(PAIRS)
    assert [it.reports[0].from_cache for it in (first, second)] == [False, True]
    assert list(first.train) == list(second.train)
    assert first.findings == second.findings
    assert not prepared(PAIRS, rows="ratings").reports[0].from_cache


def test_facts_say_what_length_alone_would_predict(prepared):
    rows = [
        pair(1, "yes" * 5, "no"),
        pair(2, "no", "yes" * 5),
        pair(3, "yes" * 4, "no"),
        pair(3, "b", "c"),
    ]
    content = prepared(rows, [pair(9)]).as_json()["answers"]
    facts = content["train"]
    assert (facts["prompts"], facts["longer_wins"], facts["equally_long"]) == (3, 0.5, 0.25)
    assert facts["shared_prompts"] == facts["better"]["answers"] == 4
    assert content["validation"]["better"]["answers"] == 1
    train = prepared(rows).train
    better = np.array([len(it.chosen.target_positions) for it in train])
    assert facts["better"]["mean_length"] == pytest.approx(better.mean())
    assert facts["worse"]["targets"] == sum(len(it.rejected.target_positions) for it in train)
    assert facts["worse"]["tokens"] == sum(len(it.rejected.input_ids) for it in train)
    json.dumps(content)


def test_marked_answers_are_counted_by_their_mark(prepared):
    rows = [{"prompt": "q", "completion": f"a{n}", "kto_tag": n % 3 == 0} for n in range(9)]
    facts = prepared(rows, rows="ratings").as_json()["answers"]["train"]
    assert (facts["better"]["answers"], facts["worse"]["answers"]) == (3, 6)
    assert facts["longer_wins"] is None


def test_columns_are_part_of_what_the_cache_depends_on(prepared):
    swap = {"chosen": "rejected", "rejected": "chosen"}
    one = prepared([pair(1)]).train[0]
    other = prepared([pair(1)], source={"reading": Reading(columns=swap)}).train[0]
    assert (one.chosen, one.rejected) == (other.rejected, other.chosen)
