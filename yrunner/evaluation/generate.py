"""How a model writes: greedily, with beams or by sampling; and an answer shown as it is written.

Random numbers belong to the question, not to the batch: a sampled answer is the same for any batch
size.
"""

# B = prompts of a batch, K = likeliest tokens, or those of a block, N = blocks, T = tokens of the
# longest prompt, V = vocabulary

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, assert_never

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TextStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from yrunner.data.chat.reply_text import is_thinking_mark
from yrunner.data.chat.tokenize import Prompt
from yrunner.machine import look_around
from yrunner.models.errors import silence_libraries
from yrunner.models.limits import max_positions
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
Seed = tuple[int, ...]
"""What decides the random draws of an answer: the seed of a run, the number of the question."""
BLOCK = 256
"""Tokens whose probabilities are summed together to find the one that is drawn."""
COLDEST = 1e-4
"""Temperature in place of 0, which would divide by zero."""


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
    ids: tuple[int, ...] = ()
    """All tokens as written, with the end mark."""
    unfinished: bool = False
    """True where the thinking never ended: there is no answer, and `text` is empty."""


GREEDY = GreedyWriting()
REFUSED = Generated("", 0, stopped=False, refused=True)


def stream_answer(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    show: Callable[[str], None],
    *,
    max_new_tokens: int,
    generation: Generation = GREEDY,
    seed: int = 0,
) -> Generated:
    """The answer to one prompt; `show` gets its pieces as they are written.

    Beams change until the end, so their answer comes as one piece.
    """
    generator = Generator(model.eval(), tokenizer, max_new_tokens, generation)
    ids = generator.encode(prompt)
    if not generator.has_room_for(ids):
        return REFUSED
    if isinstance(generation, BeamWriting):
        (answer,) = generator.write([ids], [(seed, 0)])
        show(answer.text)
        return answer
    (answer,) = generator.write([ids], [(seed, 0)], _Streamer(tokenizer, show))
    return answer


def logits_processors(generation: Generation, seeds: Sequence[Seed]) -> LogitsProcessorList:
    """The steps from logits to the choice of a token, which is the likeliest of the result.

    `seeds` has one for each answer of the batch.
    """
    sampler = [SeededSampler(seeds)] if is_random(generation) else []
    return LogitsProcessorList([*warpers_of(generation), *sampler])


def is_random(generation: Generation) -> bool:
    """Whether tokens are drawn, so that an answer depends on its seed."""
    return isinstance(generation, SampleWriting | DynamicWriting)


def warpers_of(generation: Generation) -> list[LogitsProcessor]:
    """What changes the logits before a token is chosen, in transformers' order.

    Steps that would change nothing are left out.
    """
    match generation:
        case GreedyWriting() | BeamWriting():
            return []
        case SampleWriting():
            return _warpers_of_sample(generation)
        case DynamicWriting():
            by_entropy = EntropyWarper(
                greedy_below=generation.greedy_below,
                free_above=generation.free_above,
                temperature=generation.temperature,
                top_k=generation.top_k,
            )
            return [by_entropy]
        case _:
            assert_never(generation)


def _warpers_of_sample(generation: SampleWriting) -> list[LogitsProcessor]:
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
    """The token of each row whose part of the probabilities holds the number drawn, in [0, 1).

    Of shape [B, 1]. The block that holds it is found by the sums of blocks, then the token: a sum
    that runs over the whole vocabulary takes as long as some layers of a small model. Sums are in
    float64: beside a large vocabulary, unlikely tokens would vanish in float32.
    """
    weight_BV = (scores_BV - scores_BV.amax(-1, keepdim=True)).exp_()
    size = scores_BV.shape[-1]
    weight_BNK = pad(weight_BV, (0, -size % BLOCK)).view(len(drawn), -1, BLOCK)
    upto_BN = weight_BNK.sum(-1, dtype=torch.float64).cumsum(-1)
    drawn_B1 = torch.tensor(drawn, dtype=torch.float64).to(scores_BV.device)[:, None]
    place_B1 = _within(drawn_B1 * upto_BN[:, -1:], upto_BN)
    block_B1 = torch.searchsorted(upto_BN, place_B1, right=True)
    before_B1 = pad(upto_BN, (1, 0)).gather(-1, block_B1)
    inside_BK = weight_BNK[torch.arange(len(drawn)), block_B1[:, 0]].double().cumsum(-1)
    place_B1 = _within(place_B1 - before_B1, inside_BK)
    return block_B1 * BLOCK + torch.searchsorted(inside_BK, place_B1, right=True)


def _within(place_B1: Tensor, upto_BK: Tensor) -> Tensor:
    """A place before the end, which rounding may have reached: impossible tokens may follow."""
    return torch.minimum(place_B1, upto_BK[:, -1:].nextafter(torch.zeros_like(place_B1)))


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
class Generator:
    """A model with its tokenizer, and how it writes."""

    model: Any
    tokenizer: Any
    max_new_tokens: int
    generation: Generation
    also_stop_at: tuple[int, ...] = ()

    def encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
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
        look_around()
        longest = max(len(ids) for ids in prompts)
        filler = self.tokenizer.pad_token_id
        input_ids_BT = torch.tensor([[filler] * (longest - len(ids)) + ids for ids in prompts])
        mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
        beams = self.generation.num_beams if isinstance(self.generation, BeamWriting) else 1
        # Quiet: transformers warns that a temperature the model recommends is not used.
        with without_gradients(), silence_libraries():
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
                pad_token_id=filler,
                eos_token_id=self.stop_ids,
                streamer=streamer,
            )
        return [self.read(ids) for ids in output_BT[:, longest:].tolist()]

    def read(self, ids: Sequence[int]) -> Generated:
        """The answer of these tokens, which may go on behind its end."""
        end = next((index for index, token in enumerate(ids) if token in self.stop_ids), None)
        text = self._decode(ids[:end])
        return Generated(
            text.strip(),
            len(ids[:end]),
            stopped=end is not None,
            starts_with_blank=text[:1].isspace(),
            ids=tuple(ids if end is None else ids[: end + 1]),
        )

    def _decode(self, ids: Sequence[int]) -> str:
        """The text without special tokens, but for marks around thinking (Magistral's [THINK])."""
        if self._hidden_ids is None:
            return str(self.tokenizer.decode(ids, skip_special_tokens=True))
        shown = [token for token in ids if token not in self._hidden_ids]
        return str(self.tokenizer.decode(shown, skip_special_tokens=False))

    @cached_property
    def _hidden_ids(self) -> set[int] | None:
        """The special tokens that are no marks around thinking; None if there are no such marks."""
        special = {
            number: str(token)
            for number, token in self.tokenizer.added_tokens_decoder.items()
            if token.special
        }
        hidden = {number for number, text in special.items() if not is_thinking_mark(text)}
        return None if len(hidden) == len(special) else hidden

    @cached_property
    def stop_ids(self) -> list[int]:
        """The ids that end an answer: those of the model's generation config and its template."""
        known = self.model.generation_config.eos_token_id
        ids = [known] if isinstance(known, int) else list(known or [])
        return sorted({*ids, *find_stop_ids(self.tokenizer), *self.also_stop_at})


def without_gradients() -> AbstractContextManager[None]:
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
