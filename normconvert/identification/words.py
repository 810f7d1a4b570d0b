"""An identification in one line: the note when it was used, the error when it could not be."""

from __future__ import annotations

from normconvert.identification.result import Candidate, Identification, Near

FEW = 6
"""So many names are listed before "and N more"."""
ASK = "pass --arch timm:NAME"
HOLDS, MEANT = "it holds", "save the one that is meant alone"
WITH_CONFIG = "put its config.json beside it and pass the folder"


def used(found: Identification) -> str:
    """What to say of an architecture that was found and is taken."""
    chosen = found.chosen
    assert chosen is not None
    how = "by names and shapes, which fit no other"
    if len(found.exact) > 1:
        where = next(s.where for s in found.stated if s.name == chosen.name)
        how = f"by its {where}, among {len(found.exact)} that names and shapes fit"
    return f"identified as {chosen.label} {how}; --arch overrides that"


def refused(found: Identification, ask: str = ASK) -> str:
    """Why a checkpoint without an architecture cannot be opened, and what to do: ``ask``."""
    timm = [c for c in found.exact if c.library == "timm"]
    if timm:
        return (
            f"{found.path}: names and shapes fit {len(timm)} architectures, which may compute differently: "
            f"{few([c.name for c in timm])}: {ask}"
        )
    if found.exact:
        return f"{found.path}: {_without_config(found.exact)}"
    whose = f"; {found.origin}" if found.origin else ""
    ask = MEANT if found.origin.startswith(HOLDS) else ask
    if not found.nearest:
        return f"{found.path}: a bare weight file of no architecture that is known{whose}: {ask}"
    near = found.nearest[0]
    nearest = f"nearest: {few(near.names)} ({explained(near) or differences(near)})"
    if near.library == "transformers":
        ask = WITH_CONFIG
    return f"{found.path}: a bare weight file of no architecture that is known; {nearest}{whose}: {ask}"


def several_models(prefixes: list[str]) -> str:
    """That a file holds a model and its teacher, say."""
    named = " and ".join(repr(prefix) for prefix in prefixes)
    return f"{HOLDS} {len(prefixes)} models, under {named}"


def _without_config(exact: tuple[Candidate, ...]) -> str:
    first = exact[0]
    fixed = few([f"{key}={value}" for key, value in first.config.items()])
    free = f", but not {few(list(first.unfixed), 3)}" if first.unfixed else ""
    kinds = few([c.name for c in exact], 3)
    return f"weights of transformers ({kinds}) without a config.json; the shapes fix {fixed}{free}: {WITH_CONFIG}"


def explained(near: Near) -> str:
    """The arguments with which the nearest architectures fit exactly; empty if there are none."""
    if not near.arguments:
        return near.hint
    by_arguments: dict[str, list[str]] = {}
    for name, arguments in near.arguments.items():
        by_arguments.setdefault(", ".join(f"{k}={v}" for k, v in arguments.items()), []).append(name)
    return "; ".join(f"{few(names, 3)} fits exactly with {text}" for text, names in by_arguments.items())


def differences(near: Near) -> str:
    """``2 tensors missing, 1 of another shape``."""
    parts = ((near.missing, "missing"), (near.extra, "too many"), (near.reshaped, "of another shape"))
    first, *others = [(len(names), what) for names, what in parts if names] or [(0, "differ")]
    tensors = "tensor" if first[0] == 1 else "tensors"
    return ", ".join([f"{first[0]} {tensors} {first[1]}", *(f"{n} {what}" for n, what in others)])


def few(names: list[str] | tuple[str, ...], most: int = FEW) -> str:
    """``a, b, c and 4 more``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
