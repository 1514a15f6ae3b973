"""`yrun merge`: proven, onto the right base, whole or not at all, and loaded by others."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.project import write_project
from tests.yrun_process import ERRORS, HANGS_AFTER, ending, start_yrun, wait_until
from yrunner.commands.eval.command import eval_recipe
from yrunner.commands.merge import command
from yrunner.commands.merge import export as merge_export
from yrunner.commands.merge.command import merge
from yrunner.commands.train import train
from yrunner.errors import MissingError, ModelError, ProofError, RunError, YRunnerError
from yrunner.models.gguf import needs
from yrunner.models.load import load_model
from yrunner.models.merge import proof as folder_logits

TUNED = Path("tuned.yaml")
TUNINGS = {
    "plain": ["tuning.variant=plain", "data.packing=true"],
    "dora": ["tuning.variant=dora", "data.packing=false"],
    "rslora": ["tuning.variant=rslora", "data.packing=true"],
    "rslora, rows": ["tuning.variant=rslora", "data.packing=false", "train.epochs=10"],
    "freeze": ["tuning={kind: freeze}", "data.packing=false"],
    "full": ["tuning={kind: full}", "data.packing=true"],
    "qlora": ["tuning={kind: qlora, rank: 4, alpha: 8}", "data.packing=false"],
}
"""Each with packing or without; benchmarks.merge_agreement has both, of a larger toy."""


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    """A project with a finished run."""
    folder = write_project(tmp_path_factory.mktemp("trained"))
    # Of a base that has hardly learned, rounding would choose between tokens of equal chances.
    longer = (folder / "base.yaml").read_text("utf-8").replace("epochs: 2", "epochs: 12")
    (folder / "base.yaml").write_text(longer, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(TUNED, [], resume=False, overwrite=False)
    return folder


@pytest.fixture
def trained(trained_once, tmp_path, monkeypatch):
    """A copy of it, which may be changed; commands run in it."""
    folder = shutil.copytree(trained_once, tmp_path / "project")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(trained):
    return trained / "outputs" / "tuned"


def logits(folder, dtype=torch.float32):
    model = load_model(str(folder), dtype=dtype)
    with torch.no_grad():
        return model.float()(torch.arange(20)[None] + 100).logits


def test_merge_changes_nothing(run, capfd):
    merge(TUNED, [])
    said = capfd.readouterr().out
    assert "merged model against base and adapter" in said
    assert "(exact weights)" in said, "it is said which base the adapter went onto"
    torch.testing.assert_close(logits(run / "merged"), logits(run / "model"), rtol=0, atol=1e-4)
    figures = json.loads((run / "merge.json").read_text())
    assert figures["proof"]["largest_difference"] < 1e-4
    assert figures["proof"]["top1_agreement"] == 1
    assert figures["base_key"] == json.loads((run / "base.json").read_text())["key"]


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS.keys())
def test_every_kind_of_tuning_is_merged(tuning, trained):
    changes = [*tuning, "eval.tasks=[]"]
    train(TUNED, changes, resume=False, overwrite=True)
    merge(TUNED, [*changes, "merge.dtype=float32"])
    proof = json.loads((trained / "outputs/tuned/merge.json").read_text())["proof"]
    assert proof["largest_difference"] < 1e-4
    assert proof["top1_agreement"] == 1
    merge(TUNED, [*changes, "merge.dtype=bfloat16"])
    proof = json.loads((trained / "outputs/tuned/merge.json").read_text())["proof"]
    assert proof["top1_agreement"] >= 0.995


def test_a_bfloat16_model_is_proven_by_its_own_bars(run):
    merge(TUNED, ["merge.dtype=bfloat16", "merge.shard_size=20KB"])
    figures = json.loads((run / "merge.json").read_text())
    assert figures["dtype"] == "bfloat16"
    assert figures["proof"]["top1_agreement"] >= 0.97
    assert len(list((run / "merged").glob("*.safetensors"))) > 1
    config = json.loads((run / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_plain_transformers_answers_with_it_where_we_are_not_installed(run, tmp_path):
    merge(TUNED, [])
    program = (
        "import sys; sys.modules['yrunner'] = None\n"  # importing it would fail
        "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained('.')\n"
        "model = AutoModelForCausalLM.from_pretrained('.')\n"
        "chat = [{'role': 'user', 'content': 'Capital of Aru, question 0?'}]\n"
        "ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True,\n"
        "    return_tensors='pt', return_dict=True)\n"
        "out = model.generate(**ids, max_new_tokens=8, do_sample=False)\n"
        "print(out[0].tolist())\n"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-c", program],
        cwd=run / "merged",
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(json.loads(result.stdout)) > 8


def test_the_card_says_where_the_model_comes_from(trained, run):
    base = trained / "outputs" / "base" / "model" / "README.md"
    base.write_text(base.read_text("utf-8").replace("---\n", "---\nlicense: mit\n", 1), "utf-8")
    merge(TUNED, [])
    card = (run / "merged" / "README.md").read_text("utf-8")
    fingerprint = json.loads((run / "fingerprint.json").read_text())
    for expected in (
        "license: mit",
        json.loads((run / "base.json").read_text())["key"],
        fingerprint["files"]["train.jsonl"],
        "name: tuned",
        "capitals: exact",
        "merged model against base and adapter",
    ):
        assert expected in card


def test_the_card_has_the_figures_of_an_evaluation(run):
    eval_recipe(TUNED, [], [])
    merge(TUNED, ["merge.verify=false"])
    card = (run / "merged" / "README.md").read_text("utf-8")
    assert re.search(r"\| capitals: exact \| \d+\.\d% \(base: \d+\.\d%\) \|", card)
    assert "| all tasks: domain: mean of its tasks |" in card
    assert "validation loss" in card
    assert "(before: " not in card, "the same was measured again, and with more figures"


def test_a_merge_that_answers_differently_is_removed(run, monkeypatch):
    """The merged file is changed behind our back, between writing and proof."""

    def damaged(prepared, folder, **options):
        write_merged(prepared, folder, **options)
        (path,) = folder.glob("*.safetensors")
        weights = load_file(path)
        weights["model.norm.weight"] += 0.5
        save_file(weights, path, metadata={"format": "pt"})

    write_merged = command.write_merged
    monkeypatch.setattr(command, "write_merged", damaged)
    with pytest.raises(ProofError, match="merged model differ too much: a logit differs by"):
        merge(TUNED, [])
    assert ProofError.exit_code == 1
    assert not (run / "merged").exists()
    assert not (run / "merge.json").exists()
    assert not list(run.glob(".*"))
    merge(TUNED, ["merge.verify=false"])
    assert json.loads((run / "merge.json").read_text())["proof"] is None


def test_another_base_is_refused_and_both_are_named(trained, run):
    """The base has been trained anew since, in the same place."""
    then = json.loads((run / "base.json").read_text())
    path = trained / "outputs" / "base" / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"was trained on .* with the key") as refused:
        merge(TUNED, [])
    assert then["key"] in str(refused.value)
    assert "its weights or config differ" in str(refused.value)
    assert not (run / "merged").exists()


def test_another_tokenizer_of_the_base_is_refused(trained, run):
    path = trained / "outputs" / "base" / "model" / "tokenizer.json"
    path.write_text(path.read_text("utf-8") + " ", "utf-8")
    with pytest.raises(RunError, match="its tokenizer differs"):
        merge(TUNED, [])


def test_a_run_that_kept_no_record_of_its_base_is_merged_with_a_warning(run, capfd):
    (run / "base.json").unlink()
    merge(TUNED, ["merge.verify=false"])
    assert "has no base.json" in capfd.readouterr().err
    assert (run / "merged").is_dir()


def test_further_adapters_are_merged_in_by_their_weights(trained, run):
    train(TUNED, ["name=other", "seed=7"], resume=False, overwrite=False)
    other = trained / "outputs" / "other" / "model"
    merge(TUNED, ["merge.weight=0.5", f"merge.adapters=[{{adapter: {other}, weight: 0.25}}]"])
    figures = json.loads((run / "merge.json").read_text())
    assert figures["adapters"] == {str(run / "model"): 0.5, str(other): 0.25}
    assert figures["proof"]["largest_difference"] < 1e-4
    with pytest.raises(YRunnerError, match=r"merge\.adapters: .* has no adapter"):
        merge(TUNED, [f"merge.adapters=[{{adapter: {trained}}}]"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "adapter_model.safetensors",
            r"model/adapter_model\.safetensors is cut: it has .* Download",
        ),
        ("adapter_config.json", r"model/adapter_config\.json is damaged .*Save or"),
    ],
)
def test_a_damaged_adapter_is_refused_by_its_name(name, expected, run):
    path = run / "model" / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=expected):
        merge(TUNED, [])
    assert not (run / "merged").exists()


def test_an_upload_that_cannot_be_is_refused_before_anything_is_merged(run):
    with pytest.raises(YRunnerError, match=r"merge\.push: HF_HUB_OFFLINE is set"):
        merge(TUNED, ["merge.push=fog/legal"])
    assert not (run / "merged").exists()


def test_an_adapter_of_another_base_is_refused_by_its_name(run):
    path = run / "model" / "adapter_model.safetensors"
    weights = {n: w.repeat(1, 2) if "lora_A" in n else w for n, w in load_file(path).items()}
    save_file(weights, path)
    with pytest.raises(ModelError, match=r"the adapter .*model does not fit this base"):
        merge(TUNED, [])


def test_interrupted_it_leaves_nothing_behind(run):
    process = start_yrun("merge", "tuned.yaml")
    wait_until(lambda: ERRORS.exists() and "merging" in ERRORS.read_text(), process)
    os.kill(process.pid, signal.SIGINT)
    if ending(process) == 130:  # else it was faster
        assert not (run / "merged").exists()
    assert not list(run.glob(".merged.*"))


def killed_while(stage, at):
    """Run the command in a process that kills itself at some moment of a stage."""

    @contextmanager
    def watched(description, total):
        done = count(1)

        def advance(_):
            if description.startswith(stage) and next(done) == min(at, total):
                os.kill(os.getpid(), signal.SIGKILL)

        yield advance

    def work():
        for module in (command, merge_export, folder_logits):
            module.progress = watched
        merge(TUNED, ["merge.gguf=f16"])

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(timeout=HANGS_AFTER)
    return process.exitcode


@pytest.mark.parametrize("at", [1, 1000], ids=["first", "last"])
@pytest.mark.parametrize("stage", ["merging", "proof, base", "proof, merged", "GGUF"])
def test_killed_at_any_moment_it_leaves_no_half_model_and_completes_afterwards(stage, at, run):
    assert killed_while(stage, at) == -signal.SIGKILL
    assert (run / "merged").exists() == (stage == "GGUF"), "the merged model is whole by then"
    assert not (run / "gguf").exists()
    merge(TUNED, ["merge.gguf=f16"])
    torch.testing.assert_close(logits(run / "merged"), logits(run / "model"), rtol=0, atol=1e-4)
    assert (run / "gguf" / "tuned-f16.gguf").exists()
    assert not list(run.glob(".*"))


def test_figures_never_stand_beside_another_model(run):
    merge(TUNED, [])
    assert killed_while("merging", 1) == -signal.SIGKILL
    assert not (run / "merge.json").exists()


def test_gguf_and_modelfile_are_written_and_proven(run, capfd):
    merge(TUNED, ["merge.gguf=q8_0", "data.system=null"])
    assert "GGUF q8_0 against the merged model" in capfd.readouterr().out
    names = sorted(path.name for path in (run / "gguf").iterdir())
    assert names == ["Modelfile", "tuned-q8_0.gguf"]
    figures = json.loads((run / "merge.json").read_text())["gguf"]
    assert figures["proof"]["top1_agreement"] >= 0.95
    assert figures["bytes"] == (run / "gguf" / "tuned-q8_0.gguf").stat().st_size
    modelfile = (run / "gguf" / "Modelfile").read_text("utf-8")
    assert modelfile.startswith("FROM ./tuned-q8_0.gguf\nTEMPLATE ")
    assert 'PARAMETER stop "<|im_end|>"' in modelfile


def test_the_loss_of_a_gguf_file_stands_beside_that_of_the_merged_model(run, capfd):
    merge(TUNED, ["merge.gguf=q4_0"])
    loss = json.loads((run / "merge.json").read_text())["gguf"]["loss"]
    assert (loss["rows"], loss["of"]) == (4, "validation")
    # As the training measured it, on the same rows; the adapter is merged since.
    after = json.loads((run / "after.json").read_text())["token_losses"]
    assert loss["targets"] == len(after)
    assert loss["merged"] == pytest.approx(sum(after) / len(after), abs=1e-3)
    assert 0 < abs(loss["gguf"] - loss["merged"]) < 0.5
    words = f"{loss['gguf']:.4f} nats, merged model {loss['merged']:.4f}"
    said = re.sub(r"\s+", " ", capfd.readouterr().out)
    assert f"GGUF q4_0, loss on 4 validation rows ({len(after)} targets): {words}" in said
    assert words in (run / "merged" / "README.md").read_text("utf-8")


def test_k_quants_without_their_package_are_refused_before_anything_is_merged(run, monkeypatch):
    known = needs.find_spec
    monkeypatch.setattr(
        needs, "find_spec", lambda name: None if name == "llama_cpp" else known(name)
    )
    with pytest.raises(MissingError, match=r"pip install 'yrunner\[llamacpp\]'") as caught:
        merge(TUNED, ["merge.gguf=q4_k_m"])
    assert caught.value.exit_code == 3
    assert not (run / "merged").exists()


def test_a_reward_model_has_no_gguf_form():
    with pytest.raises(ModelError, match="a reward model scores answers"):
        needs.check_gguf("f16", "reward", None, None)


def test_a_k_quant_is_made_from_weights_that_are_not_rounded(run, monkeypatch, capfd):
    """With a stand-in for llama.cpp, which copies; tests/models/gguf/llama_cpp.py has it itself."""
    from yrunner.models.gguf import quantize as quantizing

    seen = []

    def copy(source, target, kind, *, threads, advance):
        seen.append((source.name, kind, gguf.GGUFReader(source).tensors[0].tensor_type.name))
        shutil.copy(source, target)

    monkeypatch.setattr(needs, "find_spec", lambda name: name)
    monkeypatch.setattr(quantizing, "quantize", copy)
    merge(TUNED, ["merge.gguf=q4_k_m"])
    assert seen == [("tuned-q4_k_m.unrounded", "q4_k_m", "F32")]
    names = sorted(path.name for path in (run / "gguf").iterdir())
    assert names == ["Modelfile", "tuned-q4_k_m.gguf"]
    figures = json.loads((run / "merge.json").read_text())["gguf"]
    assert figures["types"] == {"F32": 15}
    assert "GGUF q4_k_m, 0 MB: matrices 15 in F32" in capfd.readouterr().out


def test_a_k_quant_that_fails_leaves_the_merged_model_and_no_file(run, monkeypatch):
    from yrunner.models.gguf import quantize as quantizing

    def fail(source, target, kind, *, threads, advance):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(needs, "find_spec", lambda name: name)
    monkeypatch.setattr(quantizing, "quantize", fail)
    with pytest.raises(KeyboardInterrupt):
        merge(TUNED, ["merge.gguf=q4_k_m"])
    assert (run / "merged").exists()
    assert not list(run.glob("*gguf*")) and not list(run.glob(".*"))


def test_a_gguf_file_that_answers_differently_is_removed(run, monkeypatch):
    from yrunner.models.gguf import read as gguf_file

    read = gguf_file.read_gguf

    def damaged(*arguments):
        model = read(*arguments)
        model.get_input_embeddings().weight.data.neg_()
        return model

    monkeypatch.setattr(gguf_file, "read_gguf", damaged)
    with pytest.raises(
        ProofError, match=r"in the GGUF file \S*embed\S* is 200.00% of its size away"
    ):
        merge(TUNED, ["merge.gguf=f16"])
    assert (run / "merged").exists()
    assert not (run / "gguf").exists()
    # The outputs are compared too.
    monkeypatch.setitem(merge_export.WEIGHT_BARS, "f16", 3.0)
    with pytest.raises(ProofError, match="the outputs of the GGUF file differ too much"):
        merge(TUNED, ["merge.gguf=f16"])
    assert not (run / "gguf").exists()


def test_a_model_without_an_adapter_needs_no_merging(trained):
    with pytest.raises(YRunnerError, match=r"full trains whole weights, which need no merging"):
        merge(Path("base.yaml"), [])
    with pytest.raises(YRunnerError, match=r"merge\.weight needs an adapter.*Remove"):
        merge(Path("base.yaml"), ["merge.weight=0.5"])


def test_a_model_without_an_adapter_is_written_in_the_form_that_is_asked_for(trained, capfd):
    merge(Path("base.yaml"), ["merge.dtype=bfloat16", "merge.gguf=q8_0"])
    assert "written model against the trained one" in capfd.readouterr().out
    base = trained / "outputs" / "base"
    written = load_file(base / "merged" / "model.safetensors")
    for name, weight in load_file(base / "model" / "model.safetensors").items():
        assert torch.equal(written[name], weight.bfloat16())
    figures = json.loads((base / "merge.json").read_text())
    assert figures["adapters"] == {}
    assert (base / "gguf" / "base-q8_0.gguf").exists()
