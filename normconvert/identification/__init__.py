"""Identification: from a checkpoint's names and shapes to its architecture. Torch is not imported unless it has to."""

from __future__ import annotations

from normconvert.identification import words
from normconvert.identification.reading import Names, names_of, read_names, stated
from normconvert.identification.result import Candidate, Identification, Near, Stated
from normconvert.identification.search import identify, identify_names

__all__ = [
    "Candidate",
    "Identification",
    "Names",
    "Near",
    "Stated",
    "identify",
    "identify_names",
    "names_of",
    "read_names",
    "stated",
    "words",
]
