"""Post-training with ReFINE, the paper's nested learning: of every batch of prompts with answers an
inner update on the prompts, then one optimizer step on the answers.

    torchrun --nproc-per-node N examples/posttrain_refine.py \\
        --config examples/configs/posttrain_lact_760m.yaml \\
        model.checkpoint=RUN/checkpoints data.paths='[examples.jsonl]' \\
        data.tokenizer=tokenizer.model [dotted.key=value ...]

The inner update is as `refine.mode` says (`ntp`: Nested SFT), `posttrain.inner=false` leaves it out
(SFT). Everything it can be told is in refine_mcore/config/schema.py.
"""

import argparse
from pathlib import Path

from refine_mcore.config import load_config
from refine_mcore.errors import cli


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)

    from refine_mcore import platform

    platform.let_messages_overlap(config.parallel.pipeline)

    # after the configuration is known to be good
    from refine_mcore.training.loop import train
    from refine_mcore.training.phases import PostTraining

    train(config, PostTraining)


if __name__ == "__main__":
    cli(main)
