"""What every test shares: few threads, and no progress bars in the captured output."""

from __future__ import annotations

import gc
import os
import signal

# Before torch is imported, and inherited by subprocesses. The models are small, and pytest's workers share the cores.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch
import torch.utils._device
from hypothesis import HealthCheck, settings

# A shell starts background jobs with Ctrl-C ignored, and their children inherit that: the tests of Ctrl-C would wait.
signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# A busy machine is no failure; the same examples each time in CI, new ones at home.
settings.register_profile(
    "normconvert", deadline=None, derandomize=bool(os.environ.get("CI")), suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("normconvert")


def pytest_collection_finish() -> None:
    """What was imported stays: looking through it for cycles again and again takes a twentieth of the tests' time."""
    gc.freeze()
    gc.set_threshold(20_000)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test must not depend on those that ran before it."""
    torch.manual_seed(0)
    # accelerate replaces torch.empty and its kin for a while; torch remembers whatever it finds then, for ever
    vars(torch.utils._device)["_device_constructors"].cache_clear()
