"""Text -> windows of token ids, end to end, as language models are trained on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from normconvert.compat.transformers import token_ids
from normconvert.errors import InputError
from normconvert.tuning.data.batches import Columns
from normconvert.tuning.data.wanted import TEXT, Wanted, check_columns

LENGTH = 256
"""Tokens a window, unless the user or the model asks for fewer."""


def read_text(name: str, path: Path, wanted: Wanted, length: int | None) -> Columns:
    """The windows of a text file, or of all ``*.txt`` files of a folder in the order of their names.

    Raises:
        InputError: it cannot be read, is too short, or the model does not read text.
    """
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{name}: no *.txt files there")
    try:
        texts = [file.read_text(encoding="utf-8") for file in files]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: not readable as UTF-8 text: {error}") from error
    return windows_of(name, texts, wanted, length)


def windows_of(name: str, texts: Iterable[str], wanted: Wanted, length: int | None) -> Columns:
    """Texts, one after the other, as windows of ``length`` token ids.

    Raises:
        InputError: see :func:`read_text`.
    """
    if wanted.main != TEXT:
        raise InputError(f"{name}: text, but {wanted.source.architecture} takes {wanted.main}")
    tokenizer = wanted.source.tokenizer()
    if tokenizer is None:
        raise InputError(f"{name}: {wanted.source.reference} has no tokenizer; give token ids: npz or safetensors")
    ids: list[int] = []
    for text in texts:
        ids += token_ids(tokenizer, text, add_special_tokens=False, verbose=False) if text.strip() else []
    return from_ids(name, torch.tensor(ids, dtype=torch.int64), wanted, length)


def from_ids(name: str, ids: Tensor, wanted: Wanted, length: int | None) -> Columns:
    """One long row of token ids as windows; the labels of a language model are its inputs."""
    length = min(x for x in (length or LENGTH, wanted.positions) if x is not None)
    count = len(ids) // length
    if not count:
        raise InputError(f"{name}: {len(ids)} tokens are less than one example of {length}; give more text or --length")
    columns = {TEXT: ids[: count * length].reshape(count, length)}
    check_columns(name, columns, wanted)
    if wanted.causal:
        # Not shifted here: whoever compares shifts (see `Data.shifted`), as the libraries' own losses do.
        columns["labels"] = columns[TEXT]
    return Columns(name, columns, shifted=wanted.causal)
