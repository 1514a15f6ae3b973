"""`yrun inspect --html` shows what base and result make of the rows, or says what is missing."""

import gc
import json
import re
import weakref
from pathlib import Path

import pytest
import torch

from tests.conftest import questions
from yrunner.assembly.run import Run
from yrunner.cli import main
from yrunner.commands.inspect.heat_map import inspect_html
from yrunner.commands.train import train
from yrunner.errors import RunError, YRunnerError
from yrunner.losses.nlirg import nlirg_weight

BASE, TUNED = Path("base.yaml"), Path("tuned.yaml")
PAGE = Path("outputs/tuned-tokens.html")


def show(recipe=TUNED, *overrides, number=3, row=None, page=None):
    """The page, as text, and the figures in it."""
    inspect_html(recipe, list(overrides), number=number, row=row, page=page)
    text = (page or Path(f"outputs/{recipe.stem}-tokens.html")).read_text("utf-8")
    figures = re.search(r'id="figures">(.*?)</script>', text)
    return text, json.loads(figures[1])["examples"]


def test_the_base_is_shown_before_training_and_both_models_after_it(trained_base, capfd):
    text, examples = show(number=4)
    assert capfd.readouterr().out.splitlines()[-1] == f"tokens: {PAGE}"
    assert len(examples) == 4
    assert all(set(readings) == {"before"} for readings in examples)
    assert 'value="change"' not in text
    assert not Path("outputs/tuned").exists(), "training would refuse a folder that is used"

    train(TUNED, [], resume=False, overwrite=False)
    text, trained = show(number=4)
    assert all(set(readings) == {"before", "after"} for readings in trained)
    assert [readings["before"] for readings in trained] == [
        readings["before"] for readings in examples
    ]
    assert 'value="change"' in text
    losses = {
        when: [loss for readings in trained for loss in readings[when]["loss"]]
        for when in ("before", "after")
    }
    assert sum(losses["after"]) < sum(losses["before"]), "the training has taught something"
    assert "The result was trained with different settings" not in text


def test_the_weights_and_the_zones_are_those_of_the_recipe(trained_base):
    text, (readings,) = show(TUNED, "loss.loss_deadline=4", "loss.k=3", number=1)
    loss_N = torch.tensor(readings["before"]["loss"])
    weight_N = nlirg_weight(loss_N, loss_deadline=4.0, k=3.0)
    shown_N = torch.tensor(readings["before"]["weight"])
    torch.testing.assert_close(shown_N, weight_N, rtol=2e-3, atol=1e-5)
    refused_N = torch.tensor(readings["before"]["zone"]) == 3
    assert torch.equal(refused_N, loss_N >= 4)
    assert "1.45 – 4" in text


def test_other_settings_than_those_of_the_result_are_named(trained_base):
    train(TUNED, [], resume=False, overwrite=False)
    text, _ = show(TUNED, "loss.k=3", number=1)
    assert "The result was trained with different settings" in text
    assert "recipe.loss.k" in text


def test_packed_examples_are_scored_one_by_one(trained_base):
    _, alone = show(TUNED, "train.order=as_written", number=16)
    _, packed = show(TUNED, "train.order=as_written", "data.packing=true", number=100)
    assert sorted(map(str, packed)) == sorted(map(str, alone))


def test_one_row_is_shown_also_when_it_is_not_learned_from(trained_base):
    page = trained_base / "deep" / "row.html"
    question, _ = questions(20)[17]
    text, (readings,) = show(row="validation.jsonl:2", page=page)
    assert question in text
    assert len(readings["before"]["loss"]) > 1
    text, _ = show(TUNED, "data.max_length=40", row="train.jsonl:3", page=page)
    assert re.search(r"Not trained on:.*has \d+ tokens", text, re.DOTALL)


def test_a_row_without_targets_is_refused_with_the_reason(trained_base):
    path = trained_base / "validation.jsonl"
    path.write_text(path.read_text("utf-8") + "{broken\n", "utf-8")
    with pytest.raises(
        YRunnerError, match=r"jsonl:5 has no targets to colour \(invalid JSON.*Print the row"
    ):
        show(row="validation.jsonl:5")


def test_a_base_that_is_not_trained_and_a_new_model_say_what_to_train(project):
    with pytest.raises(RunError, match=r"not trained .*\. Train it first: yrun train .*base\.yaml"):
        show()
    with pytest.raises(RunError, match=r"base has no result in .*\. Train it first: yrun train"):
        show(BASE)
    assert not Path("outputs").exists()


def test_a_new_model_shows_its_result_alone(trained_base):
    _, examples = show(BASE)
    assert all(set(readings) == {"after"} for readings in examples)


def test_a_result_with_another_tokenizer_is_refused(trained_base):
    with pytest.raises(RunError, match=r"the tokenizer of the result .*--overwrite"):
        show(BASE, "model.scratch.vocab_size=310")


@pytest.mark.parametrize("name", ["base.yaml", "train.jsonl", "folder.html", "x"])
def test_only_an_html_file_is_written_so_that_no_recipe_is_replaced(project, name):
    (project / "folder.html").mkdir()
    with pytest.raises(YRunnerError, match=r"is not a writable \.html path\. Give another file"):
        show(page=project / name)


def test_two_models_are_never_in_memory_at_once(trained_base, monkeypatch):
    train(TUNED, [], resume=False, overwrite=False)
    gc.collect()
    seen = []

    def load_base(run, load=Run.load_base):
        model = load(run)
        seen.append(weakref.ref(model))
        return model

    def load_result(run, load=Run.load_result):
        assert seen[0]() is None
        return load(run)

    monkeypatch.setattr(Run, "load_base", load_base)
    monkeypatch.setattr(Run, "load_result", load_result)
    show(number=1)


def test_the_command_takes_a_path_wherever_it_stands(trained_base, capfd, monkeypatch):
    for arguments in (
        ["--html", "tuned.yaml", "-n", "1", "train.token_batch=4", "mine.html"],
        ["tuned.yaml", "--html", "mine.html", "train.token_batch=4"],
    ):
        monkeypatch.setattr("sys.argv", ["yrun", "inspect", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        assert capfd.readouterr().out.splitlines()[-1] == "tokens: mine.html"
        Path("mine.html").unlink()


def test_both_answers_of_a_pair_are_named_and_the_change_is_a_log_ratio(preferred):
    recipe = Path("preferred.yaml")
    text, examples = show(recipe, number=2)
    assert re.findall(r"<b>(\w+)</b>", text) == ["chosen", "rejected"] * 2
    assert "log ratio" not in text, "there is one model yet"
    train(recipe, ["train.epochs=1"], resume=False, overwrite=False)
    text, examples = show(recipe, number=2)
    assert text.count("the negative of the log ratio") == len(examples) == 4
