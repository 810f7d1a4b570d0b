"""Which ``--arch`` is ``FILE.py:FACTORY``, and whether that file may run; nothing of it runs here."""

from __future__ import annotations

import re

from normconvert.errors import InputError

FACTORY = re.compile(r"(.+\.py):([A-Za-z_]\w*)")


def is_factory(arch: str | None) -> bool:
    """Whether ``arch`` is ``FILE.py:FACTORY``."""
    return arch is not None and FACTORY.fullmatch(arch) is not None


def refuse_untrusted(arch: str | None, trust_remote_code: bool) -> None:
    """Refuse a factory whose file may not run.

    Raises:
        InputError: it may not.
    """
    if is_factory(arch) and not trust_remote_code:
        raise InputError(f"--arch {arch} runs the code of that file: add --trust-remote-code if you trust it")
