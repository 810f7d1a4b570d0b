"""Bare checkpoints name themselves: the index, what fits, what comes near, and what is never guessed."""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file, save_model

import normconvert
from normconvert.errors import InputError
from normconvert.files.pickle_file import read_pickle_entries
from normconvert.identification import identify_names
from normconvert.identification.building import build, shapes, timm_print
from normconvert.identification.prints import (
    INDEX,
    Index,
    compare,
    is_exact,
    load_index,
    read_print,
    save_index,
    write_print,
)
from normconvert.identification.search import known_models
from normconvert.sources import open_source
from tests.support.bare_weights import TWINS, UNIQUE, exact, names_of_model, state_of, write
from tests.support.tiny_checkpoints import save_vit, vit
from tools.census.zoo.timm_zoo import timm_table

# The index


@pytest.mark.slow
def test_the_index_is_of_timm_as_it_is_installed() -> None:
    """One model of every module and all that the index lacks, with another number of classes than the default."""
    index = load_index()
    models, _ = known_models(index)  # what the index lacks is built
    assert set(models) == set(timm.list_models())
    sample = {variants[0] for variants in timm_table().values()} | (set(models) - set(index.models))
    fits = (compare(shapes(build(n, num_classes=7)), frozenset(), read_print(n, models[n])) for n in sorted(sample))
    assert [fit.name for fit in fits if not is_exact(fit)] == []
    if version("timm") == index.timm:
        assert set(index.models) == set(models)


@pytest.mark.slow
def test_the_whole_index_is_of_timm_as_it_is_installed() -> None:
    index = load_index()
    assert [n for n in timm.list_models() if n in index.models and write_print(timm_print(n)) != index.models[n]] == []


def test_the_indices_are_small_and_come_with_the_package() -> None:
    files = sorted(INDEX.parent.glob("*.xz"))
    assert [path.name for path in files] == ["timm.xz", "transformers.xz"]
    assert all(path.stat().st_size < 1_000_000 for path in files)


def test_an_index_is_the_same_bytes_each_time_and_reads_as_written(tmp_path: Path) -> None:
    known = timm_print("coat_lite_tiny")  # with tied tensors
    lines = {"coat_lite_tiny": write_print(known), UNIQUE: write_print(timm_print(UNIQUE))}
    for name in ("a", "b"):
        save_index(Index("1.2.3", dict(reversed(lines.items()) if name == "a" else lines.items())), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert load_index(tmp_path / "a") == Index("1.2.3", dict(sorted(lines.items())))
    assert read_print("coat_lite_tiny", lines["coat_lite_tiny"]) == known


def test_a_model_that_the_index_lacks_is_built() -> None:
    index = load_index()
    models, notes = known_models(Index("0.0.1", {n: text for n, text in index.models.items() if n != UNIQUE}))
    assert models[UNIQUE] == write_print(timm_print(UNIQUE))
    assert "1 new models were built" in notes[0] or version("timm") != index.timm


def test_a_model_that_timm_no_longer_has_is_not_offered() -> None:
    index = load_index()
    models, _ = known_models(Index("0.0.1", {**index.models, "gone": index.models[UNIQUE]}))
    assert "gone" not in models


# What fits


@pytest.mark.parametrize("classes", [None, 0, 3])
def test_the_number_of_classes_is_no_part_of_a_model(classes: int | None, tmp_path: Path) -> None:
    state = state_of(UNIQUE) if classes is None else state_of(UNIQUE, num_classes=classes)
    found = normconvert.identify(write(state, tmp_path / "w.safetensors"))
    assert exact(found) == [UNIQUE]
    assert found.exact[0].num_classes == (1000 if classes is None else classes)
    assert found.arch == f"timm:{UNIQUE}"


def test_all_models_that_share_names_and_shapes_are_found(tmp_path: Path) -> None:
    for name in TWINS:
        found = normconvert.identify(write(state_of(name), tmp_path / "w.safetensors"))
        assert exact(found) == TWINS
        assert found.chosen is None
        assert found.arch is None


def test_models_that_differ_in_padding_and_epsilon_only_are_never_told_apart() -> None:
    found = identify_names("x", names_of_model("efficientnet_b0"))
    assert {"efficientnet_b0", "tf_efficientnet_b0"} <= set(exact(found))
    assert found.arch is None


def test_both_heads_of_a_distilled_model_are_its_classifier() -> None:
    names = names_of_model("deit_tiny_distilled_patch16_224", num_classes=5)
    assert names.shapes["head_dist.weight"] == (5, 192)
    found = identify_names("x", names)
    assert exact(found) == ["deit_tiny_distilled_patch16_224"]
    assert found.exact[0].num_classes == 5
    names.shapes["head_dist.weight"] = (6, 192)  # two numbers of classes: nothing that timm builds
    assert exact(identify_names("x", names)) == []


def test_counters_and_index_tables_may_be_there_or_not(tmp_path: Path) -> None:
    state = state_of("test_resnet")
    counters = {n: t for n, t in state.items() if n.endswith("num_batches_tracked")}
    assert counters
    old = {n: t for n, t in state.items() if n not in counters}
    assert exact(normconvert.identify(write(old, tmp_path / "old.safetensors"))) == ["test_resnet"]
    more = {**state, "relative_position_index": torch.arange(4)}
    assert exact(normconvert.identify(write(more, tmp_path / "more.safetensors"))) == ["test_resnet"]


def test_buffers_that_are_no_statistics_may_be_there() -> None:
    names = names_of_model("swin_tiny_patch4_window7_224")
    names.shapes["layers.0.blocks.1.attn_mask"] = (64, 49, 49)  # stored by earlier versions of timm
    assert "swin_tiny_patch4_window7_224" in exact(identify_names("x", names))


def test_of_a_tied_tensor_one_name_is_enough(tmp_path: Path) -> None:
    model = timm.create_model("coat_lite_tiny", num_classes=3)
    save_model(model, str(tmp_path / "w.safetensors"))
    assert exact(normconvert.identify(tmp_path / "w.safetensors")) == ["coat_lite_tiny"]


# Files


def test_pickles_of_training_scripts_are_read(tmp_path: Path) -> None:
    state = state_of("test_resnet")
    wrapped = {f"module.{n}": t for n, t in state.items()}
    args = argparse.Namespace(model="test_resnet", lr=0.1)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))]).state_dict()
    contents: dict[str, Any] = {
        "plain.pth": state,
        "half.pt": {n: t.half() for n, t in state.items()},  # counters as well, as careless tools do
        "wrapped.bin": {"state_dict": wrapped, "epoch": 3, "arch": "test_resnet", "optimizer": optimizer, "args": args},
        "parameters.pth": {"model": {n: torch.nn.Parameter(t) for n, t in state.items() if t.is_floating_point()}},
        "model_best.pth.tar": {"state_dict": state, "epoch": 3, "metric": 91.5},
        "legacy.pth": state,
    }
    for name, content in contents.items():
        path = tmp_path / name
        torch.save(content, path, _use_new_zipfile_serialization=name != "legacy.pth")
        assert exact(normconvert.identify(path)) == ["test_resnet"], name
    assert read_pickle_entries(tmp_path / "wrapped.bin") == {"arch": "test_resnet", "args.model": "test_resnet"}


class Payload:
    """Runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "ran"))


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_that_wants_to_run_code_is_refused_and_nothing_runs(tmp_path: Path, new: bool) -> None:
    path = tmp_path / "evil.pth"
    content = {**state_of("test_resnet"), "extra": Payload(tmp_path / "trace")}
    torch.save(content, path, _use_new_zipfile_serialization=new)
    with pytest.raises(InputError, match="wants to run code"):
        normconvert.identify(path)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("bytes_", [b"", b"hello", b"PK\x03\x04 not a zip", b"\x80\x02}q\x00.", b"\x80\x02K\x01."])
def test_what_is_no_checkpoint_is_one_clear_line(tmp_path: Path, bytes_: bytes) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(bytes_)
    with pytest.raises(InputError) as caught:
        normconvert.identify(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_and_shards_are_identified(tmp_path: Path) -> None:
    state = state_of(UNIQUE)
    half = len(state) // 2
    parts = [dict(list(state.items())[:half]), dict(list(state.items())[half:])]
    weight_map = {}
    for i, part in enumerate(parts):
        name = f"model-0000{i + 1}-of-00002.safetensors"
        save_file(part, tmp_path / name)
        weight_map.update(dict.fromkeys(part, name))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert exact(normconvert.identify(tmp_path)) == [UNIQUE]
    found = normconvert.identify(save_vit(vit(), tmp_path / "vit"))  # two blocks of twelve: no model of that name
    assert exact(found) == []
    assert [(s.where, s.name) for s in found.stated] == [
        ("config.json", "vit_tiny_patch16_224"),
        ("folder name", "vit"),
    ]


# Ties


@pytest.mark.parametrize(
    ("metadata", "name", "where"),
    [
        ({"architecture": "test_efficientnet_ln"}, "w", "metadata architecture"),
        ({"model_name": "timm/test_efficientnet_ln.r160_in1k"}, "w", "metadata model_name"),
        ({"format": "pt"}, "test_efficientnet_ln", "file name"),
        ({"format": "pt"}, "test_efficientnet_ln.r160_in1k", "file name"),
    ],
)
def test_what_states_the_architecture_breaks_a_tie(
    metadata: dict[str, str], name: str, where: str, tmp_path: Path
) -> None:
    found = normconvert.identify(write(state_of("test_efficientnet_ln"), tmp_path / f"{name}.safetensors", metadata))
    assert exact(found) == TWINS
    assert found.arch == "timm:test_efficientnet_ln"
    assert where in [s.where for s in found.stated if s.name == "test_efficientnet_ln"]


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ({"format": "pt"}, "my_test_efficientnet_ln"),
        ({"format": "pt"}, "efficientnet_ln_best"),
        ({"comment": "test_efficientnet_ln"}, "w"),
        ({"architecture": "test_efficientnet_ln"}, "test_efficientnet_gn"),
        ({"architecture": "test_vit"}, "w"),
    ],
    ids=["inside a name", "like a name", "another key", "two that differ", "one that does not fit"],
)
def test_nothing_less_breaks_a_tie(metadata: dict[str, str], name: str, tmp_path: Path) -> None:
    path = write(state_of("test_efficientnet_ln"), tmp_path / f"{name}.safetensors", metadata)
    assert normconvert.identify(path).arch is None
    with pytest.raises(InputError, match=r"test_efficientnet_gn, test_efficientnet_ln: pass --arch"):
        open_source(str(path))


def test_the_folder_breaks_a_tie_where_the_file_has_no_name_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "test_efficientnet_ln.r160_in1k"
    folder.mkdir()
    write(state_of("test_efficientnet_ln"), folder / "model.safetensors")
    assert open_source(str(folder)).architecture == "test_efficientnet_ln"


# What comes near


def test_what_differs_is_named(tmp_path: Path) -> None:
    state = state_of(UNIQUE)
    del state["norm.bias"]
    state["probe.weight"] = torch.zeros(2)
    state["norm.weight"] = torch.zeros(3)
    found = normconvert.identify(write(state, tmp_path / "w.safetensors"))
    near = found.nearest[0]
    assert (found.exact, near.names) == ((), (UNIQUE,))
    assert (near.missing, near.extra) == (("norm.bias",), ("probe.weight",))
    assert near.reshaped == (("norm.weight", (3,), (64,)),)
    assert near.arguments == {}
    with pytest.raises(InputError, match=r"nearest: test_vit \(1 tensor missing, 1 too many, 1 of another shape\)"):
        open_source(str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (UNIQUE, {"img_size": 320}),
        (UNIQUE, {"in_chans": 1}),
        (UNIQUE, {"img_size": 96, "in_chans": 4}),
        ("test_resnet", {"in_chans": 1}),
        ("levit_128s", {"img_size": 192}),
        ("mixer_s32_224", {"img_size": 256}),
    ],
)
def test_another_image_size_or_number_of_channels_is_proved(name: str, arguments: dict[str, int]) -> None:
    found = identify_names("x", names_of_model(name, **arguments))
    assert exact(found) == []
    assert found.nearest[0].arguments[name] == arguments


def test_a_difference_that_no_image_size_explains_is_not_explained() -> None:
    names = names_of_model(UNIQUE)
    shape = names.shapes["pos_embed"]
    names.shapes["pos_embed"] = (shape[0], shape[1] + 2, shape[2])
    assert identify_names("x", names).nearest[0].arguments == {}


@pytest.mark.parametrize("prefix", ["model.", "net.model."])
def test_names_behind_a_prefix_are_recognised(tmp_path: Path, prefix: str) -> None:
    path = write({f"{prefix}{n}": t for n, t in state_of(UNIQUE).items()}, tmp_path / "w.safetensors")
    found = normconvert.identify(path)
    assert (found.arch, found.prefix) == (f"timm:{UNIQUE}", prefix)
    assert found.notes == (f"all names begin with {prefix!r}: they fit without it",)
    assert open_source(str(path)).architecture == UNIQUE


def test_weights_of_nothing_known_resemble_nothing(tmp_path: Path) -> None:
    path = write({"a": torch.zeros(2, 3), "b.c": torch.zeros(4)}, tmp_path / "w.safetensors")
    found = normconvert.identify(path)
    assert (found.exact, found.nearest) == ((), ())
    with pytest.raises(InputError, match=r"of no architecture that is known: pass --arch timm:NAME"):
        open_source(str(path))
