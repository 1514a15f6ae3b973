"""The arms of an experiment: from the recipe, from --vary, and their faults."""

from pathlib import Path

import pytest
import yaml

from tests.conftest import write_jsonl
from yrunner.errors import RecipeError, YRunnerError
from yrunner.recipe.arms import choose_arms, grid, read_seeds
from yrunner.recipe.load import load_recipe


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write recipe.yaml with these arms, in a folder where commands run."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b"}])

    def write_recipe(**compare):
        content = {
            "name": "trial",
            "model": {"base": "some/model"},
            "data": {"train": [{"file": "rows.jsonl"}]},
            "compare": compare,
        }
        path = Path("recipe.yaml")
        path.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
        return path

    return write_recipe


def test_several_vary_make_a_grid_with_the_first_values_as_baseline():
    arms = grid(["loss.kind=plain,nlirg", "train.learning_rate=1e-3,3e-4"])
    assert [(arm.name, dict(arm.changes)) for arm in arms] == [
        ("plain_learning_rate-1e-3", {"loss.kind": "plain", "train.learning_rate": 1e-3}),
        ("plain_learning_rate-3e-4", {"loss.kind": "plain", "train.learning_rate": 3e-4}),
        ("nlirg_learning_rate-1e-3", {"loss.kind": "nlirg", "train.learning_rate": 1e-3}),
        ("nlirg_learning_rate-3e-4", {"loss.kind": "nlirg", "train.learning_rate": 3e-4}),
    ]


@pytest.mark.parametrize(
    ("vary", "names"),
    [
        ("data.packing=true,no", ["packing-true", "packing-no"]),
        ("tuning={kind: full},{kind: lora, rank: 8}", ["full", "lora-rank-8"]),
        ("model.base=a/b, ../c", ["base-a-b", "base-..-c"]),
        ("train.epochs=1", ["epochs-1"]),
        ("tuning.targets=[q_proj, v_proj],all-linear", ["targets-q_proj-v_proj"]),
    ],
)
def test_an_arm_of_vary_is_called_by_its_value_in_letters_fit_for_a_folder(vary, names):
    assert [arm.name for arm in grid([vary])][: len(names)] == names


@pytest.mark.parametrize(
    ("vary", "complaint"),
    [
        ("loss.kind", "a key or its values are missing. Write --vary key=value,value"),
        ("loss.kind=", "a key or its values are missing"),
        ("=plain", "a key or its values are missing"),
        ("seed=1,2", "seed is the same for every arm"),
        ("eval.batch_size=1,2", "eval.batch_size is the same for every arm"),
        ("sort.drop_share=0,0.1", "sort.drop_share is the same for every arm"),
        ("train.checkpoint.keep=1,2", "is the same for every arm"),
        ("loss.kind=plain,plain", 'makes two arms called "plain"'),
        ("loss={kind: plain", "--vary loss={kind: plain"),
        ("loss={kind: plain, kind: dft},nlirg", "this key is given twice"),
    ],
)
def test_a_faulty_vary_is_one_sentence(vary, complaint):
    with pytest.raises(YRunnerError) as caught:
        grid([vary])
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_arms_of_a_recipe_change_what_they_say_and_nothing_else(write):
    path = write(arms={"as-it-is": {}, "long": {"train.epochs": 9, "loss": {"kind": "dft"}}})
    (first, recipe), (second, changed) = choose_arms(path, ["seed=7"], vary=[], only=None).items()
    assert [first.name, second.name] == ["as-it-is", "long"]
    assert recipe == load_recipe(path, ["seed=7"])
    assert changed == load_recipe(path, ["seed=7", "train.epochs=9", "loss={kind: dft}"])


def test_only_chooses_among_arms_in_the_order_given_and_the_first_is_the_baseline(write):
    path = write(arms={"a": {}, "b": {"train.epochs": 9}, "c": {"train.epochs": 8}})
    assert [arm.name for arm in choose_arms(path, [], vary=[], only="c, a")] == ["c", "a"]
    with pytest.raises(YRunnerError, match='there is no arm "d"; the arms are a, b, c'):
        choose_arms(path, [], vary=[], only="a,d")


def test_vary_replaces_the_recipes_arms(write):
    path = write(arms={"a": {}})
    assert [arm.name for arm in choose_arms(path, [], vary=["loss.kind=dft"], only=None)] == ["dft"]


def test_every_fault_of_every_arm_is_reported_with_the_arms_name(write):
    path = write(arms={"a": {"train.epohs": 3}, "b": {}, "c": {"train.learning_rate": "fast"}})
    with pytest.raises(RecipeError) as caught:
        choose_arms(path, [], vary=[], only=None)
    first, second = str(caught.value).splitlines()
    assert first.startswith("recipe.yaml: arm a: override train.epohs=3: train.epohs: unknown key")
    assert second.startswith('recipe.yaml: arm c: override train.learning_rate="fast": ')


def test_a_recipe_without_arms_says_how_to_name_some(write):
    with pytest.raises(YRunnerError, match=r"has no arms\. Write --vary .*compare\.arms"):
        choose_arms(write(), [], vary=[], only=None)


@pytest.mark.parametrize(
    ("compare", "complaint"),
    [
        ({"arms": {"a b": {}}}, '"a b" is not a valid arm name; use letters'),
        ({"arms": {"..": {}}}, '".." is not a valid arm name'),
        ({"arms": {"a": {"seed": 3}}}, '"a" sets seed, which is the same for every arm'),
        ({"arms": {"a": {"output": "x"}}}, '"a" sets output'),
        ({"arms": {"a": {"eval.tasks": []}}}, '"a" sets eval.tasks'),
        ({"arms": {"a": 3}}, "compare.arms.a: must be a section of names and values, got 3"),
        ({"seeds": [1, 1]}, "seeds: list each seed once"),
        ({"seeds": []}, "compare.seeds: must be a list of at least 1"),
        ({"domain_accuracy": 90}, "must be a number above 0 and of at most 1, got 90"),
        ({"arms": {"a": {"merge.dtype": "float32"}}}, '"a" sets merge.dtype'),
        ({"faults": {"data": "rows.jsonl"}}, "compare.faults: unknown key"),
    ],
)
def test_a_faulty_section_is_reported_at_its_line(write, compare, complaint):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(**compare))
    assert complaint in str(caught.value)
    assert str(caught.value).startswith("recipe.yaml:")


def test_seeds_are_numbers_between_commas():
    assert read_seeds("0, 3,0") == [0, 3]
    for text in ("", "a", "1;2", "-1", "1.5"):
        with pytest.raises(YRunnerError, match="is not a list of numbers"):
            read_seeds(text)
