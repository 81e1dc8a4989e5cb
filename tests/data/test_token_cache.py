"""Tokens on disk: written once by one rank, mapped by all; the windows are those of the texts."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from refine_mcore import platform
from refine_mcore.config import DataConfig
from refine_mcore.data import LongDocumentWindows, build_dataset, read_documents, tokens
from refine_mcore.errors import UserError
from tests.distributed.harness import run_distributed

TEXTS = ["abcdefgh", "ij", "klmnop", "", "qrst"]
WINDOWS = ["abcd", "efgh", "klmn", "qrst"]
LARGE = 24 << 20  # tokens; 48 MB on disk


class Characters:
    """Tokenizer whose ids are the characters' code points. Counts its calls, and does `before`
    each."""

    def __init__(self, vocab_size: int = 128, before: Callable[[int], None] | None = None) -> None:
        self.vocab_size, self.eos_id = vocab_size, -1
        self.special_ids: frozenset[int] = frozenset()
        self.before, self.calls = before, 0

    def text_to_ids(self, text: str) -> list[int]:
        if self.before is not None:
            self.before(self.calls)
        self.calls += 1
        return list(text.encode()) if text.isascii() else list(map(ord, text))

    def texts_to_ids(self, texts: list[str]) -> list[list[int]]:
        return list(map(self.text_to_ids, texts))

    def ids_to_text(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def configuration(*paths: Path, length: int = 4) -> DataConfig:
    return DataConfig(paths=tuple(map(str, paths)), sequence_length=length, seed=7)


def build(
    config: DataConfig, directory: Path, tokenizer: Characters | None = None
) -> LongDocumentWindows:
    tokenizer = tokenizer or Characters()
    return build_dataset(config, tokenizer, tokenizer.vocab_size, directory)


def contents(dataset: LongDocumentWindows) -> list[str]:
    """The windows of an epoch in the order of the documents."""
    return ["".join(map(chr, dataset._windows[i])) for i in range(len(dataset))]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def the_only(directory: Path) -> Path:
    """The tokens in `directory`, which holds nothing else."""
    (name,) = names(directory)
    assert name.startswith("tokens-")
    return directory / name


def tokenized_directly(config: DataConfig, tokenizer: Characters) -> LongDocumentWindows | str:
    """The windows as an array in memory; or the sentence that refuses the documents."""
    length, pieces, documents, longest, origin = config.sequence_length, [], 0, 0, "no document"
    for document in read_documents(config.paths):
        ids = np.asarray(tokenizer.text_to_ids(document.text), dtype=np.int64)
        count = len(ids) // length
        pieces.append(ids[: count * length].reshape(count, length))
        documents += 1
        if len(ids) > longest:
            longest, origin = len(ids), document.origin
    used = sum(map(bool, map(len, pieces)))
    if not used:
        return (
            f"{', '.join(config.paths)}: no document is as long as data.sequence_length ({length} "
            f"tokens), the longest is {origin} with {longest}"
        )
    windows = np.concatenate(pieces)
    said = f"{len(windows)} windows of {length} tokens from {used} of {documents} documents"
    short = f", {documents - used} are too short" if used < documents else ""
    return LongDocumentWindows(windows, config.seed, said + short)


text = st.text(st.characters(codec="utf-8"), max_size=12)


@given(
    first=st.lists(text, min_size=1, max_size=5),
    second=text.filter(str.strip),
    third=st.lists(text, min_size=1, max_size=2),
    length=st.integers(1, 8),
    batch=st.integers(1, 40),
)
def test_windows_are_those_of_the_texts(
    first: list[str], second: str, third: list[str], length: int, batch: int
) -> None:
    """In the same order, with the same sentences; read anew, and from what was kept."""
    with tempfile.TemporaryDirectory() as name, patch.object(tokens, "_BATCH", batch):
        directory = Path(name)
        files = (
            write_jsonl(directory / "a.jsonl", first),
            directory / "b.txt",
            write_jsonl(directory / "c.jsonl", third),
        )
        files[1].write_bytes(second.encode())
        config, tokenizer = configuration(*files, length=length), Characters(0x110000)
        expected = tokenized_directly(config, tokenizer)
        for _ in range(2):
            if isinstance(expected, str):
                with pytest.raises(UserError) as error:
                    build(config, directory / "data", tokenizer)
                assert str(error.value) == expected
                assert not (directory / "data").exists()
                continue
            found = build(config, directory / "data", tokenizer)
            assert (len(found), found.origin) == (len(expected), expected.origin)
            assert found.sequence_length == length
            for sample in range(2 * len(expected)):
                assert found[sample].tolist() == expected[sample].tolist()


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(128, 2), (65_499, 2), (65_500, 4)])
def test_tokens_take_few_bytes(tmp_path: Path, vocab_size: int, itemsize: int) -> None:
    character = chr(vocab_size - 1)
    config = configuration(write_jsonl(tmp_path / "a.jsonl", [character * 9, character * 4]))
    dataset = build(config, tmp_path / "data", Characters(vocab_size))
    assert contents(dataset) == [character * 4] * 3
    assert (the_only(tmp_path / "data") / "tokens.bin").stat().st_size == 13 * itemsize


def test_written_once(tmp_path: Path) -> None:
    """For every length of window, and wherever the files lie: messages name the present ones."""
    file, tokenizer = write_jsonl(tmp_path / "a.jsonl", TEXTS), Characters()
    for length in (4, 3, 8):
        dataset = build(configuration(file, length=length), tmp_path / "data", tokenizer)
        assert dataset.sequence_length == length
    assert tokenizer.calls == len(TEXTS)
    moved = file.rename(tmp_path / "b.jsonl")
    assert contents(build(configuration(moved), tmp_path / "data", tokenizer)) == WINDOWS
    with pytest.raises(UserError, match=r"b\.jsonl: no .* longest is .*/b\.jsonl:1 with 8$"):
        build(configuration(moved, length=9), tmp_path / "data", tokenizer)
    assert tokenizer.calls == len(TEXTS)
    assert the_only(tmp_path / "data")


def test_written_anew_for_other_tokens(tmp_path: Path) -> None:
    """Other text of the same size and time, another tokenizer, another kind of file."""
    file, model = write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "some.model"
    model.write_text("one")
    config = DataConfig(paths=(str(file),), tokenizer=str(model), sequence_length=4)
    directory, tokenizer = tmp_path / "data", Characters()
    build(config, directory, tokenizer)
    before = file.stat()
    file.write_text(file.read_text().replace("s", "S"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert contents(build(config, directory, tokenizer)) == [*WINDOWS[:3], "qrSt"]
    model.write_text("two")
    build(config, directory, tokenizer)
    build(config, directory, Characters(129))
    plain = replace(config, paths=(shutil.copy(file, str(tmp_path / "a.txt")),))
    assert contents(build(plain, directory, tokenizer))[0] == '{"te'
    assert len(names(directory)) == 5


def test_damaged_tokens_are_replaced(tmp_path: Path) -> None:
    config = configuration(write_jsonl(tmp_path / "a.jsonl", TEXTS))
    build(config, tmp_path / "data")
    for name in ("tokens.bin", "tokens.idx", "tokens.json"):
        file = the_only(tmp_path / "data") / name
        os.truncate(file, file.stat().st_size - 1)
        assert contents(build(config, tmp_path / "data")) == WINDOWS


def test_death_leaves_nothing_that_passes_for_tokens(tmp_path: Path) -> None:
    config, directory = configuration(write_jsonl(tmp_path / "a.jsonl", TEXTS)), tmp_path / "data"

    def die(calls: int) -> None:
        if calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    build(configuration(write_jsonl(tmp_path / "other.jsonl", TEXTS[::-1])), directory)
    other = the_only(directory)
    child = os.fork()
    if child == 0:
        build(config, directory, Characters(before=die))
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    left, kept = names(directory)
    assert left.startswith(".") and left.endswith(".partial") and kept == other.name
    tokenizer = Characters()
    assert contents(build(config, directory, tokenizer)) == WINDOWS
    assert tokenizer.calls == len(TEXTS)
    assert other.name in names(directory) and len(names(directory)) == 3
    assert left in names(directory)  # of a run that may be writing it
    for path in (directory / left, *(directory / left).iterdir()):
        os.utime(path, (time.time() - 2 * tokens._ABANDONED,) * 2)
    build(config, directory)
    assert not [name for name in names(directory) if name.startswith(".")]


def test_another_writer_is_done_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the moment before the tokens get their name."""
    config, rename = configuration(write_jsonl(tmp_path / "a.jsonl", TEXTS)), Path.rename

    def late(path: Path, target: Path) -> Path:
        shutil.copytree(path, target)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    assert contents(build(config, tmp_path / "data")) == WINDOWS
    assert the_only(tmp_path / "data")


@contextmanager
def file_size_limit(size: int) -> Generator[None, None, None]:
    """Files that grow beyond `size` fail as on a full disk, with another word for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# The limits let no tokens, no index and no more than the index through.
@pytest.mark.parametrize("limit", [10, 40, 140])
def test_full_disk(tmp_path: Path, limit: int) -> None:
    config = configuration(write_jsonl(tmp_path / "a.jsonl", TEXTS))
    with file_size_limit(limit), pytest.raises(UserError) as error:
        build(config, tmp_path / "data")
    assert str(error.value) == (
        f"cannot write the tokens of data.paths to {tmp_path}/data: File too large"
    )
    assert names(tmp_path) == ["a.jsonl"]


def test_directory_that_cannot_be_written(tmp_path: Path) -> None:
    config = configuration(write_jsonl(tmp_path / "a.jsonl", TEXTS))
    for directory in (Path("/proc/data"), tmp_path / "a.jsonl" / "data"):
        with pytest.raises(UserError, match=f"^cannot write the tokens of .* to {directory}: "):
            build(config, directory)


def test_bad_line_leaves_nothing(tmp_path: Path) -> None:
    config = configuration(write_jsonl(tmp_path / "a.jsonl", TEXTS))
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("{\n")
    with pytest.raises(UserError) as error:
        build(config, tmp_path / "data")
    assert str(error.value) == f"{tmp_path}/a.jsonl:6: the line is not valid JSON in UTF-8"
    assert names(tmp_path) == ["a.jsonl"]


def test_ranks(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "small.jsonl", TEXTS)
    write_jsonl(tmp_path / "bad.jsonl", [*TEXTS, 7])  # type: ignore[list-item]
    lines = ["".join(chr(97 + i * i % 26) for i in range(1 << 16))] * (LARGE >> 16)
    write_jsonl(tmp_path / "medium.jsonl", lines[:1])
    write_jsonl(tmp_path / "large.jsonl", lines)
    run_distributed(_ranks, 4, tmp_path)


def _ranks(directory: Path) -> None:
    """Cases share the ranks, as these take seconds to start."""
    for case in (
        _one_node,
        _memory,
        _nodes_that_share,
        _nodes_of_their_own,
        _nodes_that_meet_halfway,
        _errors_are_of_all,
        _files_that_differ,
        _a_long_wait,
    ):
        _place_on_nodes(dist.get_world_size())
        (directory / case.__name__).mkdir(exist_ok=True)
        dist.barrier()
        case(directory, directory / case.__name__)
        dist.barrier()


def _place_on_nodes(size: int) -> None:
    """Pretend that a node has `size` ranks."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank() % size)


def _of_all(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _calls(files: Path, directory: Path) -> list[int]:
    """How often each rank tokenized for one call, after which all have the windows."""
    tokenizer = Characters(before=lambda _: time.sleep(0.01))
    dataset = build(configuration(files / "small.jsonl"), directory, tokenizer)
    assert contents(dataset) == WINDOWS
    assert dataset.origin == "4 windows of 4 tokens from 3 of 5 documents, 2 are too short"
    dist.barrier()
    assert the_only(directory)
    return _of_all(tokenizer.calls)


def _one_node(files: Path, directory: Path) -> None:
    assert _calls(files, directory) == [len(TEXTS), 0, 0, 0]
    assert _calls(files, directory) == [0, 0, 0, 0]


def _memory(files: Path, directory: Path) -> None:
    """That a rank needs in between and keeps does not grow with the texts."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1]) << 10

    def peak(name: str) -> int:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = status("VmRSS")
        dataset = build(configuration(files / name, length=1024), directory)
        assert len(dataset) >= 64 and len(dataset[0]) == 1024
        return status("VmHWM") - before

    tokens._BATCH = 1 << 16  # so that both hold whole batches
    peak("medium.jsonl")  # what the first time takes
    peaks = [_of_all(peak(name)) for name in ("medium.jsonl", "large.jsonl")]
    assert max(peaks[1]) < max(peaks[0]) + (12 << 20), peaks


def _nodes_that_share(files: Path, directory: Path) -> None:
    _place_on_nodes(2)
    assert _calls(files, directory) == [len(TEXTS), 0, 0, 0]


def _nodes_of_their_own(files: Path, directory: Path) -> None:
    _place_on_nodes(2)
    own = directory / str(dist.get_rank() // 2)
    assert _calls(files, own) == [len(TEXTS), 0, len(TEXTS), 0]
    assert _calls(files, own) == [0, 0, 0, 0]


def _nodes_that_meet_halfway(files: Path, directory: Path) -> None:
    """All but the first share a directory, in which they write at once."""
    _place_on_nodes(1)
    own = directory / str(dist.get_rank() > 0)
    assert _calls(files, own) == [len(TEXTS)] * 4
    assert _calls(files, own) == [0] * 4


def _errors_are_of_all(files: Path, directory: Path) -> None:
    """Whichever rank writes: one sentence on all, and nothing left."""
    with pytest.raises(UserError) as error:
        build(configuration(files / "bad.jsonl"), directory / "data")
    bad = f"{files}/bad.jsonl:6: the line is not an object with a string field 'text'"
    assert _of_all(str(error.value)) == [bad] * 4
    assert not names(directory)
    dist.barrier()
    _place_on_nodes(2)
    own = directory / "data" if dist.get_rank() < 2 else Path("/proc/data")
    with pytest.raises(UserError) as error:
        build(configuration(files / "small.jsonl"), own)
    full = "cannot write the tokens of data.paths to /proc/data: No such file or directory"
    assert _of_all(str(error.value)) == [full] * 4


def _files_that_differ(files: Path, directory: Path) -> None:
    """What rank 0 sees is what counts."""
    _place_on_nodes(2)
    own = directory / str(dist.get_rank() // 2)
    own.mkdir(exist_ok=True)
    write = TEXTS if dist.get_rank() < 2 else TEXTS[::-1]
    if platform.first_of_node():
        write_jsonl(own / "a.jsonl", write)
    with pytest.raises(UserError) as error:
        build(configuration(own / "a.jsonl"), own / "data")
    assert len(set(_of_all(str(error.value)))) == 1
    assert str(error.value) == (
        f"data.paths ({directory}/1/a.jsonl) or data.tokenizer (None) do not hold the same on all "
        "nodes"
    )


def _a_long_wait(files: Path, directory: Path) -> None:
    """Is many short ones: no collective waits for all of the work."""
    reports = 0
    gather = dist.all_gather_object

    def counted(*arguments: Any) -> None:
        nonlocal reports
        reports += 1
        gather(*arguments)

    def work() -> Generator[None, None, str]:
        for _ in range(20):
            time.sleep(0.02)
            yield
        return "done"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "_REPORT_SECONDS", 0.05)
        patch.setattr(dist, "all_gather_object", counted)
        results = platform.work_apart(work() if dist.get_rank() == 2 else None)
    assert results == [None, None, "done", None]
    assert reports >= 4
