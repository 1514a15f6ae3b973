"""Answers that vLLM writes in this process, with the adapter as it is at that moment.

vLLM only draws: the log-probabilities that are learned from are always our own model's.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from yrunner.errors import MissingError
from yrunner.evaluation.generate import Generator
from yrunner.models.errors import silence_libraries
from yrunner.models.export.serving import VLLM_RANKS, adapter_rank
from yrunner.recipe.schema.eval import SampleWriting
from yrunner.recipe.schema.rl import RolloutSection
from yrunner.training.rl.collect import AskedPrompt, WrittenAnswer


def require_vllm() -> None:
    """Raise `MissingError` without a GPU or the package that rollout.engine vllm needs."""
    if not torch.cuda.is_available():
        raise MissingError(
            "rollout.engine vllm needs an NVIDIA GPU, and this machine has none",
            remedy="set rollout.engine: transformers",
        )
    if find_spec("vllm") is None:
        raise MissingError(
            "rollout.engine vllm needs the package vllm",
            remedy="run pip install 'yrunner[vllm]', or set rollout.engine: transformers",
        )


class VllmWriter:
    """Writes an answer to each prompt; see `WriteAnswers`.

    The engine loads the base once. Before the first answers after an update the adapter is saved,
    and vLLM loads it under a new name.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        rollout: RolloutSection,
        options: Mapping[str, Any],
        *,
        update: Callable[[], int],
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        """`model` has the adapter; `update`: how often it has been updated.

        `options` of vLLM's engine: the base as `model`, and what else the recipe says of it.
        """
        self.model, self.rollout, self.options = model, rollout, options
        self.update, self.is_over = update, is_over
        writing = SampleWriting(kind="sample", temperature=rollout.temperature)
        self.generator = Generator(model, tokenizer, rollout.max_new_tokens, writing)
        self._engine: Any = None
        self._folder = TemporaryDirectory(prefix="yrunner-adapter-")
        self._adapter: Any = None
        self._adapter_of: int | None = None

    def __call__(self, asked: Sequence[AskedPrompt]) -> list[WrittenAnswer] | None:
        """The answers, in order; None where a signal came meanwhile."""
        from vllm import SamplingParams

        rollout, stop_ids = self.rollout, self.generator.stop_ids
        if self._engine is None:
            self._engine = self._load()
        self._save_adapter()
        found = self._engine.generate(
            [{"prompt_token_ids": list(each.ids)} for each in asked],
            [
                # Its defaults leave every token possible.
                SamplingParams(
                    temperature=rollout.temperature,
                    max_tokens=rollout.max_new_tokens,
                    seed=seed_of(each.seed),
                    stop_token_ids=stop_ids,
                    detokenize=False,
                )
                for each in asked
            ],
            use_tqdm=False,
            lora_request=self._adapter,
        )
        if self.is_over():
            return None
        return [self._read(list(each.outputs[0].token_ids)) for each in found]

    def _read(self, ids: list[int]) -> WrittenAnswer:
        answer = self.generator.read(ids)
        return WrittenAnswer(
            list(answer.ids), answer.text, answer.num_tokens, is_truncated=not answer.stopped
        )

    def _load(self) -> Any:
        # In this process: a second one would need the memory of a second CUDA context.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM

        rank = adapter_rank(next(iter(self.model.peft_config.values())).to_dict())
        return LLM(
            **self.options,
            gpu_memory_utilization=self.rollout.gpu_share,
            # The base's own would limit the length of answers.
            generation_config="vllm",
            enable_lora=True,
            max_loras=1,
            max_lora_rank=next(known for known in VLLM_RANKS if known >= rank),
        )

    def _save_adapter(self) -> None:
        """Show vLLM the adapter of this update, unless it has it already."""
        from vllm.lora.request import LoRARequest

        update = self.update()
        if update == self._adapter_of:
            return
        # The one before may still be read.
        folder = Path(self._folder.name) / str(update % 2)
        # Others may be those of a critic or of rewards.
        name = next(iter(self.model.peft_config))
        with silence_libraries():
            self.model.save_pretrained(
                str(folder), selected_adapters=[name], save_embedding_layers=False
            )
        # Numbers begin with 1; vLLM never looks again at one that it knows.
        self._adapter = LoRARequest(f"update-{update}", update + 1, str(folder))
        self._adapter_of = update


def seed_of(seed: Sequence[int]) -> int:
    """One number for the seed of an answer, as large as vLLM takes it."""
    return int(np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)[0] >> np.uint64(1))
