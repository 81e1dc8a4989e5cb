"""Cost of a ReFINE step beside a next-token step, in one run, with the check that both compute the
same thing.

    python tools/benchmark_step.py --config examples/configs/bench_deltanet.yaml \\
        --modes ntp,fused,two_phase,prefix_copy --json OUT.json [--rounds 3] [dotted.key=value ...]

Whole training steps are timed (forward, backward, optimizer), the modes taking turns round by
round; `prefix_copy` runs in one round only. A ratio is the median over rounds of (seconds of the
mode / seconds of ntp in that round); its spread is (lowest, highest). `parts` are seconds of one
profiled step. Peak memory is that of a process of its own per mode: on a CPU the resident memory
above what the process held before the model was built, on a GPU what the allocator handed out.
`gradient_difference` is |g - g_fused| / |g_fused| of one step on the first 1024 tokens, in the
precision of the run.
"""

import argparse
import json
import os
import platform as host
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from refine_mcore.config import Config, load_config, to_dict
from refine_mcore.errors import UserError, cli

_MODES = ("ntp", "fused", "two_phase", "prefix_copy")
_ONCE = {"prefix_copy"}  # the slow reference
_CHECKED = 1024  # tokens of the batch on which gradients are compared
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter
_PACKAGES = ("torch", "megatron-core", "triton", "flash-linear-attention")


def main(argv: list[str]) -> None:
    arguments = _parse(argv)
    config = load_config(arguments.config, arguments.overrides)
    _check_runs_here(config)
    if arguments.memory_of is not None:
        print(_in_process_group(lambda: _peak_memory(config, arguments.memory_of)))
        return
    modes = arguments.modes.split(",")
    unknown = [mode for mode in modes if mode not in _MODES]
    if unknown:
        raise UserError(f"--modes: unknown mode {unknown[0]!r}, known: {', '.join(_MODES)}")
    if "ntp" not in modes:
        raise UserError("--modes must include ntp: every figure is a ratio to it")
    output = Path(arguments.json)
    if not output.parent.is_dir():
        raise UserError(f"{output.parent} is no directory to write {output.name} to")
    memory = {mode: _memory_in_own_process(argv, mode) for mode in modes}
    report = _in_process_group(lambda: _measure(config, modes, arguments.rounds))
    for mode, peak in memory.items():
        report["modes"][mode]["peak_memory_bytes"] = peak
    report |= {"machine": _machine(), "versions": _versions(), "config": to_dict(config)}
    _write(output, report)
    _print(report)


def _check_runs_here(config: Config) -> None:
    """The benchmark is of one process; what the step does not support is refused, not ignored."""
    from refine_mcore.training.setup import check_supported

    check_supported(config)
    if config.parallel.tensor > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("benchmark_step.py measures one rank: parallel.tensor must be 1")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("--modes", default=",".join(_MODES))
    parser.add_argument("--json", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    return parser.parse_args(argv)


def _in_process_group(measure: Callable[[], Any]) -> Any:
    """`measure`, leaving its process group in order: a dangling one can crash the exit."""
    from refine_mcore import platform

    try:
        return measure()
    finally:
        platform.shutdown()


class _Bench:
    """A model, its optimizer and one batch."""

    def __init__(self, config: Config) -> None:
        import torch

        from refine_mcore import platform

        platform.initialize()
        from refine_mcore.data import batch_iterator, build_dataset, load_tokenizer
        from refine_mcore.training.optimizer import build_optimizer, wrap_data_parallel
        from refine_mcore.training.refine_loss import TextBatch
        from refine_mcore.training.setup import resolve_architecture, training_model
        from refine_mcore.training.step import TrainStep

        platform.init_distributed(config.parallel.timeout)
        self.groups = platform.initialize_model_parallel(seed=config.training.seed)
        self.config = config
        training = config.training
        vocab = resolve_architecture(config).vocab_size
        dataset = build_dataset(config.data, load_tokenizer(config.data.tokenizer), vocab)
        self.before_model = _resident_bytes()
        self.model = wrap_data_parallel(
            training_model(config, self.groups), config.optimizer, self.groups
        )
        self.optimizer, _ = build_optimizer(self.model, config, getattr(torch, training.dtype))
        self.run_step = TrainStep(
            self.model, self.optimizer, config.refine, training.seed, self.groups
        )
        count = training.global_batch_size // training.micro_batch_size
        self.batches = [
            TextBatch(
                *(item[name].to(platform.device()) for name in ("tokens", "mask", "sample_index"))
            )
            for item in islice(batch_iterator(dataset, 0, training.micro_batch_size), count)
        ]

    def seconds(self, mode: str) -> float:
        """Wall time of one whole training step."""
        import torch

        torch.cuda.synchronize()
        start = time.perf_counter()
        self.run_step(self.batches, 0, mode)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def gradient(self, mode: str) -> Any:
        """All gradients of one step of `mode` in one vector, and its loss parts."""
        import torch

        from refine_mcore.rollout.branches import Randomness
        from refine_mcore.training.step import STEP_MODES, forward_backward
        from refine_mcore.training.step_metrics import StepAccumulator
        from refine_mcore.training.step_modes import StepContext

        randomness = Randomness(self.config.training.seed, 0)
        context = StepContext(self.model.module, self.config.refine, randomness, self.groups.dp)
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        for work in STEP_MODES[mode](context, self._checked()):
            forward_backward(self.model, work, StepAccumulator())
        return torch.cat([p.main_grad.flatten().clone() for p in self.model.parameters()])

    def _checked(self) -> list[Any]:
        """The batch, cut short: the slow reference is checked here and not only timed."""
        return [
            replace(b, tokens=b.tokens[:, :_CHECKED], mask=b.mask[:, :_CHECKED])
            for b in self.batches
        ]

    def parts(self, mode: str) -> dict[str, float]:
        """Seconds of the named parts of one profiled step; the rest is mostly the backward pass."""
        import torch

        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            total = self.seconds(mode)
        parts = {
            event.key.removeprefix("refine/"): event.cpu_time_total / 1e6
            for event in profile.key_averages()
            if event.key.startswith("refine/")
        }
        return parts | {"backward and rest": total - sum(parts.values())}


def _measure(config: Config, modes: list[str], rounds: int) -> dict[str, Any]:
    bench = _Bench(config)
    for mode in modes:
        if mode not in _ONCE:
            bench.seconds(mode)  # first steps allocate and build the optimizer state
    times: dict[str, list[float]] = {mode: [] for mode in modes}
    for index in range(rounds):
        for mode in modes:
            if index == 0 or mode not in _ONCE:
                times[mode].append(bench.seconds(mode))
    training = config.training
    tokens = training.global_batch_size * config.data.sequence_length
    report: dict[str, Any] = {}
    differences = _gradient_differences(bench, modes)
    for mode in modes:
        ratios = [t / base for t, base in zip(times[mode], times["ntp"], strict=False)]
        seconds = statistics.median(times[mode])
        report[mode] = {
            "seconds": seconds,
            "ratio_to_ntp": statistics.median(ratios),
            "ratio_spread": [min(ratios), max(ratios)],
            "rounds": len(ratios),
            "tokens_per_second": tokens / seconds,
            "gradient_difference": differences.get(mode),
            "parts": {} if mode in _ONCE else bench.parts(mode),
        }
    return {"modes": report}


def _gradient_differences(bench: _Bench, modes: list[str]) -> dict[str, float]:
    """How far each mode's gradient is from the fused one; next-token alone is another loss."""
    if "fused" not in modes:
        return {}
    fused = bench.gradient("fused")
    others = [mode for mode in modes if mode not in ("ntp", "fused")]
    return {mode: float((bench.gradient(mode) - fused).norm() / fused.norm()) for mode in others}


def _peak_memory(config: Config, mode: str) -> int:
    """Peak of two steps of one mode (one of the slow reference), in this process."""
    import torch

    bench = _Bench(config)
    for _ in range(1 if mode in _ONCE else 2):
        bench.seconds(mode)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - bench.before_model


def _memory_in_own_process(argv: list[str], mode: str) -> int:
    done = subprocess.run(
        [sys.executable, __file__, *argv, f"--memory-of={mode}"], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise UserError(f"measuring the memory of {mode} failed: {done.stderr.strip()[-300:]}")
    return int(done.stdout.split()[-1])


def _resident_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def _machine() -> dict[str, Any]:
    import torch

    machine: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        machine["accelerator"] = torch.cuda.get_device_name()
    return machine


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return host.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else host.processor()


def _versions() -> dict[str, str]:
    versions = {"python": host.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _write(output: Path, report: dict[str, Any]) -> None:
    partial = output.with_name(f".{output.name}.partial")
    try:
        partial.write_text(json.dumps(report, indent=2) + "\n")
        os.replace(partial, output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from None


def _print(report: dict[str, Any]) -> None:
    base = report["modes"]["ntp"]["peak_memory_bytes"]
    print("| mode | seconds | ratio to ntp (lowest, highest) | peak memory, ratio | vs fused |")
    print("|---|---|---|---|---|")
    for mode, row in report["modes"].items():
        low, high = row["ratio_spread"]
        difference = row["gradient_difference"]
        print(
            f"| {mode} | {row['seconds']:.2f} | {row['ratio_to_ntp']:.2f} ({low:.2f}, {high:.2f}) "
            f"| {row['peak_memory_bytes'] / 2**30:.2f} GiB, {row['peak_memory_bytes'] / base:.2f} "
            f"| {'' if difference is None else f'{difference:.1e}'} |"
        )


if __name__ == "__main__":
    cli(main)
