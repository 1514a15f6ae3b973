"""Faults that both worlds plant in the answers of some training rows."""

import random

GARBAGE_LENGTH = 10
GARBAGE = "锟斤拷烫屯�□#@%&~^"


def mistype(answer: str, rng: random.Random) -> str:
    """Swap neighbouring letters: two pairs in a short answer, more in a long one."""
    letters = list(answer)
    positions = [
        position
        for position in range(len(letters) - 1)
        if letters[position].isalpha()
        and letters[position + 1].isalpha()
        and letters[position] != letters[position + 1]
    ]
    for position in rng.sample(positions[::2], max(2, len(letters) // 16)):
        letters[position], letters[position + 1] = letters[position + 1], letters[position]
    return "".join(letters)


def cut(answer: str, rng: random.Random) -> str:
    """End after 30 to 60 % of the length."""
    share = rng.uniform(0.3, 0.6)
    return answer[: int(share * len(answer))].rstrip()


def garble(answer: str, rng: random.Random) -> str:
    """Overwrite the middle of the answer with characters of a broken encoding."""
    start = len(answer) // 3
    garbage = "".join(rng.choice(GARBAGE) for _ in range(GARBAGE_LENGTH))
    return answer[:start] + garbage + answer[start + GARBAGE_LENGTH :]
