"""A weightless model is the real one in every shape, dtype and tie, and takes no memory."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from tests.models.conftest import MODEL_TYPES, tiny_config
from yrunner.losses.vocabulary_layers import is_tied
from yrunner.models.load import load_model
from yrunner.models.meta import build_fake_model, read_config
from yrunner.models.save import ModelCard, save_model
from yrunner.models.tuning import apply_tuning
from yrunner.recipe.schema.model import FreezeTuning, FullTuning, LoraTuning, Tuning

TUNINGS = [
    FullTuning(kind="full"),
    FreezeTuning(kind="freeze"),
    FreezeTuning(kind="freeze", embeddings=True),
    LoraTuning(),
    LoraTuning(variant="dora", targets=["q_proj", "embed_tokens"]),
]


def shapes(model: nn.Module) -> list[tuple[object, ...]]:
    """Name, shape, dtype and fate of every parameter; tied ones occur once."""
    return [
        (name, tuple(weight.shape), weight.dtype, weight.requires_grad)
        for name, weight in model.named_parameters()
    ]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("tuning", TUNINGS, ids=lambda tuning: tuning.kind)
def test_it_has_the_parameters_of_the_real_model(
    model_type: str, tuning: Tuning, dtype: torch.dtype, tied: bool
):
    config = AutoConfig.for_model(
        **tiny_config(model_type), vocab_size=320, tie_word_embeddings=tied
    )
    real = apply_tuning(AutoModelForCausalLM.from_config(config, dtype=dtype), tuning)
    assert shapes(build_fake_model(config, tuning, dtype=dtype)) == shapes(real)


def test_an_adapter_that_is_trained_on_has_its_own_shapes(
    qwen3_folder: Path, tokenizer: PreTrainedTokenizerBase, card: ModelCard, tmp_path: Path
):
    base = load_model(str(qwen3_folder), dtype=torch.float32)
    adapter = apply_tuning(base, LoraTuning(rank=3, targets=["q_proj"]))
    save_model(adapter, tokenizer, tmp_path / "adapter", card)
    go_on = LoraTuning(adapter=str(tmp_path / "adapter"))
    weightless = build_fake_model(read_config(str(qwen3_folder)), go_on, dtype=torch.float32)
    assert isinstance(weightless, PeftModel)
    assert shapes(weightless) == shapes(adapter)


def test_the_config_of_an_adapter_is_that_of_its_base(
    qwen3_folder: Path, tokenizer: PreTrainedTokenizerBase, card: ModelCard, tmp_path: Path
):
    adapter = apply_tuning(load_model(str(qwen3_folder), dtype=torch.float32), LoraTuning())
    save_model(adapter, tokenizer, tmp_path / "adapter", card)
    of_adapter = read_config(str(tmp_path / "adapter")).to_dict()
    assert of_adapter == read_config(str(qwen3_folder)).to_dict()


def test_a_model_of_eight_billion_weights_takes_no_memory():
    psutil = pytest.importorskip("psutil")
    config = AutoConfig.for_model("qwen3", hidden_size=4096, num_hidden_layers=36)
    before = psutil.Process().memory_info().rss
    model = build_fake_model(config, LoraTuning(), dtype=torch.bfloat16)
    assert sum(weight.numel() for weight in model.parameters()) > 8e9
    assert psutil.Process().memory_info().rss - before < 200e6


def test_flash_attention_needs_no_gpu_here():
    config = AutoConfig.for_model(**tiny_config("qwen3"), vocab_size=320)
    model = build_fake_model(
        config, FullTuning(kind="full"), dtype=torch.bfloat16, attention="flash_attention_2"
    )
    assert model.config._attn_implementation == "sdpa"


def test_what_was_shared_beneath_an_adapter_is_shared_on_fake_tensors():
    config = AutoConfig.for_model(**tiny_config("qwen3"), vocab_size=320, tie_word_embeddings=True)
    for targets in (["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]):
        model = build_fake_model(config, LoraTuning(targets=targets), dtype=torch.float32)
        assert is_tied(model)
