"""Evaluate a checkpoint: RULER's needles and question answering, LongBench, next tokens.

    python examples/evaluate.py --checkpoint CKPT --output DIR --tasks ruler_niah,ntp \\
        [--data FILES...] [--texts FILES...] [--lengths 4096,8192] [--rows 100] \\
        [--temperature 1.0 --seeds 0,1,2] [--batch-size 8] [dotted.key=value ...]

Tasks: ruler_niah (four kinds of needles, made for the checkpoint's tokenizer), ruler_qa and
longbench (parquet or JSON lines with the columns of the authors' files, named by --data), ntp (loss
and accuracy by position on the documents of --texts), or single ones such as niah_multikey_1 and
trec. Responses are greedy unless there is a temperature. DIR gets results.jsonl row by row, then
report.json, report.md and needles.png; run again, it goes on where it was stopped, if checkpoint,
arithmetic, tokenizer, data and settings are the same. Rows of files are averaged by their
`max_seq_length`. Under torchrun `parallel.tensor` and `parallel.pipeline` set the layout, which
takes all ranks. The model runs in float32 unless `training.dtype` says otherwise.
"""

import argparse
from pathlib import Path

from refine_mcore.config import config_from_dict
from refine_mcore.errors import UserError, cli


def main(argv: list[str]) -> None:
    arguments = _parse(argv)
    config = config_from_dict(
        {"model": {"checkpoint": arguments.checkpoint}, "training": {"dtype": "float32"}},
        "the command line",
        arguments.overrides,
    )

    from refine_mcore import platform
    from refine_mcore.evaluation.checkpoint import open_checkpoint
    from refine_mcore.evaluation.evaluate import Settings, evaluate, task_names

    settings = Settings(
        tasks=task_names([x for x in arguments.tasks.split(",") if x]),
        data=tuple(arguments.data),
        texts=tuple(arguments.texts),
        lengths=_numbers("--lengths", arguments.lengths),
        rows=arguments.rows,
        longest_prompt=arguments.longest_prompt,
        text_length=arguments.text_length,
        seeds=_numbers("--seeds", arguments.seeds),
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        batch_size=arguments.batch_size,
    )
    with open_checkpoint(config, arguments.tokenizer) as opened:
        table = evaluate(opened, settings, Path(arguments.output))
        if platform.rank() == 0:
            print(table, end="")


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"{name} must be whole numbers separated by commas, not {text!r}") from None


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="converted or training checkpoint")
    parser.add_argument("--tasks", required=True, help="separated by commas")
    parser.add_argument("--output", required=True, help="directory of the results")
    parser.add_argument("--tokenizer", help="default: the one that the checkpoint carries")
    parser.add_argument("--data", nargs="+", default=[], help="files or directories of rows")
    parser.add_argument("--texts", nargs="+", default=[], help="documents for ntp")
    parser.add_argument("--lengths", default="4096", help="of needles, in tokens")
    parser.add_argument("--rows", type=int, help="of each file, variant and length; needles: 500")
    parser.add_argument("--longest-prompt", type=int, help="refuse rows of more tokens")
    parser.add_argument("--text-length", type=int, default=16384, help="most tokens of a text")
    parser.add_argument("--seeds", default="0", help="of sampled responses")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=4, help="responses at a time")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli(main)
