"""The Modelfile of Ollama: its own template for chats, the words that end a reply, the settings.

Ollama does not run the chat template of a tokenizer, so what the template puts around every turn is
read off it here, put together anew in Ollama's language, and compared with the template.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError
from transformers import GenerationConfig

from yrunner.models.export.gguf import begins_with_bos
from yrunner.models.load import find_stop_ids

MARKS = tuple(chr(0xF0000 + number) for number in range(4))
"""Stand for what is said; Unicode gives these characters no meaning."""
USER = {"role": "user", "content": MARKS[0]}

SETTINGS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""Ollama's names for the settings of a generation config."""

TRIAL_CHATS = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)
TRIAL_TEXTS = ("灯塔归谁管？", "Who keeps it?\nSay it in two lines.", "归市政厅管。", "1 + 1 = 2")


@dataclass(frozen=True)
class TurnTexts:
    """What stands around the turns of a chat."""

    start: str
    """Before a first turn of the user: a system prompt of the template's own, or nothing."""
    around: dict[str, tuple[str, str]]
    """Before and behind a turn, by who speaks."""
    opening: str
    """Before the reply that is to come."""

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The text of a chat whose last turn is the user's."""
        text = self.start if messages[0]["role"] != "system" else ""
        for message in messages:
            before, behind = self.around[message["role"]]
            text += before + message["content"] + behind
        return text + self.opening

    def as_ollama(self) -> str | None:
        """The same as a template of Ollama; None where the texts hold signs of that language."""
        texts = [
            self.start,
            self.opening,
            *(text for pair in self.around.values() for text in pair),
        ]
        if any(sign in text for text in texts for sign in ("{{", "}}", '"""')):
            return None
        turns = ""
        for number, (role, (before, behind)) in enumerate(self.around.items()):
            case = "if" if number == 0 else "else if"
            turns += f'{{{{ {case} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{behind}'
        first = ""
        if self.start:
            first = f'{{{{ if eq $i 0 }}}}{{{{ if ne .Role "system" }}}}{self.start}'
            first += "{{ end }}{{ end }}"
        begin, end = "{{ range $i, $_ := .Messages }}", "{{ end }}{{ end }}"
        return f"{begin}{first}{turns}{end}{self.opening}"


def modelfile(
    file_name: str, tokenizer: Any, generation_config: GenerationConfig, system: str | None
) -> tuple[str, str]:
    """The Modelfile of a GGUF file beside it, and what it lacks, or nothing."""
    lines, lack = [f"FROM ./{file_name}"], ""
    texts = read_turns(tokenizer)
    template = texts.as_ollama() if texts else None
    if texts is None or template is None:
        lack = "the chat template, which does more than Ollama's can"
    else:
        lines.append(f'TEMPLATE """{template}"""')
        if "system" not in texts.around:
            lack = "a system prompt, for which the chat template has no turn"
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
    """What the tokenizer's chat template puts around every turn.

    Without turns of a system, where the template has none of its own for them. None where it does
    more than that: where chats that are put together so are not the template's.
    """
    if not tokenizer.chat_template:
        return None
    for with_system in (True, False):
        trials = [_trial(roles) for roles in TRIAL_CHATS if with_system or "system" not in roles]
        try:
            texts = _read(tokenizer, with_system=with_system)
            if all(texts.render(chat) == _render(tokenizer, chat) for chat in trials):
                return texts
        except (TemplateError, ValueError):
            continue
    return None


def _read(tokenizer: Any, *, with_system: bool) -> TurnTexts:
    """Raises ValueError for a template that does not show every message once and in order."""
    talk = ("system", "user", "assistant", "user")[0 if with_system else 1 :]
    chat = [{"role": role, "content": mark} for role, mark in zip(talk, MARKS, strict=False)]
    pieces = _split(_render(tokenizer, chat), MARKS[: len(chat)])
    behind_user, behind_reply, end = pieces[-3:]
    alone, end_alone = _split(_render(tokenizer, [USER]), MARKS[:1])
    if end != end_alone:
        raise ValueError("the end depends on the turns before")
    behind_system = pieces[1] if with_system else behind_reply
    before_user = _common_end(_common_end(behind_system, behind_reply), alone)
    _, closed = _split(_render(tokenizer, [USER], opens=False), MARKS[:1])
    behind_one = _common_start(_common_start(behind_user, end), closed)
    system = {"system": (pieces[0], behind_system.removesuffix(before_user))}
    return TurnTexts(
        start=alone.removesuffix(before_user),
        around=(system if with_system else {})
        | {
            "user": (before_user, behind_one),
            "assistant": (
                behind_user.removeprefix(behind_one),
                behind_reply.removesuffix(before_user),
            ),
        },
        opening=end.removeprefix(behind_one),
    )


def _trial(roles: tuple[str, ...]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": TRIAL_TEXTS[place % len(TRIAL_TEXTS)]}
        for place, role in enumerate(roles)
    ]


def _render(tokenizer: Any, chat: list[dict[str, str]], *, opens: bool = True) -> str:
    """The text of a chat without the bos, where llama.cpp puts it before every text by itself."""
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
