"""Errors that are the user's to fix, and how an entry point reports them.

Library code raises `UserError` with one plain sentence; every program of the project ends with
`cli(main)`, which turns it into exit code 2 without a traceback. Any other exception is a bug of
ours and keeps its traceback.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

USER_ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, as shells report it

# How long a rank other than 0 waits for the launcher to stop it before it speaks for itself.
_OTHER_RANK_GRACE_SECONDS = 10.0


class UserError(Exception):
    """Bad input. The message is one plain sentence that names what is wrong and where."""


def cli(main: Callable[[list[str]], None]) -> NoReturn:
    """Run `main(argv)` with the command line's arguments and exit: 0, or 2 after a `UserError`."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        _report(error)
        sys.exit(USER_ERROR_EXIT_CODE)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_EXIT_CODE)
    sys.exit(0)


def _report(error: UserError) -> None:
    """Print the sentence once for all ranks.

    Most user errors strike every rank alike. Rank 0 reports and exits at once, whereupon torchrun
    stops the others while they wait here; a rank that meets an error alone outlives the wait.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_OTHER_RANK_GRACE_SECONDS)
    print(f"error: {error}", file=sys.stderr, flush=True)
