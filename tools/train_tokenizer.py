"""Trains the SentencePiece tokenizer of the demo: BPE with byte fallback, text kept exactly (no
normalisation).

    python tools/train_tokenizer.py --input examples/data/public_domain.jsonl \\
        --output tokenizer.model

One thread makes the result the same on every run.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import sentencepiece

from refine_mcore.data.documents import read_documents
from refine_mcore.errors import UserError, cli
from refine_mcore.files import written_whole


def train(inputs: list[str], vocab_size: int) -> bytes:
    """The serialized SentencePiece model trained on the lines of all documents of `inputs`.

    Ids: 0 unknown, 1 BOS, 2 EOS, then 256 bytes, then learned pieces. Raises UserError if the text
    is too small for `vocab_size` pieces.
    """
    lines = [line for document in read_documents(inputs) for line in document.text.splitlines()]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=max((len(line.encode()) for line in lines), default=0) + 1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2]  # behind the place in the library's sources
        reason = reason or "they hold no text"
        raise UserError(
            f"no tokenizer of {vocab_size} pieces from {', '.join(inputs)}: {reason}"
        ) from None
    return model.getvalue()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="train a SentencePiece tokenizer on documents")
    parser.add_argument("--input", nargs="+", required=True, help=".jsonl or .txt documents")
    parser.add_argument("--output", required=True, type=Path, help="model file to write")
    parser.add_argument("--vocab-size", type=int, default=2048)
    arguments = parser.parse_args(argv)
    if arguments.output.exists():
        raise UserError(f"{arguments.output} exists already")
    model = train(arguments.input, arguments.vocab_size)
    with written_whole(arguments.output) as partial:
        partial.write_bytes(model)


if __name__ == "__main__":
    cli(main)
