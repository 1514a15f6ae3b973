"""`yrun sort`: every row is judged, kept or dropped, and written once, whatever interrupts it."""

import json
import os
import re
import shlex
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import get_context

from benchmarks.processes import START_METHOD
from tests.conftest import write_jsonl
from yrunner.assembly.run import Run
from yrunner.cli import main
from yrunner.commands.sort import command
from yrunner.commands.sort import score as sort_measure
from yrunner.commands.sort.command import SortInterrupted, sort
from yrunner.commands.sort.score import measure_together
from yrunner.commands.train import train, train_base
from yrunner.errors import DataError, MissingError, RunError, YRunnerError
from yrunner.recipe.load import load_recipe
from yrunner.scoring.knn import Neighbours
from yrunner.scoring.measure import score_tokens
from yrunner.scoring.rank import SCORES
from yrunner.scoring.score_file import ScoreFile

TUNED = Path("tuned.yaml")
FOLDER = Path("outputs/tuned/sort")
FILES = ("sorted.jsonl", "dropped.jsonl", "dropped_reasons.jsonl", "scores.jsonl", "report.html")


def run(*overrides, recipe=TUNED, overwrite=False):
    sort(recipe, list(overrides), overwrite=overwrite, train_base=train_base)


def lines_of(name, folder=FOLDER):
    return (folder / name).read_text("utf-8").splitlines()


def records_of(name, folder=FOLDER):
    return [json.loads(line) for line in lines_of(name, folder)]


def results(folder=FOLDER):
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}


def test_every_row_has_its_cluster_and_a_share_of_each_is_kept(trained_base, capsys):
    run("sort.clusters.smallest=3")
    records = records_of("scores.jsonl")
    found = json.loads((FOLDER / "clusters.json").read_text("utf-8"))
    sizes = Counter(record["cluster"] for record in records)
    assert {each["cluster"]: each["rows"] for each in found["clusters"]} == sizes
    assert sum(each["suspicious"] for each in found["clusters"]) == round(0.1 * 16)
    assert all(len(record["plane"]) == 2 for record in records)
    assert f"Clusters: {len(sizes.keys() - {0})}" in capsys.readouterr().out
    assert "clusters" in (FOLDER / "report.html").read_text("utf-8")
    before = results()
    run("sort.clusters.smallest=3", overwrite=True)
    assert results() == before, "equal input gives equal clusters"
    run("sort.clusters={smallest: 3, keep: 0.5}", overwrite=True)
    gone = [record["cluster"] for record in records_of("scores.jsonl") if record["dropped"]]
    assert Counter(gone) == {
        number: size - max(1, round(size / 2)) for number, size in sizes.items() if number
    }
    assert all("sort.clusters.keep" in line for line in lines_of("dropped_reasons.jsonl"))


def test_without_the_package_a_sort_has_no_clusters_and_says_so(trained_base, capsys, monkeypatch):
    monkeypatch.setattr("yrunner.commands.sort.clusters.find_spec", lambda _: None)
    with pytest.raises(MissingError, match=r"scikit-learn.*pip install"):
        run("sort.clusters.keep=0.5")
    run()
    assert "no clusters: they need scikit-learn (pip install" in capsys.readouterr().out
    assert "cluster" not in records_of("scores.jsonl")[0]
    assert not (FOLDER / "clusters.json").exists()


def test_every_row_is_written_once_and_unchanged(trained_base):
    before = Path("train.jsonl").read_text("utf-8").splitlines()
    run("sort.drop_share=0.25")
    assert sorted(lines_of("sorted.jsonl") + lines_of("dropped.jsonl")) == sorted(before)
    assert len(lines_of("dropped.jsonl")) == 4
    records = records_of("scores.jsonl")
    assert [record["row"] for record in records] == list(range(1, 17))
    for record in records:
        line = before[record["row"] - 1]
        if record["dropped"] is None:
            assert lines_of("sorted.jsonl")[record["place"] - 1] == line
        else:
            assert record["place"] is None
            assert line in lines_of("dropped.jsonl")


def test_the_reasons_stand_beside_the_dropped_rows_line_by_line(trained_base):
    before = Path("train.jsonl").read_text("utf-8").splitlines()
    run("sort.keep=13", "sort.score=loss")
    reasons = records_of("dropped_reasons.jsonl")
    assert [before[record["row"] - 1] for record in reasons] == lines_of("dropped.jsonl")
    scores = [record["score"] for record in reasons]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True), "the most suspicious go first"
    kept = [row["scores"]["loss"] for row in records_of("scores.jsonl") if row["place"]]
    assert max(kept) <= min(scores)
    assert all("sort.keep" in record["reason"] for record in reasons)


def test_the_scores_are_those_of_the_base_one_row_at_a_time(trained_base):
    run("sort.score=excess", "sort.also=[loss, correlation]")
    alone_run = Run.load(TUNED)
    tokenizer, examples = alone_run.tokenizer, alone_run.dataset.train
    alone = score_tokens(
        alone_run.load_base(), examples, pad_token_id=tokenizer.pad_token_id, batch_size=1
    )
    for record, scored in zip(records_of("scores.jsonl"), alone, strict=True):
        assert list(record["scores"]) == ["excess", "loss", "correlation"]
        for kind, value in record["scores"].items():
            expected = SCORES[kind](scored.loss_N, scored.entropy_N)
            assert value == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert record["num_targets"] == len(scored.loss_N)
        if record["worst"] is not None:
            targets = [label for label in examples[record["row"] - 1].labels if label >= 0]
            assert record["worst"]["text"] in tokenizer.decode(targets)


@pytest.mark.parametrize(("order", "rising"), [("ascending", True), ("descending", False)])
def test_the_order_goes_by_the_score(trained_base, order, rising):
    run(f"sort.order={order}")
    records = sorted(records_of("scores.jsonl"), key=lambda record: record["place"])
    scores = [record["scores"]["outlier"] for record in records]
    assert scores == sorted(scores, reverse=not rising)
    assert not (FOLDER / "dropped.jsonl").exists()


def test_blocks_go_from_easy_to_hard_also_where_low_is_hard(trained_base):
    run("sort.order=blocks", "sort.blocks=16", "sort.score=similarity")
    records = sorted(records_of("scores.jsonl"), key=lambda record: record["place"])
    scores = [record["scores"]["similarity"] for record in records]
    assert scores == sorted(scores, reverse=True)


def rows_of_page(folder=FOLDER):
    page = (folder / "report.html").read_text("utf-8")
    content = page.split('<script type="application/json" id="rows">')[1].split("</script>")[0]
    return json.loads(content)


def marks_for(marked, folder=FOLDER):
    """Lines as the page saves them, for row numbers."""
    content = rows_of_page(folder)["content"]
    return [
        {"file": "train.jsonl", "row": row, "mark": mark, "content": content[row - 1]}
        for row, mark in marked.items()
    ]


def test_marks_saved_from_the_page_override_the_scores(trained_base, capfd):
    run("sort.drop_share=0.25", "sort.score=loss")
    worst = [record["row"] for record in records_of("dropped_reasons.jsonl")]
    best = min(records_of("scores.jsonl"), key=lambda record: record["scores"]["loss"])["row"]
    write_jsonl(Path("marks.jsonl"), marks_for({worst[0]: "keep", best: "drop"}))
    chosen = ("sort.drop_share=0.25", "sort.score=loss", "sort.marks=marks.jsonl")
    run(*chosen, overwrite=True)
    reasons = {record["row"]: record["reason"] for record in records_of("dropped_reasons.jsonl")}
    assert set(reasons) == {*worst[1:], best}
    assert reasons[best].endswith("is marked drop (sort.marks)")
    assert len(lines_of("sorted.jsonl")) == 12
    # The page begins with the marks, so that more can be added.
    assert rows_of_page()["marks"] == {str(worst[0] - 1): "keep", str(best - 1): "drop"}
    assert "already scored: 16 of 16" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"row": 99}, r'"file" and "row" are "train.jsonl" and "99", not one of the 16 rows'),
        ({"file": "other.jsonl"}, r'"file" and "row" are "other.jsonl" and "2"'),
        ({"row": None}, r'"row" are "train.jsonl" and "None"'),
        ({"mark": "maybe"}, r'"mark" is "maybe"'),
        ({"mark": None}, r'"mark" is missing'),
        ({"content": "0" * 16}, "row 2 of train.jsonl has another text than when it was marked"),
        ({"content": None}, "row 2 of train.jsonl has another text than when it was marked"),
    ],
)
def test_a_mark_that_fits_no_row_is_refused_before_anything_is_scored(
    trained_base, line, message, monkeypatch
):
    run()
    good = marks_for({1: "keep", 2: "drop"})
    write_jsonl(Path("marks.jsonl"), [good[0], good[1] | line])
    monkeypatch.setattr(command, "measure_rows", None)
    with pytest.raises(DataError, match=message) as refused:
        run("sort.marks=marks.jsonl", "output=outputs/other")
    assert "marks.jsonl row 2" in str(refused.value.message)
    assert not Path("outputs/other/sort/recipe.resolved.yaml").exists()


def test_marks_that_disagree_or_are_damaged_are_refused(trained_base):
    run()
    (mark,) = marks_for({3: "keep"})
    write_jsonl(Path("marks.jsonl"), [mark, mark, mark | {"mark": "drop"}])
    with pytest.raises(DataError, match=r"row 3 of train\.jsonl is marked both keep and drop"):
        run("sort.marks=marks.jsonl", overwrite=True)
    Path("marks.jsonl").write_text('{"file": "train.jsonl",\n', "utf-8")
    with pytest.raises(DataError, match=r"marks\.jsonl row 1"):
        run("sort.marks=marks.jsonl", overwrite=True)
    with pytest.raises(YRunnerError, match=r"missing\.jsonl"):
        run("sort.marks=missing.jsonl", overwrite=True)


def test_a_base_without_a_result_is_trained_first(project, capfd):
    run()
    assert Path("outputs/base/model").is_dir()
    assert len(lines_of("sorted.jsonl")) == 16
    assert "the base base has not been trained yet" in capfd.readouterr().out


def test_interrupted_and_started_again_it_measures_nothing_twice_and_writes_the_same(
    trained_base, monkeypatch
):
    run("output=outputs/whole", "sort.drop_share=0.2", "train.batch_size=1")
    appended = []
    append = ScoreFile.append

    def append_and_stop(file, index, scores):
        if len(appended) == 7:
            raise KeyboardInterrupt
        append(file, index, scores)
        appended.append(index)

    monkeypatch.setattr(ScoreFile, "append", append_and_stop)
    with pytest.raises(SortInterrupted, match=r"stopped; .* saved in .*same command again"):
        run("sort.drop_share=0.2", "train.batch_size=1")
    assert results() == {}

    def append_and_note(file, index, scores):
        append(file, index, scores)
        appended.append(index)

    monkeypatch.setattr(ScoreFile, "append", append_and_note)
    run("sort.drop_share=0.2", "train.batch_size=1")
    assert sorted(appended) == list(range(16))
    assert results() == results(Path("outputs/whole/sort"))


def test_a_finished_sort_is_replaced_only_when_asked_and_without_measuring_again(
    trained_base, monkeypatch, capfd
):
    run("sort.drop_share=0.2")
    with pytest.raises(RunError, match=r"already holds a finished sort\. Replace it with --over"):
        run()

    def load(_):
        raise AssertionError("nothing is to be measured")

    monkeypatch.setattr(Run, "load_base", load)
    run(overwrite=True)
    assert "already scored: 16 of 16" in capfd.readouterr().out
    assert len(lines_of("sorted.jsonl")) == 16
    assert not (FOLDER / "dropped.jsonl").exists(), "what the first sort dropped is kept now"


def test_the_next_command_learns_from_the_rows_in_their_new_order(trained_base, capfd):
    Path("train.jsonl").write_text(
        Path("train.jsonl").read_text("utf-8").replace('"instruction"', '"ask me"'), "utf-8"
    )
    columns = 'data.train=[{file: train.jsonl, columns: {instruction: "ask me"}}]'
    run(columns, "seed=7")
    line = capfd.readouterr().out.splitlines()[-1]
    program, what, recipe, *overrides = shlex.split(line, comments=True)
    assert (program, what) == ("yrun", "train")
    train(Path(recipe), [*overrides, "train.epochs=1"], resume=False, overwrite=False)
    trained = load_recipe(Path(recipe), overrides)
    assert trained.train.order == "as_written"
    assert trained.seed == 7
    assert trained.run_folder.is_dir()
    assert len(lines_of("sorted.jsonl")) == 16, "the sort is not touched"


def test_rows_that_cannot_be_learned_from_stand_among_the_dropped_ones(trained_base):
    rows = Path("train.jsonl").read_text("utf-8")
    Path("rows.jsonl").write_text('{broken\n{"instruction": "no answer"}\n' + rows, "utf-8")
    data = "data.train=[{file: rows.jsonl}]"
    with pytest.raises(YRunnerError, match=r"2 rows cannot be used"):
        run(data)
    run(data, "data.invalid=drop", "sort.drop_share=0.1")
    dropped = lines_of("dropped.jsonl")
    assert dropped[-2:] == ["{broken", '{"instruction": "no answer"}']
    reasons = records_of("dropped_reasons.jsonl")
    assert [record["row"] for record in reasons[-2:]] == [1, 2]
    assert reasons[-2]["reason"].startswith("cannot be used: invalid JSON")
    assert reasons[-2]["score"] is None
    assert len(dropped) == len(reasons) == 2 + 2
    assert [record["row"] for record in records_of("scores.jsonl")] == list(range(1, 19))


def test_rows_that_the_recipe_does_not_take_are_no_part_of_the_corpus(trained_base):
    run("data.train=[{file: train.jsonl, take: 5}]")
    assert len(lines_of("sorted.jsonl")) == 5
    assert len(lines_of("scores.jsonl")) == 5


def test_rows_for_validation_are_sorted_too_where_they_are_only_a_share(trained_base):
    run("data.validation=[]", "data.validation_share=0.5")
    assert len(lines_of("sorted.jsonl")) == 16


def test_a_long_text_that_is_split_is_one_row_with_one_score(trained_base):
    words = [f"Belo is the capital of Aru. {number} " for number in range(9)]
    write_jsonl(Path("texts.jsonl"), [{"text": "".join(words)}, {"text": "Dane is the capital."}])
    overrides = (
        "data.train=[{file: texts.jsonl}]",
        *("data.validation=[]", "data.too_long=split", "data.max_length=32", "train.stage=cpt"),
    )
    run(*overrides)
    long, _short = records_of("scores.jsonl")
    assert len(lines_of("sorted.jsonl")) == 2
    examples = Run.load(TUNED, overrides).dataset.train
    assert len(examples) > 3
    assert long["num_targets"] == examples.num_targets[:-1].sum()


def test_several_files_become_one_and_the_scores_tell_them_apart(trained_base):
    run("data.train=[{file: train.jsonl}, {file: test.jsonl}]")
    assert len(lines_of("sorted.jsonl")) == 20
    names = [record["file"] for record in records_of("scores.jsonl")]
    assert names == ["train.jsonl"] * 16 + ["test.jsonl"] * 4


def test_the_scores_of_a_cross_fit_decide_and_those_of_the_base_are_kept(trained_base, monkeypatch):
    run("output=outputs/alone", "sort.order=ascending")

    def turned(run, folder):
        """The base's scores, but the most suspicious row is the least."""
        scores = measured(run, folder)
        return [
            type(one)(-one.loss_N + 50, one.entropy_N, one.weight_N, one.top_N, one.origin)
            for one in scores
        ]

    measured = sort_measure.measure_rows
    monkeypatch.setattr(command, "cross_fit", turned)
    run("sort.order=ascending", "sort.cross_fit=2", "sort.score=excess")
    records, alone = (
        records_of("scores.jsonl", Path(f"outputs/{name}/sort")) for name in ("tuned", "alone")
    )
    assert [record["scores"] for record in records] == [record["scores"] for record in alone]
    ordered = sorted(records, key=lambda record: record["place"])
    scores = [record["cross_fit"]["excess"] for record in ordered]
    assert scores == sorted(scores)
    assert [record["place"] for record in records] != [record["place"] for record in alone]


def test_what_neither_neighbours_nor_models_of_a_cross_fit_expect_decides(
    trained_base, monkeypatch
):
    asked = []

    def turned(run, folder):
        """The base's scores, but each row's target that it expected least is expected."""
        scores = sort_measure.measure_rows(run, folder)
        for one in scores:
            losses = one.loss_N.clone()
            losses[losses.argmax()] = 0
            asked.append(losses)
        return [
            type(one)(losses, one.entropy_N, one.weight_N, one.top_N, one.origin)
            for one, losses in zip(scores, asked, strict=True)
        ]

    found = []
    look_up = Neighbours.look_up
    monkeypatch.setattr(command, "cross_fit", turned)
    monkeypatch.setattr(
        Neighbours, "look_up", lambda *given: found.extend(look_up(*given)) or found
    )
    run(
        *("sort.order=ascending", "sort.cross_fit=2", "sort.also=[]", "sort.drop_share=0.25"),
        "sort.score=unexplained",
    )
    expected = [
        max(min(pair) for pair in zip(losses.tolist(), one.loss_N.tolist(), strict=True))
        for losses, one in zip(asked, found, strict=True)
    ]
    records = records_of("scores.jsonl")
    assert [set(record["scores"]) for record in records] == [set()] * 16
    scores = [record["cross_fit"]["unexplained"] for record in records]
    assert scores == pytest.approx(expected, rel=1e-5)
    gone = {record["row"] for record in records if record["dropped"] is not None}
    assert gone == {row + 1 for row in sorted(range(16), key=lambda row: -scores[row])[:4]}
    assert "cross-fit unexplained" in records[min(gone) - 1]["dropped"]


def test_the_story_shows_the_worst_rows_their_spans_and_the_distribution(trained_base, capfd):
    run("sort.drop_share=0.25")
    shown = capfd.readouterr().out
    assert "Scores of 16 rows" in shown
    assert re.search(r"^ +outlier( +-?[\d.]+){5}$", shown, re.MULTILINE)
    assert "Distribution of outlier" in shown
    suspicious = shown.split("Most suspicious by outlier", 1)[1]
    records = sorted(records_of("scores.jsonl"), key=lambda record: -record["scores"]["outlier"])
    places = re.findall(r"train\.jsonl:(\d+)", suspicious)
    assert [int(place) for place in places] == [record["row"] for record in records[:10]]
    assert "16 rows scored: 12 sorted, 4 dropped" in shown
    assert str(FOLDER / "sorted.jsonl") in shown
    assert "\x1b" not in shown


def test_dropping_every_row_is_refused_with_the_range_of_the_score(trained_base):
    with pytest.raises(YRunnerError, match=r"every row is dropped: each loss is between \d"):
        run("sort.score=loss", "sort.drop_above=-1")


def test_a_training_and_a_sort_share_a_run_folder_and_leave_each_other_alone(trained_base):
    run()
    sorted_rows = results()
    train(TUNED, [], resume=False, overwrite=False)
    report = Path("outputs/tuned/report.html").read_bytes()
    run(overwrite=True)
    assert Path("outputs/tuned/report.html").read_bytes() == report
    train(TUNED, [], resume=False, overwrite=True)
    assert results() == sorted_rows


def test_two_processes_measure_what_one_does(trained_base):
    run("output=outputs/one", "train.batch_size=1")
    run("output=outputs/two", "train.batch_size=1", "sort.processes=2")
    assert len([*Path("outputs/two/sort/measured").iterdir()]) == 2
    one, two = (records_of("scores.jsonl", Path(f"outputs/{name}/sort")) for name in ("one", "two"))
    for record, other in zip(one, two, strict=True):
        assert record["scores"] == pytest.approx(other["scores"], rel=1e-3, abs=1e-4)


@pytest.fixture
def as_forks(monkeypatch):
    """The processes of a sort are forks, which need not import everything again."""
    monkeypatch.setattr(sort_measure, "get_context", lambda _: get_context(START_METHOD))


def test_what_is_wrong_in_one_of_several_processes_is_said_in_a_sentence(trained_base, as_forks):
    recipe = load_recipe(TUNED, ["model.base=nowhere"])
    with pytest.raises(RunError, match="nowhere"):
        measure_together(recipe, Path("scores"), 2, sort_measure.measure_share, print)


def fail(*_):
    raise ValueError("a bug of ours")


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_bug_in_one_of_several_processes_is_told_with_its_traceback(trained_base, as_forks):
    with pytest.raises(RuntimeError, match=r"in fail(.|\n)*a bug of ours"):
        measure_together(load_recipe(TUNED), Path("scores"), 1, fail, print)


def test_a_process_that_is_killed_ends_the_sort(trained_base, as_forks):
    with pytest.raises(RunError, match=r"process 0 of the sort ended with exit code -9\. Free"):
        measure_together(load_recipe(TUNED), Path("scores"), 1, die, print)


def test_the_data_of_a_sort_is_not_replaced_by_its_result(trained_base):
    FOLDER.mkdir(parents=True)
    shutil.copy("train.jsonl", FOLDER / "sorted.jsonl")
    with pytest.raises(RunError, match=r"the data is in .*, and sorting would overwrite"):
        run("data.train=[{file: outputs/tuned/sort/sorted.jsonl}]")


def test_a_model_from_scratch_cannot_judge(project):
    with pytest.raises(YRunnerError, match=r"a model from scratch knows nothing yet"):
        run(recipe=Path("base.yaml"))


def test_files_that_are_read_differently_are_refused(trained_base):
    write_jsonl(Path("other.jsonl"), [{"prompt": "a", "response": "b"}])
    message = r"other\.jsonl: has the format prompt_response, but train\.jsonl has alpaca: .* c"
    with pytest.raises(DataError, match=message):
        run("data.train=[{file: train.jsonl}, {file: other.jsonl}]")
    again = "{file: test.jsonl, columns: {output: output}}"
    with pytest.raises(DataError, match=r"test\.jsonl: has other columns in the recipe than train"):
        run(f"data.train=[{{file: train.jsonl}}, {again}]")


def test_whole_documents_are_refused_with_a_way_out(trained_base):
    Path("a.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError, match=r"with one document each .*Write them as jsonl"):
        run("data.train=[{file: a.txt, document: file}]", "train.stage=cpt")


def test_the_same_recipe_makes_the_same_bytes(trained_base):
    for name in ("one", "two"):
        run(f"output=outputs/{name}", "sort.drop_share=0.2")
    assert results(Path("outputs/one/sort")) == results(Path("outputs/two/sort"))
    assert len(results(Path("outputs/one/sort"))) == len(FILES)


def test_control_c_ends_with_130_and_what_to_do(trained_base, monkeypatch, capfd):
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "measure_rows", interrupted)
    monkeypatch.setattr("sys.argv", ["yrun", "sort", "tuned.yaml", "sort.order=blocks"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert "Run the same command again to resume" in capfd.readouterr().err


def test_a_full_disk_says_what_to_do(trained_base, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ScoreFile, "append", full)
    with pytest.raises(RunError, match=r"the disk is full; .* saved in .*same command again"):
        run()


def test_an_adapter_that_training_goes_on_with_judges_too(trained_base):
    run("output=outputs/plain")
    train(TUNED, ["output=outputs/first"], resume=False, overwrite=False)
    adapter = Path("outputs/first/model").absolute()
    run(f"tuning={{kind: lora, adapter: {adapter}}}")
    plain, tuned = (
        torch.tensor(
            [row["scores"]["loss"] for row in records_of("scores.jsonl", Path(folder) / "sort")]
        )
        for folder in ("outputs/plain", "outputs/tuned")
    )
    assert tuned.mean() < plain.mean(), "it has learnt these rows"
