"""Go on from a prompt with a checkpoint; the text appears as its tokens come.

    python tools/generate.py --checkpoint CKPT --prompt "Once upon a time" [--max-new-tokens 128]
        [--temperature 0.8 --top-k 50 --top-p 0.95 --seed 1] [--stop "\\n\\n" ...]
        [--tokenizer FILE] [dotted.key=value ...]

`--prompt-file FILE` takes a long prompt. It is read in slices: memory does not grow with its
length, but for attention without a window. Without a temperature the likeliest token is taken each
time. The tokenizer is the checkpoint's own, if it carries one. The model runs in float32 unless
`training.dtype` says otherwise; under torchrun `parallel.tensor` and `parallel.pipeline` set the
layout, which takes all ranks.
"""

import argparse
from pathlib import Path

from refine_mcore.config import config_from_dict
from refine_mcore.errors import UserError, cli


def main(argv: list[str]) -> None:
    arguments = _parse(argv)
    if "" in arguments.stop:
        raise UserError("--stop names an empty text, which is behind every token")
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, not {arguments.max_new_tokens}")
    prompt = _prompt(arguments)
    config = config_from_dict(
        {"model": {"checkpoint": arguments.checkpoint}, "training": {"dtype": "float32"}},
        "the command line",
        arguments.overrides,
    )

    from refine_mcore import platform
    from refine_mcore.evaluation.checkpoint import open_checkpoint
    from refine_mcore.generation import Sampling, TextStream, generate, response_text

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    with open_checkpoint(config, arguments.tokenizer) as (model, tokenizer, ends, _):
        tokens = tokenizer.text_to_ids(prompt)
        if not tokens:
            raise UserError("the prompt is empty")
        stream = TextStream(tokenizer, tokens)
        show = platform.rank() == 0

        def say(_: int, token: int) -> None:
            piece = stream.add(token)
            if show:
                print(piece, end="", flush=True)

        generate(
            model,
            [tokens],
            arguments.max_new_tokens,
            sampling=sampling,
            end_tokens=ends,
            stop=lambda found: any(
                text in response_text(tokenizer, tokens, found, special_tokens=True)
                for text in arguments.stop
            ),
            on_token=say,
        )
        if show:
            print(stream.rest())


def _prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt is not None:
        if any("\ud800" <= character <= "\udfff" for character in arguments.prompt):
            raise UserError("--prompt is not text in UTF-8")
        return arguments.prompt
    try:
        return Path(arguments.prompt_file).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {arguments.prompt_file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{arguments.prompt_file} is not text in UTF-8") from None


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="converted or training checkpoint")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt")
    prompt.add_argument("--prompt-file", help="a text file")
    parser.add_argument("--tokenizer", help="default: the one that the checkpoint carries")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stop", nargs="*", action="extend", default=[], help="texts to stop behind"
    )
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli(main)
