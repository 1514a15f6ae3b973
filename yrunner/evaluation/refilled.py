"""Let a model answer many prompts, in a batch that is refilled as its answers end.

An answer that has ended makes room for the next prompt, so that short answers do not wait for long
ones. What prompts begin with alike, such as a system message, is read once. Random numbers belong
to the prompt, so the answers are those of any other batch.
"""

# B = answers of the batch, H = key-value heads, D = size of a head, T = tokens, V = vocabulary

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations import is_deepspeed_zero3_enabled

from yrunner.data.chat.tokenize import Prompt
from yrunner.evaluation.generate import (
    GREEDY,
    REFUSED,
    Advance,
    Generated,
    Generator,
    Seed,
    draw_tokens,
    is_random,
    warpers_of,
    without_gradients,
)
from yrunner.losses.vocab_sweep import likeliest
from yrunner.machine import look_around
from yrunner.models.errors import silence_libraries
from yrunner.models.limits import evaluating
from yrunner.recipe.schema.eval import BeamWriting, Generation

FREE_PART = 8
"""A batch is refilled when this part of it is free: to read prompts one by one takes longer."""
ROOM = 32
"""Tokens that the key-value cache has room for before it is copied."""
WORTH_A_READING = 64
"""Tokens that have to be saved before a common beginning is read by itself: that takes a step."""


@dataclass(frozen=True)
class SeededPrompt:
    """A prompt as the chat template renders it, or its ids, with the seed of its answer."""

    text: str | tuple[int, ...]
    seed: Seed


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int,
    generation: Generation = GREEDY,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    also_stop_at: Sequence[int] = (),
    advance: Advance = lambda _: None,
) -> list[Generated]:
    """The answer to each prompt, in order. `also_stop_at`: additional ids that end it.

    Prompts are texts as the chat template renders them, or their ids. The longest are answered
    first, so that those of a batch have similar lengths. With `seed`, the number of a prompt
    decides its random draws: its index, or that in `numbers` for a part of a longer list. `advance`
    is called with the number of answers that have ended.
    """
    asked = [
        SeededPrompt(
            prompt if isinstance(prompt, str) else tuple(prompt),
            (seed, numbers[index] if numbers else index),
        )
        for index, prompt in enumerate(prompts)
    ]
    encode = Generator(model, tokenizer, max_new_tokens, generation).encode
    waiting = sorted(asked, key=lambda prompt: len(encode(prompt.text)))
    answers: dict[SeededPrompt, Generated] = {}
    with evaluating(model):
        for prompt, answer in answers_as_they_end(
            model,
            tokenizer,
            lambda: waiting.pop() if waiting else None,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            generation=generation,
            also_stop_at=also_stop_at,
        ):
            answers[prompt] = answer
            advance(1)
    return [answers[prompt] for prompt in asked]


def answers_as_they_end(
    model: Any,
    tokenizer: Any,
    next_prompt: Callable[[], SeededPrompt | None],
    *,
    max_new_tokens: int,
    batch_size: int,
    generation: Generation,
    also_stop_at: Sequence[int] = (),
    advance: Advance = lambda _: None,
    is_over: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[SeededPrompt, Generated]]:
    """The answers to prompts, in the order in which they end.

    `next_prompt` is called when there is room; None: there is none until another answer
    has ended. `advance` is called with the number of tokens written. Once `is_over`, no answer is
    finished. The model must be in evaluation mode.
    """
    generator = Generator(model, tokenizer, max_new_tokens, generation, tuple(also_stop_at))
    batch = _RefilledBatch(generator, generation)
    while not is_over():
        if batch.size <= batch_size - max(1, batch_size // FREE_PART):
            added: list[SeededPrompt] = []
            while batch.size + len(added) < batch_size and (prompt := next_prompt()) is not None:
                if generator.has_room_for(generator.encode(prompt.text)):
                    added.append(prompt)
                else:
                    yield prompt, REFUSED
            if added and not batch.can_refill:
                yield from zip(added, batch.write_at_once(added, advance), strict=True)
                continue
            batch.add(added)
        if not batch.size:
            return
        look_around()
        advance(batch.size)
        yield from batch.step()


class _RefilledBatch:
    """Answers that are written side by side; each may begin and end at any step.

    Prompts and answers end in the last column of the key-value cache and are padded on the left.
    The row of an answer that has ended stays until others are added, or until many have ended.
    """

    def __init__(self, generator: Generator, generation: Generation) -> None:
        self._generator, self._warpers = generator, warpers_of(generation)
        self._is_random = is_random(generation)
        self._accepted = set(inspect.signature(generator.model.forward).parameters)
        self.can_refill = (
            "position_ids" in self._accepted
            # A search, and a penalty that looks at what was written, are left to transformers.
            and not isinstance(generation, BeamWriting)
            and generation.repetition_penalty == 1
            and not is_deepspeed_zero3_enabled()
            # Layers with a window or a state keep other things than all keys and values.
            and all(type(layer) is DynamicLayer for layer in self._new_cache().layers)
        )
        self._answers: list[_Answer] = []
        self._cache = self._new_cache()
        self._beginning: _Beginning | None = None
        self._mask_BT, self._scores_BV = torch.empty(0), torch.empty(0)

    @property
    def size(self) -> int:
        """Answers that are being written."""
        return sum(not answer.has_ended for answer in self._answers)

    def write_at_once(self, prompts: Sequence[SeededPrompt], advance: Advance) -> list[Generated]:
        """The answers to prompts in a batch that is not refilled."""
        ids = [self._generator.encode(prompt.text) for prompt in prompts]
        answers = self._generator.write(ids, [prompt.seed for prompt in prompts])
        advance(sum(answer.num_tokens for answer in answers))
        return answers

    def add(self, prompts: Sequence[SeededPrompt]) -> None:
        """Read prompts, and begin their answers at the next step."""
        if not prompts:
            return
        texts = list(dict.fromkeys(prompt.text for prompt in prompts))
        encoded = [self._generator.encode(text) for text in texts]
        longest = max(map(len, encoded))
        mask_BT, scores_BV, cache = self._read(encoded, longest)
        # Equal prompts are read once.
        row_of_B = torch.tensor([texts.index(prompt.text) for prompt in prompts]).to(mask_BT.device)
        cache.batch_select_indices(row_of_B)
        mask_BT, scores_BV = mask_BT[row_of_B], scores_BV[row_of_B]
        self._remove_ended()
        if self._answers:
            width = max(longest, self._mask_BT.shape[1])
            for layer, added in zip(self._cache.layers, cache.layers, strict=True):
                layer.append_rows(added, width)
            masks = (self._mask_BT, mask_BT)
            mask_BT = torch.cat([pad(mask, (width - mask.shape[1], 0)) for mask in masks])
            scores_BV = torch.cat([self._scores_BV, scores_BV])
        else:
            self._cache = cache
        self._mask_BT, self._scores_BV = mask_BT, scores_BV
        self._answers += [_Answer(prompt) for prompt in prompts]

    def step(self) -> list[tuple[SeededPrompt, Generated]]:
        """Write a token of each answer; returns the answers that end with it."""
        scores_BV = self._scores_BV
        for warper in self._warpers:
            scores_BV = warper(self._mask_BT, scores_BV)
        if self._is_random:
            token_B1 = draw_tokens(scores_BV, [answer.draws.random() for answer in self._answers])
        else:
            token_B1 = likeliest(scores_BV)[:, None]
        stop_ids, most = self._generator.stop_ids, self._generator.max_new_tokens
        ended = []
        for answer, token in zip(self._answers, token_B1[:, 0].tolist(), strict=True):
            if answer.has_ended:
                continue
            answer.ids.append(token)
            if token in stop_ids or len(answer.ids) == most:
                answer.has_ended = True
                ended.append((answer.prompt, self._generator.read(answer.ids)))
        if self.size:
            self._mask_BT = pad(self._mask_BT, (0, 1), value=1)
            self._scores_BV = self._forward(token_B1, self._mask_BT, self._cache)
        if self.size <= len(self._answers) * (1 - 2 / FREE_PART):
            self._remove_ended()
        return ended

    def _read(self, encoded: Sequence[list[int]], longest: int) -> tuple[Tensor, Tensor, Any]:
        """Mask, scores of the next token, and cache of prompts, padded to `longest` tokens.

        The padding is between the common beginning and the rest.
        """
        begun, cache = 0, self._new_cache()
        self._beginning = self._common_beginning(encoded)
        if self._beginning is None:
            cache.layers = [_RoomyLayer() for _ in cache.layers]
        else:
            begun = len(self._beginning.ids)
            cache.layers = [layer.repeated(len(encoded)) for layer in self._beginning.layers]
        filler, device = self._generator.tokenizer.pad_token_id, self._generator.model.device
        rests = [ids[begun:] for ids in encoded]
        width = longest - begun
        ids_BT = torch.tensor([[filler] * (width - len(ids)) + ids for ids in rests])
        mask_BT = torch.tensor(
            [[1] * begun + [0] * (width - len(ids)) + [1] * len(ids) for ids in rests]
        ).to(device)
        return mask_BT, self._forward(ids_BT.to(device), mask_BT, cache), cache

    def _common_beginning(self, encoded: Sequence[list[int]]) -> "_Beginning | None":
        """What all prompts begin with, read now unless those before began so too.

        None where it is not worth a reading.
        """
        before = self._beginning
        if before is not None and all(_begins_with(ids, before.ids) for ids in encoded):
            return before
        alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*encoded, strict=False))
        # The last token of each prompt is read with its rest, and gives the first scores.
        size = min(sum(1 for _ in alike), min(map(len, encoded)) - 1)
        if size * (len(encoded) - 1) < WORTH_A_READING:
            return None
        ids, cache = encoded[0][:size], self._new_cache()
        cache.layers = [_RoomyLayer() for _ in cache.layers]
        ids_1T = torch.tensor([ids], device=self._generator.model.device)
        self._forward(ids_1T, torch.ones_like(ids_1T), cache)
        return _Beginning(ids, cache.layers)

    def _remove_ended(self) -> None:
        """Remove the rows of answers that have ended, and the columns that only they need."""
        rows = [row for row, answer in enumerate(self._answers) if not answer.has_ended]
        if len(rows) == len(self._answers):
            return
        self._answers = [self._answers[row] for row in rows]
        if rows:
            mask_BT = self._mask_BT[rows]
            unused = int(mask_BT.any(0).int().argmax())
            self._mask_BT, self._scores_BV = mask_BT[:, unused:], self._scores_BV[rows]
            for layer in self._cache.layers:
                layer.keep_rows(rows, unused)

    def _new_cache(self) -> Any:
        return DynamicCache(config=self._generator.model.config.get_text_config())

    def _forward(self, ids_BT: Tensor, mask_BT: Tensor, cache: Any) -> Tensor:
        """The scores of the next token, of shape [B, V]; the cache grows."""
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
        only_last = {"logits_to_keep": 1} if "logits_to_keep" in self._accepted else {}
        with without_gradients(), silence_libraries():
            output = self._generator.model(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                **only_last,
            )
        scores_BV: Tensor = output.logits[:, -1].float()
        return scores_BV


def _begins_with(ids: list[int], beginning: list[int]) -> bool:
    return len(ids) > len(beginning) and ids[: len(beginning)] == beginning


@dataclass(frozen=True)
class _Beginning:
    """Tokens that several prompts begin with, and their keys and values of shape [1, H, T, D]."""

    ids: list[int]
    layers: list["_RoomyLayer"]


class _Answer:
    """An answer that is being written."""

    def __init__(self, prompt: SeededPrompt) -> None:
        self.prompt = prompt
        self.draws = np.random.default_rng(prompt.seed)
        self.ids: list[int] = []
        self.has_ended = False


class _RoomyLayer(DynamicLayer):
    """Keys and values of shape [B, H, T, D] with room behind them: a step copies only its own.

    To copy all of them at each step takes longer than to read the weights of a small model.
    """

    keys: Tensor
    values: Tensor
    _buffers: list[Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens."""
        if not self.is_initialized:
            return super().update(key_states, value_states, *args, **kwargs)
        before = self.keys.shape[2]
        after = before + key_states.shape[2]
        if self._buffers is None or self._buffers[0].shape[2] < after:
            room = (0, 0, 0, after - before + ROOM)
            self._buffers = [pad(self.keys, room), pad(self.values, room)]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, before:after] = states
        self.keys, self.values = (buffer[:, :, :after] for buffer in self._buffers)
        return self.keys, self.values

    def repeated(self, number: int) -> "_RoomyLayer":
        """A layer with the only row of this one several times."""
        layer = copy.copy(self)
        size = (number, -1, -1, -1)
        layer.keys, layer.values = self.keys.expand(size), self.values.expand(size)
        layer._buffers = None
        return layer

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows with these indices, each as often as it is named."""
        super().batch_select_indices(indices)
        self._buffers = None

    def append_rows(self, added: "_RoomyLayer", width: int) -> None:
        """Append the rows of another layer; both are padded on the left to `width` tokens."""
        if self.is_initialized:
            pairs = (self.keys, added.keys), (self.values, added.values)
            self.keys, self.values = (
                torch.cat([pad(part, (0, 0, width - part.shape[2], 0)) for part in pair])
                for pair in pairs
            )
            self._buffers = None

    def keep_rows(self, rows: list[int], start: int) -> None:
        """Remove all other rows, and the tokens before `start`."""
        if self.is_initialized:
            self.keys, self.values = self.keys[rows, :, start:], self.values[rows, :, start:]
            self._buffers = None
