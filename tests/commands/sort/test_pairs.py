"""`yrun sort` on better and worse answers: by what the base and cross-fitted models prefer."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import write_jsonl
from yrunner.assembly.run import Run
from yrunner.commands.sort.command import sort
from yrunner.commands.sort.cross_fit import make_folds
from yrunner.commands.sort.pairs import against_by_base, against_by_tuned
from yrunner.commands.train import train, train_base
from yrunner.errors import Origin, RecipeError
from yrunner.scoring.measure import TokenScores
from yrunner.scoring.score_file import row_hashes
from yrunner.storage.run_dir import RunDir

RECIPE = Path("preferred.yaml")
FOLDER = Path("outputs/preferred/sort")
FULL = "tuning={kind: full}"


def run(*overrides: str, overwrite: bool = False) -> list[dict]:
    """Sort, and return the lines of scores.jsonl."""
    sort(RECIPE, list(overrides), overwrite=overwrite, train_base=train_base)
    return records_of("scores.jsonl")


def records_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / name).read_text("utf-8").splitlines()]


def margins(records: list[dict], column: str = "scores") -> list[float]:
    return [record[column]["margin"] for record in records]


def log_prob(model, example) -> float:
    """Of all targets together, from the model's own logits."""
    ids_T, labels_T = (torch.tensor(part) for part in (example.input_ids, example.labels))
    with torch.no_grad():
        logits_TV = model(ids_T[None]).logits[0].double()
    is_target_T = labels_T[1:] >= 0
    each_T = logits_TV[:-1].log_softmax(-1).gather(1, ids_T[1:, None])[:, 0]
    return float(each_T[is_target_T].sum())


def test_the_base_judges_a_pair_by_its_log_probabilities_per_target(preferred):
    found = margins(run())
    tuned = Run.load(RECIPE)
    model = tuned.load_base().eval()
    for pair, margin in zip(tuned.pairs.train, found, strict=True):
        better, worse = (
            log_prob(model, answer) / len(answer.target_positions)
            for answer in (pair.chosen, pair.rejected)
        )
        assert margin == pytest.approx(better - worse, abs=1e-4)


@pytest.mark.parametrize("tuning", [FULL, "tuning.rank=4"])
def test_a_cross_fit_is_as_yrun_train_on_the_other_folds_against_its_reference(preferred, tuning):
    found = margins(run(tuning, "sort.cross_fit=2", "sort.cross_fit_steps=5"), "cross_fit")
    tuned = Run.load(RECIPE, [tuning])
    rows = tuned.pairs.train
    hashes = row_hashes(rows.examples)
    groups = ["".join(hashes[place : place + 2]) for place in range(0, len(hashes), 2)]
    folds = make_folds(groups, 2, tuned.recipe.seed)
    lines = Path("pairs.jsonl").read_text("utf-8").splitlines()
    others = [json.loads(line) for line, fold in zip(lines, folds, strict=True) if fold != 1]
    write_jsonl(Path("others.jsonl"), others)
    alone = [tuning, "name=alone", "train.max_steps=5", "train.epochs=null", "data.validation=[]"]
    train(RECIPE, [*alone, "data.train=[{file: others.jsonl}]"], resume=False, overwrite=False)
    base, result = tuned.load_base().eval(), tuned.load_model(RunDir(Path("outputs/alone")).model)
    for pair, margin, fold in zip(rows, found, folds, strict=True):
        if fold == 1:
            better, worse = (
                log_prob(result.eval(), answer) - log_prob(base, answer)
                for answer in (pair.chosen, pair.rejected)
            )
            assert margin == pytest.approx(better - worse, abs=2e-3)


def test_a_swapped_pair_has_the_negated_margin(preferred):
    before = margins(run())
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text("utf-8").splitlines()]
    for row in rows:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    write_jsonl(Path("pairs.jsonl"), rows)
    after = margins(run(overwrite=True))
    assert after == pytest.approx([-margin for margin in before], abs=1e-5)


def test_the_lowest_margins_are_dropped_and_every_line_is_written_unchanged(preferred):
    before = Path("pairs.jsonl").read_text("utf-8").splitlines()
    records = run("sort.drop_share=0.25")
    kept, dropped = (
        (FOLDER / name).read_text("utf-8").splitlines()
        for name in ("sorted.jsonl", "dropped.jsonl")
    )
    assert sorted(kept + dropped) == sorted(before)
    assert len(dropped) == 4
    worst = sorted(records, key=lambda record: record["scores"]["margin"])[:4]
    assert {before[record["row"] - 1] for record in worst} == {*dropped}
    train(
        RECIPE,
        ["train.order=as_written", f"data.train=[{{file: {FOLDER / 'sorted.jsonl'}}}]"],
        resume=False,
        overwrite=False,
    )


def page_of(name: str = "report.html") -> tuple[dict, list[dict]]:
    page = (FOLDER / name).read_text("utf-8")
    rows, maps = (
        page.split(f'<script type="application/json" id="{part}">')[1].split("</script>")[0]
        for part in ("rows", "maps")
    )
    return json.loads(rows), [json.loads(line) for line in maps.split("\n")]


def test_the_page_lists_each_pair_once_and_shows_what_speaks_against_it(preferred):
    records = run("sort.cross_fit=2", "sort.cross_fit_steps=2")
    rows, maps = page_of()
    assert rows["score"] == "cross-fit margin"
    assert "cross-fit margin" in rows["low"]
    assert rows["number"] == list(range(1, 17))
    first = json.loads(Path("pairs.jsonl").read_text("utf-8").splitlines()[0])
    assert f"{first['chosen']} ≻ {first['rejected']}" in rows["text"][0]
    for record, shown, targets in zip(records, maps, rows["targets"], strict=True):
        assert len(shown["against"]) == len(shown["loss"]) == targets
        rounding = 0.005 * targets
        margin = -sum(shown["against"]) / 100
        assert margin == pytest.approx(record["cross_fit"]["margin"], abs=rounding + 1e-6)
    assert "".join(maps[0]["texts"]).count(first["prompt"]) == 1, "the prompt is shown once"


def test_a_mark_keeps_a_pair_and_is_refused_when_either_answer_has_changed(preferred):
    worst = min(run(), key=lambda record: record["scores"]["margin"])["row"]
    content = page_of()[0]["content"][worst - 1]
    mark = {"file": "pairs.jsonl", "row": worst, "mark": "keep", "content": content}
    write_jsonl(Path("marks.jsonl"), [mark])
    records = run("sort.drop_share=0.1", "sort.marks=marks.jsonl", overwrite=True)
    assert records[worst - 1]["dropped"] is None
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text("utf-8").splitlines()]
    rows[worst - 1]["rejected"] += " Sorry."
    write_jsonl(Path("pairs.jsonl"), rows)
    with pytest.raises(Exception, match=f"row {worst} of pairs.jsonl has another text"):
        run("sort.marks=marks.jsonl", overwrite=True)


def test_a_reward_recipe_is_sorted_by_dpo(preferred):
    steps = ["sort.cross_fit=2", "sort.cross_fit_steps=2"]
    by_dpo = margins(run(*steps), "cross_fit")
    reward = ["train.stage=reward", "loss={kind: bradley_terry}"]
    assert margins(run(*steps, *reward, overwrite=True), "cross_fit") == by_dpo


@pytest.mark.parametrize("tuning", [FULL, "tuning.rank=4"])
def test_marked_answers_are_sorted_and_a_mark_that_is_wrong_changes_its_sign(preferred, tuning):
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text("utf-8").splitlines()]
    marked = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for number, row in enumerate(rows)
        for side in (["chosen", "rejected"][number % 2],)
    ]
    write_jsonl(Path("pairs.jsonl"), marked)
    kto = ["loss={kind: kto}", "sort.cross_fit=2", "sort.cross_fit_steps=2", tuning]
    records = run(*kto, "data.validation=[]")
    assert len(records) == 16
    assert all(np.isfinite(margins(records, "cross_fit")))
    # Good and bad answers are compared with the middle between them.
    good, bad = margins(records)[0::2], margins(records)[1::2]
    assert np.mean(good) == pytest.approx(np.mean(bad), abs=1e-5)


def test_a_pair_file_is_sorted_by_kto_row_by_row(preferred):
    records = run("loss={kind: kto}", "sort.drop_share=0.25")
    assert [record["row"] for record in records] == list(range(1, 17))
    assert margins(records) == pytest.approx(margins(run(overwrite=True)), abs=1e-5)


def scored(*losses: float) -> TokenScores:
    loss_N = torch.tensor(losses)
    return TokenScores(loss_N, loss_N, loss_N, loss_N.long(), Origin(Path("pairs.jsonl"), 1))


def test_what_speaks_against_a_pair_adds_up_to_minus_its_margin():
    base, tuned = [scored(2.0, 4.0), scored(1.0)], [scored(1.0, 1.0), scored(3.5)]
    ratings_S = np.array([1, -1])
    by_base = against_by_base(ratings_S, base, alone=False)
    assert sum(float(each.sum()) for each in by_base) == pytest.approx(3.0 - 1.0)
    by_tuned = against_by_tuned(ratings_S, base, tuned, alone=False)
    assert [each.tolist() for each in by_tuned] == [[-1.0, -3.0], [-2.5]]
    endless = against_by_base(ratings_S, [scored(float("inf")), scored(float("nan"))], alone=False)
    assert all(bool(each.isfinite().all()) for each in endless)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["sort.score=loss"], "sort.score: loss judges single answers"),
        (["sort.also=[excess]"], "sort.also judges single answers"),
        (
            ["train.stage=sft", "loss={kind: plain}", "sort.score=margin"],
            "sort.score: margin compares better and worse answers, but train.stage sft",
        ),
    ],
)
def test_scores_of_the_other_kind_are_refused(preferred, overrides, sentence):
    with pytest.raises(RecipeError, match=sentence):
        Run.load(RECIPE, overrides)
