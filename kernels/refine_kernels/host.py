"""Numbers known on the host, on the device that computes with them."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Whole numbers known on the host as an int64 tensor on `device`, not to be written to.

    The layers of a model ask for the same few lists one after the other: they share one copy.
    """
    return _on_device(tuple(values), device)


@functools.lru_cache(maxsize=256)
def _on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # whoever takes it from here may need it for a backward
        return without_waiting(torch.tensor(values, dtype=torch.long), device)


def without_waiting(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's on `device`. To a GPU it goes through pinned memory: from any other
    the copy would begin only when the GPU has done all that it was given before, and the host would
    wait for that."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
