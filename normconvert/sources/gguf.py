"""GGUF, the files of llama.cpp: read by transformers, and written out as a folder of its own for as long as we run.

Its tensors have other names, other orders of rows and mostly fewer bits. What transformers makes of them is the model
that is converted, so it is held against the file: each of its values must have found a place, and each parameter one.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normconvert.errors import InputError, first_line
from normconvert.files.tensor_info import TensorInfo, check_name
from normconvert.files.weight_files import WEIGHT_SUFFIXES
from normconvert.sources.stated_sizes import check_stated_sizes, in_proportion
from normconvert.sources.transformers_models import quiet

SUFFIX = ".gguf"
BY_SHAPES = {"attention.key_length", "attention.value_length", "vocab_size", "feed_forward_length"}
"""What the tensors say as well: another value would not fit them."""
FLOATS = {"F32", "F16", "BF16", "F64"}


def gguf_at(path: Path) -> Path | None:
    """The GGUF that a path is, or that the folder there has and no other weights; None if there is none.

    Raises:
        InputError: the folder has several.
    """
    if not path.is_dir():
        return path if path.suffix == SUFFIX and path.is_file() else None
    found = sorted(path.glob(f"*{SUFFIX}"))
    if not found or any(other.name.endswith(WEIGHT_SUFFIXES) for other in path.iterdir()):
        return None
    if len(found) > 1:
        listed = ", ".join(one.name for one in found[:3]) + (" ..." if len(found) > 3 else "")
        raise InputError(f"{path}: {len(found)} GGUF files, {listed}: pass one of them")
    return found[0]


def dequantised(path: Path) -> tuple[Path, str]:
    """A folder of transformers with the model of a GGUF in float32, and a sentence about it for the user.

    The folder is removed when this process ends; the same file is written out once.

    Raises:
        InputError: the extra ``gguf`` is not installed, the file is damaged, or transformers does not read all of it.
    """
    stat = path.stat()
    return _dequantised(path.resolve(), stat.st_mtime_ns, stat.st_size)


@functools.cache
def _dequantised(path: Path, changed: int, size: int) -> tuple[Path, str]:
    tensors, kinds = _listed(path)
    folder = Path(tempfile.mkdtemp(prefix="normconvert-gguf-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        config = _config(path)
        check_stated_sizes(str(path), config.to_dict(), tensors)
        _check_understood(path, config)
        with in_proportion(str(path), tensors):
            model = _model(path, config)
        _check_complete(path, model, tensors)
        model.save_pretrained(folder)
        with_tokenizer = _tokenizer(path, folder)
    packed = ", ".join(kind for kind, _ in kinds.most_common() if kind not in FLOATS)
    note = f"read from a GGUF by transformers and {'dequantised' if packed else 'widened'} to float32"
    note += f" ({packed}): it computes what these values say, not what they were made of" if packed else ""
    return folder, note + ("" if with_tokenizer else "; its tokenizer was not read")


def _listed(path: Path) -> tuple[dict[str, TensorInfo], Counter[str]]:
    """The tensors in the file, and how many there are of each type."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise InputError(f"{path}: to read GGUF, gguf is needed: pip install 'normconvert[gguf]'") from error
    try:
        reader: Any = GGUFReader(str(path))
        found = [(str(one.name), one.tensor_type.name, tuple(map(int, reversed(one.shape)))) for one in reader.tensors]
        parts = reader.get_field("split.count")
        parts = int(parts.parts[-1][0]) if parts is not None else 1
    except Exception as error:  # numpy's, struct's and the enumerations' own, wherever the damage is
        raise InputError(f"{path}: not a GGUF file or damaged: {first_line(error)}") from error
    if parts > 1:
        raise InputError(f"{path}: one of {parts} parts of a GGUF: join them with llama.cpp's llama-gguf-split --merge")
    if not found:
        raise InputError(f"{path}: a GGUF without tensors")
    for name, _, _ in found:
        check_name(path, name)
    kinds = Counter(kind for _, kind, _ in found)
    return {name: TensorInfo(name, path, "F32", shape) for name, _, shape in found}, kinds


def _config(path: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:
        raise InputError(f"{path}: transformers cannot read this GGUF: {first_line(error)}") from error


def _model(path: Path, config: Any) -> Any:
    import torch
    import transformers

    # Later releases keep the blocks of a GGUF as they are unless they are told not to.
    whole = getattr(transformers, "GgufConfig", None)
    asked = {} if whole is None else {"quantization_config": whole(dequantize=True)}
    try:
        model, told = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=config, dtype=torch.float32, local_files_only=True,
            output_loading_info=True, **asked,
        )  # fmt: skip
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: transformers cannot read this GGUF: {first_line(error)}") from error
    for what in ("missing_keys", "mismatched_keys", "error_msgs"):
        if found := told.get(what):
            named = f"{what} {sorted(map(str, found))[0]}"
            raise InputError(f"{path}: transformers does not find all of the model in this GGUF: {named}")
    return model


def _check_complete(path: Path, model: Any, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse a model that has not as many values as the file: transformers drops tensors that it has no name for."""
    held = sum(math.prod(info.shape) for info in tensors.values())
    taken = sum({value.data_ptr(): value.numel() for value in model.parameters()}.values())
    if held != taken:
        extra = next((name for name in tensors if name.startswith(("rope_", "token_types"))), None)
        hint = f" ({extra} is one that it leaves out)" if extra else ""
        raise InputError(
            f"{path}: transformers reads {taken} values of this GGUF into {type(model).__name__}, and the file holds "
            f"{held}{hint}: it would be another model; convert the one that it was made of"
        )


def _check_understood(path: Path, config: Any) -> None:
    """Refuse a file that says of how its model computes what transformers passes over: rope scaling, soft caps, scales.

    Raises:
        InputError: names the key.
    """
    from gguf import GGUFReader

    fields: Any = GGUFReader(str(path)).fields
    name = str(fields["general.architecture"].contents()) if "general.architecture" in fields else ""
    known = _read_by_transformers(name)
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    width = getattr(text, "head_dim", None) or (heads and text.hidden_size // heads)
    for field, value in fields.items():
        key = field.removeprefix(f"{name}.")
        if key == field or key in known:
            continue
        # These say nothing that the model does not do anyway where they have these values.
        implied = {"rope.dimension_count": width, "rope.scaling.type": "none", "attention.causal": True}
        if key in BY_SHAPES or (key in implied and value.contents() == implied[key]):
            continue
        raise InputError(
            f"{path}: transformers reads nothing of {field}, which says how the model computes: it would be another "
            "model; convert the one that it was made of"
        )


def _read_by_transformers(architecture: str) -> set[str]:
    """The keys of an architecture, without its name, that transformers makes a value of the config of."""
    from transformers.integrations import ggml

    def plain(name: str) -> str:
        return name.replace("-", "").replace("_", "")

    tables: Mapping[str, Mapping[str, Any]] = getattr(ggml, "GGUF_CONFIG_MAPPING", {})
    rows = next((rows for name, rows in tables.items() if plain(name) == plain(architecture)), {})
    return {key for key, value in rows.items() if value is not None}


def _tokenizer(path: Path, folder: Path) -> bool:
    """Write the tokenizer that the file holds, if it can be read."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True).save_pretrained(folder)
    except Exception:  # many releases read few of them; the model needs none
        return False
    return True
