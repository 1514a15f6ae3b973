"""The tables of the experiment, from invented points."""

import json
from statistics import fmean

import pytest

from benchmarks import legal_experiment
from benchmarks.legal_experiment import GENERAL_TEST, KINDS, Experiment, by_distance
from tests.project import answers_of
from yrunner.commands.compare.points import Point
from yrunner.evaluation.results import Faults, ModelResults

FIELDS = [json.loads(line)["field"] for line in GENERAL_TEST.read_text("utf-8").splitlines()]


def point(step, *, domain, kept, memorised):
    """A point that answers these distances and repeats `memorised` of ten faults of each kind."""
    general = [float(field in kept) for field in FIELDS]
    rows = [float(number % 10 < memorised) for number in range(10 * len(KINDS))]
    tasks = {
        "legal": answers_of("domain", [float(number < domain) for number in range(10)]),
        "general": answers_of("general", general),
    }
    by_kind = dict.fromkeys(KINDS, memorised / 10)
    faults = Faults(fmean(rows), rows, by_kind, [""] * len(rows))
    return Point(step, ModelResults("it", tasks, {"repetition_3": 0.01}, faults))


EXPERIMENT = Experiment(
    curves={
        "plain": {0: (point(5, domain=9, kept=["far"], memorised=8),)},
        "nlirg": {0: (point(5, domain=9, kept=["far", "middle"], memorised=2),)},
        "unfit": {0: (point(5, domain=1, kept=[], memorised=0),)},
    },
    base=point(0, domain=0, kept=["near", "middle", "far"], memorised=0),
    num_seeds=3,
    domain_accuracy=0.81,
)


def test_general_accuracy_is_split_by_distance():
    shares = by_distance()(point(5, domain=9, kept=["near", "far"], memorised=0))
    assert shares == {"near": 1, "middle": 0, "far": 1}


@pytest.fixture
def printed(monkeypatch, capsys, tmp_path):
    picture = tmp_path / "plane.svg"
    monkeypatch.setattr(legal_experiment, "load_runs", lambda file, overrides: EXPERIMENT)
    monkeypatch.setattr("sys.argv", ["it", "--picture", "plain,nlirg", str(picture)])
    legal_experiment.main()
    assert picture.read_text("utf-8").startswith("<svg ")
    return capsys.readouterr().out


def test_every_arm_is_compared_with_the_first(printed):
    end, equal = printed.split("**At equal domain accuracy, 81.0%**")
    assert (
        "| nlirg | 1 of 3 | 5 | 90.0 | 66.7 | 20.0 | 1.0 | \N{MINUS SIGN}33.3 | 0.50 | 0.25 |"
        in end
    )
    assert "| unfit | 1 of 3 |" in end
    assert "| unfit | 0 of 3 |  |" in equal, "it never gets there"
    assert "| nlirg | 0.0 | 100.0 | 100.0 |" in equal, "near, middle, far"
    assert "| nlirg | 20.0 | 20.0 | 20.0 | 20.0 | 20.0 |" in equal, "by kind of fault"
    assert "| nlirg | +0.0 (+0.0 to +0.0) | +33.3 (" in equal
