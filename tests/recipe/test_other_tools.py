"""A key of another tool is answered with the key that means the same here."""

from pathlib import Path

import pytest
import yaml

from yrunner.errors import RecipeError
from yrunner.recipe.load import load_recipe
from yrunner.recipe.messages import recipe_json_schema
from yrunner.recipe.other_tools import TOOLS

OURS = {
    "name": "own",
    "model": {"base": "organisation/model"},
    "data": {"train": [{"file": "rows.jsonl"}]},
}
LLAMA_FACTORY = """\
model_name_or_path: organisation/model
stage: sft
do_train: true
finetuning_type: lora
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
per_device_train_batch_size: 1
learning_rate: 1.0e-4
bf16: true
"""
AXOLOTL = """\
base_model: organisation/model
datasets: [{path: organisation/rows, type: alpaca}]
adapter: qlora
sequence_len: 4096
micro_batch_size: 2
val_set_size: 0.05
output_dir: ./out
"""
MS_SWIFT = "model: organisation/model\ntrain_type: lora\ndataset: [a]\nlora_rank: 8\n"
TRL = "model_name_or_path: organisation/model\ndataset_name: a\nuse_peft: true\nlora_r: 32\n"


def problems(folder: Path, content: str, *overrides: str) -> list[str]:
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    (folder / "recipe.yaml").write_text(content)
    with pytest.raises(RecipeError) as refused:
        load_recipe(folder / "recipe.yaml", overrides)
    return [str(problem) for problem in refused.value.problems]


@pytest.mark.parametrize(
    ("section", "key", "ending"),
    [
        ("", "lora_rank", """LLaMA-Factory's "lora_rank" is tuning.rank here"""),
        ("", "model_name_or_path", """LLaMA-Factory's "model_name_or_path" is model.base here"""),
        ("", "base_model", """Axolotl's "base_model" is model.base here"""),
        ("", "adapter", """Axolotl's "adapter" is tuning.kind here"""),
        ("", "max_seq_length", """TRL's "max_seq_length" is data.max_length here"""),
        ("", "--train_type", """ms-swift's "train_type" is tuning.kind here"""),
        ("", "--train-type", """ms-swift's "train_type" is tuning.kind here"""),
        ("", "use_NLIRG", """Y-Trainer's "use_nlirg" is loss.kind here"""),
        ("data", "cutoff_len", """LLaMA-Factory's "cutoff_len" is data.max_length here"""),
        ("train", "micro_batch_size", """Axolotl's "micro_batch_size" is train.batch_size here"""),
        ("model", "load_in_4bit", """Axolotl's "load_in_4bit" is tuning.kind here"""),
        ("", "fsdp", """"fsdp" has no counterpart here; use distributed.deepspeed"""),
    ],
)
def test_the_error_of_a_foreign_key_ends_with_the_key_here(tmp_path, section, key, ending):
    content = {
        name: dict(value) if isinstance(value, dict) else value for name, value in OURS.items()
    }
    (content.setdefault(section, {}) if section else content)[key] = 8
    (found,) = problems(tmp_path, yaml.safe_dump(content))
    assert found.endswith(f"unknown key; {ending}")


@pytest.mark.parametrize(
    ("tool", "content", "last"),
    [
        ("LLaMA-Factory", LLAMA_FACTORY, "bf16: model.dtype"),
        ("Axolotl", AXOLOTL, "output_dir: output"),
        ("ms-swift", MS_SWIFT, "lora_rank: tuning.rank"),
        ("TRL", TRL, "lora_r: tuning.rank"),
    ],
)
def test_a_whole_recipe_of_another_tool_is_one_line(tmp_path, tool, content, last):
    (found,) = problems(tmp_path, content)
    assert found.startswith(f"{tmp_path / 'recipe.yaml'}:1:1: this is a recipe of {tool}, not of")
    assert found.endswith(last)


def test_an_override_with_a_foreign_key_is_answered_too(tmp_path):
    (found,) = problems(tmp_path, yaml.safe_dump(OURS), "lora_rank=8")
    assert found == (
        "override lora_rank=8: lora_rank: unknown key; "
        """LLaMA-Factory's "lora_rank" is tuning.rank here"""
    )


def test_a_misspelled_key_of_ours_is_still_corrected(tmp_path):
    content = OURS | {"tuning": {"kind": "lora", "rnak": 8}}
    (found,) = problems(tmp_path, yaml.safe_dump(content))
    assert found.endswith('did you mean "rank"?')


def test_every_place_that_is_named_exists_in_the_schema():
    schema = recipe_json_schema()
    names = {name for part in [schema, *schema["$defs"].values()] for name in part["properties"]}
    places = {place for table in TOOLS.values() for place in table.values() if " " not in place}
    assert {part for place in places for part in place.split(".")} <= names
