"""Files that somebody else made: what is wrong with them is one line, costs nothing, and leads nowhere else."""

from __future__ import annotations

import io
import json
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from normconvert.apply.card_metadata import metadata
from normconvert.cli import run
from normconvert.errors import InputError
from normconvert.files.pickle_file import read_pickle
from normconvert.files.safetensors_file import read_header
from normconvert.files.weight_files import find_weights, load_json, read_checkpoint, read_text
from normconvert.files.yaml_file import read_yaml
from normconvert.option_fields import parse_size
from normconvert.recipes.origins import Reference, look_up
from normconvert.recipes.reading import read_recipe
from normconvert.sources import open_source
from tools.fuzz.mutations import BOMB


def safetensors(path: Path, header: str) -> Path:
    raw = header.encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * 8)
    return path


ENTRY = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
HEADERS = {
    "deep": "[" * 100_000,
    "deep in an entry": '{"a":' + "[" * 100_000,
    "1e400": ENTRY.replace("8]", "1e400]"),
    "infinity": ENTRY.replace("[2]", "[Infinity]"),
    "a fraction": ENTRY.replace("[2]", "[2.0]"),
    "true": ENTRY.replace("[2]", "[true, 2]"),
    "dtype a list": ENTRY.replace('"F32"', "[]"),
    "dtype with a line": ENTRY.replace('"F32"', '"F\\n::error::x"'),
    "metadata a list": '{"__metadata__": [1], "a": ' + ENTRY + "}",
}


@pytest.mark.parametrize("name", list(HEADERS))
def test_a_broken_header_is_one_line(tmp_path: Path, name: str) -> None:
    header = HEADERS[name]
    whole = header if header.startswith(("[", '{"a"', '{"__')) else f'{{"a": {header}}}'
    with pytest.raises(InputError) as caught:
        read_header(safetensors(tmp_path / "w.safetensors", whole))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a\\n::error::x", "\\u001b[2J", "\\u202e", "a" * 2000])
def test_a_name_that_could_forge_a_message_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="no name") as caught:
        read_header(safetensors(tmp_path / "w.safetensors", f'{{"{name}": {ENTRY}}}'))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("map_", [["a"], 1, None, {"a": ["b"]}, {"a": "../w.safetensors"}, {"a": "x\0"}, {"a": "/x"}])
def test_an_index_that_is_none_or_leads_elsewhere(tmp_path: Path, map_: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    safetensors(tmp_path / "w.safetensors", f'{{"a": {ENTRY}}}')
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": map_}))
    with pytest.raises(InputError):
        read_checkpoint(index)
    # A recipe that is planned, too, looks at no file elsewhere.
    found = look_up([Reference(str(folder))]).popitem()[1]
    assert not isinstance(found, InputError)
    assert found.size is None


@pytest.mark.parametrize("cached", ["snapshots", "models--a/snapshots"])
def test_weights_that_are_a_link_to_elsewhere_are_refused(tmp_path: Path, cached: str) -> None:
    folder = tmp_path / cached / "commit"
    folder.mkdir(parents=True)
    safetensors(tmp_path / "w.safetensors", f'{{"a": {ENTRY}}}')
    (folder / "model.safetensors").symlink_to(tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="outside the folder"):
        find_weights(folder, {}, "transformers")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("gone")
    with pytest.raises(InputError, match="leads nowhere"):
        find_weights(folder, {}, "transformers")
    if cached.startswith("models"):
        blob = folder.parent.parent / "blobs"
        blob.mkdir()
        (tmp_path / "w.safetensors").rename(blob / "1")
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to("../../blobs/1")
        (tmp_path / "link").symlink_to(folder, target_is_directory=True)
        assert find_weights(folder, {}, "transformers").is_file()
        assert find_weights(tmp_path / "link", {}, "transformers").is_file()


def test_a_config_of_five_gigabytes_without_content_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(5_000_000_000)
    with pytest.raises(InputError, match="no such file is so large"):
        load_json(tmp_path / "config.json")
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text("[" * 1_000_000)
    with pytest.raises(InputError, match="nested too deeply"):
        load_json(tmp_path / "config.json")


def test_a_pickle_that_unpacks_to_far_more_is_refused_before_it_does(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * 40_000_000)
    with pytest.raises(InputError, match="far more than it is"):
        read_pickle(tmp_path / "w.bin")


@pytest.mark.parametrize("new", [True, False])
def test_a_tensor_that_repeats_one_value_a_thousand_million_times_is_refused(tmp_path: Path, new: bool) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(1).expand(10**9)}, buffer, _use_new_zipfile_serialization=new)
    (tmp_path / "w.bin").write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match="larger than what is stored"):
        read_pickle(tmp_path / "w.bin")


@pytest.mark.parametrize(
    "text",
    [
        b"a: 1" + b":1" * 400_000,
        b"a: 0x" + b"f" * 100_000,
        BOMB,
        b"a: &a [*a]",
        b"!!timestamp x",
        b"a: !!binary 1",
        b"a: " + b"9" * 5000,
        b"? [a]\n: b",
        b"x" * 2_000_000,
    ]
    + [
        b"a: &a {b: 1}\n" + b"".join(b"c%d: &%c\n  <<: [%s]\n" % (i, i, b",".join([b"*a"] * 9)) for i in range(98, 104))
    ],
)
def test_yaml_of_small_files_costs_little(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "x.yaml").write_bytes(text)
    start = time.process_time()
    with suppress(InputError):
        read_yaml(tmp_path / "x.yaml")
    assert time.process_time() - start < 5


@pytest.mark.parametrize("text", ["~nosuchuser/x", "a\0b", "loop", "x" * 5000])
def test_what_is_no_path_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    report = ["inspect", "demo:vit", "--json", text]
    for command in (["inspect", text], ["rmsnorm", "demo:vit", text], ["identify", text], report):
        assert run(command) == 2
        assert "a bug in" not in capsys.readouterr().err


@pytest.mark.parametrize("text", ["9" * 400 + "GB", "9" * 30 + "GB", "1e3GB", "-1", "0", "NaN"])
def test_what_is_no_size_is_said(text: str) -> None:
    with pytest.raises(InputError, match="expected a size"):
        parse_size(text)


@pytest.mark.parametrize(
    "change", [{"architectures": "A"}, {"auto_map": [1]}, {"auto_map": 1}, {"model_type": []}], ids=str
)
def test_a_config_of_other_types_is_said(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **change}))
    safetensors(tmp_path / "model.safetensors", f'{{"a": {ENTRY}}}')
    with pytest.raises(InputError, match=r"config.json: not a model's"):
        open_source(str(tmp_path))


def test_a_device_without_an_end_is_not_read_to_it() -> None:
    with pytest.raises(InputError, match="no such file is so large"):
        read_text(Path("/dev/zero"))


FRONTS = {
    "blanks": "tags:\n- " + " " * 5000 + "{",
    "blanks between": "tags:\n" + "- a" + " " * 20_000 + "b{",
    "many lines": "tags:\n" + "- a\n" * 300_000,
}


@pytest.mark.parametrize("name", list(FRONTS))
def test_a_front_matter_made_to_take_for_ever_takes_a_moment(name: str) -> None:
    start = time.process_time()
    metadata(FRONTS[name], None, "transformers", "rmsnorm", None)
    assert time.process_time() - start < 3


@pytest.mark.parametrize("text", ["${a:-" * 20_000, "${ " * 20_000], ids=["defaults", "no names"])
def test_variables_of_a_recipe_cost_little(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(f"sources: ['{text}']\n")
    start = time.process_time()
    with pytest.raises(InputError, match=r"a text of .* characters, more than 4096") as caught:
        read_recipe(tmp_path / "r.yaml", {})
    assert len(str(caught.value)) < 1000
    assert time.process_time() - start < 3


def test_of_thousands_of_errors_the_first_are_told(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("".join(f"key{i}: 1\n" for i in range(15_000)))
    start = time.process_time()
    with pytest.raises(InputError, match="100 errors in recipes"):
        read_recipe(tmp_path / "r.yaml", {})
    assert time.process_time() - start < 5


def test_merge_keys_are_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("a: &a {b: 1}\nc:\n  <<: *a\n")
    with pytest.raises(InputError, match=r"r.yaml:3:3: << is not read here: write its entries out"):
        read_yaml(tmp_path / "r.yaml")


@pytest.mark.parametrize("number", ["0x" + "f" * 6000, "1" + ":1" * 3000])
def test_a_number_that_cannot_be_printed_is_said(tmp_path: Path, number: str) -> None:
    (tmp_path / "r.yaml").write_text(f"sources: [a]\nmin_gain: {number}\n")
    with pytest.raises(InputError, match=r"r.yaml:2:11: a number of \d+ characters, more than 100"):
        read_yaml(tmp_path / "r.yaml")
