"""What a converted checkpoint needs to run.

In come a model and module edits, the plain rows that a plan or a ``config.json`` holds; out goes the same model with
norms exchanged and hooks in place. Nothing may be known here of how a plan is made: the parts import torch, lazily
transformers, and each other, since :mod:`normconvert.runtime.shipping` makes of them the one file that lies in
transformers outputs.
"""

from __future__ import annotations

from normconvert.runtime.affine import Affine, Clip, PostActivation
from normconvert.runtime.attention import CHILD, LinearAttention, linear_attention, take_over
from normconvert.runtime.bases import BASES, compress, lift
from normconvert.runtime.classes import ADAPTER_RECORD, CONFIG_KEY, REMOTE_FILE, converted_class, edits_for
from normconvert.runtime.classes import __getattr__ as __getattr__  # runtime.GPT2LMHeadModel, as in the one file
from normconvert.runtime.edits import MODULE_EDITS, STRUCTURAL, apply_module_edits, contents
from normconvert.runtime.hooks import Center, Compress, add_hook, center
from normconvert.runtime.norms import NORMS, CRMSNorm, RMSNorm
from normconvert.runtime.one_thread import one_at_a_time, process_lock
from normconvert.runtime.padding import PADDED_FROM, Padded
from normconvert.runtime.renaming import RENAMED
from normconvert.runtime.schema import check_module_edits
from normconvert.runtime.shipping import shipped_source

__all__ = [
    "ADAPTER_RECORD",
    "BASES",
    "CHILD",
    "CONFIG_KEY",
    "MODULE_EDITS",
    "NORMS",
    "PADDED_FROM",
    "REMOTE_FILE",
    "RENAMED",
    "STRUCTURAL",
    "Affine",
    "CRMSNorm",
    "Center",
    "Clip",
    "Compress",
    "LinearAttention",
    "Padded",
    "PostActivation",
    "RMSNorm",
    "add_hook",
    "apply_module_edits",
    "center",
    "check_module_edits",
    "compress",
    "contents",
    "converted_class",
    "edits_for",
    "lift",
    "linear_attention",
    "one_at_a_time",
    "process_lock",
    "shipped_source",
    "take_over",
]
