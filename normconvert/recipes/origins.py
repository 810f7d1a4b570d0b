"""Sources as a batch sees them before it runs: whether they are there, how large they are, which commit they are.

No weight is read and nothing is downloaded; torch stays out.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from normconvert.errors import InputError
from normconvert.files.safetensors_file import FLOATING, read_header
from normconvert.files.user_paths import user_path
from normconvert.files.weight_files import WEIGHT_SUFFIXES, find_weights, inside, is_index, load_json, shards_of
from normconvert.plan.conversion_record import RECORD_FILE
from normconvert.sources import hub
from normconvert.sources.gguf import gguf_at
from normconvert.sources.opening import library_of

BASE = 1_200_000_000
"""Bytes that a conversion takes whatever the model: the libraries, the trace."""
AT_A_TIME = 8
"""Models looked up on the hub side by side."""


@dataclass(frozen=True)
class Reference:
    """A source as a recipe names it, patterns resolved.

    Attributes:
        text: hub id, path or ``demo:NAME``.
        revision: branch, tag or commit on the hub.
        arch: architecture of bare weights.
        variant: of the weights in a folder.
    """

    text: str
    revision: str | None = None
    arch: str | None = None
    variant: str | None = None


@dataclass(frozen=True)
class Origin:
    """A source that is there.

    Attributes:
        source: as ``convert`` takes it; a path is absolute.
        name: the last part of it.
        author: on the hub; else empty.
        folder: the local folder or file; None on the hub.
        branch: of a model on the hub: the branch, tag or commit that was asked for; None: the default branch.
        commit: what that is now; None if it is not from there, or not known.
        size: bytes of its weights; None: not known.
        elements: floating elements of its weights; None: not known.
    """

    source: str
    name: str
    author: str = ""
    folder: Path | None = None
    branch: str | None = None
    commit: str | None = None
    size: int | None = None
    elements: int | None = None

    def memory(self, verify: bool) -> int:
        """Bytes that a conversion is expected to take at its peak; 0: not known.

        Verification holds the weights twice in float64, as they are and edited. Without it only one tensor is in memory
        at a time, unless the library merges tensors on loading: then all of them, as they are stored.
        """
        if self.size is None:
            return 0
        elements = self.elements if self.elements is not None else self.size // 2  # 16-bit weights: the dearest case
        return BASE + (16 * elements if verify else self.size)


def look_up(references: Iterable[Reference]) -> dict[Reference, Origin | InputError]:
    """What each reference means, or why it means nothing. Models on the hub are asked for side by side."""
    # Once each: several variants of one source are one look-up.
    wanted = list(dict.fromkeys(references))
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return dict(zip(wanted, pool.map(_origin, wanted), strict=True))


def _origin(reference: Reference) -> Origin | InputError:
    try:
        # What is here first, as a conversion takes it.
        return _local(reference) or _remote(reference)
    except InputError as error:
        return error


def _local(reference: Reference) -> Origin | None:
    text, arch = reference.text, reference.arch
    if text.startswith("demo:"):
        from normconvert.files.embedded import demo_folder

        path = demo_folder(text.removeprefix("demo:"))
        return Origin(text, path.name, "", path, None, None, *_weigh(path, arch, None))
    path = user_path(text)
    if not text or not path.exists():
        return None
    if reference.revision is not None:
        raise InputError(f"{text}: revision is for models on the hub, but this is a local path")
    # A node of a cluster has another current folder.
    path = path.absolute()
    # Resolved: `.` has no name that an output could be called by.
    name = path.resolve().name if path.is_dir() else path.stem
    return Origin(str(path), name, "", path, None, None, *_weigh(path, arch, reference.variant))


def _weigh(path: Path, arch: str | None, variant: str | None) -> tuple[int | None, int | None]:
    """(bytes, floating elements) of a local checkpoint's weights.

    Raises:
        InputError: it is no checkpoint.
    """
    if (packed := gguf_at(path)) is not None:
        return 8 * packed.stat().st_size, None  # in float32, of four bits
    if path.is_file():
        if not path.name.endswith(WEIGHT_SUFFIXES):
            raise InputError(f"{path}: not a checkpoint: expected a folder or a file {', '.join(WEIGHT_SUFFIXES)}")
        arch = arch or _identified(path)
        weights = path
    else:
        if not (path / "config.json").is_file():
            arch = arch or _identified(path)
        config = load_json(inside(path, "config.json")) if arch is None else {}
        weights = find_weights(path, config, library_of(config, arch), variant)
    try:
        return _sum_up(list(_files(weights)))
    except (InputError, OSError):  # damaged files are that job's failure, in its own words
        return None, None


def _identified(path: Path) -> str:
    """The architecture of bare weights.

    Raises:
        InputError: none fits, or several do and nothing says which.
    """
    from normconvert.identification import identify_names, read_names, words

    # Without building models: a plan is to be there in seconds.
    found = identify_names(str(path), read_names(path), prove=False)
    if found.arch is None:
        raise InputError(words.refused(found, ask="give arch: timm:NAME"))
    return found.arch


def _files(weights: Path) -> Iterator[Path]:
    if is_index(weights):
        yield from (weights.parent / name for name in sorted(set(shards_of(weights).values())))
    else:
        yield weights


def _sum_up(files: list[Path]) -> tuple[int, int | None]:
    size = sum(file.stat().st_size for file in files)
    # Elements of a pickle are known only when it is read.
    if any(file.suffix != ".safetensors" for file in files):
        return size, None
    tensors = [tensor for file in files for tensor in read_header(file).tensors.values()]
    return size, sum(math.prod(tensor.shape) for tensor in tensors if tensor.dtype in FLOATING)


def _remote(reference: Reference) -> Origin:
    repo, _, at = reference.text.partition("@")
    if not hub.HUB_ID.fullmatch(repo) or repo.endswith(WEIGHT_SUFFIXES):
        raise InputError(f"{reference.text}: no such file or folder, and not a hub id (name or org/name)")
    if at and reference.revision not in (None, at):
        raise InputError(f"{reference.text}: two revisions, {at} and {reference.revision}: give one")
    branch = at or reference.revision
    found = hub.find(repo, branch, reference.variant)
    author, _, name = repo.rpartition("/")
    weights = {file: size for file, size in found.sizes.items() if file.endswith(WEIGHT_SUFFIXES)}
    if not weights:
        raise InputError(f"{reference.text}: the model has no weights that can be converted (safetensors or pickles)")
    known = [size for size in weights.values() if size is not None]
    # A sum of some of the files would let a job start that memory cannot hold.
    size = sum(known) if len(known) == len(weights) else None
    elements = sum(count for dtype, count in found.dtypes.items() if dtype in FLOATING) or None
    return Origin(repo, name, author, None, branch, found.commit, size, elements)


def local_checkpoints(pattern: str, arch: str | None, exclude: Iterable[str]) -> list[str]:
    """The checkpoints that a pattern of folders matches, sorted; not those that normconvert wrote.

    Raises:
        InputError: there are none.
    """
    found = []
    for name in sorted(glob.glob(str(user_path(pattern)), recursive=True)):
        path = Path(name)
        is_checkpoint = (path / "config.json").is_file() or (
            arch is not None and (path.name.endswith(WEIGHT_SUFFIXES) or any(path.glob("*.safetensors")))
        )
        # Outputs often lie beside their sources: a second run must not convert what the first one made.
        if is_checkpoint and not (path / RECORD_FILE).is_file() and not _matches(path.name, exclude):
            found.append(str(path))
    if not found:
        raise InputError(f"{pattern}: matches no folder with a checkpoint (config.json and weights)")
    return found


def hub_models(author: str, models: Iterable[str], exclude: Iterable[str]) -> list[str]:
    """The ids of an author's models on the hub that match patterns of names, sorted.

    Raises:
        InputError: the hub cannot be asked, or there are none.
    """
    patterns, listed = list(models), hub.list_author(author)
    names = [(repo, repo.rpartition("/")[2]) for repo in listed]
    found = [repo for repo, name in names if _matches(name, patterns) and not _matches(name, exclude)]
    if not found:
        raise InputError(f"the models of {author}: none of {len(listed)} matches {', '.join(patterns)}")
    return found


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
