"""Text to memory-mapped tokens: corpora, tokenizers, splits, datasets."""

from helmholtz.data.corpus import Document, documents, find_files, shakespeare_files
from helmholtz.data.prepare import DataConfig, PreparedData, prepare
from helmholtz.data.rows import write_rows
from helmholtz.data.split import Split, SplitRule
from helmholtz.data.texts import prepare_texts
from helmholtz.data.tokenizer import (
    AbstractTokenizer,
    BPETokenizer,
    ByteTokenizer,
    IdTokenizer,
    load_tokenizer,
)
from helmholtz.data.tokens import Metadata, PackedRow, SplitCounts, TokenDataset

__all__ = [
    "AbstractTokenizer",
    "BPETokenizer",
    "ByteTokenizer",
    "DataConfig",
    "Document",
    "IdTokenizer",
    "Metadata",
    "PackedRow",
    "PreparedData",
    "Split",
    "SplitCounts",
    "SplitRule",
    "TokenDataset",
    "documents",
    "find_files",
    "load_tokenizer",
    "prepare",
    "prepare_texts",
    "shakespeare_files",
    "write_rows",
]
