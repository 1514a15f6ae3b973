"""The token heat map of one row of a sorted corpus, in few characters: thousands share a page."""

# N = targets of the row

import json

from torch import Tensor

from yrunner.data.conversation import TokenizedExample
from yrunner.reports.token_pieces import pieces_of, top_texts
from yrunner.reports.token_text import TokenText
from yrunner.scoring.measure import TokenScores
from yrunner.scoring.neighbours import NOTHING, Lookup
from yrunner.scoring.spans import (
    CONFIDENT_ERROR,
    HARD,
    LUCKY,
    NORMAL,
    bounded,
    find_spans,
)
from yrunner.tokens import IGNORE_INDEX

PATTERNS = (NORMAL, LUCKY, HARD, CONFIDENT_ERROR)
"""What a target is part of; `patterns` of a row holds places in this list."""

KINDS = "0123456789abcdefghij"
"""The sign of a piece: how many targets it is, by digits, or by letters for special tokens."""


def pack_tokens(
    example: TokenizedExample, scores: TokenScores, text: TokenText, lookup: Lookup | None = None
) -> str:
    """A row as one line of JSON, for sort_page.js.

    `texts` and `kinds` are the pieces of the row. `loss` and `entropy` are in hundredths of a nat,
    `top` has what the model would have said where that is something else, by the target's place. Of
    a `lookup`, `knn_loss` and `told` are what other rows make of it.
    """
    pieces = pieces_of(example, text)
    loss_N, entropy_N = bounded(scores.loss_N, scores.entropy_N)
    targets = [label for label in example.labels if label != IGNORE_INDEX]
    tops = scores.top_N.tolist()
    told = top_texts(example, tops, text)
    content = {
        "texts": [piece.text for piece in pieces],
        "kinds": "".join(KINDS[piece.num_targets + 10 * piece.is_special] for piece in pieces),
        "loss": _hundredths(loss_N),
        "entropy": _hundredths(entropy_N),
        "patterns": "".join(
            str(PATTERNS.index(span.pattern)) * (span.end - span.start)
            for span in find_spans(loss_N, entropy_N)
        ),
        "top": {
            place: told[place] for place, target in enumerate(targets) if tops[place] != target
        },
    }
    if lookup is not None:
        told_N = lookup.told_N.tolist()
        instead = top_texts(example, [max(0, id_) for id_ in told_N], text)
        content["knn_loss"] = _hundredths(bounded(lookup.loss_N, entropy_N)[0])
        content["told"] = {
            place: instead[place] for place, id_ in enumerate(told_N) if id_ != NOTHING
        }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def _hundredths(figure_N: Tensor) -> list[int]:
    return [round(100 * value) for value in figure_N.tolist()]
