"""Bad input ends in one clear line that names what is at fault, and nothing is written."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from normconvert.errors import InputError
from normconvert.plan.conversion_plan import Plan
from normconvert.sources import open_source
from tests.support.applied_plans import apply_plan
from tests.support.tiny_checkpoints import contents, gpt2, save, save_vit, vit


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good folder of each form, copied by the tests that spoil it."""
    root = tmp_path_factory.mktemp("good")
    model = gpt2()
    for form in ("safetensors", "sharded", "bin"):
        save(model, root / form, form)
    save_vit(vit(), root / "timm")
    return root


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Callable[[str], Path]:
    def copy(form: str = "safetensors") -> Path:
        target = tmp_path / "src"
        for name, data in contents(good / form).items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(data)
        return target

    return copy


Spoil = Callable[[Path], object]
Folder = Callable[..., Path]


def refusal(reference: object, **options: Any) -> str:
    """The one line that opening ends with."""
    with pytest.raises(InputError) as caught:
        open_source(str(reference), **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


WPE = "transformer.wpe.weight"
SAFE = "model.safetensors"


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def change_config(**changes: Any) -> Spoil:
    return lambda folder: edit_json(folder / "config.json", lambda c: c.update(changes))


def rename_all(state: dict[str, torch.Tensor]) -> None:
    for name in list(state):
        state[f"{name}.x"] = state.pop(name)


PACKED = {"h.0.qweight": torch.zeros(3, dtype=torch.int32)}

# What is spoilt, how, and what the line must say.
FOLDERS: list[tuple[str, Spoil, str]] = [
    ("empty folder", empty, "no config.json"),
    ("no weights", lambda f: (f / SAFE).unlink(), "no weights"),
    ("only other formats", lambda f: (f / SAFE).rename(f / "model.onnx"), "found only model.onnx"),
    ("config is no JSON", lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    ("config is a list", lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
    ("config is binary", lambda f: (f / "config.json").write_bytes(b"\xff\xfe\0"), "not a text file"),
    ("config says nothing", lambda f: (f / "config.json").write_text("{}"), "names no architecture"),
    ("config does not fit its class", change_config(n_head="x"), "config"),
    ("unknown model type", change_config(model_type="gpt22"), "gpt2"),
    ("unknown class", change_config(architectures=["GPT2LMHead"]), "GPT2LMHeadModel"),
    ("empty weights", lambda f: (f / SAFE).write_bytes(b""), "empty"),
    ("not safetensors", lambda f: (f / SAFE).write_bytes(b"hello, I am no safetensors file"), "header claims"),
    ("header is no JSON", lambda f: (f / SAFE).write_bytes((4).to_bytes(8, "little") + b"oops"), "corrupt"),
    ("header is a list", lambda f: (f / SAFE).write_bytes((2).to_bytes(8, "little") + b"[]"), "corrupt"),
    ("truncated", lambda f: (f / SAFE).write_bytes((f / SAFE).read_bytes()[:-100]), "truncated"),
    ("truncated in the header", lambda f: (f / SAFE).write_bytes((f / SAFE).read_bytes()[:100]), "truncated"),
    ("bytes behind the end", lambda f: (f / SAFE).write_bytes((f / SAFE).read_bytes() + b"\0"), "corrupt"),
    ("shape larger than its bytes", lambda f: edit_header(f / SAFE, lambda h: h[WPE].update(shape=[64, 48])), WPE),
    ("negative shape", lambda f: edit_header(f / SAFE, lambda h: h[WPE].update(shape=[-32, -48])), WPE),
    ("overlapping tensors", lambda f: edit_header(f / SAFE, lambda h: h.update(copy=h[WPE])), "starts at"),
    ("unknown dtype", lambda f: edit_header(f / SAFE, lambda h: h[WPE].update(dtype="F4")), "F4"),
    ("entry without offsets", lambda f: edit_header(f / SAFE, lambda h: h[WPE].pop("data_offsets")), "corrupt"),
    ("missing tensor", lambda f: edit_tensors(f / SAFE, lambda s: s.pop(WPE)), WPE),
    ("wrong shape", lambda f: edit_tensors(f / SAFE, lambda s: s.update({WPE: s[WPE][:5].clone()})), "[5, 48]"),
    ("foreign names", lambda f: edit_tensors(f / SAFE, rename_all), "missing"),
    ("quantised by config", change_config(quantization_config={"quant_method": "awq"}), "awq"),
    ("quantised by names", lambda f: edit_tensors(f / SAFE, lambda s: s.update(PACKED)), "quantised"),
    ("quantised by dtype", lambda f: edit_tensors(f / SAFE, lambda s: s.update({WPE: s[WPE].to(torch.int8)})), "I8"),
    ("custom code", change_config(model_type="mine", auto_map={"AutoConfig": "m.C"}), "--trust-remote-code"),
    ("custom class", change_config(architectures=["Mine"], auto_map={"AutoModel": "m.Mine"}), "--trust-remote-code"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "words"), [row[1:] for row in FOLDERS], ids=[row[0] for row in FOLDERS])
def test_a_spoilt_folder_is_one_clear_line(folder: Folder, spoil: Spoil, words: str) -> None:
    path = folder()
    spoil(path)
    assert words in refusal(path)


INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00006.safetensors"


def point(to: str) -> Spoil:
    """Make the index say that one shard is another file."""
    return lambda f: edit_json(
        f / INDEX, lambda i: i["weight_map"].update({n: to for n, s in i["weight_map"].items() if s == SHARD})
    )


def link_out(folder: Path) -> None:
    (folder.parent / "outside.safetensors").write_bytes((folder / SHARD).read_bytes())
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to(folder.parent / "outside.safetensors")


INDEXES: list[tuple[str, Spoil, str]] = [
    ("missing shard", lambda f: (f / SHARD).unlink(), SHARD),
    ("no index", lambda f: (f / INDEX).unlink(), "no index"),
    ("truncated shard", lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-8]), SHARD),
    ("parent", point(f"../src/{SHARD}"), "outside the folder"),
    ("absolute", point("/etc/passwd"), "outside the folder"),
    ("link out", link_out, "outside the folder"),
    ("folder as shard", point("."), "missing"),
    ("tensor its shard lacks", lambda f: edit_json(f / INDEX, lambda i: i["weight_map"].update(ghost=SHARD)), "ghost"),
    ("no weight map", lambda f: (f / INDEX).write_text("{}"), "weight_map"),
    ("weight map of numbers", lambda f: (f / INDEX).write_text('{"weight_map": {"a": 1}}'), "weight_map"),
]


@pytest.mark.parametrize(("spoil", "words"), [row[1:] for row in INDEXES], ids=[row[0] for row in INDEXES])
def test_a_spoilt_index_is_one_clear_line(folder: Folder, spoil: Spoil, words: str) -> None:
    path = folder("sharded")
    spoil(path)
    assert words in refusal(path)


class Evil:
    """A pickle of this writes a file when it is loaded without care."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.marker, "ran"))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_wants_to_run_code_is_refused_and_not_run(folder: Folder, tmp_path: Path, legacy: bool) -> None:
    path, marker = folder("bin"), tmp_path / "marker"
    if legacy:
        (path / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Evil(marker)}))
    else:
        torch.save({"w": Evil(marker)}, path / "pytorch_model.bin")
    assert "refused" in refusal(path)
    assert not marker.exists()


@pytest.mark.parametrize("data", [b"", b"not a pickle", pickle.dumps([1, 2]), pickle.dumps({"a": 1})])
def test_a_pickle_that_is_no_checkpoint_is_one_line(folder: Folder, data: bytes) -> None:
    path = folder("bin")
    (path / "pytorch_model.bin").write_bytes(data)
    assert "pytorch_model.bin" in refusal(path)


def test_a_truncated_pickle_is_one_line(folder: Folder) -> None:
    path = folder("bin") / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:5000])
    assert "truncated" in refusal(path.parent)


def test_code_of_a_checkpoint_does_not_run_without_trust(folder: Folder, tmp_path: Path) -> None:
    path = folder()
    (path / "mine.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    edit_json(
        path / "config.json",
        lambda c: c.update(model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}),
    )
    assert "--trust-remote-code" in refusal(path)
    assert not (tmp_path / "marker").exists()


def test_trusted_code_runs(folder: Folder) -> None:
    path = folder()
    (path / "mine.py").write_text(
        "from transformers import GPT2LMHeadModel\nclass Mine(GPT2LMHeadModel):\n    custom = True\n"
    )
    edit_json(
        path / "config.json", lambda c: c.update(architectures=["Mine"], auto_map={"AutoModelForCausalLM": "mine.Mine"})
    )
    assert getattr(open_source(str(path), trust_remote_code=True).skeleton(), "custom", False)


REFERENCES = [
    ("./missing", "no such file or folder"),
    ("/missing/folder", "no such file or folder"),
    ("a/b/c", "not a hub id"),
    ("missing.safetensors", "no such file or folder"),
    ("demo:nothing", "expected one of"),
    ("", "no such file or folder"),
]


@pytest.mark.parametrize(("reference", "words"), REFERENCES)
def test_a_reference_to_nothing_is_one_line(
    reference: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refusal(reference)


def test_files_that_are_no_checkpoint_are_refused(folder: Folder, tmp_path: Path) -> None:
    path = folder()
    assert "not a checkpoint" in refusal(path / "config.json")
    assert "pass its folder" in refusal(path / SAFE)
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((path / SAFE).read_bytes())
    assert "put its config.json beside it" in refusal(alone)
    assert "expected timm:NAME" in refusal(alone, arch="resnet50")
    assert "revision" in refusal(path, revision="main")
    assert "missing" in refusal(alone, arch="timm:vit_tiny_patch16_224")


TIMM: list[tuple[str, Spoil, str]] = [
    ("unknown model", lambda f: edit_json(f / "config.json", lambda c: c.update(architecture="vit_tin")), "vit_tiny"),
    ("bad arguments", lambda f: edit_json(f / "config.json", lambda c: c["model_args"].update(nonsense=1)), "nonsense"),
    ("other depth", lambda f: edit_json(f / "config.json", lambda c: c["model_args"].update(depth=3)), "blocks.2"),
    ("other width", lambda f: edit_json(f / "config.json", lambda c: c["model_args"].update(embed_dim=96)), "shape"),
]


@pytest.mark.parametrize(("spoil", "words"), [row[1:] for row in TIMM], ids=[row[0] for row in TIMM])
def test_a_spoilt_timm_folder_is_one_clear_line(folder: Folder, spoil: Spoil, words: str) -> None:
    path = folder("timm")
    spoil(path)
    assert words in refusal(path)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 1, -1])
def test_nan_and_inf_are_found_and_named_wherever_they_are(
    good: Path, tmp_path: Path, form: str, dtype: torch.dtype, value: float, at: int
) -> None:
    state = {n: t.to(dtype) for n, t in load_file(good / "safetensors" / SAFE).items()}
    name = "transformer.h.1.mlp.c_fc.bias"  # no plan edits it
    state[name][at] = value
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "config.json").write_bytes((good / "safetensors" / "config.json").read_bytes())
    if form == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / SAFE, metadata={"format": "pt"})
    plan = Plan("x", tensors={WPE: [{"op": "center", "axis": 1}]})
    with pytest.raises(InputError, match=rf"{name} holds a value"):
        apply_plan(open_source(str(folder)), plan, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


def test_large_finite_values_are_no_infinities(good: Path, tmp_path: Path) -> None:
    """The quick test sums, and a sum of large values overflows."""
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "config.json").write_bytes((good / "safetensors" / "config.json").read_bytes())
    state = load_file(good / "safetensors" / SAFE)
    state["transformer.h.1.mlp.c_fc.bias"].fill_(3e38)
    save_file(state, folder / SAFE, metadata={"format": "pt"})
    apply_plan(open_source(str(folder)), Plan("x"), tmp_path / "out")
    assert (tmp_path / "out" / SAFE).read_bytes() == (folder / SAFE).read_bytes()
