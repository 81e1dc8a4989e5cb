"""Stands for the Adam of Transformer Engine and Apex, which Megatron takes where one of them is
installed: moments by parameter, the count of steps a number in each group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core import optimizer
from megatron.core.optimizer import distrib_optimizer
from torch.optim.adamw import adamw


class FusedAdam(torch.optim.Optimizer):
    """torch's AdamW, one parameter after the other."""

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        adam_w_mode: bool,
    ) -> None:
        assert adam_w_mode
        options = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                adamw(
                    [parameter],
                    [parameter.grad],
                    [state["exp_avg"]],
                    [state["exp_avg_sq"]],
                    [],
                    [torch.tensor(float(group["step"] - 1))],
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )


def use_fused_adam(patch: pytest.MonkeyPatch) -> None:
    """Megatron as it is with Apex installed."""
    patch.setattr(optimizer, "Adam", FusedAdam)
    patch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    patch.setattr(distrib_optimizer, "Adam", FusedAdam)
    patch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    patch.setattr(distrib_optimizer, "USING_APEX_OPTIMIZER", True)
