"""What a run's report says of forgetting: how far the model moved from its base, and when."""

from collections.abc import Mapping, Sequence
from typing import Any

from yrunner.reports.drift_plot import drift_curve
from yrunner.reports.html import Plot

CAPTION = (
    "Above: the plain loss on the field's validation rows. Below: how far the model has moved "
    "from its base on rows that the base wrote, as KL(base || tuned). Where the lower curve rises "
    "and the upper one stands still, the run forgets and learns nothing for it."
)


def drift_plots(records: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """The domain's curve and the drift's, one above the other; none where no drift was measured."""
    if not _measured(records):
        return []
    return [Plot("Learned and forgotten", drift_curve(records), CAPTION)]


def drift_figures(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """The key figure of the last validation."""
    measured = _measured(records)
    if not measured:
        return []
    note = "nats per token from the base, on rows it wrote; last validation"
    return [("drift", f"{measured[-1]['eval_drift']:.4f}", note)]


def _measured(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [record for record in records if "eval_drift" in record]
