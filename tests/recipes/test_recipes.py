"""Recipes before anything runs: what a file may say, what it means, and where its errors are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from normconvert import options
from normconvert.api import convert
from normconvert.cli import run
from normconvert.errors import InputError
from normconvert.recipes.expansion import expand
from normconvert.recipes.job import Job, Resources, Upload, worst
from normconvert.recipes.model import json_schema
from normconvert.recipes.reading import read_recipe
from normconvert.sources import hub

RECIPES = Path(__file__).parents[2] / "recipes"
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a recipe into the working directory."""
    monkeypatch.chdir(tmp_path)

    def make(text: str, name: str = "r.yaml") -> Path:
        Path(name).write_text(text)
        return Path(name)

    return make


def jobs_of(*paths: Path, **environment: str) -> list[Job]:
    return expand([read_recipe(path, environment) for path in paths])


def refusal(*paths: Path, **environment: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        jobs_of(*paths, **environment)
    return str(caught.value).splitlines()


def checkpoint(folder: Path, **config: Any) -> Path:
    """What looks like a checkpoint to those who do not read weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **config}))
    (folder / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    return folder


# What a recipe means


def test_a_list_of_sources_is_one_job_each_with_every_setting_filled_in(write: Write) -> None:
    first, second = jobs_of(write("sources: [demo:gpt2, demo:vit]\n"))
    assert (first.source, first.name, first.variant, first.method) == ("demo:gpt2", "gpt2", "rmsnorm", "rmsnorm")
    assert first.options == {f.name: f.default for f in fields(options.Options)}
    assert (first.dtype, first.verify, first.upload, first.where) == ("auto", True, None, "r.yaml:1:11")
    assert Path(first.output) == Path("out/gpt2-rmsnorm").absolute()
    assert (second.name, second.where) == ("vit", "r.yaml:1:22")
    assert first.size == Path(options.__file__).parent.joinpath("demos/gpt2/model.safetensors").stat().st_size


def test_the_more_specific_setting_wins_key_by_key(write: Write) -> None:
    path = write(
        """
defaults:
  options: {min_gain: 2, fold: true}
  dtype: float16
  limits: {rounding: 1.5, kl: 1e-6}
matrix:
  - rmsnorm
  - {name: half, dtype: bfloat16, options: {min_gain: 5}}
sources:
  - demo:gpt2
  - {source: demo:vit, options: {min_gain: 1}, limits: {kl: 1e-3}, require_all: true}
"""
    )
    a, b, c, d = jobs_of(path)
    assert [job.label for job in (a, b, c, d)] == ["gpt2 rmsnorm", "gpt2 half", "vit rmsnorm", "vit half"]
    assert [job.options["min_gain"] for job in (a, b, c, d)] == [2, 5, 1, 1]
    assert all(job.options["fold"] for job in (a, b, c, d))
    assert [job.dtype for job in (a, b, c, d)] == ["float16", "bfloat16", "float16", "bfloat16"]
    assert [job.limits for job in (b, d)] == [{"rounding": 1.5, "kl": 1e-6}, {"rounding": 1.5, "kl": 1e-3}]
    assert [job.require_all for job in (a, c)] == [False, True]


def test_memory_is_estimated_from_the_weights_and_what_is_done_with_them(write: Write) -> None:
    from normconvert.files.safetensors_file import read_header

    folder = Path(options.__file__).parent / "demos/gpt2"
    elements = sum(
        info.shape[0] * (info.shape[1] if len(info.shape) > 1 else 1)
        for info in read_header(folder / "model.safetensors").tensors.values()
    )
    text = "sources: [demo:gpt2, {source: demo:gpt2, verify: false, output: b}, {source: demo:gpt2, output: c, %s}]"
    verified, trusted, said = jobs_of(write(text % "resources: {memory: 7GB}"))
    assert verified.resources.memory - trusted.resources.memory == 16 * elements - (trusted.size or 0)
    assert said.resources.memory == 7_000_000_000


def test_a_pattern_of_folders_takes_checkpoints_and_passes_over_outputs(write: Write, tmp_path: Path) -> None:
    for name in ("b", "a", "deep/c", "a-old"):
        checkpoint(tmp_path / "models" / name)
    (checkpoint(tmp_path / "models/done") / "normconvert.json").write_text("{}")
    (tmp_path / "models/notes.txt").write_text("")
    (job_a, job_b) = jobs_of(write("sources: [{folder: 'models/*', exclude: '*-old'}]"))
    assert [Path(job.source) for job in (job_a, job_b)] == [tmp_path / "models/a", tmp_path / "models/b"]
    everywhere = jobs_of(write("sources: [{folder: 'models/**', exclude: ['*-old', a]}]"))
    assert [job.name for job in everywhere] == ["b", "c"]
    (line,) = refusal(write("sources:\n  - folder: 'nothing/*'\n"))
    assert line.startswith("r.yaml:2:5: nothing/*: matches no folder with a checkpoint")


def test_variables_are_put_in_only_where_the_file_says_so(write: Write) -> None:
    path = write(
        """
sources: ["${MODEL}"]
output: $HOME/${WHERE:-here}/$${LITERAL}/{name}
defaults: {options: {min_gain: "${GAIN}"}}
""".replace("$${LITERAL}", "$${{LITERAL}}")
    )
    (job,) = jobs_of(path, MODEL="demo:vit", GAIN="4", HOME="/nobody", LITERAL="no")
    assert Path(job.output) == Path("$HOME/here/${LITERAL}/vit").absolute()
    assert job.options["min_gain"] == 4
    assert refusal(write("sources:\n  - demo:gpt2\n  - ${NOPE}/x\n")) == [
        "r.yaml:3:5: the environment has no variable NOPE: set it, or write ${NOPE:-default}"
    ]
    assert refusal(write("sources: ['${}']\n"))[0].startswith("r.yaml:1:11: '${}': expected ${NAME}")


@given(text=st.text(alphabet="ab{}$:- \\\"'", max_size=20))
def test_a_value_of_a_variable_is_never_looked_at_again(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    path.write_text("sources: [demo:gpt2]\ndescription: a ${X} b\n")
    assert read_recipe(path, {"X": text}).recipe.description == f"a {text} b"


def test_placeholders_name_the_output_and_nothing_else_is_evaluated(write: Write) -> None:
    (job,) = jobs_of(write("sources: [demo:gpt2]\noutput: x/{recipe}.{name}.{method}.{dtype}.{{a}}\n", "my.yaml"))
    assert job.output.endswith("/x/my.gpt2.rmsnorm.auto.{a}")
    for bad, words in (
        ("{nmae}", "unknown placeholder {nmae}; nearest: name"),
        ("{name.__class__}", "unknown placeholder {name.__class__}"),
        ("{name!r}", "unknown placeholder {name}"),
        ("{name", "expected '}'"),
    ):
        (line,) = refusal(write(f"sources: [demo:gpt2]\noutput: '{bad}'\n"))
        assert line.startswith("r.yaml:2:1: ")
        assert words in line


def test_uploads_are_off_until_the_recipe_turns_them_on(write: Write) -> None:
    named = "sources: [demo:gpt2]\ndefaults: {upload: {repo: 'me/{name}-x'%s}}\n"
    assert jobs_of(write(named % ""))[0].upload is None
    assert jobs_of(write(named % ", enabled: true"))[0].upload == Upload("me/gpt2-x", private=True)
    assert jobs_of(write(named % ", enabled: true, private: false"))[0].upload == Upload("me/gpt2-x", private=False)
    (line,) = refusal(write("sources: [demo:gpt2]\ndefaults: {upload: {enabled: true}}\n"))
    assert "without a repo" in line


def test_a_job_survives_being_sent_to_another_process() -> None:
    job = Job(
        "s", "n", "v", "o", "w", "rmsnorm", {"fold": True}, limits={"kl": 1.0}, resources=Resources(2, 1, 5),
        upload=Upload("a/b", False), size=3,
    )  # fmt: skip
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job


def test_every_option_of_the_package_is_one_of_recipes_and_one_that_convert_takes() -> None:
    names = {f.name for f in fields(options.Options)}
    assert names == set(json_schema()["$defs"]["Options"]["properties"])
    assert names <= set(signature(convert).parameters)
    assert set(options.METHODS) == set(json_schema()["$defs"]["Settings"]["properties"]["method"]["enum"])


def test_the_worst_exit_status_is_a_wrong_result_then_bad_input_then_nothing_to_do() -> None:
    assert [worst(s) for s in ([], [0, 0], [0, 3], [3, 2, 0], [2, 1, 3], [1, 130])] == [0, 0, 3, 2, 1, 130]


# Errors

ERRORS = [
    ("unknown key", "soures: [b]\nsources: [a]\n", "r.yaml:1:1: unknown key 'soures'; nearest: sources"),
    ("unknown key inside", "sources:\n  - source: a\n    opitons: {}\n",
     "r.yaml:3:5: unknown key 'opitons' in sources; nearest: options"),
    ("unknown option", "defaults:\n  options:\n    min_gian: 2\nsources: [a]\n",
     "r.yaml:3:5: unknown key 'min_gian' in options; nearest: min_gain"),
    ("unknown limit", "defaults: {limits: {roundin: 2}}\nsources: [a]\n",
     "r.yaml:1:21: unknown key 'roundin' in limits; nearest: rounding"),
    ("unknown method", "defaults: {method: rmsnrom}\nsources: [a]\n",
     "r.yaml:1:12: unknown method 'rmsnrom'; expected one of"),
    ("unknown method in a matrix", "matrix:\n  - rmsnorm\n  - layernorm\nsources: [a]\n",
     "r.yaml:3:5: unknown method 'layernorm'"),
    ("wrong type", "sources: [a]\ndefaults: {require_all: perhaps}\n",
     "r.yaml:2:12: require_all: expected a valid boolean, found 'perhaps'"),
    ("wrong choice", "sources: [a]\ndefaults: {dtype: float8}\n", "r.yaml:2:12: dtype: expected 'auto', 'float32'"),
    ("nothing for a value", "sources: [a]\ndefaults:\n  dtype:\n", "r.yaml:3:3: dtype: expected"),
    ("out of range", "sources: [a]\ndefaults: {options: {min_gain: 0}}\n", "min_gain is 0; expected 1 or more"),
    ("wider than allowed", "sources: [a]\ndefaults: {limits: {rounding: 4}}\n",
     "r.yaml:2:21: rounding: expected at most 3, found 4"),
    ("size", "sources: [a]\ndefaults: {max_shard_size: big}\n",
     "r.yaml:2:12: expected a size such as 5GB, 500MB or 2GiB, found 'big'"),
    ("no sources", "output: x\n", "r.yaml:1:1: sources is missing"),
    ("empty sources", "sources: []\n", "r.yaml:1:1: sources: "),
    ("two kinds of source", "sources:\n  - {source: a, folder: b}\n",
     "r.yaml:2:5: expected one of source, folder, author, found source and folder"),
    ("no kind of source", "sources:\n  - {method: rmsnorm}\n", "found none of them"),
    ("stray pattern", "sources:\n  - {source: a, models: b}\n", "models goes with author, found source"),
    ("limits on nothing", "sources:\n  - demo:gpt2\ndefaults: {verify: false, limits: {kl: 1}}\n",
     "r.yaml:2:5: limits are held against the verification"),
    ("source is a number", "sources: [12]\n", "r.yaml:1:11: "),
    ("not YAML", "sources: [a\n", "r.yaml:2:1: not valid YAML"),
    ("tab", "sources:\n\t- a\n", "r.yaml:2:1: not valid YAML"),
    ("twice the same key", "sources: [a]\noutput: b\noutput: c\n", "r.yaml:3:1: "),
    ("a list", "- a\n", "expected a recipe"),
    ("empty", "", "expected a recipe"),
    ("an object of Python", "sources: !!python/object/apply:os.system [ls]\n", "r.yaml:1:10: not valid YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), [row[1:] for row in ERRORS], ids=[row[0] for row in ERRORS])
def test_an_error_is_one_line_with_its_place(write: Write, text: str, words: str) -> None:
    (line,) = refusal(write(text))
    assert line.startswith("r.yaml:")
    assert words in line
    assert len(line) < 300


def test_all_errors_of_all_recipes_are_told_at_once_in_order(
    write: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write("sources: [a]\nouput: x\ndefaults:\n  dtpye: auto\n", "one.yaml")
    write("sources: []\n", "two.yaml")
    status = run(["run", "one.yaml", "two.yaml", "missing.yaml"])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    for words in ("one.yaml:2:1: unknown key 'ouput'", "one.yaml:4:3: unknown key 'dtpye'", "two.yaml:1:1", "missing"):
        assert words in err
    assert "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.yaml", "two.yaml"]


def test_missing_sources_are_listed_all_at_once_before_anything_runs(
    write: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    checkpoint(tmp_path / "bare")
    (tmp_path / "bare/model.safetensors").unlink()
    sources = "".join(f"  - {name}\n" for name in ("demo:gpt2", "./missing", "empty", "demo:gpt3", "bare", "a/b/c"))
    assert run(["run", str(write(f"sources:\n{sources}matrix: [rmsnorm, fuse-bn]\n"))]) == 2
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "error: 5 sources cannot be had; nothing was run:"
    places = [line.split(": ")[0].strip() for line in lines]
    assert places == [f"r.yaml:{n}:5" for n in (3, 4, 5, 6, 7)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare", "empty", "r.yaml"]


def test_outputs_that_clash_are_refused_with_both_places(write: Write, tmp_path: Path) -> None:
    checkpoint(tmp_path / "models/gpt2")
    (line,) = refusal(write("sources:\n  - demo:gpt2\n  - models/gpt2\n"))
    assert line.startswith("r.yaml:3:5: two jobs with one output out/gpt2-rmsnorm")
    assert "r.yaml:2:5" in line
    lines = refusal(write("sources: [demo:gpt2]\n", "a.yaml"), write("sources: [demo:gpt2]\n", "b.yaml"))
    assert lines[0].startswith("b.yaml:1:11: two jobs with one output")
    assert "a.yaml:1:11" in lines[0]
    (tmp_path / "link").symlink_to(tmp_path)
    same = "sources: [demo:gpt2, {source: demo:vit, output: '%s'}]\noutput: x/y\n"
    assert "two jobs with one output" in refusal(write(same % "link/x/y"))[0]
    assert "lies inside another" in refusal(write(same % "x/y/z"))[0]
    into = "sources: [{source: models/gpt2, output: '%s'}]\n"
    assert "would replace a source" in refusal(write(into % "models/gpt2"))[0]
    assert "would replace a source" in refusal(write(into % "models"))[0]
    assert "lies inside the source" in refusal(write(into % "models/gpt2/out"))[0]
    stores = "sources: [{source: demo:gpt2, output: 's3://b/%s'}, {source: demo:vit, output: 's3://b/x'}]\n"
    assert "two jobs with one output s3://b/x" in refusal(write(stores % "x/"))[0]
    assert "lies inside another" in refusal(write(stores % "x/y"))[0]


@pytest.mark.parametrize("where", ["/proc/nothing/{name}", "file.txt/{name}", "/dev/null/{name}/deep"])
def test_an_output_that_cannot_be_written_is_one_line_before_anything_runs(
    write: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path, where: str
) -> None:
    (tmp_path / "file.txt").write_text("x")
    path = write(f"sources: [demo:gpt2, {{source: demo:vit, output: good/here}}]\noutput: '{where}'\n")
    assert run(["run", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: r.yaml:1:11: the output cannot be written: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.txt", "r.yaml"]


# The schema and the recipes that come with the package


def test_the_schema_is_valid_and_agrees_with_the_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    assert '"null"' not in json.dumps(schema)
    for good in (
        {"sources": ["a", {"author": "x", "models": "y*", "exclude": ["z"]}]},
        {"sources": [{"source": "a", "limits": {"kl": 1e-3}, "max_shard_size": "5GB"}], "matrix": ["rmsnorm", {}]},
    ):
        validator.validate(good)
    refused: tuple[dict[str, Any], ...] = (
        {}, {"sources": []}, {"sources": [{"source": "a", "folder": "b"}]}, {"sources": [{}]},
        {"sources": ["a"], "defaults": {"options": {"min_gian": 1}}}, {"sources": ["a"], "matrix": ["nonsense"]},
        {"sources": ["a"], "defaults": {"limits": {"rounding": 4}}}, {"sources": ["a"], "defaults": {"dtype": None}},
    )  # fmt: skip
    for bad in refused:
        assert not validator.is_valid(bad), bad


def shipped() -> list[Path]:
    return sorted(RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.stem)
def test_a_recipe_that_is_shipped_is_valid_and_its_editor_finds_the_schema(path: Path) -> None:
    assert path.read_text().startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    data = yaml.safe_load(path.read_text())
    jsonschema.Draft202012Validator(json.loads((RECIPES / "recipe.schema.json").read_text())).validate(data)
    recipe = read_recipe(path, {}).recipe
    for source in recipe.sources:
        if source.source:
            assert source.source.startswith("demo:") or hub.HUB_ID.fullmatch(source.source)
            if source.source.startswith("timm/"):
                import timm

                assert source.source.removeprefix("timm/") in timm.list_pretrained()


def test_the_families_that_were_promised_are_shipped() -> None:
    names = {path.stem for path in shipped()}
    assert {"demo", "pythia", "opt", "bloom", "gpt2", "whisper", "timm-vit", "timm-convnets"} <= names
    assert read_recipe(RECIPES / "timm-convnets.yaml").recipe.defaults.method == "fuse-bn"


def test_the_reference_and_the_schema_are_those_of_the_models() -> None:
    tool = RECIPES.parent / "tools/docs/recipe_reference.py"
    done = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_schema_is_quick_and_imports_nothing_heavy() -> None:
    code = "import sys; from normconvert.cli import run; run(['schema']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "timm", "huggingface_hub"} & set(done.stderr.split())
