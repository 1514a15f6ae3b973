"""Let a model answer prompts, many at once, greedily, with beams or by sampling.

Random numbers belong to the question, not to the batch: a sampled answer is the same for any batch
size.
"""

# B = prompts of a batch, K = likeliest tokens, T = tokens of the longest prompt, V = vocabulary

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, assert_never

import numpy as np
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TextStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer
from transformers.integrations import is_deepspeed_zero3_enabled

from yrunner.models.errors import silence_libraries
from yrunner.models.load import find_stop_ids
from yrunner.recipe.schema.eval import (
    BeamWriting,
    DynamicWriting,
    Generation,
    GreedyWriting,
    SampleWriting,
)

Advance = Callable[[int], None]
"""Called with the number of prompts answered since the last call."""
Seed = tuple[int, int]
"""The seed of a run, and the number of the question."""
COLDEST = 1e-4
"""Temperature in place of 0, which would divide by zero."""
REFILLED_PART = 8
"""A batch is refilled when this part of it is free: reading prompts one by one takes longer."""


@dataclass(frozen=True)
class Generated:
    """A model's answer to a prompt."""

    text: str
    """Without special tokens and outer blanks."""
    num_tokens: int
    """Without the end mark."""
    stopped: bool
    """False where the answer was cut off at `max_new_tokens`."""
    refused: bool = False
    """True where prompt and answer do not fit into the model's positions: it was not asked."""
    starts_with_blank: bool = False
    """Whether a blank came before the text."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as the chat template renders it, with the seed of its answer."""

    text: str
    seed: Seed


GREEDY = GreedyWriting()
REFUSED = Generated("", 0, stopped=False, refused=True)


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
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

    Prompts are texts as the chat template renders them. They are answered longest first, so that
    prompts of a batch have similar lengths, and padded on the left, where padding changes nothing.
    With `seed`, the number of a prompt decides its random draws: its index, or that in `numbers`
    for a part of a longer list.
    """
    generator = _Generator(model, tokenizer, max_new_tokens, generation, tuple(also_stop_at))
    encoded = [generator.encode(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: -len(encoded[index]))
    asked = [index for index in order if generator.has_room_for(encoded[index])]
    answers = [REFUSED] * len(prompts)
    advance(len(order) - len(asked))
    was_training = model.training
    model.eval()
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        seeds = [(seed, numbers[index] if numbers else index) for index in batch]
        written = generator.write([encoded[index] for index in batch], seeds)
        for index, answer in zip(batch, written, strict=True):
            answers[index] = answer
        advance(len(batch))
    model.train(was_training)
    return answers


def answers_as_they_end(
    model: Any,
    tokenizer: Any,
    next_prompt: Callable[[], Prompt | None],
    *,
    max_new_tokens: int,
    batch_size: int,
    generation: SampleWriting,
    also_stop_at: Sequence[int] = (),
    advance: Advance = lambda _: None,
    is_over: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Prompt, Generated]]:
    """The answers to prompts, in the order in which they end.

    An answer that has ended makes room for the next prompt, so that short answers do not wait for
    long ones. `next_prompt` is called when there is room; None: there is none until another answer
    has ended. `advance` is called with the number of tokens written. Once `is_over`, no answer is
    finished. The model must be in evaluation mode.
    """
    generator = _Generator(model, tokenizer, max_new_tokens, generation, tuple(also_stop_at))
    batch = _RefilledBatch(generator, generation)
    while not is_over():
        if batch.size <= batch_size - max(1, batch_size // REFILLED_PART):
            added: list[Prompt] = []
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
        advance(batch.size)
        yield from batch.step()


def stream_answer(
    model: Any,
    tokenizer: Any,
    prompt: str,
    show: Callable[[str], None],
    *,
    max_new_tokens: int,
    generation: Generation = GREEDY,
    seed: int = 0,
) -> Generated:
    """The answer to one prompt; `show` gets its pieces as they are written.

    Beams change until the end, so their answer comes as one piece.
    """
    generator = _Generator(model.eval(), tokenizer, max_new_tokens, generation)
    ids = generator.encode(prompt)
    if not generator.has_room_for(ids):
        return REFUSED
    if isinstance(generation, BeamWriting):
        (answer,) = generator.write([ids], [(seed, 0)])
        show(answer.text)
        return answer
    (answer,) = generator.write([ids], [(seed, 0)], _Streamer(tokenizer, show))
    return answer


def max_positions(model: Any) -> int:
    """The model's longest sequence in tokens; a huge number where its config sets no limit."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def logits_processors(generation: Generation, seeds: Sequence[Seed]) -> LogitsProcessorList:
    """The steps from logits to the choice of a token, which is the likeliest of the result.

    `seeds` has one for each answer of the batch.
    """
    match generation:
        case GreedyWriting() | BeamWriting():
            return LogitsProcessorList()
        case SampleWriting():
            return LogitsProcessorList([*_warpers(generation), SeededSampler(seeds)])
        case DynamicWriting():
            by_entropy = EntropyWarper(
                greedy_below=generation.greedy_below,
                free_above=generation.free_above,
                temperature=generation.temperature,
                top_k=generation.top_k,
            )
            return LogitsProcessorList([by_entropy, SeededSampler(seeds)])
        case _:
            assert_never(generation)


def _warpers(generation: SampleWriting) -> list[LogitsProcessor]:
    """In transformers' order, without those that change nothing."""
    warpers: list[LogitsProcessor] = []
    if generation.temperature != 1:
        warpers.append(TemperatureLogitsWarper(generation.temperature))
    if generation.top_k:
        warpers.append(TopKLogitsWarper(generation.top_k))
    if generation.top_p < 1:
        warpers.append(TopPLogitsWarper(generation.top_p))
    if generation.min_p:
        warpers.append(MinPLogitsWarper(generation.min_p))
    return warpers


class SeededSampler(LogitsProcessor):
    """Draw a token by its probability, and make all others impossible."""

    def __init__(self, seeds: Sequence[Seed]) -> None:
        self._generators = [np.random.default_rng(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of shape [B, V] in, zero for the drawn token and minus infinity elsewhere out."""
        token_B1 = draw_tokens(scores, [generator.random() for generator in self._generators])
        return torch.full_like(scores, -torch.inf).scatter(-1, token_B1, 0.0)


def draw_tokens(scores_BV: Tensor, drawn: Sequence[float]) -> Tensor:
    """The token of each row whose part of the probabilities holds the number drawn, in [0, 1)."""
    # float64: in a sum over a large vocabulary, unlikely tokens would vanish in float32.
    cumulative_BV = scores_BV.double().softmax(-1).cumsum(-1)
    drawn_B = torch.tensor(drawn, dtype=torch.float64).to(scores_BV.device) * cumulative_BV[:, -1]
    token_B1 = torch.searchsorted(cumulative_BV, drawn_B[:, None], right=True)
    return token_B1.clamp(max=scores_BV.shape[-1] - 1)


class EntropyWarper(LogitsProcessor):
    """Set temperature and top-k of every token by the entropy of the model's prediction.

    Up to `greedy_below` nats only the likeliest token remains; from `free_above` on `temperature`
    and `top_k` apply in full; between the two, both rise linearly.
    """

    def __init__(
        self, *, greedy_below: float, free_above: float, temperature: float, top_k: int
    ) -> None:
        self._greedy_below, self._free_above = greedy_below, free_above
        self._temperature, self._top_k = temperature, top_k

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of shape [B, V] in and out."""
        log_BV = scores.log_softmax(-1)
        # A token that is already impossible would give zero times minus infinity.
        entropy_B = -(log_BV.exp() * log_BV).nan_to_num(0.0).sum(-1)
        rise = self._free_above - self._greedy_below
        freedom_B = ((entropy_B - self._greedy_below) / rise).clamp(0, 1)
        top_k = min(self._top_k, scores.shape[-1])
        top_BK = scores.topk(top_k).values
        last_B = (freedom_B * (top_k - 1)).round().long()
        least_B1 = top_BK.gather(-1, last_B[:, None])
        temperature_B = (freedom_B * self._temperature).clamp(min=COLDEST)
        return scores.masked_fill(scores < least_B1, -torch.inf) / temperature_B[:, None]


@dataclass(frozen=True)
class _Generator:
    """A model with its tokenizer, and how it writes."""

    model: Any
    tokenizer: Any
    max_new_tokens: int
    generation: Generation
    also_stop_at: tuple[int, ...] = ()

    def encode(self, prompt: str) -> list[int]:
        return list(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])

    def has_room_for(self, prompt: Sequence[int]) -> bool:
        """Whether the prompt and the longest answer fit into the model's positions."""
        return len(prompt) + self.max_new_tokens <= max_positions(self.model)

    def write(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[Seed],
        streamer: TextStreamer | None = None,
    ) -> list[Generated]:
        """The answers to the prompts of one batch."""
        longest = max(len(ids) for ids in prompts)
        pad = self.tokenizer.pad_token_id
        input_ids_BT = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts])
        mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
        beams = self.generation.num_beams if isinstance(self.generation, BeamWriting) else 1
        # Quiet: transformers warns that a temperature the model recommends is not used.
        with _without_gradients(), silence_libraries():
            output_BT = self.model.generate(
                input_ids=input_ids_BT.to(self.model.device),
                attention_mask=mask_BT.to(self.model.device),
                max_new_tokens=self.max_new_tokens,
                # The sampler leaves one token possible, so the likeliest is the drawn one.
                do_sample=False,
                logits_processor=logits_processors(self.generation, seeds),
                num_beams=beams,
                repetition_penalty=self.generation.repetition_penalty,
                use_cache=True,
                pad_token_id=pad,
                eos_token_id=self.stop_ids,
                streamer=streamer,
            )
        return [self.read(ids) for ids in output_BT[:, longest:].tolist()]

    def read(self, ids: Sequence[int]) -> Generated:
        """The answer of these tokens, which may go on behind its end."""
        end = next((index for index, token in enumerate(ids) if token in self.stop_ids), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return Generated(
            text.strip(),
            len(ids[:end]),
            stopped=end is not None,
            starts_with_blank=text[:1].isspace(),
        )

    @cached_property
    def stop_ids(self) -> list[int]:
        """The ids that end an answer: those of the model's generation config and its template."""
        known = self.model.generation_config.eos_token_id
        ids = [known] if isinstance(known, int) else list(known or [])
        return sorted({*ids, *find_stop_ids(self.tokenizer), *self.also_stop_at})


class _RefilledBatch:
    """Answers that are written side by side; each may begin and end at any step.

    Prompts and answers end in the last column of the key-value cache and are padded on the left.
    """

    def __init__(self, generator: _Generator, generation: SampleWriting) -> None:
        self._generator, self._warpers = generator, _warpers(generation)
        model = generator.model
        self._accepted = set(inspect.signature(model.forward).parameters)
        cache = DynamicCache(config=model.config.get_text_config())
        self.can_refill = (
            "position_ids" in self._accepted
            and not is_deepspeed_zero3_enabled()
            # Layers with a window or a state keep other things than all keys and values.
            and all(type(layer) is DynamicLayer for layer in cache.layers)
        )
        self._prompts: list[Prompt] = []
        self._answers: list[list[int]] = []
        self._draws: list[np.random.Generator] = []
        self._cache = cache
        self._mask_BT = torch.zeros(0, 0, dtype=torch.long)
        self._scores_BV = torch.zeros(0, 0)

    @property
    def size(self) -> int:
        """Answers that are being written."""
        return len(self._prompts)

    def write_at_once(self, prompts: Sequence[Prompt], advance: Advance) -> list[Generated]:
        """The answers to prompts in a batch that is not refilled."""
        ids = [self._generator.encode(prompt.text) for prompt in prompts]
        answers = self._generator.write(ids, [prompt.seed for prompt in prompts])
        advance(sum(answer.num_tokens for answer in answers))
        return answers

    def add(self, prompts: Sequence[Prompt]) -> None:
        """Read prompts, and begin their answers at the next step."""
        if not prompts:
            return
        texts = list(dict.fromkeys(prompt.text for prompt in prompts))
        encoded = [self._generator.encode(text) for text in texts]
        longest = max(map(len, encoded))
        pad, device = self._generator.tokenizer.pad_token_id, self._generator.model.device
        ids_BT = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in encoded])
        mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in encoded])
        cache = DynamicCache(config=self._generator.model.config.get_text_config())
        mask_BT = mask_BT.to(device)
        scores_BV = self._forward(ids_BT.to(device), mask_BT, cache)
        # Equal prompts are read once.
        row_of_B = torch.tensor([texts.index(prompt.text) for prompt in prompts]).to(device)
        cache.batch_select_indices(row_of_B)
        mask_BT, scores_BV = mask_BT[row_of_B], scores_BV[row_of_B]
        if self.size:
            width = max(longest, self._mask_BT.shape[1])
            _append_rows(self._cache, cache, width)
            mask_BT = torch.cat([_widened(self._mask_BT, width), _widened(mask_BT, width)])
            scores_BV = torch.cat([self._scores_BV, scores_BV])
        else:
            self._cache = cache
        self._mask_BT, self._scores_BV = mask_BT, scores_BV
        self._prompts += prompts
        self._answers += [[] for _ in prompts]
        self._draws += [np.random.default_rng(prompt.seed) for prompt in prompts]

    def step(self) -> list[tuple[Prompt, Generated]]:
        """Write a token of each answer; returns the answers that end with it."""
        scores_BV = self._scores_BV
        for warper in self._warpers:
            scores_BV = warper(self._mask_BT, scores_BV)
        token_B1 = draw_tokens(scores_BV, [draw.random() for draw in self._draws])
        ended, going_on = [], []
        for row, token in enumerate(token_B1[:, 0].tolist()):
            answer = self._answers[row]
            answer.append(token)
            if token in self._generator.stop_ids or len(answer) == self._generator.max_new_tokens:
                ended.append((self._prompts[row], self._generator.read(answer)))
            else:
                going_on.append(row)
        if ended:
            self._keep(going_on)
            token_B1 = token_B1[going_on]
        if going_on:
            self._mask_BT = torch.nn.functional.pad(self._mask_BT, (0, 1), value=1)
            self._scores_BV = self._forward(token_B1, self._mask_BT, self._cache)
        return ended

    def _keep(self, rows: list[int]) -> None:
        """Remove all other answers, and the columns that only they need."""
        self._prompts = [self._prompts[row] for row in rows]
        self._answers = [self._answers[row] for row in rows]
        self._draws = [self._draws[row] for row in rows]
        if not rows:
            return
        self._mask_BT = self._mask_BT[rows]
        unused = int(self._mask_BT.any(0).int().argmax())
        self._mask_BT = self._mask_BT[:, unused:]
        for layer in self._cache.layers:
            layer.keys = layer.keys[rows, :, unused:]
            layer.values = layer.values[rows, :, unused:]

    def _forward(self, ids_BT: Tensor, mask_BT: Tensor, cache: DynamicCache) -> Tensor:
        """The scores of the next token, of shape [B, V]; the cache grows."""
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
        only_last = {"logits_to_keep": 1} if "logits_to_keep" in self._accepted else {}
        with _without_gradients(), silence_libraries():
            output = self._generator.model(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                **only_last,
            )
        return output.logits[:, -1].float()


def _widened(mask_BT: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(mask_BT, (width - mask_BT.shape[1], 0))


def _append_rows(cache: DynamicCache, added: DynamicCache, width: int) -> None:
    """Append the rows of a cache to another one; both are padded on the left to `width`."""
    for layer, other in zip(cache.layers, added.layers, strict=True):
        for name in ("keys", "values"):
            parts = [getattr(each, name) for each in (layer, other)]
            padded = [
                torch.nn.functional.pad(part, (0, 0, width - part.shape[2], 0)) for part in parts
            ]
            setattr(layer, name, torch.cat(padded))


def _without_gradients() -> AbstractContextManager[None]:
    """Inference mode, except under ZeRO-3: it gathers weights inside that training needs too."""
    return torch.no_grad() if is_deepspeed_zero3_enabled() else torch.inference_mode()


class _Streamer(TextStreamer):
    """Pass on what transformers would print: whole words, and Chinese characters."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._show(text)
