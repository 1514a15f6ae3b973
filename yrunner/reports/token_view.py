"""Examples on a terminal, token by token: context and targets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, groupby, islice
from typing import Any

from rich.text import Text

from yrunner.console import printable
from yrunner.data.conversation import TokenizedExample
from yrunner.errors import Origin
from yrunner.reports.token_text import LINE_END, TokenText, visible
from yrunner.tokens import IGNORE_INDEX

CONTEXT = "dim"
SPECIAL_CONTEXT = "magenta"
TARGETS = ("bold green", "bold cyan")
"""Token batches alternate between these."""
WORSE = "bold red"
"""Targets of the worse answer of a pair, or of one marked as bad."""
SPECIAL = " reverse"
"""Added to the style of a target that is a special token."""
BATCH_NUMBER = "yellow"
NAME = "bold"
WARNING = "yellow"

OPENED, CLOSED = "⟦", "⟧"
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class TokenView:
    """How the examples of a tokenizer are shown."""

    tokenizer: Any
    token_batch: int = 0
    """Targets per token batch; 0 without token batches."""
    coloured: bool = True
    """False: brackets around the targets instead of colours."""
    targets: tuple[str, ...] = TARGETS
    """The style of the targets of each token batch, in turn."""

    def legend(self, *, has_worse: bool = False) -> Text:
        """The meaning of the colours and signs, in one line; `has_worse`: of two answers."""
        parts = [Text("context", CONTEXT)]
        if self.coloured:
            parts.append(Text("better answer" if has_worse else "learned", TARGETS[0]))
            parts += [Text("worse answer", WORSE)] * has_worse
            parts.append(Text("<special>", SPECIAL_CONTEXT))
            parts.append(Text("<special, learned>", TARGETS[0] + SPECIAL))
        else:
            parts.append(Text(f"{OPENED}{'answer' if has_worse else 'learned'}{CLOSED}"))
        if self.token_batch:
            parts.append(Text.assemble((_superscript(1), BATCH_NUMBER), " token batch"))
        parts.append(Text(f"{LINE_END} line end"))
        return Text("   ").join(parts)

    def example(
        self,
        example: TokenizedExample,
        num_cut: int = 0,
        *,
        mark: str = "",
        is_worse: bool = False,
        num_hidden: int = 0,
    ) -> Text:
        """A headline, then the tokens as text; `num_cut` more tokens were cut off.

        `mark`: what the answer is, such as `rejected`; `is_worse`: whether its targets get the
        colour of a worse one; `num_hidden`: tokens of a prompt that was shown before.
        """
        text = _headline(example.origin, _sizes([example]), mark)
        if self.token_batch:
            num_batches = -(-len(example.target_positions) // self.token_batch)
            noun = "batch" if num_batches == 1 else "batches"
            text.append(f" in {num_batches:,} token {noun} of {self.token_batch:,}")
        if num_hidden:
            text.append(f"\n… the same prompt of {_number(num_hidden, 'token')}", CONTEXT)
        view = replace(self, targets=(WORSE,)) if is_worse else self
        text.append("\n").append_text(view.tokens(example, num_hidden))
        if num_cut:
            text.append(f"\n✂ {_number(num_cut, 'token')} cut off", WARNING)
        return text

    def left_out(self, origin: Origin, reason: str) -> Text:
        """The headline of a row that is not trained on."""
        return _headline(origin, Text(f"not trained on: {printable(reason)}", WARNING))

    def packed_row(self, number: int, examples: Sequence[TokenizedExample], room: int) -> Text:
        """The headline of a packed row with a capacity of `room` tokens."""
        text = Text.assemble((f"━━ packed row {number:,}", NAME), " · ")
        return text.append(
            f"{_number(len(examples), 'example')}, {_sizes(examples)}, room for {room:,}"
        )

    def tokens(self, example: TokenizedExample, first: int = 0) -> Text:
        """The tokens from `first` on as one styled text, with control characters made visible.

        Tokens of one style are decoded together: a character may consist of several.
        """
        text = Text()
        num_begun = 0
        before: list[int] = example.input_ids[:first][-1:]
        batches = _batches(example.labels, self.token_batch)
        labelled = islice(zip(example.input_ids, batches, strict=True), first, None)
        for batch, tokens in groupby(labelled, key=lambda token: token[1]):
            ids = [id_ for id_, _ in tokens]
            stretch = self._stretch(ids, before, batch)
            if batch is not None:
                is_first = batch == num_begun
                num_begun = batch + 1
                stretch = self._signed(stretch, batch if is_first and self.token_batch else None)
            text.append_text(stretch)
            before = ids[-1:]
        if text.plain.endswith("\n"):
            text.right_crop()
        return text

    def _stretch(self, ids: list[int], before: list[int], batch: int | None) -> Text:
        """Adjacent tokens of one token batch, or of context."""
        text = Text()
        for is_special, tokens in groupby(ids, key=self._text.special_ids.__contains__):
            run = list(tokens)
            shown = self._text.names(run) if is_special else self._text.decode(run, before)
            text.append(visible(shown), self._style(batch, is_special))
            before = run[-1:]
        return text

    def _signed(self, stretch: Text, batch: int | None) -> Text:
        """The targets after the number of their batch, in brackets where colours are off."""
        sign = Text()
        if batch is not None:
            sign.append(_superscript(batch + 1), BATCH_NUMBER)
        if self.coloured:
            return sign.append_text(stretch)
        # Close the bracket on its own line, before the line end.
        ends_line = stretch.plain.endswith("\n")
        if ends_line:
            stretch.right_crop()
        return Text.assemble(OPENED, sign, stretch, CLOSED, "\n" if ends_line else "")

    def _style(self, batch: int | None, is_special: bool) -> str:
        if batch is None:
            return SPECIAL_CONTEXT if is_special else CONTEXT
        return self.targets[batch % len(self.targets)] + (SPECIAL if is_special else "")

    @cached_property
    def _text(self) -> TokenText:
        return TokenText(self.tokenizer)


def _batches(labels: Sequence[int], token_batch: int) -> Iterator[int | None]:
    """The token batch of each token, from 0; always 0 without token batches; None for context."""
    targets = count()
    for label in labels:
        if label == IGNORE_INDEX:
            yield None
        else:
            yield next(targets) // token_batch if token_batch else 0


def _superscript(number: int) -> str:
    return str(number).translate(SUPERSCRIPTS)


def _headline(origin: Origin, what: str | Text, mark: str = "") -> Text:
    place = printable(f"{origin.file.name} row {origin.row:,}")
    named = Text.assemble(" · ", (mark, NAME)) if mark else Text()
    return Text.assemble(("── ", CONTEXT), (place, NAME), named, " · ", what)


def _sizes(examples: Sequence[TokenizedExample]) -> str:
    num_tokens = sum(len(example.input_ids) for example in examples)
    num_targets = sum(len(example.target_positions) for example in examples)
    share = f"{num_targets / max(1, num_tokens):.0%}".replace("%", " %")
    return f"{_number(num_tokens, 'token')}, {_number(num_targets, 'target')} ({share})"


def _number(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number:,} {noun}s"
