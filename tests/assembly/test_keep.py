"""`keep` and `drift` from the recipe to the trained model, with rows written by a stand-in."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from yrunner.assembly import replay as replay_rows
from yrunner.assembly.memory import keep_notes
from yrunner.assembly.replay import prepare_keep, without_opening
from yrunner.assembly.run import Run
from yrunner.commands.replay import replay
from yrunner.commands.train import train, train_base
from yrunner.data.chat.tokenize import prompt_text
from yrunner.data.conversation import Message, TokenizedExample
from yrunner.errors import Origin, RecipeError, YRunnerError
from yrunner.evaluation.self_replay import ReplayRow
from yrunner.recipe.load import load_recipe
from yrunner.storage.run_dir import RunDir
from yrunner.tokens import IGNORE_INDEX
from yrunner.training.metrics import MetricsFile, read_metrics

SHORT = ["train.epochs=1", "eval.tasks=[]", "drift.rows=4", "train.checkpoint.every=2"]
SELF_REPLAY = "keep={kind: self_replay, rows: 6, share: 0.5}"


class Pen:
    """Writes what no base of two seconds could: rows that come to an end."""

    def write(self, next_draft, *, advance, is_over):
        lands = ["Aru", "Coria", "Elmo", "Goria", "Isk"]
        while (draft := next_draft()) is not None:
            number = 2 * draft.number + (draft.series == "rows")
            messages = (
                Message("user", f"{lands[number % 5]} {number} {number * 7}?"),
                Message("assistant", f"{number * 3} is {lands[number % 3]}."),
            )
            yield ReplayRow(draft, messages, finished=bool(draft.number % 3))


@pytest.fixture
def pen(monkeypatch):
    monkeypatch.setattr(replay_rows, "ReplayWriter", lambda *_, **__: Pen())


def run(*changes, resume=False, overwrite=False):
    train(Path("tuned.yaml"), [*SHORT, *changes], resume=resume, overwrite=overwrite)
    return RunDir(Path("outputs/tuned"))


@pytest.mark.parametrize(
    ("keep", "tuning", "logged"),
    [
        (SELF_REPLAY, "lora", "keep_divergence"),
        (SELF_REPLAY, "full", "keep_divergence"),
        ("keep={kind: rows, file: test.jsonl, by: text}", "lora", "keep_text_loss"),
        ("keep={kind: ewc, rows: 4}", "full", "keep_penalty"),
        ("keep={kind: none}", "lora", None),
    ],
    ids=["self_replay", "self_replay_full", "rows", "ewc", "none"],
)
def test_every_way_to_keep_trains_and_is_logged_beside_the_drift(
    trained_base, pen, keep, tuning, logged
):
    changes = [] if tuning == "lora" else ["tuning={kind: full}"]
    run_dir = run(keep, *changes)
    records = read_metrics(run_dir.metrics)
    assert all(("loss" not in row) or (logged is None) or (logged in row) for row in records)
    drifts = [row["eval_drift"] for row in records if "eval_loss" in row]
    assert len(drifts) > 1 and 0 < drifts[0]
    report = run_dir.report.read_text("utf-8")
    assert "Learned and forgotten" in report
    files = {path.name.partition("-")[0] for path in RunDir(run_dir.folder).replay.glob("*/*")}
    assert ("tops" in files) == (tuning == "full")
    assert ("fisher" in files) == ("ewc" in keep)


def test_a_run_that_is_kept_and_stopped_goes_on_to_the_same_weights(trained_base, pen, monkeypatch):
    whole = load_file(run(SELF_REPLAY).model / "adapter_model.safetensors")

    def interrupted(self, args, state, control, **kwargs):
        if state.global_step == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched, pytest.raises(YRunnerError, match="stopped"):
        patched.setattr(MetricsFile, "on_step_end", interrupted)
        run(SELF_REPLAY, overwrite=True)
    again = load_file(run(SELF_REPLAY, resume=True).model / "adapter_model.safetensors")
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_run_that_only_forgets_is_ended_and_says_so(trained_base, pen, capsys):
    stopping = "train.early_stopping={metric: drift, patience: 1}"
    each = ["train.checkpoint.every=1", "train.epochs=8", "train.learning_rate=0.3"]
    records = read_metrics(run("keep={kind: none}", stopping, *each).metrics)
    out = capsys.readouterr().out
    assert "forgetting without learning: the last validation moved from the base" in out
    *_, before, last = [row for row in records if "eval_drift" in row]
    assert last["eval_drift"] > before["eval_drift"] and last["eval_loss"] >= before["eval_loss"]
    assert f"ended after update {last['step']} of 32: train.early_stopping, metric drift" in out


def test_replay_says_where_the_rows_are_and_train_finds_them(trained_base, pen, capsys):
    replay(Path("tuned.yaml"), [*SHORT, SELF_REPLAY], train_base=train_base)
    out = capsys.readouterr().out
    assert "replay rows: 6" in out and "drift rows: 4" in out
    run(SELF_REPLAY)
    assert "drafts:" not in capsys.readouterr().out


@pytest.mark.parametrize("by", ["kl", "text"])
def test_a_row_that_was_cut_off_teaches_no_end_and_is_no_text(trained_base, pen, by):
    loaded = Run.load(Path("tuned.yaml"), [*SHORT, SELF_REPLAY, f"keep.by={by}"])
    train_base(loaded)
    data = prepare_keep(loaded)
    lines = loaded_lines(data.folder.rows)
    examples = {example.origin.row: example for example in data.rows}
    assert len(examples) == 6
    tokenizer = loaded.tokenizer
    for number, example in examples.items():
        question, answer = lines[number - 1]["messages"]
        prompt = prompt_text([Message("user", question["content"])], tokenizer)
        written = [
            *tokenizer(prompt, add_special_tokens=False)["input_ids"],
            *tokenizer(answer["content"], add_special_tokens=False)["input_ids"],
        ]
        unfinished = lines[number - 1].get("unfinished", False)
        assert unfinished == (lines[number - 1]["draft"] % 3 == 0)
        assert example.input_ids[: len(written)] == written
        ending = example.input_ids[len(written) :]
        assert (ending == []) if unfinished else (tokenizer.eos_token_id in ending)
        assert example.labels[-1] == example.input_ids[-1]
    has_unfinished = any(lines[number - 1].get("unfinished") for number in examples)
    assert has_unfinished == (by == "kl")


def test_a_text_that_was_cut_off_teaches_no_end(trained_base, pen, monkeypatch):
    def write(self, next_draft, *, advance, is_over):
        while (draft := next_draft()) is not None:
            text = f"{draft.series} {draft.number} {draft.number * 7} goes on"
            yield ReplayRow(draft, (Message("text", text),), finished=bool(draft.number % 2))

    monkeypatch.setattr(Pen, "write", write)
    loaded = Run.load(Path("tuned.yaml"), [*SHORT, SELF_REPLAY])
    train_base(loaded)
    end = loaded.tokenizer.eos_token_id
    data = prepare_keep(loaded)
    assert [example.input_ids[-1] == end for example in data.rows] == [False, True] * 3
    assert [example.input_ids[-1] == end for example in data.drift_rows] == [False, True] * 2


def test_recipes_that_write_rows_in_other_ways_share_those_that_measure_drift(trained_base, pen):
    found = []
    for changes in ([], [SELF_REPLAY], [SELF_REPLAY, "keep.temperature=0.7"]):
        loaded = Run.load(Path("tuned.yaml"), [*SHORT, *changes])
        train_base(loaded)
        found.append(prepare_keep(loaded))
    assert len({str(data.drift_rows) for data in found}) == 1
    assert found[1].folder.folder != found[2].folder.folder
    kept = {str(example.input_ids) for data in found for example in data.rows}
    assert not kept & {str(example.input_ids) for example in found[0].drift_rows}


def loaded_lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_replay_refuses_a_recipe_that_asks_for_no_row(trained_base):
    with pytest.raises(YRunnerError, match="needs no replay rows"):
        replay(Path("tuned.yaml"), [], train_base=train_base)


def test_a_faulty_file_of_kept_rows_is_found_before_the_base_is_trained(project):
    (project / "kept.jsonl").write_text('{"nothing": 1}\n')
    with pytest.raises(YRunnerError, match=r"kept\.jsonl"):
        run("keep={kind: rows, file: kept.jsonl}")
    assert not list((project / "outputs").glob("*/*")), "nothing was trained or prepared"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            ["model={scratch: {config: {model_type: qwen3}, vocab_size: 300}}", SELF_REPLAY],
            "have nothing to keep",
        ),
        (["train.batch_size=1", SELF_REPLAY], "at least two examples"),
        (["loss.normalize=weights", SELF_REPLAY], "cannot be combined"),
        (["loss.normalize=weights", "keep={kind: ewc}"], "cannot be combined"),
        (["distributed.deepspeed={stage: 3}", "keep={kind: ewc}"], "use deepspeed.stage 2 or 1"),
        (["drift.rows=0", "train.early_stopping={metric: drift}"], "drift.rows of at least 1"),
    ],
)
def test_a_recipe_that_cannot_keep_says_why(project, changes, words):
    if "scratch" in changes[0]:
        changes = [*changes, "train.stage=pretrain", "tuning={kind: full}"]
    with pytest.raises(RecipeError, match=words):
        load_recipe(Path("tuned.yaml"), changes)


def test_a_run_does_not_resume_with_other_kept_rows(trained_base, pen):
    run_dir = run("keep={kind: rows, file: test.jsonl}")
    (run_dir.model / "adapter_model.safetensors").unlink()
    (trained_base / "test.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    with pytest.raises(YRunnerError, match=r"test\.jsonl"):
        run("keep={kind: rows, file: test.jsonl}", resume=True)


def test_what_all_rows_begin_with_was_given_and_is_no_target():
    rows = [[7, 8, 1, 2], [7, 8, 3], [7, 8, 1, 5, 6]]
    examples = [
        TokenizedExample(ids, [IGNORE_INDEX, *ids[1:]], Origin(Path("r"), n))
        for n, ids in enumerate(rows, start=1)
    ]
    found = [example.labels for example in without_opening(examples)]
    assert found == [[IGNORE_INDEX] * 2 + ids[2:] for ids in rows]


def test_check_states_what_ewc_costs(project):
    recipe = load_recipe(Path("tuned.yaml"), ["keep={kind: ewc}"])
    (note,) = keep_notes(recipe, 2**20)
    assert "8.0 MiB more on each device" in note
    assert keep_notes(load_recipe(Path("tuned.yaml"), []), 2**20) == []


def test_the_rows_name_the_base_that_wrote_them(trained_base, pen):
    replay(Path("tuned.yaml"), [*SHORT, SELF_REPLAY], train_base=train_base)
    (record,) = RunDir(Path("outputs/tuned")).replay.glob("base-*/replay.json")
    content = json.loads(record.read_text())
    assert content["base"].endswith("base/model") and len(content["key"]) == 32


def test_rows_longer_than_max_length_are_cut_for_kl(trained_base, pen):
    loaded = Run.load(Path("tuned.yaml"), [*SHORT, SELF_REPLAY, "data.max_length=24"])
    train_base(loaded)
    data = prepare_keep(loaded)
    assert len(data.rows) == 6
    assert max(len(example.input_ids) for example in data.rows) <= 24
