"""Micro-batches of pairs and of rated answers: all their answers in one forward pass.

A row of the plan is a pair or a rated answer, and both sides of a pair share a micro-batch. KTO
also compares each prompt with the answer to another one, which the data decides and not the batch:
so its estimate is the same however an update is cut up.
"""

# Shapes: S = answers of a micro-batch, N = their targets, R = rows, A = answers of a row

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor
from torch.utils.data import Dataset

from yrunner.data.batching.batches import Batch, Batches
from yrunner.data.batching.collate import BatchLayout, collate, one_per_row
from yrunner.data.batching.plan import Plan
from yrunner.data.batching.shared_prompts import Stretch, count_common, inputs_of_stretches
from yrunner.data.batching.token_batches import Slice, SlicedRow
from yrunner.data.conversation import RatedExample, TokenizedExample, TokenizedPair
from yrunner.tokens import IGNORE_INDEX

ComparedRow = TokenizedPair | RatedExample
MODEL_INPUTS = ("input_ids", "labels", "position_ids", "attention_mask")
ANSWERS_OF_A_ROW = 2
"""Both of a pair; or a rated answer, and one to another prompt."""
WORTH_SHARING = 0.1
"""Share of the tokens of a micro-batch from which on a common prompt is computed once; see
`python -m benchmarks.preference --prompt`."""
OTHER = "other_"
"""Beginning of the names of what belongs to the answers to other prompts."""


@dataclass(frozen=True)
class RowAnswers:
    """The answers of one row."""

    own: tuple[TokenizedExample, ...]
    """The better and the worse one of a pair, or one rated answer."""
    is_desirable: bool | None = None
    """The rating; None for a pair."""
    other: TokenizedExample | None = None
    """The prompt with an answer to another one, if requested."""
    reference: tuple[float, ...] = ()
    """Log-probabilities of the reference: of the own answers, then of the other one; empty if they
    are not known beforehand."""


class ComparedRows(Dataset[RowAnswers]):
    """Pairs, or rated answers, each prompt then also with the answer of another row."""

    def __init__(self, rows: Sequence[ComparedRow], *, rated: bool = False) -> None:
        self.rows = rows
        self.rated = rated
        self.reference_RA: Tensor | None = None
        """Log-probabilities of the reference, if they are known beforehand."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, one: Slice) -> RowAnswers:
        number, _ = one
        row = self.rows[number]
        other = self._other(number) if self.rated else None
        known_RA = self.reference_RA
        known = () if known_RA is None else tuple(known_RA[number].tolist())
        if isinstance(row, TokenizedPair):
            return RowAnswers((row.chosen, row.rejected), None, other, known)
        return RowAnswers((row.example,), row.is_desirable, other, known)

    def __getitems__(self, rows: Sequence[SlicedRow]) -> list[RowAnswers]:
        """All rows of a micro-batch, in one call of the data loader."""
        return [self[one] for row in rows for one in row]

    def every_answer(self, numbers: Iterable[int]) -> list[TokenizedExample]:
        """The answers of some rows, in the order of `reference_RA`, row by row."""
        found = (self[number, 0] for number in numbers)
        return [answer for row in found for answer in (*row.own, row.other) if answer is not None]

    def _other(self, number: int) -> TokenizedExample:
        """A prompt with the answer of its partner; never longer than the longest row."""
        partners, longest = self._partners
        own, partner = self._example(number), self._example(partners[number])
        prompt, answer = _prompt_length(own), _prompt_length(partner)
        ids = own.input_ids[:prompt] + partner.input_ids[answer:]
        labels = [IGNORE_INDEX] * prompt + partner.labels[answer:]
        return TokenizedExample(ids[:longest], labels[:longest], own.origin)

    def _example(self, number: int) -> TokenizedExample:
        row = self.rows[number]
        return row.chosen if isinstance(row, TokenizedPair) else row.example

    @cached_property
    def _partners(self) -> tuple[list[int], int]:
        """The partner of each row, and the length of the longest."""
        prompts, longest = [], 0
        for number in range(len(self)):
            example = self._example(number)
            longest = max(longest, len(example.input_ids))
            prompts.append(hash(tuple(example.input_ids[: _prompt_length(example)])))
        return partners_of(prompts), longest


def partners_of(prompts: Sequence[int]) -> list[int]:
    """For each row the last one before it with another prompt; the last row precedes the first."""
    others = (row for row in range(len(prompts) - 1, 0, -1) if prompts[row] != prompts[0])
    last = next(others, None)
    if last is None:
        # Where all prompts are equal, any other answer serves.
        return [(row - 1) % len(prompts) for row in range(len(prompts))]
    partners = [last]
    for row in range(1, len(prompts)):
        is_same = prompts[row] == prompts[row - 1]
        partners.append(partners[-1] if is_same else row - 1)
    return partners


def _prompt_length(example: TokenizedExample) -> int:
    """Tokens before the first target."""
    return example.target_positions[0]


class AnswerBatches(Batches):
    """The micro-batches of `ComparedRows`."""

    def __init__(
        self,
        plan: Plan,
        train: ComparedRows,
        validation: ComparedRows,
        pad_token_id: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        """See `Batches`."""
        super().__init__(plan, (), (), pad_token_id, rank, num_ranks)
        self.train, self.validation = train, validation
        self.shares_prompts = False
        """Whether the answers of a pair follow one prompt where that pays: never for rated ones."""
        self.masked_layout: BatchLayout = one_per_row
        """For answers behind one prompt, which need a mask."""

    def collate(self, examples: Sequence[RowAnswers]) -> Batch:
        """By the layout of this moment."""
        shares_prompts = self.shares_prompts and sharing_pays(examples)
        return collate_answers(
            examples,
            self.pad_token_id,
            self.masked_layout if shares_prompts else self.layout,
            rated=self.train.rated,
            known=self.train.reference_RA is not None,
            shares_prompts=shares_prompts,
        )

    def examples_of(self, examples: Sequence[RowAnswers]) -> list[TokenizedExample]:
        """Every answer of some rows."""
        return [answer for row in examples for answer in row.own]


def sharing_pays(rows: Sequence[RowAnswers]) -> bool:
    """Whether enough tokens are saved if the answers of each row follow one prompt."""
    saved = sum(count_common(row.own) for row in rows)
    whole = sum(len(answer.input_ids) for row in rows for answer in row.own)
    return saved > 0 and saved >= WORTH_SHARING * whole


def collate_answers(
    rows: Sequence[RowAnswers],
    pad_token_id: int,
    layout: BatchLayout,
    *,
    rated: bool,
    known: bool,
    shares_prompts: bool = False,
) -> Batch:
    """What `collate` makes of all answers, and which answer each target belongs to (`answer_N`).

    The answers of a pair are neighbours, the better one first. `known`: with `reference_S`, their
    log-probability under the reference. `rated`: with `is_desirable_S`, and the same tensors for
    the answers to other prompts, whose names begin with `other_`. `shares_prompts`: see
    shared_prompts.py.
    """
    answers = [answer for row in rows for answer in row.own]
    together = 2 if shares_prompts else 1
    batch = collate_with_owners(answers, pad_token_id, layout, together=together)
    if known:
        batch["reference_S"] = _float64(row.reference[: len(row.own)] for row in rows)
    if not rated:
        return batch
    batch["is_desirable_S"] = torch.tensor(
        [bool(row.is_desirable) for row in rows], dtype=torch.bool
    )
    others = [row.other for row in rows if row.other is not None]
    more = collate_with_owners(others, pad_token_id, layout)
    if known:
        more["reference_S"] = _float64(row.reference[len(row.own) :] for row in rows)
    return batch | {OTHER + name: tensor for name, tensor in more.items()}


def model_inputs(batch: Mapping[str, Tensor], prefix: str = "") -> Batch:
    """What the model reads of a micro-batch; `prefix` OTHER: of the answers to other prompts."""
    names = [name for name in MODEL_INPUTS if prefix + name in batch]
    return {name: batch[prefix + name] for name in names}


def collate_with_owners(
    examples: Sequence[TokenizedExample],
    pad: int,
    layout: BatchLayout = one_per_row,
    *,
    together: int = 1,
) -> Batch:
    """What `collate` makes of some answers, and where each of them is.

    `answer_N`: the answer that each target belongs to. `num_targets_S`: targets of each. `last_S`:
    the place of its last token that is no padding, among all tokens of the batch, row by row.
    `together`: the number of adjacent answers that share a prompt.
    """
    groups = [examples[start : start + together] for start in range(0, len(examples), together)]
    stretches = [Stretch.of(group) for group in groups]
    batch = collate([stretch.example for stretch in stretches], pad, layout)
    rows = layout([len(each.branches) for each in stretches]) if stretches else []
    if together > 1 and rows:
        batch |= inputs_of_stretches(stretches, rows)
    counts_S = torch.tensor([len(each.target_positions) for each in examples], dtype=torch.long)
    last_S = torch.zeros_like(counts_S)
    in_order: list[int] = []
    for number, row in enumerate(rows):
        start = number * batch["input_ids"].shape[1]
        for group in row:
            for place, answer in enumerate(groups[group]):
                at = group * together + place
                # Targets come row by row, as the layout has placed their answers.
                in_order.append(at)
                shift = start + stretches[group].shift_of(place)
                last_S[at] = shift + _last_place(answer.input_ids, pad)
            start += len(stretches[group].branches)
    places_S = torch.tensor(in_order, dtype=torch.long)
    batch["answer_N"] = places_S.repeat_interleave(counts_S[places_S])
    batch["num_targets_S"] = counts_S
    batch["last_S"] = last_S
    return batch


def _last_place(ids: Sequence[int], pad: int) -> int:
    """Of the last token that is no padding: pad tokens may end an answer, as classifiers see it."""
    places = range(len(ids) - 1, -1, -1)
    return next((place for place in places if ids[place] != pad), len(ids) - 1)


def _float64(values: Iterable[Sequence[float]]) -> Tensor:
    return torch.tensor([*chain.from_iterable(values)], dtype=torch.float64)
