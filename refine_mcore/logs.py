"""Where log messages go: stderr, those of rank 0 from INFO on, those of other ranks from WARNING.

Only the project's own loggers are set up: Megatron's and torch's would say too much at INFO.
"""

import logging
import os
import sys

LOGGERS = ("refine_mcore", "refine_kernels")


class _Stderr(logging.Handler):
    """Writes to what is stderr at that moment, which tests and programs may redirect."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def set_up() -> None:
    """Show the project's log messages; called again, for the present rank.

    Lines name the rank if there are several. Messages also reach the handlers of the root logger.
    """
    rank = os.environ.get("RANK", "0")
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    handler = _Stderr()
    handler.setFormatter(
        logging.Formatter(
            f"%(asctime)s {f'[rank {rank}] ' if several else ''}%(levelname)s %(message)s",
            datefmt="%Y-%m-%d %H:%M:%S",
        )
    )
    for name in LOGGERS:
        logger = logging.getLogger(name)
        for other in [h for h in logger.handlers if isinstance(h, _Stderr)]:
            logger.removeHandler(other)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if rank == "0" else logging.WARNING)
