"""Claims the directory a run writes to, refusing what it would overwrite."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from refine_mcore.config.schema import Config
from refine_mcore.errors import UserError

TOKENS = "data"  # where in RUN the tokens of its documents are kept (data/tokens.py)
_CLAIM = ".claim"  # of the newest start: which of two that run at once may save


def prepare_run_directory(config: Config) -> Path:
    """Creates RUN (`run.directory`) and returns it. One rank calls this.

    The run writes the resolved `config.yaml` there once its model stands. An existing RUN is
    accepted if it is empty or holds no more than the tokens of a run that never began, or if it is
    an earlier run (has a `config.yaml`) and `checkpoint.resume` is `auto`. Raises UserError
    otherwise, and where RUN cannot be created or written.
    """
    run = Path(config.run.directory)
    try:
        run.mkdir(parents=True, exist_ok=True)
        occupied = any(run.iterdir()) and not _holds_only_tokens(run)
    except FileExistsError:
        raise UserError(f"run.directory {run} exists and is not a directory") from None
    except OSError as error:
        raise UserError(f"run.directory {run} cannot be used: {error.strerror}") from None
    if not os.access(run, os.W_OK | os.X_OK):
        raise UserError(f"run.directory {run} is not writable")
    if occupied and config.checkpoint.resume == "never":
        raise UserError(f"run.directory {run} exists and checkpoint.resume is never")
    if occupied and not (run / "config.yaml").is_file():
        raise UserError(f"run.directory {run} exists and holds something other than a run")
    return run


def claim_run_directory(run: Path) -> str:
    """Takes RUN from the starts before this one; returns what `require_claim` knows it by. One rank
    calls this. Raises UserError if RUN cannot be written."""
    claim = uuid.uuid4().hex
    try:
        (run / _CLAIM).write_text(claim)  # in place: of two at once the last has it
    except OSError as error:
        raise UserError(f"cannot write {run / _CLAIM}: {error.strerror}") from None
    return claim


def require_claim(run: Path, claim: str) -> None:
    """Raises UserError if another start has claimed RUN since, or this cannot be seen."""
    try:
        newest = (run / _CLAIM).read_text()
    except OSError as error:
        raise UserError(f"cannot read {run / _CLAIM}: {error.strerror}") from None
    if newest != claim:
        raise UserError(f"another start has taken over {run}: this one saves no more")


def _holds_only_tokens(run: Path) -> bool:
    kept = run / TOKENS
    return (
        [path.name for path in run.iterdir()] == [TOKENS]
        and kept.is_dir()
        and all(path.name.lstrip(".").startswith("tokens-") for path in kept.iterdir())
    )
