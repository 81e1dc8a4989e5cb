"""Cost of a ReFINE step beside a next-token step, in one run, with the check that both compute the
same thing.

    python tools/benchmark_step.py --config examples/configs/bench_deltanet.yaml \\
        --modes ntp,fused,two_phase,prefix_copy --json OUT.json [--rounds 3] [dotted.key=value ...]

    torchrun --nproc-per-node 2 tools/benchmark_step.py --json OUT.json \\
        --config examples/configs/bench_pipeline.yaml

Whole training steps are timed (forward, backward, optimizer), the modes taking turns round by
round; `prefix_copy` runs in one round only. A ratio is the median over rounds of (seconds of the
mode / seconds of the base in that round); its spread is (lowest, highest).

On one rank the base is `ntp`, the next-token step. `parts` are seconds of one profiled step. Peak
memory is that of a process of its own per mode: on a CPU the resident memory above what the process
held before the model was built, on a GPU what the allocator handed out. `gradient_difference` is
|g - g_fused| / |g_fused| of one step on the first 1024 tokens, in the precision of the run.

With `parallel.pipeline` above 1 the base is `1f1b`, the next-token step by Megatron's own schedule;
`ntp` and `fused` run in slices. Beside each stands what its plan predicts
(refine_mcore/benchmark/pipeline.py). `gradient_difference` is to 1F1B, of `fused` to one slice.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refine_mcore.config import Config, load_config
from refine_mcore.errors import UserError, cli

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter


def main(argv: list[str]) -> None:
    arguments = _parse(argv)
    config = load_config(arguments.config, arguments.overrides)
    _check_runs_here(config)
    from refine_mcore.benchmark import pipeline, whole_texts
    from refine_mcore.benchmark.report import write_report

    if arguments.memory_of is not None:
        mode = arguments.memory_of
        print(_in_process_group(config, lambda: whole_texts.peak_memory(config, mode)))
        return
    benchmark = pipeline if config.parallel.pipeline > 1 else whole_texts
    modes = _modes(arguments.modes, benchmark.MODES)
    if arguments.rounds < 1:
        raise UserError(f"--rounds must be at least 1, not {arguments.rounds}")
    output = Path(arguments.json)
    if not output.parent.is_dir():
        raise UserError(f"{output.parent} is no directory to write {output.name} to")
    memory = {}
    if benchmark is whole_texts:
        memory = {mode: _memory_in_own_process(argv, mode) for mode in modes}
    report = _in_process_group(config, lambda: benchmark.measure(config, modes, arguments.rounds))
    for mode, peak in memory.items():
        report["modes"][mode]["peak_memory_bytes"] = peak
    if os.environ.get("RANK", "0") == "0":
        write_report(output, report, config)
        benchmark.print_table(report)


def _check_runs_here(config: Config) -> None:
    """What the step does not support is refused, not ignored."""
    from refine_mcore import platform

    platform.let_messages_overlap(config.parallel.pipeline)

    from refine_mcore.training.setup import check_supported, runs_in_slices

    check_supported(config)
    if config.parallel.pipeline == 1 and (
        config.parallel.tensor > 1
        or int(os.environ.get("WORLD_SIZE", "1")) > 1
        or runs_in_slices(config)
    ):
        raise UserError(
            "benchmark_step.py measures whole texts on one rank, or a pipeline: with "
            "parallel.pipeline 1 it takes one rank, parallel.slices 1 and no "
            "training.recompute full"
        )


def _modes(chosen: str | None, known: tuple[str, ...]) -> list[str]:
    modes = list(known) if chosen is None else chosen.split(",")
    unknown = [mode for mode in modes if mode not in known]
    if unknown:
        raise UserError(f"--modes: unknown mode {unknown[0]!r}, known: {', '.join(known)}")
    if known[0] not in modes:
        raise UserError(f"--modes must include {known[0]}: every figure is a ratio to it")
    return modes


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("--modes", help="separated by commas; default: all")
    parser.add_argument("--json", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    return parser.parse_args(argv)


def _in_process_group(config: Config, measure: Callable[[], Any]) -> Any:
    from refine_mcore import platform

    platform.initialize()
    with platform.distributed(config.parallel.timeout):
        return measure()


def _memory_in_own_process(argv: list[str], mode: str) -> int:
    done = subprocess.run(
        [sys.executable, __file__, *argv, f"--memory-of={mode}"], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise UserError(f"measuring the memory of {mode} failed: {done.stderr.strip()[-300:]}")
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    cli(main)
