"""Measurements of a run: the results of its checkpoints, and their figures."""

import json
from dataclasses import dataclass
from pathlib import Path

from yrunner.evaluation.results import (
    Difference,
    ModelPairs,
    ModelResults,
    faults_difference,
    side_difference,
    side_score,
)
from yrunner.storage.run_dir import read_json, write_text

SIDES = ("domain", "general", "quality")
REPETITIONS = ("repetition_3", "repetition_4")


def figures_of(results: ModelResults) -> dict[str, float]:
    """The figure of each measure.

    `domain`, `general`, `quality`: the mean over the tasks of a side. `memorised`: the share of
    faulty rows whose wrong answer the model gives; `corrected`: of those that it answers correctly.
    `repetition_3`, `repetition_4`: repeated n-grams in everything that it wrote.
    """
    figures = {side: side_score(results, side) for side in SIDES}
    if results.faults is not None:
        figures["memorised"] = results.faults.memorised
        figures["corrected"] = results.faults.corrected
    figures |= {name: results.quality.get(name) for name in REPETITIONS}
    return {measure: figure for measure, figure in figures.items() if figure is not None}


def difference_in(measure: str, pairs: ModelPairs) -> Difference | None:
    """Difference of a side, or of the memorised faults, over pairs of models."""
    return faults_difference(pairs) if measure == "memorised" else side_difference(pairs, measure)


@dataclass(frozen=True)
class Point:
    """The results of a run after `step` updates."""

    step: int
    results: ModelResults

    @property
    def figures(self) -> dict[str, float]:
        """See `figures_of`."""
        return figures_of(self.results)


@dataclass(frozen=True)
class Measurement:
    """The points of a run, by step."""

    key: str
    """See `measure_key`."""
    points: tuple[Point, ...] = ()
    is_complete: bool = False

    @property
    def steps(self) -> list[int]:
        """The updates of the points."""
        return [point.step for point in self.points]

    def save(self, path: Path) -> None:
        """Write it as JSON on one line: it has an answer for each question."""
        points = [{"step": point.step, "results": point.results.to_json()} for point in self.points]
        content = {"key": self.key, "complete": self.is_complete, "points": points}
        write_text(path, json.dumps(content, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Measurement | None":
        """Read what `save` wrote; None if there is no file."""
        if not path.exists():
            return None
        content = read_json(path)
        points = tuple(
            Point(point["step"], ModelResults.from_json(point["results"]))
            for point in content["points"]
        )
        return cls(content["key"], points, content["complete"])
