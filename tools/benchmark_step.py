"""Cost of a ReFINE step beside a next-token step, in one run, with the check that both compute the
same thing.

    python tools/benchmark_step.py --config examples/configs/bench_deltanet.yaml \\
        --modes ntp,fused,two_phase,prefix_copy --json OUT.json [--rounds 3] \\
        [--sequence-lengths 512,1024,2048] [dotted.key=value ...]

    torchrun --nproc-per-node 2 tools/benchmark_step.py --json OUT.json \\
        --config examples/configs/bench_pipeline.yaml

Whole training steps are timed (forward, backward, optimizer), the modes taking turns round by
round; `prefix_copy` runs in one round only. A ratio is the median over rounds of (seconds of the
mode / seconds of the base in that round); its spread is (lowest, highest).

On one rank the base is `ntp`, the next-token step. `fused/selective` is the mode `fused` with
`training.recompute=selective`, `fused/full` that with full recomputation in `parallel.slices`.
`parts` are the passes of the step whose seconds are reported, and add up to them. Peak memory is
that of a process of its own per mode: on a CPU the resident memory above what the process held
before the model was built, with what tensors let go given back at once; on a GPU what the allocator
handed out. `gradient_difference` is |g - g_fused| / |g_fused| of one step on the first 1024 tokens,
in the precision of the run. With several `--sequence-lengths` each is measured for itself, and the
table is the curve over them. Interrupted, it writes what it has measured.

With `parallel.pipeline` above 1 the base is `1f1b`, the next-token step by Megatron's own schedule;
`ntp` and `fused` run in slices. Beside each stands what its plan predicts
(refine_mcore/benchmark/pipeline.py). `gradient_difference` is to 1F1B, of `fused` to one slice.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from refine_mcore.config import Config, load_config, validate
from refine_mcore.errors import UserError, cli

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter

# glibc keeps freed blocks of up to 32 MiB once it has seen one, and their pieces stay resident, up
# to 2 GiB in a step at 16K tokens. As on a GPU, what is measured is what tensors hold.
_GIVE_BACK_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}


def main(argv: list[str]) -> None:
    arguments = _parse(argv)
    config = load_config(arguments.config, arguments.overrides)
    _check_runs_here(config)
    from refine_mcore.benchmark import pipeline, whole_texts
    from refine_mcore.report import write_report

    lengths = _lengths(arguments.sequence_lengths, config)
    for length in lengths:
        _check_rollouts(_of(config, length), arguments.config)
    measure: Callable[[], Any]
    if arguments.memory_of is not None:
        measure = partial(whole_texts.peak_memory, _of(config, lengths[0]), arguments.memory_of)
        print(_in_process_group(config, measure))
        return
    in_pipeline = config.parallel.pipeline > 1
    default = pipeline.MODES if in_pipeline else whole_texts.MODES
    modes = _modes(arguments.modes, default, () if in_pipeline else whole_texts.RECOMPUTED)
    if arguments.rounds < 1:
        raise UserError(f"--rounds must be at least 1, not {arguments.rounds}")
    output = Path(arguments.json)
    if not output.parent.is_dir():
        raise UserError(f"{output.parent} is no directory to write {output.name} to")
    if in_pipeline:
        measure = partial(pipeline.measure, config, modes, arguments.rounds)
        report = _in_process_group(config, measure)
        if os.environ.get("RANK", "0") == "0":
            write_report(output, report, config)
            pipeline.print_table(report)
        return
    reports: list[dict[str, Any]] = []
    for length in lengths:
        measure = partial(whole_texts.measure, _of(config, length), modes, arguments.rounds)
        memory = {mode: _memory_in_own_process(argv, mode, length) for mode in modes}
        measured = {"sequence_length": length} | _in_process_group(config, measure)
        for mode, row in measured["modes"].items():
            row["peak_memory_bytes"] = memory[mode]
        reports.append(measured)
        write_report(output, reports[0] if len(lengths) == 1 else {"curve": reports}, config)
    if len(lengths) == 1:
        whole_texts.print_table(reports[0])
    else:
        whole_texts.print_curve(reports)


def _check_runs_here(config: Config) -> None:
    """What the step does not support is refused, not ignored."""
    from refine_mcore import platform

    platform.let_messages_overlap(config.parallel.pipeline)
    several = config.parallel.tensor > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1
    if config.parallel.pipeline == 1 and (several or config.training.recompute is not None):
        raise UserError(
            "benchmark_step.py measures one rank, or a pipeline: with parallel.pipeline 1 it takes "
            "one rank, and recomputation by mode, as --modes ntp,fused,fused/full"
        )


def _check_rollouts(config: Config, source: Path) -> None:
    """The modes measured roll out, whatever `refine.mode` says."""
    mode = "fused" if config.refine.mode == "ntp" else config.refine.mode
    validate(replace(config, refine=replace(config.refine, mode=mode)), str(source))


def _of(config: Config, length: int) -> Config:
    return replace(config, data=replace(config.data, sequence_length=length))


def _lengths(text: str | None, config: Config) -> list[int]:
    if text is None:
        return [config.data.sequence_length]
    lengths = [int(part) for part in text.split(",") if part.isdecimal()]
    if len(lengths) != len(text.split(",")) or min(lengths) < 1:
        raise UserError(f"--sequence-lengths must be whole numbers above 0, not {text!r}")
    return lengths


def _modes(chosen: str | None, default: tuple[str, ...], others: tuple[str, ...]) -> list[str]:
    modes = list(default) if chosen is None else chosen.split(",")
    known = (*default, *others)
    unknown = [mode for mode in modes if mode not in known]
    if unknown:
        raise UserError(f"--modes: unknown mode {unknown[0]!r}, known: {', '.join(known)}")
    if default[0] not in modes:
        raise UserError(f"--modes must include {default[0]}: every figure is a ratio to it")
    return modes


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("--modes", help="separated by commas; default: all")
    parser.add_argument("--json", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequence-lengths", help="separated by commas; default: the configured")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    return parser.parse_args(argv)


def _in_process_group(config: Config, measure: Callable[[], Any]) -> Any:
    from refine_mcore import platform

    platform.initialize()
    with platform.distributed(config.parallel.timeout):
        return measure()


def _memory_in_own_process(argv: list[str], mode: str, length: int) -> int:
    options = [f"--sequence-lengths={length}", f"--memory-of={mode}"]
    command = [sys.executable, __file__, *argv, *options]
    environment = _GIVE_BACK_AT_ONCE | os.environ
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise UserError(f"measuring the memory of {mode} failed: {done.stderr.strip()[-300:]}")
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    cli(main)
