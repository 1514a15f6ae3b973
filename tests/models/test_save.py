"""What was trained is written whole, and plain transformers or plain peft loads it."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from tests.models.conftest import logits_of, train_one_step
from yrunner.errors import ModelError
from yrunner.models import save as export
from yrunner.models.load import load_model
from yrunner.models.save import loading_lines, render_card, save_model
from yrunner.models.tuning import apply_tuning
from yrunner.recipe.schema.model import LoraTuning


def lines_of(card_text):
    """The one block of Python in a model card."""
    blocks = re.findall(r"^```python\n(.*?)^```$", card_text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    assert len(blocks[0].splitlines()) == 3
    return blocks[0]


def run_lines(folders, ids_BT):
    """Logits of the models that the cards' lines load in a fresh process without our package."""
    program = (
        "import os, sys, torch\nfrom safetensors.torch import save_file\n"
        f"ids = torch.tensor({ids_BT.tolist()})\n"
        "for folder, lines in zip(sys.argv[1::2], sys.argv[2::2]):\n"
        "    os.chdir(folder)\n"
        "    exec(lines)\n"
        "    assert 'yrunner' not in sys.modules and not model.training\n"
        "    assert tokenizer.chat_template and tokenizer.eos_token == '<|im_end|>'\n"
        "    with torch.no_grad():\n"
        "        logits = model(input_ids=ids).logits.contiguous()\n"
        "    save_file({'logits': logits}, 'logits.safetensors')\n"
    )
    cards = [(folder, lines_of((folder / "README.md").read_text("utf-8"))) for folder in folders]
    run = subprocess.run(
        [sys.executable, "-c", program, *(str(word) for card in cards for word in card)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return [load_file(folder / "logits.safetensors")["logits"] for folder in folders]


def front_matter(card_text):
    return yaml.safe_load(card_text.split("---\n")[1])


def test_the_three_lines_of_the_card_load_full_weights_and_adapters(
    qwen3, qwen3_folder, tokenizer, card, ids_BT, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # a relative base must be found from elsewhere too
    models, folders = [qwen3], [qwen3_folder]
    for variant in ("plain", "dora"):
        tuned = apply_tuning(
            load_model(qwen3_folder.name, dtype=torch.float32), LoraTuning(rank=4, variant=variant)
        )
        train_one_step(tuned, ids_BT)
        models.append(tuned)
        folders.append(tmp_path / variant / "model")
        save_model(tuned, tokenizer, folders[-1], card)
    for model, loaded in zip(models, run_lines(folders, ids_BT), strict=True):
        torch.testing.assert_close(loaded, logits_of(model, ids_BT))


def test_lines_for_another_place_name_it_and_survive_odd_paths():
    lines = loading_lines('C:\\models\\"mine"', is_adapter=False)
    compile(lines, "card", "exec")
    assert 'from_pretrained("C:\\\\models\\\\\\"mine\\"")' in lines


def test_of_a_peft_model_only_the_adapter_is_written(qwen3_folder, tokenizer, card, tmp_path):
    tuned = apply_tuning(
        load_model(str(qwen3_folder), dtype=torch.float32),
        LoraTuning(rank=2, targets=["q_proj", "lm_head", "embed_tokens"]),
    )
    save_model(tuned, tokenizer, tmp_path / "adapter", card)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(".lora_" in name for name in weights)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(qwen3_folder.resolve())


def test_everything_a_reader_needs_is_there_and_readable(base_folder):
    names = {file.name for file in base_folder.iterdir()}
    assert {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= names
    modes = {file.stat().st_mode for file in base_folder.iterdir()}
    assert len(modes) == 1  # safetensors alone would be readable by its owner only


def test_the_generation_config_stops_at_eos_at_the_end_mark_and_where_the_base_stopped(
    qwen3, tokenizer, card, tmp_path
):
    qwen3.generation_config = GenerationConfig(eos_token_id=[7], temperature=0.6, do_sample=True)
    save_model(qwen3, tokenizer, tmp_path / "model", card)
    saved = GenerationConfig.from_pretrained(tmp_path / "model")
    assert saved.eos_token_id == [tokenizer.eos_token_id, 7]
    assert saved.pad_token_id == tokenizer.pad_token_id
    assert (saved.temperature, saved.do_sample) == (0.6, True)


def test_sampling_settings_that_contradict_themselves_do_not_lose_the_model(
    qwen3, tokenizer, card, tmp_path
):
    qwen3.generation_config = GenerationConfig(eos_token_id=7)
    qwen3.generation_config.temperature = -1.0
    save_model(qwen3, tokenizer, tmp_path / "model", card)
    saved = GenerationConfig.from_pretrained(tmp_path / "model")
    assert saved.eos_token_id == [tokenizer.eos_token_id, 7]


def test_an_existing_folder_is_replaced_only_by_a_complete_one(
    qwen3, base_folder, tokenizer, card, monkeypatch
):
    before = (base_folder / "model.safetensors").read_bytes()
    (base_folder / "stale.txt").write_text("old")
    with monkeypatch.context() as broken:
        broken.setattr(export, "render_card", lambda *_args, **_options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_model(qwen3, tokenizer, base_folder, card)
    assert (base_folder / "model.safetensors").read_bytes() == before
    assert (base_folder / "stale.txt").exists()

    save_model(qwen3, tokenizer, base_folder, card)
    assert not (base_folder / "stale.txt").exists()
    assert [path.name for path in base_folder.parent.iterdir()] == ["base"]


def test_an_adapter_never_replaces_its_base(qwen3_folder, tokenizer, card):
    tuned = apply_tuning(load_model(str(qwen3_folder), dtype=torch.float32), LoraTuning())
    with pytest.raises(ModelError, match=r"is the base of this adapter.*Choose another"):
        save_model(tuned, tokenizer, qwen3_folder, card)
    assert (qwen3_folder / "model.safetensors").is_file()


def test_an_adapter_on_a_model_that_was_never_saved_is_refused(qwen3, tokenizer, card, tmp_path):
    with pytest.raises(ModelError, match="its base was never saved"):
        save_model(apply_tuning(qwen3, LoraTuning()), tokenizer, tmp_path / "adapter", card)


def test_an_adapter_that_is_not_finite_cannot_be_merged(qwen3_folder, tokenizer, card, tmp_path):
    folder = tmp_path / "adapter"
    tuned = apply_tuning(load_model(str(qwen3_folder), dtype=torch.float32), LoraTuning(rank=2))
    save_model(tuned, tokenizer, folder, card)
    path = folder / "adapter_model.safetensors"
    save_file({n: torch.full_like(w, torch.nan) for n, w in load_file(path).items()}, path)
    with pytest.raises(ModelError, match="cannot be merged"):
        load_model(str(folder), dtype=torch.float32)


def test_the_card_tells_what_the_hub_and_people_want_to_know(card):
    text = render_card(card, is_adapter=False)
    assert front_matter(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["yrunner", "full"],
    }
    assert "| exact answers \\| legal | 38 of 40 |" in text
    assert "- `data/legal_train.jsonl`" in text
    assert f"````yaml\n{card.recipe}````\n" in text  # longer than the fence in the recipe


def test_the_card_names_a_base_on_the_hub_and_a_known_license(card, tmp_path):
    on_hub = replace(card, base="Qwen/Qwen3-0.6B", tuning="lora", license="apache-2.0")
    assert front_matter(render_card(on_hub, is_adapter=True)) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["yrunner", "lora"],
        "base_model": "Qwen/Qwen3-0.6B",
        "base_model_relation": "adapter",
        "license": "apache-2.0",
    }
    local = replace(card, base=str(tmp_path))
    assert "base_model" not in front_matter(render_card(local, is_adapter=True))
