"""A file that is written weight by weight is one of safetensors; one that is read is never twice
in memory."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from yrunner.models.merge import safetensors_io as weights_file
from yrunner.models.merge.safetensors_io import DTYPE_NAMES, find_weights, write_weights


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


def test_every_number_begins_where_its_width_wants_it(tmp_path):
    weights = {"odd": torch.ones(3, dtype=torch.int8), "wide": torch.ones(2, dtype=torch.float64)}
    write_weights(tmp_path / "file", as_sizes(weights), weights.__getitem__)
    for place in find_weights(tmp_path / "file").values():
        assert place.start % place.size.element_size() == 0


@pytest.mark.parametrize("stretch", [1, 4, 1000])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_what_is_read_is_what_safetensors_wrote(stretch, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(weights_file, "STRETCH", stretch)
    weights = weights_of_every_dtype()
    save_file(weights, tmp_path / "file", metadata={"format": "pt"})
    places = find_weights(tmp_path / "file")
    assert places.keys() == weights.keys()
    for name, weight in weights.items():
        read = places[name].read(dtype)
        assert read.dtype == (dtype or weight.dtype)
        assert read.shape == weight.shape
        assert torch.equal(read.float(), weight.float()), name


def test_a_weight_of_another_shape_than_was_announced_is_a_fault_of_ours(tmp_path):
    sizes = {"a": torch.empty(2, 2, device="meta")}
    with pytest.raises(AssertionError, match="a was announced"):
        write_weights(tmp_path / "file", sizes, lambda _: torch.ones(4))
