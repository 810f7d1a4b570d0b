"""timm loads some models leniently; here what no file holds is an error."""

from __future__ import annotations

import threading

import pytest
from torch import nn

from normconvert.sources.timm_models import _nothing_missing


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 2)))


def test_a_lenient_load_of_a_model_made_within_misses_nothing() -> None:
    full = make().state_dict()
    lacking = {name: value for name, value in full.items() if name != "1.0.bias"}
    with _nothing_missing():
        within = make()
        within.load_state_dict(full, strict=False)
        with pytest.raises(RuntimeError, match=r"tensors 1\.0\.bias are missing"):
            within.load_state_dict(lacking, strict=False)
        with pytest.raises(RuntimeError, match=r"tensors 1\.0\.bias are missing"):
            make().load_state_dict({**lacking, "other": full["0.bias"]}, strict=False)
    within.load_state_dict(lacking, strict=False)
    make().load_state_dict(lacking, strict=False)


def test_models_of_other_threads_load_as_they_like() -> None:
    failures: list[BaseException] = []

    def load() -> None:
        try:
            make().load_state_dict({}, strict=False)
        except RuntimeError as error:
            failures.append(error)

    with _nothing_missing():
        thread = threading.Thread(target=load)
        thread.start()
        thread.join()
    assert not failures
