"""Which precision `model.dtype: auto` gives a run, and that a run keeps it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from yrunner.assembly import run as run_module
from yrunner.assembly.measure import kept_results
from yrunner.assembly.run import Run
from yrunner.errors import MissingError
from yrunner.scoring.half_products import HalfLinear
from yrunner.storage.run_dir import write_json

LEGAL = Path(__file__).parents[2] / "recipes" / "legal_sft.yaml"


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """A run with LoRA on a model of some width, on a CPU that is faster in bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run_module, "time_in_bfloat16", lambda width, inner: 0.5)

    def make(*overrides, width=576, **options):
        run = Run.load(LEGAL, [f"output={tmp_path / 'run'}", *overrides], **options)
        text = SimpleNamespace(hidden_size=width, intermediate_size=3 * width)
        run.__dict__["config"] = SimpleNamespace(get_text_config=lambda: text)
        return run

    return make


def test_lora_is_computed_in_bfloat16_where_a_probe_finds_it_faster(make_run):
    run = make_run()
    assert run.dtype == torch.bfloat16
    assert "0.50 of float32's time" in run.precision.why


@pytest.mark.parametrize("share", [None, 0.9])
def test_without_instructions_or_gain_it_is_float32(share, make_run, monkeypatch):
    monkeypatch.setattr(run_module, "time_in_bfloat16", lambda width, inner: share)
    assert make_run().dtype == torch.float32


@pytest.mark.parametrize(
    "override",
    [
        "model.dtype=float32",
        "tuning={kind: full}",
        "tuning={kind: qlora}",
        "tuning={kind: lora, variant: dora}",
        "distributed.processes=2",
    ],
)
def test_nothing_else_changes_its_precision(override, make_run):
    assert make_run(override).dtype == torch.float32


def test_a_narrow_model_is_not_probed(make_run):
    assert make_run(width=192).dtype == torch.float32


@pytest.mark.parametrize(
    ("environment", "dtype"),
    [({"dtype": "float32"}, torch.float32), ({"dtype": "bfloat16"}, torch.bfloat16), ({}, None)],
)
def test_a_resumed_run_keeps_what_it_began_with(environment, dtype, make_run, monkeypatch):
    run = make_run(resume=True)
    run.folder.create()
    write_json(run.folder.environment, environment)
    assert run.dtype == (dtype or torch.float32), "runs of older versions are float32"
    assert run.precision.why == "as the run began"
    named = make_run("model.dtype=bfloat16", resume=True)
    assert named.dtype == torch.bfloat16


@pytest.mark.parametrize("override", ["", "tuning={kind: full}", "train.stage=cpt"])
def test_models_that_only_look_compute_products_in_bfloat16(override, make_run):
    run = make_run(*([override] if override else []))
    assert run.halves_products
    assert run.looks_in == "float32 with products in bfloat16"


@pytest.mark.parametrize(
    ("override", "looks_in"),
    [
        ("model.dtype=float32", "torch.float32"),
        ("model.dtype=bfloat16", "torch.bfloat16"),
        ("sort.processes=2", "torch.float32"),
        ("tuning={kind: lora, adapter: somewhere}", "torch.float32"),
    ],
)
def test_a_dtype_of_the_recipe_wins_and_processes_must_agree(override, looks_in, make_run):
    run = make_run(override)
    assert not run.halves_products
    assert run.looks_in == looks_in


def test_ranks_do_not_choose_each_for_itself(make_run, monkeypatch):
    monkeypatch.setattr(run_module, "num_ranks", lambda: 2)
    assert not make_run().halves_products


def test_what_a_base_said_in_other_products_is_not_taken_for_its_own(trained_base, monkeypatch):
    def key(*overrides, **options):
        run = Run.load(Path("tuned.yaml"), overrides)
        text = SimpleNamespace(hidden_size=576, intermediate_size=1536)
        run.__dict__["config"] = SimpleNamespace(get_text_config=lambda: text)
        return kept_results(run, **options).model

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run_module, "time_in_bfloat16", lambda width, inner: None)
    float32 = key()
    assert float32 == key("model.dtype=float32")
    monkeypatch.setattr(run_module, "time_in_bfloat16", lambda width, inner: 0.5)
    assert key() != float32
    assert key("model.dtype=float32") == float32
    assert key("model.dtype=bfloat16") not in (float32, key())


def test_a_model_is_loaded_with_products_in_bfloat16(trained_base, monkeypatch):
    run = Run.load(Path("tuned.yaml"))
    run.__dict__["halves_products"] = True
    linear = nn.Linear | HalfLinear
    layers = {type(layer) for layer in run.load_base().modules() if isinstance(layer, linear)}
    assert layers == {HalfLinear, nn.Linear}, "the head stays"


def test_float16_needs_a_gpu(make_run):
    with pytest.raises(MissingError, match="float16 needs a GPU"):
        _ = make_run("model.dtype=float16").dtype
