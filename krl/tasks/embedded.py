"""What the embedded tasks share: prompts drawn from a seed, in splits that never meet."""

import hashlib
from collections.abc import Callable
from typing import TypeVar

SPLITS = ("warm", "train", "test")
# Of ten prompts, six are for the warm start, three for training and one for tests.
_SPLIT_OF_TENTH = ("warm",) * 6 + ("train",) * 3 + ("test",)

Drawn = TypeVar("Drawn")


def draw_split(draw: Callable[[], tuple[str, Drawn]], split: str, size: int) -> dict[str, Drawn]:
    """Different prompts of one split.

    A prompt's split is decided by a hash of its text alone, so splits are disjoint, whatever the seeds and
    sizes they were drawn with.

    Args:
        draw: a random prompt, without the "=" at its end, and what belongs to it.
        split: one of SPLITS.
        size: how many are wanted.

    Returns:
        What belongs to each prompt, in the order they were drawn.

    Raises:
        ValueError: no new prompt was found in 50,000 draws.
    """
    found: dict[str, Drawn] = {}
    misses = 0
    while len(found) < size:
        prompt, more = draw()
        new = prompt not in found and _split_of(prompt) == split
        misses = 0 if new else misses + 1
        if new:
            found[prompt] = more
        elif misses > 50_000:
            raise ValueError(
                f"there are only {len(found)} different prompts for {split}, not {size}; "
                "make them longer or ask for fewer"
            )
    return found


def _split_of(prompt: str) -> str:
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    return _SPLIT_OF_TENTH[int.from_bytes(digest, "little") % len(_SPLIT_OF_TENTH)]
