"""A release of a library that lacks a private name is refused by name and version, or what is said happens."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

from normconvert.compat import timm, transformers
from normconvert.compat import torch as compat
from normconvert.compat.private_names import REFUSED, PrivateName
from normconvert.errors import NormConvertError, UnsupportedVersion

NAMES = (*compat.NAMES, *transformers.NAMES, *timm.NAMES)


class Lacking:
    """Has none of them."""


USES: dict[str, Callable[[], Any]] = {
    "_schema": lambda: compat.schema(compat.OpOverload.__new__(compat.OpOverload)),
    "_version": lambda: compat.version(Lacking()),  # type: ignore[arg-type]
    "_compiling_state_context": lambda: compat.as_exported(),
    "_make_wrapper_subclass": lambda: compat.wrapper(Lacking, (2,), torch.float32, "cpu"),  # type: ignore
    "_from_config": lambda: transformers.builder(Lacking),
    "_get_dtype_plan": lambda: transformers.kept_dtypes(Lacking(), torch.float16),
    "build_glob_alternation": lambda: transformers.kept_dtypes(Lacking(), torch.float16),
    "_model_mapping": lambda: list(transformers.auto_tables()),
    "_tied_weights_keys": lambda: transformers.tied_keys(Lacking),
    "filter_pretrained_cfg": lambda: timm.written_config({}),
}


def use_of(name: PrivateName) -> Callable[[], Any]:
    """What cannot go on without the name."""
    if name.library == "transformers":
        return USES.get(name.path.rpartition(".")[2], transformers.renaming)
    return USES.get(name.path.rpartition(".")[2], lambda: runpy.run_path(str(compat.__file__)))


def take_away(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a release that lacks it; what torch's own classes have from C cannot be taken."""
    if path == "torch.utils._pytree":
        monkeypatch.setitem(sys.modules, path, None)
    elif path.startswith("transformers.AutoModel."):
        auto = import_module("transformers.models.auto.modeling_auto")
        for kind in [v for k, v in vars(auto).items() if k.startswith("Auto") and "_model_mapping" in vars(v)]:
            monkeypatch.setattr(kind, "_model_mapping", None)
    elif not path.startswith(("torch.Tensor.", "torch._ops.OpOverload._")):
        holder, _, name = path.rpartition(".")
        module, _, kind = holder.rpartition(".")
        found = getattr(import_module(module), kind) if kind[:1].isupper() else import_module(holder)
        monkeypatch.delattr(found, name)


@pytest.mark.parametrize("name", [n for n in NAMES if n.without == REFUSED], ids=lambda n: n.path)
def test_a_name_that_has_gone_is_told(name: PrivateName, monkeypatch: pytest.MonkeyPatch) -> None:
    take_away(name.path, monkeypatch)
    with pytest.raises(UnsupportedVersion) as error:
        use_of(name)()
    text = str(error.value)
    assert name.path.rpartition(".")[2] in text
    assert text.endswith(f"known to work with {name.library} {name.seen}")
    assert "\n" not in text
    assert isinstance(error.value, NormConvertError)


def test_without_lists_of_what_may_differ_nothing_may() -> None:
    assert transformers.may_be_missing(Lacking()) == transformers.may_be_unexpected(Lacking()) == ()
    transformers.plain_experts(None)
