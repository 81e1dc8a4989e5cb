"""Convert models between Hugging Face and Megatron `torch_dist` checkpoints.

    python tools/convert_hf.py import --hf DIR --output CKPT
    python tools/convert_hf.py export --checkpoint CKPT --output DIR [--dtype bfloat16]

Model types: lact_swiglu, delta_net (hybrid attention layers included), gated_deltanet, qwen3_5
(also its text model alone, qwen3_5_text), olmo_hybrid. Tensors that no text pass uses, such as a
vision tower, travel inside the checkpoint as they are. Memory is that of the largest tensor. No
GPU, Transformer Engine or transformers is needed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from refine_mcore.conversion.hf_directory import open_hf_directory
from refine_mcore.errors import cli

_DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def main(argv: list[str]) -> None:
    """Run one conversion. Raises UserError on bad input, and then leaves nothing behind."""
    arguments = _parser().parse_args(argv)
    # torch is imported only once the input has been found sound, so that errors come at once.
    if arguments.direction == "import":
        source = open_hf_directory(arguments.hf)
        from refine_mcore.conversion.importing import import_hf

        import_hf(source, arguments.output, _report)
    else:
        from refine_mcore.conversion.exporting import export_hf

        export_hf(arguments.checkpoint, arguments.output, _DTYPES.get(arguments.dtype), _report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Convert between Hugging Face and Megatron.")
    directions = parser.add_subparsers(dest="direction", required=True)
    to_megatron = directions.add_parser("import", help="Hugging Face directory -> checkpoint")
    to_megatron.add_argument("--hf", type=Path, required=True, metavar="DIR")
    to_megatron.add_argument("--output", type=Path, required=True, metavar="CKPT")
    to_hf = directions.add_parser("export", help="checkpoint -> Hugging Face directory")
    to_hf.add_argument("--checkpoint", type=Path, required=True, metavar="CKPT")
    to_hf.add_argument("--output", type=Path, required=True, metavar="DIR")
    to_hf.add_argument("--dtype", choices=_DTYPES, help="default: as recorded at import")
    return parser


def _report(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)


if __name__ == "__main__":
    cli(main)
