"""A conversation and its commands, on a model that nobody trained."""

import json
import sys
from pathlib import Path

import pytest

from yrunner.assembly.run import Run
from yrunner.commands import chat as module
from yrunner.commands.chat import COMMANDS, ChatSession, chat
from yrunner.console import printable
from yrunner.evaluation.refilled import generate_answers

TUNED = Path("tuned.yaml")


@pytest.fixture
def models(make_talker):
    """The result and its base: two models that answer differently."""
    return make_talker(seed=3), make_talker(seed=4)


@pytest.fixture
def session(project, models, capitals_tokenizer, monkeypatch):
    tuned, base = models
    monkeypatch.setattr(Run, "load_base", lambda _: base)
    return ChatSession(Run.load(TUNED, ["data.system=Be brief."]), capitals_tokenizer, tuned, 6)


@pytest.fixture
def heard(monkeypatch):
    """The prompts that a model was asked, each with its answer."""
    prompts = []

    def listen(model, tokenizer, prompt, show, **options):
        answer = stream_answer(model, tokenizer, prompt, show, **options)
        prompts.append((prompt, answer.text))
        return answer

    stream_answer = module.stream_answer
    monkeypatch.setattr(module, "stream_answer", listen)
    return prompts


def test_a_conversation_goes_on_until_it_is_reset(session, heard, capsys):
    session.ask("Capital of Aru?")
    session.ask("And of Coria?")
    (_, first), (prompt, _) = heard
    for said in ("Be brief.", "Capital of Aru?", first, "And of Coria?"):
        assert said in prompt
    session.run_command("/reset")
    session.ask("And of Isk?")
    assert "Aru" not in heard[-1][0]
    assert capsys.readouterr().out == "".join(f"{printable(text)}\n" for _, text in heard)


def test_the_base_answers_the_last_question_beside_and_is_not_remembered(
    session, heard, models, capitals_tokenizer
):
    session.run_command("/base")
    assert not heard, "nothing was asked yet"
    session.ask("Capital of Aru?")
    session.run_command("/base")
    (prompt, _), (again, answer) = heard
    assert again == prompt
    (expected,) = generate_answers(
        models[1], capitals_tokenizer, [prompt], max_new_tokens=6, batch_size=1
    )
    assert answer == expected.text
    session.ask("And?")
    assert heard[2][0].startswith(prompt)
    assert answer not in heard[2][0]


def test_a_model_without_a_base_says_so(project, models, capitals_tokenizer, capsys):
    session = ChatSession(Run.load(Path("base.yaml")), capitals_tokenizer, models[0], 6)
    session.ask("a?")
    session.run_command("/base")
    assert "base was trained from scratch" in capsys.readouterr().out


def test_a_good_exchange_is_kept_as_a_row_that_can_be_trained_on(session, heard, project, capsys):
    session.run_command("/save")
    assert "nothing to save" in capsys.readouterr().out
    Path("outputs").mkdir()
    session.ask("Capital of Aru?")
    session.run_command("/save")
    session.run_command("/save")
    path = project / "outputs" / "tuned-saved.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert (
        rows
        == [
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Capital of Aru?"},
                    {"role": "assistant", "content": heard[0][1]},
                ]
            }
        ]
        * 2
    )
    assert "saved as row 2 of" in capsys.readouterr().out
    session.run_command("/save mine.jsonl")
    assert len((project / "mine.jsonl").read_text().splitlines()) == 1
    for name in ("tuned.yaml", "no/such.jsonl"):
        session.run_command(f"/save {name}")
        assert "cannot write" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ([""], "repetition_penalty=1.0 kind=greedy max_new_tokens=6"),
        (["temperature=0.5"], "kind=sample temperature=0.5 top_k=0"),
        (["kind=beams num_beams=3"], "kind=beams num_beams=3 max_new_tokens=6"),
        (["kind=dynamic", "top_k=9 max_new_tokens=4"], "top_k=9 max_new_tokens=4"),
        (["temperature=-1"], "temperature: input should be greater than 0, got -1"),
        (["temperature=0"], "repetition_penalty=1.0 kind=greedy max_new_tokens=6"),
        (["temperature=0.7", "temperature=0.0"], "\nrepetition_penalty=1.0 kind=greedy max"),
        (["kind=sample temperature=0 top_p=0.5 repetition_penalty=1.2"], "=1.2 kind=greedy max"),
        (["kind=beams", "temperature=0"], "\nrepetition_penalty=1.0 kind=greedy max"),
        (["temperature 0"], "write /params key=value, for example /params temperature=0.7"),
        (["heat=1"], "heat: decoding of kind sample has no such setting"),
        (["kind=loud"], "kind must be one of greedy, sample, beams, dynamic"),
        (
            ["max_new_tokens=none"],
            'max_new_tokens must be a whole number of at least 1, not "none"',
        ),
    ],
)
def test_parameters_are_shown_and_changed(session, capsys, changes, shown):
    for change in changes:
        session.run_command(f"/params {change}")
    assert shown in capsys.readouterr().out


def test_a_sampled_answer_is_another_one_when_it_is_asked_again(session, heard):
    session.run_command("/params temperature=2")
    for _ in range(2):
        session.ask("Capital of Aru?")
        session.run_command("/reset")
    (one, first), (other, second) = heard
    assert one == other
    assert first != second


def test_an_answer_can_be_stopped_and_is_forgotten(session, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "stream_answer", stop)
    session.ask("Capital of Aru?")
    session.run_command("/save")
    assert "nothing to save" in capsys.readouterr().out


def test_a_talk_too_long_for_the_model_says_what_to_do(session, capsys):
    session.ask("long " * 700)
    assert (
        capsys.readouterr().out == "the conversation is too long for the model; /reset clears it\n"
    )


def test_help_lists_every_command_and_others_are_unknown(session, capsys):
    session.run_command("/help")
    session.run_command("/bye")
    printed = capsys.readouterr().out
    for name, meaning in COMMANDS.items():
        assert f"{name}: {meaning}" in printed
    assert "unknown command /bye" in printed


def test_on_a_terminal_an_answer_appears_piece_by_piece(session, heard, monkeypatch):
    pieces = []
    monkeypatch.setattr(module, "is_terminal", lambda: True)
    monkeypatch.setattr(module, "show", lambda text, end: pieces.append(text.plain + end))
    session.ask("Capital of Aru?")
    assert "".join(pieces).strip() == heard[0][1]


def test_lines_of_a_person_are_questions_and_commands(project, models, monkeypatch, capsys):
    """Typed at a prompt, until /quit."""
    typed = iter(["", "/help", "  Capital of Aru?  ", "/quit", "never asked"])

    def type_line(prompt):
        assert prompt == "> "
        return next(typed)

    asked = []
    for name in ("require_result", "result_tokenizer", "load_result"):
        monkeypatch.setattr(Run, name, lambda _: None)
    monkeypatch.setattr(ChatSession, "ask", lambda self, line: asked.append(line))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("yrunner.commands.chat.is_terminal", lambda: True)
    monkeypatch.setattr("builtins.input", type_line)
    chat(TUNED, [], max_new_tokens=4)
    assert asked == ["Capital of Aru?"]
    assert "/quit" in capsys.readouterr().out
