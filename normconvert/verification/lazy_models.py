"""A checkpoint's model with its weights left in the files: built empty, each weight a :class:`LazyWeight`.

Everything else is as the library makes it: buffers have their values, tied parameters are one, dtypes are those of a
model that was loaded.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from normconvert.apply.blocks import block_dimension, blocks, edit_whole
from normconvert.errors import InputError
from normconvert.files.safetensors_file import dtype_name, map_tensor, read_tensor
from normconvert.files.tensor_info import TensorInfo
from normconvert.files.uninitialised import NoRandomInit
from normconvert.plan.conversion_plan import Plan
from normconvert.plan.edits import Edit, apply_edits, edited_shape, refuse_oversized
from normconvert.rewrites.ties import set_as_taken, switches
from normconvert.runtime import one_at_a_time
from normconvert.sources import timm_models, transformers_models
from normconvert.sources.converted import recorded_edits
from normconvert.sources.source import Source
from normconvert.verification.lazy_weights import LazyWeight

if TYPE_CHECKING:
    Lookup = Callable[[str], Tensor]

MARGIN = 200_000_000
"""Bytes for hidden states and outputs of the probes, which are small, and for what the allocator keeps."""
SPARE = 50_000_000
"""Bytes by which a process that is started again, with the limit that was proposed, may be larger than this one."""
SHARE = 8
"""A matrix that takes more than this share of the memory allowed is applied some rows at a time."""


@dataclass(frozen=True)
class Stored:
    """The value of one weight: a tensor of a file, edited, in another dtype.

    Attributes:
        info: where it lies; None for one that the edits make.
        edits: rows of a plan, without a leading ``copy``.
        lookup: source tensors by their names in the model.
        dtype: of the value.
        shape: of the value.
        piece: see :class:`normconvert.verification.lazy_weights.Values`.
    """

    info: TensorInfo | None
    edits: tuple[Edit, ...]
    lookup: Lookup
    dtype: torch.dtype
    shape: tuple[int, ...]
    piece: int | None

    def whole(self) -> Tensor:
        """See :class:`normconvert.verification.lazy_weights.Values`."""
        if self.info is None:
            return apply_edits(torch.empty(0), self.edits, self.lookup).to(self.dtype)
        if not self.edits:
            return read_tensor(self.info) if dtype_name(self.dtype) == self.info.dtype else self._cast(self.info)
        return edit_whole(read_tensor(self.info), self.edits, self.lookup, self.dtype)

    def _cast(self, info: TensorInfo) -> Tensor:
        """Read in blocks, so that the file's dtype and the one wanted are not in memory side by side."""
        value = torch.empty(info.shape, dtype=self.dtype)
        if not info.shape or value.numel() == 0:
            return value.copy_(read_tensor(info))
        for start, stop in blocks(info.shape, 0, self.dtype.itemsize):
            value[start:stop] = read_tensor(info, (start, stop))
        return value

    def part(self, start: int, stop: int) -> Tensor | None:
        """See :class:`normconvert.verification.lazy_weights.Values`."""
        if self.info is None or not self.by_rows():
            return None
        return self._edited(read_tensor(self.info, (start, stop)))

    def rows(self, index: Tensor) -> Tensor:
        """See :class:`normconvert.verification.lazy_weights.Values`."""
        if self.info is None or not self.by_rows():
            return self.whole()[index]
        return self._edited(map_tensor(self.info)[index])

    def by_rows(self) -> bool:
        """Whether some rows can be made without the others."""
        return self.info is not None and (
            not self.edits or block_dimension(self.edits, self.info.shape, self.shape) == 0
        )

    def _edited(self, rows: Tensor) -> Tensor:
        return apply_edits(rows, self.edits, self.lookup).to(self.dtype) if self.edits else rows.to(self.dtype)


@one_at_a_time
def lazy_model(
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    *,
    plan: Plan | None = None,
    max_memory: int | None = None,
) -> nn.Module:
    """The model of a checkpoint, converted or not, in eval mode, with the weights in their files.

    Args:
        source: of safetensors whose tensors the library does not merge or split when it loads them.
        dtype: of the floating parameters.
        device: where it runs.
        plan: applied to the model and, in float64, to each weight as it is read: the algebra's model. Its edits look
            up the source's tensors.
        max_memory: bytes that the process may take; None: no matrix is taken apart.

    Raises:
        InputError: the checkpoint or the plan is unfit for this, with the reason.
    """
    from normconvert.runtime import apply_module_edits

    _refuse(source)
    model, dtypes = _empty(source, dtype)
    edits = [*(recorded_edits(source) or ()), *(plan.modules if plan is not None else ())]
    files = _Files(source)
    _load_buffers(files, model)
    try:
        apply_module_edits(model, edits)
    except (ValueError, AttributeError) as error:
        raise InputError(f"{source.reference}: {error}") from error
    if plan is not None:
        set_as_taken(model, switches(plan))
    _Filler(files, model, dtypes, device, plan or Plan(""), max_memory).fill()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return model.eval()


def _refuse(source: Source) -> None:
    if source.is_pickle:
        raise InputError(f"{source.reference}: --max-memory reads safetensors only; its weights are pickles")
    if source.merged:
        raise InputError(
            f"{source.reference}: {source.library} merges or splits tensors of this checkpoint when it loads them: "
            "that takes all of them at once, so verify it without --max-memory"
        )


def _empty(source: Source, dtype: torch.dtype) -> tuple[nn.Module, Callable[[str], torch.dtype | None]]:
    """The plain architecture with parameters on the meta device and buffers as they are, and dtypes that differ."""
    try:
        with meta_parameters():
            made = _build(source, dtype)
        if not any(buffer.is_meta for buffer in made[0].buffers()):
            return made
    except InputError:  # models that compute with their parameters' device or values while they are built
        pass
    with NoRandomInit():  # what is not initialised is no memory yet
        model, dtypes = _build(source, dtype)
    empty: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
                module._parameters[name] = empty.setdefault(parameter, moved)
    return model, dtypes


def _build(source: Source, dtype: torch.dtype) -> tuple[nn.Module, Callable[[str], torch.dtype | None]]:
    if source.library == "timm":
        return timm_models.build(source).to(dtype), lambda name: None
    return transformers_models.build(source, dtype)


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Modules that this thread builds meanwhile keep no memory for parameters; buffers are as ever."""
    owner = threading.get_ident()

    def empty(module: nn.Module, name: str, param: nn.Parameter) -> nn.Parameter | None:
        # The hook is asked for all threads' modules.
        if param.is_meta or threading.get_ident() != owner:
            return None
        return nn.Parameter(param.data.to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(empty)  # type: ignore[arg-type]  # its stub says None
    try:
        yield
    finally:
        handle.remove()


class _Files:
    """The tensors of a source by their names in the model."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.by_name = {target: source.tensors[name] for name, target in source.name_map.items()}

    def find(self, names: Sequence[str]) -> TensorInfo | None:
        """The tensor that is stored under one of the names of a parameter.

        Raises:
            InputError: there are several, and they differ.
        """
        found = {name: self.by_name[name] for name in names if name in self.by_name}
        first, *others = found.values() or [None]
        for other in others:
            if first is not None and other is not None and not torch.equal(map_tensor(first), map_tensor(other)):
                raise InputError(
                    f"{self.source.reference}: {' and '.join(found)} are one parameter of the model, but differ in the "
                    "files: verify it without --max-memory"
                )
        return first

    def stored(self, name: str) -> TensorInfo:
        """Where a tensor lies that an edit of another reads."""
        info = self.find([name, *(n for group in self.source.tied if name in group for n in group)])
        if info is None:
            raise InputError(
                f"the plan names the tensor {name!r}, which the model does not have: is it another model's?"
            )
        return info

    def lookup(self, name: str) -> Tensor:
        """A source tensor for an edit of another."""
        return read_tensor(self.stored(name))


def _load_buffers(files: _Files, model: nn.Module) -> None:
    """Give the buffers that are stored their values."""
    for name, buffer in model.named_buffers(remove_duplicate=False):
        info = files.by_name.get(name)
        if info is not None:
            buffer.data = map_tensor(info).to(buffer.dtype, copy=True)


class _Filler:
    """Puts lazy weights where the parameters of an empty model are."""

    def __init__(
        self,
        files: _Files,
        model: nn.Module,
        dtypes: Callable[[str], torch.dtype | None],
        device: torch.device,
        plan: Plan,
        max_memory: int | None,
    ) -> None:
        self.files, self.model, self.dtypes, self.device, self.plan = files, model, dtypes, device, plan
        self.piece = None if max_memory is None else max_memory // SHARE

    def fill(self) -> None:
        """All of them; tied ones share theirs."""
        groups: dict[int, list[str]] = {}
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, parameter in parameters.items():
            groups.setdefault(id(parameter), []).append(name)
        edits = dict(self.plan.tensors)
        untied = {name: rows for name, rows in edits.items() if rows and rows[0]["op"] == "copy"}
        for names in groups.values():
            parameter = parameters[names[0]]
            lazy = None
            for name in names:
                if name in untied:
                    self._put(name, self._lazy([untied[name][0]["from"]], parameter, untied[name][1:], name))
                    continue
                if lazy is None:
                    kept = [n for n in names if n not in untied]
                    rows = next((edits[n] for n in reversed(kept) if n in edits), [])
                    lazy = self._lazy(kept, parameter, rows, name)
                self._put(name, lazy)
        self._edit_buffers({name: rows for name, rows in edits.items() if name not in parameters})

    def _edit_buffers(self, edits: Mapping[str, Sequence[Edit]]) -> None:
        """Edits of what is no parameter: small tensors, done at once."""
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        for name, rows in edits.items():
            if name in buffers:
                buffers[name].data = apply_edits(self.files.lookup(name), rows, self.files.lookup)
            # The library's own RMSNorm model has weights of ones where the source's class has none.
            elif name not in self.plan.removed and not (self.plan.native and rows[0]["op"] == "new"):
                raise InputError(
                    f"the plan names the tensor {name!r}, which the model does not have: is it another model's?"
                )

    def _lazy(self, names: list[str], parameter: Tensor, edits: Sequence[Edit], shown: str) -> LazyWeight:
        new = bool(edits) and edits[0]["op"] == "new"
        tied = [n for group in self.files.source.tied if group[0] in names or set(group) & set(names) for n in group]
        info = None if new else self.files.find(list(dict.fromkeys([*names, *tied])))
        if info is None and not new:
            raise InputError(f"{self.files.source.reference}: no file holds {shown!r}: verify it without --max-memory")
        dtype = self.dtypes(shown) or parameter.dtype
        refuse_oversized(shown, edits, max((p.numel() for p in self.model.parameters()), default=0))
        shape = self._shape(info, edits, shown)
        stored = Stored(info, tuple(edits), self.files.lookup, dtype, shape, self.piece)
        return LazyWeight(stored, shape, dtype, self.device)

    def _shape(self, info: TensorInfo | None, edits: Sequence[Edit], name: str) -> tuple[int, ...]:
        """The shape after the edits."""
        shape = () if info is None else info.shape
        try:
            return edited_shape(shape, edits, lambda other: self.files.stored(other).shape) if edits else shape
        except (RuntimeError, ValueError, IndexError) as error:
            raise InputError(f"the plan does not fit the tensor {name!r}: {error}") from error

    def _put(self, name: str, value: LazyWeight) -> None:
        path, _, leaf = name.rpartition(".")
        owner: Any = self.model.get_submodule(path)
        owner._parameters[leaf] = value


def check_memory(model: nn.Module, max_memory: int, reference: str) -> None:
    """Refuse a limit that the process passes already or will pass with the largest weight.

    Raises:
        InputError: with how much is needed.
    """
    import psutil

    resident = psutil.Process().memory_info().rss
    name, size = largest_piece(model)
    needed = resident + MARGIN + size + size // 4  # a weight that is edited or cast lies beside what it is made of
    if needed > max_memory:
        enough = math.ceil((needed + SPARE) / 1e8) / 10  # in GB, and no less: what is proposed is to work
        raise InputError(
            f"{reference}: --max-memory {max_memory / 1e9:.3g} GB is too little: python and the libraries take "
            f"{resident / 1e9:.2f} GB, and {name} {size / 1e9:.2f} GB in float64; allow {enough:.1f} GB"
        )


def largest_piece(model: nn.Module) -> tuple[str, int]:
    """The weight that takes most memory when an operation asks for it, and how many bytes that is in float64."""
    found = ("", 0)
    for path, module in model.named_modules():
        for leaf, weight in module._parameters.items():
            if not isinstance(weight, LazyWeight):
                continue
            size = weight.numel() * 8
            values: Any = weight.origin
            if isinstance(module, nn.Embedding) and values.by_rows():
                continue  # only the rows that are looked up
            if values.piece is not None and isinstance(module, nn.Linear) and values.by_rows():
                size = min(size, values.piece)
            if size > found[1]:
                found = (f"{path}.{leaf}" if path else leaf, size)
    return found
