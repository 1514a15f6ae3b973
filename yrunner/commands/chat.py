"""`yrun chat`: chat with the trained model of a recipe."""

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails
from rich.text import Text

from yrunner.assembly.run import Run
from yrunner.console import is_terminal, say, show
from yrunner.data.chat.tokenize import prompt_of, with_system
from yrunner.data.conversation import Message
from yrunner.evaluation.generate import Generated, stream_answer
from yrunner.recipe.schema.eval import Generation

COMMANDS = {
    "/base": "the base answers the last question too",
    "/reset": "clear the conversation",
    "/save [FILE]": "save the conversation as a training row",
    "/params [KEY=VALUE ...]": "show or change generation settings",
    "/help": "show this list",
    "/quit": "end the chat, as Ctrl-D does",
}
ANY_GENERATION: TypeAdapter[Generation] = TypeAdapter(Generation)


class ChatSession:
    """A conversation so far, and the generation settings of the next answer."""

    def __init__(self, run: Run, tokenizer: Any, model: Any, max_new_tokens: int) -> None:
        self._run, self._tokenizer, self._model = run, tokenizer, model
        self._recipe = recipe = run.recipe
        self._base: Any = None
        self._max_new_tokens = max_new_tokens
        self._generation: Generation = recipe.eval.generation
        self._num_asked = 0
        self._messages: tuple[Message, ...] = ()

    def ask(self, question: str) -> None:
        """Answer a question; a stopped answer is dropped together with its question."""
        asked = (*self._messages, Message("user", question))
        self._num_asked += 1
        answer = self._answer(self._model, asked)
        if answer is not None:
            self._messages = (*asked, Message("assistant", answer.text))

    def run_command(self, line: str) -> None:
        """Run a command that starts with a slash."""
        command, _, rest = line.partition(" ")
        match command:
            case "/base":
                self._ask_base()
            case "/reset":
                self._messages = ()
            case "/save":
                self._save(rest.strip())
            case "/params":
                self._set(rest.split())
            case "/help":
                for name, meaning in COMMANDS.items():
                    say(f"{name}: {meaning}")
            case _:
                say(f"unknown command {command}; use {', '.join(COMMANDS)}")

    def _answer(self, model: Any, asked: tuple[Message, ...]) -> Generated | None:
        """The answer, streamed to a terminal."""
        prompt = prompt_of(asked, self._tokenizer, self._recipe.data.system)
        streams = is_terminal()
        try:
            answer = stream_answer(
                model,
                self._tokenizer,
                prompt,
                (lambda piece: show(Text(piece), end="")) if streams else (lambda _: None),
                max_new_tokens=self._max_new_tokens,
                generation=self._generation,
                # One for each question: the same question can get another answer.
                seed=self._recipe.seed + self._num_asked,
            )
        except KeyboardInterrupt:
            # Ctrl-C stops the answer, not the chat.
            say("")
            return None
        if answer.refused:
            say("the conversation is too long for the model; /reset clears it")
            return None
        say("" if streams else answer.text)
        return answer

    def _ask_base(self) -> None:
        if not self._messages:
            say("ask something first")
        elif self._recipe.model.base is None:
            say(f"{self._recipe.name} was trained from scratch and has no base")
        else:
            if self._base is None:
                self._base = self._run.load_base()
            self._answer(self._base, self._messages[:-1])

    def _save(self, name: str) -> None:
        if not self._messages:
            say("nothing to save; ask something first")
            return
        folder = self._recipe.run_folder
        path = Path(name) if name else folder.with_name(f"{folder.name}-saved.jsonl")
        if path.suffix != ".jsonl" or not path.parent.is_dir():
            say(f"cannot write {path}; name a .jsonl file in an existing folder")
            return
        messages = with_system(self._messages, self._recipe.data.system)
        row = {"messages": [{"role": turn.role, "content": turn.content} for turn in messages]}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        with path.open(encoding="utf-8") as file:
            say(f"saved as row {sum(1 for _ in file)} of {path}")

    def _set(self, changes: list[str]) -> None:
        """Change generation settings, or say why not; show the settings."""
        if any("=" not in change.strip("=") for change in changes):
            say("write /params key=value, for example /params temperature=0.7")
            return
        given = dict(change.partition("=")[::2] for change in changes)
        length = given.pop("max_new_tokens", str(self._max_new_tokens))
        if not length.isdecimal() or int(length) < 1:
            say(f'max_new_tokens must be a whole number of at least 1, not "{length}"')
            return
        current = {} if "kind" in given else self._generation.model_dump()
        if _is_zero(given.get("temperature", "")) and given.get("kind") in (None, "sample"):
            # The limit of sampling: always the most likely token.
            kept = {**current, **given}.get("repetition_penalty", 1.0)
            current, given = {}, {"kind": "greedy", "repetition_penalty": kept}
        if current.get("kind") == "greedy" and given.keys() - {"repetition_penalty"}:
            current["kind"] = "sample"  # a temperature has no effect on greedy decoding
        try:
            self._generation = ANY_GENERATION.validate_python({**current, **given})
        except ValidationError as error:
            for fault in error.errors():
                say(_fault_of(fault))
            return
        self._max_new_tokens = int(length)
        values = {**self._generation.model_dump(), "max_new_tokens": self._max_new_tokens}
        say(" ".join(f"{key}={value}" for key, value in values.items()))


def _is_zero(text: str) -> bool:
    try:
        return float(text) == 0
    except ValueError:
        return False


def _fault_of(error: ErrorDetails) -> str:
    """What is wrong with one generation setting."""
    kind, *key = map(str, error["loc"] or [""])
    match error["type"]:
        case "union_tag_invalid" | "union_tag_not_found":
            return f"kind must be one of {error['ctx']['expected_tags']}".replace("'", "")
        case "extra_forbidden":
            return f"{key[-1]}: decoding of kind {kind} has no such setting; /params shows them"
    return f"{key[-1]}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']}"


def chat(path: Path, overrides: list[str], *, max_new_tokens: int) -> None:
    """Answer each line of standard input, in one conversation until /reset."""
    run = Run.load(path, overrides)
    run.require_result()
    session = ChatSession(run, run.result_tokenizer, run.load_result(), max_new_tokens)
    for line in _lines():
        if line in ("/quit", "/exit"):
            return
        if line.startswith("/"):
            session.run_command(line)
        else:
            session.ask(line)


def _lines() -> Iterator[str]:
    """Typed or piped lines, without empty ones."""
    is_typed = sys.stdin.isatty()
    if is_typed:
        with suppress(ImportError):
            import readline  # noqa: F401  gives input() history and arrow keys
    if is_typed and is_terminal():
        say(f"ask something; {', '.join(COMMANDS)}; Ctrl-C stops an answer")
    while True:
        try:
            line = input("> ") if is_typed else next(sys.stdin)
        except (EOFError, StopIteration):
            return
        if line.strip():
            yield line.strip()
