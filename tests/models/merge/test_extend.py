"""A base with a longer rope or more tokens is what transformers makes of it by hand."""

import pytest
import torch
from transformers import AutoConfig

from tests.models.conftest import logits_of, tiny_config
from yrunner.errors import ModelError
from yrunner.models.load import load_model, load_tokenizer
from yrunner.models.merge.extend import extended_folder
from yrunner.models.save import save_model
from yrunner.models.scratch import build_model
from yrunner.recipe.schema.model import RopeScaling

NEW = ["<call>", "<结果>"]
YARN = RopeScaling(kind="yarn", factor=4.0)


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_rope_is_scaled_as_by_hand_and_longer_texts_fit(kind, base_folder, tmp_path, ids_BT):
    folder = extended_folder(
        str(base_folder), tmp_path / "bases", RopeScaling(kind=kind, factor=4.0), []
    )
    by_hand = AutoConfig.from_pretrained(base_folder)
    scaled = {**by_hand.rope_parameters, "rope_type": kind, "factor": 4.0}
    if kind == "yarn":
        scaled["original_max_position_embeddings"] = 256
    by_hand.rope_parameters = scaled
    plain = load_model(str(base_folder), dtype=torch.float32)
    expected = type(plain)(by_hand).eval()
    expected.load_state_dict(plain.state_dict())
    found = load_model(str(folder), dtype=torch.float32)
    assert torch.equal(logits_of(found, ids_BT), logits_of(expected, ids_BT))
    assert not torch.allclose(logits_of(found, ids_BT), logits_of(plain, ids_BT))
    assert found.config.max_position_embeddings == 1024
    assert (folder / "model.safetensors").is_symlink(), "weights are not copied"
    tokenizers = (load_tokenizer(str(each)) for each in (folder, base_folder))
    assert len({tokenizer.chat_template for tokenizer in tokenizers}) == 1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 1, 5])
def test_new_tokens_begin_as_the_mean_and_change_nothing_else(
    tied, spare, tokenizer, card, tmp_path, ids_BT
):
    config = tiny_config("qwen3", tie_word_embeddings=tied)
    model = build_model(config, tokenizer, seed=1)
    model.resize_token_embeddings(len(tokenizer) + spare, mean_resizing=False)
    save_model(model, tokenizer, tmp_path / "base", card)
    folder = extended_folder(str(tmp_path / "base"), tmp_path / "bases", None, NEW)
    found, longer = load_model(str(folder), dtype=torch.float32), load_tokenizer(str(folder))
    ids = longer.convert_tokens_to_ids(NEW)
    assert ids == [len(tokenizer), len(tokenizer) + 1]
    assert longer("a<结果>b", add_special_tokens=False).input_ids.count(ids[1]) == 1
    assert "<call>" in longer.decode(ids, skip_special_tokens=True), "an answer shows it"
    rows = found.get_input_embeddings().weight
    assert len(rows) == len(tokenizer) + max(spare, 2) == found.config.vocab_size
    old = model.get_input_embeddings().weight
    torch.testing.assert_close(rows[ids], old[: len(tokenizer)].mean(0).expand(2, -1))
    for text in ("Who keeps the lighthouse?", "灯塔归谁管？"):
        assert longer(text).input_ids == tokenizer(text).input_ids
    same = slice(None, len(tokenizer))
    torch.testing.assert_close(
        logits_of(found, ids_BT)[..., same], logits_of(model.eval(), ids_BT)[..., same]
    )


def test_a_base_is_extended_once_and_again_when_it_changes(base_folder, tmp_path, capfd):
    first = extended_folder(str(base_folder), tmp_path / "bases", YARN, NEW)
    assert "base with rope scaled by yarn from 256 to 1,024 tokens and 2 new tokens, each" in (
        capfd.readouterr().out
    )
    assert extended_folder(str(base_folder), tmp_path / "bases", YARN, NEW) == first
    assert capfd.readouterr().out == ""
    assert extended_folder(str(base_folder), tmp_path / "bases", YARN, NEW[:1]) != first
    assert len(list((tmp_path / "bases").iterdir())) == 2


def test_a_base_whose_weights_have_gone_is_extended_again(base_folder, tmp_path):
    first = extended_folder(str(base_folder), tmp_path / "bases", YARN, [])
    (first / "model.safetensors").unlink()
    (first / "model.safetensors").symlink_to(tmp_path / "nowhere")
    again = extended_folder(str(base_folder), tmp_path / "bases", YARN, [])
    assert again == first and (again / "model.safetensors").exists()


def test_what_cannot_be_extended_is_refused(tokenizer, card, tmp_path):
    scaled = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    model = build_model(tiny_config("llama", rope_parameters=scaled), tokenizer, seed=1)
    save_model(model, tokenizer, tmp_path / "base", card)
    with pytest.raises(ModelError, match=r"rope of this model is scaled already \(linear\)"):
        extended_folder(str(tmp_path / "base"), tmp_path / "bases", YARN, [])
    known = next(iter(tokenizer.get_vocab()))
    with pytest.raises(ModelError, match="is a token of this model already"):
        extended_folder(str(tmp_path / "base"), tmp_path / "bases", None, [known])
    assert not list((tmp_path / "bases").iterdir())
    (tmp_path / "base" / "adapter_config.json").write_text("{}", "utf-8")
    with pytest.raises(ModelError, match="need a whole model"):
        extended_folder(str(tmp_path / "base"), tmp_path / "bases", None, NEW)
