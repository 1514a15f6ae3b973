"""The tables of docs/results/scaling.md are extrapolated from short rows."""

import pytest

from benchmarks.markdown import print_markdown
from benchmarks.scaling import trainings
from benchmarks.scaling.trainings import job_of, trace_row

LENGTH = 4096
SMALL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "vocab_size": 4000}


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_long_row_is_extrapolated_from_two_short_ones(monkeypatch, kind: str, share: float):
    monkeypatch.setitem(trainings.FORMS, "small", trainings.FORMS["Qwen3 0.6B"] | SMALL)
    traced = trace_row("small", kind, LENGTH).busiest_compute(share)
    grown = job_of("small", kind, LENGTH).update.busiest_compute(share)
    assert share * grown[0] + grown[1] == pytest.approx(share * traced[0] + traced[1], rel=0.01)


def test_a_printed_markdown_table_names_each_model_once(capsys: pytest.CaptureFixture[str]):
    print_markdown(
        "GB:", ("model", "", "1"), [("a", "x", 12.345), ("a", "y", None), ("b", "", 1e4)]
    )
    assert capsys.readouterr().out == (
        "\nGB:\n\n| model | | 1 |\n|---|---|---|\n| a | x | 12.3 |\n| | y | |\n| b | | 10,000 |\n"
    )
