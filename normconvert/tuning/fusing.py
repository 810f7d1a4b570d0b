"""The swapped norms, affine maps by now, move into the linear maps beside them; what is left computes the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from normconvert.apply.checkpoint import write_checkpoint
from normconvert.apply.record import loading_files
from normconvert.errors import NothingToConvert
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan, Verdict
from normconvert.rewrites.planning import plan_model
from normconvert.runtime import REMOTE_FILE
from normconvert.sources import Source, open_source
from normconvert.tracing.probes import verification_inputs
from normconvert.verification.equivalence import tolerance_for, verify_models
from normconvert.verification.fidelity import Fidelity

ROUNDING = 32.0
"""Allowed rounding error of the fused model, times the trained one's. Two are not enough: on a single odd input the
trained one can be exact by chance (11 was seen where float64 agreed to 2e-14), and a refusal loses a training."""


@dataclass(frozen=True)
class Fused:
    """What fusing did.

    Attributes:
        plan: of the output, as seen from the original architecture.
        absorbed: paths of the norms that are gone.
        fidelity: the output against the unfused model.
        notes: sentences for the user.
    """

    plan: Plan
    absorbed: tuple[str, ...]
    fidelity: Fidelity
    notes: tuple[str, ...]


def fuse_folder(
    tuned: Path, folder: Path, original: Source, tuned_plan: Plan, device: str, record: Callable[[Plan], None]
) -> Fused:
    """Fuse the norms of the checkpoint in ``tuned`` and write the result into ``folder``.

    Args:
        tuned: an output without fusing, with its record.
        folder: exists, and is empty.
        original: the source of the swap; the result has its dtype.
        tuned_plan: the plan in the record of ``tuned``.
        device: where the two are compared.
        record: writes the record of ``folder``, given its plan.

    Returns:
        What was done. The fidelity may have failed.
    """
    from normconvert.sources.converted import load

    # This package's own file: left there, it would be reported as code of the source's that is not copied.
    (tuned / REMOTE_FILE).unlink(missing_ok=True)
    arch = f"timm:{original.architecture}" if not (tuned / "config.json").is_file() else None
    source = open_source(str(tuned), arch=arch, trust_remote_code=original.trust_remote_code)
    # A swap has changed the features anyway: its last norm may go into the head.
    plan = plan_model(source.skeleton(), Options(through_features=True), "fuse-bn")
    plan = replace(plan, float32_norms=tuned_plan.float32_norms)
    swapped = [edit["path"] for edit in tuned_plan.modules if edit["op"] == "affine"]
    absorbed = tuple(edit["path"] for edit in plan.modules if edit["op"] == "absorb" and edit["path"] in swapped)
    if not absorbed:
        reasons = "; ".join(dict.fromkeys(v.reason for v in plan.kept)) or "none was found"
        raise NothingToConvert(
            f"{original.reference}: none of the swapped norms can be fused: {reasons}; --no-fuse keeps them"
        )
    combined = _combined(tuned_plan, plan, set(absorbed))
    dtype = original.dtype
    written = write_checkpoint(
        source, plan, folder, dtype=dtype, hash_source=False,
        # combined stands for the edits that `tuned` needs, too
        extra_files=loading_files(replace(source, modules=()), combined, str(dtype).removeprefix("torch.")),
    )  # fmt: skip
    record(combined)
    fidelity = verify_models(
        truth=lambda: source.load(dtype=torch.float64, device=device),
        algebra=None,
        plan=plan,
        from_files=not source.is_pickle,
        original=lambda: source.load(dtype=dtype, device=device),
        converted=lambda: load(folder, dtype=dtype, device=device, trust_remote_code=original.trust_remote_code),
        probes=verification_inputs(source.skeleton(), seed=0, tokenizer=original.tokenizer()),
        tolerance=tolerance_for(plan),
        rounding_tolerance=ROUNDING,
    )
    kept = [v for v in plan.verdicts if v.path in swapped and not v.converted]
    notes = [f"`{v.path}` stays as an affine map: {v.reason}" for v in kept]
    return Fused(combined, absorbed, fidelity, (*plan.notes, *notes, *written.notes))


def _combined(tuned: Plan, fused: Plan, absorbed: set[str]) -> Plan:
    """Both plans as one: the norms that are absorbed need not become affine maps before."""
    # In this order: fusing was planned for the model as the first edits leave it.
    first = [edit for edit in tuned.modules if edit["path"] not in absorbed]
    reasons = {v.path: v for v in fused.verdicts}

    def verdict(old: Verdict) -> Verdict:
        new = reasons.get(old.path)
        if new is None or old.code != "swapped":
            return old
        more = f"fused {new.reason}" if new.converted else f"it stays as an affine map: {new.reason}"
        return replace(old, reason=f"{old.reason.rstrip('.')}; {more}")

    return replace(
        tuned,
        modules=first + fused.modules,
        removed=list(fused.removed),
        verdicts=[verdict(v) for v in tuned.verdicts],
        notes=list(dict.fromkeys((*tuned.notes, *fused.notes))),
    )
