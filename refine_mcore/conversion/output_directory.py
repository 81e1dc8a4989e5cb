"""Outputs that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from refine_mcore.errors import UserError


@contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """A temporary sibling of `output` to write into, renamed to `output` if the block succeeds.

    Whatever ends the block otherwise, nothing stays behind. Raises UserError if `output` exists or
    cannot be written, also when the disk fills up inside the block.
    """
    if os.path.lexists(output):
        raise UserError(f"output {output} already exists")
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise UserError(f"output {output} cannot be written: {error.strerror}") from None
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp's is for the owner alone
        temporary.rename(output)
    except OSError as error:
        raise UserError(f"output {output} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already after a rename


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
