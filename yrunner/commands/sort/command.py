"""`yrun sort`: score the training rows of a recipe with models, and write them in a new order."""

import errno
import gc
import json
import shlex
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from yrunner.assembly.dataset import print_left_out, print_rows
from yrunner.assembly.identity import describe_environment, sort_fingerprint
from yrunner.assembly.run import Run
from yrunner.commands.sort.clusters import (
    check_clusters,
    cluster_rows,
    describe_clusters,
    print_clusters,
)
from yrunner.commands.sort.corpus import (
    CorpusRow,
    Seen,
    corpus_rows,
    decide,
    deciding_score,
    judge,
    mark_span,
)
from yrunner.commands.sort.cross_fit import cross_fit, group_copies
from yrunner.commands.sort.marks import file_names, read_marks
from yrunner.commands.sort.pairs import against_by_base, against_by_tuned, sorted_by_margin
from yrunner.commands.sort.report import LeftOut, Sorted, write_results, write_sort_report
from yrunner.commands.sort.score import measure_rows
from yrunner.commands.sort.write import NOT_TOGETHER, ONE_BY_ONE, check_one_kind, ending_of
from yrunner.console import Cell, print_table, progress, say
from yrunner.data.dataset.examples import Pairs
from yrunner.data.dataset.prepare import Source
from yrunner.data.dataset.row_report import FileReport, num_rows
from yrunner.data.dataset.splits import Prepared
from yrunner.data.readers.files import kind_of
from yrunner.data.readers.text import states_of, unchanged
from yrunner.errors import DataError, RunError, YRunnerError
from yrunner.recipe.load import recipe_to_yaml
from yrunner.recipe.schema.recipe import Recipe
from yrunner.reports.sort_page import PageCluster, PageClusters
from yrunner.reports.terminal_plot import block_bar
from yrunner.reports.token_text import TokenText
from yrunner.scoring.clusters import Clusters
from yrunner.scoring.knn import Neighbours
from yrunner.scoring.order import Mark, suspicion
from yrunner.scoring.questions import (
    Contradiction,
    find_contradictions,
    with_contradictions,
)
from yrunner.scoring.rank import outlier_targets, unexplained_losses
from yrunner.scoring.score_file import row_hashes
from yrunner.storage.run_dir import SortDir, write_json, write_text

SHOWN_ROWS = 10
BINS = 12
WIDEST_BAR = 40
PERCENTILES = {"lowest": 0, "10 %": 10, "median": 50, "90 %": 90, "highest": 100}
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


class SortInterrupted(YRunnerError):
    """Ctrl-C; scores so far are saved."""

    exit_code = 128 + signal.SIGINT


def sort(
    path: Path, overrides: list[str], *, overwrite: bool, train_base: Callable[[Run], None]
) -> None:
    """Score the training rows of the recipe at `path`, and write them in a new order.

    `train_base` trains its base if that is missing. An interrupted sort resumes when run again.
    """
    run = Run.load(path, overrides)
    folder = sort_run(run, overwrite=overwrite, prepare=train_base)
    say_next(run, folder)


def sort_run(run: Run, *, overwrite: bool, prepare: Callable[[Run], None]) -> SortDir:
    """Sort the training rows of a run, whose base and own sorted rows `prepare` makes first."""
    asked_for = run.recipe
    if run.recipe.learns_from_pairs:
        run = run.variant(sorted_by_margin(run.recipe))
    if run.sorts:
        prepare(run)  # its rows are known only then
    sources = [source for source in run.sources if source.purpose == "train"]
    folder = _check(run, sources, overwrite=overwrite)
    if not run.sorts:
        prepare(run)
    states = states_of(file for source in sources for file in source.files)
    _read_corpus(run)
    reports = _check_formats(sources, run.dataset)
    examples = run.dataset.train.examples
    rows = corpus_rows(examples)
    names = file_names([report.file for report in reports])
    marks = read_marks(run.recipe.sort.marks, rows, examples, names)
    with _explaining_how_to_resume(folder.folder):
        _open_folder(run, folder, asked_for)
        seen = _look(run, folder)
        clusters = cluster_rows(run.recipe, seen, rows)
        corpus = _judge(run, seen, rows, marks, clusters)
        _write_report(run, corpus, seen, folder)
        with unchanged(states, undo=folder.clear):
            write_results(corpus, folder)
    say_sorted(corpus, folder)
    return folder


def _check(run: Run, sources: Sequence[Source], *, overwrite: bool) -> SortDir:
    """Refuse what cannot be sorted or would overwrite files, before any time is spent."""
    if run.recipe.model.scratch is not None:
        raise YRunnerError(
            "a model from scratch knows nothing yet, so it cannot score rows",
            remedy="sort with a recipe that has a model.base",
        )
    if run.recipe.train.stage == "rl":
        raise YRunnerError(
            "train.stage rl learns from prompts, which have no answers to score",
            remedy="sort rows with answers: set train.stage to sft and loss.kind to plain",
        )
    check_clusters(run.recipe)
    files = [file for source in sources for file in source.files]
    check_one_kind(files)
    for source in sources:
        if kind_of(source.files[0]) == ".txt" and source.reading.document == "file":
            raise DataError(
                source.files[0],
                "txt files with one document each cannot be sorted into one file",
                remedy='write them as jsonl, one {"text": ...} per line',
            )
    folder = SortDir(run.folder.sort, ending_of(files))
    folder.check(files, overwrite=overwrite)
    return folder


def _check_formats(sources: Sequence[Source], prepared: Prepared[Any]) -> list[FileReport]:
    """The reports of the training files. Raises `DataError` if they are read differently."""
    reports = [report for report in prepared.reports if report.purpose == "train"]
    readings = [source.reading for source in sources for _ in source.files]
    first = reports[0]
    for report, reading in zip(reports, readings, strict=True):
        if report.format != first.format:
            difference = f"has the format {report.format}, but {first.file.name} has {first.format}"
        elif reading.columns != readings[0].columns:
            difference = f"has other columns in the recipe than {first.file.name}"
        else:
            continue
        raise DataError(report.file, f"{difference}: {NOT_TOGETHER}", remedy=ONE_BY_ONE)
    return reports


def _read_corpus(run: Run) -> None:
    """Print row counts; all rows are sorted, so `validation_share` has no effect."""
    print_rows(run.dataset, run.folder.prepared)
    data = run.recipe.data
    run.dataset.check(too_long=data.too_long, invalid=data.invalid, altered=data.altered)
    print_left_out(run.dataset)


def _open_folder(run: Run, folder: SortDir, asked_for: Recipe) -> None:
    """Empty the folder; whether it is stale is decided by the recipe that was asked for."""
    prepared = run.dataset
    folder.clear()
    write_text(folder.recipe, recipe_to_yaml(run.recipe))
    write_json(folder.fingerprint, sort_fingerprint(asked_for))
    write_json(folder.environment, describe_environment() | {"computed_in": run.looks_in})
    write_json(folder.data_report, prepared.as_json())


def _look(run: Run, folder: SortDir) -> Seen:
    """Score the rows with the base, with kNN lookups, and with cross-fitted models."""
    if run.recipe.learns_from_pairs:
        return _look_at_answers(run, folder)
    recipe, rows = run.recipe, run.dataset.train
    base = measure_rows(run, folder.measured)
    # A model with a fused head refers to itself; free it.
    gc.collect()
    neighbours = lookups = deviations = crossed = crossed_deviations = None
    contradictions: dict[int, Contradiction] = {}
    if recipe.sort.asks_neighbours:
        places = zip(rows.file_E.tolist(), rows.column("rows").tolist(), strict=True)
        groups = group_copies(list(places), row_hashes(rows))
        neighbours = Neighbours(rows, base, groups, recipe.seed)
        with progress("kNN lookups, rows", len(rows)) as advance:
            lookups = neighbours.look_up(advance)
        near = [one.loss_N for one in lookups]
        contradictions = find_contradictions(rows, groups)
        if contradictions:
            number = f"{len(contradictions):,}"
            say(f"rows that contradict another on their subject: {number} (in pairs on the page)")
        deviations = _deviations(neighbours, [one.loss_N for one in base], near, contradictions)
    if recipe.sort.cross_fit:
        crossed = cross_fit(run, folder.cross_fit)
        if neighbours is not None and lookups is not None:
            tuned = [one.loss_N for one in crossed]
            # What the tuned model or the neighbours expect is no contradiction.
            both = zip(tuned, [one.loss_N for one in lookups], strict=True)
            either = [unexplained_losses(*pair) for pair in both]
            crossed_deviations = _deviations(neighbours, tuned, either, contradictions)
    return Seen(base, lookups, crossed, deviations, crossed_deviations, contradictions)


def _look_at_answers(run: Run, folder: SortDir) -> Seen:
    """Score better and worse answers with the base, and with cross-fitted models."""
    base = measure_rows(run, folder.measured)
    gc.collect()
    rows = run.dataset.train
    ratings_S, alone = rows.examples.column("ratings"), not isinstance(rows, Pairs)
    against = against_by_base(ratings_S, base, alone=alone)
    if not run.recipe.sort.cross_fit:
        return Seen(base, None, None, against=against)
    crossed = cross_fit(run, folder.cross_fit)
    crossed_against = against_by_tuned(ratings_S, base, crossed, alone=alone)
    return Seen(base, None, crossed, against=against, crossed_against=crossed_against)


def _deviations(
    neighbours: Neighbours,
    losses: Sequence[Tensor],
    knn_losses: Sequence[Tensor],
    contradictions: Mapping[int, Contradiction],
) -> list[Tensor]:
    """`outlier_targets` of each example, with its contradictions."""
    with progress("comparing with similar places, rows", 2 * len(losses)) as advance:
        own, near = (neighbours.compare(of_rows, advance) for of_rows in (losses, knn_losses))
    found = outlier_targets(own, near, losses, knn_losses)
    return with_contradictions(found, contradictions)


@contextmanager
def _explaining_how_to_resume(folder: Path) -> Iterator[None]:
    """Scores are written as they come, so nothing has to be saved here."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise SortInterrupted(
            f"stopped; scores so far are saved in {folder}",
            remedy="run the same command again to resume",
        ) from error
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        raise RunError(
            f"the disk is full; scores so far are saved in {folder}",
            remedy="free some space, and run the same command again to resume",
        ) from error


def _judge(
    run: Run,
    seen: Seen,
    rows: list[CorpusRow],
    marks: Mapping[int, Mark],
    clusters: Clusters | None,
) -> Sorted:
    recipe, prepared = run.recipe, run.dataset
    examples = prepared.train.examples
    verdicts = [judge(row, seen, recipe.sort) for row in rows]
    text = TokenText(run.tokenizer)
    deciding = deciding_score(recipe.sort)
    reports = [report for report in prepared.reports if report.purpose == "train"]
    scores = [verdict.named_scores()[deciding] for verdict in verdicts]
    return Sorted(
        files=[report.file for report in reports],
        rows=rows,
        verdicts=verdicts,
        worst=[
            None if verdict.worst is None else mark_span(row, verdict.worst, examples, text)
            for row, verdict in zip(rows, verdicts, strict=True)
        ],
        decision=decide(recipe.sort, scores, marks, recipe.seed, clusters),
        left_out=[
            LeftOut((number, refusal.origin.row), refusal)
            for number, report in enumerate(reports)
            for refusal in report.refusals
        ],
        deciding=deciding,
        marks=marks,
        clusters=clusters,
        cluster_facts=[]
        if clusters is None
        else describe_clusters(clusters, deciding, scores, rows, examples, run.tokenizer),
    )


def _write_report(run: Run, corpus: Sorted, seen: Seen, folder: SortDir) -> None:
    """Write the page: the parts of a split row are listed one by one, with the scores of the row,
    and the answers of a pair together."""
    dropped = {row.index: row.reason for row in corpus.decision.dropped}
    groups = [range(place, place + 1) for row in corpus.rows for place in row.examples]
    row_of = [number for number, row in enumerate(corpus.rows) for _ in row.examples]
    if run.recipe.learns_from_pairs:
        groups, row_of = [row.examples for row in corpus.rows], [*range(len(corpus.rows))]
    write_sort_report(
        run.recipe.name,
        run.tokenizer,
        run.dataset.train.examples,
        groups,
        seen,
        corpus.deciding,
        [corpus.verdicts[number].named_scores() for number in row_of],
        {place: dropped[number] for place, number in enumerate(row_of) if number in dropped},
        run.dataset.findings,
        folder.report,
        marks={
            place: corpus.marks[number]
            for place, number in enumerate(row_of)
            if number in corpus.marks
        },
        worst_and_sound=corpus.worst_and_sound(),
        clusters=_on_the_page(corpus, row_of),
    )


def _on_the_page(corpus: Sorted, row_of: Sequence[int]) -> PageClusters | None:
    """The clusters of the rows that the page lists; `row_of`: the row of each."""
    if corpus.clusters is None:
        return None
    first = {row: place for place, row in reversed([*enumerate(row_of)])}
    return PageClusters(
        numbers=[corpus.clusters.numbers[row] for row in row_of],
        plane=[corpus.clusters.plane[row] for row in row_of],
        clusters=[
            PageCluster(
                fact.number,
                fact.size,
                fact.num_suspicious,
                fact.words,
                [first[row] for row in fact.typical],
            )
            for fact in corpus.cluster_facts
        ],
    )


def say_sorted(corpus: Sorted, folder: SortDir) -> None:
    """Print the scores, the most suspicious rows, row counts and the paths of the results."""
    decisive = [corpus.decisive(index) for index in range(len(corpus.rows))]
    _print_percentiles(corpus)
    _print_distribution(corpus.deciding, decisive)
    _print_suspicious(corpus, decisive)
    if corpus.clusters is not None:
        order = corpus.decision.order
        print_clusters(
            corpus.cluster_facts, Counter(corpus.clusters.numbers[index] for index in order)
        )
    _say_sound(corpus, folder)
    _say_counts(corpus)
    for what, path in (
        ("sorted", folder.sorted),
        ("dropped", folder.dropped),
        ("reasons", folder.reasons),
        ("scores", folder.scores),
        ("report", folder.report),
    ):
        if path.exists():
            say(f"{f'{what}:':<9}{path}")


def say_next(run: Run, folder: SortDir) -> None:
    """Print the command that trains on the sorted rows."""
    report = next(report for report in run.dataset.reports if report.purpose == "train")
    reading = next(source for source in run.sources if source.purpose == "train").reading
    entry: dict[str, Any] = {"file": str(folder.sorted), "format": report.format}
    if reading.columns:
        entry["columns"] = dict(reading.columns)
    changes = (
        "train.order=as_written",
        f"data.train={json.dumps([entry], ensure_ascii=False)}",
    )
    say("")
    say(f"yrun train {run.options.arguments} {shlex.join(changes)}    # train in this order")


def _print_percentiles(corpus: Sorted) -> None:
    columns: dict[str, list[float]] = {}
    for verdict in corpus.verdicts:
        for name, value in verdict.named_scores().items():
            columns.setdefault(name, []).append(value)
    rows: list[tuple[Cell, ...]] = [
        (name, *np.percentile(values, [*PERCENTILES.values()]).tolist())
        for name, values in columns.items()
    ]
    print_table(f"Scores of {num_rows(len(corpus.rows))}", ("score", *PERCENTILES), rows)


def _print_distribution(name: str, scores: Sequence[float]) -> None:
    """A histogram of the score that decides."""
    counts, borders = np.histogram(scores, BINS if max(scores) > min(scores) else 1)
    most = int(counts.max())
    rows = [
        (f"{start:.4g} to {end:.4g}", int(count), block_bar(int(count), most, WIDEST_BAR))
        for count, start, end in zip(counts, borders[:-1], borders[1:], strict=True)
    ]
    print_table(f"Distribution of {name}", (name, "rows", ""), rows)


def _print_suspicious(corpus: Sorted, scores: Sequence[float]) -> None:
    worst = sorted(range(len(scores)), key=lambda index: -suspicion(corpus.deciding, scores[index]))
    rows = []
    for index in worst[:SHOWN_ROWS]:
        place, text = corpus.rows[index].place, corpus.worst[index]
        rows.append(
            (
                f"{corpus.name(place)}:{place[1]}",
                scores[index],
                "–" if text is None else text.line(),
            )
        )
    title = f"Most suspicious by {corpus.deciding}, the worst span in brackets"
    print_table(title, ("row", corpus.deciding, "worst span"), rows)


def _say_sound(corpus: Sorted, folder: SortDir) -> None:
    """Say how many of the most suspicious rows are probably sound."""
    expected = corpus.worst_and_sound()
    if expected is not None:
        number, sound = expected
        say(
            f"of the {number:,} most suspicious rows about {sound:,} are probably sound by chance, "
            "and sound rows that a faulty one contradicts come on top: read them before you drop "
            f"them, and mark them in {folder.report.name}"
        )


def _say_counts(corpus: Sorted) -> None:
    decision = corpus.decision
    say(
        f"{num_rows(len(corpus.rows))} scored: {len(decision.order):,} sorted, "
        f"{len(decision.dropped):,} dropped"
    )
    if corpus.left_out:
        say(f"{num_rows(len(corpus.left_out))} cannot be used and are among the dropped ones")
