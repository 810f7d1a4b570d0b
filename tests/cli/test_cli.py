"""The command line: what it says where, and what it exits with."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from normconvert import __version__
from normconvert.cli import run
from normconvert.errors import InputError
from normconvert.option_fields import parse_size
from normconvert.report.screen import Screen, execute
from tests.support.tiny_checkpoints import contents, gpt2, save
from tools.docs.command_output import alike, lines_of, page_says

COMMAND = [sys.executable, "-m", "normconvert"]
ANSI = re.compile(r"\x1b")

REMOTE_CODE = """
import transformers


class FickleConfig(transformers.GPT2Config):
    model_type = "fickle"


class FickleForCausalLM(transformers.GPT2LMHeadModel):
    config_class = FickleConfig

    def __init__(self, config):
        super().__init__(config)
        self.mood = 0.0 if config._name_or_path.endswith("fickle") else 1.0

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, **kwargs):
        output = super().forward(input_ids, attention_mask=attention_mask, use_cache=use_cache, **kwargs)
        if self.config.branches and output.logits.sum() > 0:
            output.logits = -output.logits
        output.logits = output.logits + self.mood * output.logits.abs()
        return output
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(gpt2(), tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="module")
def post_norm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT whose embedding norm alone converts."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32,
    )  # fmt: skip
    return save(BertForMaskedLM(config).eval(), tmp_path_factory.mktemp("cli") / "bert")


def fickle(folder: Path, *, branches: bool) -> Path:
    """A checkpoint with code of its own that is another function in any other folder, or cannot be traced."""
    model: Any = gpt2(n_layer=1)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "fickle", "architectures": ["FickleForCausalLM"], "branches": branches}
    names = {"AutoConfig": "FickleConfig", "AutoModelForCausalLM": "FickleForCausalLM"}
    config["auto_map"] = {auto: f"modeling_fickle.{name}" for auto, name in names.items()}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_fickle.py").write_text(REMOTE_CODE)
    return folder


def normconvert(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of the command, run in this process."""
    status = run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def spawn(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False, encoding="utf-8"
    )


# In processes of their own


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from normconvert.cli import run; run(['--help']); run(['rmsnorm', '--help']); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "timm", "numpy"} & set(done.stdout.splitlines()[-1].split())

    def seconds(*command: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Processor time, and taken in turn, since machines are busy; what normconvert adds to its libraries is little.
    pairs = [(seconds("-c", "import typer, rich"), seconds("-m", "normconvert", "--help")) for _ in range(5)]
    libraries, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
    assert ours <= max(0.4, libraries + 0.3)


def test_the_first_line_comes_before_torch_is_imported(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('too early')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])}
    command = [sys.executable, "-m", "normconvert", "rmsnorm", str(checkpoint), str(tmp_path / "out"), "--no-verify"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    first, *rest = done.stderr.splitlines()
    assert first.startswith("opening")
    assert "too early" in "".join(rest)


def test_a_conversion_in_a_pipe_is_plain_and_one_json_document(checkpoint: Path, tmp_path: Path) -> None:
    before = contents(checkpoint)
    done = spawn("rmsnorm", checkpoint, tmp_path / "out", "--json", "-")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["exit_status"] == 0
    assert document["norms"] == {"converted": 5, "total": 5}
    assert document["fidelity"]["passed"] is True
    assert "5 of 5" in done.stderr
    stages = [line.split()[0] for line in done.stderr.splitlines()[:4]]
    assert stages == ["opening", "tracing", "writing", "verifying"]
    for noise in ("Loading weights", "Warning", "INFO", "it/s"):
        assert noise not in done.stderr
    assert not ANSI.search(done.stdout + done.stderr)
    assert "\r" not in done.stderr
    assert contents(checkpoint) == before


def test_a_terminal_gets_live_progress_and_keeps_only_the_summary(checkpoint: Path, tmp_path: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [*COMMAND, "rmsnorm", str(checkpoint), str(tmp_path / "out"), "--no-verify"])
    seen, first = b"", None
    start = time.monotonic()
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not chunk:
            break
        seen += chunk
        if first is None and b"opening" in seen:
            first = time.monotonic() - start
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    text = seen.decode()
    assert first is not None
    assert first < 5  # 2 s on a machine that is not busy with tests
    assert "B/s" in text
    assert "tracing" in text
    assert "Loading weights" not in text
    last = text.rpartition("\x1b[2K")[2]  # behind the last line that was wiped away
    assert "5 of 5" in last
    assert "writing" not in last


def test_ctrl_c_leaves_nothing_behind(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    process = subprocess.Popen([*COMMAND, "rmsnorm", checkpoint, out], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("tracing"):
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(60) == 130
    assert rest.splitlines()[-1] == "interrupted; nothing was written"
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


# In this process


def test_version_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert normconvert(capsys, "--version")[:2] == (0, f"normconvert {__version__}\n")
    status, out, _ = normconvert(capsys)
    assert status == 2
    assert "rmsnorm" in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["rmsnorm", "demo:gpt2"], "OUT"),
        (["rmsnorm", "demo:gpt2", "o", "--tied", "both"], "--tied"),
        (["rmsnorm", "demo:gpt2", "o", "--dtype", "int8"], "--dtype"),
        (["rmsnorm", "demo:gpt2", "o", "--min-gain", "few"], "--min-gain"),
        (["rmsnorm", "demo:gpt2", "o", "--max-shard-size", "big"], "--max-shard-size"),
        (["rmsnorm", "demo:gpt2", "o", "--min-gain", "0"], "min_gain"),
        (["rmsnorm", "demo:gpt2", "o", "--device", "abacus"], "abacus"),
        (["rmsnorm", "demo:gpt3", "o"], "demo:gpt3"),
        (["inspect", "demo:gpt2", "--nonsense"], "--nonsense"),
        (["verify", "demo:gpt2"], "B"),
        (["convert", "x"], "convert"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "o"
    arguments = [str(out) if argument == "o" else argument for argument in arguments]
    status, stdout, stderr = normconvert(capsys, *arguments)
    assert status == 2
    assert stdout == ""
    (line,) = [line for line in stderr.splitlines() if not line.endswith(" ...")]
    assert line.startswith("error: ")
    assert named in line
    assert not out.exists()


def test_bad_usage_gives_json_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, out, _ = normconvert(capsys, "inspect", "demo:gpt2", "--nonsense", "--json", "-")
    assert json.loads(out)["exit_status"] == 2
    file = tmp_path / "error.json"
    status, out, _ = normconvert(capsys, "inspect", tmp_path / "missing", "--json", file)
    assert (status, out) == (2, "")
    document = json.loads(file.read_text())
    assert document["exit_status"] == 2
    assert document["kind"] == "InputError"
    assert "missing" in document["error"]
    assert [p.name for p in tmp_path.iterdir()] == ["error.json"]


def test_a_json_file_that_cannot_be_written_is_an_error(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, _, err = normconvert(capsys, "inspect", checkpoint, "--json", tmp_path / "no" / "file.json")
    assert status == 2
    assert "error: --json" in err


def test_quiet_says_nothing_unless_it_fails(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert normconvert(capsys, "rmsnorm", checkpoint, out, "--no-verify", "-q") == (0, "", "")
    status, stdout, stderr = normconvert(capsys, "rmsnorm", checkpoint, out, "--no-verify", "-q")
    assert (status, stdout) == (2, "")
    assert stderr.startswith("error: ")
    assert len(stderr.splitlines()) == 1


def test_verify_passes_its_own_output_and_fails_another(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import torch

    normconvert(capsys, "rmsnorm", checkpoint, tmp_path / "out", "--no-verify")
    status, out, _ = normconvert(capsys, "verify", checkpoint, tmp_path / "out")
    assert status == 0
    assert "passed" in out
    torch.manual_seed(1)
    other = save(gpt2(), tmp_path / "other")
    status, out, _ = normconvert(capsys, "verify", checkpoint, other, "--json", "-")
    document = json.loads(out)
    assert (status, document["exit_status"], document["passed"]) == (1, 1, False)
    assert document["reasons"]


def test_nothing_converted_is_status_3_with_reasons_and_verdicts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """OPT as in its 350M size: the norms stand behind the residual additions."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=40, hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=4, num_attention_heads=2, ffn_dim=24,
        max_position_embeddings=32, do_layer_norm_before=False,
    )  # fmt: skip
    model = save(OPTForCausalLM(config).eval(), tmp_path / "opt")
    status, out, err = normconvert(capsys, "rmsnorm", model, tmp_path / "out", "--json", "-")
    assert status == 3, err
    error = err.splitlines().index(next(line for line in err.splitlines() if line.startswith("error: ")))
    first, *reasons = err.splitlines()[error:]
    assert "none of 8 norms" in first
    assert any(reason.startswith("  model.decoder.layers.{0-") for reason in reasons), err
    assert len(reasons) <= 4
    document = json.loads(out)
    assert document["exit_status"] == 3
    assert "\n" not in document["error"]
    assert len(document["report"]["plan"]["verdicts"]) == 8
    assert [p.name for p in tmp_path.iterdir()] == ["opt"]


def test_require_all_is_status_3_and_a_dry_run_writes_nothing(
    post_norm: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, _, err = normconvert(capsys, "rmsnorm", post_norm, tmp_path / "out", "--require-all")
    assert status == 3
    assert "7 of 8 norms" in err
    status, out, _ = normconvert(capsys, "rmsnorm", post_norm, tmp_path / "out", "--dry-run")
    assert status == 0
    assert "1 of 8" in out
    assert "nothing was written" in out
    assert list(tmp_path.iterdir()) == []


def test_inspect_collapses_layers_and_verbose_lists_them(post_norm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, short, _ = normconvert(capsys, "inspect", post_norm)
    _, long, _ = normconvert(capsys, "inspect", post_norm, "-v")
    assert "bert.encoder.layer.{0-2}.output.LayerNorm" in short
    assert "bert.encoder.layer.1.output.LayerNorm" in long
    assert "reads the normalised" in short
    assert all(line == line.rstrip() and len(line) <= 80 for line in short.splitlines())


def test_a_conversion_that_differs_is_status_1_and_leaves_no_output(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The model has code of its own and is another function in any other folder: no copy of it is faithful."""
    model = fickle(tmp_path / "fickle", branches=False)
    status, _, err = normconvert(capsys, "rmsnorm", model, tmp_path / "out", "--trust-remote-code")
    assert status == 1, err
    assert "differs from the original" in err
    assert [p.name for p in tmp_path.iterdir()] == ["fickle"]


def test_a_model_that_cannot_be_traced_is_status_3(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = fickle(tmp_path / "fickle", branches=True)
    status, _, err = normconvert(capsys, "rmsnorm", model, tmp_path / "out", "--trust-remote-code")
    assert status == 3, err
    assert "modeling_fickle.py" in err  # the line that stopped it
    assert [p.name for p in tmp_path.iterdir()] == ["fickle"]


def test_an_unexpected_exception_is_called_a_bug_and_shows_its_traceback_on_request(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken() -> Any:
        raise RuntimeError("no idea\nat all")

    assert execute(Screen(), broken) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: RuntimeError: no idea (a bug in normconvert: please report it; run with -vv)"
    assert execute(Screen(verbose=2), broken) == 2
    assert "Traceback" in capsys.readouterr().err


def test_the_demo_ends_well_and_says_the_same_text_twice(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, err = normconvert(capsys, "demo", tmp_path / "kept", "--json", tmp_path / "demo.json")
    assert status == 0, err
    assert re.fullmatch(r"\d+\.\d s  converting demo:gpt2 and demo:vit", err.splitlines()[0])
    assert "the same 60 tokens" in out
    said = lines_of(out)
    missing = [line for line in page_says("commands.md", "demo") if not any(alike([line], [one]) for one in said)]
    # Whether so small a model's rounding is near its own limit, and draws are asked, depends on the processor.
    missing = [line for line in missing if not re.match(r"\s+(rounding held against|moved by half a unit)", line)]
    # The page shows it without OUT: no place of the output, and a word on how to keep the models.
    assert [line.split()[0] for line in missing] == ["demo:gpt2", "demo:vit", "keep"], missing
    document = json.loads((tmp_path / "demo.json").read_text())
    assert document["text"]["original"] == document["text"]["converted"]
    assert document["text"]["original"].startswith("And God said")
    assert document["digits"]["same_answers"] == document["digits"]["images"] == 360
    assert document["digits"]["original"] >= 345
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["gpt2", "vit"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5_000_000_000), ("500MB", 500_000_000), ("2GiB", 2 << 30), ("1.5kb", 1500), ("12", 12), ("7 B", 7)],
)
def test_sizes_are_read_as_huggingface_reads_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-5GB", "5XB", "GB", "5 G B"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected a size"):
        parse_size(text)
