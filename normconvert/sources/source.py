"""What the pipeline knows of a checkpoint before it reads a single weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from normconvert.errors import InputError
from normconvert.files.digest import mark, sha256
from normconvert.files.tensor_info import TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import nn


class Models(Protocol):
    """How the library of a source makes models of it: what a :class:`Source` is given, so that it need not know it."""

    def skeleton(self, source: Source) -> nn.Module:
        """See :meth:`Source.skeleton`."""

    def load(self, source: Source, dtype: torch.dtype) -> nn.Module:
        """See :meth:`Source.load`; on the CPU."""

    def tokenizer(self, source: Source) -> Any | None:
        """See :meth:`Source.tokenizer`."""


@dataclass(frozen=True)
class Source:
    """A checkpoint that has been opened and checked, with its tensors mapped to the model's names.

    Attributes:
        reference: what the user typed.
        library: ``transformers`` or ``timm``; ``torch`` for what a file of the user's makes.
        folder: the folder with all files; None for a bare weight file.
        config: config.json; for a bare file the one that describes the architecture the user named.
        architecture: class name (transformers), model name (timm) or ``FILE.py:FACTORY``, without the path.
        tensors: checkpoint name -> where it lies, in file order.
        name_map: checkpoint name -> name in ``model.state_dict()``; a stray tensor is absent.
        one_to_one: False if the library merges, splits or reshapes tensors when it loads them.
        dtype: dtype of the majority of the floating elements.
        models: what makes models of it.
        trust_remote_code: whether code that comes with the checkpoint may run.
        record: parsed normconvert.json if normconvert wrote this folder.
        buffers: model names that are buffers: these may hold infinities (masks).
        tied: groups of model names that are one parameter.
        apart: model names that the library ties unless the files hold other values for them, as these do.
        marks: pickle -> what tells whether it was written to since it was opened.
        merged: model names whose values the library makes by merging, splitting or reshaping checkpoint tensors.
        revision: commit on the hub the files come from.
        modules: module edits without which the weights do not fit the architecture: rows of
            :data:`normconvert.runtime.MODULE_EDITS`, for a folder that normconvert wrote.
        given: the library would not find these weights in the folder under the names that they have here, and is given
            them.
        training: what a checkpoint of training says of how its model was made (timm's ``args``).
        described: ``config`` was made from ``--arch`` or from what was identified, not read from the folder.
        factory: ``FILE.py:FACTORY`` as the user has it, for a model of neither library.
        notes: sentences for the user: how the architecture was found.
        fetch: to be called with a checkpoint name before that tensor's data is read, for files that are not here.
        pickled: checkpoint name -> value, for weights in pickles (mapped from the file where the format allows it).
    """

    reference: str
    library: str
    folder: Path | None
    config: dict[str, Any]
    architecture: str
    tensors: dict[str, TensorInfo]
    name_map: dict[str, str]
    one_to_one: bool
    dtype: torch.dtype
    models: Models = field(repr=False, compare=False)
    trust_remote_code: bool = False
    record: dict[str, Any] | None = None
    buffers: frozenset[str] = frozenset()
    tied: tuple[tuple[str, ...], ...] = ()
    apart: frozenset[str] = frozenset()
    merged: frozenset[str] = frozenset()
    revision: str | None = None
    given: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)
    described: bool = False
    factory: str | None = None
    modules: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    fetch: Callable[[str], None] | None = field(default=None, repr=False, compare=False)
    pickled: dict[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)
    marks: dict[Path, tuple[int, ...]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Of pickles, which are mapped from here on; a later copy of this keeps what is known.
        if self.pickled and not self.marks:
            self.marks.update({file: mark(file) for file in self.files})

    @property
    def files(self) -> list[Path]:
        """The weight files in order of first use."""
        return list(dict.fromkeys(info.file for info in self.tensors.values()))

    def hashes(self) -> dict[str, str]:
        """File name -> sha256, of the weight files and config.json, as records of conversions have them; reads all."""
        config = self.folder / "config.json" if self.folder is not None else None
        files = [*self.files, *([config] if config is not None and config.is_file() else [])]
        return {path.name: sha256(path) for path in files}

    @property
    def is_pickle(self) -> bool:
        """Whether the weights lie in a pickle (.bin, .pth, .pt), read with ``weights_only=True``."""
        return bool(self.pickled)

    def skeleton(self) -> nn.Module:
        """The architecture with its head on the meta device, in eval mode; no weight is read.

        It is the plain architecture, with :attr:`modules` applied.

        Raises:
            InputError: the library cannot build the architecture.
        """
        return self.models.skeleton(self)

    def load(self, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> nn.Module:
        """The model with its weights, loaded by the library itself, in eval mode.

        Args:
            dtype: dtype of all floating parameters; None: the checkpoint's own.
            device: where to put it.

        Raises:
            InputError: the library refuses the files, or finds no values for a weight in them.
        """
        return self.models.load(self, dtype or self.dtype).to(device)

    def read(self, name: str) -> torch.Tensor:
        """One tensor by its checkpoint name, mapped from the file where the format allows it.

        The tensor is a private copy-on-write view: writing to it never reaches the file.

        Raises:
            InputError: the file was written to since it was opened.
        """
        from normconvert.files.safetensors_file import map_tensor

        if self.fetch is not None:
            self.fetch(name)
        if name not in self.pickled:
            return map_tensor(self.tensors[name])
        # To touch the memory of a file that has become shorter ends the process.
        file = self.tensors[name].file
        if mark(file) != self.marks.get(file):
            raise InputError(f"{file}: changed since it was opened: run again when it is complete")
        return self.pickled[name]

    def tokenizer(self) -> Any | None:
        """The tokenizer in the folder; None if there is none or it cannot be built here."""
        return self.models.tokenizer(self)
