"""Mid-training with ReFINE: the main job.

    torchrun --nproc-per-node N examples/pretrain_refine.py \\
        --config examples/configs/demo.yaml [dotted.key=value ...]

Without arguments it runs the embedded demo on the CPU. Everything it can be told is in
refine_mcore/config/schema.py.
"""

import argparse
from pathlib import Path

from refine_mcore.config import load_config
from refine_mcore.errors import cli

DEMO = Path(__file__).parent / "configs" / "demo.yaml"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=DEMO, help="YAML file (default: the demo)")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)

    from refine_mcore import platform

    platform.let_messages_overlap(config.parallel.pipeline)

    from refine_mcore.training.loop import train  # after the configuration is known to be good

    train(config)


if __name__ == "__main__":
    cli(main)
