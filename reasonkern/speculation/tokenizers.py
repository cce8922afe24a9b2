"""Text to token ids for `python -m reasonkern tune`, without a download."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Tokenizer(NamedTuple):
    """A name, a number of ids and a function."""

    name: str
    vocab_size: int
    encode: Callable[[str], list[int]]


class TokenizerError(ValueError):
    """A tokenizer that cannot be used."""


def load_tokenizer(name: str) -> Tokenizer:
    """``bytes``; ``mistral-common`` (its newest bundled tekken file); or a path.

    A path is a ``tokenizer.json`` of the `tokenizers` library, a folder that holds one, or a
    ``tekken*.json`` of mistral-common.
    """
    if name == "bytes":
        return Tokenizer(name, 256, lambda text: list(text.encode("utf-8", "surrogatepass")))
    if name == "mistral-common":
        package = _import("mistral_common", name)
        files = sorted((Path(str(package.__file__)).parent / "data").glob("tekken_*.json"))
        if not files:
            raise TokenizerError("--tokenizer mistral-common: it bundles no tekken_*.json")
        return _tekken(files[-1])
    path = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        expected = "bytes, mistral-common, a tokenizer.json or a model's folder that holds one"
        raise TokenizerError(f"--tokenizer {name}: expected {expected}")
    return _tekken(path) if path.name.startswith("tekken") else _tokenizers(path)


def _import(module: str, wanted_by: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        message = f"--tokenizer {wanted_by} needs {package} (pip install {package}): {error}"
        raise TokenizerError(message) from error


def _tekken(path: Path) -> Tokenizer:
    module = _import("mistral_common.tokens.tokenizers.tekken", str(path))
    try:
        tekken = module.Tekkenizer.from_file(path)
    except Exception as error:  # a foreign parser, which documents none of its errors
        raise TokenizerError(f"--tokenizer {path}: {error}") from error
    return Tokenizer(path.stem, tekken.n_words, lambda text: tekken.encode(text, False, False))


def _tokenizers(path: Path) -> Tokenizer:
    module = _import("tokenizers", str(path))
    try:
        fast = module.Tokenizer.from_file(str(path))
    except Exception as error:  # likewise
        message = f"--tokenizer {path}: not a tokenizer.json of tokenizers ({error})"
        raise TokenizerError(message) from error
    fast.no_truncation()  # what training had switched on is saved with it
    fast.no_padding()

    def encode(text: str) -> list[int]:
        # A log may cut a character that JSON writes as two surrogates; no text holds half of it.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return list(fast.encode(text, add_special_tokens=False).ids)

    return Tokenizer(path.stem, fast.get_vocab_size(), encode)
