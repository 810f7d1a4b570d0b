"""Plan x checkpoint files -> checkpoint files, streaming: memory for one tensor, not for the model (invariant I4).

Untouched tensors are copied as bytes inside the kernel. Edited ones are computed in float64, in blocks where the edits
permit, and stored in the source's dtype. Nothing here knows what a norm is.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from normconvert.apply.layout import can_stream, index_bytes, make_layout
from normconvert.apply.loaded_model import save_loaded
from normconvert.apply.other_files import copy_other_files, write_files
from normconvert.apply.output_folder import set_dtype, write_json
from normconvert.apply.source_reader import SourceReader
from normconvert.apply.writer import Progress, Writer
from normconvert.errors import InputError, Unfinished
from normconvert.files.code_references import without_code
from normconvert.plan.conversion_plan import Plan, edited_config
from normconvert.sources import Source
from normconvert.sources.transformers_models import own_class

if TYPE_CHECKING:
    from normconvert.apply.shard_stream import Stream


@dataclass(frozen=True)
class ApplyResult:
    """What was written.

    Attributes:
        files: names relative to the output folder, sorted.
        bytes_written: size of the weight files.
        edited: checkpoint names of the tensors that were edited or added.
        copied: how many tensors were copied unchanged.
        hashes: source file -> sha256, for the weight files and config.json (empty if not asked for).
        notes: sentences for the user.
    """

    files: tuple[str, ...]
    bytes_written: int
    edited: tuple[str, ...]
    copied: int
    hashes: dict[str, str]
    notes: tuple[str, ...] = ()


def write_checkpoint(
    source: Source,
    plan: Plan,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
    progress: Progress | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
    hash_source: bool = True,
    reader: SourceReader | None = None,
    stream: Stream | None = None,
) -> ApplyResult:
    """Write the converted checkpoint into a folder that exists.

    Args:
        source: the checkpoint, which is only read.
        plan: tensor edits in model names, and changes to config.json.
        folder: empty; `normconvert.apply.output_folder.staged_output` makes it an output, complete or not at all.
        dtype: store all floating tensors in this dtype; None: each in its own.
        max_shard_size: bytes a weight file; None: files as in the source.
        progress: called as tensors are written.
        extra_files: further files, name -> content, written last.
        hash_source: compute sha256 of the source's files, beside the conversion; with ``reader`` or ``stream`` that is
            their own affair.
        reader: of the source's files, begun before, when they were found.
        stream: brings the files one by one.

    Raises:
        InputError: it cannot be written, the plan does not fit, or a weight is NaN or infinite.
    """
    notes: list[str] = []
    try:
        if source.folder is not None:
            # First: config.json comes along as the source's bytes and is written over below if the plan changes it.
            own = own_class(source) is not None
            notes += copy_other_files(source.folder, folder, with_code=own).notes
            if own:
                notes.append(
                    "the output holds code that came with the source, and cannot be loaded without running it: read it"
                )
        # A reader that was given belongs to the caller, who leaves its context.
        with SourceReader(hash_source) if reader is None else nullcontext(reader) as pass_over_files:
            if reader is None:
                pass_over_files.begin(source.tensors.values(), source.folder)
            edited, copied, hashes = _write_weights(
                source, plan, folder, dtype, max_shard_size, progress, pass_over_files, notes, stream
            )
        _write_config(source, plan, folder, dtype)
        # Last, since they may stand for a file of the source: config.json with module edits, a model card.
        write_files(folder, extra_files or {})
    except OSError as error:
        name = f" ({error.filename})" if error.filename else ""
        # A streamed conversion keeps the shards that are done and says so itself.
        kept = "" if stream is not None else "; nothing was kept"
        raise Unfinished(f"cannot write the output: {error.strerror or error}{name}{kept}") from error
    files = tuple(sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()))
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    return ApplyResult(files, size, edited, copied, hashes, tuple(notes))


def _write_weights(
    source: Source,
    plan: Plan,
    folder: Path,
    dtype: torch.dtype | None,
    max_shard_size: int | None,
    progress: Progress | None,
    reader: SourceReader,
    notes: list[str],
    stream: Stream | None,
) -> tuple[tuple[str, ...], int, dict[str, str]]:
    # Buffers are let be: masks hold infinities.
    parameters = [name for name, target in source.name_map.items() if target not in source.buffers]
    reader.require(source.tensors[name] for name in parameters)
    if can_stream(source, plan):
        layout = make_layout(source, plan, dtype, max_shard_size)
        notes += layout.notes
        writer = Writer(source, layout, folder, progress)
        if stream is None:
            writer.run(writer.start(reader), reader)
        else:
            hashes = stream.write(source, writer, parameters)
        if layout.index is not None:
            (folder / layout.index[0]).write_bytes(index_bytes(source, layout.index))
        tensors = [t for file in layout.files for t in file.tensors]
        edited = tuple(t.name for t in tensors if t.edits)
        copied = len(tensors) - len(edited)
    elif stream is not None:
        raise InputError(
            f"{source.reference}: {source.library} merges or splits tensors of this checkpoint when it loads them, "
            "and for that all of them have to be there: convert it without --stream"
        )
    else:
        # The library writes files of its own names and shards: copies of the source's would stand beside them.
        reader.keep_copies(frozenset())
        edited, copied = save_loaded(source, plan, folder, dtype, max_shard_size)
        notes.append(
            f"{source.library} merges, splits or reshapes tensors of this checkpoint when it loads them: "
            "the plan was applied to the loaded model, which was saved again"
        )
    if stream is None:
        # The pass may be behind the writing: what is copied as bytes counts as finite only when it has been read.
        reader.finish()
        hashes = dict(reader.hashes)
    return edited, copied, hashes


def _write_config(source: Source, plan: Plan, folder: Path, dtype: torch.dtype | None) -> None:
    """config.json: the source's bytes unless something changes."""
    # A model that the library saved came with a config.json of the library's: the source's takes its place.
    if not source.config or not (plan.config or dtype or source.described or not can_stream(source, plan)):
        return
    config: Mapping[str, Any] = without_code(source.config)
    if dtype is not None:
        config = set_dtype(config, str(dtype).removeprefix("torch."))
    write_json(folder / "config.json", edited_config(config, plan.config))
