"""`yrun sort`: from a recipe to its rows in a new order, judged by what models make of them."""

import errno
import gc
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from yrunner.commands.cross_fit import cross_fit
from yrunner.commands.data_files import recipe_sources
from yrunner.commands.environment import describe_environment
from yrunner.commands.sort_corpus import Seen, corpus_rows, decide, deciding_score, judge
from yrunner.commands.sort_measure import measure_rows
from yrunner.commands.sort_report import write_sort_report
from yrunner.commands.sort_results import LeftOut, Sorted, write_results
from yrunner.commands.sort_rows import NOT_TOGETHER, ONE_BY_ONE, check_one_kind, ending_of
from yrunner.commands.sort_story import say_next, say_sorted
from yrunner.commands.sort_worst import mark_span
from yrunner.commands.tokenizer import recipe_tokenizer
from yrunner.commands.train import train_base
from yrunner.commands.train_data import print_left_out, print_rows, read_data
from yrunner.console import progress
from yrunner.data.files import kind_of
from yrunner.data.pipeline import Source
from yrunner.data.prepared import Prepared
from yrunner.data.report import FileReport, as_json
from yrunner.data.unchanged import states_of, unchanged
from yrunner.errors import DataError, RunError, YRunnerError
from yrunner.recipe.load import load_recipe, recipe_to_yaml
from yrunner.recipe.schema import Recipe
from yrunner.reports.token_text import TokenText
from yrunner.run_dir import RunDir, write_json, write_text
from yrunner.scoring.folds import group_copies
from yrunner.scoring.neighbours import look_up
from yrunner.scoring.score_file import row_hashes
from yrunner.sort_dir import SortDir

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


class SortInterrupted(YRunnerError):
    """Ctrl-C; what was measured is kept."""

    exit_code = 128 + signal.SIGINT


def sort(path: Path, overrides: list[str], *, overwrite: bool) -> None:
    """Score the training rows of the recipe at `path`, and write them in a new order.

    Its base is trained first where that is missing. Interrupted and started again, it goes on.
    """
    recipe = load_recipe(path, overrides)
    arguments = shlex.join([str(path), *overrides])
    sources = [source for source in recipe_sources(recipe) if source.purpose == "train"]
    folder = _check(recipe, sources, overwrite=overwrite)
    train_base(recipe)
    tokenizer = recipe_tokenizer(recipe)
    states = states_of(file for source in sources for file in source.files)
    prepared = _read_corpus(recipe, tokenizer)
    reports = _check_formats(sources, prepared)
    with _saying_how_to_go_on(folder.folder):
        _open_folder(recipe, folder, prepared)
        seen = _look(recipe, folder, prepared, tokenizer)
        corpus = _judge(recipe, tokenizer, prepared, seen)
        _write_report(recipe, tokenizer, prepared, corpus, seen, folder)
        with unchanged(states, undo=folder.clear):
            write_results(corpus, folder)
    say_sorted(corpus, folder)
    say_next(arguments, folder, reports[0].format, sources[0].reading)


def _check(recipe: Recipe, sources: Sequence[Source], *, overwrite: bool) -> SortDir:
    """Refuse what cannot be sorted, or would lose something, before any time is spent."""
    if recipe.model.scratch is not None:
        raise YRunnerError(
            "a model from scratch knows nothing yet, so it cannot judge rows",
            remedy="sort with a recipe that has a model.base",
        )
    files = [file for source in sources for file in source.files]
    check_one_kind(files)
    for source in sources:
        if kind_of(source.files[0]) == ".txt" and source.reading.document == "file":
            raise DataError(
                source.files[0],
                "documents that fill whole txt files cannot stand in one sorted file",
                remedy='write them as jsonl, {"text": ...} a line',
            )
    folder = SortDir(RunDir(recipe.run_folder).sort, ending_of(files))
    folder.check(files, overwrite=overwrite)
    return folder


def _check_formats(sources: Sequence[Source], prepared: Prepared) -> list[FileReport]:
    """The reports of the training files. Raises `DataError` where not all rows are read alike."""
    reports = [report for report in prepared.reports if report.purpose == "train"]
    readings = [source.reading for source in sources for _ in source.files]
    first = reports[0]
    for report, reading in zip(reports, readings, strict=True):
        if report.format != first.format:
            difference = f"has the format {report.format}, {first.file.name} has {first.format}"
        elif reading.columns != readings[0].columns:
            difference = f"has other columns in the recipe than {first.file.name}"
        else:
            continue
        raise DataError(report.file, f"{difference}: {NOT_TOGETHER}", remedy=ONE_BY_ONE)
    return reports


def _read_corpus(recipe: Recipe, tokenizer: Any) -> Prepared:
    """The rows, their fate printed; `validation_share` sets none aside, for all are sorted."""
    prepared = read_data(recipe, tokenizer)
    print_rows(recipe, prepared)
    prepared.check(too_long=recipe.data.too_long, invalid=recipe.data.invalid)
    print_left_out(prepared)
    return prepared


def _open_folder(recipe: Recipe, folder: SortDir, prepared: Prepared) -> None:
    folder.clear()
    write_text(folder.recipe, recipe_to_yaml(recipe))
    write_json(folder.environment, describe_environment())
    write_json(folder.data_report, as_json(prepared.reports, prepared.findings))


def _look(recipe: Recipe, folder: SortDir, prepared: Prepared, tokenizer: Any) -> Seen:
    """Let the base look at the rows, its memory of the others, and models that learned those."""
    rows = prepared.train
    base = measure_rows(recipe, tokenizer, rows, folder.measured)
    # A model with a fused head refers to itself: it would stay in memory.
    gc.collect()
    lookups = None
    if recipe.sort.asks_neighbours:
        places = zip(rows.file_E.tolist(), rows.column("rows").tolist(), strict=True)
        groups = group_copies(list(places), row_hashes(rows))
        with progress("asking the neighbours of each row", len(rows)) as advance:
            lookups = []
            for found in look_up(rows, base, groups, recipe.seed):
                lookups.append(found)
                advance(1)
    crossed = None
    if recipe.sort.cross_fit:
        crossed = cross_fit(recipe, folder.cross_fit, prepared, tokenizer)
    return Seen(base, lookups, crossed)


@contextmanager
def _saying_how_to_go_on(folder: Path) -> Iterator[None]:
    """Every score is on the disk as soon as it is known, so nothing has to be saved at an end."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise SortInterrupted(
            f"stopped; what was measured is kept in {folder}",
            remedy="run the same command again to go on",
        ) from error
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        raise RunError(
            f"the disk is full; what was measured is kept in {folder}",
            remedy="free some space, and run the same command again to go on",
        ) from error


def _judge(recipe: Recipe, tokenizer: Any, prepared: Prepared, seen: Seen) -> Sorted:
    rows = corpus_rows(prepared.train)
    verdicts = [judge(row, seen, recipe.sort) for row in rows]
    text = TokenText(tokenizer)
    deciding = deciding_score(recipe.sort)
    reports = [report for report in prepared.reports if report.purpose == "train"]
    return Sorted(
        files=[report.file for report in reports],
        rows=rows,
        verdicts=verdicts,
        worst=[
            None if verdict.worst is None else mark_span(row, verdict.worst, prepared.train, text)
            for row, verdict in zip(rows, verdicts, strict=True)
        ],
        decision=decide(
            recipe.sort, [verdict.named_scores()[deciding] for verdict in verdicts], recipe.seed
        ),
        left_out=[
            LeftOut((number, refusal.origin.row), refusal)
            for number, report in enumerate(reports)
            for refusal in report.refusals
        ],
        deciding=deciding,
    )


def _write_report(
    recipe: Recipe,
    tokenizer: Any,
    prepared: Prepared,
    corpus: Sorted,
    seen: Seen,
    folder: SortDir,
) -> None:
    """The page shows examples: of a row that is split, every part has the scores of the whole."""
    dropped = {row.index: row.reason for row in corpus.decision.dropped}
    row_of = [number for number, row in enumerate(corpus.rows) for _ in row.examples]
    write_sort_report(
        recipe.name,
        tokenizer,
        prepared.train,
        seen,
        corpus.deciding,
        [corpus.verdicts[number].named_scores() for number in row_of],
        {place: dropped[number] for place, number in enumerate(row_of) if number in dropped},
        prepared.findings,
        folder.report,
    )
