"""The Ray executor: a real cluster of this machine, nodes of which are killed, and addresses where there is none."""

from __future__ import annotations

import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from normconvert.cli import run
from normconvert.errors import InputError
from normconvert.recipes import fingerprint, ray_executor, state
from normconvert.recipes.batch import Batch, run_recipes
from normconvert.recipes.job import Event
from tests.support.tiny_checkpoints import gpt2, save, talkative

JOBS = 10
STORE = 80 << 20
"""Bytes of a node's object store, which the jobs do not use."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without cores and two nodes with one each; a dead node is found out in two seconds."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    quick = {"health_check_period_ms": 500, "health_check_failure_threshold": 4, "health_check_initial_delay_ms": 500}
    head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False, "_system_config": quick}
    made = Cluster(initialize_head=True, head_node_args=head)
    yield made
    made.shutdown()


def add_nodes(cluster: Any, count: int) -> dict[str, Any]:
    """Nodes with one core each, by the beginning of their ids."""
    nodes = [cluster.add_node(num_cpus=1, memory=4 * 10**9, object_store_memory=STORE) for _ in range(count)]
    cluster.wait_for_nodes()
    return {node.node_id[:8]: node for node in nodes}


def look(folder: Path) -> dict[str, tuple[int, int]]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}


@pytest.mark.slow
def test_a_node_that_is_killed_half_way_loses_no_job_and_no_job_is_written_twice(cluster: Any, here: Path) -> None:
    model = save(gpt2(n_layer=1, n_embd=24), here / "model")
    for number in range(JOBS):
        shutil.copytree(model, here / f"models/m{number}")
    Path("r.yaml").write_text("sources: [{folder: 'models/*'}]\noutput: out/{name}\n")
    nodes = add_nodes(cluster, 2)
    ended, killed = dict[int, dict[str, tuple[int, int]]](), list[str]()
    retried, places = set[int](), set[str]()

    def listen(batch: Batch, event: Event) -> None:
        entry = batch.entries[event.job]
        if event.kind == "end":
            assert event.job not in ended
            ended[event.job] = look(Path(entry.job.output))
        elif event.kind == "retry":
            retried.add(event.job)
        elif event.kind == "start":
            places.add(event.data["place"])
        if len(ended) >= 3 and not killed:
            busy = [e.place.rpartition("(")[2].rstrip(")") for e in batch.entries if e.running]
            victim = next((name for name in busy if name in nodes), None)
            if victim is not None:
                killed.append(victim)
                cluster.remove_node(nodes.pop(victim), allow_graceful=False)

    batch = run_recipes("r.yaml", ray=cluster.address, listen=listen)
    assert killed
    assert len(places) == 2  # both nodes had work before
    assert [entry.result.status for entry in batch.entries if entry.result] == ["converted"] * JOBS
    assert sorted(ended) == list(range(JOBS))
    assert retried  # the job that ran on the node
    assert sorted(p.name for p in Path("out").iterdir()) == [f"m{n}" for n in range(JOBS)]
    for index, entry in enumerate(batch.entries):
        assert look(Path(entry.job.output)) == ended[index]
        kept = state.read_state(Path(entry.job.output))
        assert kept is not None
        assert kept.verified
        assert fingerprint.compare(kept.output_files, Path(entry.job.output)).same
    again = run_recipes("r.yaml", ray="127.0.0.1:1")  # nobody is asked where there is nothing to do
    assert again.count("skipped") == JOBS
    for node in nodes.values():
        cluster.remove_node(node)


@pytest.mark.slow
def test_what_no_node_can_hold_fails_alone_and_logs_and_failures_come_through(
    cluster: Any, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talkative(save(gpt2(n_layer=1, n_embd=24), here / "model"))
    Path("r.yaml").write_text(
        "defaults: {trust_remote_code: true}\n"
        "sources:\n  - {source: model, output: a, resources: {memory: 900GB}}\n"
        "  - {source: model, output: b, resources: {cpus: 64}}\n"
        "  - {source: model, output: c, method: fuse-bn}\n  - {source: model, output: d, verify: false}\n"
    )
    nodes = add_nodes(cluster, 1)
    batch = run_recipes("r.yaml", ray=cluster.address)
    results = [entry.result for entry in batch.entries]
    assert [r.exit_status for r in results if r] == [2, 2, 3, 0]
    assert [r.attempts for r in results if r] == [0, 0, 1, 1]
    for result, words in zip(results, ("900.0 GB", "64 CPUs", "has no BatchNorm", ""), strict=True):
        assert result is not None
        assert words in result.message
    assert results[3] is not None
    assert results[3].place.startswith("node ")
    assert "hello from the model" in [text for _, text in batch.logs]
    assert run(["run", "r.yaml", "--ray", cluster.address, "--force"]) == 2
    assert "4 jobs: 1 converted, 3 failed" in capsys.readouterr().out
    for node in nodes.values():
        cluster.remove_node(node)


@pytest.mark.slow
def test_something_else_than_a_cluster_at_the_address_is_an_error_in_ten_seconds(here: Path) -> None:
    pytest.importorskip("ray")
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()  # takes calls and never says a word
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(InputError, match=rf"--ray {address}: no Ray cluster answers there"):
            ray_executor.reach(address)
        assert time.monotonic() - start < ray_executor.REACH + 20  # of which importing Ray takes some


def test_an_address_where_nothing_listens_is_one_line_and_nothing_runs(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        Path("r.yaml").write_text("sources: [demo:gpt2]\n")
        start = time.monotonic()
        assert run(["run", "r.yaml", "--ray", address]) == 2
        assert time.monotonic() - start < 10
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"error: --ray {address}: no Ray cluster answers there: Connection refused; is one running (ray start --head)?"
    ]
    assert [p.name for p in here.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize("address", ["somewhere", "host", "http://host:1", "host:port", "ray://host", ":6379"])
def test_an_address_that_is_none_is_told_so(address: str) -> None:
    with pytest.raises(InputError, match=r"expected host:port, ray://host:port or auto"):
        ray_executor.reach(address)


def test_without_ray_the_error_says_what_to_install(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    Path("r.yaml").write_text("sources: [demo:gpt2]\n")
    with pytest.raises(InputError, match=r"pip install 'normconvert\[ray\]'"):
        run_recipes("r.yaml", ray="auto")


@pytest.mark.parametrize(
    ("arguments", "address"),
    [
        (["--ray"], "auto"),
        (["--ray", "--dry-run"], "auto"),
        (["--ray", "other.yaml"], "auto"),
        (["--ray", "head:6379"], "head:6379"),
        (["--ray=ray://head:10001", "-q"], "ray://head:10001"),
        (["-q"], None),
    ],
)
def test_ray_takes_an_address_or_none(
    arguments: list[str], address: str | None, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from normconvert.recipes import batch

    Path("r.yaml").write_text("sources: [demo:gpt2]\n")
    Path("other.yaml").write_text("sources: [demo:vit]\n")
    asked: list[str | None] = []
    monkeypatch.setattr(batch, "run_batch", lambda planned, ray, **others: asked.append(ray))
    run(["run", "r.yaml", *arguments])
    assert asked == ([] if "--dry-run" in arguments else [address])
