"""How much memory a bfloat16 run takes on each GPU, from what a layer is counted to keep.

    python tools/estimate_memory.py --preset deltanet-1.3b --sequence-length 16384
    python tools/estimate_memory.py --preset deltanet-1.3b --recompute selective

Counts on the CPU, over a shorter text; weights, gradients and optimizer state are computed. What
lives only while one layer runs is not in it, nor are the allocator's own overhead and buffers for
communication.
"""

import argparse

from refine_mcore import platform
from refine_mcore.errors import UserError, cli
from refine_mcore.models.architecture import LaCTOptions
from refine_mcore.models.presets import preset

_GIB = 2**30


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", required=True, help="name of the architecture")
    parser.add_argument("--sequence-length", type=int, default=16384, help="tokens of a text")
    parser.add_argument("--micro-batch-size", type=int, default=1, help="texts at a time")
    parser.add_argument("--recompute", choices=["selective"], help="as training.recompute")
    parser.add_argument("--gpus", default="1,8,64", help="data-parallel sizes")
    arguments = parser.parse_args(argv)
    architecture = preset(arguments.preset)
    sizes = []
    for size in arguments.gpus.split(","):
        if not size.strip().isdecimal() or int(size) < 1:
            raise UserError(f"--gpus must be whole numbers above 0, as 1,8,64, not {size!r}")
        sizes.append(int(size))
    if min(arguments.sequence_length, arguments.micro_batch_size) < 1:
        raise UserError("--sequence-length and --micro-batch-size must be above 0")

    platform.initialize()
    from refine_mcore.benchmark.memory import count_saved_bytes, estimate_memory

    mixer = architecture.mixer
    chunk = mixer.chunk_size if isinstance(mixer, LaCTOptions) else 512
    with platform.distributed(timeout_s=60):
        groups = platform.initialize_model_parallel()
        counted = count_saved_bytes(
            architecture,
            groups,
            tokens=min(arguments.sequence_length, 4 * chunk),
            selective_recompute=arguments.recompute == "selective",
        )
    tokens = arguments.sequence_length * arguments.micro_batch_size
    print(
        f"{arguments.preset}: kept for the backward {counted.layer / 1e3:.0f} KB per token and "
        f"layer, and {counted.rest / 1e3:.0f} KB per token beside the layers\n"
    )
    print(
        "| GPUs | weights, gradients | optimizer | activations | together |\n|---|---|---|---|---|"
    )
    for size in sizes:
        estimate = estimate_memory(architecture, counted, tokens=tokens, data_parallel=size)
        columns = [f"{part / _GIB:.1f} GiB" for part in (*estimate, estimate.total)]
        print(f"| {size} | {' | '.join(columns)} |")


if __name__ == "__main__":
    cli(main)
