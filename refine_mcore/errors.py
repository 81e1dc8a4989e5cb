"""Errors that are the user's to fix, and how an entry point reports them.

Library code raises `UserError` with one plain sentence; every program of the project ends with
`cli(main)`, which turns it into exit code 2 without a traceback. Any other exception is a bug of
ours and keeps its traceback.

Of a job of many ranks the first failure should be the one that is seen. The ranks that wait for the
failed one fail too, as soon as its connections close, and often before torchrun looks: they let it
speak first.
"""

import os
import re
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from refine_mcore import logs

USER_ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, as shells report it

# How long a rank other than 0 waits for the launcher to stop it before it speaks for itself.
_OTHER_RANK_GRACE_SECONDS = 10.0
# The same for a rank that only lost another: longer, as the other may be in its own time of grace.
_LOST_RANK_GRACE_SECONDS = 15.0


class UserError(Exception):
    """Bad input. The message is one plain sentence that names what is wrong and where."""


def cli(main: Callable[[list[str]], None]) -> NoReturn:
    """Run `main(argv)` with the command line's arguments and exit: 0, or 2 after a `UserError`.

    What the program logs is shown from here on.
    Any other exception passes through. Under torchrun its traceback also becomes part of the report
    on failed ranks.
    """
    logs.set_up()
    try:
        main(sys.argv[1:])
    except UserError as error:
        _report(error)
        sys.exit(USER_ERROR_EXIT_CODE)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_EXIT_CODE)
    except SystemExit:
        raise
    except BaseException as error:  # a failed save's CheckpointException is no Exception
        if "RANK" in os.environ:
            _let_the_cause_speak_first(error)
            _tell_torchrun(error)
        raise
    sys.exit(0)


def failed_elsewhere(error: BaseException) -> bool:
    """Whether a collective or the rendezvous failed, which says nothing against this rank."""
    from torch.distributed import DistError  # here, as torch takes seconds to import

    # gloo throws plain RuntimeErrors that begin with the place in its sources: [FILE:LINE].
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError)
        and re.match(r"\[[^]]*/gloo/[^]]*:\d+\]", str(error)) is not None
    )


def _let_the_cause_speak_first(error: BaseException) -> None:
    """If another rank is the cause, say so in `error` and wait for it to be reported first."""
    if not failed_elsewhere(error):
        return
    error.add_note(
        "Another rank failed, or did not get here within parallel.timeout seconds: "
        "the cause is what that rank says, if it says anything."
    )
    if "timed out" not in str(error).lower():  # a rank that hangs reports nothing
        time.sleep(_LOST_RANK_GRACE_SECONDS)


def _tell_torchrun(error: BaseException) -> None:
    """Leave traceback and time of `error` where torchrun looks for the first failure."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _report(error: UserError) -> None:
    """Print the sentence once for all ranks.

    Most user errors strike every rank alike. Rank 0 reports and exits at once, whereupon torchrun
    stops the others while they wait here; a rank that meets an error alone outlives the wait.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_OTHER_RANK_GRACE_SECONDS)
    print(f"error: {error}", file=sys.stderr, flush=True)
