"""`yrun check` says which kinds of tuning fit on a machine, and what to change where none does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands.check.test_command import facts_of
from yrunner.assembly import memory
from yrunner.assembly.memory import Machine, as_bytes, choose_machine
from yrunner.commands.check.command import check
from yrunner.errors import YRunnerError


def lines_of(facts: dict[str, Any], tuning: str) -> dict[str, dict[str, Any]]:
    return {line["layout"]: line for line in facts["memory"]["lines"] if line["tuning"] == tuning}


def facts_on(
    capsys: pytest.CaptureFixture[str], gpus: int, memory: str, *overrides: str
) -> dict[str, Any]:
    capsys.readouterr()
    check(Path("tuned.yaml"), list(overrides), as_machine=True, sample=0, gpus=gpus, memory=memory)
    return dict(json.loads(capsys.readouterr().out))


def test_every_kind_and_stage_is_estimated_for_the_machine_that_is_named(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = facts_on(capsys, 4, "80GB")
    assert facts["memory"]["machine"] == "4 GPUs of 80 GB"
    assert {line["tuning"] for line in facts["memory"]["lines"]} == {
        "lora",
        "qlora",
        "freeze",
        "full",
    }
    own = lines_of(facts, "lora")
    assert list(own) == [
        "data parallel",
        "ZeRO 1",
        "ZeRO 2",
        "ZeRO 3",
        "ZeRO 2, offload",
        "ZeRO 3, offload",
    ]
    assert own["data parallel"]["is_own"]
    assert all(line["fits"] for line in facts["memory"]["lines"])
    assert "ZeRO 3" not in lines_of(facts, "qlora")
    assert facts["advice"] == []
    full = lines_of(facts, "full")
    assert full["ZeRO 3"]["weights"] < full["ZeRO 2"]["weights"]
    assert full["ZeRO 2"]["optimizer"] < full["data parallel"]["optimizer"]
    assert full["ZeRO 3, offload"]["host"] > 0


def test_where_nothing_fits_every_proposal_has_been_estimated(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = lines_of(facts_on(capsys, 1, "80GB"), "lora")["alone"]["peak"]
    # CUDA's own half a gigabyte, and room for a little less than the recipe needs.
    size = (0.9 * needed + memory.CONTEXT) / memory.IN_USE
    facts = facts_on(capsys, 1, f"{size / 1e6:.3f}MB")
    assert not any(line["fits"] for line in lines_of(facts, "lora").values())
    assert any("train.gradient_checkpointing=true" in line for line in facts["advice"])
    assert any("1 GPU of 16 GB (alone" in line for line in facts["advice"])


def test_the_tables_show_what_fits_and_what_to_change(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(Path("tuned.yaml"), [], as_machine=False, sample=0, gpus=2, memory="0.52GB")
    out = capsys.readouterr().out
    assert "planned for 2 GPUs of 0.52 GB" in out
    assert "lora (this recipe)" in out
    assert "this recipe does not fit. Changes that would make it fit:" in out
    assert "GPUs of 16 GB" in out


def test_missing_weights_are_refused_after_everything_was_said(
    trained_base: Path, change: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained_base / "outputs/base/model"
    (model / "model.safetensors").unlink()
    change("tuned.yaml", model__base=str(model))
    capsys.readouterr()
    with pytest.raises(YRunnerError, match=r"has no model\.safetensors"):
        check(Path("tuned.yaml"), ["data.packing=true", "data.max_length=200"], as_machine=True)
    facts = json.loads(capsys.readouterr().out)
    assert facts["memory"]["lines"]
    assert "model.safetensors" in facts["refused"]


def test_without_flags_it_is_this_machine(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Machine(2, 24 * 10**9, host=64 * 10**9)
    monkeypatch.setattr(memory, "this_machine", lambda: here)
    assert choose_machine(None, None) is here
    assert choose_machine(8, None) == Machine(8, 24 * 10**9)
    assert choose_machine(None, "80GB") == Machine(2, 80 * 10**9)
    facts = facts_of(capsys, "tuned.yaml")
    assert facts["memory"]["machine"] == "2 GPUs of 24 GB"
    assert {line["tuning"] for line in facts["memory"]["lines"]} == {"lora"}  # it fits
    assert memory.NOT_COMPARED in facts["memory"]["notes"]
    monkeypatch.setattr(memory, "this_machine", lambda: Machine(2, 10**7, host=10**7))
    facts = facts_of(capsys, "tuned.yaml")
    assert {"lora", "full"} <= {line["tuning"] for line in facts["memory"]["lines"]}


def test_offloading_that_the_machine_has_no_memory_for_does_not_fit(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "this_machine", lambda: Machine(2, 10**10, host=1000))
    lines = lines_of(facts_of(capsys, "tuned.yaml"), "lora")
    assert lines["ZeRO 2"]["fits"]
    assert not lines["ZeRO 2, offload"]["fits"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * 10**9), ("24", 24 * 10**9), ("1.5 gib", 1.5 * 2**30), ("500MB", 5 * 10**8)],
)
def test_a_memory_can_be_written_in_several_ways(text: str, size: float) -> None:
    assert as_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "80TBx", "-1GB", "0GB"])
def test_a_memory_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(YRunnerError, match="is not a memory size"):
        choose_machine(1, text)


def test_gpus_without_a_memory_need_one_to_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "this_machine", lambda: Machine(1, 10**9, is_cpu=True))
    with pytest.raises(YRunnerError, match="--gpus 4 --memory 80GB"):
        choose_machine(4, None)
