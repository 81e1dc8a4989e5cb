"""Functions that keep their inputs for the backward and make all else again there."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, of whose intermediates autograd keeps nothing.

    Only tensors that stand in ``args`` themselves count as inputs: autograd's hooks see those.  The
    function must draw no random numbers and must not depend on state that changes before the
    backward.
    """
    if not (torch.is_grad_enabled() and any(_needs_gradient(arg) for arg in args)):
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _needs_gradient(arg: Any) -> bool:
    return isinstance(arg, Tensor) and arg.requires_grad
