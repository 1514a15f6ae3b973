"""A model is loaded whole or refused with a sentence and a remedy."""

import json
import re
from copy import deepcopy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, modeling_utils

from tests.models.conftest import logits_of, tiny_config, train_one_step
from yrunner.errors import MissingError, ModelError, YRunnerError
from yrunner.models.load import (
    DTYPES,
    check_vocabulary,
    choose_dtype,
    find_stop_ids,
    load_model,
    load_tokenizer,
    time_in_bfloat16,
)
from yrunner.models.meta import read_config
from yrunner.models.model_key import model_key
from yrunner.models.save import save_model
from yrunner.models.scratch import build_model, train_tokenizer
from yrunner.models.templates.choose import set_chat_template
from yrunner.models.tuning import apply_tuning
from yrunner.recipe.schema.model import LoraTuning

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


def load(source, **options):
    return load_model(str(source), dtype=torch.float32, **options)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_saved_model_loads_with_the_same_logits_and_says_nothing(
    model, base_folder, ids_BT, capfd
):
    loaded = load(base_folder)
    assert torch.equal(logits_of(loaded, ids_BT), logits_of(model, ids_BT))
    assert not loaded.training
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_every_weight_is_loaded_in_the_dtype_asked_for(name, qwen3_folder):
    loaded = load_model(str(qwen3_folder), dtype=choose_dtype(name))
    assert {parameter.dtype for parameter in loaded.parameters()} == {getattr(torch, name)}


@pytest.mark.parametrize(("name", "backend"), [("float32", "mmap"), ("bfloat16", "pread")])
def test_weights_that_are_converted_are_not_mapped_into_memory(
    name, backend, qwen3_folder, monkeypatch
):
    """The whole file would be in memory beside the converted weights."""
    opened = []

    def watched(*args, **options):
        opened.append(options["backend"])
        return safe_open(*args, **options)

    monkeypatch.setattr(modeling_utils, "safe_open", watched)
    model = load_model(str(qwen3_folder), dtype=DTYPES[name])
    assert opened == [backend]
    assert modeling_utils.safe_open is watched, "others read as before"
    stored = load_file(qwen3_folder / "model.safetensors")
    for weight_name, weight in model.named_parameters():
        assert torch.equal(weight, stored[weight_name].to(DTYPES[name]))


def test_auto_is_float32_without_a_gpu_and_bfloat16_where_the_gpu_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_dtype("auto") == torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert choose_dtype("auto") == torch.bfloat16


def test_bfloat16_is_timed_only_where_the_cpu_has_instructions_for_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": False})
    assert time_in_bfloat16.__wrapped__(64, 128) is None
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    before = torch.get_rng_state()
    assert time_in_bfloat16.__wrapped__(64, 128) > 0
    assert torch.equal(torch.get_rng_state(), before), "a probe moves no random state"


def test_the_attention_asked_for_is_used(qwen3_folder):
    assert load(qwen3_folder, attention="eager").config._attn_implementation == "eager"


def test_an_attention_whose_package_is_missing_is_refused(qwen3_folder):
    with pytest.raises(MissingError, match="pip install flash-attn"):
        load(qwen3_folder, attention="flash_attention_2")


def test_missing_weights_are_refused_instead_of_random(base_folder):
    edit_weights(base_folder, lambda weights: weights.pop("model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"lacks 1 weight, such as model.layers.0.mlp.up_proj"):
        load(base_folder)


def test_weights_of_another_shape_are_refused_with_their_name(base_folder):
    edit_config(base_folder, intermediate_size=48)
    with pytest.raises(ModelError, match=r"shapes differ .* model.layers.0.mlp.\w+_proj.weight"):
        load(base_folder)


def test_pickled_weights_are_refused(qwen3_folder):
    weights = qwen3_folder / "model.safetensors"
    torch.save(load_file(weights), qwen3_folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match=r"pytorch_model.bin is a pickle.*convert it"):
        load(qwen3_folder)


def test_a_folder_without_weights_is_refused(qwen3_folder):
    (qwen3_folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        load(qwen3_folder)


@pytest.mark.parametrize("kept_bytes", [5, 20_000])
def test_damaged_weights_are_refused(kept_bytes, qwen3_folder):
    path = qwen3_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(ModelError, match=rf"{path} is cut"):
        load(qwen3_folder)


@pytest.mark.parametrize("load_it", ["model", "tokenizer"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_git_lfs_pointer_is_named(name, load_it, qwen3_folder):
    (qwen3_folder / name).write_text(POINTER)
    if (load_it, name) == ("tokenizer", "model.safetensors"):
        load_tokenizer(str(qwen3_folder))  # reads no weights
        return
    with pytest.raises(ModelError, match=rf"{name} is a Git LFS pointer .* Run git lfs pull in"):
        load(qwen3_folder) if load_it == "model" else load_tokenizer(str(qwen3_folder))


def test_a_pointer_among_the_pickles_is_a_pointer(qwen3_folder):
    (qwen3_folder / "model.safetensors").unlink()
    (qwen3_folder / "pytorch_model.bin").write_text(POINTER)
    with pytest.raises(ModelError, match=r"pytorch_model.bin is a Git LFS pointer"):
        load(qwen3_folder)


def test_files_that_are_not_loaded_may_be_pointers(qwen3_folder):
    for name in ("pytorch_model.bin", "consolidated.safetensors", "tokenizer.model"):
        (qwen3_folder / name).write_text(POINTER)
    load(qwen3_folder)
    load_tokenizer(str(qwen3_folder))


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"\xff" * 20, b"\x02" + bytes(7) + b"[]"])
def test_weights_without_a_header_are_cut_or_damaged(content, qwen3_folder):
    (qwen3_folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"is cut or damaged: its .* bytes have no whole header"):
        load(qwen3_folder)


def test_an_index_without_a_map_is_damaged(qwen3_folder):
    (qwen3_folder / "model.safetensors").rename(qwen3_folder / "model-00001-of-00001.safetensors")
    (qwen3_folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match=r"index.json is damaged: it has no weight_map"):
        load(qwen3_folder)


def test_a_missing_shard_is_refused(qwen3, qwen3_folder):
    (qwen3_folder / "model.safetensors").unlink()
    qwen3.save_pretrained(qwen3_folder, max_shard_size="20KB")
    next(qwen3_folder.glob("model-00002-*")).unlink()
    with pytest.raises(
        ModelError, match=r"lacks model-00002.*, which model.safetensors.index.json"
    ):
        load(qwen3_folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "quen"}, "architecture unknown to the installed transformers"),
        ({"model_type": "t5"}, "is not a causal language model"),
        ({"hidden_size": "wide"}, "config.json with wrong values"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.C"}},
            "set model.trust_remote_code: true",
        ),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(changes, sentence, qwen3_folder):
    edit_config(qwen3_folder, **changes)
    with pytest.raises(ModelError) as refused:
        load(qwen3_folder)
    assert sentence in str(refused.value)
    assert refused.value.remedy


def test_a_folder_without_config_a_file_and_nothing_are_refused(qwen3_folder):
    with pytest.raises(ModelError, match="is a file"):
        load(qwen3_folder / "config.json")
    with pytest.raises(ModelError, match="there is no folder"):
        load(qwen3_folder / "elsewhere")
    (qwen3_folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"it has no config\.json"):
        load(qwen3_folder)


@pytest.mark.parametrize("source", ["nobody/no-such-model", "outputs/no/model"])
def test_a_hub_id_without_network_is_refused(source, offline):
    with pytest.raises(ModelError, match=r"a local folder"):
        load(source)
    with pytest.raises(ModelError, match=r"a local folder"):
        load_tokenizer(source)


@pytest.mark.parametrize(
    "tuning",
    [
        LoraTuning(rank=4),
        LoraTuning(rank=4, variant="dora"),
        LoraTuning(rank=4, targets=["lm_head", "q_proj"]),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_with_an_adapter_loads_as_base_plus_adapter(
    tuning, tied, tokenizer, card, ids_BT, tmp_path
):
    base = build_model(tiny_config("qwen3", tie_word_embeddings=tied), tokenizer, seed=1)
    save_model(base, tokenizer, tmp_path / "base", card)
    tuned = apply_tuning(load(tmp_path / "base"), tuning)
    train_one_step(tuned, ids_BT)
    save_model(tuned, tokenizer, tmp_path / "adapter", card)

    merged = load(tmp_path / "adapter")
    expected = logits_of(tuned, ids_BT)
    assert not torch.allclose(expected, logits_of(base, ids_BT), atol=1e-2)
    torch.testing.assert_close(logits_of(merged, ids_BT), expected, atol=1e-5, rtol=1e-4)

    save_model(merged, tokenizer, tmp_path / "merged", card)
    exported = load(tmp_path / "merged")
    torch.testing.assert_close(logits_of(exported, ids_BT), logits_of(merged, ids_BT))


def test_an_adapter_whose_base_is_gone_or_unnamed_is_refused(
    qwen3_folder, tokenizer, card, tmp_path
):
    tuned = apply_tuning(load(qwen3_folder), LoraTuning(rank=2))
    save_model(tuned, tokenizer, tmp_path / "adapter", card)
    qwen3_folder.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"there is no folder .*qwen3"):
        load(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text("{}")
    with pytest.raises(ModelError, match="does not say which base"):
        load(tmp_path / "adapter")


def test_an_adapter_with_pickled_weights_is_refused(qwen3_folder, tokenizer, card, tmp_path):
    tuned = apply_tuning(load(qwen3_folder), LoraTuning(rank=2))
    save_model(tuned, tokenizer, tmp_path / "adapter", card)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ModelError, match=r"has no adapter_model.safetensors. Pickled"):
        load(tmp_path / "adapter")


def test_the_tokenizer_comes_back_as_it_was_saved(base_folder, tokenizer):
    loaded = load_tokenizer(str(base_folder))
    text = "灯塔 e\u0301 1873  <|im_end|>\n"  # AutoTokenizer joins e and its accent beside qwen2
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.pad_token, loaded.eos_token) == (tokenizer.pad_token, tokenizer.eos_token)


def test_an_adapter_folder_without_tokenizer_has_that_of_its_base(
    qwen3_folder, tokenizer, card, tmp_path
):
    save_model(
        apply_tuning(load(qwen3_folder), LoraTuning(rank=2)), tokenizer, tmp_path / "adapter", card
    )
    for file in (tmp_path / "adapter").glob("*token*"):
        file.unlink()
    assert len(load_tokenizer(str(tmp_path / "adapter"))) == len(tokenizer)


def test_a_folder_without_tokenizer_is_refused_instead_of_empty(base_folder):
    for file in base_folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"no (readable )?tokenizer"):
        load_tokenizer(str(base_folder))


def test_a_chat_template_file_replaces_the_own_one(qwen3_folder, tmp_path):
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    loaded = load_tokenizer(str(qwen3_folder), chat_template=template)
    turns = [{"role": "user", "content": "你好"}]
    assert loaded.apply_chat_template(turns, tokenize=False) == "你好"


TURNS = "{% for m in messages %}{{ '用户：' if m.role == 'user' }}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_the_byte_order_mark_of_a_chat_template_reaches_no_example(
    encoding, qwen3_folder, tmp_path
):
    template = tmp_path / "marked.jinja"
    template.write_text(TURNS, encoding)
    loaded = load_tokenizer(str(qwen3_folder), chat_template=template)
    turns = [{"role": "user", "content": "你好"}]
    assert loaded.apply_chat_template(turns, tokenize=False) == "用户：你好"


def test_the_byte_order_mark_of_the_models_own_template_reaches_no_example(qwen3_folder):
    (qwen3_folder / "chat_template.jinja").write_text(TURNS, "utf-8-sig")
    assert load_tokenizer(str(qwen3_folder)).chat_template == TURNS
    (qwen3_folder / "chat_template.jinja").write_text(TURNS, "gb18030")
    with pytest.raises(YRunnerError, match=r"chat_template\.jinja:1:28: .*iconv -f gb18030"):
        load_tokenizer(str(qwen3_folder))


@pytest.mark.parametrize("expression", ["tools | length", "'a'.index('b')", "{}.x.y"])
def test_a_chat_template_may_fail_for_a_lone_question(expression, qwen3_folder, tmp_path):
    template = tmp_path / "needs_more.jinja"
    template.write_text(f"{{{{ {expression} }}}}")
    loaded = load_tokenizer(str(qwen3_folder), chat_template=template)
    assert loaded.chat_template == f"{{{{ {expression} }}}}"


def test_a_broken_chat_template_is_refused_with_its_line(qwen3_folder, tmp_path):
    template = tmp_path / "broken.jinja"
    template.write_text("{{ bos_token }}\n{% for m in %}")
    with pytest.raises(ModelError, match=r"broken\.jinja:2: "):
        load_tokenizer(str(qwen3_folder), chat_template=template)
    with pytest.raises(YRunnerError, match="there is no file"):
        load_tokenizer(str(qwen3_folder), chat_template=tmp_path / "none.jinja")


@pytest.mark.parametrize(
    ("eos_token", "pad_token"),
    [("<|im_end|>", "<|endoftext|>"), ("<|endoftext|>", "<|endoftext|>")],
)
def test_a_missing_pad_token_becomes_a_reserved_one_or_at_last_eos(
    eos_token, pad_token, tokenizer, tmp_path
):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"eos_token": eos_token}
    del settings["pad_token"]
    path.write_text(json.dumps(settings))
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token is None
    assert load_tokenizer(str(tmp_path)).pad_token == pad_token


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(qwen3, tokenizer):
    check_vocabulary(qwen3, tokenizer)
    larger = train_tokenizer(["abc abc abd abd 你好 你好 你们 你们 雾港 雾港"], vocab_size=400)
    larger.add_tokens([f"<extra_{number}>" for number in range(100)])
    with pytest.raises(ModelError, match=r"the tokenizer has ids up to \d+, the model only"):
        check_vocabulary(qwen3, larger)


def test_an_answer_ends_at_eos_and_at_the_end_mark_of_the_template(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    base_like = load_tokenizer(str(tmp_path))
    assert find_stop_ids(base_like) == [base_like.convert_tokens_to_ids("<|im_end|>")]
    base_like.eos_token = "<|endoftext|>"
    assert base_like.convert_ids_to_tokens(find_stop_ids(base_like)) == [
        "<|endoftext|>",
        "<|im_end|>",
    ]
    base_like.chat_template = None
    assert find_stop_ids(base_like) == [base_like.eos_token_id]


@pytest.mark.parametrize("text", ["{{ 1 / 0 }}", "{{ messages[9].content }}", "{{ 'a' + 1 }}"])
def test_a_template_that_fails_on_a_lone_question_is_judged_by_the_rows(text, tokenizer, tmp_path):
    tokenizer = deepcopy(tokenizer)
    path = tmp_path / "x.jinja"
    path.write_text(text, "utf-8")
    set_chat_template(tokenizer, path)
    assert tokenizer.chat_template == text


@pytest.mark.parametrize("content", ["[]", "null", "3"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_config_that_is_no_object_is_refused_by_its_name(name, content, qwen3_folder):
    (qwen3_folder / name).write_text(content, "utf-8")
    for read in (load_tokenizer, model_key, read_config):
        with pytest.raises(ModelError, match=rf"{name} is not a JSON object"):
            read(str(qwen3_folder))


def _set(content, path, value):
    *parents, last = path
    for key in parents:
        content = content[key]
    content[last] = value


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("tokenizer.json", ("model", "vocab", "a"), {}),
        ("tokenizer.json", ("model", "merges"), "none"),
        ("tokenizer.json", ("added_tokens",), {"content": 3}),
        ("tokenizer.json", ("pre_tokenizer",), {"type": "Unheard"}),
        ("tokenizer_config.json", ("added_tokens_decoder",), [1]),
        ("tokenizer_config.json", ("extra_special_tokens",), 7),
    ],
)
def test_a_tokenizer_with_values_of_another_type_is_refused(name, path, value, qwen3_folder):
    file = qwen3_folder / name
    content = json.loads(file.read_text("utf-8"))
    _set(content, path, value)
    file.write_text(json.dumps(content), "utf-8")
    with pytest.raises(ModelError, match=re.escape(str(qwen3_folder))):
        load_tokenizer(str(qwen3_folder))


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_attention_heads", 0), ("rope_parameters", "none"), ("layer_types", {"a": 1})],
)
def test_a_config_whose_values_make_no_model_is_refused(key, value, qwen3_folder):
    edit_config(qwen3_folder, **{key: value})
    with pytest.raises(ModelError, match=re.escape(str(qwen3_folder))):
        load(qwen3_folder)
