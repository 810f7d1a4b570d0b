"""The plan: what to do with a checkpoint, as plain data (invariant I8).

It is made by a rewrite from the analysed graph and used by three readers that know nothing of graphs: the streaming
writer (`apply`), the verification and the loader (`runtime`). It can be printed, diffed, kept and replayed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from normconvert.errors import InputError, first_line

FORMAT = 1


@dataclass(frozen=True)
class Verdict:
    """What happens to one norm, and why.

    Attributes:
        path: module path of the norm, e.g. ``transformer.h.0.ln_1``.
        kind: the norm as found, e.g. ``LayerNorm`` or ``BatchNorm2d``.
        converted: whether the plan changes it.
        reason: one sentence for a person. For a norm that stays: the value, the operation and the module in the way.
        code: the class of the reason, for tables (``converted``, ``post-norm``, ``returned``, ``unknown-op``, ...).
    """

    path: str
    kind: str
    converted: bool
    reason: str
    code: str


@dataclass(frozen=True)
class Plan:
    """Tensor edits and module edits.

    Attributes:
        method: the conversion, e.g. ``rmsnorm``.
        tensors: model tensor name -> edits in order (see :mod:`normconvert.plan.edits`). Names are those of the model's
            ``state_dict``; the source maps them to names in the files.
        aliases: for every *edited* tensor that several names of the model share (tied weights), the name used in
            ``tensors`` -> all its names, so that whichever name the files hold is found.
        modules: module edits in order, rows of `normconvert.runtime.MODULE_EDITS`.
        removed: model tensor names that the converted model no longer has.
        config: changes to the model's config.json, dotted key -> value (only with ``--tied untie``).
        verdicts: one per norm, in the order of execution.
        notes: sentences the user should read (shifted outputs, float32 casts, ...).
        float32_norms: True if the traced model casts a norm's input to float32 whatever its dtype, so that 1e-6 is the
            best the algebra's test can show.
        classes: other classes of the model's family as which the output may be opened: the plan is proved for them.
        shifted_classes: classes of the family -> why the plan is not proved for them.
        doors: arguments of ``forward`` other than the usual ones for which the proof holds, too.
        untraced_doors: those for which nothing is proved.
        shifted_doors: ways out that give a stream without its mean, rows ``{"door", "output"}``.
        shifted_outputs: outputs whose per-token mean changes, or which are in another basis or scaled, as
            :func:`normconvert.tracing.output_paths.named_values` names them (only with ``--allow-shifted-outputs``).
        shapes: tensor name -> shape, of the whole model, for :func:`normconvert.apply_plan`; empty in plans of files,
            which are held against their headers.
        native: the class (transformers) or model (timm) that the output is, where that is the library's own with
            RMSNorm in place of the source's; else empty.
    """

    method: str
    tensors: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    aliases: dict[str, list[str]] = field(default_factory=dict)
    modules: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    float32_norms: bool = False
    classes: list[str] = field(default_factory=list)
    shifted_classes: dict[str, str] = field(default_factory=dict)
    doors: list[str] = field(default_factory=list)
    untraced_doors: list[str] = field(default_factory=list)
    shifted_doors: list[dict[str, Any]] = field(default_factory=list)
    shifted_outputs: list[str] = field(default_factory=list)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    native: str = ""

    @property
    def converted(self) -> list[Verdict]:
        """The norms that change."""
        return [v for v in self.verdicts if v.converted]

    @property
    def kept(self) -> list[Verdict]:
        """The norms that stay as they are."""
        return [v for v in self.verdicts if not v.converted]

    @property
    def structural(self) -> bool:
        """Whether the converted model has other tensors than the architecture: plain libraries cannot load it."""
        from normconvert.runtime import STRUCTURAL

        return any(edit["op"] in STRUCTURAL for edit in self.modules)

    @property
    def guard(self) -> str | None:
        """A removed tensor of which transformers outputs keep the name, with no elements.

        transformers initialises tensors that a checkpoint lacks and only warns; a tensor of another shape it refuses.
        None where tensors have other shapes anyway, and where the library's own class has no such tensor.
        """
        if self.native or any(edit["op"] == "resize" for edit in self.modules):
            return None
        return next((name for name in self.removed if name.endswith((".weight", ".running_var"))), None)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-ready data."""
        data = {"format": FORMAT, **asdict(self)}
        for name in ("shapes", "native"):
            if not data[name]:
                del data[name]
        return data

    def save(self, path: str | Path) -> None:
        """Write the plan to a JSON file."""
        Path(path).write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: there is no such file, or it holds no plan.
        """
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path}: not a plan: {first_line(error)}") from error

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: the data was written by another plan format, or is none of a plan.
        """
        data = dict(data)
        found = data.pop("format", None)
        # Refused, not guessed: an edit that means something else now would be wrong without a sign.
        if found != FORMAT:
            raise ValueError(
                f"plan format {found!r}, expected {FORMAT}: convert again with this version of normconvert"
            )
        if unknown := set(data) - {one.name for one in fields(cls)}:
            raise ValueError(f"plan: unknown entry {min(unknown)[:40]!r}")
        # A ValidationError is a ValueError.
        return TypeAdapter(cls).validate_python(data)


def edited_config(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of config.json's data with ``changes``: dotted key -> value."""
    # A deep copy: the source's config is used again.
    edited: dict[str, Any] = json.loads(json.dumps(config))
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = edited
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return edited


def set_in_config(config: Any, key: str, value: Any) -> None:
    """Set a dotted key in the configuration that a model holds."""
    *sections, last = key.split(".")
    setattr(functools.reduce(getattr, sections, config), last, value)
