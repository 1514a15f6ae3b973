"""`yrun init --base --data`: the recipe fits the model and the rows, loads and can be checked."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import questions, write_jsonl
from tests.project import pairs
from yrunner.assembly.run import Run
from yrunner.commands.draft import DraftFacts, draft
from yrunner.errors import DataError, YRunnerError
from yrunner.models.templates.choose import choose_template
from yrunner.recipe.load import load_recipe

THOUGHT = "<think>\nIt is known.\n</think>\n\n"


@pytest.fixture
def base(tmp_path: Path, make_model: Any, capitals_tokenizer: Any) -> Path:
    """A model whose template has a switch for thinking."""
    import copy

    tokenizer = copy.deepcopy(capitals_tokenizer)
    choose_template(tokenizer, "qwen3")
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def rows(number: int, before: str = "") -> list[dict[str, str]]:
    return [{"question": asked, "answer": before + said} for asked, said in questions(number)]


@pytest.mark.parametrize("thinks", [False, True])
def test_a_recipe_for_answers_sorts_them_and_switches_thinking_as_they_do(
    base, tmp_path, monkeypatch, capsys, thinks
):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "my rows.jsonl", rows(120, THOUGHT if thinks else ""))
    draft("base", "my rows.jsonl", Path("recipes/my.yaml"))
    assert not Path("outputs").exists(), "nothing is written but the recipes"
    said = capsys.readouterr().out
    assert "120 rows of the format question_answer, for train.stage: sft" in said
    assert "next: yrun check recipes/my.yaml" in said
    recipe = load_recipe(Path("recipes/my.yaml"))
    assert recipe.model.template_args == {"enable_thinking": thinks}
    assert recipe.data.train[0].sorted == (tmp_path / "recipes/my-sort.yaml").resolve()
    assert (recipe.data.max_length, recipe.data.too_long) == (256, "refuse")
    assert (recipe.loss.kind, recipe.keep.kind) == ("nlirg", "self_replay")
    assert recipe.keep.rows == 64
    sorting = load_recipe(Path("recipes/my-sort.yaml"))
    assert sorting.sort.drop_share == 0.05
    run = Run(recipe)
    run.refuse_faulty_rows()
    assert len(run.dataset.train) + len(run.dataset.validation) == 120
    with pytest.raises(YRunnerError, match=r"my\.yaml already exists"):
        draft("base", "my rows.jsonl", Path("recipes/my.yaml"))


def test_few_rows_are_not_sorted_and_unusable_ones_are_dropped_with_a_word(
    base, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "few.jsonl", [*rows(20), {"question": "?", "answer": 5}])
    draft("base", "few.jsonl", Path("few.yaml"))
    assert "1 row cannot be used: yrun check few.yaml says why" in capsys.readouterr().out
    recipe = load_recipe(Path("few.yaml"))
    assert recipe.data.train[0].file == (tmp_path / "few.jsonl").resolve()
    assert (recipe.data.invalid, recipe.data.validation_share) == ("drop", 0.1)
    assert not Path("few-sort.yaml").exists()
    assert (recipe.keep.kind, recipe.keep.rows) == ("self_replay", 16)


def test_pairs_and_texts_get_the_stage_that_learns_from_them(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "pairs.jsonl", pairs(16))
    draft("base", "pairs.jsonl", Path("dpo.yaml"))
    recipe = load_recipe(Path("dpo.yaml"))
    assert (recipe.train.stage, recipe.loss.kind) == ("preference", "dpo")
    assert recipe.data.train[0].sorted is None
    write_jsonl(tmp_path / "texts.jsonl", [{"text": "Belo is a town. " * 60}] * 101)
    draft("base", "texts.jsonl", Path("cpt.yaml"))
    recipe = load_recipe(Path("cpt.yaml"))
    assert (recipe.train.stage, recipe.data.targets, recipe.keep.kind) == ("cpt", "all", "none")
    assert load_recipe(Path("cpt-sort.yaml")).train.stage == "cpt"
    assert not recipe.model.template_args


def test_a_base_without_a_template_gets_one_that_fits_its_vocabulary(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in base.glob("chat_template*"):
        file.unlink()
    settings = base / "tokenizer_config.json"
    content = json.loads(settings.read_text("utf-8"))
    content.pop("chat_template", None)
    settings.write_text(json.dumps(content), "utf-8")
    write_jsonl(tmp_path / "rows.jsonl", rows(12))
    draft("base", "rows.jsonl", Path("rows.yaml"))
    recipe = load_recipe(Path("rows.yaml"))
    assert recipe.model.chat_template == "chatml"
    Run(recipe).refuse_faulty_rows()


@pytest.mark.parametrize(
    ("base_name", "data", "said"),
    [
        ("no/such/folder/x", "rows.jsonl", "--base: "),
        ("base", "none.jsonl", "--data: there is no file .*none.jsonl"),
        ("base", "broken.jsonl", "matches no known format"),
    ],
)
def test_what_cannot_be_used_is_named(base, tmp_path, monkeypatch, base_name, data, said):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", rows(3))
    write_jsonl(tmp_path / "broken.jsonl", [{"colour": 3}])
    with pytest.raises(YRunnerError, match=said) as caught:
        draft(base_name, data, Path("x.yaml"))
    assert not Path("x.yaml").exists()
    assert "yrun-init-" not in str(caught.value) or isinstance(caught.value, DataError)


def found(lengths: list[int], **keys: Any) -> DraftFacts:
    import numpy as np

    known = {
        "stage": "sft", "format": "alpaca", "rows": len(lengths), "refused": 0, "thinks": False,
        "switch": None, "template": None, "positions": 32768, "validates": False,
        "on_gpu": False,
    }  # fmt: skip
    return DraftFacts(**(known | {"lengths": np.array(lengths)} | keys))


@pytest.mark.parametrize(
    ("lengths", "keys", "length", "too_long"),
    [
        ([10, 200], {}, 256, 0),
        ([10, 257], {}, 512, 0),
        ([4096], {}, 4096, 0),
        ([300] * 999 + [9000], {}, 512, 1),
        ([9000] * 10, {}, 4096, 10),
        ([300, 3000], {"positions": 1024}, 1024, 1),
    ],
)
def test_the_length_holds_the_rows_and_fits_the_model(lengths, keys, length, too_long):
    measured = found(lengths, **keys)
    assert (measured.max_length, measured.num_too_long) == (length, too_long)
    assert 1 <= measured.batch_size <= 16
    assert measured.batch_size * measured.accumulation <= 32


def test_an_update_is_smaller_for_fewer_rows():
    few, many = found([200] * 60), found([200] * 6000)
    assert few.batch_size * few.accumulation == 4
    assert (few.epochs, many.epochs) == (7, 3)
    assert found([200] * 20).epochs == 10 and found([200] * 20, stage="cpt").epochs == 1
    assert many.batch_size * many.accumulation == 32


@pytest.mark.parametrize(
    ("number", "on_gpu", "few"), [(40, False, True), (40, True, False), (100, False, False)]
)
def test_the_base_writes_few_rows_where_that_would_take_longest(number, on_gpu, few):
    assert found([80] * number, on_gpu=on_gpu).writes_few is few
