"""Reads long documents: `.jsonl` (an object with a `text` per line) and `.txt` (one document)."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refine_mcore.errors import UserError

# JSON can name halves of a character, which no tokenizer takes unless both are there.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Document:
    """One text and where it came from (`file` or `file:line`), for messages."""

    text: str
    origin: str


def read_documents(paths: Iterable[str | Path]) -> Iterator[Document]:
    """The documents of all files in order, one at a time (a corpus need not fit in memory as text).

    Raises UserError naming file and line for a missing or unreadable file, another extension, text
    that is not UTF-8, a line that is not a JSON object with a string `text`, and a file without any
    document.
    """
    for path in map(Path, paths):
        reader = _READERS.get(path.suffix)
        if reader is None:
            raise UserError(f"{path}: documents are read from .jsonl and .txt files only")
        empty = True
        try:
            for document in reader(path):
                empty = False
                yield document
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        if empty:
            raise UserError(f"{path}: holds no documents")


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The value of every line that is not blank, and where it came from (`file:line`). A byte order
    mark before the first is skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not text.strip():
                continue
            origin = f"{path}:{number}"
            try:
                record = json.loads(text.decode("utf-8"))
                if _SURROGATE.search(text):
                    json.dumps(record, ensure_ascii=False).encode("utf-8")
            except UnicodeEncodeError as error:
                half = f"\\u{ord(error.object[error.start]):04x}"
                raise UserError(
                    f"{origin}: a string holds {half}, half of a character, which is no text"
                ) from None
            except (ValueError, RecursionError):  # bad JSON, bad UTF-8, lists in lists without end
                raise UserError(f"{origin}: the line is not valid JSON in UTF-8") from None
            yield origin, record


def _read_jsonl(path: Path) -> Iterator[Document]:
    for origin, record in read_json_lines(path):
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{origin}: the line is not an object with a string field 'text'")
        yield Document(text, origin)


def _read_txt(path: Path) -> Iterator[Document]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if text.strip():
        yield Document(text, str(path))


_READERS = {".jsonl": _read_jsonl, ".txt": _read_txt}
