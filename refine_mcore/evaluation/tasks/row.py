"""What is asked of a model once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A prompt as token ids with its reference answers. `task` says how the response is scored
    (metrics.py), `key` identifies the row within the task, `group` is what its score is averaged
    with, by name (its length, a needle's depth). With `one_line` nothing behind the first line of
    the response counts, so that generation may end there."""

    task: str
    key: str
    prompt: list[int]
    answers: tuple[str, ...]
    max_new_tokens: int
    group: dict[str, int]
    one_line: bool = False
    # of a row from a file
    file: str = ""
    origin: str = ""  # `file:line`

    @property
    def draws(self) -> int:
        """The number that stands for the prompt in random draws, whatever else is answered."""
        data = b",".join(b"%d" % token for token in self.prompt)
        return int.from_bytes(hashlib.sha256(data).digest()[:7], "little")
