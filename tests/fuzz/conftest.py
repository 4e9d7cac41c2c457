"""What makes thousands of calls cheap: docstrings are parsed once, and nothing waits for the disk."""

import functools
import os

import docstring_parser
import pytest


@pytest.fixture(scope="package", autouse=True)
def _quick_calls():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(
            docstring_parser, "parse_from_object", functools.cache(docstring_parser.parse_from_object)
        )
        yield
