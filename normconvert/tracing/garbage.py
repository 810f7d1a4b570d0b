"""Whether Python looks for garbage cycles.

Imports, a model and a trace make millions of objects that stay. Looking through all of them time and again took a fifth
of the time to start and freed next to nothing: the peak memory is the same without. Verification, which makes and drops
large tensors, is run with it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collecting(on: bool) -> Iterator[None]:
    """Have cycles looked for within, or not; afterwards as before."""
    before = gc.isenabled()
    (gc.enable if on else gc.disable)()
    try:
        yield
    finally:
        (gc.enable if before else gc.disable)()
