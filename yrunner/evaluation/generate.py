"""Let a model answer prompts, many at once."""

# B = prompts of a batch, T = tokens of the longest

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import TextStreamer

from yrunner.evaluation.decoding import Seed, choosers
from yrunner.models.load import find_stop_ids
from yrunner.models.quiet import quiet_libraries
from yrunner.recipe.schema_eval import BeamWriting, Generation, GreedyWriting

Advance = Callable[[int], None]
"""Called with the number of prompts answered since the last call."""


@dataclass(frozen=True)
class Generated:
    """What a model answered to a prompt."""

    text: str
    """Without special tokens and outer blanks."""
    num_tokens: int
    """How many it wrote, without the end mark."""
    stopped: bool
    """False where it was cut off before it came to an end."""
    refused: bool = False
    """True where the prompt left too little room in the model's positions, and was not asked."""
    began_with_blank: bool = False
    """Whether a blank stood before the text."""


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
    """The answer to each prompt, in order. `also_stop_at`: ids that end it, beside the usual ones.

    Prompts are texts as the chat template renders them. They are answered longest first, so that
    a batch holds prompts of like length, and padded on the left, where padding changes nothing.
    With `seed`, the number of a prompt decides what is drawn for it: its place, or that in
    `numbers` for a part of a longer list.
    """
    writer = _Writer(model, tokenizer, max_new_tokens, generation, tuple(also_stop_at))
    encoded = [writer.encode(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: -len(encoded[index]))
    asked = [index for index in order if writer.has_room_for(encoded[index])]
    answers = [REFUSED] * len(prompts)
    advance(len(order) - len(asked))
    was_training = model.training
    model.eval()
    for start in range(0, len(asked), batch_size):
        chosen = asked[start : start + batch_size]
        seeds = [(seed, numbers[index] if numbers else index) for index in chosen]
        written = writer.write([encoded[index] for index in chosen], seeds)
        for index, answer in zip(chosen, written, strict=True):
            answers[index] = answer
        advance(len(chosen))
    model.train(was_training)
    return answers


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
    """The answer to one prompt; `show` is given its pieces as they are written.

    Beams change their beginning until the end, so that their answer comes as one piece.
    """
    writer = _Writer(model.eval(), tokenizer, max_new_tokens, generation)
    ids = writer.encode(prompt)
    if not writer.has_room_for(ids):
        return REFUSED
    if isinstance(generation, BeamWriting):
        (answer,) = writer.write([ids], [(seed, 0)])
        show(answer.text)
        return answer
    (answer,) = writer.write([ids], [(seed, 0)], _Pieces(tokenizer, show))
    return answer


def num_positions(model: Any) -> int:
    """Tokens that the model can see at once; where it sets no limit, more than there are."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


class _Pieces(TextStreamer):
    """Hands on what transformers would print: whole words, and Chinese characters."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._show(text)


@dataclass(frozen=True)
class _Writer:
    """A model, and how it is to write."""

    model: Any
    tokenizer: Any
    max_new_tokens: int
    generation: Generation
    also_stop_at: tuple[int, ...] = ()

    def encode(self, prompt: str) -> list[int]:
        return list(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])

    def has_room_for(self, prompt: Sequence[int]) -> bool:
        """Whether the prompt and the longest answer fit into the model's positions."""
        return len(prompt) + self.max_new_tokens <= num_positions(self.model)

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
        # Quiet: a model that recommends a temperature gets a warning where none is used.
        with torch.inference_mode(), quiet_libraries():
            output_BT = self.model.generate(
                input_ids=input_ids_BT.to(self.model.device),
                attention_mask=mask_BT.to(self.model.device),
                max_new_tokens=self.max_new_tokens,
                # `choosers` leave one token, so that the likeliest is always the right one.
                do_sample=False,
                logits_processor=choosers(self.generation, seeds),
                num_beams=beams,
                repetition_penalty=self.generation.repetition_penalty,
                use_cache=True,
                pad_token_id=pad,
                eos_token_id=self._stop_ids,
                streamer=streamer,
            )
        return [self._read(ids) for ids in output_BT[:, longest:].tolist()]

    def _read(self, ids: list[int]) -> Generated:
        end = next((place for place, token in enumerate(ids) if token in self._stop_ids), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return Generated(
            text.strip(),
            len(ids[:end]),
            stopped=end is not None,
            began_with_blank=text[:1].isspace(),
        )

    @cached_property
    def _stop_ids(self) -> list[int]:
        """The ids that end an answer: those the model was made with, and its template's."""
        known = self.model.generation_config.eos_token_id
        ids = [known] if isinstance(known, int) else list(known or [])
        return sorted({*ids, *find_stop_ids(self.tokenizer), *self.also_stop_at})
