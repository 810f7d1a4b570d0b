"""An adapter trained on the original, for the converted checkpoint: by the recorded plan, and verified.

An adapted model is the original with other tensors. A plan is right whatever the tensors are, so the converted adapter
is the one that makes of the converted tensors what the plan makes of the adapted ones. Not every such change is one
that the adapter's kind can express; those that are not are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normconvert import __version__
from normconvert.adapters.adapter_files import CONFIG_FILE, PREFIX_TUNING, WEIGHTS_FILE, Adapter, read_adapter, stored
from normconvert.adapters.changes import convert_changes
from normconvert.adapters.merging import merge
from normconvert.adapters.prompts import Prompted, convert_prompt
from normconvert.adapters.request import AdapterConversion
from normconvert.apply.other_files import copy_other_files
from normconvert.apply.output_folder import check_output, staged_output, write_json
from normconvert.errors import FidelityError, InputError
from normconvert.files.user_paths import user_path
from normconvert.option_fields import taking
from normconvert.options import METHODS
from normconvert.plan.conversion_plan import Plan
from normconvert.plan.given_rotations import read_rotation
from normconvert.runtime import ADAPTER_RECORD
from normconvert.verification.fidelity import Fidelity

RECORD_FORMAT = 1


@dataclass(frozen=True)
class AdapterReport:
    """What became of an adapter.

    Attributes:
        adapter: the folder that was read.
        converted: the checkpoint that it is for now.
        source: the original that it was verified with.
        output: the folder that was written.
        kind: PEFT's name of the adapter, ``LORA`` or ``PROMPT_TUNING``; ``DORA`` for a LoRA with magnitudes.
        edited: names of the tensors that changed, as in the file.
        copied: how many are what they were.
        fidelity: original with adapter against converted with converted adapter.
        notes: sentences for the user.
    """

    adapter: str
    converted: str
    source: str
    output: str
    kind: str
    edited: tuple[str, ...]
    copied: int
    fidelity: Fidelity
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        return {**asdict(self), "fidelity": self.fidelity.to_json()}


@taking(AdapterConversion)
def convert_adapter(request: AdapterConversion) -> AdapterReport:
    """Convert a PEFT adapter of the original for the converted checkpoint; verified before it appears.

    LoRA (rsLoRA, ``lora_bias``, ``modules_to_save``), DoRA where the conversion keeps rows apart, prompt tuning,
    p-tuning and prefix tuning. Original and converted model are compared with the adapter merged, in float64 and as
    they are stored; both are loaded for that.

    Returns:
        What changed, and how close the result is.

    Raises:
        InputError: no adapter, or one of another model; no record of a conversion; or what the adapter computes cannot
            be expressed for the converted checkpoint. The message says why.
        FidelityError: the result computes something else; nothing was written.
    """
    folder, out, target = (user_path(p) for p in (request.adapter, request.out, request.converted))
    from normconvert.plan.conversion_record import read_whole_record
    from normconvert.verification.record_check import source_reference

    record = read_whole_record(target)
    if request.rotation is not None:
        read_rotation(request.rotation)
    for read in (folder, target):
        check_output(out, read, request.overwrite)
    adapter = read_adapter(folder)
    if record["method"] not in METHODS:
        raise InputError(
            f"{target}: {record['method']} changes what the model computes: train the adapter on its result"
        )
    if adapter.kind == PREFIX_TUNING and record["options"].get("values"):
        raise InputError(
            f"{target}: rotate --values stored the values of attention in another basis, and a prefix holds values as "
            "the original has them: train one for the result, or convert without --values"
        )
    reference, revision = source_reference(target, record, request.source, None)
    if request.source is not None:
        check_output(out, user_path(request.source), request.overwrite)
    result, fidelity, notes = _convert(
        adapter, Plan.from_json(record["plan"]), _loader(reference, revision, request.trust_remote_code),
        _loader(str(target), None, request.trust_remote_code),
    )  # fmt: skip
    if not fidelity.passed:
        raise FidelityError(
            f"{folder}: the converted adapter does not compute what the adapter does; nothing was written: "
            + "; ".join(fidelity.reasons)
        )
    before, after = adapter.tensors(), result.tensors()
    edited = tuple(n for n, v in after.items() if n not in before or not _same(v, before[n]))
    kind = "DORA" if adapter.config.get("use_dora") else adapter.kind
    report = AdapterReport(
        str(folder), str(target), reference, str(out), kind, edited, len(after) - len(edited), fidelity, tuple(notes)
    )
    with staged_output(out, folder, request.overwrite) as staging:
        _write(staging, folder, result, report)
    return report


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


Loader = Callable[["torch.dtype | None"], nn.Module]


def _loader(reference: str, revision: str | None, trust: bool) -> Loader:
    """Makes the model of a checkpoint, converted or not, in a dtype or in its own."""

    def load(dtype: torch.dtype | None) -> nn.Module:
        from normconvert.sources.converted import load_opened, open_any

        at = f"{reference}@{revision}" if revision is not None else reference
        return load_opened(open_any(at, trust_remote_code=trust), dtype=dtype)

    return load


def _convert(adapter: Adapter, plan: Plan, original: Loader, converted: Loader) -> tuple[Adapter, Fidelity, list[str]]:
    """The converted adapter as it is stored, how faithful it is, and sentences for the user."""
    from normconvert.tracing.probes import verification_inputs
    from normconvert.tracing.probes.choose import floating_dtype
    from normconvert.verification.algebra import algebra_model
    from normconvert.verification.equivalence import tolerance_for, verify_models

    truth = original(torch.float64)
    edited = algebra_model(truth, plan)
    notes: list[str] = []
    if adapter.prompt is not None:
        result = convert_prompt(adapter, plan, truth)
    else:
        result, notes = convert_changes(adapter, plan, truth, edited)
    kept = _stored(result, adapter)
    last = converted(None)
    dtype = floating_dtype(last)
    if dtype == torch.float64:  # the truth is in float64 itself: nothing to measure rounding errors against
        dtype, last = torch.float32, last.float()
    probes = verification_inputs(truth)
    if adapter.prompt is not None:
        probes = [probe for probe in probes if "input_ids" in probe.inputs]
    fidelity = verify_models(
        truth=_with(truth, adapter),
        algebra=_with(edited, result),
        plan=plan,
        original=lambda: _with(original(dtype), adapter),
        converted=_with(last, kept),
        probes=probes,
        tolerance=tolerance_for(plan),
    )
    return kept, fidelity, notes


def _with(model: nn.Module, adapter: Adapter) -> nn.Module:
    return merge(model, adapter) if adapter.prompt is None else Prompted(model, adapter)


def _stored(result: Adapter, before: Adapter) -> Adapter:
    """The adapter as it is written: tensors that are what they were keep their bits."""
    old = before.tensors()
    sample = next(iter(old.values()))

    def keep(key: str, value: torch.Tensor) -> torch.Tensor:
        was = old.get(key, sample)
        return was if key in old and torch.equal(was.double(), value.double()) else stored(value, was)

    low_rank = {}
    for path, change in result.low_rank.items():
        kept: dict[str, Any] = {name: keep(key, getattr(change, name)) for name, key in change.keys.items()}
        low_rank[path] = replace(change, **kept)
    saved = {name: keep(result.saved_keys[name], value) for name, value in result.saved.items()}
    prompt = None if result.prompt is None else keep("prompt_embeddings", result.prompt)
    return replace(result, low_rank=low_rank, saved=saved, prompt=prompt)


def _write(folder: Path, source: Path, adapter: Adapter, report: AdapterReport) -> None:
    from safetensors.torch import save_file

    copy_other_files(source, folder)
    # Sorted, so that the same input makes the same bytes.
    tensors = {name: value.contiguous() for name, value in sorted(adapter.tensors().items())}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = {**adapter.config, "base_model_name_or_path": report.converted, "revision": None}
    write_json(folder / CONFIG_FILE, config)
    data = {key: value for key, value in report.to_json().items() if key not in ("adapter", "output")}
    # Of a path its name only: the record is published with the adapter.
    names = {key: Path(data[key]).name if Path(data[key]).exists() else data[key] for key in ("converted", "source")}
    record = {"format": RECORD_FORMAT, "normconvert": __version__, "base": adapter.base, **data, **names}
    write_json(folder / ADAPTER_RECORD, record)


__all__ = ["AdapterReport", "convert_adapter"]
