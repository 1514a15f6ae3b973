"""`yrun check` shows what the loss makes of the base: figures, lines on the terminal, a page."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from tests.commands.check.test_command import facts_of
from tests.commands.check.test_sample import training_examples
from yrunner.cli import app
from yrunner.commands.check.command import check
from yrunner.commands.check.signal import Sample, describe_sample
from yrunner.errors import YRunnerError
from yrunner.losses.nlirg import ZONES, nlirg_weight
from yrunner.models.load import load_model

EDGES = (1.45, 6.6, 15.0)
TUNED = Path("tuned.yaml")


def slow_losses(model: Any, examples: Any) -> list[float]:
    """The loss of every target, from the whole logits of one row after the other."""
    losses = []
    for example in examples:
        with torch.no_grad():
            logits = model(torch.tensor([example.input_ids])).logits[0]
        for place in example.target_positions:
            label = torch.tensor(example.labels[place])
            losses.append(cross_entropy(logits[place - 1], label).item())
    return losses


def test_the_figures_are_those_of_the_base_and_of_the_recipes_weight(
    trained_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    signal = facts_of(capsys, "tuned.yaml")["signal"]
    model = load_model(str(trained_base / "outputs" / "base" / "model"), dtype=torch.float32)
    losses = torch.tensor(slow_losses(model, training_examples(TUNED)))
    weights = nlirg_weight(losses)
    assert (signal["rows"], signal["targets"]) == (16, len(losses))
    assert signal["mean_weight"] == pytest.approx(weights.mean().item(), rel=1e-4)
    counts = [round(zone["share"] * len(losses)) for zone in signal["zones"]]
    easy, beyond = int((losses <= 1.45).sum()), int((losses >= 6.6).sum())
    assert counts[:2] == [easy, len(losses) - easy - beyond]
    learning = weights[(losses > 1.45) & (losses < 6.6)]
    assert signal["zones"][1]["mean_weight"] == pytest.approx(learning.mean().item(), rel=1e-4)


def test_bins_and_zones_equal_a_count_of_every_target() -> None:
    torch.manual_seed(0)
    loss_N = torch.cat([torch.rand(300, dtype=torch.float64) * 18, torch.tensor([0.0, 1.45, 6.6])])
    loss_N = torch.cat([loss_N, torch.tensor([15.0, 16.0, 400.0, math.inf])])
    weight_N = nlirg_weight(loss_N)
    signal = describe_sample(Sample(1, loss_N, weight_N), EDGES)
    pairs = list(zip(loss_N.tolist(), weight_N.tolist(), strict=True))
    assert [(it.start, it.end) for it in signal.bins[-2:]] == [(15.0, 16.0), (16.0, None)]
    for found in signal.bins:
        inside = [w for loss, w in pairs if found.start <= min(loss, 16.5) < (found.end or 17)]
        assert found.share == pytest.approx(len(inside) / len(pairs))
        assert found.mean_weight == pytest.approx(sum(inside) / len(inside))
    by_zone = (
        [weight for loss, weight in pairs if loss <= 1.45],
        [weight for loss, weight in pairs if 1.45 < loss < 6.6],
        [weight for loss, weight in pairs if 6.6 <= loss < 15],
        [weight for loss, weight in pairs if loss >= 15],
    )
    for zone, inside in zip(signal.zones, by_zone, strict=True):
        assert zone.share == pytest.approx(len(inside) / len(pairs))
        assert zone.weight_share == pytest.approx(sum(inside) / sum(w for _, w in pairs))
    assert signal.refused == pytest.approx(sum(w == 0 for _, w in pairs) / len(pairs))


def test_what_is_not_a_number_is_refused_and_spoils_nothing() -> None:
    loss_N = torch.tensor([0.5, math.nan], dtype=torch.float64)
    signal = describe_sample(Sample(1, loss_N, torch.exp(-loss_N)), EDGES)
    assert signal.refused == 0.5
    assert signal.bins[-1].share == signal.zones[-1].share == 0.5
    assert signal.mean_weight == pytest.approx(math.exp(-0.5) / 2)


def test_a_sample_that_is_refused_as_a_whole_has_no_weight_to_share_out() -> None:
    loss_N = torch.full((3,), 20.0, dtype=torch.float64)
    signal = describe_sample(Sample(1, loss_N, torch.zeros_like(loss_N)), EDGES)
    assert [zone.weight_share for zone in signal.zones] == [0.0] * 4
    assert [zone.mean_weight for zone in signal.zones] == [None, None, None, 0.0]


def test_a_low_deadline_moves_bins_and_zones() -> None:
    loss_N = torch.tensor([1.0, 4.5, 5.5, 8.0], dtype=torch.float64)
    signal = describe_sample(Sample(1, loss_N, (loss_N < 5).double()), (1.45, 5.0, 5.0))
    assert [zone.share for zone in signal.zones] == [0.25, 0.25, 0.0, 0.5]
    assert [found.zone for found in signal.bins[4:6]] == ["learning", "refused"]


def test_the_terminal_shows_bins_zones_and_what_they_mean(
    trained_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(TUNED, ["loss.loss_deadline=3.5"], as_machine=False)
    out = capsys.readouterr().out
    assert "targets under the base, weighted by nlirg" in out
    assert re.search(r"\n  easy +0 to 1 +\d+\.\d% ", out)
    assert all(f"\n  {zone} " in out for zone in ZONES)
    assert re.search(r"% of the targets are refused \(loss of 3\.5 and above\): nothing", out)
    check(TUNED, ["loss={kind: plain}"], as_machine=False)
    assert "loss.kind plain: every target has the weight 1" in capsys.readouterr().out


def test_the_page_holds_the_curve_the_zones_and_the_recipe(
    trained_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(TUNED, ["loss={kind: nlirg_entropy}"], as_machine=False, as_page=True)
    page = Path("outputs/tuned-check.html")
    assert f"page: {page}" in capsys.readouterr().out
    content = page.read_text("utf-8")
    for part in ("<svg", "entropy 3 nats", "share of all weight", "kind: nlirg_entropy"):
        assert part in content
    assert not (trained_base / "outputs" / "tuned").exists(), "check begins no run"


def test_the_page_can_have_a_name_of_its_own_beside_changes_of_the_recipe(
    trained_base: Path,
) -> None:
    arguments = ["check", "tuned.yaml", "--html", "pages/curve.html", "loss={kind: dft}"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert "kind: dft" in Path("pages/curve.html").read_text("utf-8")
    with pytest.raises(YRunnerError, match=r"pages is not a writable \.html path\. Give"):
        check(TUNED, [], as_machine=False, as_page=True, page=Path("pages"))
