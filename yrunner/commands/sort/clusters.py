"""Clusters of the rows of a sort: found if the package for it is there, described and printed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from yrunner.commands.sort.corpus import CorpusRow, Seen
from yrunner.console import Cell, print_table, say, waiting
from yrunner.data.dataset.examples import Examples
from yrunner.data.dataset.row_report import num_rows
from yrunner.errors import MissingError
from yrunner.recipe.schema.recipe import Recipe
from yrunner.scoring.clusters import Clusters, default_smallest, find_clusters, telling_words
from yrunner.scoring.order import NO_CLUSTER, suspicion

PACKAGE = "sklearn"
INSTALL = "pip install 'yrunner[clusters]'"
NUM_TYPICAL = 3
"""Rows that are shown of a cluster."""
SUSPICIOUS = 0.1
"""A row is suspicious here if it is among this share of the whole corpus, the most suspicious."""
MOST_PRINTED = 12
MOST_CHARACTERS = 1000
"""Of a row, in which words are counted."""


@dataclass(frozen=True)
class ClusterFacts:
    """What the rows of a cluster have in common."""

    number: int
    """`NO_CLUSTER` for the rows in none."""
    size: int
    num_suspicious: int
    """Rows among the most suspicious tenth of the corpus."""
    words: list[str]
    typical: list[int]
    """Indices of rows, the nearest to the mean first; of the rows in no cluster none."""


def check_clusters(recipe: Recipe) -> None:
    """Raise `MissingError` if shares of clusters should be kept that cannot be found."""
    if recipe.sort.clusters.keep is not None and find_spec(PACKAGE) is None:
        raise MissingError("sort.clusters.keep needs scikit-learn", remedy=f"run {INSTALL}")


def cluster_rows(recipe: Recipe, seen: Seen, rows: Sequence[CorpusRow]) -> Clusters | None:
    """The clusters of all rows; None without hidden states, the package, or enough rows."""
    if seen.lookups is None:
        return None
    if find_spec(PACKAGE) is None:
        say(f"no clusters: they need scikit-learn ({INSTALL})")
        return None
    smallest = recipe.sort.clusters.smallest or default_smallest(len(rows))
    if len(rows) < 2 * smallest:
        say(
            f"no clusters: {num_rows(len(rows))} are too few for two of {smallest} "
            "(sort.clusters.smallest)"
        )
        return None
    parts = [row.examples for row in rows]
    with waiting("finding clusters"):
        return find_clusters(seen.base, parts, smallest=smallest, seed=recipe.seed)


def describe_clusters(
    clusters: Clusters,
    deciding: str,
    scores: Sequence[float],
    rows: Sequence[CorpusRow],
    examples: Examples,
    tokenizer: Any,
) -> list[ClusterFacts]:
    """The facts of each cluster, the largest first, and at the end of the rows in none.

    `deciding` names the score of each row in `scores`.
    """
    falling = sorted(range(len(scores)), key=lambda index: -suspicion(deciding, scores[index]))
    worst = set(falling[: round(SUSPICIOUS * len(scores))])
    words = telling_words([_text(row, examples, tokenizer) for row in rows], clusters.numbers)
    alone = [index for index, number in enumerate(clusters.numbers) if number == NO_CLUSTER]
    facts = [
        ClusterFacts(
            number,
            len(members),
            len(worst.intersection(members)),
            words.get(number, []),
            members[:NUM_TYPICAL],
        )
        for number, members in clusters.central.items()
    ]
    if alone:
        facts.append(ClusterFacts(NO_CLUSTER, len(alone), len(worst.intersection(alone)), [], []))
    return facts


def _text(row: CorpusRow, examples: Examples, tokenizer: Any) -> str:
    ids = [id_ for place in row.examples for id_ in examples[place].input_ids]
    return str(tokenizer.decode(ids, skip_special_tokens=True))[:MOST_CHARACTERS]


def print_clusters(facts: Sequence[ClusterFacts], kept: Mapping[int, int]) -> None:
    """A line for each of the largest clusters; `kept`: rows of each that are not dropped."""
    found = [fact for fact in facts if fact.number != NO_CLUSTER]
    shown: list[tuple[Cell, ...]] = [
        (
            fact.number if fact.number != NO_CLUSTER else "–",
            fact.size,
            kept.get(fact.number, 0),
            f"{100 * fact.num_suspicious / fact.size:.0f} %",
            ", ".join(fact.words) or "–",
        )
        for fact in [*found[:MOST_PRINTED], *facts[len(found) :]]
    ]
    title = f"Clusters: {len(found):,}"
    if len(found) > MOST_PRINTED:
        title += f", the {MOST_PRINTED} largest"
    head = ("cluster", "rows", "kept", "suspicious", "words that tell it from the others")
    print_table(title, head, shown)
