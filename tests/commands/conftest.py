"""An update is traced once for all tests of `yrun check`."""

from typing import Any

import pytest


@pytest.fixture(scope="session")
def known_updates() -> dict[tuple[str, ...], Any]:
    """What `yrun check` has found of updates that have no values, by all that it depends on."""
    return {}


@pytest.fixture(autouse=True)
def each_update_is_traced_once(
    known_updates: dict[tuple[str, ...], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most tests of `yrun check` are not about memory, and it takes nearly all of their time."""
    from yrunner.training.memory.trace import trace_update

    def trace(whole: Any, build: Any, micro_batch: dict[str, Any], **options: Any) -> Any:
        rows = {name: tensor.tolist() for name, tensor in micro_batch.items()}
        key = (whole.config.to_json_string(), *map(str, (build.keywords, rows, options)))
        if key not in known_updates:
            known_updates[key] = trace_update(whole, build, micro_batch, **options)
        return known_updates[key]

    monkeypatch.setattr("yrunner.assembly.memory.trace_update", trace)
