"""The chat template of a recipe: the tokenizer's own, a file or a known one, and its arguments.

Arguments become defaults at the top of the template itself. So whatever renders it (training,
evaluation, `transformers serve`, vLLM, llama.cpp) writes the same prompt, and the folder of a model
records them; a caller may still pass another value.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError, nodes
from jinja2.meta import find_undeclared_variables
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from yrunner.errors import ModelError
from yrunner.recipe.schema.model import KNOWN_TEMPLATES
from yrunner.text_files import read_text
from yrunner.tokens import TEMPLATE_ERRORS

FROM_ROWS = {"messages", "tools", "documents", "add_generation_prompt"}
"""Names that a template reads, and that no recipe sets."""


@dataclass(frozen=True)
class Marks:
    """The control tokens that a known template writes."""

    needed: tuple[str, ...] = ()
    """Without them as single tokens the structure is lost."""
    may_be_split: tuple[str, ...] = ()
    """Some families write them as plain text."""


MARKS = {
    "chatml": Marks(("<|im_start|>", "<|im_end|>")),
    "llama3": Marks(("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "qwen3": Marks(("<|im_start|>", "<|im_end|>"), ("<think>", "</think>")),
    "gemma": Marks(("<start_of_turn>", "<end_of_turn>")),
    "mistral": Marks((), ("[INST]", "[/INST]")),
    "deepseek": Marks(("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")),
    "glm4": Marks(("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>")),
    "phi4": Marks(("<|im_start|>", "<|im_sep|>", "<|im_end|>")),
}


def choose_template(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | Path | None = None,
    template_args: Mapping[str, Any] | None = None,
    *,
    strict: bool = True,
) -> None:
    """Give the tokenizer the template of a recipe: a known name or a .jinja file, and arguments.

    `strict`: raise `ModelError` for an argument that the template never reads; else leave it out.
    """
    if chat_template in KNOWN_TEMPLATES:
        set_known_template(tokenizer, str(chat_template))
    elif chat_template is not None:
        set_chat_template(tokenizer, Path(chat_template))
    if template_args:
        set_template_args(tokenizer, template_args, strict=strict)


def known_template(name: str) -> str:
    """The text of a known template."""
    return files("yrunner.models.templates").joinpath(f"{name}.jinja").read_text("utf-8")


def set_known_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Replace the tokenizer's template by a known one.

    Raises `ModelError` if the vocabulary lacks its control tokens: the model would read them as
    several pieces of text, and have no end of a turn.
    """
    lacking = _lacking(tokenizer, MARKS[name].needed)
    if name == "mistral" and not tokenizer.eos_token:
        lacking = ["an eos token"]
    if lacking:
        fitting = [
            other
            for other, marks in MARKS.items()
            if marks.needed and not _lacking(tokenizer, marks.needed)
        ]
        raise ModelError(
            f"model.chat_template {name} needs {', '.join(lacking)}, which the base's tokenizer "
            "has not",
            remedy=f"use {' or '.join(fitting)}, whose control tokens it has"
            if fitting
            else "write a .jinja file with tokens that it has, and its eos token behind each reply",
        )
    tokenizer.chat_template = known_template(name)


def split_marks(tokenizer: PreTrainedTokenizerBase, name: str | Path | None) -> list[str]:
    """The control tokens of a known template that the tokenizer splits into pieces of text."""
    marks = MARKS.get(str(name))
    return [] if marks is None else _lacking(tokenizer, marks.may_be_split)


def _lacking(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[str]:
    # A word of the vocabulary that is no added token may still be split by the merges before it.
    return [
        token
        for token in tokens
        if len(tokenizer(token, add_special_tokens=False)["input_ids"]) != 1
        or token not in tokenizer.get_vocab()
    ]


def set_chat_template(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Replace the tokenizer's template. Raises `YRunnerError` if the file is not a valid one."""
    tokenizer.chat_template = read_text(path)
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ModelError(
            f"{path}:{error.lineno}: {error.message}", remedy="correct the template"
        ) from error
    except TEMPLATE_ERRORS:
        return  # it may reject a lone user turn and still suit the conversations


def set_template_args(
    tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any], *, strict: bool = True
) -> None:
    """Make the arguments defaults of the tokenizer's template, or of each of its templates.

    Raises `ModelError` for an argument that none of them reads, unless not `strict`.
    """
    template = tokenizer.chat_template
    if not template:
        if strict:
            raise ModelError(
                "model.template_args needs a chat template, and the tokenizer has none",
                remedy="set model.chat_template, or remove model.template_args",
            )
        return
    templates = template if isinstance(template, dict) else {"default": template}
    read = {name: arguments_read_by(text, tokenizer) for name, text in templates.items()}
    known = sorted({name for names in read.values() for name in names})
    if strict:
        for argument in arguments:
            if argument not in known:
                raise _never_read(argument, known)
    changed = {
        name: _with_defaults(text, {key: arguments[key] for key in arguments if key in read[name]})
        for name, text in templates.items()
    }
    tokenizer.chat_template = changed if isinstance(template, dict) else changed["default"]


def arguments_read_by(template: str, tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The names that a template reads from its caller, without messages, tools and tokens."""
    try:
        # Only transformers' own environment knows {% generation %}.
        environment = _compile_jinja_template(template).environment
    except TEMPLATE_ERRORS:
        return set()
    tree = environment.parse(template)
    names = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    # Jinja takes a name that is set in one branch only for one of the caller's. It is, if the
    # template asks whether it has a value.
    asked = {
        test.node.name
        for test in tree.find_all((nodes.Test, nodes.Filter))
        if test.name in ("defined", "undefined", "none", "default", "d")
        and isinstance(test.node, nodes.Name)
    }
    given = FROM_ROWS | set(tokenizer.special_tokens_map) | set(tokenizer.SPECIAL_TOKENS_ATTRIBUTES)
    found = find_undeclared_variables(tree) - (names - asked)
    return found - given - set(environment.globals)


def _never_read(argument: str, known: Sequence[str]) -> ModelError:
    if argument in FROM_ROWS:
        return ModelError(
            f"model.template_args: {argument} comes from the rows and is no setting",
            remedy="remove it",
        )
    near = get_close_matches(argument, known, n=1)
    meant = f'did you mean "{near[0]}"? ' if near else ""
    reads = f"it reads {', '.join(known)}" if known else "it reads no arguments"
    return ModelError(
        f'model.template_args: the chat template never reads "{argument}"; {reads}',
        remedy=f"{meant}correct or remove it",
    )


def _with_defaults(template: str, arguments: Mapping[str, Any]) -> str:
    defaults = "".join(
        f"{{%- if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"
        for name, value in arguments.items()
    )
    # Jinja drops the line end behind a tag (trim_blocks): without one of ours, the template's own.
    return f"{defaults}\n{template}" if defaults else template


def _literal(value: Any) -> str:
    """A value of JSON in Jinja's language."""
    match value:
        case None:
            return "none"
        case list():
            return f"[{', '.join(map(_literal, value))}]"
        case dict():
            return f"{{{', '.join(f'{_literal(k)}: {_literal(v)}' for k, v in value.items())}}}"
        case _:
            return json.dumps(value, ensure_ascii=False)
