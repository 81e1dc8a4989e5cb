"""The check that weights are numbers."""

from __future__ import annotations

import torch

from refine_mcore.errors import UserError

_VALUES_AT_ONCE = 1 << 22


def require_finite(tensor: torch.Tensor, what: str) -> None:
    """Raise UserError, naming `what`, if `tensor` holds NaN or infinity; needs little memory."""
    for piece in tensor.flatten().split(_VALUES_AT_ONCE):
        if piece.element_size() == 1:
            piece = piece.float()  # torch compares no 8-bit floats
        if not all(extreme.isfinite() for extreme in piece.aminmax()):  # NaN propagates
            raise UserError(f"{what} holds values that are not finite (NaN or infinity)")
