"""Columns of tables: parquet files, and data sets of the hub. Each needs a package of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normconvert.errors import InputError, first_line
from normconvert.tuning.data.batches import Columns, Data
from normconvert.tuning.data.text import windows_of
from normconvert.tuning.data.wanted import TEXT, Wanted, check_columns


def read_parquet(name: str, path: Path, column: str | None, wanted: Wanted, length: int | None) -> Data:
    """A parquet file's column of text, or its columns of ready inputs.

    Raises:
        InputError: pyarrow is not installed, or the file does not fit.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise InputError(f"{name}: parquet needs pyarrow: pip install 'normconvert[data]'") from error
    try:
        table = parquet.read_table(path).to_pydict()
    except (OSError, ArrowException) as error:
        raise InputError(f"{name}: not a readable parquet file: {error}") from error
    return from_table(name, table, column, wanted, length)


def read_hub(name: str, where: str, wanted: Wanted, length: int | None) -> Data:
    """``NAME[:split][:column]``, a data set of the hub or of a folder.

    Raises:
        InputError: datasets is not installed, or the data set cannot be had or does not fit.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{name}: data sets of the hub need datasets: pip install 'normconvert[data]'") from error
    dataset, _, rest = where.partition(":")
    split, _, column = rest.partition(":")
    try:
        table = datasets.load_dataset(dataset, split=split or "train")
    except Exception as error:  # datasets raises many kinds; all mean that it cannot be had
        raise InputError(f"{name}: cannot be loaded: {first_line(error)[:200]}") from error
    return from_table(name, {c: table[c] for c in table.column_names}, column or None, wanted, length)


def from_table(
    name: str, table: dict[str, Sequence[Any]], column: str | None, wanted: Wanted, length: int | None
) -> Data:
    """A column of text, the one named or the only one, or else the columns that the model takes."""
    if column is not None and column not in table:
        raise InputError(f"{name}: no column {column!r}; there are {', '.join(table)}")
    ready = [c for c in table if c in wanted.names]
    if column is None and wanted.main in ready:
        columns = {c: _tensor(name, c, table[c]) for c in (*ready, *[c for c in ("labels",) if c in table])}
        check_columns(name, columns, wanted)
        return Columns(name, columns, shifted=wanted.causal and columns.get("labels", torch.empty(0)).ndim == 2)
    texts = [c for c in table if len(table[c]) and isinstance(table[c][0], str)]
    chosen = column or (texts[0] if len(texts) == 1 else "text" if "text" in texts else None)
    if chosen is None or wanted.main != TEXT:
        raise InputError(
            f"{name}: expected a column {wanted.main} or one of text; found {', '.join(table) or 'no columns'}: "
            "name one after a colon"
        )
    if not len(table[chosen]) or not isinstance(table[chosen][0], str):
        raise InputError(f"{name}: the column {chosen!r} holds no text")
    return windows_of(name, [str(text) for text in table[chosen]], wanted, length)


def _tensor(name: str, column: str, values: Sequence[Any]) -> Tensor:
    try:
        return torch.tensor(list(values))
    except (ValueError, TypeError) as error:
        raise InputError(f"{name}: the column {column!r} is no array: {error}") from error
