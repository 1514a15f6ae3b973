"""Which chat templates does yrunner read, and is every loss mask exact?

    python -m benchmarks.templates [--folder DIR] [--only NAME]

Renders the same conversations with every .jinja file of a folder: by default the stand-ins of the
tests, which have the structure of the well-known templates. A small tokenizer knows the special
tokens that the file names. A conversation is *read* if its targets are exactly the texts of the
assistant, with thinking, calls and end marks, from where the prompt at inference ends; else it is
*refused* with a sentence, or *wrong*.
"""

import argparse
import copy
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from benchmarks.markdown import print_markdown
from benchmarks.paths import ROOT
from yrunner.data.chat.tokenize import tokenize_chunks
from yrunner.data.conversation import Conversation, FaultyRow, TokenizedExample
from yrunner.data.formats.turns import read_tools, read_turns
from yrunner.errors import ModelError, Origin
from yrunner.models.scratch import train_tokenizer
from yrunner.models.templates.choose import set_chat_template
from yrunner.tokens import IGNORE_INDEX, TEMPLATE_ERRORS

STAND_INS = ROOT / "tests" / "data" / "assets" / "templates"
TEXTS = [
    "第十二条 雾港的灯塔由市政厅管理。 The lighthouse of Fog Harbour is kept by the town hall.",
    "assistant\n\n\nuser model [[1]] Who keeps it? I add 2 and 2. It is 4.",
] * 4
SPECIAL = re.compile(
    r"<\|[^<>|\s{}]+\|?>|<[^<>|\s{}]+\|>|<｜[^｜\s{}]+｜>|\[/?[A-Z_]{3,}\]|</?s>|"
    r"<(?:start|end)_of_\w+>|<(?:extra_id_\d+|SPECIAL_\d+|eos|bos|sop|sep)>|<seed:\w+>|"
    r"\]~[a-z!]*\[|\[e~\[|</(?:assistant|user|system)>"
)
EOS_TOKENS = (
    "<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<turn|>", "<|END_OF_TURN_TOKEN|>",
    "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<|return|>", "<|endoftext|>", "<|end|>", "<eos>",
    "<seed:eos>", "[e~[", "</assistant>", "</s>",
)  # fmt: skip
THOUGHT = "I add 2 and 2."
THINKING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought", "tool_plan")
CALL = {"id": "call00001", "type": "function"}
TIDE = {"name": "tide_table", "arguments": {"place": "雾港", "day": 3}}
MOON = {"name": "moon_phase", "arguments": {"day": 5}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Look up the {name}.",
            "parameters": {"type": "object", "properties": {"day": {"type": "integer"}}},
        },
    }
    for name in ("tide_table", "moon_phase")
]
RESULT = {"role": "tool", "content": "RESULT3", "name": "tide_table", "tool_call_id": "call00001"}


def user(text: str) -> dict[str, Any]:
    """A turn of the user, with a word that no target may contain."""
    return {"role": "user", "content": f"QUESTION {text}"}


def reply(text: str, **others: Any) -> dict[str, Any]:
    """A turn of the assistant."""
    return {"role": "assistant", "content": text, **others}


def calling(*functions: Mapping[str, Any], text: str = "", **others: Any) -> dict[str, Any]:
    """A turn of the assistant that calls tools."""
    calls = [
        {**CALL, "id": f"call0000{number}", "function": function}
        for number, function in enumerate(functions, start=1)
    ]
    return reply(text, tool_calls=calls, **others)


def one(text: str, **others: Any) -> list[dict[str, Any]]:
    """A question and this reply."""
    return [user("How much?"), reply(text, **others)]


INLINE = f"<think>\n{THOUGHT}\n</think>\n\nIt is 4."
TWO_RESULTS = [RESULT, {**RESULT, "name": "moon_phase", "tool_call_id": "call00002"}]
SYSTEM = {"role": "system", "content": "SYSTEM Be brief."}
ROWS: dict[str, list[dict[str, Any]]] = {
    "one turn": one("It is 4."),
    "three turns": [*one("It is 4."), *one("Five."), *one("Six.")],
    "system": [SYSTEM, *one("It is 4.")],
    "brackets": one("[[1]]"),
    "empty before": [*one(""), *one("It is 4.")],
    "outer spaces": [*one("  It is 4.  "), *one("  Five.  ")],
    "final newline": one("It is 4.\n"),
    "unicode": one("灯塔 🦀 é\u0301 \u200bא"),
    "reply in reply": [*one("It is 4. Five."), *one("It is 4.")],
    "template words": one("assistant\nuser: <b>model</b>"),
    "thinking key": one("It is 4.", thinking=THOUGHT),
    "thinking twice": [*one("Five.", reasoning="Old."), *one("It is 4.", reasoning=THOUGHT)],
    "thinking inline": one(INLINE),
    "tool": [user("Tide?"), calling(TIDE), RESULT, reply("At three.")],
    "tool, then more": [user("Tide?"), calling(TIDE), RESULT, reply("At three."), *one("Six.")],
    "tool last": [user("Tide?"), calling(TIDE)],
    "words and tool": [user("Tide?"), calling(TIDE, text="I look."), RESULT, reply("At three.")],
    "two tools": [user("Tide?"), calling(TIDE, MOON), *TWO_RESULTS, reply("At three.")],
    "thinking, tool": [
        user("Tide?"), calling(TIDE, reasoning_content=THOUGHT), RESULT, reply("At three."),
    ],
}  # fmt: skip
"""Messages in OpenAI's form; a row with calls has tools."""


def tokenizer_for(path: Path) -> Any:
    """A tokenizer that knows the special tokens in a template. Raises `ModelError`."""
    tokenizer = train_tokenizer(TEXTS, vocab_size=400)
    set_chat_template(tokenizer, path)
    source = str(tokenizer.chat_template)
    found = set(SPECIAL.findall(source))
    if re.search(r"'<\|'\s*[+~]", source):
        found |= {f"<|{role}|>" for role in ("system", "user", "assistant", "observation", "tool")}
    eos = next((token for token in EOS_TOKENS if token in found), "</s>")
    special = [AddedToken(text, special=True) for text in sorted({*found, eos, "<s>"})]
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.eos_token, tokenizer.bos_token = eos, "<s>"
    if "<think>" in source or "</think>" in source:
        tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


@dataclass(frozen=True)
class Outcome:
    """What became of a conversation: `read`, `refused` or `wrong`, and why."""

    kind: str
    reason: str = ""


def walk(path: Path) -> dict[str, Outcome]:
    """What becomes of every conversation with one template."""
    try:
        tokenizer = tokenizer_for(path)
    except ModelError as error:
        return dict.fromkeys(ROWS, Outcome("refused", error.message.replace(f"{path}:", "line ")))
    return {name: outcome(row, tokenizer) for name, row in ROWS.items()}


def outcome(row: Sequence[dict[str, Any]], tokenizer: Any) -> Outcome:
    """What becomes of one conversation."""
    tools = TOOLS if any("tool_calls" in turn for turn in row) else []
    messages = read_turns(json.loads(json.dumps(row)), "messages")
    talk = Conversation(messages, Origin(Path("rows.jsonl"), 1), read_tools(tools))
    try:
        ((result,),) = tokenize_chunks([[talk]], tokenizer)
    except ModelError as error:
        return Outcome("refused", error.message)
    fault = result if isinstance(result, FaultyRow) else result.altered
    if fault is not None:
        return Outcome("refused", str(fault))
    wrong = next(faults_of(result.example(), row, tools, tokenizer), None)
    return Outcome("wrong", wrong) if wrong else Outcome("read")


def runs_of(example: TokenizedExample, tokenizer: Any) -> list[tuple[str, str]]:
    """The text before each run of targets, and that of the run."""
    labels, runs, start = [*example.labels, IGNORE_INDEX], [], 0
    for place, label in enumerate(labels):
        before = labels[place - 1] if place else IGNORE_INDEX
        if label != IGNORE_INDEX and before == IGNORE_INDEX:
            start = place
        elif label == IGNORE_INDEX and before != IGNORE_INDEX:
            ids = example.input_ids
            runs.append((tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:place])))
    return runs


def faults_of(
    example: TokenizedExample, row: Sequence[dict[str, Any]], tools: list[Any], tokenizer: Any
) -> Iterator[str]:
    """What is wrong with the targets of a conversation."""
    places = [place for place, turn in enumerate(row) if turn["role"] == "assistant"]
    runs = runs_of(example, tokenizer)
    if len(runs) != len(places):
        yield f"{len(runs)} runs of targets for {len(places)} replies"
        return
    for place, (before, run) in zip(places, runs, strict=True):
        opening = opening_after(row[:place], tools, tokenizer)
        # Templates leave out the thinking of earlier turns, at inference too.
        is_last = place == places[-1]
        yield from faults_of_run(run, before.endswith(opening), is_last, row[place], tokenizer)


def opening_after(row: Sequence[dict[str, Any]], tools: list[Any], tokenizer: Any) -> str:
    """The prompt at inference behind the last of these turns; "" if the template rejects them."""
    for turns in (list(row), with_text_arguments(row)):
        try:
            prompt = tokenizer.apply_chat_template(
                turns, tools=tools or None, add_generation_prompt=True, tokenize=False
            )
        except TEMPLATE_ERRORS:
            continue
        return str(prompt).rpartition(row[-1]["content"].strip())[2]
    return ""


def with_text_arguments(row: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns with arguments as JSON text, as DeepSeek's templates read them."""
    changed = copy.deepcopy(list(row))
    for call in (call for turn in changed for call in turn.get("tool_calls", ())):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return changed


def faults_of_run(
    run: str, follows_prompt: bool, must_think: bool, turn: Mapping[str, Any], tokenizer: Any
) -> Iterator[str]:
    """What is wrong with the targets of one turn."""
    text = turn["content"].rpartition("</think>")[2].strip()
    head, _, tail = run.rpartition(text) if text else ("", "", run)
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    if any(word in run for word in ("QUESTION", "SYSTEM", "RESULT3")):
        yield f"learns another turn: {run!r}"
    if text not in run:
        yield f"{text!r} is missing in {run!r}"
    if not tail.rstrip().endswith(tuple(special)):
        yield f"no end mark in {run!r}"
    if text and "tool_calls" not in turn and not is_special(tail, special):
        yield f"more than the end mark in {run!r}"
    if not follows_prompt and not re.search(f"think|{THOUGHT}", head) and head.strip():
        yield f"begins before the reply: {run!r}"
    functions = [call["function"] for call in turn.get("tool_calls", ())]
    if not all(one["name"] in run and str(one["arguments"]["day"]) in run for one in functions):
        yield f"a call is missing in {run!r}"
    yield from faults_of_thinking(run, must_think, turn, tokenizer)


def is_special(text: str, special: Sequence[str]) -> bool:
    """Whether a text is nothing but special tokens and blanks."""
    for token in special:
        text = text.replace(token, "")
    return not text.strip()


def faults_of_thinking(
    run: str, must_think: bool, turn: Mapping[str, Any], tokenizer: Any
) -> Iterator[str]:
    """What is wrong with the thinking of one turn."""
    thoughts = [turn["content"], *(turn.get(key, "") for key in THINKING_KEYS)]
    if must_think and any(THOUGHT in thought for thought in thoughts) and THOUGHT not in run:
        yield f"the thinking is missing in {run!r}"
    if "<think>" in run and "<think>" not in tokenizer.chat_template and reads_key(tokenizer):
        yield f"<think> that the template does not know: {run!r}"


def reads_key(tokenizer: Any) -> bool:
    """Whether the template shows the thinking of a message that has it under a key."""
    for key in THINKING_KEYS:
        for others in ({}, {"tool_calls": [{**CALL, "function": TIDE}]}):
            try:
                shown = tokenizer.apply_chat_template(
                    [user("Why?"), reply("", **{key: THOUGHT}, **others)], tokenize=False
                )
            except TEMPLATE_ERRORS:
                continue
            if THOUGHT in shown:
                return True
    return False


def main() -> None:
    """Print a table of templates, and the sentences of the refused ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=STAND_INS, help="a folder of .jinja files")
    parser.add_argument("--only", default="", help="part of the names of the files to read")
    arguments = parser.parse_args()
    files = sorted(arguments.folder.glob("*.jinja"))
    outcomes = {path.stem: walk(path) for path in files if arguments.only in path.stem}
    rows = [row for name, found in outcomes.items() for row in rows_of(name, found)]
    title = f"{len(outcomes)} templates, {len(ROWS)} conversations each"
    print_markdown(title, ["template", "read", "refused", "wrong", "which, and why"], rows)
    total = Counter(one.kind for found in outcomes.values() for one in found.values())
    print(f"\n{total['read']:,} read, {total['refused']:,} refused, {total['wrong']:,} wrong")


def rows_of(name: str, outcomes: Mapping[str, Outcome]) -> list[list[str]]:
    """The lines of the table for one template, one per reason."""
    counts = Counter(found.kind for found in outcomes.values())
    reasons: dict[tuple[str, str], list[str]] = {}
    for row, found in outcomes.items():
        if found.kind != "read":
            reasons.setdefault((found.kind, found.reason), []).append(row)
    said = [f"{', '.join(names)}: {kind}, {why}" for (kind, why), names in reasons.items()] or [""]
    numbers = [str(counts[kind]) for kind in ("read", "refused", "wrong")]
    return [[name, *numbers, said[0]], *([name, "", "", "", line] for line in said[1:])]


if __name__ == "__main__":
    main()
