"""How many operations a GPU would be given for a step: counted on the meta device, where tensors
have shapes and no contents, so that the sizes are the real ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from refine_kernels import dispatch, launch, sums
from refine_kernels.attention import flash, triton_branches, triton_decode
from refine_kernels.delta_gates import triton_gates
from refine_kernels.delta_rule import triton_chunk, triton_few, triton_read, triton_recurrent
from refine_kernels.lact import triton_features, triton_forms
from refine_kernels.lact import triton_read as lact_read
from refine_kernels.rms_norm import triton_rms_norm
from refine_kernels.rotary import triton_rotary
from refine_kernels.short_conv import triton_conv
from refine_kernels.swiglu import triton_swiglu
from refine_kernels.vocab import triton_rows, triton_sampling
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from refine_mcore import compat, platform
from refine_mcore.config import OptimizerConfig, RefineConfig
from refine_mcore.models.architecture import Architecture
from refine_mcore.models.fast_weight_model import build_model
from refine_mcore.models.transformer_config import transformer_config
from refine_mcore.pipeline import engine as engine_module
from refine_mcore.pipeline import head
from refine_mcore.pipeline.engine import PASS_NAMES, PipelineEngine
from refine_mcore.pipeline.micro_batch import MicroBatch
from refine_mcore.pipeline.passes import Pass
from refine_mcore.rollout import decode_passes
from refine_mcore.rollout.branches import Branches, Randomness
from refine_mcore.step.context import StepContext
from refine_mcore.step.metrics import StepAccumulator
from refine_mcore.step.refine_loss import TextBatch
from refine_mcore.training.optimizer import wrap_data_parallel

META = torch.device("meta")
_KERNELS: tuple[Any, ...] = (
    triton_chunk,
    triton_read,
    triton_recurrent,
    triton_gates,
    triton_branches,
    triton_decode,
    triton_features,
    triton_forms,
    lact_read,
    triton_rms_norm,
    triton_rotary,
    triton_conv,
    triton_swiglu,
    triton_rows,
    triton_sampling,
)
# What only makes a tensor, or looks at one in another way.
_NOTHING_TO_RUN = {
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
    "detach",
    "_unsafe_view",
    "_sparse_coo_tensor_with_dims_and_tensors",
}


class OperationCounter(TorchDispatchMode):
    """Counts operations that run something, by pass and name, a kernel of ours as one."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, Counter[str]] = {}
        self.current: Counter[str] = Counter()
        self.launched: set[str] = set()  # each kernel with what Triton compiles it for

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        outputs = [r.alias_info for r in func._schema.returns]
        view = any(a is not None and not a.is_write for a in outputs)
        given = _tensors(args, kwargs)
        on_device = any(isinstance(x, Tensor) and x.device == META for x in given)
        on_device |= (kwargs or {}).get("device") == META  # made filled
        if on_device and not view and name not in _NOTHING_TO_RUN:
            self.current[name] += 1
        return func(*args, **(kwargs or {}))

    def launch(self, kernel: Any, _: Any, *arguments: Any, **constants: Any) -> None:
        """In place of `refine_kernels.launch.run`."""
        name = kernel.fn.__name__
        self.current[name] += 1
        # as it stands on a kernel for the interpreter, and on one that is compiled
        options = getattr(kernel, "kwargs", None) or vars(kernel)
        alike = options.get("do_not_specialize") or ()
        pairs = zip(kernel.arg_names, arguments, strict=False)
        given = [f"{name}: {_specialised(x, name in alike)}" for name, x in pairs]
        self.launched.add(f"{name} {given} {sorted(constants.items())}")

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """In place of `platform.graph_capture`."""
        run()

        def replay() -> None:
            self.current["graph"] += 1

        return replay

    @contextmanager
    def observe(self, item: Pass) -> Iterator[None]:
        """As `PipelineEngine.observe`."""
        before, self.current = self.current, self.counts.setdefault(PASS_NAMES[item.op], Counter())
        try:
            yield
        finally:
            self.current = before

    @property
    def total(self) -> int:
        return sum(sum(of_pass.values()) for of_pass in self.counts.values())


def _specialised(argument: Any, alike: bool) -> str:
    """What Triton sees of an argument: unless all are `alike` to it, 1 is another than those that
    16 divides, and these than the others."""
    if isinstance(argument, Tensor):
        return str(argument.dtype)
    if not isinstance(argument, int) or alike:
        return type(argument).__name__
    return "1" if argument == 1 else "multiple of 16" if argument % 16 == 0 else "int"


def _tensors(args: Any, kwargs: Any) -> Iterator[Any]:
    for x in (*args, *(kwargs or {}).values()):
        if isinstance(x, list | tuple):
            yield from x
        else:
            yield x


def count_operations(
    architecture: Architecture,
    groups: Any,
    monkeypatch: pytest.MonkeyPatch,
    *,
    tokens: int,
    rolls_out: bool,
    tape_interval: int,
    refine: RefineConfig | None = None,
    slices: int = 1,
    positions: Sequence[Sequence[int]] | None = None,
) -> OperationCounter:
    """Of the passes of one micro-batch, a text of so many tokens, in bfloat16, after one that has
    set things up. Gradients gather in Megatron's buffers; a decode pass that is captured is one.

    With `positions` of one micro-batch after the other none is captured, as in a pipeline.
    """
    counter, config = OperationCounter(), refine or RefineConfig()
    for module in _KERNELS:
        monkeypatch.setattr(module, "_disagreement", lambda *_: None)
    monkeypatch.setattr(triton_few, "disagreement", lambda *_: None)
    monkeypatch.setattr(triton_forms, "_newton_schulz_disagreement", lambda *_: None)
    monkeypatch.setattr(launch, "run", counter.launch)
    monkeypatch.setattr(flash, "refusal", lambda *_, **__: None)
    dispatch.use(**dispatch.ON_A_GPU)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: META)
    left = iter([] if positions is None else positions)
    monkeypatch.setattr(head, "choose_branches", partial(_branches_at, left))
    model = build_model(
        transformer_config(architecture, dtype=torch.bfloat16, tape_interval=tape_interval), groups
    )
    with torch.device(META):
        ids = torch.zeros(1, tokens, dtype=torch.long)
        mask = torch.ones_like(ids, dtype=torch.bool)
    batch = TextBatch(ids, mask, torch.zeros(1, dtype=torch.long))
    for module in (compat, sums):  # as on a GPU
        monkeypatch.setattr(module, "multiplies_into", lambda *_: True)
    wrapped = wrap_data_parallel(model, OptimizerConfig(), groups)
    monkeypatch.setattr(engine_module, "finalize_model_grads", lambda *_: None)
    monkeypatch.setattr(platform, "graph_capture", lambda: counter.capture)
    monkeypatch.setattr(decode_passes, "_difference", lambda *_: 0.0)
    engine = PipelineEngine(wrapped, groups, slices=slices, decode_graphs=positions is None)
    engine.observe = counter.observe
    context = StepContext(model, config, Randomness(0, 0), groups.dp)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **kwargs: None)
    try:
        # of three micro-batches one by one the second captures its decode passes
        once = 3 if rolls_out else 1
        for _ in range(once if positions is None else len(positions)):
            counter.counts.clear()
            wrapped.zero_grad_buffer()
            with counter:
                engine.forward_backward(
                    context, [MicroBatch(batch, rolls_out=rolls_out)], StepAccumulator()
                )
    finally:
        dispatch.use()
    return counter


def _branches_at(
    left: Iterator[Sequence[int]],
    model: Any,
    entropy: Tensor,
    batch: TextBatch,
    config: RefineConfig,
    randomness: Any,
) -> tuple[Branches, int]:
    """At the next positions, or else spread over the text, away from chunk borders and from the
    states that tapes keep: there are no entropies to choose by."""
    positions = next(left, None)
    if positions is None:
        step = batch.tokens.shape[1] // config.num_chunks
        positions = [step * i + step // 2 + 333 for i in range(config.num_chunks)]
    return Branches.at([positions]), batch.tokens.shape[1]
