"""`key=value` on the command line."""

from pathlib import Path

import pytest

from yrunner.recipe.load import load_recipe


def load(text: str, *overrides: str):
    Path("recipe.yaml").write_text(text)
    return load_recipe(Path("recipe.yaml"), overrides)


def test_values_are_read_as_yaml(folder, valid):
    recipe = load(
        valid,
        "train.learning_rate=1e-5",
        "data.system=a = b",
        "loss={kind: nlirg, k: 2}",
        "train.trackers=[wandb]",
        "output=",
    )
    assert recipe.train.learning_rate == 1e-5
    assert recipe.data.system == "a = b"
    assert recipe.loss.kind == "nlirg"
    assert recipe.train.trackers == ["wandb"]
    assert recipe.output is None


def test_list_items_are_numbered_and_the_next_number_adds_one(folder, valid):
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_text("{}\n")
    recipe = load(valid, "data.train.0.file=a.jsonl", "data.train.1.file=b.jsonl")
    assert [item.file.name for item in recipe.data.train] == ["a.jsonl", "b.jsonl"]
    recipe = load(valid, "data.validation.0.file=b.jsonl")
    assert recipe.data.validation[0].file == folder.resolve() / "b.jsonl"


def test_paths_are_relative_to_the_recipe_not_to_the_current_folder(folder, valid):
    (folder / "deep").mkdir()
    (folder / "deep" / "rows.jsonl").write_text("{}\n")
    (folder / "deep" / "base").mkdir()
    path = folder / "deep" / "recipe.yaml"
    path.write_text(valid)
    recipe = load_recipe(path, ["data.train.0.file=rows.jsonl"])
    assert recipe.data.train[0].file == (folder / "deep" / "rows.jsonl").resolve()


def test_an_aliased_section_is_changed_in_one_place_only(folder, valid):
    recipe = load(
        valid + "  validation: [&rows {file: rows.jsonl}, *rows]\n", "data.validation.0.format=text"
    )
    assert [item.format for item in recipe.data.validation] == ["text", "auto"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "train.lerning_rate=1",
            'train.lerning_rate: unknown key, did you mean "learning_rate"?',
        ),
        (
            "train.learning_rate=0",
            "train.learning_rate: must be a number above 0, got 0",
        ),
        (
            "tuning={rank: 3}",
            'tuning.kind: this key is missing; it must be one of "freeze", "full", "lora", "qlora"',
        ),
        ("foo", "not an override; write key=value, for example train.learning_rate=1e-5"),
        ("=3", "not an override; write key=value, for example train.learning_rate=1e-5"),
        ("train..x=3", "not an override; write key=value, for example train.learning_rate=1e-5"),
        ("name.x=1", 'name.x: "name" is a single value and has no "x"; set "name" itself'),
        (
            "data.train.7.file=x",
            'data.train.7.file: "data.train" is a list of length 1; indices start at 0, '
            "data.train.1 appends an item",
        ),
        (
            "loss={kind: plain",
            'the "{" opened here has no "}", or a comma is missing; add it',
        ),
        (
            "seed=!!python/name:os.system x",
            "seed: the tag !!python/name:os.system is not allowed in a recipe; remove it",
        ),
    ],
)
def test_a_fault_is_named_by_its_override(override, expected, valid, problems):
    assert problems(valid, override) == [f"override {override}: {expected}"]


def test_a_conflict_with_the_file_is_named_by_the_override_that_brought_it(valid, problems):
    text = valid + "  validation_share: 0.1\n"
    conflict = "data: validation and validation_share cannot be combined; remove one"
    override = "data.validation=[{file: rows.jsonl}]"
    assert problems(text, override) == [f"override {override}: {conflict}"]
    both = text + "  validation: [{file: rows.jsonl}]\n"
    assert problems(both, "train.learning_rate=1") == [f"recipe.yaml:8:3: {conflict}"]


def test_another_kind_tells_which_keys_no_longer_fit(valid, problems):
    text = valid + "tuning:\n  kind: lora\n  rank: 8\n"
    assert problems(text, "tuning.kind=full") == [
        "recipe.yaml:9:3: tuning.rank: only kinds lora and qlora have this key, not full; "
        "remove it, "
        'or override the whole section: "tuning={kind: full}"'
    ]
    assert problems(text, "tuning={kind: full}") == []


def test_faults_of_the_file_come_first_then_overrides_in_their_order(valid, problems):
    text = valid + "sed: 1\n"
    found = problems(text, "train.epochs=0", "foo", "early=1", "seed=-1")
    assert [line.split(":")[0] for line in found] == [
        "recipe.yaml",
        "override train.epochs=0",
        "override foo",
        "override early=1",
        "override seed=-1",
    ]


def test_malformed_overrides_are_reported_beside_a_file_that_cannot_be_read(problems):
    assert problems("a: [1", "foo") == [
        'recipe.yaml:1:4: the "[" opened here has no "]", or a comma is missing; add it',
        "override foo: not an override; write key=value, for example train.learning_rate=1e-5",
    ]
