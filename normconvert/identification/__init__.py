"""Names and shapes of tensors in, the architectures that have exactly these out; no values, no torch if it can be.

`reading` says what a checkpoint states of itself, `prints` and `model_types` hold it against the indexes in ``data/``,
`search` decides, `arguments` and `building` try other image sizes and channels, `words` puts it in a sentence. Nothing
here opens a source: it stands on `normconvert.files` alone.
"""

from __future__ import annotations

from normconvert.identification import words
from normconvert.identification.reading import Names, names_of, read_names, stated
from normconvert.identification.result import Candidate, Identification, Near, Stated
from normconvert.identification.search import identify_names

__all__ = [
    "Candidate",
    "Identification",
    "Names",
    "Near",
    "Stated",
    "identify_names",
    "names_of",
    "read_names",
    "stated",
    "words",
]
