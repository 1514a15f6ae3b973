"""Write Ollama's Modelfile: chat template, stop tokens, generation settings.

Ollama does not run the tokenizer's chat template. So what the template puts around every turn is
read from it, rewritten in Ollama's template language, and compared with the original.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from transformers import GenerationConfig

from yrunner.models.gguf.tokenizer import begins_with_bos
from yrunner.models.load import find_stop_ids
from yrunner.tokens import TEMPLATE_ERRORS

MARKS = tuple(chr(0xF0000 + number) for number in range(4))
"""Placeholders for messages, from Unicode's private use area."""
USER = {"role": "user", "content": MARKS[0]}

SETTINGS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""Ollama's names for settings of a generation config."""

TRIAL_CHATS = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)
TRIAL_TEXTS = ("灯塔归谁管？", "Who keeps it?\nSay it in two lines.", "归市政厅管。", "1 + 1 = 2")


@dataclass(frozen=True)
class TurnTexts:
    """The text around the turns of a chat."""

    start: str
    """Before a first user turn: the template's default system prompt, or nothing."""
    around: dict[str, tuple[str, str]]
    """Before and after a turn, by role."""
    opening: str
    """Before the reply to generate."""

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The text of a chat that ends with a user turn."""
        text = self.start if messages[0]["role"] != "system" else ""
        for message in messages:
            before, after = self.around[message["role"]]
            text += before + message["content"] + after
        return text + self.opening

    def as_ollama(self) -> str | None:
        """As an Ollama template; None if a text contains signs of that language."""
        texts = [
            self.start,
            self.opening,
            *(text for pair in self.around.values() for text in pair),
        ]
        if any(sign in text for text in texts for sign in ("{{", "}}", '"""')):
            return None
        turns = ""
        for number, (role, (before, after)) in enumerate(self.around.items()):
            case = "if" if number == 0 else "else if"
            turns += f'{{{{ {case} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
        first = ""
        if self.start:
            first = f'{{{{ if eq $i 0 }}}}{{{{ if ne .Role "system" }}}}{self.start}'
            first += "{{ end }}{{ end }}"
        begin, end = "{{ range $i, $_ := .Messages }}", "{{ end }}{{ end }}"
        return f"{begin}{first}{turns}{end}{self.opening}"


def modelfile(
    file_name: str, tokenizer: Any, generation_config: GenerationConfig, system: str | None
) -> tuple[str, str]:
    """The Modelfile for a GGUF file in the same folder, and what it lacks, if anything."""
    lines, lack = [f"FROM ./{file_name}"], ""
    texts = read_turns(tokenizer)
    template = texts.as_ollama() if texts else None
    if texts is None or template is None:
        lack = "the chat template, which Ollama's template language cannot express"
    else:
        lines.append(f'TEMPLATE """{template}"""')
        if "system" not in texts.around:
            lack = "a system prompt, because the chat template has no system turn"
        elif system:
            lines.append(f'SYSTEM """{system}"""')
    for number in find_stop_ids(tokenizer):
        lines.append(f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(number)}"')
    for key, name in SETTINGS.items():
        value = getattr(generation_config, key, None)
        if value is not None:
            lines.append(f"PARAMETER {name} {value}")
    return "\n".join(lines) + "\n", lack


def read_turns(tokenizer: Any) -> TurnTexts | None:
    """The text that the tokenizer's chat template puts around every turn.

    Without a system turn if the template has none. None if the template does more than that: trial
    chats are rendered both ways and compared.
    """
    if not tokenizer.chat_template:
        return None
    for with_system in (True, False):
        trials = [_trial(roles) for roles in TRIAL_CHATS if with_system or "system" not in roles]
        try:
            texts = _read(tokenizer, with_system=with_system)
            if all(texts.render(chat) == _render(tokenizer, chat) for chat in trials):
                return texts
        except TEMPLATE_ERRORS:
            continue
    return None


def _read(tokenizer: Any, *, with_system: bool) -> TurnTexts:
    """Raises ValueError if the template does not show every message once and in order."""
    talk = ("system", "user", "assistant", "user")[0 if with_system else 1 :]
    chat = [{"role": role, "content": mark} for role, mark in zip(talk, MARKS, strict=False)]
    pieces = _split(_render(tokenizer, chat), MARKS[: len(chat)])
    after_user, after_reply, end = pieces[-3:]
    alone, end_alone = _split(_render(tokenizer, [USER]), MARKS[:1])
    if end != end_alone:
        raise ValueError("the end depends on the turns before")
    after_system = pieces[1] if with_system else after_reply
    before_user = _common_end(_common_end(after_system, after_reply), alone)
    _, closed = _split(_render(tokenizer, [USER], opens=False), MARKS[:1])
    after_one = _common_start(_common_start(after_user, end), closed)
    system = {"system": (pieces[0], after_system.removesuffix(before_user))}
    return TurnTexts(
        start=alone.removesuffix(before_user),
        around=(system if with_system else {})
        | {
            "user": (before_user, after_one),
            "assistant": (
                after_user.removeprefix(after_one),
                after_reply.removesuffix(before_user),
            ),
        },
        opening=end.removeprefix(after_one),
    )


def _trial(roles: tuple[str, ...]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": TRIAL_TEXTS[place % len(TRIAL_TEXTS)]}
        for place, role in enumerate(roles)
    ]


def _render(tokenizer: Any, chat: list[dict[str, str]], *, opens: bool = True) -> str:
    """The text of a chat, without the bos if llama.cpp adds it."""
    text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=opens))
    return text.removeprefix(tokenizer.bos_token) if begins_with_bos(tokenizer) else text


def _split(text: str, marks: Sequence[str]) -> list[str]:
    """The pieces between the marks."""
    pieces = []
    for mark in marks:
        piece, found, text = text.partition(mark)
        if not found:
            raise ValueError("the template hides a message or moves it")
        pieces.append(piece)
    return [*pieces, text]


def _common_start(one: str, other: str) -> str:
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(letter for letter, _ in pairs)


def _common_end(one: str, other: str) -> str:
    return _common_start(one[::-1], other[::-1])[::-1]
