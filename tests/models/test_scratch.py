"""A new tokenizer writes every text, a new model is what its config says."""

import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.models.conftest import MODEL_TYPES, TEXTS, logits_of, tiny_config
from yrunner.errors import ModelError
from yrunner.models.scratch import build_model, train_tokenizer

CONVERSATION = [
    {"role": "system", "content": " Be brief.\n"},
    {"role": "user", "content": "[[1]]? "},
    {"role": "assistant", "content": " [[1]]\n"},
    {"role": "user", "content": "再说一遍"},
    {"role": "assistant", "content": ""},
]


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_any_text_comes_back_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_stand_alone(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("in 1873").input_ids)
    assert tokens[-4:] == ["1", "8", "7", "3"]


def test_no_token_is_unknown_and_special_ones_are_set(tokenizer):
    assert tokenizer.unk_token is None
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer("<|im_start|>").input_ids) == 1


def test_the_same_texts_give_the_same_tokenizer_in_another_process(tokenizer):
    program = (
        "from tests.models.conftest import TEXTS\n"
        "from yrunner.models.scratch import train_tokenizer\n"
        "print(train_tokenizer(TEXTS, 320).backend_tokenizer.to_str())"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == tokenizer.backend_tokenizer.to_str()


def test_few_texts_reach_a_smaller_vocabulary_and_the_model_matches_it():
    tokenizer = train_tokenizer(["ab ab"], vocab_size=5000)
    assert 259 < len(tokenizer) < 270
    model = build_model(tiny_config("qwen3"), tokenizer, seed=0)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ModelError, match=r"258 is too small.*259 or more"):
        train_tokenizer(TEXTS, vocab_size=258)


def test_the_chat_template_keeps_every_character_of_the_content(tokenizer):
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert text == (
        "<|im_start|>system\n Be brief.\n<|im_end|>\n"
        "<|im_start|>user\n[[1]]? <|im_end|>\n"
        "<|im_start|>assistant\n [[1]]\n<|im_end|>\n"
        "<|im_start|>user\n再说一遍<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n"
    )


def test_the_generation_prompt_opens_an_assistant_turn(tokenizer):
    text = tokenizer.apply_chat_template(
        CONVERSATION[:2], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("[[1]]? <|im_end|>\n<|im_start|>assistant\n")


def test_generation_marks_hold_exactly_the_replies_and_their_end_marks(tokenizer):
    encoded = tokenizer.apply_chat_template(
        CONVERSATION, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [
        token
        for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        if mask
    ]
    assert tokenizer.decode(marked) == " [[1]]\n<|im_end|><|im_end|>"


def test_an_unknown_role_is_refused_by_the_chat_template(tokenizer):
    with pytest.raises(jinja2.TemplateError, match="role 'bot' is unknown"):
        tokenizer.apply_chat_template([{"role": "bot", "content": "a"}], tokenize=False)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_same_seed_gives_the_same_weights_and_leaves_the_random_state_alone(
    model_type, tokenizer
):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build_model(tiny_config(model_type), tokenizer, seed=7)
    assert torch.equal(torch.rand(3), expected)
    again = build_model(tiny_config(model_type), tokenizer, seed=7)
    other = build_model(tiny_config(model_type), tokenizer, seed=8)
    ids_BT = torch.tensor([[3, 4, 5]])
    assert torch.equal(logits_of(first, ids_BT), logits_of(again, ids_BT))
    assert not torch.equal(logits_of(first, ids_BT), logits_of(other, ids_BT))


def test_ids_and_dtype_come_from_the_tokenizer_and_from_us(model, tokenizer):
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (tiny_config("qwen33"), 'model_type "qwen33". Did you mean "qwen3"?'),
        (tiny_config("t5"), 'no causal language model has the model_type "t5"'),
        (tiny_config("qwen3", hiden_size=64), 'no such key. Did you mean "hidden_size"?'),
        (tiny_config("qwen3", vocab_size=9), "vocab_size is set from the tokenizer"),
        (tiny_config("qwen3", num_key_value_heads=3), "Check the sizes"),
        (tiny_config("llama", num_attention_heads=3), "not a multiple of the number of attention"),
        (
            tiny_config("qwen2", num_attention_heads=5, num_key_value_heads=5),
            "hidden_size 32 does not divide by 5 heads",
        ),
        (tiny_config("qwen3", hidden_size=0), "a size is 0"),
        (tiny_config("qwen3", hidden_size="wide"), "expected int, got str"),
        (tiny_config("qwen3", rms_norm_eps="1e-6"), "write rms_norm_eps with a dot"),
        (
            {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2},
            "sees the tokens that it should predict",
        ),
    ],
)
def test_a_wrong_config_is_refused_with_a_remedy(config, sentence, tokenizer):
    with pytest.raises(ModelError) as refused:
        build_model(config, tokenizer, seed=0)
    assert sentence.lower() in str(refused.value).lower()
    assert refused.value.remedy


def test_a_key_that_only_the_model_reads_is_accepted(tokenizer):
    model = build_model({**tiny_config("qwen3"), "model_type": "qwen3_moe"}, tokenizer, seed=0)
    assert model.model.layers[0].self_attn.head_dim == 8


def test_rope_theta_is_read_although_it_is_no_field_of_the_config(tokenizer):
    model = build_model(tiny_config("qwen3", rope_theta=500.0), tokenizer, seed=0)
    assert model.config.rope_parameters["rope_theta"] == 500.0
