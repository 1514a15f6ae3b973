"""Stand-in tokenizers and chat templates with the structure of the well-known ones."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, processors

from yrunner.data.chat.tokenize import prompt_of
from yrunner.data.conversation import Conversation, Message, TokenizedExample
from yrunner.errors import Origin
from yrunner.models.scratch import train_tokenizer
from yrunner.tokens import IGNORE_INDEX

ASSETS = Path(__file__).parent / "assets"
TEXTS = [
    "第十二条 雾港的灯塔由市政厅管理。\n\nThe lighthouse of Fog Harbour  is kept by the town hall.",
    "assistant\n\n\n问：灯塔归谁管？\n答：归市政厅管。 Who keeps it? user\n [[1]] system model",
] * 4
SPECIAL_TOKENS = {
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": ["[INST]", "[/INST]", "</s>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "harmony": ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"],
    "deepseek": [
        "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>",
        "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>",
        "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
    ],
    "glm": ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"],
    "phi": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "phi_marked": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "gpt_oss": ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>"],
    "header_marked": ["<|start|>", "<|message|>", "<|end|>", "<|return|>"],
    "gemma4": [
        "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>",
        "<tool_call|>", "<|tool_response>", "<tool_response|>",
    ],
    "tool_plan": [
        "<|SYSTEM|>", "<|USER|>", "<|CHATBOT|>", "<|TOOL|>", "<|END|>", "<|THINK|>", "<|/THINK|>",
        "<|ACTION|>", "<|/ACTION|>",
    ],
}  # fmt: skip
HAND_WRITTEN_ENDS = {
    "llama3": ["<|eot_id|>"], "gemma": ["<end_of_turn>"], "phi": ["<|end|>"],
    "harmony": ["<|end|>", "<|return|>"], "deepseek": ["<｜end▁of▁sentence｜>"],
    "glm": ["<|user|>", "<|observation|>"],
}  # fmt: skip
EOS_TOKENS = {
    "mistral": "</s>",
    "glm": "<|endoftext|>",
    "phi": "<|endoftext|>",
    "phi_marked": "<|endoftext|>",
}
KNOWS_SYSTEM = [
    "scratch", "chatml", "marked", "qwen25", "qwen3", "thinking_only", "minimind",
    "llama3", "deepseek", "glm", "phi",
]  # fmt: skip
TEMPLATES = [*KNOWS_SYSTEM, "harmony", "mistral", "gemma"]
"""`scratch` is the template that new models get."""


@cache
def tokenizer_of(template: str) -> Any:
    tokenizer: Any = train_tokenizer(TEXTS, vocab_size=400)
    if template == "scratch":
        return tokenizer
    special = [
        # Phi's special tokens take the line end behind them with them.
        AddedToken(text, special=True, rstrip=template.startswith("phi"))
        for text in SPECIAL_TOKENS.get(template, [])
    ]
    tokenizer.add_tokens([AddedToken("<s>", special=True), *special], special_tokens=True)
    tokenizer.bos_token = "<s>"
    tokenizer.eos_token = EOS_TOKENS.get(template, "<|im_end|>")
    if template in ("qwen3", "thinking_only", "minimind", "glm", "deepseek"):
        tokenizer.add_tokens(["<think>", "</think>"])
    if template == "llama3":
        # Llama 3's tokenizer leaves the blanks before words out of its offsets.
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.chat_template = (ASSETS / "templates" / f"{template}.jinja").read_text("utf-8")
    return tokenizer


def without_ends(template: str, talk: Conversation) -> tuple[Message, ...]:
    """The messages without end marks written by hand behind replies, one after the other."""
    tokenizer = tokenizer_of(template)
    ends = {*HAND_WRITTEN_ENDS.get(template, []), tokenizer.eos_token, "<|endoftext|>"}
    if "</s>" in tokenizer.all_special_tokens or template == "mistral":
        ends.add("</s>")
    messages = []
    for message in talk.messages:
        reply = message.content
        while any(reply.rstrip().endswith(end) for end in ends):
            end = next(end for end in ends if reply.rstrip().endswith(end))
            reply = reply.rstrip().removesuffix(end)
        keeps = message.role != "assistant" or not reply.strip()
        messages.append(message if keeps else replace(message, content=reply))
    return tuple(messages)


def shown_text(template: str, messages: Sequence[Message]) -> str:
    """The whole rendering; GLM's lacks an end."""
    text = tokenizer_of(template).apply_chat_template(
        [{"role": it.role, "content": it.content} for it in messages], tokenize=False
    )
    return text + ("<|endoftext|>" if template == "glm" else "")


def shown_replies(template: str, messages: Sequence[Message]) -> list[str]:
    """What the model has to write in each of its turns, spelled out template by template."""
    replies = [message.content for message in messages if message.role == "assistant"]
    show = THINKING_TEMPLATES.get(template)
    if show:
        last = len(replies) - 1
        return [show(reply, number == last) for number, reply in enumerate(replies)]
    ends = {"mistral": "</s>", "gemma": "<end_of_turn>", "llama3": "<|eot_id|>", "phi": "<|end|>"}
    if template in ("llama3", "gemma", "mistral"):
        replies = [reply.strip() for reply in replies]
    before = " " if template == "mistral" else ""
    return [f"{before}{reply}{ends.get(template, '<|im_end|>')}" for reply in replies]


def _harmony(reply: str, is_last: bool) -> str:
    return f"<|channel|>final<|message|>{reply}{'<|return|>' if is_last else '<|end|>'}"


def _qwen3(reply: str, is_last: bool) -> str:
    thinking, answer = split_thinking(reply)
    if is_last:
        answer = answer.lstrip(NEWLINE)
        return f"<think>\n{thinking}\n</think>\n\n{answer}<|im_end|>"
    return f"{answer}<|im_end|>"


def _thinking_only(reply: str, is_last: bool) -> str:
    thinking, answer = split_thinking(reply)
    answer = answer.lstrip(NEWLINE)
    return f"{thinking}\n</think>\n\n{answer}<|im_end|>" if is_last else f"{answer}<|im_end|>"


def _minimind(reply: str, is_last: bool) -> str:
    thinking, answer = split_thinking(reply)
    shown = f"{answer.lstrip(NEWLINE)}<|im_end|>"
    return f"{thinking}\n</think>\n\n{shown}" if thinking else shown


def _deepseek(reply: str, is_last: bool) -> str:
    # The prompt ends with the opening of the thinking, also where a reply begins with it.
    answer = reply.split("</think>")[-1].removeprefix("<think>\n")
    return f"{answer}<｜end▁of▁sentence｜>"


def _glm(reply: str, is_last: bool) -> str:
    thinking, answer = split_thinking(reply)
    shown = f"\n<think>{thinking.strip() if is_last else ''}</think>"
    if answer.strip():
        shown += f"\n{answer.strip()}"
    return shown + ("<|endoftext|>" if is_last else "<|user|>")


THINKING_TEMPLATES = {
    "harmony": _harmony,
    "qwen3": _qwen3,
    "thinking_only": _thinking_only,
    "minimind": _minimind,
    "deepseek": _deepseek,
    "glm": _glm,
}


NEWLINE = "\n"


def split_thinking(reply: str) -> tuple[str, str]:
    if "</think>" not in reply:
        return "", reply
    parts = reply.split("</think>")
    return parts[0].split("<think>")[-1].strip("\n"), parts[-1].lstrip("\n")


def conversation(*contents: str, system: str | None = None, row: int = 1) -> Conversation:
    """User and assistant by turns."""
    roles = ("user", "assistant")
    turns = [Message(roles[turn % 2], content) for turn, content in enumerate(contents)]
    opening = [] if system is None else [Message("system", system)]
    return Conversation((*opening, *turns), Origin(Path("talks.jsonl"), row))


def ids_of_prompt(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    prompt = prompt_of(messages, tokenizer)
    if isinstance(prompt, str):
        return list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return list(prompt)


def decoded_targets(example: TokenizedExample, tokenizer: Any) -> str:
    return tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])


def example_of(num_context: int, num_targets: int) -> TokenizedExample:
    """Context, then targets, then one token of the template; every id is another."""
    ids = list(range(1, num_context + num_targets + 2))
    labels = [
        id_ if num_context < id_ <= num_context + num_targets else IGNORE_INDEX for id_ in ids
    ]
    return TokenizedExample(ids, labels, Origin(Path("numbers.jsonl"), num_targets))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tokenizer_of("scratch")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """Write a file of this name and content; return its path."""

    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file
