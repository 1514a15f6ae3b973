"""What is printed stays readable, harmless and clickable, with and without a terminal."""

import io
import os
import pty
import subprocess
import sys
import time

import pytest
from rich.cells import cell_len
from rich.text import Text

from yrunner import console


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def use_terminal(monkeypatch):
    """A function that makes both streams a narrow terminal, and returns them.

    Called inside the test: pytest sets its own streams after the fixtures.
    """

    def replace_streams() -> tuple[Terminal, Terminal]:
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", "40")
        monkeypatch.delenv("NO_COLOR", raising=False)
        stdout, stderr = Terminal(), Terminal()
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr)
        return stdout, stderr

    return replace_streams


@pytest.mark.parametrize(
    "message", ["[red]no markup[/red]", "a [b] c", ":smile:", "价格 1e-4", "a\tb"]
)
def test_a_line_is_printed_as_it_is(capsys, message):
    console.say(message)
    assert capsys.readouterr().out == message + "\n"


def test_errors_and_warnings_go_to_standard_error(capsys):
    console.warn("mind")
    console.fail("stop")
    assert capsys.readouterr() == ("", "warning: mind\nstop\n")


def test_a_long_error_line_stays_one_line_on_a_narrow_terminal(use_terminal):
    _, stderr = use_terminal()
    line = "recipes/a_long_folder/[legal] v2.yaml:14:5: tuning.rnak: unknown key, " + "word " * 30
    console.fail(line.strip())
    shown = stderr.getvalue()
    assert line.strip() in shown
    assert shown.count("\n") == 1
    assert "\x1b[31m" in shown


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("rewrite\rthe line", r"rewrite\rthe line"),
        ("a\x00b\x9bc", r"a\x00b\x9bc"),
        ("user\u202etxt.exe", r"user\u202etxt.exe"),
        ("lone \ud800", r"lone \ud800"),
        ("windows\r\nline", "windows\nline"),
        ("中文，emoji 👩‍👩‍👧 and\ttab\n", "中文，emoji 👩‍👩‍👧 and\ttab\n"),
    ],
)
def test_harmful_characters_are_made_visible_and_others_kept(raw, shown):
    assert console.printable(raw) == shown


def test_an_escape_sequence_in_a_message_never_reaches_the_terminal(use_terminal):
    stdout, _ = use_terminal()
    console.say("\x1b[2Jgone")
    assert "\x1b" not in stdout.getvalue()


def test_text_that_the_encoding_lacks_is_escaped_instead_of_failing(monkeypatch):
    bytes_written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_written, encoding="ascii"))
    console.say("第 1 条")
    console.print_table("表", ["名"], [["法律"]])
    assert bytes_written.getvalue().startswith(rb"\u7b2c 1 \u6761")


def test_a_cell_may_bring_its_style_and_stays_harmless(use_terminal):
    stdout, _ = use_terminal()
    console.print_table("t", ["a"], [[Text("+5.0\x1b[2J", "green")], ["1"]])
    assert "\x1b[32m" in stdout.getvalue()
    assert "\x1b[2J" not in stdout.getvalue()


def test_full_width_text_stays_aligned_in_a_table(capsys):
    console.print_table("数据", ["文件", "rows"], [["港口法.jsonl", 1520], ["ab", 7]])
    lines = capsys.readouterr().out.splitlines()
    ends = [cell_len(line) for line in lines if line.endswith(("1,520", "7", "rows"))]
    assert len(ends) == 3
    assert len(set(ends)) == 1


def test_a_table_in_a_log_is_never_cut_or_coloured(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    console.print_table("long", ["path", "n"], [["x" * 300, 1], ["[red]", None]])
    out = capsys.readouterr().out
    assert "x" * 300 in out
    assert "[red]" in out
    assert "\x1b" not in out


def test_a_long_cell_is_folded_on_a_terminal_and_nothing_is_lost(use_terminal):
    stdout, _ = use_terminal()
    console.print_table("T", ["PATH"], [["abcdefghijklmnopqrstuvwxyz" * 8]])
    shown = stdout.getvalue()
    assert shown.count("q") == shown.count("z") == 8
    assert max(Text.from_ansi(line).cell_len for line in shown.splitlines()) <= 40


@pytest.mark.parametrize("rows", [[], [[None, "x"]], [["", ""]]])
def test_a_table_with_little_in_it_is_printed(capsys, rows):
    console.print_table("small", ["first", "second"], rows)
    assert "first" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["12,345", "91 %", "-0.5", "1.2 GiB", "0.4 ± 0.1", "1e-4", "-1.2 to +3.4 *", "–", ""]
)
def test_numbers_are_recognised(text):
    assert console.reads_as_number(text)


@pytest.mark.parametrize(
    "text", ["legal", "1 to many", "v2.yaml", "2026-01-01", "1.2.3.4", "第1条"]
)
def test_text_is_not_taken_for_a_number(text):
    assert not console.reads_as_number(text)


def test_progress_in_a_log_is_a_line_per_quarter_without_control_characters(capsys):
    with console.progress("scoring", 1000) as advance:
        for _ in range(1000):
            advance(1)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "scoring: 0/1,000",
        "scoring: 250/1,000 (25 %)",
        "scoring: 500/1,000 (50 %)",
        "scoring: 750/1,000 (75 %)",
        "scoring: 1,000/1,000 (100 %)",
    ]


@pytest.mark.parametrize("total", [1, 3])
def test_progress_of_little_work_says_nothing_wrong(capsys, total):
    with console.progress("few", total) as advance:
        for _ in range(total):
            advance(1)
    assert capsys.readouterr().err.count("\n") <= 1 + total


def test_progress_of_nothing_shows_nothing(capsys, use_terminal):
    with console.progress("losses", 0) as advance:
        advance(1)
    assert capsys.readouterr().err == ""
    _, stderr = use_terminal()
    with console.progress("losses", 0) as advance:
        advance(1)
    assert stderr.getvalue() == ""


@pytest.mark.parametrize("steps", [[6, 6], [25], [3, 3, 3, 3]])
def test_progress_never_exceeds_its_total_and_says_how_it_goes(capsys, steps):
    with console.progress("rows", 10, detail=lambda: "7 tokens/s") as advance:
        for step in steps:
            advance(step)
    *_, last = capsys.readouterr().err.splitlines()
    assert last == "rows: 10/10 (100 %), 7 tokens/s"


def test_progress_on_a_terminal_says_how_it_goes(use_terminal, monkeypatch):
    monkeypatch.setattr(console, "_SECONDS_BETWEEN_REFRESHES", -1)
    _, stderr = use_terminal()
    with console.progress("rows", 10, detail=lambda: "7 tokens/s [x]") as advance:
        advance(5)
    assert "7 tokens/s [x]" in stderr.getvalue()


def test_progress_on_a_terminal_shows_a_bar_and_gives_the_cursor_back(use_terminal):
    _, stderr = use_terminal()
    with pytest.raises(KeyboardInterrupt), console.progress("读取 [x]", 10) as advance:
        advance(5)
        raise KeyboardInterrupt
    shown = stderr.getvalue()
    assert "读取 [x]" in shown
    assert "5/10" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_a_wait_is_shown_on_a_terminal_until_it_is_over(use_terminal):
    _, stderr = use_terminal()
    with pytest.raises(ValueError), console.waiting("loading torch"):
        assert stderr.getvalue() == "loading torch ..."
        raise ValueError
    assert stderr.getvalue() == "loading torch ...\r\x1b[2K"


def test_a_wait_is_not_in_a_log(capsys):
    with console.waiting("loading torch"):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_dumb_terminal_counts_as_none(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert not console.is_terminal(Terminal())


def test_a_line_for_a_file_stays_in_the_file_while_a_bar_is_drawn_on_the_terminal(tmp_path):
    program = (
        "from yrunner.console import progress, say\n"
        "with progress('work', 2) as advance:\n    say('a result')\n    advance(2)\n"
    )
    results = tmp_path / "results.txt"
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)}
    with results.open("w") as stdout:
        command = [sys.executable, "-c", program]
        subprocess.run(command, stdout=stdout, stderr=theirs, env=environment, check=True)
    os.close(theirs)
    time.sleep(0.05)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert results.read_text() == "a result\n"
    assert "work" in shown
    assert "a result" not in shown


def test_printing_a_line_imports_neither_torch_nor_rich():
    program = (
        "import sys; from yrunner.console import say; say('hello');"
        "assert not {'torch', 'rich'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
