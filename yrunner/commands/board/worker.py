"""The process that holds the models of one run for the page, to score texts and to write answers.

Requests come as lines of JSON on standard input, one at a time; each gets one line of JSON. It ends
when its input does, or when nobody has asked for a while.
"""

# N = targets, L = layers, T = tokens before the one that is predicted

import json
import os
import select
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import torch
from pydantic import TypeAdapter, ValidationError

from yrunner.assembly.run import Run
from yrunner.data.chat.tokenize import prompt_of, tokenize_conversations, with_system
from yrunner.data.conversation import Conversation, FaultyRow, Message, TokenizedExample
from yrunner.errors import Origin, RunError, YRunnerError
from yrunner.evaluation.refilled import generate_answers
from yrunner.losses.nlirg import zone_of
from yrunner.process import disable_telemetry, silence_harmless_warnings
from yrunner.recipe.schema.eval import Generation
from yrunner.reports.html import four_digits
from yrunner.reports.token_text import TokenText, top_texts, visible
from yrunner.scoring.measure import score_tokens
from yrunner.scoring.suspicious_spans import find_spans
from yrunner.storage.run_dir import RunDir, read_json
from yrunner.tokens import IGNORE_INDEX
from yrunner.training.arguments import token_weight

IDLE_SECONDS = 600
ATTENDING_LAYERS = 4
MOST_ANSWERS, LONGEST_ANSWER, LONGEST_TEXT = 16, 2_048, 100_000
BEFORE, AFTER = "base", "tuned"
ANY_GENERATION: TypeAdapter[Generation] = TypeAdapter(Generation)
TYPED = Origin(Path("typed"), 1)


class TypedTexts:
    """The models of one run, each loaded when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._run = _run_of(folder)
        self._models: dict[str, Any] = {}

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one request. Raises `YRunnerError` for one that makes no sense."""
        match request.get("do"):
            case "score":
                return self._score(_text(request, "prompt"), _text(request, "answer"))
            case "attend":
                prompt, answer = _text(request, "prompt"), _text(request, "answer")
                return self._attend(prompt, answer, _model(request), _number(request, "position"))
            case "answers":
                return self._answers(_text(request, "prompt"), request)
        raise RunError("unknown request")

    @cached_property
    def _tokenizer(self) -> Any:
        return self._run.result_tokenizer if self._has_result else self._run.tokenizer

    @property
    def _has_result(self) -> bool:
        return self._run.folder.is_finished()

    @property
    def _names(self) -> list[str]:
        """The models that there are: a new model has no base, an unfinished run no result."""
        has_base = self._run.recipe.model.base is not None
        return [*([BEFORE] if has_base else []), *([AFTER] if self._has_result else [])]

    def _load(self, name: str) -> Any:
        if name not in self._names:
            raise RunError(f"{self._run.recipe.name} has no {name} model")
        if name not in self._models:
            load = self._run.load_base if name == BEFORE else self._run.load_result
            self._models[name] = load().eval()
        return self._models[name]

    def _example(self, prompt: str, answer: str) -> TokenizedExample:
        data = self._run.recipe.data
        turns: tuple[Message, ...] = (Message("user", prompt), Message("assistant", answer))
        if self._tokenizer.chat_template is None:
            turns = (Message("text", prompt + answer),)
        talk = Conversation(turns, TYPED)
        (found,) = tokenize_conversations(
            [talk], self._tokenizer, system=data.system, targets=data.targets
        )
        if isinstance(found, FaultyRow):
            raise RunError(f"this text cannot be learned from: {found}")
        if not found.target_positions:
            raise RunError("this text has no targets", remedy="write an answer")
        return found

    def _score(self, prompt: str, answer: str) -> dict[str, Any]:
        """Every token with its figures by each model, and what each would have answered."""
        example = self._example(prompt, answer)
        text = TokenText(self._tokenizer)
        weight, deadline = token_weight(self._run.recipe.token_loss)
        return {
            "tokens": _tokens(example, text),
            "models": {
                name: {
                    **self._figures(name, example, text, weight, deadline),
                    "answer": self._own_answer(name, prompt, example),
                }
                for name in self._names
            },
        }

    def _figures(
        self, name: str, example: TokenizedExample, text: TokenText, weight: Any, deadline: float
    ) -> dict[str, Any]:
        (scores,) = score_tokens(
            self._load(name),
            [example],
            pad_token_id=self._tokenizer.pad_token_id,
            batch_size=1,
            weight=weight,
        )
        spans = find_spans(scores.loss_N, scores.entropy_N)
        return {
            "loss": [four_digits(value) for value in scores.loss_N.tolist()],
            "entropy": [four_digits(value) for value in scores.entropy_N.tolist()],
            "weight": [four_digits(value) for value in scores.weight_N.tolist()],
            "zone": zone_of(scores.loss_N, deadline).tolist(),
            "top": top_texts(example, scores.top_N.tolist(), text),
            "patterns": [span.pattern for span in spans for _ in range(span.end - span.start)],
            "mean_loss": four_digits(float(scores.loss_N.double().mean())),
        }

    def _own_answer(self, name: str, prompt: str, example: TokenizedExample) -> str:
        """What the model answers, greedily, in about the length of the answer given."""
        if self._tokenizer.chat_template is None:
            return ""
        length = max(32, min(256, 2 * len(example.target_positions)))
        (answer,) = self._write(name, prompt, 1, length, {"kind": "greedy"}, 0)
        return answer.text

    def _write(
        self, name: str, prompt: str, number: int, length: int, how: Mapping[str, Any], seed: int
    ) -> list[Any]:
        try:
            generation = ANY_GENERATION.validate_python(dict(how))
        except ValidationError as error:
            fault = error.errors()[0]
            raise RunError(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}") from error
        asked = prompt_of((Message("user", prompt),), self._tokenizer, self._run.recipe.data.system)
        answers = generate_answers(
            self._load(name),
            self._tokenizer,
            [asked] * number,
            max_new_tokens=length,
            batch_size=number,
            generation=generation,
            seed=seed,
        )
        if any(answer.refused for answer in answers):
            raise RunError("prompt and answer do not fit into the model's positions")
        return answers

    def _answers(self, prompt: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """Several answers to one prompt."""
        number = min(MOST_ANSWERS, max(1, _number(request, "number")))
        length = min(LONGEST_ANSWER, max(1, _number(request, "max_new_tokens")))
        how = request.get("how")
        if not isinstance(how, dict):
            raise RunError("say how to write")
        seed = _number(request, "seed")
        written = self._write(_model(request), prompt, number, length, how, seed)
        messages = with_system((Message("user", prompt),), self._run.recipe.data.system)
        return {
            "answers": [{"text": it.text, "stopped": it.stopped} for it in written],
            "messages": [{"role": it.role, "content": it.content} for it in messages],
        }

    def _attend(self, prompt: str, answer: str, name: str, position: int) -> dict[str, Any]:
        """What the prediction of the token at `position` attended to, by position before it."""
        ids = self._example(prompt, answer).input_ids
        if not 0 < position < len(ids):
            raise RunError("there is no such token")
        model = self._load(name)
        before = torch.tensor([ids[:position]], device=model.device)
        with torch.inference_mode():
            output = model.base_model(input_ids=before, output_attentions=True, use_cache=False)
        layers = [layer for layer in output.attentions or () if layer is not None]
        if not layers:
            raise RunError("this model does not show its attention")
        last = torch.stack(
            [layer[0, :, -1].float().mean(0) for layer in layers[-ATTENDING_LAYERS:]]
        )
        return {"weights": [four_digits(value) for value in last.mean(0).tolist()]}


def _run_of(folder: Path) -> Run:
    """The run in a folder, by the recipe that it has recorded."""
    files = RunDir(folder)
    # Eager: the other kinds of attention do not give their weights.
    overrides = [f"output={json.dumps(str(files.folder))}", "model.attention=eager"]
    # The folder may come from somebody else: a click must not run the code of its model.
    overrides.append("model.trust_remote_code=false")
    if files.base.exists():
        base = str(read_json(files.base)["base"])
        # Its folder as it was then: a base that is a recipe lies relative to where it was trained.
        if Path(base).is_dir():
            overrides.append(f"model.base={json.dumps(base)}")
    run = Run.load(files.recipe, overrides)
    if run.recipe.train.stage == "reward":
        run.require_result()  # raises: it writes nothing
    return run


def _tokens(example: TokenizedExample, text: TokenText) -> list[dict[str, Any]]:
    """The tokens as characters or more, each with its place and its number of targets."""
    found, place, before = [], 0, list[int]()
    for ids in text.characters(example.input_ids):
        labels = example.labels[place : place + len(ids)]
        is_special = ids[0] in text.special_ids
        shown = "" if is_special else text.decode(ids, before)
        found.append(
            {
                "text": visible(shown or text.names(ids)),
                "special": is_special,
                "position": place,
                "length": len(ids),
                "targets": sum(label != IGNORE_INDEX for label in labels),
            }
        )
        place += len(ids)
        before = ids
    return found


def _text(request: Mapping[str, Any], name: str) -> str:
    text = request.get(name)
    if not isinstance(text, str) or not text.strip():
        raise RunError(f"write {'an answer' if name == 'answer' else 'a prompt'} first")
    if len(text) > LONGEST_TEXT:
        raise RunError(f"a text of more than {LONGEST_TEXT:,} characters is too long for the page")
    return text


def _number(request: Mapping[str, Any], name: str) -> int:
    number = request.get(name)
    if type(number) is not int:
        raise RunError(f"{name} must be a whole number")
    return number


def _model(request: Mapping[str, Any]) -> str:
    return str(request.get("model", AFTER))


def serve(
    answer: Callable[[Mapping[str, Any]], dict[str, Any]],
    asked: TextIO,
    out: TextIO,
    idle_seconds: float = IDLE_SECONDS,
) -> None:
    """Answer each line, until there are no more or none has come for a while."""
    while select.select([asked], [], [], idle_seconds)[0] and (line := asked.readline()):
        try:
            said: dict[str, Any] = {"ok": answer(json.loads(line))}
        except YRunnerError as error:
            said = {"error": str(error)}
        out.write(json.dumps(said) + "\n")
        out.flush()


def main(arguments: Sequence[str]) -> None:
    """Serve the run in the folder given."""
    disable_telemetry()
    silence_harmless_warnings()
    # Libraries may print: only answers go to where the page reads them.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    asked = os.fdopen(os.dup(0), "r", encoding="utf-8", buffering=1)
    texts: list[TypedTexts] = []

    def answer(request: Mapping[str, Any]) -> dict[str, Any]:
        if not texts:  # here, so that a recipe that cannot be loaded is answered like a request
            texts.append(TypedTexts(Path(arguments[0])))
        return texts[0].answer(request)

    serve(answer, asked, out)


if __name__ == "__main__":
    main(sys.argv[1:])
