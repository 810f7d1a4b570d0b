"""One input -> another one that is slightly, or badly, wrong; drawn by hypothesis, so that failures are found again."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

DEEP: Any = json.loads("[" * 900 + "]" * 900)
NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, -(10**30), 1.5, float("nan"), float("inf"), "", "x", "..",
    "../../etc/passwd", "/etc/passwd", "~nosuchuser/x", "a\0b", "a\n::error::b", "\x1b[2J", "\ud800", "é" * 300, [], {},
    [None], [[]], [7], {"a": {}}, {"": 1}, DEEP, "center", "float99", "F64", "timm", [10**9], {"op": "set"},
    "mine.Mine", "os.system", "model.safetensors", "${HOME}", "{name}", "1e400", "1GB", "demo:gpt2",
)  # fmt: skip
"""Values that somebody was surprised by."""
KEYS = (
    "auto_map", "architectures", "num_labels", "n_layer", "quantization_config", "normconvert", "modules", "metadata",
    "weight_map", "__metadata__", "set", "op", "path", "", "\n", "dtype", "transformers_weights", "id2label",
)  # fmt: skip
TEXTS = (
    b"", b"\0", b"{", b"]", b"\xff\xfe", b"\n", b": ", b"- ", b"&a [", b"*a", b"<<: *a\n", b"!!timestamp x",
    b"!!binary 1", b"!!python/object/apply:os.system [x]", b"!!set {a}", b"? [a]\n: b\n", b"${", b"${X}",
    b"%YAML 9.9\n", b"---\n", b"1e400", b"9" * 5000, b"[" * 3000, b'"\\ud800"', b"Infinity", b"NaN", b"../", b"\r",
    b"\t", b"\x85", b"\xe2\x80\xa8",
)  # fmt: skip
BOMB = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (letter, letter, b",".join([b"*%c" % (letter - 1)] * 9)) for letter in range(98, 107)
)


@st.composite
def mutated_json(draw: st.DrawFn, data: Any) -> bytes:
    """JSON in which a few values are others, gone, or more than they were."""
    data = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, 3))):
        holder, key = _place(draw, data)
        action = draw(st.sampled_from(("replace", "replace", "replace", "drop", "add", "wrap", "swap")))
        if holder is None:
            data = copy.deepcopy(draw(_values())) if action == "replace" else data
        elif action == "drop":
            del holder[key]
        elif action == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(KEYS))] = copy.deepcopy(draw(_values()))
        elif action == "wrap":
            holder[key] = [holder[key]]
        elif action == "swap" and isinstance(holder, dict):
            other = draw(st.sampled_from(sorted(holder, key=str)))
            holder[key], holder[other] = holder[other], holder[key]
        else:
            holder[key] = copy.deepcopy(draw(_values()))
    return json.dumps(data).encode("utf-8", "surrogatepass")


def _values() -> st.SearchStrategy[Any]:
    simple = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    return st.sampled_from(NASTY) | st.recursive(
        simple, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    )


def _place(draw: st.DrawFn, data: Any) -> tuple[Any, Any]:
    """Something that holds values, and the key of one of them."""
    holder, key, here = None, None, data
    while isinstance(here, (dict, list)) and here and (holder is None or draw(st.integers(0, 3))):
        holder = here
        key = draw(st.sampled_from(sorted(here, key=str))) if isinstance(here, dict) else draw(_index(here))
        here = here[key]
    return holder, key


def _index(items: list[Any]) -> st.SearchStrategy[int]:
    return st.integers(0, len(items) - 1)


@st.composite
def mutated_bytes(draw: st.DrawFn, data: bytes, head: int = 1 << 20) -> bytes:
    """Bytes with bits flipped, pieces gone, doubled or put in, above all near the beginning (``head``)."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, min(head, len(found)) - 1)))
        action = draw(st.sampled_from(("flip", "cut", "drop", "insert", "double", "end")))
        if action == "flip" and found:
            found[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "cut":
            del found[at:]
        elif action == "drop":
            del found[at : at + draw(st.integers(1, 16))]
        elif action == "insert":
            found[at:at] = draw(st.sampled_from(TEXTS) | st.binary(max_size=8))
        elif action == "double":
            found[at:at] = found[at : at + draw(st.integers(1, 200))]
        else:
            found += draw(st.sampled_from(TEXTS))
    return bytes(found)
