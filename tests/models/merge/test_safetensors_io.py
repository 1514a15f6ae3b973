"""Weights are read and written one at a time, as safetensors does it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from yrunner.errors import ModelError
from yrunner.models.merge import safetensors_io
from yrunner.models.merge.safetensors_io import (
    DTYPE_NAMES,
    locate_weights,
    open_checkpoint,
    write_weights,
)


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


def test_changing_a_weight_that_was_read_does_not_change_the_file(folder):
    checkpoint = open_checkpoint(str(folder))
    checkpoint.read("a").zero_()
    assert checkpoint.read("a").abs().sum() > 0


def test_a_file_that_is_missing_or_damaged_is_named(folder):
    path = folder / "model-2.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    with pytest.raises(ModelError, match=r"model-2\.safetensors is cut: it has"):
        open_checkpoint(str(folder))
    path.unlink()
    with pytest.raises(ModelError, match=r"lacks model-2\.safetensors"):
        open_checkpoint(str(folder))


def weights_of_every_dtype():
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randint(0, 2, (3, 5), generator=generator)
    return {f"weight {name}": numbers.to(dtype) for dtype, name in DTYPE_NAMES.items()} | {
        "single": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }


def as_sizes(weights):
    return {name: weight.to("meta") for name, weight in weights.items()}


def test_what_is_written_is_what_safetensors_reads(tmp_path):
    weights = weights_of_every_dtype()
    write_weights(tmp_path / "file", as_sizes(weights), weights.__getitem__)
    read = load_file(tmp_path / "file")
    assert read.keys() == weights.keys()
    for name, weight in weights.items():
        assert read[name].dtype == weight.dtype
        assert torch.equal(read[name].float(), weight.float()), name


def test_all_data_are_aligned(tmp_path):
    weights = {"odd": torch.ones(3, dtype=torch.int8), "wide": torch.ones(2, dtype=torch.float64)}
    write_weights(tmp_path / "file", as_sizes(weights), weights.__getitem__)
    for location in locate_weights(tmp_path / "file").values():
        assert location.start % location.size.element_size() == 0


@pytest.mark.parametrize("stretch", [1, 4, 1000])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_what_is_read_is_what_safetensors_wrote(stretch, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_io, "STRETCH", stretch)
    weights = weights_of_every_dtype()
    save_file(weights, tmp_path / "file", metadata={"format": "pt"})
    locations = locate_weights(tmp_path / "file")
    assert locations.keys() == weights.keys()
    for name, weight in weights.items():
        read = locations[name].read(dtype)
        assert read.dtype == (dtype or weight.dtype)
        assert read.shape == weight.shape
        assert torch.equal(read.float(), weight.float()), name


def test_a_weight_of_another_shape_than_in_the_header_is_our_bug(tmp_path):
    sizes = {"a": torch.empty(2, 2, device="meta")}
    with pytest.raises(AssertionError, match="a has another size"):
        write_weights(tmp_path / "file", sizes, lambda _: torch.ones(4))
