"""Score answers with a reward model, as it was trained: at the last token of the conversation."""

# S = answers of a batch, T = tokens

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from yrunner.data.chat.tokenize import tokenize_conversations
from yrunner.data.conversation import Conversation, TokenizedExample
from yrunner.errors import ModelError
from yrunner.models.errors import explain_failure, silence_libraries
from yrunner.models.limits import max_positions
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


class RewardModel:
    """A classifier with one label, and its tokenizer."""

    def __init__(self, folder: Path) -> None:
        """Raises `ModelError` if the folder holds none."""
        check_reward_model(folder)
        with silence_libraries(), explain_failure(str(folder)):
            classifier = AutoModelForSequenceClassification.from_pretrained(folder)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.classifier = classifier.to(device).eval()
        self.tokenizer = load_tokenizer(str(folder))

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
            and len(example.input_ids) <= max_positions(self.classifier)
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
        longest, pad = max(map(len, rows)), self.classifier.config.pad_token_id
        ids_ST = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        mask_ST = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        device = self.classifier.device
        with torch.inference_mode():
            logits_S1 = self.classifier(ids_ST.to(device), attention_mask=mask_ST.to(device)).logits
        scores: list[float] = logits_S1[:, 0].float().tolist()
        return scores
