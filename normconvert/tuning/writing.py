"""The trained student as a checkpoint folder: the original's tensors under their names, an affine map at each norm.

With a large ε a LayerNorm is such a map: it divides by √(var + ε) ≈ √ε, whatever it reads. Where the model's config
holds the ε of exactly the norms that were swapped, and all of them read mean-free values, the folder says ε = 10¹² and
the weights are 10⁶ times as large. It then loads in unmodified library code, too (as in arXiv 2507.02559's releases).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from normconvert.apply.loaded_model import save_model
from normconvert.apply.other_files import copy_other_files, write_files
from normconvert.apply.record import loading_files
from normconvert.errors import InputError
from normconvert.plan.conversion_plan import Plan, Verdict
from normconvert.rewrites.epsilons import attributes_with, epsilons_in_config
from normconvert.runtime import CHILD, RENAMED, STRUCTURAL, apply_module_edits
from normconvert.sources import Source
from normconvert.sources.transformers_models import TIE, own_class
from normconvert.tuning.settings import SWAPS
from normconvert.tuning.sites import NormSite
from normconvert.tuning.student import Student
from normconvert.verification.algebra import named_tensors

LARGE_EPS = 1e12


def plan_of(
    student: Student,
    plan: Plan,
    method: str,
    *,
    eps: float = 1.0,
    config_key: str | None = None,
    guarded: bool = False,
    renamed: bool = False,
) -> Plan:
    """What the folder's record says: the centring, the norms that stay, an affine map at each that was swapped.

    Args:
        student: finished.
        plan: of the ``rmsnorm`` rewrite.
        method: of the swap.
        eps: of the affine maps.
        config_key: where config.json holds it; None: nowhere.
        guarded: the plain architecture shall refuse the weights, since it would take them for something else.
        renamed: likewise, where attention alone was swapped, and the plain architecture would pass over its parameters.
    """
    swapped = {site.path for site in student.sites}
    modules = [edit for edit in plan.modules if edit["op"] == "center" or edit["path"] not in swapped]
    modules += [
        {"op": "affine", "path": site.path, "size": site.size, "eps": eps, "axis": site.axis,
         "weight": site.weight or "weight", "bias": site.bias or "bias", **({"guarded": True} if guarded else {})}
        for site in student.sites
    ]  # fmt: skip
    modules += [
        {"op": "attend", "path": path, "heads": one.heads, "size": one.size, "grid": list(one.grid),
         "prefix": one.prefix}
        for path, one in student.attentions.items()
    ]  # fmt: skip
    removed = []
    if student.attentions and not student.sites and renamed:
        path, name = _own_parameter(student)
        modules.append({"op": "rename", "path": path, "name": name})
        removed.append(f"{path}.{name}")
    verdicts = [
        Verdict(v.path, v.kind, True, f"its statistics are learnt ({SWAPS[method]}).", "swapped")
        if v.path in swapped
        else v
        for v in plan.verdicts
    ]
    config = dict(plan.config) | ({config_key: eps} if config_key else {})
    return Plan(f"swap {method}", modules=modules, removed=removed, config=config, verdicts=verdicts,
                notes=list(plan.notes), float32_norms=plan.float32_norms)  # fmt: skip


def _own_parameter(student: Student) -> tuple[str, str]:
    """A module and its weight, which no other module has: one of a swapped attention, if there is one.

    Raises:
        InputError: there is none.
    """
    holders: dict[int, list[str]] = {}
    for path, module in student.model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), []).append(path)
    for inside in (*student.attentions, ""):
        for path, module in student.model.get_submodule(inside).named_modules(prefix=inside):
            if type(module) in (nn.Linear, nn.Conv2d) and CHILD not in path and len(holders[id(module.weight)]) == 1:
                return path, "weight"
    raise InputError(
        "no linear map or convolution of the model has a weight of its own, by whose name it could be known"
    )


def write_folder(source: Source, student: Student, plan: Plan, folder: Path, dtype: torch.dtype) -> None:
    """Write the weights, and the other files of the source, into ``folder``.

    Args:
        source: the original.
        student: finished.
        plan: see :func:`plan_of`.
        folder: exists, and is empty.
        dtype: to store the weights in.

    Raises:
        InputError: it cannot be written, or a weight is beyond the dtype.
    """
    # The original is filled and saved, not the student, whose norms are of classes that only training has.
    model = source.load(dtype=torch.float32)
    apply_module_edits(model, [edit for edit in plan.modules if edit["op"] in STRUCTURAL])
    trained = named_tensors(student.model)
    affine = {site.path: student.norms[site.path].affine() for site in student.sites}
    rows = {edit["path"]: edit for edit in plan.modules if edit["op"] == "affine"}
    for edit in plan.modules:
        if edit["op"] == "rename":
            trained[f"{edit['path']}.{RENAMED.format(edit['name'])}"] = trained[f"{edit['path']}.{edit['name']}"]
    if TIE in plan.config:
        _untie(model, trained)
    for name, tensor in named_tensors(model).items():
        path, _, leaf = name.rpartition(".")
        if path in affine:
            a, b = affine[path]
            value = a * rows[path]["eps"] ** 0.5 if leaf == rows[path]["weight"] else b
        elif name in trained:
            value = trained[name].detach()
        else:
            continue
        stored = value.to(dtype) if tensor.is_floating_point() else value
        if stored.is_floating_point() and isinstance(tensor, nn.Parameter) and not torch.isfinite(stored).all():
            raise InputError(f"tensor {name} (up to {float(value.abs().max()):.3g}) overflows {dtype}")
        tensor.data = stored.to(tensor.device).reshape(tensor.shape)
    model.to(dtype)
    try:
        if source.folder is not None:
            copy_other_files(source.folder, folder, with_code=own_class(source) is not None)
        save_model(source, plan, model, folder, None)
        write_files(folder, loading_files(source, plan, str(dtype).removeprefix("torch.")))
    except OSError as error:
        raise InputError(f"cannot write the output: {error.strerror or error}; nothing was kept") from error


def _untie(model: nn.Module, trained: dict[str, Tensor]) -> None:
    """Give each name of a tensor that is no longer shared its own."""
    for name, tensor in list(named_tensors(model).items()):
        other = [n for n, t in named_tensors(model).items() if t is tensor and n != name]
        if any(n in trained and name in trained and trained[n] is not trained[name] for n in other):
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path).register_parameter(leaf, nn.Parameter(tensor.detach().clone()))


def eps_key(source: Source, sites: Sequence[NormSite], norms: int) -> str | None:
    """The key of config.json that holds the ε of the swapped norms, of all norms and of nothing else; None if none.

    Args:
        source: the original.
        sites: the norms that are swapped.
        norms: how many norms the model has.
    """
    plain = all(site.mean_free and site.weight and site.bias and not site.offset for site in sites)
    if source.library != "transformers" or not sites or not plain or len(sites) != norms:
        return None
    model = source.skeleton()
    rows = [
        {"path": s.path, "attributes": attributes_with(model.get_submodule(s.path), s.eps), "eps": LARGE_EPS}
        for s in sites
    ]
    # Of exactly the swapped norms: any other that reads the key would divide by 10⁶ as well.
    keys = epsilons_in_config(model, rows)
    return next(iter(keys)) if len(keys) == 1 and all(row.get("stated") for row in rows) else None
