"""SIGTERM and SIGUSR1 ask a run to end after the step it is in, with a checkpoint.

Slurm and other schedulers send them before they take the machine away. The ranks agree at the
boundary of a step: one may be told while another has begun the next one already.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from refine_mcore import platform
from refine_mcore.errors import failed_elsewhere

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequests:
    """While entered, the first of the signals is a request; a second one does what it did before.

    Every rank makes one, in its main thread.
    """

    def __init__(self) -> None:
        self._group = platform.host_group()
        self._received = 0

    def __enter__(self) -> StopRequests:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._restore()
        # torchrun stops the ranks that lost another by SIGTERM: there is nothing left to finish.
        if self._received and error is not None and failed_elsewhere(error):
            os.kill(os.getpid(), self._received)

    def asked(self) -> str | None:
        """The signal that some rank has received, if one has. Every rank calls this after a step.

        One number per rank is reduced between the hosts: the accelerator is not waited for.
        """
        received = torch.tensor(self._received)
        dist.all_reduce(received, op=dist.ReduceOp.MAX, group=self._group)
        number = int(received)
        return signal.Signals(number).name if number else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
