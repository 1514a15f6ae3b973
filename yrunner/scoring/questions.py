"""Compare the questions of rows: which ask for the same thing?

Questions are compared by the rare tokens they share, as in search engines (TF-IDF): a name that
few rows mention tells more than the words all questions are made of.
"""

# E = examples, V = different tokens, S = size of a vector

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from yrunner.data.conversation import TokenizedExample
from yrunner.tokens import IGNORE_INDEX

QUESTION_SIZE = 512
"""Size of the random projection of a question: its cosines are off by less than 0.05."""
SUBJECT = 2 / 3
"""The tokens of a question that are rarer than this share of its rarest one name its subject."""


def question_vectors(examples: Sequence[TokenizedExample]) -> Tensor:
    """A vector of length 1 for each question, whose products are cosines; [E, S], float16.

    The tokens that are not learned are the question. Each counts once, with the logarithm of the
    share of rows that have it. Zero where a row has no question, or only what every row has.
    """
    if not len(examples):
        return torch.empty(0, QUESTION_SIZE, dtype=torch.float16)
    asked = [_asked(example) for example in examples]
    sizes = torch.tensor([len(ids) for ids in asked])
    tokens, place, count = np.unique(np.concatenate(asked), return_inverse=True, return_counts=True)
    # The same for every run: the questions of one corpus give the same vectors.
    random = torch.Generator().manual_seed(0)
    direction_VS = torch.randn((len(tokens), QUESTION_SIZE), generator=random)
    rarity_V = torch.from_numpy(np.log(len(asked) / count)).float()
    starts_E = sizes.cumsum(dim=0) - sizes
    question_ES = embedding_bag(
        torch.from_numpy(place), direction_VS * rarity_V[:, None], starts_E, mode="sum"
    )
    return normalize(question_ES, dim=1).half()


def subjects(examples: Sequence[TokenizedExample]) -> list[bytes]:
    """What each question is about: its rare tokens, in a form to compare for equality.

    Rarity is that of `question_vectors`. Two questions have the same subject if each rare token of
    one is in the other. Empty without a question, or with only what every row has.
    """
    asked = [_asked(example) for example in examples]
    if not asked:
        return []
    tokens, count = np.unique(np.concatenate(asked), return_counts=True)
    found = []
    for ids in asked:
        rarity = np.log(len(asked) / count[np.searchsorted(tokens, ids)])
        found.append(ids[rarity > SUBJECT * rarity.max(initial=0.0)].tobytes())
    return found


def _asked(example: TokenizedExample) -> NDArray[np.int64]:
    """The different tokens of an example that are not learned.

    Without the first, which nothing predicts: of a document it is text like any other.
    """
    ids, labels = np.array([example.input_ids, example.labels], np.int64)
    return np.unique(ids[1:][labels[1:] == IGNORE_INDEX])
