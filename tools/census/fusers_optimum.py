"""What optimum's fx transformations fuse in the models of the coverage sweep, merged into its work file.

They need an older transformers (the fx tracer left it with version 5), so this runs in an environment of its own::

    python -m venv optimum-env
    optimum-env/bin/pip install optimum==1.24.0 transformers==4.49.0 torch timm
    optimum-env/bin/python tools/census/fusers_optimum.py build/coverage-fuse-bn.jsonl

For every model of the work file that has BatchNorms and no answer yet, a line with the answer is added. Models of
transformers are built from the configuration that the sweep wrote down and traced with ``transformers.utils.fx``,
those of timm with ``torch.fx``; each is traced with the other if that fails.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.census.fusers import norms_called  # noqa: E402

Row = dict[str, Any]


def main(work: Path) -> int:
    """Add ``others["optimum.fx"]`` to every row that lacks it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = {(row["library"], row["name"]): row for row in _lines(work)}
    with work.open("a") as file:
        for row in rows.values():
            if "others" in row and "optimum.fx" not in row["others"]:
                row["others"]["optimum.fx"] = _answer(row)
                print(row["name"], str(row["others"]["optimum.fx"])[:150], flush=True)
                file.write(json.dumps(row) + "\n")
                file.flush()
    return 0


def _lines(work: Path) -> Iterator[Row]:
    for line in work.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # a torn last line
            continue


def _answer(row: Row) -> Row:
    try:
        model = (_from_transformers if row["library"] == "transformers" else _from_timm)(row).eval()
    except Exception as error:
        return {"failure": f"not built: {_said(error)}"}
    failure = ""
    for tracer in _tracers(row):
        try:
            traced = tracer(model)
            before = norms_called(traced)
            return {"fused": sorted(before - norms_called(_fused(traced)))}
        except Exception as error:  # whatever the tracer raises is what it has to say
            failure = failure or _said(error)
    return {"failure": failure}


def _tracers(row: Row) -> list[Callable[[nn.Module], torch.fx.GraphModule]]:
    from transformers.utils.fx import symbolic_trace

    def with_transformers(model: nn.Module) -> torch.fx.GraphModule:
        return symbolic_trace(model, input_names=row["inputs"], disable_check=True)

    both: list[Callable[[nn.Module], torch.fx.GraphModule]] = [with_transformers, torch.fx.symbolic_trace]
    return both if row["library"] == "transformers" else both[::-1]


def _fused(traced: torch.fx.GraphModule) -> torch.fx.GraphModule:
    from optimum.fx.optimization import FuseBatchNorm1dInLinear, FuseBatchNorm2dInConv2d, compose

    fused: torch.fx.GraphModule = compose(FuseBatchNorm2dInConv2d(), FuseBatchNorm1dInLinear())(traced)
    return fused


def _from_timm(row: Row) -> nn.Module:
    from tools.census.zoo.timm_zoo import constructor, label, levels

    way = next(way for way in levels(row["name"]) if label(*way) == row["shrink"])
    return constructor(row["name"], *way)()


def _from_transformers(row: Row) -> nn.Module:
    import transformers

    values = row["config"]
    if values.get("backbone_config"):  # the older release allows one of the two
        values = {k: v for k, v in values.items() if k != "backbone"}
    config = transformers.CONFIG_MAPPING[row["name"]].from_dict(values)
    model: nn.Module = getattr(transformers, row["model_class"])(config)
    return model


def _said(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
