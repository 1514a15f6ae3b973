"""Prepared data is found again when nothing has changed, and never when something has."""

import errno
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import pytest

from tests.conftest import questions, write_jsonl
from yrunner.data.chat import template
from yrunner.data.dataset import cache as cache_module
from yrunner.data.dataset.cache import Cache
from yrunner.data.dataset.prepare import Rules, Source, prepare
from yrunner.data.dataset.splits import Prepared
from yrunner.data.formats.formats import Reading
from yrunner.errors import RunError
from yrunner.models.scratch import train_tokenizer

RULES = Rules(max_length=200)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    rows: list[Any] = [{"instruction": ask, "output": answer} for ask, answer in questions(12)]
    rows[4] = {"instruction": "no answer"}
    return Source((write_jsonl(tmp_path / "rows.jsonl", rows),))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / ".prepared")


def found(prepared: Prepared) -> bool:
    return prepared.reports[0].from_cache


def test_the_second_time_everything_is_found_and_equal(
    source: Source, cache: Cache, capitals_tokenizer: Any
) -> None:
    first = prepare([source], capitals_tokenizer, RULES, cache)
    second = prepare([source], capitals_tokenizer, RULES, cache)
    assert (found(first), found(second)) == (False, True)
    assert list(second.train) == list(first.train)
    assert second.reports[0].refusals == first.reports[0].refusals
    assert replace(second.reports[0], from_cache=False) == first.reports[0]
    assert second.findings == first.findings


@pytest.mark.parametrize(
    "rules",
    [
        replace(RULES, max_length=199),
        replace(RULES, too_long="cut"),
        replace(RULES, too_long="split"),
        replace(RULES, system="Be short."),
        replace(RULES, targets="all"),
    ],
    ids=lambda rules: str(rules)[:60],
)
def test_every_option_that_decides_prepares_anew(
    source: Source, cache: Cache, capitals_tokenizer: Any, rules: Rules
) -> None:
    prepare([source], capitals_tokenizer, RULES, cache)
    assert not found(prepare([source], capitals_tokenizer, rules, cache))
    assert found(prepare([source], capitals_tokenizer, rules, cache))


@pytest.mark.parametrize("rules", [replace(RULES, invalid="drop"), replace(RULES, too_long="drop")])
def test_what_stops_a_run_does_not_change_the_examples(
    source: Source, cache: Cache, capitals_tokenizer: Any, rules: Rules
) -> None:
    prepare([source], capitals_tokenizer, RULES, cache)
    assert found(prepare([source], capitals_tokenizer, rules, cache))


def test_other_bytes_columns_or_format_prepare_anew(
    source: Source, cache: Cache, capitals_tokenizer: Any
) -> None:
    prepare([source], capitals_tokenizer, RULES, cache)
    for reading in (Reading("alpaca"), Reading(columns={"system": "tone"})):
        assert not found(
            prepare([replace(source, reading=reading)], capitals_tokenizer, RULES, cache)
        )
    file = source.files[0]
    before = file.stat()
    file.write_text(file.read_text().replace("question 3", "question X"))
    # The same size and time, as an editor or a copy may leave them.
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not found(prepare([source], capitals_tokenizer, RULES, cache))


def test_another_tokenizer_or_template_prepares_anew(
    source: Source, cache: Cache, capitals_tokenizer: Any
) -> None:
    prepare([source], capitals_tokenizer, RULES, cache)
    other = train_tokenizer(["other words make other pieces"] * 3, vocab_size=310)
    assert not found(prepare([source], other, RULES, cache))
    template = capitals_tokenizer.chat_template
    try:
        capitals_tokenizer.chat_template = template + "{# changed #}"
        assert not found(prepare([source], capitals_tokenizer, RULES, cache))
    finally:
        capitals_tokenizer.chat_template = template
    assert found(prepare([source], capitals_tokenizer, RULES, cache))


def test_other_code_prepares_anew(
    source: Source, cache: Cache, capitals_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare([source], capitals_tokenizer, RULES, cache)
    monkeypatch.setattr(cache_module, "_code_version", lambda: "tomorrow's")
    assert not found(prepare([source], capitals_tokenizer, RULES, cache))


def test_the_same_content_under_another_name_is_found_and_reported_under_that_name(
    source: Source, cache: Cache, capitals_tokenizer: Any, tmp_path: Path
) -> None:
    prepare([source], capitals_tokenizer, RULES, cache)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(source.files[0].read_bytes())
    prepared = prepare([Source((copy,))], capitals_tokenizer, RULES, cache)
    assert found(prepared)
    assert prepared.train[0].origin.file == copy
    assert prepared.reports[0].refusals[0].origin.file == copy


@pytest.mark.parametrize(
    "damaged",
    [lambda content: content[:-4], lambda content: b"\xff\x7f" + content[2:]],
    ids=["shorter", "an id outside the vocabulary"],
)
def test_a_damaged_entry_is_prepared_anew(
    source: Source, cache: Cache, capitals_tokenizer: Any, damaged: Callable[[bytes], bytes]
) -> None:
    first = list(prepare([source], capitals_tokenizer, RULES, cache).train)
    tokens = next(cache.folder.glob("*/tokens.bin"))
    tokens.write_bytes(damaged(tokens.read_bytes()))
    again = prepare([source], capitals_tokenizer, RULES, cache)
    assert not found(again)
    assert list(again.train) == first
    assert found(prepare([source], capitals_tokenizer, RULES, cache))


def test_a_run_that_is_killed_half_way_leaves_no_entry(
    source: Source, cache: Cache, capitals_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("yrunner.data.dataset.prepare.tokenize_chunks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare([source], capitals_tokenizer, RULES, cache)
    assert list(cache.folder.iterdir()) == []
    assert not found(prepare([source], capitals_tokenizer, RULES, cache))


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    source: Source, cache: Cache, capitals_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("yrunner.data.dataset.examples.np.savez", full)
        with pytest.raises(RunError, match=r"the disk is full: prepared data .* Free some"):
            prepare([source], capitals_tokenizer, RULES, cache)
    assert list(cache.folder.iterdir()) == []


def test_what_a_killed_process_left_is_removed_after_a_day_and_unused_entries_after_thirty(
    source: Source, cache: Cache, capitals_tokenizer: Any
) -> None:
    prepare([source], capitals_tokenizer, RULES, cache)
    entry = next(cache.folder.iterdir())
    abandoned = cache.folder / ".partial-killed"
    abandoned.mkdir()
    two_days_ago, two_months_ago = (time.time() - days * 24 * 3600 for days in (2, 60))
    os.utime(abandoned, (two_days_ago, two_days_ago))
    os.utime(entry / "report.json", (two_months_ago, two_months_ago))
    prepare([source], capitals_tokenizer, replace(RULES, max_length=150), cache)
    assert not abandoned.exists()
    assert not entry.exists()


def test_an_entry_that_is_used_stays(source: Source, cache: Cache, capitals_tokenizer: Any) -> None:
    prepare([source], capitals_tokenizer, RULES, cache)
    entry = next(cache.folder.iterdir())
    two_months_ago = time.time() - 60 * 24 * 3600
    os.utime(entry / "report.json", (two_months_ago, two_months_ago))
    assert found(prepare([source], capitals_tokenizer, RULES, cache))
    prepare([source], capitals_tokenizer, replace(RULES, max_length=150), cache)
    assert entry.exists()


def test_two_runs_can_prepare_the_same_data_at_once(
    source: Source, cache: Cache, capitals_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(prepare([source], capitals_tokenizer, RULES, Cache(cache.folder / "x")).train)
    # Runs are processes; here they are threads, which share transformers' compiled template.
    one_at_a_time, render = Lock(), template.render_jinja_template

    def render_alone(**options: Any) -> Any:
        with one_at_a_time:
            return render(**options)

    monkeypatch.setattr(template, "render_jinja_template", render_alone)
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(prepare, [source], capitals_tokenizer, RULES, cache) for _ in range(8)]
        assert all(list(run.result().train) == expected for run in runs)
    names = [path.name for path in cache.folder.iterdir() if path.name != "x"]
    assert len(names) == 1
