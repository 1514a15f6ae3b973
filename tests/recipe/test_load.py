"""Loading a recipe: files, paths, bases, and the way back to YAML."""

import os
import subprocess
import sys
from glob import glob
from pathlib import Path

import pytest

from yrunner.errors import RecipeError
from yrunner.recipe.load import base_recipe_path, load_recipe, recipe_to_yaml
from yrunner.recipe.schema.section import FETCHED_GGUF


def failure(path: Path | str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(Path(path))
    assert caught.value.exit_code == 2
    return [str(problem) for problem in caught.value.problems]


def test_a_small_recipe_loads_with_defaults_and_absolute_paths(folder, valid):
    (folder / "recipe.yaml").write_text(valid)
    recipe = load_recipe(Path("recipe.yaml"))
    assert recipe.data.train[0].file == (folder / "rows.jsonl").resolve()
    assert recipe.model.base == str((folder / "base").resolve())
    assert recipe.tuning.kind == "lora"
    assert recipe.train.learning_rate == 1e-4


def test_the_path_is_shown_as_it_was_given(folder, valid):
    (folder / "recipe.yaml").write_text(valid + "sed: 1\n")
    for path in ("recipe.yaml", folder / "recipe.yaml", "../" + folder.name + "/recipe.yaml"):
        assert failure(path) == [f'{path}:7:1: sed: unknown key, did you mean "seed"?']


def test_a_file_that_is_not_there_names_the_nearest_one(folder, valid):
    (folder / "legal_sft.yaml").write_text(valid)
    assert failure("legal-sft.yaml") == [
        'legal-sft.yaml: no such file, did you mean "legal_sft.yaml"?'
    ]
    assert failure("zzz.yaml") == ["zzz.yaml: no such file; check the path"]
    assert failure("no/x.yaml") == [
        "no/x.yaml: no such file; the folder no does not exist or cannot be read"
    ]


def test_a_folder_is_not_a_recipe(folder):
    assert failure("base") == ["base: this is a folder; give the recipe file in it"]


def test_data_is_not_a_recipe(folder):
    (said,) = failure("rows.jsonl")
    assert said.startswith("rows.jsonl: this is data, not a recipe; ")
    assert said.endswith("yrun init --base MODEL --data rows.jsonl")


def test_a_large_file_is_refused_unread(folder):
    (folder / "recipe.yaml").write_text("#" * 1_000_001)
    assert failure("recipe.yaml") == [
        "recipe.yaml: larger than 1,000,000 bytes, so not a recipe; give the YAML file"
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_says_so(folder, valid):
    (folder / "recipe.yaml").write_text(valid)
    (folder / "recipe.yaml").chmod(0)
    assert failure("recipe.yaml") == [
        "recipe.yaml: the file cannot be read (Permission denied); check its path and permissions"
    ]


def test_an_unreadable_file_says_why(folder, valid, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert failure("recipe.yaml") == [
        "recipe.yaml: the file cannot be read (Permission denied); check its path and permissions"
    ]


@pytest.mark.parametrize("path", ["a\0b.yaml", "a" * 5_000 + ".yaml"])
def test_an_impossible_path_is_a_problem_not_a_crash(path, folder):
    assert "the file cannot be read" in failure(path)[0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("gone.jsonl", "there is no file {}/gone.jsonl; paths are relative to the recipe file"),
        ("sub/*.jsonl", "no file matches {}/sub/*.jsonl; paths are relative to the recipe file"),
        (
            "~nobody-here/x",
            "there is no file {}/~nobody-here/x; paths are relative to the recipe file",
        ),
        ('"a\\0b"', "there is no file {}/a?b; paths are relative to the recipe file"),
    ],
)
def test_a_data_file_must_exist(value, message, folder, valid, problems):
    found = problems(valid.replace("rows.jsonl", value))
    message = message.format(folder.resolve())
    assert found == [f"recipe.yaml:6:13: data.train.0.file: {message}"]


@pytest.mark.parametrize("place", ["base", "*.jsonl", "**/rows.jso[n]l", "base/../rows.jsonl"])
def test_data_may_be_a_folder_or_a_glob_and_the_resolved_recipe_still_finds_it(
    place, folder, valid
):
    (folder / "recipe.yaml").write_text(valid.replace("rows.jsonl", f"'{place}'"))
    recipe = load_recipe(Path("recipe.yaml"))
    file = recipe.data.train[0].file
    assert file.is_absolute() and ".." not in file.parts
    (folder / "base" / "resolved.yaml").write_text(recipe_to_yaml(recipe))
    assert load_recipe(folder / "base" / "resolved.yaml") == recipe


def test_signs_of_a_glob_in_a_real_name_mean_themselves(folder, valid):
    (folder / "a[1]").mkdir()
    for name in ("rows*.jsonl", "rows1.jsonl"):
        (folder / "a[1]" / name).write_text("")
    (folder / "a[1]" / "one.yaml").write_text(valid.replace("./", "../").replace("s.j", "s*.j"))
    (folder / "a[1]" / "all.yaml").write_text(valid.replace("./", "../").replace("rows.j", "r*.j"))
    one = load_recipe(folder / "a[1]" / "one.yaml").data.train[0].file
    assert one == (folder / "a[1]" / "rows*.jsonl").resolve()
    every = load_recipe(folder / "a[1]" / "all.yaml").data.train[0].file
    assert sorted(Path(match).name for match in glob(str(every))) == ["rows*.jsonl", "rows1.jsonl"]


@pytest.mark.parametrize(
    ("place", "command"),
    [
        ("models", "yrun fetch models"),
        ("./models/../base", "yrun fetch base"),
        (".", "yrun fetch ."),
        ("..", "yrun fetch .."),
        ("./my models", "yrun fetch 'my models'"),
    ],
)
def test_a_model_that_is_not_fetched_yet_names_the_command(place, command, folder, valid, problems):
    found = problems(valid.replace("./base", f"{place}/{FETCHED_GGUF}"))
    file = f"{folder.resolve()}/{place}/{FETCHED_GGUF}".replace("/./", "/")
    assert found == [f"recipe.yaml:3:9: model.base: there is no file {file}; run {command}"]


@pytest.mark.parametrize("file", ["models/SmolLM2-135M-Instruct.Q8_0.gguf", "./other.gguf"])
def test_another_missing_gguf_file_has_no_such_command(file, valid, problems):
    [problem] = problems(valid.replace("./base", file))
    assert problem.endswith("; paths are relative to the recipe file")


@pytest.mark.parametrize("base", ["Qwen/Qwen3-0.6B", "gpt2", "unsloth/Qwen3-4B-bnb-4bit"])
def test_a_hub_id_stays_unchanged(base, folder, valid):
    (folder / "recipe.yaml").write_text(valid.replace("./base", base))
    assert load_recipe(Path("recipe.yaml")).model.base == base


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("./gone", "there is no folder {}/gone; paths are relative to the recipe file"),
        ("rows.jsonl", "{}/rows.jsonl is a file; give the model's folder"),
        ("gone.yaml", "there is no file {}/gone.yaml; paths are relative to the recipe file"),
        (
            "a/b/c",
            '"a/b/c" is neither a folder, relative to the recipe file, nor a Hub id; write '
            '"./folder" or "organisation/name"',
        ),
        (
            "my model",
            '"my model" is neither a folder, relative to the recipe file, nor a Hub id; write '
            '"./folder" or "organisation/name"',
        ),
    ],
)
def test_any_other_base_is_refused(base, message, folder, valid, problems):
    found = problems(valid.replace("./base", base))
    assert found == [f"recipe.yaml:3:9: model.base: {message.format(folder.resolve())}"]


def test_an_adapter_is_a_folder_or_a_hub_id(folder, valid, problems):
    adapter = valid + "tuning: {kind: lora, adapter: ADAPTER}\n"
    (folder / "recipe.yaml").write_text(adapter.replace("ADAPTER", "base"))
    tuning = load_recipe(Path("recipe.yaml")).tuning
    assert tuning.adapter == str((folder / "base").resolve())
    assert problems(adapter.replace("ADAPTER", "./gone")) == [
        f"recipe.yaml:7:31: tuning.adapter: there is no folder {folder.resolve()}/gone; "
        "paths are relative to the recipe file"
    ]


def test_a_base_that_is_a_recipe_becomes_its_absolute_path(folder, valid):
    (folder / "low").mkdir()
    (folder / "low" / "tiny.yaml").write_text(valid.replace("./", "../").replace("rows", "../rows"))
    (folder / "recipe.yaml").write_text(valid.replace("./base", "low/tiny.yaml"))
    recipe = load_recipe(Path("recipe.yaml"))
    assert base_recipe_path(recipe) == (folder / "low" / "tiny.yaml").resolve()
    assert base_recipe_path(load_recipe(folder / "low" / "tiny.yaml")) is None


def test_faults_of_the_base_recipe_follow_under_its_own_name(folder, valid, problems):
    (folder / "tiny.yaml").write_text(valid + "sed: 1\n")
    assert problems(valid.replace("./base", "tiny.yaml") + "early: 1\n") == [
        'recipe.yaml:7:1: early: unknown key, did you mean "eval"?',
        'tiny.yaml:7:1: sed: unknown key, did you mean "seed"?',
    ]


def test_a_cycle_of_bases_is_shown(folder, valid):
    (folder / "a.yaml").write_text(valid.replace("./base", "b.yaml"))
    (folder / "b.yaml").write_text(valid.replace("./base", "a.yaml"))
    (folder / "c.yaml").write_text(valid.replace("./base", "./c.yaml"))
    (folder / "d.yaml").write_text(valid.replace("./base", "a.yaml"))
    sentence = "the base recipes form a cycle ({}); use a model as the base of one"
    circle = sentence.format("a.yaml -> b.yaml -> a.yaml")
    assert failure("a.yaml") == [f"b.yaml:3:9: model.base: {circle}"]
    assert failure("d.yaml") == [f"b.yaml:3:9: model.base: {circle}"]
    assert failure("c.yaml") == [f"c.yaml:3:9: model.base: {sentence.format('c.yaml -> c.yaml')}"]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.max_steps=10", "output=somewhere/else", "tuning={kind: full}"],
        ["tuning={kind: lora, adapter: base}", "data.validation_share=1e-1"],
        ["tuning={kind: freeze}", "loss={kind: nlirg}", 'data.system="律师: é"'],
        ['data.train.0.columns={"1e-4": "no", a: "2026-01-01", b: ".5", c: "~", d: "x: y"}'],
    ],
)
def test_the_resolved_recipe_loads_as_an_equal_recipe_from_anywhere(folder, valid, overrides):
    (folder / "recipe.yaml").write_text(valid)
    recipe = load_recipe(Path("recipe.yaml"), overrides)
    (folder / "outputs").mkdir()
    resolved = folder / "outputs" / "recipe.resolved.yaml"
    resolved.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    assert load_recipe(resolved) == recipe


def test_a_new_model_survives_the_way_to_yaml_and_back(folder, valid):
    (folder / "recipe.yaml").write_text(
        valid.replace("base: ./base", "scratch: {config: {model_type: qwen3, rms_norm_eps: 1e-6}}")
        + "tuning: {kind: full}\ntrain: {stage: pretrain}\n"
    )
    recipe = load_recipe(Path("recipe.yaml"))
    assert recipe.model.scratch.config["rms_norm_eps"] == 1e-6
    (folder / "again.yaml").write_text(recipe_to_yaml(recipe))
    assert load_recipe(Path("again.yaml")) == recipe


def test_loading_imports_no_torch(folder, valid):
    (folder / "recipe.yaml").write_text(valid + "sed: 1\n")
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from yrunner.errors import RecipeError\n"
        "from yrunner.recipe.load import load_recipe\n"
        "try:\n    load_recipe(Path('recipe.yaml'))\n"
        "except RecipeError as error:\n    print(error)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'jsonschema'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert 'did you mean "seed"?' in done.stdout


def test_a_tilde_in_output_is_the_home_folder(folder, valid, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    (folder / "recipe.yaml").write_text(valid)
    recipe = load_recipe(folder / "recipe.yaml", ["output=~/runs/x"])
    assert recipe.run_folder == Path("/home/somebody/runs/x")
