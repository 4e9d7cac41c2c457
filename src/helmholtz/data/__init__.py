"""Text to memory-mapped tokens: corpora, tokenizers, splits, datasets."""

from helmholtz.data.corpus import Document, documents, find_files, shakespeare_files
from helmholtz.data.prepare import DataConfig, PreparedData, prepare
from helmholtz.data.split import Split, SplitRule
from helmholtz.data.tokenizer import AbstractTokenizer, BPETokenizer, ByteTokenizer, load_tokenizer
from helmholtz.data.tokens import Metadata, PackedRow, SplitCounts, TokenDataset

__all__ = [
    "AbstractTokenizer",
    "BPETokenizer",
    "ByteTokenizer",
    "DataConfig",
    "Document",
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
    "shakespeare_files",
]
