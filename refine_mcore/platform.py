"""The seam between CUDA with NCCL and CPU with gloo. Nothing else asks whether there is a GPU.

With CUDA this is plain Megatron-Core. Without it, megatron-core 0.16.1 needs help in three ways,
given by `initialize` and nowhere else:

1. calls to `torch.cuda` (streams, random state, current device) get their CPU counterparts;
2. functions that hold a device as a literal ('cuda', 'torch.cuda.FloatTensor') get the CPU's;
3. Megatron's CUDA random state becomes the state of the one CPU generator.

No function of Megatron is copied or reimplemented. Covered are the tensor-parallel layers and
random states, recomputation, the schedules without pipelining and 1F1B, DDP, the optimizers and
gradient clipping, and `torch_dist` checkpoints. Outside that (interleaved schedules, fp16 loss
scaling, context parallelism) Megatron stops with PyTorch's own "no CUDA" errors.

Programs call `initialize`, then work inside `with distributed(timeout)`, where they call
`initialize_model_parallel`. Megatron is imported by these calls only, so that a program can refuse
bad input at once. A program that saves checkpoints must guard its entry with `if __name__ ==
"__main__"`: saving starts a helper process that imports the main module again.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import CodeType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from refine_mcore import compat
from refine_mcore.errors import UserError

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

T = TypeVar("T")

# The functions of megatron.core, by module, that name a CUDA device or tensor type literally.
_DEVICE_LITERALS = {
    "tensor_parallel.data": ("_build_key_size_numel_dictionaries",),
    "pipeline_parallel.schedules": (
        "forward_step",
        "forward_backward_no_pipelining",
        "forward_backward_pipelining_without_interleaving",
    ),
    "optimizer.clip_grads": (
        "get_grad_norm_fp32",
        "clip_grad_by_total_norm_fp32",
        "count_zeros_fp32",
    ),
    "optimizer.optimizer": (
        "MixedPrecisionOptimizer.__init__",
        "Float16OptimizerWithFloat16Params.__init__",
        "FP32Optimizer.__init__",
    ),
    "optimizer.distrib_optimizer": (
        "DistributedOptimizer.__init__",
        "DistributedOptimizer._build_model_and_main_param_groups",
    ),
    "dist_checkpointing.exchange_utils": (
        "_get_empty_tensor_for_exchange",
        "exchange_loaded_tensors_gather_rounds",
    ),
    "dist_checkpointing.strategies.state_dict_saver": ("verify_global_md_reuse",),
    "transformer.utils": ("get_default_causal_mask", "get_sliding_window_causal_mask"),
    "utils": ("local_multi_tensor_l2_norm",),
}

# Streams of a middle stage: computing, two per channel, those of Megatron's groups.
_QUEUES = 16

# How often ranks that work apart tell each other that they still do.
_REPORT_SECONDS = 1.0

_process_group_timeout = timedelta(minutes=10)


@functools.cache
def initialize() -> None:
    """Make megatron-core usable here. Call it first; further calls do nothing.

    Raises `UserError` if the installed megatron-core is not the supported version.
    """
    compat.check_version()
    compat.silence_warnings()
    compat.repair_megatron()
    if not torch.cuda.is_available():
        _stand_in_for_torch_cuda()
        _use_cpu_random_state()
        warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS")
        for module, names in _DEVICE_LITERALS.items():
            for name in names:
                _move_literals_to_cpu(_resolve(module, name))


def device() -> torch.device:
    """Where this process computes: its own GPU (by LOCAL_RANK), or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def graph_capture() -> Callable[[Callable[[], None]], Callable[[], None]] | None:
    """What captures work on fixed memory to have the device repeat it; None where there is no such
    thing, as on a CPU."""
    return _cuda_graph if device().type == "cuda" else None


def _cuda_graph(run: Callable[[], None]) -> Callable[[], None]:
    # as torch asks for: once on a stream of its own before, so that nothing is set up meanwhile
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # other threads of the process (NCCL's watchdog) may go on asking the device meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


def backend() -> str:
    """The collective backend that serves `device()`: 'nccl' or 'gloo'."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def loading_waits() -> bool:
    """Whether loading a kernel may wait for all that the device does, messages included."""
    return torch.cuda.is_available()


def let_messages_overlap(stages: int) -> None:
    """Set CUDA up, before it starts, for messages that wait while a stage computes; nothing to do
    for one stage.

    Programs call it before they import what imports Megatron: that imports Transformer Engine,
    where it is installed, which looks at the number of queues and may start CUDA.

    Every channel of a pipeline waits in a stream of its own (pipeline/channels.py), often for what
    this rank has yet to compute. So no stream may stand in another's hardware queue, and no first
    launch of a kernel may wait for the device, as lazy loading does. Raises `UserError` if the
    environment asks for too few queues.
    """
    if stages == 1:
        return
    os.environ["CUDA_MODULE_LOADING"] = "EAGER"
    queues = os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    if backend() == "nccl" and not (queues.isdecimal() and int(queues) >= _QUEUES):
        raise UserError(
            f"a pipeline needs {_QUEUES} hardware queues or more: unset "
            f"CUDA_DEVICE_MAX_CONNECTIONS, which is {queues}, or set it to 32"
        )


def init_distributed(timeout_s: float = 600.0) -> None:
    """Join the ranks that torchrun started, or, started plainly, be a world of one.

    A collective that a rank does not reach fails after `timeout_s`, in this group and in those of
    `initialize_model_parallel`. A world of one keeps its rendezvous in memory: no port, no file,
    no clash between runs on one machine.
    """
    global _process_group_timeout
    _process_group_timeout = timedelta(seconds=timeout_s)
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend(), timeout=_process_group_timeout)
    else:
        dist.init_process_group(
            backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=_process_group_timeout
        )


def initialize_model_parallel(
    tensor: int = 1, pipeline: int = 1, seed: int = 0
) -> ProcessGroupCollection:
    """Lay out the ranks as tensor x pipeline x data parallel and seed Megatron's random states.

    Returns the process groups to hand to the modules. Call after `init_distributed`; a second call
    replaces the layout, whose groups are closed. Raises `UserError` if the sizes do not divide the
    number of ranks.
    """
    initialize()
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    world_size = dist.get_world_size()
    if min(tensor, pipeline) < 1 or world_size % (tensor * pipeline):
        raise UserError(
            f"{world_size} rank(s) cannot be shared by model replicas of {tensor} (tensor) x "
            f"{pipeline} (pipeline) ranks"
        )
    compat.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        distributed_timeout_minutes=_process_group_timeout / timedelta(minutes=1),
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return ProcessGroupCollection.use_mpu_process_groups()


def host_group() -> dist.ProcessGroup:
    """All ranks, for what their hosts tell each other in CPU tensors. Every rank asks for it, once
    the layout stands."""
    world = dist.group.WORLD
    assert world is not None
    if backend() == "gloo":
        return world
    return dist.new_group(backend="gloo", timeout=_process_group_timeout)


def rank() -> int:
    """This process among all; 0 in one that has not met others."""
    return dist.get_rank() if dist.is_initialized() else 0


def first_of_node() -> bool:
    """Whether this is the rank that does what is done once per node."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def on_first_rank(action: Callable[[], T]) -> T:
    """Run `action` on rank 0; every rank gets its value, or a UserError there with its sentence."""
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    value, message = outcome
    if message is not None:
        raise UserError(message)
    return value


def work_apart(work: Generator[None, None, T] | None) -> list[T | None]:
    """Let the ranks that have some do their `work` while the others wait; what each returns, by
    rank. Every rank calls this.

    `work` yields every so often: then the ranks report to each other, so that it may take longer
    than the timeout of a collective, and a rank that dies is noticed as in any collective. A
    UserError of one ends the work of all and is raised, the same, on every rank; `work` is closed.
    """
    done, value, message = work is None, None, None
    world = dist.get_world_size() if dist.is_initialized() else 1
    try:
        while True:
            if work is not None and not done:
                done, value, message = _work_a_while(work)
            reports: list[Any] = [(done, value, message)] * world
            if world > 1:
                dist.all_gather_object(reports, (done, value, message))
            for _, _, failure in reports:
                if failure is not None:
                    raise UserError(failure)
            if all(finished for finished, _, _ in reports):
                return [result for _, result, _ in reports]
    finally:
        if work is not None:
            work.close()


def _work_a_while(work: Generator[None, None, T]) -> tuple[bool, T | None, str | None]:
    """Whether `work` is done, what it returned, and with which sentence it failed."""
    until = time.monotonic() + _REPORT_SECONDS
    try:
        while time.monotonic() < until:
            next(work)
    except StopIteration as end:
        return True, end.value, None
    except UserError as error:
        return True, None, str(error)
    return False, None, None


@contextmanager
def distributed(timeout_s: float) -> Iterator[None]:
    """A program's part in a job: `init_distributed` before it, `shutdown` after it.

    An exception in a job of several ranks leaves the connections to the end of the process: closing
    them in order could wait for ranks that never answer, and hide what went wrong.
    """
    init_distributed(timeout_s)
    try:
        yield
    except BaseException:
        if dist.get_world_size() == 1:
            shutdown()
        raise
    shutdown()


def shutdown() -> None:
    """Leave all process groups: the end of this process's part in the job."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _stand_in_for_torch_cuda() -> None:
    """Point the `torch.cuda` calls on Megatron's CPU-capable paths at their CPU counterparts.

    `torch.cuda.is_available()` stays False. Every name gets a function of its own: torch.compile
    refuses one object registered under two names.
    """
    cuda: Any = torch.cuda
    for owner, names in (
        (cuda, ("synchronize", "set_device", "empty_cache")),
        (cuda.nvtx, ("range_push", "range_pop")),
    ):
        for name in names:
            setattr(owner, name, lambda *args, **kwargs: None)
    for owner in (torch.Tensor, torch.nn.Module):
        owner.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]

    cuda.current_device = lambda: torch.device("cpu")
    cuda.current_stream = lambda *args: torch.cpu.current_stream()
    cuda.default_stream = lambda *args: torch.cpu.current_stream()
    cuda.stream = lambda stream: torch.cpu.stream(stream)
    cuda.Stream = _Stream


class _Stream(torch.cpu.Stream):
    """A CPU stream that accepts the arguments of a CUDA stream.

    A class and not a function, because Megatron writes `torch.cuda.Stream | None` annotations.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()


def _use_cpu_random_state() -> None:
    """Let Megatron's random state tracker switch the CPU generator instead of the GPU's.

    Its setter queues the change until CUDA starts, which here is never: without this, the
    tensor-parallel regions would silently draw from the wrong state.
    """
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    cuda: Any = torch.cuda
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    for owner in (cuda, cuda.random):
        owner.get_rng_state = lambda device=None: torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    random._set_cuda_rng_state = set_rng_state
    # The tracker reports CPU draws inside its regions, which is here exactly what should happen.
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _resolve(module: str, name: str) -> Any:
    """The function `name` (dotted for a method) of megatron.core's `module`, undecorated."""
    found: Any = importlib.import_module(f"megatron.core.{module}")
    for part in name.split("."):
        found = getattr(found, part)
    return inspect.unwrap(getattr(found, "__func__", found))


def _move_literals_to_cpu(function: Any) -> None:
    """Replace the CUDA device names among the constants of `function`, in place.

    In place means in its code object, so that every module that imported the function is served.
    Raises if there is none: then Megatron has changed and `_DEVICE_LITERALS` is out of date.
    """
    code = function.__code__
    moved = _on_cpu(code)
    if moved.co_consts == code.co_consts:
        raise RuntimeError(f"megatron-core's {function.__qualname__} names no CUDA device any more")
    function.__code__ = moved


def _on_cpu(constant: Any) -> Any:
    """`constant` with CUDA device and tensor type names replaced, in nested constants too."""
    if isinstance(constant, CodeType):
        return constant.replace(co_consts=tuple(map(_on_cpu, constant.co_consts)))
    if isinstance(constant, tuple):
        return tuple(map(_on_cpu, constant))
    if constant == "cuda":
        return "cpu"
    if isinstance(constant, str) and constant.startswith("torch.cuda."):
        return constant.replace("torch.cuda.", "torch.", 1)
    return constant
