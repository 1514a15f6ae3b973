"""Weights are read one at a time, from one file or many, as safetensors reads them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from yrunner.errors import ModelError
from yrunner.models.merge.safetensors_io import open_checkpoint


@pytest.fixture
def folder(tmp_path):
    """Weights of several dtypes and shapes in two files."""
    generator = torch.Generator().manual_seed(1)
    files = {
        "model-1.safetensors": {
            "a": torch.randn(3, 5, generator=generator),
            "b": torch.randn(7, generator=generator).bfloat16(),
        },
        "model-2.safetensors": {
            "c": torch.randn(2, 2, 2, generator=generator).half(),
            "d": torch.tensor(3, dtype=torch.int64),
        },
    }
    for name, weights in files.items():
        save_file(weights, tmp_path / name, metadata={"format": "pt"})
    weight_map = {weight: name for name, weights in files.items() for weight in weights}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_every_weight_is_what_safetensors_reads(folder):
    save_file({"stray": torch.ones(2)}, folder / "consolidated.safetensors")
    checkpoint = open_checkpoint(str(folder))
    expected = {
        name: weight
        for file in ("model-1.safetensors", "model-2.safetensors")
        for name, weight in load_file(folder / file).items()
    }
    assert checkpoint.sizes.keys() == expected.keys(), "the index says which files count"
    for name, weight in expected.items():
        assert torch.equal(checkpoint.read(name), weight)
        assert checkpoint.sizes[name].dtype == weight.dtype
        assert checkpoint.sizes[name].is_meta
    assert checkpoint.main_dtype() == torch.float32


def test_a_weight_that_was_read_may_be_changed_without_changing_the_file(folder):
    checkpoint = open_checkpoint(str(folder))
    checkpoint.read("a").zero_()
    assert checkpoint.read("a").abs().sum() > 0


def test_a_file_that_is_missing_or_damaged_is_named(folder):
    path = folder / "model-2.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    with pytest.raises(ModelError, match=r"model-2\.safetensors has a damaged safetensors file"):
        open_checkpoint(str(folder))
    path.unlink()
    with pytest.raises(ModelError, match=r"lacks model-2\.safetensors"):
        open_checkpoint(str(folder))
