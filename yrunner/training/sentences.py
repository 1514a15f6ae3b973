"""The figures of a record in words, for the live view and for the log."""

from collections.abc import Mapping
from typing import Any

KEPT = ("keep_divergence", "keep_text_loss", "keep_penalty")
SENTENCES = {
    "epoch": "epoch {:.2f}",
    "loss": "loss {:.4f}",
    "weighted_loss": "weighted {:.4f}",
    "eval_loss": "validation loss {:.4f}",
    "eval_drift": "drift {:.4f}",
    "keep_divergence": "kept rows moved {:.4f}",
    "keep_text_loss": "loss of kept rows {:.4f}",
    "keep_penalty": "penalty {:.4f}",
    "mean_weight": "mean weight {:.2f}",
    "learning_rate": "lr {:.1e}",
    "grad_norm": "gradient norm {:.2f}",
    "targets_per_second": "{:,.0f} targets/s",
    "memory_gib": "{:.1f} GiB",
}


def described(record: Mapping[str, Any], *keys: str) -> list[str]:
    """The values of these keys in words; a key that was not logged is left out."""
    return [SENTENCES[key].format(record[key]) for key in keys if record.get(key) is not None]
