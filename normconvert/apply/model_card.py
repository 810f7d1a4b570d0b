"""The README.md of a converted checkpoint: what was done, how to load it, how faithful it is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from normconvert.apply.card_metadata import metadata
from normconvert.plan.conversion_plan import Plan, Verdict

UNCHANGED = "Tensor names and shapes are unchanged."
PAPER = "https://arxiv.org/abs/2305.14858"
METHODS = {
    "rmsnorm": (
        "Every converted norm reads a stream whose writers were centred (their mean over the channels removed), so "
        "that LayerNorm and RMSNorm are the same function there: *Pre-RMSNorm and Pre-CRMSNorm Transformers: "
        f"Equivalent and Efficient Pre-LN Transformers* ([arXiv:2305.14858]({PAPER})). {UNCHANGED}"
    ),
    "crmsnorm": (
        "The mean-free stream is stored in one channel less and the norms are CRMSNorm: *Pre-RMSNorm and Pre-CRMSNorm "
        f"Transformers: Equivalent and Efficient Pre-LN Transformers* ([arXiv:2305.14858]({PAPER})). Many tensors "
        "have other shapes than the original's, and the norms' weights and biases have moved into the linear maps that "
        "read them. The outputs are the original's; hidden states inside the model have one channel less."
    ),
    "fuse-bn": (
        "Norms that are affine maps at inference (BatchNorm and its kin) were fused into the convolutions and linear "
        "layers beside them, which gained biases: the norms' tensors are gone, so the plain architecture cannot load "
        "these weights."
    ),
    "fold": (
        "The norms' weights and biases were moved into the linear maps that read them, and are ones and zeros here (a "
        "bias that a reader could not take was divided by the weight). Tensor names and shapes are unchanged, and so "
        "is the class of the model."
    ),
    "rotate": (
        "Each rotated residual stream is stored in another orthogonal basis, and the norms' weights and biases were "
        "moved into the linear maps that read them: *QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs* "
        "([arXiv:2404.00456](https://arxiv.org/abs/2404.00456)), for LayerNorm with a rotation that keeps the mean. "
        "Tensor names and shapes are unchanged, and so is the class of the model. Its outputs are the original's; "
        "embeddings and hidden states are in the new basis."
    ),
    "scale": (
        "Each scaled residual stream is stored times a power of two, and the ε of the norms that read it times its "
        "square, so that its values fit into float16; what the model computes is the original's. Tensor names and "
        "shapes are unchanged. Embeddings and hidden states are scaled."
    ),
}
TRAINED = {
    "swap un": ("Unified Normalization", "2208.01313"),
    "swap repbn": ("RepBN", "2405.11582"),
    "swap powernorm": ("PowerNorm", "2003.07845"),
    "swap ln-free": ("nothing: their divisors were frozen, norm by norm", "2507.02559"),
}
"""Swap -> what norms were swapped for, and its paper."""
METHODS |= {
    swap: f"The norms were swapped for {norm} ([arXiv:{paper}](https://arxiv.org/abs/{paper})) while the model learnt "
    "to say what the original says; at inference such a norm is one scale and shift per channel."
    for swap, (norm, paper) in TRAINED.items()
}
SLAB = "simplified linear attention ([arXiv:2405.11582](https://arxiv.org/abs/2405.11582))"
LINEAR = {
    "swap sla": f"The softmax attention was swapped for {SLAB} while the model learnt to say what the original says. "
    "It takes images of one size.",
    "swap slab": f"The norms were swapped for RepBN and the softmax attention for {SLAB} while the model learnt to say "
    "what the original says; at inference such a norm is one scale and shift per channel. It takes images of one size.",
}
"""Swap -> what attention was swapped for."""
METHODS |= LINEAR
TRUST = ", trust_remote_code=True"
ORIGINAL = "the original architecture"
SHIPPED, OWN = "shipped", "own"
# No name begins with a dot: ./folder is a path.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
# Only at the very beginning: further down three dashes are a rule.
FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)(?:^|\n)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def model_card(
    source_reference: str,
    plan: Plan,
    fidelity: Mapping[str, Any] | None = None,
    *,
    library: str = "transformers",
    architecture: str = "",
    auto_class: str = "AutoModel",
    code: str = SHIPPED,
    source_readme: str | None = None,
    revision: str | None = None,
    name: str = "FOLDER",
    task: str | None = None,
    alone: bool = True,
) -> str:
    """The text of README.md.

    Args:
        source_reference: what was converted; a hub id becomes ``base_model`` in the metadata, a local path does not
            appear in the card.
        plan: the plan that was applied.
        fidelity: name -> figure, shown as a table; None: not verified.
        library: ``transformers`` or ``timm``.
        architecture: class or timm model name.
        auto_class: the Auto class for the example.
        code: what ``trust_remote_code`` runs, as :func:`remote_code` says it.
        source_readme: the source's README.md. Its front matter (licence, language, tags) is kept, its text appended.
        revision: commit on the hub that was converted.
        name: what the examples load: the folder's name, or its repository on the hub.
        task: the hub's name of what the model does.
        alone: the weights fit the library's own class, with what conversions before this one did to it.
    """
    base = hub_id(source_reference, library)
    title = base or architecture or "A checkpoint"
    # Two blocks of front matter would make the second one text: there is one, with the source's licence in it.
    front, text = split_front_matter(source_readme or "")
    parts = [
        f"---\n{metadata(front, base, library, plan.method, task)}---",
        f"# {title}, converted by normconvert",
        _summary(plan, base, architecture, revision),
        "## Loading",
        _loading(plan, library, architecture, auto_class, code, name, alone),
        "## Fidelity",
        _table(("measure", "value"), fidelity.items()) if fidelity else "The conversion was not verified.",
        _kept(plan.kept),
        "\n".join(["## Notes", "", *(f"- {note}" for note in plan.notes)]) if plan.notes else "",
        f"## The original model card\n\n{text.strip()}" if text.strip() else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def hub_id(reference: str, library: str = "transformers") -> str | None:
    """The hub id in ``name``, ``org/name`` or ``name@revision``; None for a path, a file or a demo."""
    from pathlib import Path

    name = reference.partition("@")[0]
    # What exists here is a path, whatever it looks like; paths of this machine are no part of a card.
    if not HUB_ID.fullmatch(name) or Path(reference).exists() or name.endswith((".safetensors", ".bin", ".pth", ".pt")):
        return None
    # A bare name of timm is an architecture, not a model on the hub.
    return name if "/" in name or library == "transformers" else None


def split_front_matter(readme: str) -> tuple[str, str]:
    """The YAML between the leading ``---`` lines (without them) and the rest."""
    match = FRONT_MATTER.match(readme)
    return (match.group(1).strip("\r\n"), readme[match.end() :]) if match else ("", readme)


def _summary(plan: Plan, base: str | None, architecture: str, revision: str | None) -> str:
    origin = f"[{base}](https://huggingface.co/{base})" if base else "the original checkpoint"
    if base and revision:
        origin += f" at revision [`{revision[:12]}`](https://huggingface.co/{base}/tree/{revision})"
    count = f"{len(plan.converted)} of {len(plan.verdicts)} norms"
    linear = sum(edit["op"] == "attend" for edit in plan.modules)
    if linear:
        count = f"the attention of {linear} modules" + (f" and {count}" if plan.converted else "")
    method = METHODS.get(plan.method, "")
    if plan.native:
        method = method.replace(UNCHANGED, f"It is written as `{plan.native}`.")
    claim = (
        "trained to compute nearly the same"
        if plan.method in TRAINED | LINEAR
        else "computing the same function up to rounding"
    )
    return (
        f"This is {origin}{f' ({architecture})' if architecture else ''} after `normconvert {plan.method}`: {count} "
        f"converted, {claim}.\n\n{method}"
    ).strip()


def _loading(plan: Plan, library: str, architecture: str, auto_class: str, code: str, name: str, alone: bool) -> str:
    named = json.dumps(name, ensure_ascii=False)
    replaced = any(edit["op"] == "replace" for edit in plan.modules)
    in_place = "RMSNorm modules in place" if (replaced or plan.native) and not plan.structural else "as converted"
    trust = TRUST if code == OWN else ""
    own = f"import normconvert\n\nmodel = normconvert.load({named}{trust})  # {in_place}"
    if library == "torch":
        own = f'import normconvert\n\nmodel = normconvert.load({named}, arch="…/{architecture}"{TRUST})  # {in_place}'
        return f"```python\n{own}\n```\n\n`{architecture}` is the code that makes the model; it is not part of this."
    if library == "timm" and not alone:
        blocks = [own]
    elif library == "timm":
        place = json.dumps(f"{'hf-hub' if '/' in name else 'local-dir'}:{name}", ensure_ascii=False)
        plain = f"import timm\n\nmodel = timm.create_model({place}, pretrained=True)  # {architecture}"
        blocks = [own, plain]
    elif plan.native:
        blocks = [f"from transformers import {plan.native}\n\nmodel = {plan.native}.from_pretrained({named})"]
    elif code != SHIPPED:
        plain = f"from transformers import {auto_class}\n\nmodel = {auto_class}.from_pretrained({named}{trust})"
        blocks = [own, f"{plain}  # {ORIGINAL}"] if alone else [own]
    else:
        remote = (
            f"from transformers import {auto_class}\n\n"
            f"model = {auto_class}.from_pretrained({named}{TRUST})  # {in_place}"
        )
        plain = f"model = {auto_class}.from_pretrained({named})  # {ORIGINAL}"
        blocks = [own, remote, plain] if alone else [own, remote]
    text = "\n\n".join(f"```python\n{block}\n```" for block in blocks)
    if code == OWN:
        text += f"\n\n`{architecture}` is code that came with the original checkpoint: read it before you trust it."
    if any(edit["op"] == "affine" and edit["eps"] != 1.0 for edit in plan.modules):
        plain = f"model = {auto_class}.from_pretrained({named})  # the original architecture, ε = 10¹²"
        why = "All ways give the same outputs: a LayerNorm of so large an ε divides by √ε, whatever it reads."
        return f"{text}\n\n```python\n{plain}\n```\n\n{why}"
    if any(edit["op"] == "affine" for edit in plan.modules):
        return f"{text}\n\nUnmodified {library} cannot load it: its norms would compute something else."
    if any(edit["op"] == "attend" for edit in plan.modules):
        return f"{text}\n\nUnmodified {library} cannot load it: its attention is another, with parameters of its own."
    if not alone and not plan.structural:
        return f"{text}\n\nUnmodified {library} computes something else: it has no place for what its modules need."
    if plan.structural:
        missing = "tensors of the plain architecture are missing here, or have other shapes"
        return f"{text}\n\nUnmodified {library} cannot load it: {missing}."
    if plan.native:
        return f"{text}\n\nThis is {library}'s own model with RMSNorm: no code of normconvert's is needed."
    if plan.method != "rmsnorm":
        return text
    return text + (
        "\n\nAll ways give the same outputs: on the mean-free stream LayerNorm *is* RMSNorm. Training moves the "
        "weights away from that; load a model that was fine-tuned with RMSNorm with RMSNorm again, not as the original "
        "architecture."
    )


def _kept(kept: list[Verdict]) -> str:
    if not kept:
        return ""
    rows = ((f"`{verdict.path}` ({verdict.kind})", verdict.reason) for verdict in kept)
    return "## Norms that stay\n\n" + _table(("norm", "why"), rows)


def _table(head: tuple[str, str], rows: Iterable[tuple[str, Any]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def auto_class(folder: Path, architecture: str) -> str | None:
    """The Auto class that the output's config.json maps to its architecture; AutoModel only if no other does."""
    auto_map: dict[str, Any] = _config(folder).get("auto_map") or {}
    names = [auto for auto, target in auto_map.items() if str(target).endswith(f".{architecture}")]
    # AutoModel would leave the head away.
    return min(names, key=lambda name: name == "AutoModel", default=None)


def remote_code(folder: Path) -> str:
    """What ``trust_remote_code`` runs: the :data:`SHIPPED` file, or the checkpoint's :data:`OWN` class."""
    from normconvert.runtime import CONFIG_KEY

    return OWN if (_config(folder).get(CONFIG_KEY) or {}).get("own_code") else SHIPPED


def _config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config
