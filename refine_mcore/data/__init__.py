"""Long documents as training windows, and prompts with answers, in an order that is the same for
every layout."""

from refine_mcore.data.documents import Document, read_documents
from refine_mcore.data.examples import (
    Example,
    ShuffledExamples,
    TokenizedExample,
    build_examples,
    padded,
    read_examples,
    tokenize_examples,
)
from refine_mcore.data.order import Samples, batch_iterator
from refine_mcore.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_file
from refine_mcore.data.windows import LongDocumentWindows, build_dataset, build_packed

__all__ = [
    "Document",
    "Example",
    "LongDocumentWindows",
    "Samples",
    "ShuffledExamples",
    "TokenizedExample",
    "Tokenizer",
    "batch_iterator",
    "build_dataset",
    "build_examples",
    "build_packed",
    "load_tokenizer",
    "padded",
    "read_documents",
    "read_examples",
    "tokenize_examples",
    "tokenizer_file",
]
