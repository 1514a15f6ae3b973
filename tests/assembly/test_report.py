"""Every kind of loss is drawn with the curves that its weight has."""

import math
from typing import Any

import pytest
from pydantic import TypeAdapter

from yrunner.assembly.report import shown_entropies, weight_plot
from yrunner.losses.nlirg import zone_edges
from yrunner.recipe.schema.recipe import Loss


def loss_of(kind: str, **options: Any) -> Any:
    return TypeAdapter(Loss).validate_python({"kind": kind, **options})


@pytest.mark.parametrize("kind", ["plain", "nlirg", "dft"])
def test_a_weight_that_depends_on_the_loss_alone_has_one_curve_without_a_legend(kind: str) -> None:
    assert len(shown_entropies(loss_of(kind))) == 1
    assert "entropy" not in weight_plot(loss_of(kind), before=[1.0])


@pytest.mark.parametrize("kind", ["nlirg_entropy", "eaft"])
def test_a_weight_that_depends_on_the_entropy_has_a_curve_for_each_that_is_named(kind: str) -> None:
    entropies = shown_entropies(loss_of(kind))
    svg = weight_plot(loss_of(kind), after=[1.0, 20.0])
    assert len(entropies) == 3
    assert all(name in svg for name in entropies)


def test_the_entropies_of_eaft_are_within_those_of_twenty_tokens() -> None:
    assert max(shown_entropies(loss_of("eaft")).values()) < math.log(20)


@pytest.mark.parametrize(
    ("deadline", "edges"),
    [(15.0, (1.45, 6.6, 15.0)), (5.0, (1.45, 5.0, 5.0)), (1.0, (1.0, 1.0, 1.0))],
)
def test_a_low_deadline_leaves_no_room_for_the_zones_above_it(
    deadline: float, edges: tuple[float, ...]
) -> None:
    loss = loss_of("nlirg", loss_deadline=deadline, loss_threshold=0.5)
    assert zone_edges(deadline) == edges
    assert weight_plot(loss, before=[0.5, 1.2, 6.0])
