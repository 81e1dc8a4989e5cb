"""Score tokens with a checkpoint: logits, hidden states, losses, in-place rollouts, gradients.

    python tools/score.py --checkpoint CKPT --tokens FILE.safetensors --key input_ids \\
        --output OUT.safetensors [--rollout-at 14,32,61 --rollout-tokens 5 --greedy] \\
        [--gradients] [dotted.key=value ...]

A position is the number of tokens consumed: at 14 the first rollout token comes from logits[13].
The model runs in float32 unless `training.dtype` says otherwise; under torchrun `parallel.tensor`
and `parallel.pipeline` set the layout, which takes all ranks.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from refine_mcore.config import Config, config_from_dict
from refine_mcore.errors import UserError, cli


def main(argv: list[str]) -> None:
    arguments = _parse(argv)
    checkpoint, output = Path(arguments.checkpoint), Path(arguments.output)
    config = config_from_dict(
        {"model": {"checkpoint": str(checkpoint)}, "training": {"dtype": "float32"}},
        "the command line",
        arguments.overrides,
    )
    positions = _positions(arguments.rollout_at)
    if arguments.greedy and not positions:
        raise UserError("--greedy is of rollouts: name their positions with --rollout-at")
    if output.exists():
        raise UserError(f"{output} exists: name another --output or remove it")
    if arguments.rollout_tokens < 1:
        raise UserError(f"--rollout-tokens must be at least 1, not {arguments.rollout_tokens}")
    if not (output.parent.is_dir() and os.access(output.parent, os.W_OK)):
        raise UserError(f"{output.parent} is no directory to write {output.name} to")

    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from refine_mcore import platform

    platform.let_messages_overlap(config.parallel.pipeline)
    platform.initialize()
    from refine_mcore.data.token_file import read_token_file
    from refine_mcore.training.setup import resolve_architecture

    if (config.parallel.slices or 1) > 1 or config.training.recompute == "full":
        raise UserError(
            "score.py reads whole texts: no parallel.slices, no training.recompute full"
        )
    architecture = resolve_architecture(config)
    tokens = read_token_file(Path(arguments.tokens), arguments.key, architecture.vocab_size)
    _check_positions(positions, tokens.shape[1], arguments.tokens)

    import torch.distributed as dist

    with platform.distributed(config.parallel.timeout):
        tensors = _score(config, tokens, positions, arguments)
        if dist.get_rank() == 0:
            partial = output.with_name(f".{output.name}.partial")
            try:
                save_file(tensors, partial)
                os.replace(partial, output)
            except (OSError, SafetensorError) as error:
                raise UserError(f"cannot write {output}: {error}") from None
            finally:
                partial.unlink(missing_ok=True)


def _score(
    config: Config, tokens: Any, positions: list[int], arguments: argparse.Namespace
) -> dict[str, Any]:
    import torch.distributed as dist

    from refine_mcore import platform
    from refine_mcore.conversion.description import read_description
    from refine_mcore.evaluation.checkpoint import checkpoint_directory
    from refine_mcore.evaluation.score import score_tokens
    from refine_mcore.training.setup import training_model, with_one_checkpoint

    config = with_one_checkpoint(config)
    parallel = config.parallel
    if dist.get_world_size() != parallel.tensor * parallel.pipeline:
        raise UserError(
            f"scoring takes parallel.tensor x parallel.pipeline = "
            f"{parallel.tensor * parallel.pipeline} ranks, not the {dist.get_world_size()} started"
        )
    groups = platform.initialize_model_parallel(
        parallel.tensor, parallel.pipeline, config.training.seed
    )
    return score_tokens(
        training_model(config, groups),
        groups,
        tokens.to(platform.device()),
        rollout_at=positions,
        rollout_tokens=arguments.rollout_tokens,
        seed=None if arguments.greedy else config.training.seed,
        gradients=arguments.gradients,
        parameters=read_description(checkpoint_directory(config)).parameters(),
    )


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="converted or training checkpoint")
    parser.add_argument("--tokens", required=True, help="safetensors file with token ids [B, T]")
    parser.add_argument("--key", required=True, help="name of the tensor in that file")
    parser.add_argument("--output", required=True, help="safetensors file to write")
    parser.add_argument("--rollout-at", default="", help="positions, separated by commas")
    parser.add_argument("--rollout-tokens", type=int, default=5)
    parser.add_argument("--greedy", action="store_true", help="most likely tokens, not drawn ones")
    parser.add_argument("--gradients", action="store_true", help="add the gradient of the loss")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    return parser.parse_args(argv)


def _positions(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(
            f"--rollout-at must be whole numbers separated by commas, not {text!r}"
        ) from None


def _check_positions(positions: list[int], length: int, source: str) -> None:
    for position in positions:
        if not 1 <= position <= length:
            raise UserError(
                f"--rollout-at {position} is outside the text: {source} has {length} tokens a row"
            )


if __name__ == "__main__":
    cli(main)
