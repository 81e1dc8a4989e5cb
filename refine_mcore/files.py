"""Files that appear as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from refine_mcore.errors import UserError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write its new content to, which then becomes `path` by rename.

    Raises UserError for an OSError; whatever ends the writing, nothing of it stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
