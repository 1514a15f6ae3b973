"""DeepSpeed's configuration: made from a recipe, shipped as files, refused where it contradicts."""

import json
from pathlib import Path

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from yrunner.errors import RunError, YRunnerError
from yrunner.recipe.schema.distributed import DeepSpeedSection, DistributedSection
from yrunner.recipe.schema.recipe import TrainSection
from yrunner.training.deepspeed.config import apart, check_settings, complete, deepspeed_settings

SHIPPED = Path(__file__).parents[3] / "deepspeed_configs"
SECTIONS = {
    "zero1": DeepSpeedSection(stage=1),
    "zero2": DeepSpeedSection(stage=2),
    "zero3": DeepSpeedSection(stage=3),
    "zero2_offload": DeepSpeedSection(stage=2, offload="cpu"),
    "zero3_offload": DeepSpeedSection(stage=3, offload="cpu"),
    "zero3_nvme": DeepSpeedSection(stage=3, offload="nvme", nvme_folder="/nvme"),
}
TRAIN = TrainSection(batch_size=4, learning_rate=1e-4, max_grad_norm=1.0, weight_decay=0.1)


def check(file: Path, **keys) -> None:
    options = {"dtype": "bfloat16", "micro_steps": 2, "num_ranks": 8} | keys
    check_settings(file, TRAIN, **options)


def test_the_shipped_files_are_those_of_this_test():
    assert {file.stem for file in SHIPPED.glob("*.json")} == set(SECTIONS)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_shipped_file_is_what_the_recipe_makes_and_deepspeed_reads_it(name):
    file = SHIPPED / f"{name}.json"
    settings = json.loads(file.read_text("utf-8"))
    assert settings == deepspeed_settings(SECTIONS[name])
    assert settings == complete(settings), "nothing is left open"
    assert f"`{name}.json`" in (SHIPPED / "README.md").read_text("utf-8")
    check(file)
    numbers = {
        key: 1000 if value == "auto" else value
        for key, value in settings["zero_optimization"].items()
    }
    assert DeepSpeedZeroConfig(**numbers).stage == SECTIONS[name].stage


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, r"gpu is 8, but train.batch_size is 4"),
        ({"gradient_accumulation_steps": 1}, r"steps is 1, but train.gradient_acc\w+ is 2"),
        ({"train_batch_size": 32}, r"train_batch_size is 32, but .* processes is 64"),
        ({"gradient_clipping": 0.5}, r"clipping is 0.5, but train.max_grad_norm is 1.0"),
        ({"bf16": {"enabled": False}}, r"bf16.enabled is false, but .*bfloat16 is true"),
        ({"fp16": {"enabled": True}}, r"fp16.enabled is true, but .*float16 is false"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
            r"optimizer.params.lr is 0.001, but train.learning_rate is 0.0001",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            r'offload_param.device is "nvme", but only the optimizer .* Write "cpu" there',
        ),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, "which train.optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "which train.lr_scheduler"),
    ],
)
def test_a_file_that_contradicts_the_recipe_is_refused_with_both_values(tmp_path, keys, message):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}} | keys))
    with pytest.raises(RunError, match=message):
        check(file)


def test_two_runs_have_folders_of_their_own_on_a_disk():
    settings = complete(deepspeed_settings(SECTIONS["zero3_nvme"]))
    folders = {
        apart(settings, Path(run))["zero_optimization"]["offload_optimizer"]["nvme_path"]
        for run in ("outputs/mine", "outputs/yours", "elsewhere/mine", "outputs/../outputs/mine")
    }
    assert len(folders) == 3
    assert {Path(folder).parent for folder in folders} == {Path("/nvme")}
    without = complete(deepspeed_settings(SECTIONS["zero3_offload"]))
    assert apart(without, Path("outputs/mine")) == without


def test_a_file_may_say_the_same_as_the_recipe_and_leave_the_rest_open(tmp_path):
    file = tmp_path / "mine.json"
    keys = {"zero_optimization": {"stage": 3}, "gradient_clipping": 1, "train_batch_size": 64}
    file.write_text(json.dumps(keys))
    check(file)
    whole = complete(deepspeed_settings(DeepSpeedSection(config=file)))
    assert whole["gradient_accumulation_steps"] == "auto"
    assert whole["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"mine.json:1:2: "),
        ("\ufeff[]", "is not a DeepSpeed"),
        ("[]", "is not a DeepSpeed"),
        ('{"zero_optimization": {}}', "stage"),
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path, text, message):
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(YRunnerError, match=message):
        check(file)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, 'exactly one of "stage" and "config"'),
        ({"stage": 2, "config": "x.json"}, 'exactly one of "stage" and "config"'),
        ({"config": "x.json", "offload": "cpu"}, "set offload in the config file"),
        ({"stage": 3, "offload": "nvme"}, "require each other"),
        ({"stage": 2, "offload": "nvme", "nvme_folder": "/nvme"}, "needs stage 3"),
    ],
)
def test_a_section_that_means_two_things_is_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        DeepSpeedSection(**keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"optimizer": "adafactor"}, "adafactor needs whole weights"),
        ({"optimizer": "paged_adamw_8bit"}, "paged_adamw_8bit needs whole weights"),
        ({"tuning": "qlora"}, "quantized weights cannot be sharded"),
        ({"torch_compile": True}, "torch_compile and distributed.deepspeed"),
        ({"keep": "ewc"}, "ewc needs whole weights"),
        ({"keep": "self_replay"}, None),
        ({}, None),
    ],
)
def test_what_cannot_be_shared_out_is_said(keys, message):
    section = DistributedSection(deepspeed=DeepSpeedSection(stage=3))
    rest = {"tuning": "lora", "optimizer": "adamw_torch", "torch_compile": False, "keep": "none"}
    rest |= keys
    found = section.conflict(**rest)
    assert found is None if message is None else message in found
