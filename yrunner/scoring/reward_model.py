"""Score answers with a reward model, as it was trained: at the last token of the conversation."""

# S = answers of a batch, T = tokens

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForSequenceClassification

from yrunner.data.chat.tokenize import tokenize_conversations
from yrunner.data.conversation import Conversation, TokenizedExample
from yrunner.errors import ModelError
from yrunner.losses.score_head import adapter_active
from yrunner.models.errors import explain_failure, silence_libraries
from yrunner.models.limits import evaluating, max_positions
from yrunner.models.load import load_tokenizer


def check_reward_model(folder: Path) -> None:
    """Raise `ModelError` if a folder holds no classifier with one label."""
    with silence_libraries(), explain_failure(str(folder)):
        config = AutoConfig.from_pretrained(folder)
    is_classifier = str(config.architectures or "").count("ForSequenceClassification") == 1
    if not is_classifier or config.num_labels != 1:
        raise ModelError(
            f"{folder} holds no reward model, a classifier with one label",
            remedy="give the folder model/ of a run with train.stage: reward",
        )


@dataclass(frozen=True)
class AdapterScores:
    """A reward model that is an adapter on the base of a model in memory."""

    model: Any
    name: str
    """Of the adapter."""
    head_1D: Tensor

    def __call__(self, ids_ST: Tensor, mask_ST: Tensor) -> Tensor:
        """The score at the last token of each row, shape [S]; rows are padded on the right."""
        causal = self.model.get_base_model()
        inputs = {"input_ids": ids_ST, "attention_mask": mask_ST, "use_cache": False}
        with evaluating(self.model), adapter_active(causal, self.name):
            hidden_STD = causal.base_model(**inputs).last_hidden_state
        last_S = mask_ST.sum(1) - 1
        hidden_SD = hidden_STD[torch.arange(len(last_S), device=last_S.device), last_S]
        return linear(hidden_SD.float(), self.head_1D.to(hidden_SD.device))[:, 0]


@dataclass(frozen=True)
class _Classifier:
    """A model of transformers with one label, in memory beside any other."""

    model: Any

    def __call__(self, ids_ST: Tensor, mask_ST: Tensor) -> Tensor:
        logits_S1: Tensor = self.model(ids_ST, attention_mask=mask_ST).logits
        return logits_S1[:, 0].float()


class RewardModel:
    """A classifier with one label, and its tokenizer."""

    def __init__(self, folder: Path, beside: AdapterScores | None = None) -> None:
        """`beside`: the same as an adapter in memory; None loads it.

        Raises `ModelError` if the folder holds no reward model.
        """
        check_reward_model(folder)
        self.classifier: AdapterScores | _Classifier
        if beside is not None:
            self.classifier = beside
        else:
            with silence_libraries(), explain_failure(str(folder)):
                model = AutoModelForSequenceClassification.from_pretrained(folder)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self.classifier = _Classifier(model.to(device).eval())
        self.tokenizer = load_tokenizer(str(folder))
        self.pad_token_id: int = AutoConfig.from_pretrained(folder).pad_token_id

    def score(
        self, conversations: Sequence[Conversation], *, system: str | None, batch_size: int
    ) -> list[float | None]:
        """The score of each last answer; None for an empty one, and for one that is too long."""
        examples = tokenize_conversations(
            conversations, self.tokenizer, system=system, targets="last_assistant"
        )
        rows = {
            number: example.input_ids
            for number, example in enumerate(examples)
            if isinstance(example, TokenizedExample)
            and len(example.input_ids) <= max_positions(self.classifier.model)
        }
        found: list[float | None] = [None] * len(conversations)
        # Answers of similar length share a batch.
        order = sorted(rows, key=lambda number: len(rows[number]))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            scores = self._score([rows[number] for number in batch])
            for number, score in zip(batch, scores, strict=True):
                found[number] = score
        return found

    def _score(self, rows: Sequence[list[int]]) -> list[float]:
        longest, pad = max(map(len, rows)), self.pad_token_id
        ids_ST = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        mask_ST = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        device = self.classifier.model.device
        with torch.inference_mode():
            scores: list[float] = self.classifier(ids_ST.to(device), mask_ST.to(device)).tolist()
        return scores
