"""How a program ends: exit codes, and one sentence on stderr."""

import json
import logging
import re
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from refine_mcore import errors
from refine_mcore.errors import UserError, cli


def _fails(argv: list[str]) -> None:
    raise UserError("config.yaml: unknown key 'lr_rate', did you mean 'lr'?")


def _interrupted(argv: list[str]) -> None:
    raise KeyboardInterrupt


def _has_a_bug(argv: list[str]) -> None:
    raise ValueError("ours")


def test_success_exits_0_and_gets_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["program", "--steps", "3"])
    received: list[str] = []
    with pytest.raises(SystemExit) as exit_info:
        cli(received.extend)
    assert (exit_info.value.code, received) == (0, ["--steps", "3"])


@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_user_error_is_one_sentence_and_exit_code_2(
    rank: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank other than 0 speaks too, if nothing stops it in its time of grace."""
    monkeypatch.setattr(errors, "_OTHER_RANK_GRACE_SECONDS", 0.01)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as exit_info:
        cli(_fails)
    assert exit_info.value.code == 2
    assert capsys.readouterr() == (
        "",
        "error: config.yaml: unknown key 'lr_rate', did you mean 'lr'?\n",
    )


def test_the_log_is_shown_once_by_rank_0_and_warnings_by_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the project's own loggers; calling `cli` again repeats nothing."""

    def speaks(argv: list[str]) -> None:
        for name in ("refine_mcore.data.windows", "refine_kernels.dispatch", "megatron.core"):
            logging.getLogger(name).info("info of %s", name)
            logging.getLogger(name).debug("never")
        logging.getLogger("refine_mcore").warning("careful")

    def said() -> list[str]:
        with pytest.raises(SystemExit):
            cli(speaks)
        return [
            re.sub(r"^[-\d]{10} [:\d]{8} ", "", x) for x in capsys.readouterr().err.splitlines()
        ]

    own = ["INFO info of refine_mcore.data.windows", "INFO info of refine_kernels.dispatch"]
    assert said() == said() == [*own, "WARNING careful"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert said() == ["[rank 1] WARNING careful"]
    monkeypatch.setenv("RANK", "0")
    assert said() == [f"[rank 0] {line}" for line in [*own, "WARNING careful"]]


def test_interrupt_exits_130() -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli(_interrupted)
    assert exit_info.value.code == 130


def test_bug_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="ours"):
        cli(_has_a_bug)


GLOO = "[/build/third_party/gloo/gloo/transport/tcp/pair.cc:553] "
LOST = RuntimeError(GLOO + "Connection closed by peer [127.0.0.1]:2992.")
NO_ANSWER = RuntimeError(GLOO + "Timed out waiting 10000ms for recv operation to complete")
OURS = RuntimeError("cannot read [/data/gloo/text.txt]")


@pytest.mark.parametrize(
    "error, elsewhere, waits",
    [
        (LOST, True, True),
        (dist.DistNetworkError("Failed to recv, got 0 bytes."), True, True),
        (NO_ANSWER, True, False),
        (OURS, False, False),
        (ValueError("ours"), False, False),
    ],
)
def test_a_rank_that_lost_another_leaves_it_the_word(
    error: Exception,
    elsewhere: bool,
    waits: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what torchrun is told is the traceback."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

    def fails(argv: list[str]) -> None:
        raise error

    with pytest.raises(type(error)):
        cli(fails)
    assert slept == ([errors._LOST_RANK_GRACE_SECONDS] if waits else [])
    told = json.loads((tmp_path / "error.json").read_text())["message"]["extraInfo"]["py_callstack"]
    assert str(error) in told
    assert ("Another rank failed" in told) == elsewhere
