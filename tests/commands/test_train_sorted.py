"""`data.train: - sorted:`: one command sorts, drops and learns; nothing is sorted twice."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import write_jsonl
from tests.project import pairs, write_recipe
from yrunner.assembly.preflight import sort_rows
from yrunner.assembly.run import Run
from yrunner.cli import _sort
from yrunner.commands.check.command import check
from yrunner.commands.compare.runs import ArmRun, sort_jobs
from yrunner.commands.sort.command import sort
from yrunner.commands.train import prepare, train
from yrunner.errors import RecipeError, RunError
from yrunner.recipe.load import load_recipe
from yrunner.storage.run_dir import CompareDir

TUNED, SORTING = Path("tuned.yaml"), Path("clean.yaml")
RESULT = Path("outputs/clean/sort")


@pytest.fixture
def sorting(trained_base: Path, change: Any) -> Path:
    """A project in which tuned.yaml learns what clean.yaml sorts, of which it drops a quarter."""
    content = yaml.safe_load(TUNED.read_text("utf-8"))
    recipe = {key: content[key] for key in ("model", "tuning")} | {
        "name": "clean",
        "data": {"train": [{"file": "train.jsonl"}]},
        "sort": {"drop_share": 0.25, "score": "loss"},
    }
    write_recipe(trained_base / SORTING, recipe)
    change("tuned.yaml", data__train=[{"sorted": "clean.yaml"}])
    return trained_base


class Counting:
    """Sorts as `yrun train` does, and lists what it has sorted."""

    def __init__(self) -> None:
        self.sorted: list[str] = []

    def __call__(self, run: Run) -> None:
        self.sorted.append(run.recipe.name)
        _sort(run)


def prepared(path: Path = TUNED, **options: bool) -> list[str]:
    """The recipes that are sorted before this one trains."""
    counting = Counting()
    prepare(Run.load(path, **options), counting)
    return counting.sorted


def rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_one_command_sorts_drops_and_learns(sorting, capsys):
    train(TUNED, [], sort=_sort, resume=False, overwrite=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "the rows of clean have not been sorted yet: sorting them first" in said
    assert "clean: 12 rows kept, 4 dropped" in said
    assert "train.order: as_written keeps the order" in said
    (report, _) = json.loads(Path("outputs/tuned/data_report.json").read_text("utf-8"))["files"]
    assert (Path(report["file"]).parent, report["rows"]) == (RESULT.absolute(), 12)
    card = Path("outputs/tuned/model/README.md").read_text("utf-8")
    assert "- `clean.yaml, sorted`" in card
    # Trained again it sorts nothing, and its record is of the sorted rows.
    assert prepared() == []
    assert not Run.load(TUNED).can_resume() or Run.load(TUNED).folder.is_finished()


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("rule", r"\(sort\.drop_share\)"),
        ("data", r"\(files\.train\.jsonl\)"),
        ("model", r"\(recipe\.data\.system\)"),
        ("marks", r"\(marks\.marks\.jsonl\)"),
        ("gone", "have not been sorted yet"),
        ("older", "were sorted by an earlier version"),
    ],
)
def test_rows_are_sorted_again_when_that_would_change_them(sorting, change, what, why, capsys):
    if what == "marks":
        write_jsonl(sorting / "marks.jsonl", [])
        change("clean.yaml", sort__marks="marks.jsonl")
    assert prepared() == ["clean"]
    assert prepared() == []
    change("clean.yaml", output="outputs/clean", eval={"batch_size": 2})
    assert prepared() == [], "what the sort does not read changes nothing"
    match what:
        case "rule":
            change("clean.yaml", sort__drop_share=0.5)
        case "data":
            write_jsonl(sorting / "train.jsonl", rows(sorting / "train.jsonl")[:8])
        case "model":
            change("clean.yaml", data__system="Be brief.")
        case "marks":
            (sorting / "marks.jsonl").write_text("\n", "utf-8")
        case "gone":
            (RESULT / "scores.jsonl").unlink()
        case "older":
            (RESULT / "fingerprint.json").unlink()
    capsys.readouterr()
    assert prepared() == ["clean"]
    assert re.search(why, capsys.readouterr().out)
    assert prepared() == []


def test_the_order_and_the_columns_of_the_sort_are_those_of_the_rows(sorting, change):
    named = [{"q": row["instruction"], "a": row["output"]} for row in rows(Path("train.jsonl"))]
    write_jsonl(sorting / "named.jsonl", named)
    columns = {"instruction": "q", "output": "a"}
    entry = {"file": "named.jsonl", "format": "alpaca", "columns": columns}
    change("clean.yaml", data__train=[entry], sort__order="descending")
    assert prepared() == ["clean"]
    (source, _) = Run.load(TUNED).sources
    assert source.files == (RESULT.absolute() / "sorted.jsonl",)
    assert (source.reading.format, dict(source.reading.columns)) == ("alpaca", columns)
    assert Run.load(TUNED).dataset.train.column("rows").tolist() == list(range(1, 13))


def test_check_says_what_would_be_sorted_and_sorts_nothing(sorting, capsys):
    check(TUNED, [], as_machine=False, sample=0)
    said = " ".join(capsys.readouterr().out.split())
    assert "the rows of clean have not been sorted yet: yrun train sorts them first" in said
    assert not RESULT.exists()
    check(TUNED, [], as_machine=True, sample=0)
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["to_sort"]) == 1
    assert facts["data"]["examples"] == 16
    prepared()
    capsys.readouterr()
    check(TUNED, [], as_machine=True, sample=0)
    facts = json.loads(capsys.readouterr().out)
    assert (facts["to_sort"], facts["data"]["examples"]) == ([], 12)


def test_without_a_sorter_the_error_names_the_command(sorting):
    with pytest.raises(RunError, match=r"have not been sorted yet.*yrun sort .*clean\.yaml"):
        train(TUNED, [], resume=False, overwrite=False)


def test_a_resumed_run_keeps_the_rows_that_it_began_with(sorting, change, capsys):
    train(TUNED, [], sort=_sort, resume=False, overwrite=False)
    change("clean.yaml", sort__drop_share=0.5)
    before = (RESULT / "sorted.jsonl").read_bytes()
    counting = Counting()
    sort_rows(Run.load(TUNED, resume=True), counting)
    assert "keeps the rows that it began with" in " ".join(capsys.readouterr().out.split())
    assert (counting.sorted, (RESULT / "sorted.jsonl").read_bytes()) == ([], before)
    # Gone rows are sorted again; others than before are refused.
    change("clean.yaml", sort__drop_share=0.25)
    (RESULT / "sorted.jsonl").unlink()
    train(TUNED, [], sort=counting, resume=True, overwrite=False)
    assert (counting.sorted, (RESULT / "sorted.jsonl").read_bytes()) == (["clean"], before)
    change("clean.yaml", sort__drop_share=0.5)
    (RESULT / "sorted.jsonl").unlink()
    with pytest.raises(RunError, match=r"other settings: files\.sorted\.jsonl"):
        train(TUNED, [], sort=_sort, resume=True, overwrite=False)


def test_sorted_rows_can_be_sorted_again_and_by_a_recipe_of_the_same_name(sorting, change):
    change("tuned.yaml", sort__drop_share=0.5)
    counting = Counting()
    sort(TUNED, [], overwrite=False, train_base=lambda run: prepare(run, counting))
    assert counting.sorted == ["clean"]
    assert len(rows(Path("outputs/tuned/sort/sorted.jsonl"))) == 6
    content = yaml.safe_load(TUNED.read_text("utf-8"))
    content["data"]["train"] = [{"sorted": "tuned.yaml"}]
    write_recipe(sorting / "again.yaml", content)  # in the same run folder
    assert prepared(Path("again.yaml")) == []
    change("clean.yaml", sort__drop_share=0.5)
    assert prepared(Path("again.yaml")) == ["tuned"], "which sorts what it learns from first"
    assert len(rows(RESULT / "sorted.jsonl")) == 8
    assert len(rows(Path("outputs/tuned/sort/sorted.jsonl"))) == 4


def test_a_base_whose_rows_must_be_sorted_again_is_trained_again(sorting, change, tmp_path):
    write_recipe(tmp_path / "above.yaml", {
        "name": "above", "model": {"base": "tuned.yaml"}, "tuning": {"kind": "full"},
        "data": {"train": [{"file": "train.jsonl"}]},
    })  # fmt: skip
    train(TUNED, [], sort=_sort, resume=False, overwrite=False)
    assert Run.load(Path("above.yaml")).stale_base is None
    change("clean.yaml", sort__drop_share=0.5)
    assert "other rows (clean)" in str(Run.load(Path("above.yaml")).stale_base)


def test_compare_sorts_each_corpus_once_before_its_arms(sorting, tmp_path):
    recipe = load_recipe(TUNED)
    arms = [ArmRun("a", seed, recipe, (str(TUNED),)) for seed in (0, 1)]
    (job,) = sort_jobs(arms, CompareDir(tmp_path / "compare"))
    assert job.commands[0][-3:] == ("sort", str((sorting / SORTING).resolve()), "--overwrite")
    prepared()
    assert sort_jobs(arms, CompareDir(tmp_path / "compare")) == []


def test_pairs_are_sorted_once_and_the_better_ones_learned(sorting: Path, change: Any):
    write_jsonl(sorting / "pairs.jsonl", pairs(16))
    learns = {"train__stage": "preference", "loss": {"kind": "dpo"}}
    sort_keys = {"drop_share": 0.25}
    change("clean.yaml", data__train=[{"file": "pairs.jsonl"}], sort=sort_keys, **learns)
    change("tuned.yaml", data__validation=[{"file": "pairs.jsonl"}], **learns)
    assert prepared() == ["clean"]
    assert prepared() == []
    assert len(Run.load(TUNED).pairs.train) == 12


@pytest.mark.parametrize(
    ("recipe", "keys", "said"),
    [
        ("clean.yaml", {"data__train": [{"sorted": "clean.yaml"}]},
         r"clean\.yaml:\d+:\d+: data\.train\.0\.sorted: the sorted recipes form a cycle "
         r"\(clean\.yaml -> clean\.yaml\); name the file of one instead"),
        ("clean.yaml", {"data__train": [{"sorted": "tuned.yaml"}]},
         r"form a cycle \(tuned\.yaml -> clean\.yaml -> tuned\.yaml\)"),
        ("base.yaml", {"data__train": [{"sorted": "tuned.yaml"}]}, "form a cycle"),
        ("tuned.yaml", {"data__train": [{"sorted": "none.yaml"}]}, "there is no file .*none.yaml"),
        ("tuned.yaml", {"data__train": [{"sorted": "train.jsonl"}]}, "is not a recipe; name a"),
        ("tuned.yaml", {"data__train": [{"sorted": "clean.yaml", "file": "train.jsonl"}]},
         "file and sorted cannot be combined"),
        ("tuned.yaml", {"data__train": [{"sorted": "clean.yaml", "format": "alpaca"}]},
         "format belongs into the recipe that sorted names"),
        ("tuned.yaml", {"data__validation": [{"sorted": "clean.yaml"}]},
         "validation cannot be sorted; name its file"),
        ("clean.yaml", {"sort__order": "random"}, r"clean\.yaml:\d+:\d+: sort\.order: must be one"),
    ],
)  # fmt: skip
def test_what_cannot_be_sorted_is_refused_with_its_line(sorting, change, recipe, keys, said):
    change(recipe, **keys)
    with pytest.raises(RecipeError, match=said):
        load_recipe(TUNED)
