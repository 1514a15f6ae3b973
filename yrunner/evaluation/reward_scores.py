"""Score answers with a reward model, as it was trained: at the last token of the conversation."""

# S = answers of a batch, T = tokens

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from yrunner.data.chat.tokenize import tokenize_conversations
from yrunner.data.conversation import Conversation, Message, TokenizedExample
from yrunner.errors import ModelError
from yrunner.evaluation.generate import max_positions
from yrunner.evaluation.questions import Question
from yrunner.models.errors import explain_failure, silence_libraries
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


def score_answers(
    folder: Path,
    questions: Sequence[Question],
    answers: Sequence[str],
    *,
    system: str | None,
    batch_size: int,
) -> list[float | None]:
    """The score of each answer; None for an empty one, and where it does not fit the model."""
    classifier, tokenizer = _load(folder)
    conversations = [
        Conversation((*question.messages, Message("assistant", answer)), question.origin)
        for question, answer in zip(questions, answers, strict=True)
    ]
    examples = tokenize_conversations(
        conversations, tokenizer, system=system, targets="last_assistant"
    )
    rows = {
        number: example.input_ids
        for number, example in enumerate(examples)
        if isinstance(example, TokenizedExample)
        and len(example.input_ids) <= max_positions(classifier)
    }
    found: list[float | None] = [None] * len(answers)
    # Answers of similar length share a batch.
    order = sorted(rows, key=lambda number: len(rows[number]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        scores = _score(classifier, [rows[number] for number in batch])
        for number, score in zip(batch, scores, strict=True):
            found[number] = score
    return found


@lru_cache(maxsize=1)
def _load(folder: Path) -> tuple[Any, Any]:
    """The classifier and its tokenizer: several models are evaluated one after the other."""
    check_reward_model(folder)
    with silence_libraries(), explain_failure(str(folder)):
        classifier: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return classifier.to(device).eval(), load_tokenizer(str(folder))


def _score(classifier: Any, rows: Sequence[list[int]]) -> list[float]:
    longest, pad = max(map(len, rows)), classifier.config.pad_token_id
    ids_ST = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask_ST = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    device = classifier.device
    with torch.inference_mode():
        logits_S1 = classifier(ids_ST.to(device), attention_mask=mask_ST.to(device)).logits
    scores: list[float] = logits_S1[:, 0].float().tolist()
    return scores
