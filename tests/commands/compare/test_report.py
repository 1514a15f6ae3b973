"""The tables and the page of an experiment, also in a real browser that opens it from disk."""

import re
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest

from tests.project import answers_of
from tests.reports import conftest as pages
from yrunner.commands.compare import report as compare_report
from yrunner.commands.compare.figures import at_domain_accuracy, domain_threshold
from yrunner.commands.compare.jobs import Failure
from yrunner.commands.compare.plan import PlanFacts
from yrunner.commands.compare.points import Point
from yrunner.commands.compare.report import details, tables, write_experiment
from yrunner.commands.compare.tables import Experiment, as_json
from yrunner.evaluation.results import Faults, ModelResults
from yrunner.recipe.arms import Arm
from yrunner.recipe.load import load_recipe
from yrunner.rewards.facts import Drawn
from yrunner.storage.run_dir import CompareDir

browser = pages.browser

ATTACK = "<script>document.title='owned'</script>"
NOTHING = "+0.0 to +0.0".replace(" ", "\N{NO-BREAK SPACE}")
TASKS = {"legal": ("domain", 72), "near": ("general", 60), "far": ("general", 120)}
NUM_FAULTS = 34


def point(step, *, memorised=None, seed=0, **shares):
    """A point at which such shares of a side's questions are right, which ones by the seed."""
    chance = np.random.default_rng(seed)

    def some(number, share):
        return (chance.permutation(number) < share * number).astype(float).tolist()

    tasks = {
        name: answers_of(side, some(number, shares[side])) for name, (side, number) in TASKS.items()
    }
    faults = None
    if memorised is not None:
        rows = some(NUM_FAULTS, memorised)
        halves = {"cut": fmean(rows[:17]), "typos": fmean(rows[17:])}
        faults = Faults(fmean(rows), rows, halves, [""] * NUM_FAULTS)
    return Point(step, ModelResults("it", tasks, faults=faults))


def make_experiment(num_arms=2, *, faults=True, seeds=(0, 1, 2), **more):
    names = ["plain", "nlirg", *(f"another-arm-{number}" for number in range(2, num_arms))]
    curves = {
        name: {
            seed: tuple(
                point(
                    step,
                    seed=seed,
                    domain=min(1.0, (step + 20 * seed) / 1200 / (1 + number / 5)),
                    general=1 - step / 2000 / (1 + number),
                    memorised=step / 1290 if faults else None,
                )
                for step in range(215, 1291, 215)
            )
            for seed in seeds
        }
        for number, name in enumerate(names[:num_arms])
    }
    base = point(0, domain=0, general=1, memorised=0 if faults else None)
    values = {
        "name": "trial",
        "arms": [Arm(name, {"loss.kind": name, "train.note": ATTACK}) for name in curves],
        "seeds": list(seeds),
        "plans": dict.fromkeys(curves, PlanFacts(1290, 400_000, 344, "order", "base")),
        "curves": curves,
        "bases": dict.fromkeys(curves, base),
        "domain_accuracy": domain_threshold(curves),
        "losses": {
            name: {0: [{"step": 10, "loss": 2.0}, {"step": 215, "eval_loss": 1.5}]}
            for name in curves
        },
    }
    return Experiment(**{**values, **more})


def with_beside(one, **figures):
    """The point with more figures in the task near."""
    task = one.results.tasks["near"]
    near = replace(task, figures={**task.figures, **figures})
    return replace(one, results=replace(one.results, tasks={**one.results.tasks, "near": near}))


def test_length_and_distance_stand_beside_the_base_over_the_seeds():
    experiment = make_experiment()
    assert not [table for table in details(experiment) if "beside" in table.title]
    lengths = {"plain": 10.0, "nlirg": 40.0}
    curves = {
        arm: {
            seed: tuple(
                with_beside(each, length=lengths[arm] + 2 * seed, kl=seed / 8) for each in points
            )
            for seed, points in runs.items()
        }
        for arm, runs in experiment.curves.items()
    }
    bases = {arm: with_beside(base, length=30.0, kl=0.0) for arm, base in experiment.bases.items()}
    experiment = replace(experiment, curves=curves, bases=bases)
    end, _ = (table for table in details(experiment) if "beside the base" in table.title)
    assert end.columns == ["arm", "near: length", "near: kl"]
    assert end.rows == [
        ["(base)", "30", "0"],
        ["plain", "12 ± 2", "0.125 ± 0.12"],
        ["nlirg", "42 ± 2", "0.125 ± 0.12"],
    ]
    found = as_json(experiment)["at_the_end"]["plain"]["beside_base"]["near: kl"]
    assert found["mean"] == pytest.approx(0.125)


def test_arms_are_compared_where_their_validation_loss_is_the_same():
    curves = {
        arm: {0: tuple(with_beside(each, length=8.0, kl=0.5) for each in runs[0])}
        for arm, runs in make_experiment(seeds=(0,)).curves.items()
    }
    base = with_beside(point(0, domain=0, general=1, memorised=0), length=24.0, kl=0.0)
    slow = [{"step": 0, "eval_loss": 4.0}, {"step": 215, "eval_loss": 2.0}]
    losses = {"plain": {0: [slow[0], {"step": 215, "eval_loss": 1.0}]}, "nlirg": {0: slow}}
    bases = {"plain": base, "nlirg": base}
    experiment = make_experiment(seeds=(0,), curves=curves, bases=bases, losses=losses)
    *_, table = tables(experiment)
    assert table.title == "At equal validation loss (2 nats)"
    assert table.columns == [
        "arm", "runs", "update", "domain", "general", "memorised faults", "near: length", "near: kl"
    ]  # fmt: skip
    plain, nlirg = table.rows
    assert plain[:3] == ["plain", "1 of 1", "108"], "half the way to its first checkpoint"
    assert plain[-2:] == ["16", "0.25"]
    assert nlirg[:3] == ["nlirg", "1 of 1", "215"]
    assert nlirg[-2:] == ["8", "0.5"]
    found = as_json(experiment)
    assert found["validation_loss"] == 2.0
    assert found["at_validation_loss"]["plain"]["figures"]["near: kl"]["mean"] == 0.25
    *_, given = tables(replace(experiment, validation_loss=1.0))
    assert [row[1] for row in given.rows] == ["1 of 1", "0 of 1"]


def test_without_the_loss_of_the_base_there_is_no_such_table():
    assert not [table for table in tables(make_experiment()) if "validation" in table.title]
    assert "at_validation_loss" not in as_json(make_experiment())


@pytest.fixture
def recipe(project):
    return load_recipe(project / "tuned.yaml", ["model.base=some/model"])


@pytest.fixture
def page(recipe, tmp_path):
    def write(experiment):
        folder = CompareDir(tmp_path)
        write_experiment(experiment, recipe, folder)
        return folder.page

    return write


def test_the_tables_hold_mean_spread_and_differences_of_each_arm():
    end, from_base, apart, equal, equal_apart = tables(make_experiment())
    assert end.title == "At equal steps"
    rows = {row[0]: dict(zip(end.columns, row, strict=True)) for row in end.rows}
    assert rows["(base)"] | {"general": "100.0"} == rows["(base)"]
    assert rows["plain"]["domain"] == "100.0 ± 0.0"
    assert rows["plain"]["forgetting"] == "-63.7 ± 0.0"  # 22 of 60 and 43 of 120 are left
    assert rows["nlirg"]["memorised faults"] == "100.0 ± 0.0"
    assert rows["plain"]["runs"] == "3 of 3"
    assert from_base.title == "At equal steps: compared with the base"
    from_plain, from_nlirg = from_base.rows
    assert from_plain[:3] == ["plain", 3, "+100.0"] and from_nlirg[:2] == ["nlirg", 3]
    assert from_plain[from_base.columns.index("general")] == "-63.7"
    (row,) = apart.rows
    assert row[:2] == ["nlirg", 3]
    figures = dict(zip(apart.columns[2::2], row[2::2], strict=True))
    assert figures["general"] == "+32.1"
    assert row[apart.columns.index("general") + 1].endswith("*")
    assert equal.title == "At equal domain accuracy (90.0%)"
    assert equal_apart.title == "At equal domain accuracy (90.0%): compared with plain"


def test_a_difference_inside_the_noise_has_no_star():
    same = make_experiment(1)
    curves = {"plain": same.curves["plain"], "again": same.curves["plain"]}
    arms = [Arm(name, {}) for name in curves]
    plans = dict.fromkeys(curves, same.plans["plain"])
    bases = dict.fromkeys(curves, same.bases["plain"])
    twice = make_experiment(curves=curves, arms=arms, plans=plans, bases=bases)
    _, _, apart, *_ = tables(twice)
    assert apart.rows == [["again", 3, "+0.0", NOTHING, "+0.0", NOTHING, "+0.0", NOTHING]]


def test_one_arm_one_seed_and_no_faults_leave_out_what_they_cannot_say(page):
    experiment = make_experiment(1, faults=False, seeds=(4,))
    titles = [table.title for table in tables(experiment)]
    assert titles == [
        "At equal steps",
        "At equal steps: compared with the base",
        "At equal domain accuracy (90.0%)",
    ]
    (_, row) = tables(experiment)[0].rows
    assert row[3] == "100.0", "no spread of one seed"
    text = page(experiment).read_text("utf-8")
    assert "memorised" not in text
    assert "±" not in re.sub("(?s)<p class=.caption.*?</p>", "", text)


def test_an_arm_that_never_gets_there_says_so(page):
    experiment = make_experiment(domain_accuracy=1.0)
    *_, equal, apart = tables(experiment)
    by_arm = {row[0]: row for row in equal.rows}
    assert by_arm["plain"][1] == "3 of 3"
    assert by_arm["nlirg"][1:4] == ["0 of 3", None, None]
    assert apart.rows[0][:3] == ["nlirg", 0, None]
    assert "1 of 2" in page(experiment).read_text("utf-8")
    nobody = make_experiment(
        1,
        domain_accuracy=1.0,
        seeds=(0,),
        curves={"plain": {0: (point(5, domain=0.5, general=1, memorised=0),)}},
    )
    assert "0 of 1" in page(nobody).read_text("utf-8")


def test_details_hold_each_task_and_each_kind_of_fault():
    experiment = make_experiment(domain_accuracy=0.5)
    by_task, by_kind, *equal = details(experiment)
    assert by_task.title == "At equal steps: by task"
    assert by_task.columns == ["arm", "legal", "near", "far"]
    assert by_task.rows[0] == ["(base)", "0.0", "100.0", "100.0"]
    assert by_task.rows[1][2:] == ["36.7 ± 0.0", "35.8 ± 0.0"], "22 of 60 and 43 of 120"
    assert by_kind.columns == ["arm", "cut", "typos"]
    assert by_kind.rows[0] == ["(base)", "0.0", "0.0"]
    assert [table.title for table in equal] == [
        "At equal domain accuracy (50.0%): by task",
        "At equal domain accuracy (50.0%): memorised, by kind",
    ]
    points = at_domain_accuracy(experiment.curves, 0.5)["nlirg"].values()
    for place, kind in enumerate(["cut", "typos"]):
        mean = fmean(point.results.faults.by_kind[kind] for point in points)
        assert 0 < mean < 1
        assert equal[1].rows[2][1 + place].startswith(f"{100 * mean:.1f} ")
        found = as_json(experiment)["at_domain_accuracy"]["nlirg"]["memorised_by_kind"][kind]
        assert found["mean"] == pytest.approx(mean)


def test_a_run_that_never_got_there_has_no_details():
    *_, by_kind = details(make_experiment(domain_accuracy=1.0))
    assert by_kind.rows[-1] == ["nlirg", None, None]


def test_the_training_loss_of_a_checkpoint_is_the_mean_since_the_one_before(monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        compare_report,
        "curves_of_arms",
        lambda curves, words, **_: drawn.setdefault(words, curves) and "",
    )
    steps_and_losses = [(10, 5.0), (215, 3.0), (225, 2.0), (430, 1.0)]
    records = [{"step": step, "loss": loss} for step, loss in steps_and_losses]
    seed_1 = [{**record, "loss": record["loss"] / 2} for record in records]
    losses = {"plain": {0: records, 1: seed_1}, "nlirg": {0: []}}
    compare_report._curve_blocks(make_experiment(losses=losses))
    first, second = drawn["training loss (nats per target)"]["plain"]
    assert (first.step, first.mean, first.low, first.high) == (215, 3.0, 2.0, 4.0)
    assert (second.step, second.mean, second.low, second.high) == (430, 1.125, 0.75, 1.5)
    assert drawn["training loss (nats per target)"]["nlirg"] == []


def test_json_and_tables_hold_the_same_figures():
    found = as_json(make_experiment())
    assert found["arms"]["plain"]["seeds"]["0"][-1]["memorised"] == 1.0
    assert found["at_the_end"]["plain"]["figures"]["forgetting"]["mean"] == pytest.approx(
        -0.6375, abs=1e-4
    )
    apart = found["at_the_end"]["nlirg"]["minus_the_first"]["general"]
    assert apart["difference"] == pytest.approx(0.32083, abs=1e-4)
    assert apart["low"] > 0
    assert found["at_the_end"]["plain"]["minus_the_first"] == {}
    to_base = found["at_the_end"]["plain"]["minus_the_base"]["general"]
    assert to_base["difference"] == pytest.approx(-0.6375, abs=1e-4) and to_base["high"] < 0


def drawn(first, last):
    """Answers with such mean rewards; no reward but the first has full marks."""
    return tuple(
        Drawn(64, mean + 0.5, {"exact": mean, "own": 0.5}, {"exact": mean})
        for mean in (first, last)
    )


def test_what_was_drawn_is_shown_by_arm_and_reward_over_the_seeds(page):
    runs = {"plain": {0: drawn(0.2, 0.8), 1: drawn(0.4, 1.0)}, "nlirg": {0: drawn(0.1, 0.2)}}
    records = [
        {"step": 10, "loss": 0.0, "reward": 0.3},
        {"step": 215, "loss": 0.1, "reward": 0.7},
        {"step": 215, "eval_loss": -0.6, "eval_reward": 0.6},
    ]
    experiment = make_experiment(drawn=runs, losses={"plain": {0: records}, "nlirg": {0: records}})
    *_, table = tables(experiment)
    assert table.title == "Answers drawn"
    exact, own, total, *_ = table.rows
    assert exact == ("plain", "exact", "0.3 ± 0.14", "0.9 ± 0.14", "30.0 ± 14.1", "90.0 ± 14.1")
    assert own == ("plain", "own", "0.5 ± 0", "0.5 ± 0", None, None)
    assert total[1:] == ("sum, less penalties", "0.8 ± 0.14", "1.4 ± 0.14", None, None)
    assert table.rows[3] == ("nlirg", "exact", "0.1", "0.2", "10.0", "20.0")
    found = as_json(experiment)["answers_drawn"]["plain"]["1"]
    assert found["last"]["means"] == {"exact": 1.0, "own": 0.5}
    text = page(experiment).read_text("utf-8")
    assert "validation reward" in text and "reward of the answers drawn" in text
    assert "training loss" not in text and "nats per target" not in text


def test_a_browser_shows_pictures_tables_notes_and_failures_and_runs_nothing(
    browser,
    page,
    tmp_path,
):
    failures = {"gone-seed-0": Failure(f"no device {ATTACK}", tmp_path / "gone.log")}
    path = page(make_experiment(12, notes=["nlirg has more updates"], failures=failures))
    shown = pages.dump_page(browser, path.as_uri(), tmp_path)
    assert "<title>trial</title>" in shown
    assert "<script" not in shown
    assert "&lt;script&gt;" in shown
    for words in ("another-arm-11", "nlirg has more updates", "gone-seed-0", "optimizer step"):
        assert words in shown
    script = """return [...page.querySelectorAll("svg")].map((svg) =>
      [svg.getBoundingClientRect().width > 500, svg.querySelectorAll("path, use").length > 20]);"""
    assert pages.ask_page(browser, path, script, tmp_path) == [[True, True]] * 6
    script = "return page.documentElement.scrollWidth;"
    assert pages.ask_page(browser, path, script, tmp_path, width=375) == 375
    assert pages.console_of(browser, path, tmp_path) == []
