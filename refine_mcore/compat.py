"""What depends on the version of megatron-core, and repairs of its bugs. Nothing else does.

The repairs concern every installation without Transformer Engine and Apex, with CUDA or not; what
only a machine without CUDA needs is in `platform`. Line numbers are those of megatron-core 0.16.1.
"""

import errno
import functools
import gc
import logging
import multiprocessing
import os
import signal
import threading
import warnings
from importlib import metadata
from itertools import chain
from multiprocessing.managers import SyncManager
from types import SimpleNamespace
from typing import Any

import torch
from refine_kernels.sums import add_product_, multiplies_into
from torch import Tensor

from refine_mcore.errors import UserError

logger = logging.getLogger(__name__)

SUPPORTED_VERSION = "0.16.1"


def check_version() -> None:
    """Raise `UserError` unless the megatron-core installed is the one this module knows.

    The repairs below and the CPU seam replace parts of its code, so a near miss is not good enough.
    """
    try:
        installed = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        installed = "not installed"
    if installed != SUPPORTED_VERSION:
        raise UserError(f"megatron-core {SUPPORTED_VERSION} is required, found: {installed}")


def silence_warnings() -> None:
    """Hide what is said at run time about megatron-core's code, which users cannot change.

    Its import warnings are hidden by the package itself, before its first import.
    """
    for message, category in (
        # The optimizer asks its shards, views without gradients of their own, for `.grad` (66).
        ("The .grad attribute of a Tensor that is not a leaf", UserWarning),
        # It calls torch by names that newer torch replaces.
        ("`torch.distributed.(reduce_scatter|all_gather_into)_tensor` is", FutureWarning),
        ("`load_state_dict` is deprecated", FutureWarning),
    ):
        warnings.filterwarnings("ignore", message=message, category=category)


def checkpoint_metadata() -> dict[str, Any]:
    """Fresh `metadata` for `sharded_state_dict`; fresh because Megatron writes into it. Layers are
    stored one by one, since those of a hybrid differ."""
    return {"non_homogeneous_layers": True}


def prime_optimizer(optimizer: Any) -> None:
    """Give a Megatron optimizer over Adam, torch's or a fused one, its empty state: step 0, zero
    moments.

    Call it before listing the state, to load into or to save: there is none before the first step
    (Megatron's initialisation in optimizer/__init__.py:391 is for formats that are not used here,
    and omits the count of torch's Adam, which distrib_optimizer.py:640 asserts). Fused Adams count
    in their groups, from 1. State that already exists is left alone.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam = part.optimizer
        counts = isinstance(adam, torch.optim.Adam)
        for group in adam.param_groups:
            for parameter in group["params"]:
                state = adam.state[parameter]
                if state:
                    continue
                state["exp_avg"] = torch.zeros_like(parameter.data)
                state["exp_avg_sq"] = torch.zeros_like(parameter.data)
                if counts:
                    state["step"] = torch.zeros((), dtype=torch.float32)


def fuse_weight_gradients(model: torch.nn.Module) -> None:
    """Have the layers of a model under Megatron's DDP add the gradients of their weights to its
    buffers themselves, where that can be done: without a tensor for each gradient and without
    rounding it to the weights' dtype.

    Megatron's parallel layers do it by the product that makes a gradient, with Apex's extension
    (tensor_parallel/layers.py:42) or torch's product where that multiplies the weights' dtype into
    the buffers'; embeddings (models/embedding.py) row by row, unless their weight is also that of
    an output layer that cannot: a weight's gradient comes in one way.
    """
    from megatron.core.tensor_parallel import layers

    modules: list[Any] = [x for x in model.modules() if hasattr(x, "gradient_accumulation_fusion")]
    embeddings = [x for x in modules if isinstance(x, layers.VocabParallelEmbedding)]
    linear = [x for x in modules if x not in embeddings]
    if _products_add(linear):
        for layer in linear:
            layer.gradient_accumulation_fusion = True
    elif any(x.is_output_weight for x in embeddings):
        return
    for embedding in embeddings:
        embedding.gradient_accumulation_fusion = True
        embedding.weight.zero_out_wgrad = False  # DDP's hook has nothing to add (438)


def _products_add(linear: list[Any]) -> bool:
    """Whether the products of Megatron's layers can add to the buffers, after seeing to it."""
    from megatron.core.tensor_parallel import layers

    weights = [x.weight for x in linear if x.weight is not None]
    kinds = {(w.dtype, w.main_grad.dtype, w.device) for w in weights}
    if any(sums == torch.float64 for _, sums, _ in kinds):
        return False  # Megatron's layers refuse it (577)
    if not layers._grad_accum_fusion_available:
        if not all(multiplies_into(*kind) for kind in kinds):
            logger.info("weight gradients are added to the buffers after their products")
            return False
        layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
            wgrad_gemm_accum_fp32=_add_weight_gradient, wgrad_gemm_accum_fp16=_add_weight_gradient
        )
    return True


def _add_weight_gradient(inputs: Tensor, grad_outputs: Tensor, sums: Tensor) -> None:
    """sums [o, i] += grad_outputs [T, o]^T inputs [T, i]."""
    add_product_(sums, grad_outputs.t(), inputs)


def forget_write_results() -> None:
    """Drop what checkpoint writers have reported and nobody has read.

    All saves of a process share one queue (filesystem_async.py:48), without a name on its entries:
    the next save would take the report for its own.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = None


def destroy_model_parallel() -> None:
    """End the present layout, if there is one, with all process groups but the default one.

    Megatron's own function (parallel_state.py:2085) forgets its groups and lets their connections
    be: gloo's have three threads each, which a program of many layouts collects by the thousand.
    """
    from megatron.core import parallel_state
    from torch.distributed import distributed_c10d

    parallel_state.destroy_model_parallel()
    for group in list(distributed_c10d._world.pg_map):
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)
    gc.collect()  # a group ends with the last reference: models are full of cycles


@functools.cache
def repair_megatron() -> None:
    """Repair, once per process, what fails without Transformer Engine and Apex."""
    _repair_distributed_optimizer_loading()
    _repair_float32_parameters_of_bfloat16_models()
    _repair_write_errors()
    _repair_left_behind_results_queue()
    _repair_step_count_of_zero()
    _repair_fused_gradients_under_hooks()


def _repair_distributed_optimizer_loading() -> None:
    """Loading the state of `DistributedOptimizer` over torch's Adam.

    `load_state_dict` (825) hands ONE `step` tensor to all parameters, which Adam then increments
    once per parameter: a resumed run silently goes on with wrong bias corrections.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    load_state_dict = DistributedOptimizer.load_state_dict

    @functools.wraps(load_state_dict)
    def load_with_own_steps(self: Any, state_dict: dict[str, Any]) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    DistributedOptimizer.load_state_dict = load_with_own_steps


def _repair_float32_parameters_of_bfloat16_models() -> None:
    """Saving a bfloat16 model some of whose parameters are float32.

    `DistributedOptimizer` puts the float32 ones first in each group (distrib_optimizer.py:441), but
    numbers them in the order of its buffers (286): it looks up one parameter's state for another.
    `Float16OptimizerWithFloat16Params` numbers the bfloat16 ones alone (optimizer.py:813), and the
    state of the others, which its groups hold too, has no parameter: ValueError.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    build_ranges = DistributedOptimizer._build_optimizer_group_ranges.__func__  # type: ignore[attr-defined]

    @functools.wraps(build_ranges)
    def build_ranges_in_order(cls: Any, groups: Any, buffers: Any) -> tuple[dict, list]:
        _, ranges = build_ranges(cls, groups, buffers)
        places: dict[Any, tuple[int, int]] = {}
        for index, group in enumerate(ranges):
            group["params"].sort(key=lambda parameter: parameter.dtype != torch.float32)
            places |= {parameter: (index, i) for i, parameter in enumerate(group["params"])}
        return places, ranges

    DistributedOptimizer._build_optimizer_group_ranges = classmethod(build_ranges_in_order)  # type: ignore[assignment]
    for name in ("sharded_state_dict", "load_state_dict"):
        method = getattr(Float16OptimizerWithFloat16Params, name)
        setattr(Float16OptimizerWithFloat16Params, name, _with_all_parameters(method))


def _with_all_parameters(method: Any) -> Any:
    """A method of `Float16OptimizerWithFloat16Params` that takes its float32 parameters to be
    bfloat16 ones whose float32 copies they are themselves."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **options: Any) -> Any:
        groups = self.float16_groups, self.fp32_from_float16_groups
        pairs = zip(chain.from_iterable(groups[0]), chain.from_iterable(groups[1]), strict=True)
        of_copy = {copy: parameter for parameter, copy in pairs}
        copies = [list(group["params"]) for group in self.optimizer.param_groups]
        self.fp32_from_float16_groups = copies
        self.float16_groups = [[of_copy.get(copy, copy) for copy in group] for group in copies]
        try:
            return method(self, *args, **options)
        finally:
            self.float16_groups, self.fp32_from_float16_groups = groups

    return run


def _repair_fused_gradients_under_hooks() -> None:
    """Weight gradients that their products have added, where hooks on saved tensors are in force.

    The layer asks the weight that autograd saved for what DDP knows of it (layers.py:581), and with
    hooks that is another tensor, without it: the layer hands on no gradient, which overlapped
    reduction refuses.
    """
    from megatron.core.tensor_parallel.layers import LinearWithGradAccumulationAndAsyncCommunication

    function: Any = LinearWithGradAccumulationAndAsyncCommunication
    forward, backward = function.forward, function.backward

    @functools.wraps(forward)
    def forward_with_weight(ctx: Any, inputs: Tensor, weight: Tensor, *options: Any) -> Tensor:
        ctx.parameter = weight
        return forward(ctx, inputs, weight, *options)

    @functools.wraps(backward)
    def backward_with_weight(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        of_inputs, of_weight, *rest = backward(ctx, grad)
        weight = ctx.parameter
        added = ctx.gradient_accumulation_fusion and of_weight is None
        if added and hasattr(weight, "grad_added_to_main_grad"):
            weight.grad_added_to_main_grad = True
            of_weight = weight.detach()  # for DDP's hook, which reads nothing of it
        return of_inputs, of_weight, *rest

    function.forward = staticmethod(forward_with_weight)
    function.backward = staticmethod(backward_with_weight)


def _repair_write_errors() -> None:
    """A file that cannot be written is an OSError.

    torch.save, which writes the tensors (filesystem_async.py:351) and on rank 0 `common.pt`
    (strategies/common.py:52), makes of it a RuntimeError about its archive that does not say why.
    After a failed `common.pt` the other ranks wait for rank 0: here they fail with it.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy

    write_item = filesystem_async._write_item
    save_common = TorchCommonSaveStrategy.save_common

    @functools.wraps(write_item)
    def write_item_or_say_why(*args: Any, **options: Any) -> Any:
        try:
            return write_item(*args, **options)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    @functools.wraps(save_common)
    def save_common_on_behalf_of_all(self: Any, state_dict: Any, directory: Any) -> None:
        failed = [False]
        try:
            save_common(self, state_dict, directory)
        except (OSError, RuntimeError):
            failed = [True]
        torch.distributed.broadcast_object_list(failed)
        if failed[0]:
            raise OSError(errno.EIO, "common.pt could not be written")

    filesystem_async._write_item = write_item_or_say_why
    TorchCommonSaveStrategy.save_common = save_common_on_behalf_of_all
    # Says the same in its own words before the exception does.
    logging.getLogger(filesystem_async.__name__).setLevel(logging.CRITICAL)


def _repair_left_behind_results_queue() -> None:
    """The process that holds the queue of write results (filesystem_async.py:48) ends with its
    parent; left alone it stays behind when that is killed, or ends before the parent has saved:
    torchrun sends SIGTERM to a rank and all that it has started."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def get_write_results_queue() -> Any:
        if filesystem_async._results_queue is None:
            manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
            manager.start(initializer=_end_with_parent)
            filesystem_async._results_queue = manager.Queue()
        return filesystem_async._results_queue

    filesystem_async._get_write_results_queue = get_write_results_queue


def _repair_step_count_of_zero() -> None:
    """Checkpoints of an Adam that has not stepped yet hold its count of steps, which is 0: the
    optimizers that are not sharded leave it out if it is not true (optimizer.py:833), and what they
    wrote cannot be loaded."""
    from megatron.core.optimizer import optimizer as megatron

    def repair(kind: Any) -> None:
        sharded_state_dict = kind.sharded_state_dict

        @functools.wraps(sharded_state_dict)
        def sharded_with_count(self: Any, *args: Any, **options: Any) -> dict[str, Any]:
            template: dict[str, Any] = sharded_state_dict(self, *args, **options)
            for state in self.optimizer.state.values():
                if torch.is_tensor(state.get("step")):
                    inner = template.get("optimizer", template)["state"]
                    inner.setdefault("common_step", state["step"])
            return template

        kind.sharded_state_dict = sharded_with_count

    repair(megatron.FP32Optimizer)
    repair(megatron.Float16OptimizerWithFloat16Params)


def _end_with_parent() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
