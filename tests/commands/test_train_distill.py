"""`teacher` from the recipe to the trained student, in all its forms."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.project import SCRATCH, write_recipe
from yrunner.assembly.run import Run
from yrunner.commands.check.command import check
from yrunner.commands.train import train
from yrunner.errors import ModelError, RecipeError, RunError
from yrunner.models.load import difference_of
from yrunner.recipe.load import load_recipe, recipe_to_yaml
from yrunner.storage.run_dir import RunDir
from yrunner.training.metrics import read_metrics

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 3}


@pytest.fixture
def taught(trained_base: Path, change: Any) -> Path:
    """tuned.yaml with a wider teacher, a recipe without a result."""
    base = yaml.safe_load((trained_base / "base.yaml").read_text("utf-8"))
    scratch = {**SCRATCH, "config": {**SCRATCH["config"], **WIDE}}
    write_recipe(
        trained_base / "teacher.yaml",
        base | {"name": "teacher", "model": {"scratch": scratch}, "train": base["train"]},
    )
    change(
        "tuned.yaml",
        teacher={"model": "teacher.yaml", "top": 8},
        eval={},
        loss={"kind": "plain"},
        train__log_every=1,
        train__max_steps=6,
        train__checkpoint={"every": 2, "keep": 9},
    )
    return trained_base


@pytest.fixture(scope="module")
def kept_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the result of teacher.yaml is kept, which is the same for every test."""
    return tmp_path_factory.mktemp("kept") / "teacher"


@pytest.fixture
def known(taught: Path, kept_teacher: Path) -> Path:
    """The same with a teacher that has been trained."""
    if kept_teacher.exists():
        shutil.copytree(kept_teacher, "outputs/teacher")
    else:
        train(Path("teacher.yaml"), [], resume=False, overwrite=False)
        shutil.copytree("outputs/teacher", kept_teacher)
    return taught


def run(*overrides: str, resume: bool = False, overwrite: bool = False) -> RunDir:
    train(Path("tuned.yaml"), list(overrides), resume=resume, overwrite=overwrite)
    return RunDir(Path("outputs/tuned"))


def records(run_dir: RunDir) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run_dir.metrics) if "loss" in row]


def adapter(run_dir: RunDir) -> torch.Tensor:
    weights = load_file(run_dir.model / "adapter_model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def test_a_recipe_that_teaches_is_trained_first_and_read_from_disk_after(taught, capfd):
    run_dir = run("teacher.weight=1", "train.max_steps=12")
    written = capfd.readouterr()
    said = " ".join(written.out.split())
    assert "predictions of the teacher" in written.err
    assert "the teacher teacher has not been trained yet: training it first" in said
    assert "teacher, weight 1, forward KL, 8 most likely tokens, kept on disk" in said
    rows = records(run_dir)
    assert rows[-1]["teacher_divergence"] < rows[0]["teacher_divergence"]
    assert "Distance to the teacher" in run_dir.report.read_text("utf-8")
    first = adapter(run_dir)
    shutil.rmtree("outputs/teacher/model/")
    shutil.copytree("outputs/base/model", "outputs/elsewhere")
    changes = ["teacher.weight=1", "train.max_steps=12", "teacher.model=outputs/elsewhere"]
    run(*changes, overwrite=True)
    assert not torch.equal(adapter(run_dir), first), "another teacher teaches other things"


def test_another_run_reads_what_the_teacher_said_before(known, capfd, monkeypatch):
    first = adapter(run())
    capfd.readouterr()
    # The teacher's weights are not read again.
    monkeypatch.setattr("yrunner.assembly.distillation.teacher.load_model", None)
    assert torch.equal(adapter(run(overwrite=True)), first)
    assert "teacher: predictions for 20 rows found in" in capfd.readouterr().out
    with pytest.raises(TypeError):
        run("teacher.temperature=2", overwrite=True)


@pytest.mark.parametrize(
    "additions",
    [
        ["teacher.top=all", "teacher.by=jsd", "teacher.beta=0.3"],
        ["teacher.top=all", "teacher.on_policy=0.5", "teacher.max_new_tokens=4"],
        ["teacher.top=all", "teacher.quantize=nf4"],
        ["teacher.top=100000", "teacher.by=reverse_kl", "teacher.temperature=2"],
        ["data.packing=true", "data.max_length=128"],
        ["data.packing=true", "data.max_length=128", "teacher.top=all"],
        ["train.token_batch=4"],
        ["loss={kind: nlirg}", "teacher.weigh_teacher=true"],
        ["loss={kind: nlirg, normalize: weights}", "teacher.weigh_teacher=true"],
        ["keep={kind: rows, file: test.jsonl, share: 0.5}"],
        ["keep={kind: ewc, file: test.jsonl}", "teacher.weight=1"],
        ["tuning={kind: full}"],
        ["tuning={kind: qlora, rank: 4, alpha: 8}", "teacher.top=all", "teacher.quantize=int8"],
        ["train.stage=cpt", "data.targets=all"],
        ["data.validation=[]", "train.gradient_checkpointing=true"],
        ["train.trackers=[tensorboard]", "drift.rows=0"],
    ],
    ids=lambda additions: " ".join(additions),
)
def test_a_teacher_works_beside_everything_else(known, additions):
    rows = records(run("train.max_steps=3", *additions))
    assert all(0 <= row["teacher_divergence"] < 20 for row in rows)
    assert rows[-1]["loss"] > 0


@pytest.mark.parametrize(
    "teacher",
    [
        "{model: teacher.yaml, top: 8}",
        "{model: teacher.yaml, top: all, on_policy: 0.5, max_new_tokens: 6}",
    ],
)
def test_a_resumed_run_ends_where_it_would_have(known, teacher):
    undisturbed = adapter(run(f"teacher={teacher}"))
    run_dir = RunDir(Path("outputs/tuned"))
    shutil.rmtree(run_dir.model)
    for step in [step for step in run_dir.saved_steps() if step > 4]:
        shutil.rmtree(run_dir.checkpoint(step))
    assert torch.equal(adapter(run(f"teacher={teacher}", resume=True)), undisturbed)


def test_a_run_resumes_with_its_own_teacher_alone(known):
    shutil.copytree("outputs/teacher/model", "mine")
    run_dir = run("teacher.model=mine")
    shutil.rmtree(run_dir.model)
    for step in [step for step in run_dir.saved_steps() if step > 4]:
        shutil.rmtree(run_dir.checkpoint(step))
    # Of the same size, as after more training.
    weights = load_file("mine/model.safetensors")
    changed = {name: 1.5 * weight for name, weight in weights.items()}
    save_file(changed, "mine/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"the teacher .*mine has changed since .*tuned was started"):
        run("teacher.model=mine", resume=True)


def test_a_result_with_an_adapter_can_teach(known, capfd):
    recipe = yaml.safe_load(Path("tuned.yaml").read_text("utf-8"))
    del recipe["teacher"]
    write_recipe(Path("coach.yaml"), recipe | {"name": "coach"})
    for top in ("8", "all"):
        run("teacher.model=coach.yaml", f"teacher.top={top}", overwrite=top == "all")
    assert "the teacher coach has not been trained yet" in capfd.readouterr().out


def test_check_says_what_the_teacher_costs_and_how_well_it_expects_the_rows(known, capfd):
    check(Path("tuned.yaml"), [], as_machine=False)
    said = capfd.readouterr().out
    assert "one forward pass over all rows before training" in said
    assert "mean loss of the same targets: base " in said and ", teacher " in said
    check(Path("tuned.yaml"), [], as_machine=True)
    stored = json.loads(capfd.readouterr().out)
    check(Path("tuned.yaml"), ["teacher.top=all"], as_machine=True)
    live = json.loads(capfd.readouterr().out)
    targets = int(stored["data"]["targets"])
    assert stored["teacher"]["memory"] == 0 and live["teacher"]["disk"] == 0
    assert stored["teacher"]["disk"] > targets * (8 * 8 + 4)  # validation rows too
    model = AutoModelForCausalLM.from_pretrained("outputs/teacher/model")
    size = sum(weight.nbytes for weight in model.parameters())
    assert live["teacher"]["memory"] == size
    own = [line for facts in (stored, live) for line in facts["memory"]["lines"] if line["is_own"]]
    assert own[1]["peak"] - own[0]["peak"] == size
    assert stored["signal"]["teacher_loss"] == pytest.approx(live["signal"]["teacher_loss"])
    files = sum(file.stat().st_size for file in Path("outputs/.prepared").glob("teacher-*/*.bin"))
    assert files == 0, "check computes no predictions"
    run()
    files = sum(file.stat().st_size for file in Path("outputs/.prepared").glob("teacher-*/*.bin"))
    assert files == stored["teacher"]["disk"]


def test_a_recipe_that_teaches_can_be_checked_before_it_is_trained(taught, capfd):
    check(Path("tuned.yaml"), [], as_machine=True)
    facts = json.loads(capfd.readouterr().out)
    assert facts["teacher"]["parameters"] > 0 and facts["signal"]["teacher_loss"] is None
    assert not Path("outputs/teacher").exists()


# The tokenizer


def other_tokenizer(change_it: Any) -> str:
    """The teacher's folder with a changed tokenizer."""
    shutil.copytree("outputs/teacher/model", "other")
    tokenizer = AutoTokenizer.from_pretrained("other")
    change_it(tokenizer)
    tokenizer.save_pretrained("other")
    model = AutoModelForCausalLM.from_pretrained("other")
    model.resize_token_embeddings(max(tokenizer.get_vocab().values()) + 1)
    model.save_pretrained("other")
    return "teacher.model=other"


def swap_two(folder: Path) -> list[str]:
    """Swap the ids of two tokens in a tokenizer file; the two tokens."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    one, two = "a", "b"
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    file.write_text(json.dumps(content), "utf-8")
    return [one, two]


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_teacher_with_other_ids_is_refused_with_the_tokens_that_differ(known, command):
    shutil.copytree("outputs/teacher/model", "other")
    swap_two(Path("other"))
    with pytest.raises(
        ModelError, match=r"another tokenizer than the model: id \d+ is \"[ab]\""
    ) as caught:
        if command == "check":
            check(Path("tuned.yaml"), ["teacher.model=other"], as_machine=False, sample=0)
        else:
            run("teacher.model=other")
    assert '"a" in the model\'s and "b" in the teacher\'s' in caught.value.message
    assert not Path("outputs/tuned").exists()


def test_a_teacher_with_one_more_token_is_refused_with_its_name(known):
    more = other_tokenizer(lambda it: it.add_tokens([AddedToken("<|more|>", special=True)]))
    with pytest.raises(ModelError, match=r'no token in the model\'s and "<\|more\|>" in the teach'):
        run(more)


def test_a_teacher_of_another_recipe_with_other_data_is_refused_before_it_is_trained(taught):
    recipe = yaml.safe_load(Path("teacher.yaml").read_text("utf-8"))
    recipe["model"]["scratch"]["vocab_size"] = 310
    write_recipe(Path("teacher.yaml"), recipe)
    for command in (lambda: check(Path("tuned.yaml"), [], as_machine=False, sample=0), run):
        with pytest.raises(ModelError, match=r"id 310 is .* in the model's and no token in the te"):
            command()
    assert not Path("outputs/teacher").exists()


def test_ids_are_compared_and_the_first_differences_named():
    same = {"a": 0, "b": 1, "c": 2, "d": 3}
    assert difference_of(same, dict(same)) is None
    swapped = {"b": 0, "a": 1, "d": 2, "c": 3}
    said = difference_of(same, swapped)
    assert said.startswith('id 0 is "a" in the model\'s and "b" in the teacher\'s, id 1 is "b"')
    assert said.endswith("and 1 more id differ")
    assert difference_of(same, same | {"e": 4}) == (
        "id 4 is no token in the model's and \"e\" in the teacher's"
    )


@pytest.mark.parametrize("top", ["8", "all"])
def test_more_embeddings_than_the_tokenizer_has_ids_change_nothing(known, top):
    """Qwen pads its embeddings to other numbers in other sizes."""
    first = adapter(run(f"teacher.top={top}"))
    shutil.copytree("outputs/teacher/model", "padded")
    model = AutoModelForCausalLM.from_pretrained("padded")
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 24, mean_resizing=False)
    model.get_output_embeddings().weight.data[size:] = 9.0
    model.save_pretrained("padded")
    padded = adapter(run(f"teacher.top={top}", "teacher.model=padded", overwrite=True))
    torch.testing.assert_close(padded, first, rtol=1e-4, atol=1e-6)


def test_a_teacher_with_too_few_positions_is_refused_with_the_row(known):
    shutil.copytree("outputs/teacher/model", "short")
    config = json.loads(Path("short/config.json").read_text("utf-8"))
    Path("short/config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    with pytest.raises(
        ModelError, match=r"teacher\.model: .*row \d+: \d+ tokens, and the model has 20"
    ):
        run("teacher.model=short")


def test_a_folder_without_a_model_is_refused_by_the_teachers_name(known):
    Path("empty").mkdir()
    with pytest.raises(ModelError, match=r"teacher\.model: .*empty"):
        run("teacher.model=empty")


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_teacher_without_weights_is_refused_before_anything_is_loaded(known, command):
    shutil.copytree("outputs/teacher/model", "hollow")
    Path("hollow/model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"teacher\.model: .*hollow has no model\.safetensors"):
        if command == "check":
            check(Path("tuned.yaml"), ["teacher.model=hollow"], as_machine=False, sample=0)
        else:
            run("teacher.model=hollow")
    assert not Path("outputs/tuned").exists()


# The recipe


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["teacher.beta=0.3"], "beta belongs to by: jsd, not forward_kl; remove beta"),
        (["teacher.on_policy=0.5"], "on_policy and top: 8 cannot be combined; set top: all"),
        (["teacher.max_new_tokens=9"], "max_new_tokens limits what the student writes"),
        (
            ["teacher.top=all", "teacher.on_policy=1"],
            "on_policy: 1 leaves no row with labels; set weight: 1",
        ),
        (
            ["teacher.top=all", "teacher.on_policy=0.5", "data.packing=true"],
            "teacher.on_policy and data.packing cannot be combined; remove one: the length",
        ),
        (
            ["teacher.top=all", "teacher.on_policy=0.5", "train.token_batch=4"],
            "teacher.on_policy and train.token_batch cannot be combined; remove one: an answer",
        ),
        (
            ["teacher.top=all", "teacher.on_policy=0.5", "train.stage=cpt"],
            "teacher.on_policy and train.stage cpt cannot be combined; remove one: a text has",
        ),
        (
            ["teacher.top=all", "teacher.on_policy=0.5", "data.targets=all"],
            "teacher.on_policy and data.targets: all cannot be combined",
        ),
        (
            ["teacher.top=all", "teacher.on_policy=0.5", "distributed.deepspeed={stage: 3}"],
            "teacher.on_policy and deepspeed.stage 3 cannot be combined; remove one: the student",
        ),
        (
            ["loss.normalize=weights"],
            "loss.normalize: weights and teacher cannot be combined: teacher.weight is relative",
        ),
        (
            ["loss={kind: dpo}", "train.stage=preference"],
            "teacher and train.stage preference cannot be combined; remove teacher",
        ),
        (["teacher.top=0"], 'teacher.top: must be "all" or a whole number of at least 1, got 0'),
        (["teacher.weight=0"], "teacher.weight: must be a number above 0 and of at most 1, got 0"),
        (["teacher.by=kl"], 'teacher.by: must be one of "forward_kl", "reverse_kl", "jsd"'),
        (["teacher.model=tuned.yaml"], "the recipes form a cycle"),
        (["teacher.model=nowhere.yaml"], "there is no file"),
        (["teacher.modl=x"], 'teacher.modl: unknown key, did you mean "model"?'),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_does_not_fit_is_refused_with_a_remedy(taught, overrides, sentence):
    with pytest.raises(RecipeError) as caught:
        load_recipe(Path("tuned.yaml"), overrides)
    assert sentence in str(caught.value)


def test_faults_in_the_recipe_of_a_teacher_are_told_with_their_place(taught):
    recipe = yaml.safe_load(Path("teacher.yaml").read_text("utf-8"))
    write_recipe(Path("teacher.yaml"), recipe | {"sed": 3})
    with pytest.raises(RecipeError, match=r"teacher\.yaml:\d+:1: sed: unknown key"):
        load_recipe(Path("tuned.yaml"))


def test_a_resolved_recipe_loads_again(taught):
    for overrides in ([], ["teacher.by=jsd", "teacher.beta=0.2"], ["teacher.top=all"]):
        recipe = load_recipe(Path("tuned.yaml"), overrides)
        Path("again.yaml").write_text(recipe_to_yaml(recipe), "utf-8")
        assert load_recipe(Path("again.yaml")) == recipe


def test_a_sort_does_without_the_teacher(known, monkeypatch):
    from yrunner.commands.sort.command import sort
    from yrunner.commands.train import train_base

    monkeypatch.setattr("yrunner.assembly.distillation.teacher.load_model", None)
    sort(
        Path("tuned.yaml"),
        ["sort.cross_fit=2", "train.max_steps=3"],
        overwrite=False,
        train_base=train_base,
    )
    assert Path("outputs/tuned/sort/sorted.jsonl").exists()


def test_a_changed_teacher_is_trained_again_before_its_student(known, capfd):
    run_of = Run.load(Path("tuned.yaml"))
    assert run_of.untrained_teacher is None
    recipe = yaml.safe_load(Path("teacher.yaml").read_text("utf-8"))
    recipe["train"]["epochs"] = 3
    write_recipe(Path("teacher.yaml"), recipe)
    run("train.max_steps=2")
    assert "the teacher teacher has changed (recipe.train.epochs)" in capfd.readouterr().out
