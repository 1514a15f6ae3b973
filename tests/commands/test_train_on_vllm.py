"""vLLM writes the answers, with the adapter of each update; a stand-in has its signatures.

The real one needs a GPU. The stand-in loads base and adapter from the folders that it is given, and
writes the likeliest tokens: those of the trained model, if it is given the right ones.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from yrunner.assembly import preflight
from yrunner.assembly.rl.vllm import VllmWriter, seed_of
from yrunner.commands.check.command import check
from yrunner.commands.train import train
from yrunner.errors import MissingError

REWARDED = Path("rewarded.yaml")
ON_VLLM = ["rollout={generations: 4, max_new_tokens: 8, truncated: keep, engine: vllm}"]

LIKELIEST: list[bool] = []
"""Whether answers are, behind their first token, the likeliest under the model that is trained."""


@dataclass
class SamplingParams:
    """Of the fields of vllm/sampling_params.py those that matter; no others are accepted."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    detokenize: bool = True


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class LLM:
    """The arguments of vllm/entrypoints/llm.py and of its EngineArgs."""

    made: ClassVar[list["LLM"]] = []

    def __init__(
        self,
        model: str,
        *,
        trust_remote_code: bool = False,
        dtype: str = "auto",
        seed: int = 0,
        gpu_memory_utilization: float = 0.9,
        max_model_len: int | None = None,
        generation_config: str = "auto",
        enable_lora: bool = False,
        max_loras: int = 1,
        max_lora_rank: int = 16,
    ) -> None:
        assert dtype == "float32" and generation_config == "vllm" and enable_lora
        assert max_lora_rank == 8 and max_model_len == 128 and gpu_memory_utilization == 0.3
        self.base = model
        self.calls: list[tuple[Any, list[SamplingParams]]] = []
        LLM.made.append(self)

    def generate(
        self,
        prompts: list[dict[str, list[int]]],
        sampling_params: list[SamplingParams],
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> list[Any]:
        assert len(prompts) == len(sampling_params) and not use_tqdm and lora_request
        self.calls.append((lora_request, sampling_params))
        base = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, lora_request.lora_path).eval()
        return [
            self._answer(model, prompt["prompt_token_ids"], params)
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]

    def _answer(self, model: Any, prompt: list[int], params: SamplingParams) -> Any:
        ids: list[int] = []
        while len(ids) < params.max_tokens and not (ids and ids[-1] in params.stop_token_ids):
            with torch.no_grad():
                logits_V = model(torch.tensor([[*prompt, *ids]])).logits[0, -1]
            # Answers of a group differ by their first token, which the seed decides.
            ids.append(int(logits_V.topk(8).indices[params.seed % 8 if not ids else 0]))
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)])


@pytest.fixture
def fake_vllm(monkeypatch):
    package, lora, request = (
        ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request")
    )
    package.LLM, package.SamplingParams, request.LoRARequest = LLM, SamplingParams, LoRARequest
    for module in (package, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(preflight, "require_vllm", lambda: None)
    monkeypatch.setattr(LLM, "made", [])
    LIKELIEST.clear()
    write = VllmWriter.__call__

    def write_and_compare(self: VllmWriter, asked: Any) -> Any:
        found = write(self, asked)
        for prompt, answer in zip(asked[:4], found[:4], strict=True):
            ids = torch.tensor([[*prompt.ids, *answer.ids]])
            with torch.no_grad():
                likeliest = self.model(ids).logits[0, len(prompt.ids) : -1].argmax(-1)
            LIKELIEST.append(likeliest.tolist() == answer.ids[1:])
        return found

    monkeypatch.setattr(VllmWriter, "__call__", write_and_compare)


def test_vllm_writes_with_the_adapter_of_each_update_and_our_model_learns(rewarded, fake_vllm):
    train(
        REWARDED,
        [*ON_VLLM, "train.learning_rate=3e-2", "train.max_steps=4", "train.checkpoint={every: 2}"],
        resume=False,
        overwrite=False,
    )
    (engine,) = LLM.made
    # Each cycle has its adapter, and the two validations theirs: that of the update before.
    names = [request.lora_name for request, _ in engine.calls]
    assert names == [f"update-{update}" for update in (0, 1, 2, 2, 3, 4)]
    assert all(request.lora_int_id > 0 for request, _ in engine.calls)
    every = [params for _, several in engine.calls for params in several]
    assert len({params.seed for params in every[:16]}) == 16
    for params in every:
        assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    # What the run learned with are its own log-probabilities: the first pass has a ratio of 1.
    metrics = Path("outputs/rewarded/metrics.jsonl").read_text("utf-8").splitlines()
    rows = [row for row in map(json.loads, metrics) if "loss" in row]
    assert all(row["policy_change"] == 0 and abs(row["kl"]) < 1 for row in rows)
    assert rows[-1]["kl"] > 0
    assert len(LIKELIEST) == 6 * 4 and all(LIKELIEST)


def test_what_is_missing_is_one_sentence_of_train_and_check(rewarded, monkeypatch):
    def training():
        train(REWARDED, ON_VLLM, resume=False, overwrite=False)

    def checking():
        check(REWARDED, ON_VLLM, as_machine=True, sample=0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in (training, checking):
        with pytest.raises(MissingError, match="vllm needs an NVIDIA GPU") as caught:
            command()
        assert caught.value.exit_code == 3 and "transformers" in caught.value.remedy


def test_seeds_differ_and_fit_into_what_vllm_takes():
    seeds = {seed_of((42, 0, cycle, prompt, 1)) for cycle in range(20) for prompt in range(20)}
    assert len(seeds) == 400 and all(0 <= seed < 2**63 for seed in seeds)
