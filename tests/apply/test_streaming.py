"""``--stream``: checkpoints larger than the free space, by the real command line from a server on the loopback."""

from __future__ import annotations

import json
import multiprocessing.forkserver
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from normconvert.apply.shard_stream import SPARE
from normconvert.plan.rotations import rotated
from tests.support import forked_client
from tests.support.basis_models import built
from tests.support.hub_server import Hub, Repository, serve
from tests.support.tiny_checkpoints import contents, gpt2, save, save_with_head

COMMIT = "c" * 40
FORKS = multiprocessing.get_context("forkserver")
Plain = Callable[..., dict[str, bytes]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(gpt2(), tmp_path_factory.mktemp("hub") / "sharded", "sharded")
    (folder / "LICENSE").write_text("free")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    bad = shutil.copytree(folder, tmp_path_factory.mktemp("hub") / "bad")
    spoil(bad)
    pickled = save(gpt2(), tmp_path_factory.mktemp("hub") / "pickled", "bin")
    repositories = {f"org{i}/sharded": Repository(folder, {"main": COMMIT}) for i in range(30)}
    repositories |= {
        "org/bad": Repository(bad),
        "org/pickled": Repository(pickled),
        "org/whole": Repository(folder, ranges=False),
        "org/apart": Repository(save_with_head(tmp_path_factory.mktemp("hub") / "apart")),
        "org/olmo": Repository(save(built("olmo"), tmp_path_factory.mktemp("hub") / "olmo", "sharded")),
    }
    with serve(repositories) as hub:
        yield hub


@pytest.fixture(scope="module")
def home(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The hub's cache of all runs, and the process that they are forked from."""
    home = tmp_path_factory.mktemp("home")
    before = dict(os.environ)
    os.environ |= {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "NORMCONVERT_TEST_WARM": "1",
    }
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"):
        os.environ.pop(name, None)
    FORKS.set_forkserver_preload(["tests.support.forked_client"])
    multiprocessing.forkserver.ensure_running()
    os.environ.clear()
    os.environ |= before
    yield home
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.fixture
def hub(server: Hub) -> Iterator[Hub]:
    server.requests.clear()
    yield server
    server.before = lambda request: None


FRESH = iter(range(30))


@pytest.fixture
def name() -> str:
    """A repository that no run has asked for yet, so that nothing of it is in the cache."""
    return f"org{next(FRESH)}/sharded"


def spoil(folder: Path) -> None:
    """Put a NaN into the last shard."""
    from safetensors.torch import load_file, save_file

    last = max(folder.glob("*.safetensors"))
    state = load_file(last)
    next(iter(state.values())).view(-1)[0] = torch.nan
    save_file(state, last, metadata={"format": "pt"})


def start(output: Path, *arguments: str, method: str = "rmsnorm") -> multiprocessing.context.ForkServerProcess:
    child = FORKS.Process(target=forked_client.main, args=([method, *arguments], output))
    child.start()
    return child


def run(home: Path, *arguments: str, status: int = 0, method: str = "rmsnorm") -> tuple[str, str]:
    output = home / "log"
    child = start(output, *arguments, method=method)
    child.join(300)
    out, err = (output.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
    assert child.exitcode == status, err
    return out, err


@pytest.fixture(scope="module")
def plain(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, bytes]]:
    """What a conversion without ``--stream`` writes, by its options."""
    made: dict[tuple[str, ...], dict[str, bytes]] = {}

    def convert(*options: str) -> dict[str, bytes]:
        if options not in made:
            out = tmp_path_factory.mktemp("plain") / "out"
            run(home, "org29/sharded", str(out), "--no-verify", *options)
            made[options] = written(out, "org29/sharded")
        return made[options]

    return convert


def written(out: Path, name: str) -> dict[str, bytes]:
    """The files of an output, with the repository's name left out."""
    return {
        file: data if "tensors" in file else data.replace(name.encode(), b"REPO")
        for file, data in contents(out).items()
    }


def downloads(hub: Hub) -> list[str]:
    """The shards that were fetched whole."""
    return re.findall(r"GET /\S+/(\S+\.safetensors)(?:\n|$)", "\n".join(hub.requests))


def test_a_streamed_conversion_is_the_same_and_deletes_what_it_fetched(
    hub: Hub, name: str, home: Path, folder: Path, tmp_path: Path, plain: Plain
) -> None:
    shards = sorted(p.name for p in folder.glob("*.safetensors"))
    expected = plain("--tied", "untie")
    held: list[int] = []

    def watch(request: str) -> None:
        if request.startswith("GET") and request.endswith(".safetensors"):
            fetched = tmp_path.glob(".out.stream/source/.cache/**/*.safetensors")
            held.append(sum(p.stat().st_blocks * 512 for p in fetched))

    hub.requests.clear()
    hub.before = watch
    run(home, name, str(tmp_path / "out"), "--stream", "--no-verify", "--tied", "untie")
    assert sorted(downloads(hub)) == shards
    assert held == [0] * len(shards)  # when a shard is asked for, no other is there
    assert not list(home.glob(f"hub/models--{name.replace('/', '--')}/**/*.safetensors"))
    assert written(tmp_path / "out", name) == expected
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_shards_in_the_cache_are_used_and_stay(
    hub: Hub, name: str, home: Path, folder: Path, tmp_path: Path, plain: Plain
) -> None:
    run(home, name, str(tmp_path / "first"), "--no-verify")
    cached = home / "hub" / f"models--{name.replace('/', '--')}"
    before = contents(cached)
    hub.requests.clear()
    out, _ = run(home, name, str(tmp_path / "out"), "--stream")
    assert downloads(hub) == []
    assert contents(cached) == before
    assert "algebra" in out  # there was room: it is verified
    shards = sorted(cached.glob("snapshots/*/*.safetensors"))
    for shard in shards[1:4]:
        shard.resolve().unlink()
        shard.unlink()
    before = contents(cached)
    out, _ = run(home, name, str(tmp_path / "out"), "--stream", "--overwrite")
    assert downloads(hub) == [shard.name for shard in shards[1:4]]
    assert contents(cached) == before
    assert "algebra" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "out"]
    made = contents(tmp_path / "out")
    assert json.loads(made["normconvert.json"])["verification"]["passed"] is True
    assert {n: d for n, d in made.items() if n.endswith(".safetensors")} == {
        n: d for n, d in plain().items() if n.endswith(".safetensors")
    }


def test_look_ups_across_shards_are_range_requests(
    hub: Hub, name: str, home: Path, tmp_path: Path, plain: Plain
) -> None:
    """``--fold`` multiplies weights by vectors of other shards, and the untied copy takes its value from another."""
    options = ("--fold", "--tied", "untie", "--dtype", "bfloat16", "--max-shard-size", "90KB")
    expected = plain(*options)
    hub.requests.clear()
    run(home, name, str(tmp_path / "out"), "--stream", "--no-verify", *options)
    assert len(downloads(hub)) == len(set(downloads(hub)))
    ranges = [request for request in hub.requests if "bytes=" in request and "bytes=0-" not in request]
    assert ranges
    assert written(tmp_path / "out", name) == expected


def test_a_head_and_its_table_are_fetched_before_they_are_compared(hub: Hub, home: Path, tmp_path: Path) -> None:
    """In place of what is not here yet there are zeros, which are equal."""
    run(home, "org/apart", str(tmp_path / "out"), "--stream", "--no-verify", method="crmsnorm")
    run(home, "org/apart", str(tmp_path / "whole"), "--no-verify", method="crmsnorm")
    tensors = [contents(tmp_path / name)["model.safetensors"] for name in ("out", "whole")]
    assert tensors[0] == tensors[1]


def stop_at(hub: Hub, count: int, act: Callable[[], None], wait: float = 0) -> None:
    """Do something when shard number ``count`` is asked for, and do not answer."""
    seen: list[str] = []

    def before(request: str) -> None:
        if request.startswith("GET") and request.endswith(".safetensors"):
            seen.append(request)
            if len(seen) == count:
                act()
                time.sleep(wait)
                raise ConnectionAbortedError

    hub.before = before


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_it_goes_on_where_it_was_stopped(
    hub: Hub, name: str, home: Path, folder: Path, tmp_path: Path, plain: Plain, number: signal.Signals
) -> None:
    expected = plain()
    hub.requests.clear()
    out = tmp_path / "deep" / "out"
    asked = threading.Event()
    stop_at(hub, 3, asked.set, wait=2)
    child = start(home / "log", name, str(out), "--stream", "--no-verify")
    assert asked.wait(120)
    assert child.pid is not None
    os.kill(child.pid, number)
    child.join(60)
    errors = (home / "log.err").read_text()
    assert child.exitcode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number], errors
    if number != signal.SIGKILL:
        assert re.search(
            r"interrupted; nothing was written; 2 shards done and kept in \S+/\.out\.stream: the same", errors
        )
    assert [p.name for p in out.parent.iterdir()] == [".out.stream"]
    first = downloads(hub)[:2]
    hub.requests.clear()
    hub.before = lambda request: None
    run(home, name, str(out), "--stream", "--no-verify")
    assert sorted([*first, *downloads(hub)]) == sorted(p.name for p in folder.glob("*.safetensors"))
    assert written(out, name) == expected
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.slow
def test_another_conversion_does_not_go_on_there(hub: Hub, name: str, home: Path, tmp_path: Path, plain: Plain) -> None:
    expected = plain("--dtype", "bfloat16")
    hub.refused = {"model-00003-of-00006.safetensors"}
    out = tmp_path / "out"
    _, errors = run(home, name, str(out), "--stream", "--no-verify", status=2)
    assert errors.splitlines()[-1].startswith("error: ")
    assert "2 shards done and kept" in errors.splitlines()[-1]
    hub.refused = set()
    run(home, name, str(out), "--stream", "--no-verify", "--dtype", "bfloat16")
    assert written(out, name) == expected


def test_a_conversion_that_runs_is_not_disturbed(hub: Hub, name: str, home: Path, tmp_path: Path, plain: Plain) -> None:
    expected = plain()
    asked, seen = threading.Event(), threading.Event()

    def before(request: str) -> None:
        if request.startswith("GET") and request.endswith(".safetensors"):
            asked.set()
            seen.wait(60)

    hub.before = before
    child = start(home / "first", name, str(tmp_path / "out"), "--stream", "--no-verify")
    assert asked.wait(60)
    _, errors = run(home, name, str(tmp_path / "out"), "--stream", "--no-verify", status=2)
    assert "another process is making it" in errors
    seen.set()
    child.join(60)
    assert child.exitcode == 0
    assert written(tmp_path / "out", name) == expected


def test_a_damaged_download_is_noticed_and_fetched_again(
    hub: Hub, name: str, home: Path, folder: Path, tmp_path: Path, plain: Plain
) -> None:
    expected = plain()
    file = sorted(folder.glob("*.safetensors"))[1]
    good = file.read_bytes()
    hub.damaged = {file.name: good[:-1] + bytes([good[-1] ^ 1])}
    _, errors = run(home, name, str(tmp_path / "out"), "--stream", "--no-verify", status=2)
    assert f"{file.name}: damaged: its sha256 is" in errors.splitlines()[-1]
    assert "1 shard done and kept" in errors.splitlines()[-1]
    hub.damaged = {}
    run(home, name, str(tmp_path / "out"), "--stream", "--no-verify")
    assert written(tmp_path / "out", name) == expected


def test_what_cannot_be_streamed_is_refused_and_leaves_nothing(
    hub: Hub, home: Path, folder: Path, tmp_path: Path
) -> None:
    expected = {
        str(folder): "this one is here",
        "demo:gpt2": "this one is here",
        "org/pickled": "no safetensors files on the hub",
        "org/whole": "does not answer range requests",
        "org/none": "no such model",
        "org/bad": "NaN or infinite",
    }
    for reference, words in expected.items():
        _, errors = run(home, reference, str(tmp_path / "x" / "out"), "--stream", status=2)
        assert words in errors
        assert [line for line in errors.splitlines() if line.startswith("error: ")] == errors.splitlines()[-1:]
        assert not (tmp_path / "x").exists()


def test_a_dry_run_fetches_no_shard(hub: Hub, name: str, home: Path, tmp_path: Path) -> None:
    out, _ = run(home, name, str(tmp_path / "out"), "--stream", "--dry-run")
    assert "nothing was written" in out
    assert downloads(hub) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_disk_without_room_for_both_holds_the_output_and_one_shard(
    hub: Hub, name: str, home: Path, folder: Path, tmp_path: Path
) -> None:
    """Room for the output, one shard and what must stay free, but not for all shards; then not even for that."""
    total = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    for number, room in enumerate((SPARE + total + total // 2, SPARE + total // 2)):
        disk = tmp_path / f"disk{number}"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={room + 40_000}", "tmpfs", str(disk)]
        if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("a tiny disk needs the right to mount")
        try:
            if number == 0:
                out, _ = run(home, name, str(disk / "out"), "--stream")
                assert "not verified: the disk has no room" in " ".join(out.split())
            else:
                _, errors = run(home, name, str(disk / "out"), "--stream", status=2)
                assert "GB more must be free on the disk" in errors
                assert list(disk.iterdir()) == []
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize(
    "method", ["rotate", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fold", "scale", "native"))]
)
def test_every_change_of_basis_is_streamed_and_verified(
    hub: Hub, name: str, home: Path, tmp_path: Path, method: str
) -> None:
    """The same files as from a folder, with the verdict on them."""
    torch.save(rotated(torch.eye(48, dtype=torch.float64), 0, "random", 5, True), tmp_path / "Q.pt")
    options = {
        "fold": [],
        "scale": ["--power", "3"],
        "rotate": ["--rotation", str(tmp_path / "Q.pt"), "--values", "--max-shard-size", "90KB"],
        "native": ["--native"],
    }[method]
    name, command = ("org/olmo", "rmsnorm") if method == "native" else (name, method)
    out, _ = run(home, name, str(tmp_path / "out"), "--stream", "--verify", "quick", *options, method=command)
    assert "algebra" in out
    run(home, name, str(tmp_path / "whole"), "--no-verify", *options, method=command)
    made, whole = (written(tmp_path / folder, name) for folder in ("out", "whole"))
    assert made.keys() == whole.keys()
    assert {n for n in made if made[n] != whole[n]} <= {"normconvert.json", "README.md"}
    assert json.loads(made["normconvert.json"])["verification"]["passed"] is True
