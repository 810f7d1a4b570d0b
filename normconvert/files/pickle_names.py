"""Names, dtypes and shapes in a pickled checkpoint, without torch, without values, without running anything.

Importing torch takes longer than a whole identification may. A pickle is a program for a small machine; here that
machine knows no function at all: whatever the program names or calls becomes an inert record of the call. Files that
name more than what torch's ``weights_only`` allows are left to torch, which refuses them with its reason.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from normconvert.errors import InputError
from normconvert.files.safetensors_file import DTYPES
from normconvert.files.tensor_info import TensorInfo

# Training checkpoints wrap the weights; the order is timm's (timm.models._helpers.load_state_dict).
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# One of them twice: what was compiled before it was parallel has it inside, what was compiled after it outside.
PREFIXES = ("_orig_mod.", "module.", "_orig_mod.")
ALLOWED = ("torch.", "collections.OrderedDict", "argparse.Namespace")
"""What a checkpoint may name; :func:`normconvert.files.pickle_file.read_pickle` refuses everything else."""

# What torch writes for plain tensors. All other rebuilds (sparse, quantised, subclasses) are left to torch.
REBUILDS = {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"}
WRAPS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
STORAGES = {
    "Half": "float16", "BFloat16": "bfloat16", "Float": "float32", "Double": "float64", "Bool": "bool", "Byte": "uint8",
    "Char": "int8", "Short": "int16", "Int": "int32", "Long": "int64", "ComplexFloat": "complex64",
}  # fmt: skip
SAFETENSORS = {torch_name: name for name, (_, torch_name) in DTYPES.items()}
LEGACY_PARTS = 3  # before zip files: a magic number, the protocol and the system come before the checkpoint


@dataclass(frozen=True)
class PickledNames:
    """What a pickled checkpoint holds.

    Attributes:
        tensors: name -> dtype and shape, with training wrappers and prefixes taken off, in file order.
        entries: the texts that lie beside the weights (``arch``, ``args.model``): name -> text.
    """

    tensors: dict[str, TensorInfo]
    entries: dict[str, str]


class Unreadable(Exception):
    """Not for this reader: torch has to look at the file."""


@dataclass
class _Call:
    """What the pickle wanted to make: a class or function by name, what it was called with, what was put into it."""

    name: str = ""
    arguments: tuple[Any, ...] = ()
    items: dict[Any, Any] = field(default_factory=dict)
    state: Any = None

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def __setstate__(self, state: Any) -> None:
        self.state = state

    # Without these three the unpickler stops at a list or a set of a class that it has a stand-in for.
    def append(self, value: Any) -> None:
        """Elements of a list are of no interest."""

    extend = append
    add = append


def _stand_in(name: str) -> type[_Call]:
    def make(cls: type[_Call], *arguments: Any) -> _Call:
        made: _Call = object.__new__(cls)
        _Call.__init__(made, name, arguments)
        return made

    # A class, since pickles call classes and take them as values (a storage's type). Its __init__ does nothing: Python
    # calls it after __new__, and a dataclass's own would put the pickle's arguments in place of the record.
    return type("StandIn", (_Call,), {"name": name, "__new__": make, "__init__": lambda self, *arguments: None})


class _Reader(pickle.Unpickler):
    """Imports nothing: every name becomes a stand-in."""

    def __init__(self, file: IO[bytes]) -> None:
        # As torch reads them: pickles of Python 2 hold bytes where names are meant.
        super().__init__(file, encoding="utf-8")
        self.known: dict[str, type[_Call]] = {}

    def find_class(self, module: str, name: str) -> type[Any]:
        full = f"{module}.{name}"
        # Nothing runs here either way: this keeps what torch refuses (but for names of its own) from being identified.
        if not full.startswith(ALLOWED):
            raise Unreadable(full)
        return self.known.setdefault(full, _stand_in(full))

    def persistent_load(self, pid: Any) -> Any:
        return pid  # ("storage", type, key, device, elements)


def read_pickle_names(path: Path) -> PickledNames:
    """The names in a .bin, .pth or .pt file.

    Raises:
        InputError: the file is empty.
        Unreadable: the file is not what torch writes, or names something that torch would refuse.
    """
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty; download it again")
    try:
        loaded = _load(path)
        weights = next((loaded[k] for k in WRAPPERS if _mapping(loaded.get(k)) is not None), loaded)
        pairs = ((name, _tensor(value)) for name, value in (_mapping(weights) or {}).items() if isinstance(name, str))
        tensors = {
            (short := unprefixed(name)): TensorInfo(short, path, *found) for name, found in pairs if found is not None
        }
    except Exception as error:  # whatever bytes that are no pickle make of an unpickler
        raise Unreadable(str(error)) from error
    if not tensors:
        raise Unreadable("no tensors")
    return PickledNames(tensors, _texts(loaded))


def unprefixed(name: str) -> str:
    """A tensor's name without what data parallelism and compilation put before it."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _load(path: Path) -> Mapping[Any, Any]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            inner = next(name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl")
            with archive.open(inner) as handle:
                loaded = _Reader(handle).load()
    else:
        with path.open("rb") as handle:
            # Each with a reader of its own: a pickle's memo ends with it.
            for _ in range(LEGACY_PARTS):
                _Reader(handle).load()
            loaded = _Reader(handle).load()
    found = _mapping(loaded)
    if found is None:
        raise Unreadable(f"a {type(loaded).__name__}")
    return found


def _mapping(value: Any) -> Mapping[Any, Any] | None:
    if isinstance(value, _Call):
        if value.name != "collections.OrderedDict":
            return None
        # An OrderedDict comes with its pairs as an argument or set one by one, as the protocol has it.
        return dict(*value.arguments[:1]) | value.items
    return value if isinstance(value, dict) else None


def _tensor(value: Any) -> tuple[str, tuple[int, ...]] | None:
    """(dtype, shape) of a tensor's record; None for anything else."""
    if not isinstance(value, _Call):
        return None
    if value.name in WRAPS:
        return _tensor(value.arguments[0])
    if value.name not in REBUILDS:
        # A tensor that would be missing from the names is worse than torch's having to be imported.
        if value.name.startswith("torch._utils."):
            raise Unreadable(value.name)
        return None
    storage, _, size = value.arguments[:3]
    kind = storage[1].name if isinstance(storage[1], _Call) else _class_name(storage[1])
    dtype = STORAGES.get(kind.rpartition(".")[2].removesuffix("Storage"))
    # torch.Size, or a plain tuple in older files.
    shape = tuple(size.arguments[0]) if isinstance(size, _Call) else tuple(size)
    if dtype is None or not all(isinstance(n, int) for n in shape):
        raise Unreadable(kind)
    return SAFETENSORS[dtype], shape


def _class_name(kind: Any) -> str:
    return str(getattr(kind, "name", kind))


def _texts(loaded: Mapping[Any, Any]) -> dict[str, str]:
    found = {str(key): value for key, value in loaded.items() if isinstance(value, str)}
    for key in ("args", "hparams", "hyper_parameters", "config"):
        value = loaded.get(key)
        # A Namespace keeps its attributes as its state.
        inner: Any = value.state if isinstance(value, _Call) else value
        # Any object may stand under these names; what is no mapping states nothing.
        with suppress(AttributeError):
            found.update({f"{key}.{name}": text for name, text in inner.items() if isinstance(text, str)})
    return found
