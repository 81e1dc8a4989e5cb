"""Long documents as training windows, in an order that is the same for every layout."""

from refine_mcore.data.documents import Document, read_documents
from refine_mcore.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_file
from refine_mcore.data.windows import LongDocumentWindows, batch_iterator, build_dataset

__all__ = [
    "Document",
    "LongDocumentWindows",
    "Tokenizer",
    "batch_iterator",
    "build_dataset",
    "load_tokenizer",
    "read_documents",
    "tokenizer_file",
]
