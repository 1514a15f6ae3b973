"""compare.json: every figure of an experiment, for programs."""

from collections.abc import Mapping
from typing import Any

from yrunner.commands.compare_details import (
    Details,
    detail_spreads,
    fault_shares,
    task_shares,
)
from yrunner.commands.compare_figures import (
    Chosen,
    at_domain_accuracy,
    at_the_end,
    differences,
    forgetting,
    measure_spread,
)
from yrunner.commands.compare_points import Point
from yrunner.commands.compare_tables import SET_APART, Experiment


def as_json(experiment: Experiment) -> dict[str, Any]:
    """Each arm with its points by seed, and what is made of them at the end and at equal accuracy.

    Shares, not percent. `minus_the_first` holds the mean difference to the first arm and the
    ends of its 95 % interval, as `eval.json` does.
    """
    end = at_the_end(experiment.curves)
    equal = at_domain_accuracy(experiment.curves, experiment.domain_accuracy)
    return {
        "name": experiment.name,
        "seeds": list(experiment.seeds),
        "arms": {
            arm.name: {
                "changes": dict(arm.changes),
                "updates": experiment.plans[arm.name].updates,
                "targets": experiment.plans[arm.name].targets,
                "rows": experiment.plans[arm.name].rows,
                "base": _means(experiment, experiment.bases[arm.name]),
                "seeds": {
                    str(seed): [_means(experiment, point) for point in points]
                    for seed, points in experiment.curves[arm.name].items()
                },
            }
            for arm in experiment.arms
        },
        "domain_accuracy": experiment.domain_accuracy,
        "at_the_end": _chosen_json(experiment, end),
        "at_domain_accuracy": _chosen_json(experiment, equal),
        "notes": list(experiment.notes),
        "failures": {name: failure.message for name, failure in experiment.failures.items()},
    }


def _means(experiment: Experiment, point: Point) -> dict[str, float]:
    return {"step": point.step, **{name: point.figures[name] for name in experiment.measures}}


def _chosen_json(experiment: Experiment, chosen: Chosen) -> dict[str, Any]:
    apart = {
        measure: differences(chosen, measure)
        for measure in SET_APART
        if measure in experiment.measures
    }
    found: dict[str, Any] = {}
    for arm, points in chosen.items():
        spreads = {name: measure_spread(points, name) for name in experiment.measures}
        spreads["forgetting"] = forgetting(points, experiment.bases[arm])
        found[arm] = {
            "steps": {str(seed): point.step for seed, point in points.items()},
            "figures": {name: vars(each) for name, each in spreads.items() if each},
            "tasks": _details_json(points, task_shares),
            "memorised_by_kind": _details_json(points, fault_shares),
            "minus_the_first": {
                measure: difference.as_json()
                for measure, by_arm in apart.items()
                if (difference := by_arm.get(arm)) is not None
            },
        }
    return found


def _details_json(points: Mapping[int, Point], details: Details) -> dict[str, Any]:
    return {name: vars(each) for name, each in detail_spreads(points, details).items()}
