"""The page of `yrun sort` is filled with the rows as they are, and with many heat maps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import write_jsonl
from yrunner.commands.sort import report as sort_report
from yrunner.commands.sort.corpus import Seen
from yrunner.commands.sort.report import write_sort_report
from yrunner.data.dataset.cache import Cache
from yrunner.data.dataset.prepare import Rules, Source, prepare
from yrunner.data.dataset.splits import Prepared
from yrunner.scoring.knn import Lookup
from yrunner.scoring.measure import TokenScores
from yrunner.scoring.questions import Contradiction
from yrunner.scoring.rank import SCORES, score_row

NUM_ROWS = 30


@pytest.fixture
def prepared(tmp_path: Path, capitals_tokenizer: Any) -> Prepared:
    rows = [
        {"instruction": f"Capital of land {number // 2}?", "output": f"Town {number}"}
        for number in range(NUM_ROWS)
    ]
    source = Source((write_jsonl(tmp_path / "train.jsonl", rows),))
    rules = Rules(max_length=100, system="Be short.")
    return prepare([source], capitals_tokenizer, rules, Cache(tmp_path / "cache"))


@pytest.fixture
def scores(prepared: Prepared) -> list[TokenScores]:
    torch.manual_seed(3)
    found = []
    for example in prepared.train:
        loss_N, entropy_N, weight_N = torch.rand(3, len(example.target_positions)) * 4
        top_N = torch.zeros(len(loss_N), dtype=torch.long)
        found.append(TokenScores(loss_N, entropy_N, weight_N, top_N, example.origin))
    return found


def write(
    prepared: Prepared,
    tokenizer: Any,
    scores: list[TokenScores],
    path: Path,
    deciding: str = "excess",
    lookups: list[Lookup] | None = None,
    deviations: list[torch.Tensor] | None = None,
    contradictions: dict[int, Contradiction] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """The rows and the heat maps on the page."""
    row_scores = [score_row(of_row.loss_N, of_row.entropy_N, SCORES) for of_row in scores]
    for of_row in row_scores:
        of_row.setdefault(deciding, -of_row["excess"])
    write_sort_report(
        "capitals",
        tokenizer,
        prepared.train,
        [range(place, place + 1) for place in range(len(prepared.train))],
        Seen(scores, lookups, None, deviations, contradictions=contradictions or {}),
        deciding,
        row_scores,
        {4: "excess 2 is above 1 (sort.drop_above)"},
        prepared.findings,
        path,
    )
    page = path.read_text("utf-8")
    parts = [
        page.split(f'<script type="application/json" id="{name}">')[1].split("</script>")[0]
        for name in ("rows", "maps")
    ]
    return json.loads(parts[0]), parts[1].split("\n")


def test_each_row_is_there_with_its_place_its_text_and_its_scores(
    prepared: Prepared, capitals_tokenizer: Any, scores: list[TokenScores], tmp_path: Path
) -> None:
    rows, maps = write(prepared, capitals_tokenizer, scores, tmp_path / "report.html")
    assert rows["files"] == ["train.jsonl"]
    assert rows["number"] == list(range(1, NUM_ROWS + 1))
    assert "Capital of land 3?" in rows["text"][7]
    assert rows["text"][7].endswith("Town 7")
    assert "Be short." not in rows["text"][7], "what all rows begin with says nothing"
    means = [float(of_row.loss_N.double().mean()) for of_row in scores]
    assert rows["loss"] == pytest.approx(means, rel=1e-3)
    assert list(rows["scores"]) == list(SCORES)
    assert rows["score"] == "excess"
    assert list(rows["dropped"]) == ["4"]
    assert all(maps)


def test_conflicting_answers_are_shown_side_by_side(
    prepared: Prepared, capitals_tokenizer: Any, scores: list[TokenScores], tmp_path: Path
) -> None:
    rows, _ = write(prepared, capitals_tokenizer, scores, tmp_path / "report.html")
    conflicts = [pair["rows"] for pair in rows["pairs"] if pair["kind"] == "conflict"]
    assert sorted(conflicts) == [[row, row + 1] for row in range(0, NUM_ROWS, 2)]
    assert "different answers to the same prompt" in (tmp_path / "report.html").read_text("utf-8")


def test_a_cross_fit_decides_which_rows_are_suspicious(
    prepared: Prepared, capitals_tokenizer: Any, scores: list[TokenScores], tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    rows, _ = write(prepared, capitals_tokenizer, scores, path, "cross-fit excess")
    assert rows["score"] == "cross-fit excess"
    assert "cross-fit similarity" not in rows["low"]
    assert rows["low"] == ["similarity", "correlation"]


def test_what_other_rows_say_is_told_of_each_target(
    prepared: Prepared, capitals_tokenizer: Any, scores: list[TokenScores], tmp_path: Path
) -> None:
    lookups = []
    for example in prepared.train:
        targets = torch.tensor([example.input_ids[place] for place in example.target_positions])
        suggested_N = torch.full_like(targets, -1)
        suggested_N[0] = targets[1]
        against_N = torch.full_like(targets, -1)
        lookups.append(Lookup(torch.full((len(targets),), 0.5), suggested_N, against_N))
    path = tmp_path / "report.html"
    _, maps = write(prepared, capitals_tokenizer, scores, path, "knn_loss", lookups)
    row = json.loads(maps[3])
    assert set(row["knn_loss"]) == {50}, "hundredths of a nat"
    assert list(row["told"]) == ["0"]
    assert "prediction by nearest rows" in path.read_text("utf-8")
    _, maps = write(prepared, capitals_tokenizer, scores, path)
    assert "told" not in json.loads(maps[3])
    assert (
        "prediction by nearest rows"
        not in path.read_text("utf-8").split("<template")[1].split("</temp")[0]
    )


def test_rows_that_contradict_each_other_are_shown_with_both_once(
    prepared: Prepared, capitals_tokenizer: Any, scores: list[TokenScores], tmp_path: Path
) -> None:
    """Each pair once, the most unexpected first; not what is a conflict already."""
    against = {5: 9, 9: 5, 12: 20, 7: 6}
    lookups, deviations = [], []
    for index, example in enumerate(prepared.train):
        targets = torch.tensor([example.input_ids[place] for place in example.target_positions])
        suggested_N, against_N = torch.full_like(targets, -1), torch.full_like(targets, -1)
        deviation_N = torch.zeros(len(targets))
        if index in against:
            suggested_N[1], against_N[1] = targets[0], against[index]
            deviation_N[1] = index
        lookups.append(Lookup(torch.full((len(targets),), 0.5), suggested_N, against_N))
        deviations.append(deviation_N)
    # Too expected to be a contradiction.
    lookups[2].against_N[0] = 3
    path = tmp_path / "report.html"
    rows, _ = write(prepared, capitals_tokenizer, scores, path, "outlier", lookups, deviations)
    pairs = [pair for pair in rows["pairs"] if pair["kind"] == "contradiction"]
    # Rows 6 and 7 have one question: they are a conflict.
    assert [pair["rows"] for pair in pairs] == [[12, 20], [9, 5]]
    example = prepared.train[12]
    places = list(example.target_positions)
    first, second = (capitals_tokenizer.decode([example.input_ids[at]]) for at in places[:2])
    assert f"⟦{second}⟧ / ⟦{first}⟧" in pairs[0]["note"]
    assert "Town 12" in pairs[0]["texts"][0]
    assert "Town 20" in pairs[0]["texts"][1]


def test_rows_that_answer_nearly_alike_are_shown_with_what_both_say(
    prepared: Prepared, capitals_tokenizer: Any, scores: list[TokenScores], tmp_path: Path
) -> None:
    """The strongest contradiction first; its other row says the same of it."""
    ids = [
        [example.input_ids[place] for place in example.target_positions]
        for example in prepared.train
    ]
    contradictions = {
        row: Contradiction(other, strength, (1,), (ids[row][1],), (ids[other][1],))
        for row, other, strength in ((2, 8, 0.6), (8, 2, 0.5), (10, 20, 0.9))
    }
    path = tmp_path / "report.html"
    rows, _ = write(prepared, capitals_tokenizer, scores, path, contradictions=contradictions)
    pairs = [pair for pair in rows["pairs"] if pair["kind"] == "contradiction"]
    assert [pair["rows"] for pair in pairs] == [[10, 20], [2, 8]]
    said, instead = (capitals_tokenizer.decode([ids[row][1]]) for row in (10, 20))
    assert f"⟦{said}⟧ / ⟦{instead}⟧" in pairs[0]["note"]
    assert "Town 10" in pairs[0]["texts"][0]


def test_without_room_for_all_heat_maps_the_most_suspicious_and_a_spread_have_theirs(
    prepared: Prepared,
    capitals_tokenizer: Any,
    scores: list[TokenScores],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    most = int(prepared.train.lengths.sum()) // 3
    monkeypatch.setattr(sort_report, "MOST_MAPPED_TOKENS", most)
    rows, maps = write(prepared, capitals_tokenizer, scores, tmp_path / "report.html")
    falling = sorted(range(NUM_ROWS), key=lambda row: -rows["scores"]["excess"][row])
    has_map = [bool(maps[row]) for row in falling]
    first = has_map.index(False)
    assert NUM_ROWS // 8 <= first <= NUM_ROWS // 5
    assert any(has_map[-5:]), "some rows beyond suspicion can be looked at too"
    tokens = sum(int(prepared.train.lengths[row]) for row in falling if maps[row])
    assert 0.7 * most <= tokens <= 1.3 * most
