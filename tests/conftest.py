"""What the tests of all rooms share."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from . import sentence_encoder

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts tests in the background has them ignore Ctrl-C, and so would the children that they interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite", action="store_true", help="write the golden traces anew; read the diff before a commit"
    )


@pytest.fixture(scope="session")
def encoder_gguf() -> Path:
    """A real sentence encoder (all-MiniLM-L6-v2) for llama.cpp: vectors of 384 numbers that know what texts mean."""
    return _made(sentence_encoder.gguf_file())


@pytest.fixture(scope="session")
def encoder_directory() -> Path:
    """The same for transformers."""
    return _made(sentence_encoder.gguf_file()).parent


def _made(path: Path) -> Path:
    if not path.is_file():
        pytest.skip("the sentence encoder is not here: `make encoder` fetches it (90 MB)")
    return path
