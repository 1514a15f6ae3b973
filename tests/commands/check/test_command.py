"""`yrun check` says beforehand what a run will be, and refuses what training would refuse."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.conftest import write_jsonl
from yrunner.cli import app
from yrunner.commands.check.command import check
from yrunner.commands.train import train
from yrunner.errors import DataError, ModelError, YRunnerError
from yrunner.models.gguf import needs
from yrunner.models.gguf.architectures import ARCHITECTURES


def facts_of(capsys: pytest.CaptureFixture[str], recipe: str, *overrides: str) -> dict[str, Any]:
    capsys.readouterr()
    check(Path(recipe), list(overrides), as_machine=True)
    return dict(json.loads(capsys.readouterr().out))


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.token_batch=5"],
        ["data.packing=true", "data.max_length=200"],
        ["train.max_steps=3", "train.lr_scheduler=linear", "train.warmup_ratio=0.5"],
    ],
    ids=["plain", "token batches", "packing", "max_steps"],
)
def test_the_run_makes_exactly_the_updates_and_learning_rates_that_check_promises(
    project: Path, capsys: pytest.CaptureFixture[str], overrides: list[str]
) -> None:
    options = ["train.log_every=1", *overrides]
    facts = facts_of(capsys, "base.yaml", *options)
    train(Path("base.yaml"), options, resume=False, overwrite=False)
    records = [record for record in metrics(project / "outputs" / "base") if "loss" in record]
    assert facts["steps"]["updates"] == len(records)
    assert sum(facts["steps"]["updates_of_epochs"]) == len(records)
    promised = dict(facts["schedule"]["points"])
    seen = {record["step"]: record["learning_rate"] for record in records}
    for update, rate in promised.items():
        assert seen[update] == pytest.approx(rate, rel=1e-4, abs=1e-12)


def test_a_recipe_can_be_checked_before_its_base_is_trained_and_nothing_is_trained(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = facts_of(capsys, "tuned.yaml")
    assert [path.name for path in (project / "outputs").iterdir()] == [".prepared"]
    train(Path("base.yaml"), [], resume=False, overwrite=False)
    after = facts_of(capsys, "tuned.yaml")
    # The tokenizer of the base is the one that its training makes, so all figures are the same.
    assert after["data"] == before["data"]
    assert after["steps"] == before["steps"]
    assert after["memory"] == before["memory"]


def test_the_tables_show_rows_lengths_steps_memory_and_disk(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(Path("tuned.yaml"), ["data.packing=true", "data.max_length=128"], as_machine=False)
    out = capsys.readouterr().out
    for part in (
        "train.jsonl",
        "alpaca",
        "Length of the training examples in tokens",
        "letters: Latin 9",
        "targets: ",
        "packed rows each",
        "% of their tokens in use",
        "learning rate: ",
        "Memory per device",
        "lora (this recipe)",
        "planned for this machine without a GPU",
        "disk: ",
        "ready to train",
    ):
        assert part in out


def test_faulty_rows_end_with_exit_code_2_after_everything_was_said(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (project / "train.jsonl").read_text().splitlines()]
    write_jsonl(project / "train.jsonl", [*rows, {"instruction": "no answer"}, rows[0]])
    result = CliRunner().invoke(app, ["check", "base.yaml"])
    assert isinstance(result.exception, YRunnerError)
    assert result.exception.exit_code == 2
    assert 'train.jsonl row 17: has no "output"' in str(result.exception)
    assert "exact duplicates in train" in result.stdout
    assert "Memory per device" in result.stdout
    assert "ready to train" not in result.stdout
    with pytest.raises(YRunnerError, match="row 17"):
        train(Path("base.yaml"), [], resume=False, overwrite=False)


def test_for_machines_the_refusal_is_in_the_json_too(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "train.jsonl").write_text('{"instruction": "a"}\n', "utf-8")
    with pytest.raises(YRunnerError):
        check(Path("base.yaml"), ["data.train.0.format=alpaca"], as_machine=True)
    facts = json.loads(capsys.readouterr().out)
    assert "cannot be used" in facts["refused"]
    assert facts["rows"]["files"][0]["refused"] == {"missing_field": 1}
    assert "steps" not in facts
    assert facts["signal"] == {"skipped": "the data has no targets"}


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        (
            "eval__tasks",
            [{"kind": "answer", "name": "t", "side": "general", "data": "broken.jsonl"}],
            "invalid JSON",
        ),
        ("data__train", [{"file": "broken.jsonl"}], "invalid JSON"),
        ("data__validation_share", 0.5, "cannot be combined"),
    ],
)
def test_what_training_would_refuse_check_refuses(
    project: Path, change: Callable[..., None], key: str, value: Any, reason: str
) -> None:
    (project / "broken.jsonl").write_text("{\n", "utf-8")
    change("tuned.yaml", **{key: value})
    with pytest.raises(YRunnerError, match=reason):
        check(Path("tuned.yaml"), [], as_machine=False)


def test_a_model_that_would_mix_packed_examples_is_refused_before_training(
    project: Path, change: Callable[..., None]
) -> None:
    sizes = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    change("base.yaml", model={"scratch": {"config": sizes, "vocab_size": 320}})
    check(Path("base.yaml"), [], as_machine=False)
    for recipe in ("base.yaml", "tuned.yaml"):
        with pytest.raises(ModelError, match="mixes the examples of a row"):
            check(Path(recipe), ["data.packing=true", "data.max_length=200"], as_machine=False)
    with pytest.raises(ModelError, match="mixes the examples of a row"):
        options = ["data.packing=true", "data.max_length=200"]
        train(Path("base.yaml"), options, resume=False, overwrite=False)


def test_a_base_without_weights_or_with_too_few_embeddings_is_refused(
    project: Path, change: Callable[..., None]
) -> None:
    train(Path("base.yaml"), [], resume=False, overwrite=False)
    model = project / "outputs" / "base" / "model"
    change("tuned.yaml", model__base=str(model))
    check(Path("tuned.yaml"), ["data.packing=true", "data.max_length=200"], as_machine=False)
    config = json.loads((model / "config.json").read_text("utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 300}), "utf-8")
    with pytest.raises(ModelError, match="the model only 300 embeddings"):
        check(Path("tuned.yaml"), [], as_machine=False)
    (model / "config.json").write_text(json.dumps(config), "utf-8")
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        check(Path("tuned.yaml"), [], as_machine=False)


def test_an_adapter_can_be_the_base_or_be_trained_on(
    project: Path, change: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    train(Path("tuned.yaml"), [], resume=False, overwrite=False)
    outputs = project / "outputs"
    change("tuned.yaml", model__base=str(outputs / "tuned" / "model"), tuning={"kind": "full"})
    packed = ["data.packing=true", "data.max_length=200"]
    assert facts_of(capsys, "tuned.yaml", *packed)["memory"]["lines"][0]["optimizer"] > 0
    change(
        "tuned.yaml",
        model__base=str(outputs / "base" / "model"),
        tuning={"kind": "lora", "adapter": str(outputs / "tuned" / "model")},
    )
    assert facts_of(capsys, "tuned.yaml")["disk"]["checkpoint"] > 0


def test_check_and_train_name_the_columns_that_they_do_not_read(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (project / "train.jsonl").read_text().splitlines()]
    write_jsonl(project / "train.jsonl", [row | {"source": "web", "id": 7} for row in rows])
    sentence = "train.jsonl: unused columns: id, source\n"
    check(Path("base.yaml"), [], as_machine=False)
    assert sentence in capsys.readouterr().out
    train(Path("base.yaml"), ["train.max_steps=1"], resume=False, overwrite=False)
    assert sentence in capsys.readouterr().out


def test_check_and_train_learn_one_split_of_a_folder_and_offer_the_other(
    project: Path, change: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = project / "law"
    folder.mkdir()
    (project / "train.jsonl").rename(folder / "train.jsonl")
    for split in ("validation", "test"):
        write_jsonl(folder / f"{split}.jsonl", [{"question": f"{split}?", "answer": "yes"}] * 2)
    change("base.yaml", data__train=[{"file": "law"}])
    check(Path("base.yaml"), [], as_machine=False)
    seen = capsys.readouterr().out
    train(Path("base.yaml"), ["train.max_steps=1"], resume=False, overwrite=False)
    for shown in (seen, capsys.readouterr().out):
        assert "files of other splits, not used: test.jsonl, validation.jsonl\n" in shown
        offered = " ".join(shown.split("to validate on validation.jsonl, ")[1].split()[:7])
        assert offered.startswith("add to data: validation: [{file:")
    change("base.yaml", data__train=[{"file": "law"}], data__validation=[{"file": "law"}])
    facts = facts_of(capsys, "base.yaml")["rows"]["files"]
    assert [(Path(file["file"]).name, file["purpose"]) for file in facts] == [
        ("train.jsonl", "train"),
        ("validation.jsonl", "validation"),
    ]


def test_check_and_train_name_the_separator_of_a_table(
    project: Path, change: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (project / "train.jsonl").read_text().splitlines()]
    lines = [";".join(f'"{text}"' for text in row.values()) for row in rows]
    (project / "train.csv").write_text("\n".join([";".join(rows[0]), *lines]))
    change("base.yaml", data__train=[{"file": "train.csv"}])
    check(Path("base.yaml"), [], as_machine=False)
    assert "train.csv: fields are separated by semicolons\n" in capsys.readouterr().out
    train(Path("base.yaml"), ["train.max_steps=1"], resume=False, overwrite=False)
    assert "train.csv: fields are separated by semicolons\n" in capsys.readouterr().out


def test_the_second_check_finds_the_data_prepared(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(Path("base.yaml"), [], as_machine=False)
    assert "tokenized now: 1" in capsys.readouterr().out
    check(Path("base.yaml"), [], as_machine=False)
    assert "files found in the cache: 1 of 1" in capsys.readouterr().out
    shutil.rmtree(project / "outputs")
    check(Path("base.yaml"), [], as_machine=False)
    assert "tokenized now: 1" in capsys.readouterr().out


def test_a_faulty_list_of_faults_is_refused_as_training_would(
    project: Path, change: Callable[..., None]
) -> None:
    (project / "faults.jsonl").write_text('{"row": 999, "kind": "typos"}\n', "utf-8")
    change("tuned.yaml", eval__faults={"data": "train.jsonl", "list": "faults.jsonl"})
    for command in (
        lambda: check(Path("tuned.yaml"), [], as_machine=False),
        lambda: train(Path("tuned.yaml"), []),
    ):
        with pytest.raises(DataError, match=r"faults\.jsonl"):
            command()


@pytest.mark.parametrize(
    ("kind", "packages", "said"),
    [
        ("q8_0", ("gguf",), []),
        ("q8_0", (), ["will refuse this recipe: merge.gguf needs the package gguf. Run pip"]),
        ("q4_k_m", ("gguf",), ["q4_k_m is written by llama.cpp itself", "yrunner[llamacpp]"]),
        ("q4_k_m", ("gguf", "llama_cpp"), ["15 of 15 matrices of this model have rows of 32 or"]),
    ],
)
def test_check_says_what_merge_would_say_of_gguf(
    project, capsys, monkeypatch, kind, packages, said
):
    monkeypatch.setattr(needs, "find_spec", lambda name: name if name in packages else None)
    facts = facts_of(capsys, "base.yaml", f"merge.gguf={kind}")
    assert facts["refused"] is None, "it can be trained"
    findings = [text for text in facts["base"]["findings"] if "GGUF" in text or "gguf" in text]
    assert len(findings) == bool(said)
    assert all(words in findings[0] for words in said)


def test_check_names_an_architecture_that_has_no_gguf_form(project, capsys, monkeypatch):
    monkeypatch.delitem(ARCHITECTURES, "qwen3")
    (finding,) = facts_of(capsys, "base.yaml", "merge.gguf=q8_0")["base"]["findings"]
    assert "a qwen3 model cannot be written as GGUF. It can for llama" in finding


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        (["output=train.jsonl"], 2, r"train.jsonl is not a folder"),
        (["output=train.jsonl/run"], 2, r"train.jsonl is not a folder"),
        (["model.dtype=float16"], 3, r"model.dtype float16 needs a GPU"),
        (["model.attention=flash_attention_2"], 3, r"needs a GPU and the package flash-attn"),
        (["tuning={kind: lora, targets: [nothing]}"], 2, r'no linear layer .* is called "nothing"'),
    ],
)
def test_check_and_train_refuse_alike_what_this_machine_cannot_do(
    project: Path, changes: list[str], code: int, message: str
) -> None:
    if torch.cuda.is_available() and code == 3:
        pytest.skip("this machine has a GPU")
    for command in (
        lambda: check(Path("tuned.yaml"), changes, as_machine=False, sample=0),
        lambda: train(Path("tuned.yaml"), changes, resume=False, overwrite=False),
    ):
        with pytest.raises(YRunnerError, match=message) as refused:
            command()
        assert refused.value.exit_code == code


def test_an_epoch_is_counted_whole_and_an_update_by_the_rows_that_there_are(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_of = {
        "train.batch_size=1 train.max_steps=5": "updates: 5 in total, 16 per epoch, 1 example each",
        "train.batch_size=512 train.epochs=1": "updates: 1 in total, 1 per epoch, 16 examples each",
        "train.batch_size=3 train.epochs=2": "updates: 12 in total, 6 per epoch, 3 examples each",
    }
    for changes, line in run_of.items():
        check(
            Path("tuned.yaml"),
            ["data.max_length=256", *changes.split()],
            as_machine=False,
            sample=0,
        )
        assert line in capsys.readouterr().out
    packed = ["data.packing=true", "data.max_length=256", "train.batch_size=99"]
    check(Path("tuned.yaml"), packed, as_machine=False, sample=0)
    out = capsys.readouterr().out
    (rows,) = re.findall(r"packing: (\d+ )rows, ", out)
    assert f"updates: 2 in total, 1 per epoch, {rows}packed rows each" in out
