"""How a program ends: exit codes, and one sentence on stderr."""

import pytest

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


def test_interrupt_exits_130() -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli(_interrupted)
    assert exit_info.value.code == 130


def test_bug_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="ours"):
        cli(_has_a_bug)
