"""Without a network a Hub id is answered at once, not after a minute of trying again."""

import socket
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from yrunner.errors import MissingError, ModelError, YRunnerError
from yrunner.models import hub
from yrunner.models.hub import modelscope_folder
from yrunner.models.load import load_model, load_tokenizer
from yrunner.models.local import find_gguf
from yrunner.recipe.load import load_recipe


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def no_address(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", no_address)
    monkeypatch.setattr("yrunner.models.hub.getproxies", dict)
    hub._hub_resolves.cache_clear()
    yield
    hub._hub_resolves.cache_clear()


def test_a_hub_id_out_of_reach_is_named_at_once():
    with pytest.raises(ModelError, match="is not cached, and the Hub is unreachable"):
        load_tokenizer("nobody/no-such-model")
    with pytest.raises(ModelError, match="is not cached, and the Hub is unreachable"):
        load_model("nobody/no-such-model", dtype=torch.float32)
    with pytest.raises(ModelError, match="is not cached, and the Hub is unreachable"):
        find_gguf("nobody/no-such-model/file.gguf")


def test_a_folder_needs_no_hub(tmp_path):
    assert not hub.only_cached(str(tmp_path))
    assert hub.only_cached("nobody/no-such-model")


def test_behind_a_proxy_the_hub_is_asked(monkeypatch):
    monkeypatch.setattr("yrunner.models.hub.getproxies", lambda: {"https": "http://proxy:1"})
    assert not hub.only_cached("nobody/no-such-model")


def fake_modelscope(monkeypatch, download):
    """A package like ModelScope's, whose `snapshot_download` is this function."""
    package, errors = ModuleType("modelscope"), ModuleType("modelscope.hub.errors")
    package.snapshot_download = download
    package.__spec__ = ModuleSpec("modelscope", None)
    errors.HubError = type("HubError", (Exception,), {})
    monkeypatch.setitem(sys.modules, "modelscope", package)
    monkeypatch.setitem(sys.modules, "modelscope.hub", ModuleType("modelscope.hub"))
    monkeypatch.setitem(sys.modules, "modelscope.hub.errors", errors)
    return errors.HubError


def test_a_model_of_modelscope_is_downloaded_without_its_pickles(monkeypatch):
    asked = []

    def download(name, **options):
        asked.append((name, options["revision"]))
        assert "*.bin" in options["ignore_patterns"]
        return "/cache/model"

    fake_modelscope(monkeypatch, download)
    assert modelscope_folder("modelscope:Qwen/Qwen3-0.6B") == "/cache/model"
    modelscope_folder("modelscope:Qwen/Qwen3-0.6B@v1.0")
    assert asked == [("Qwen/Qwen3-0.6B", None), ("Qwen/Qwen3-0.6B", "v1.0")]


@pytest.mark.parametrize("kind", ["hub", OSError, ValueError])
def test_a_model_that_modelscope_does_not_give_is_named(monkeypatch, kind):
    def fail(*_, **__):
        raise error("no such model")

    hub_error = fake_modelscope(monkeypatch, fail)
    error = hub_error if kind == "hub" else kind
    with pytest.raises(ModelError, match=r"modelscope:a/b cannot be downloaded: no such model"):
        modelscope_folder("modelscope:a/b")


def test_without_its_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("yrunner.models.hub.find_spec", lambda _: None)
    with pytest.raises(MissingError, match=r"yrunner\[modelscope\]"):
        modelscope_folder("modelscope:a/b")


@pytest.mark.parametrize(
    "base", ["modelscope:", "modelscope:name", "modelscope:a/b@", "modelscope:/b"]
)
def test_a_name_that_modelscope_cannot_have_is_refused_by_the_recipe(base, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(f"name: a\nmodel: {{base: '{base}'}}\ntuning: {{kind: lora}}\n", "utf-8")
    with pytest.raises(YRunnerError, match="is not a model of ModelScope; write"):
        load_recipe(path)
