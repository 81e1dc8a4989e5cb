"""Files that appear as a whole or not at all, and outlive a crash of the node."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from refine_mcore.errors import UserError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write its new content to, which then becomes `path` by rename.

    It is on disk before the name, and the name before this returns. Raises UserError for an
    OSError; whatever ends the writing, nothing of it stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Let the content of a file, or the names in a directory, outlive a crash of the node."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # some file systems sync files only, and not every directory may be read
        if error.errno not in (errno.EINVAL, errno.EACCES) or not path.is_dir():
            raise


def sync_tree(directory: Path) -> None:
    """The same for a directory and all below it."""
    for path in (*directory.rglob("*"), directory):
        sync(path)
