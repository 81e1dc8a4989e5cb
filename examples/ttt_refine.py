"""Test-time training with ReFINE: adapt to the prompts of a batch, then answer them.

    torchrun --nproc-per-node N examples/ttt_refine.py \\
        --config examples/configs/ttt_deltanet_1.3b.yaml model.checkpoint=RUN/checkpoints \\
        data.paths='[longbench/narrativeqa_16384.parquet]' [dotted.key=value ...]

Rows are prompts with answers and a task, as in the authors' files. `ttt.reset` says when weights
and optimizer state go back: after each example, after each batch, or (none) only where another file
begins, as in the authors' evaluation, which is of one. `refine.mode=ntp` adapts by the next-token
loss, in as many optimizer steps. RUN (the configuration's run.directory) gets responses.jsonl, row
by row; the scores are printed.
"""

import argparse
from pathlib import Path

from refine_mcore.config import load_config, require_data
from refine_mcore.errors import UserError, cli


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
    platform.initialize()

    from refine_mcore.data import load_tokenizer
    from refine_mcore.evaluation.ttt import answer_rows
    from refine_mcore.training.setup import with_own_tokenizer

    config = with_own_tokenizer(config)
    require_data(config)
    if config.model.checkpoint is None:
        raise UserError("model.checkpoint must name the checkpoint to adapt")
    assert config.data.tokenizer is not None
    tokenizer = load_tokenizer(config.data.tokenizer)
    parallel = config.parallel
    with platform.distributed(parallel.timeout):
        groups = platform.initialize_model_parallel(
            parallel.tensor, parallel.pipeline, config.training.seed
        )
        table = answer_rows(config, tokenizer, groups)
        if platform.rank() == 0:
            print(table, end="")


if __name__ == "__main__":
    cli(main)
