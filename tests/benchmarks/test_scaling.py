"""The tables of docs/results/scaling.md stand on updates of short rows."""

import pytest

from benchmarks import scaling_jobs
from benchmarks.markdown import print_markdown
from benchmarks.scaling_jobs import job_of, trace_row

LENGTH = 4096
SMALL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "vocab_size": 4000}


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_long_row_is_carried_on_from_two_short_ones(monkeypatch, kind: str, share: float):
    monkeypatch.setitem(scaling_jobs.FORMS, "small", scaling_jobs.FORMS["Qwen3 0.6B"] | SMALL)
    run = trace_row("small", kind, LENGTH).busiest_compute(share)
    carried = job_of("small", kind, LENGTH).update.busiest_compute(share)
    assert share * carried[0] + carried[1] == pytest.approx(share * run[0] + run[1], rel=0.01)


def test_a_printed_table_is_markdown_that_names_a_model_once(capsys: pytest.CaptureFixture[str]):
    print_markdown(
        "GB:", ("model", "", "1"), [("a", "x", 12.345), ("a", "y", None), ("b", "", 1e4)]
    )
    assert capsys.readouterr().out == (
        "\nGB:\n\n| model | | 1 |\n|---|---|---|\n| a | x | 12.3 |\n| | y | |\n| b | | 10,000 |\n"
    )
