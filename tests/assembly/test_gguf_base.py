"""A GGUF file as a base: every command works on it as on the folder that it was written from."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from tests.project import write_project, write_recipe
from yrunner.assembly.identity import changes_since
from yrunner.assembly.run import Run
from yrunner.commands.check.command import check
from yrunner.commands.eval.command import eval_recipe
from yrunner.commands.merge.command import merge
from yrunner.commands.sort.command import sort
from yrunner.commands.train import train, train_base
from yrunner.errors import MissingError, RunError
from yrunner.models.gguf.write import write_gguf
from yrunner.models.load import load_model, load_tokenizer
from yrunner.models.merge.safetensors_io import open_checkpoint
from yrunner.recipe.load import load_recipe

BASE = "model.base=capitals.gguf"
RECIPE = Path("tuned.yaml")


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A project with a trained base as a folder and as GGUF, and a run from each."""
    folder = write_project(tmp_path_factory.mktemp("project"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(RECIPE, [], resume=False, overwrite=False)
        model = folder / "outputs/base/model"
        write_gguf(
            open_checkpoint(str(model)),
            AutoConfig.from_pretrained(model),
            load_tokenizer(str(model)),
            folder / "capitals.gguf",
            kind="f32",
            name="capitals",
            advance=lambda _: None,
        )
        train(RECIPE, [BASE, "output=outputs/gg"], resume=False, overwrite=False)
    return folder


@pytest.fixture
def project(once, tmp_path, monkeypatch):
    folder = shutil.copytree(once, tmp_path / "project")
    monkeypatch.chdir(folder)
    return folder


def arguments(*more):
    return [BASE, "output=outputs/gg", *more]


def test_the_run_is_that_from_the_folder(project):
    ours, theirs = (load_file(project / f"outputs/{name}/model/adapter_model.safetensors")
                    for name in ("gg", "tuned"))  # fmt: skip
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_run_says_where_its_base_came_from(project):
    record = json.loads((project / "outputs/gg/base.json").read_text())
    assert record["unpacked_from"]["file"] == "capitals.gguf"
    assert record["unpacked_from"]["types"]["F32"] > 0
    assert "capitals.gguf" in (project / "outputs/gg/model/README.md").read_text()


def test_check_sort_and_eval_read_it(project, capfd):
    check(
        RECIPE, [BASE, "output=outputs/checked"], gpus=None, memory=None, sample=4, as_machine=False
    )
    assert "ready to train" in capfd.readouterr().out
    sort(RECIPE, arguments(), overwrite=False, train_base=train_base)
    assert (project / "outputs/gg/sort/sorted.jsonl").exists()
    eval_recipe(RECIPE, arguments(), models=["capitals.gguf"])
    models = json.loads((project / "outputs/gg/eval.json").read_text())["models"]
    figures = {model["description"]: model["tasks"] for model in models}
    assert figures["base"] == figures["capitals.gguf"]


def test_it_is_merged_to_a_folder_and_to_gguf_again(project):
    merge(RECIPE, arguments("merge.gguf=f32"))
    merged = load_model(str(project / "outputs/gg/merged"), dtype=torch.float32)
    again = Run.load(RECIPE, ["model.base=outputs/gg/gguf", "output=outputs/next"])
    read = again.load_base()
    for name, weight in merged.state_dict().items():
        assert torch.equal(read.state_dict()[name], weight), name


def test_the_result_loads_although_the_unpacked_base_was_removed(project):
    shutil.rmtree(project / "outputs/.bases")
    Run.load(RECIPE, arguments()).load_result()
    merge(RECIPE, arguments())


def test_another_file_is_another_base(project):
    content = bytearray((project / "capitals.gguf").read_bytes())
    content[-4:] = b"\x00\x00\x80\x3f"
    (project / "capitals.gguf").write_bytes(content)
    with pytest.raises(RunError, match="its weights or config differ"):
        merge(RECIPE, arguments())
    (project / "capitals.gguf").write_bytes(content + b"\0" * 32)
    recipe = load_recipe(RECIPE, arguments())
    assert changes_since(Run(recipe).folder, recipe) == ["base.capitals.gguf"]


def test_without_its_package_the_command_that_adds_it_is_named(project, monkeypatch):
    monkeypatch.setattr("yrunner.assembly.run.find_spec", lambda _: None)
    with pytest.raises(MissingError, match="needs the package gguf") as error:
        _ = Run.load(RECIPE, arguments()).base_source
    assert error.value.remedy == "run pip install 'yrunner[gguf]'"


def test_a_file_on_the_hub_is_named_by_its_repository(project):
    base = "HuggingFaceTB/SmolLM2-135M-Instruct-GGUF/smollm2-135m-instruct-q8_0.gguf"
    assert load_recipe(RECIPE, [f"model.base={base}"]).model.base == base
    assert load_recipe(RECIPE, [BASE]).model.base == str(project / "capitals.gguf")
    write_recipe(project / "folder.yaml", {"name": "f", "model": {"base": "./x/y.gguf"}})
    with pytest.raises(Exception, match="there is no file"):
        load_recipe(project / "folder.yaml")
