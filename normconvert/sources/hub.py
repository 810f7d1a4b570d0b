"""Models on the Hugging Face hub, through huggingface_hub: its cache, token, endpoint, offline mode, progress bar."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from normconvert.errors import InputError, Unfinished, first_line

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
LOOK_UP = 10.0
"""Seconds to wait for the hub's description of a model."""

# Never wanted: weights of other frameworks, training states, pictures and other bulk.
SKIPPED = (
    "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.tflite", "*.ot", "*.gguf", "*.ckpt", "*.npz", "*.npy", "*.mlmodel",
    "*.mlpackage/*", "*.tar", "*.gz", "*.zip", "*.parquet", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.mp4", "*.wav",
    "onnx/*", "coreml/*", "openvino/*", "runs/*", "*.pt", "*.pth", "training_args.bin", "optimizer.*", "*.engine",
)  # fmt: skip


def wanted_files(names: list[str], variant: str | None = None) -> list[str]:
    """The files to download: safetensors if there are any, else pickles; and everything small.

    Only weights in the root are taken: those in subfolders are other variants of the model.
    """
    # What a server calls a file is no path out of a folder.
    names = [n for n in names if n.isprintable() and not n.startswith("/") and not {"..", ""} & {*n.split("/")}]
    safe = [n for n in names if n.endswith(".safetensors") and "/" not in n]
    if variant is not None:  # of these alone; that there are none is said by whoever looks for them
        part = re.compile(rf"\.{re.escape(variant)}(\.|-\d+-of-\d+\.)")
        of_variant = [n for n in names if "/" not in n and part.search(n) and n.endswith((".safetensors", ".bin"))]
        names = [n for n in names if not n.endswith((".safetensors", ".bin"))]
        safe = [n for n in of_variant if n.endswith(".safetensors")] or of_variant
    # training_args.bin is a pickle of settings, not of weights.
    pickles = [n for n in names if n.endswith((".bin", ".pth", ".pt")) and "/" not in n and "training" not in n]
    # A repository may hold the same weights under several names (model.safetensors, model.fp16.safetensors).
    plain = [n for n in safe if n == "model.safetensors" or re.fullmatch(r"model-\d+-of-\d+\.safetensors", n)]
    weights = plain or safe or pickles
    small = [
        n for n in names
        if not n.endswith((".safetensors", ".bin")) and not any(fnmatch(n, pattern) for pattern in SKIPPED)
    ]  # fmt: skip
    return sorted({*small, *weights})


@dataclass(frozen=True)
class Found:
    """A model as the hub describes it, or as the cache holds it.

    Attributes:
        commit: what the revision means now; None if that cannot be known.
        sizes: the files that a download would fetch -> bytes, None where the hub does not say.
        dtypes: safetensors dtype -> elements; empty where the hub does not say.
    """

    commit: str | None
    sizes: dict[str, int | None]
    dtypes: dict[str, int] = field(default_factory=dict)


def find(repo: str, revision: str | None, variant: str | None = None) -> Found:
    """Look a model up without downloading it; where the hub cannot be asked, in the cache.

    Raises:
        InputError: as :func:`download`.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    with explained(repo, revision):
        if not constants.HF_HUB_OFFLINE:
            api = huggingface_hub.HfApi()
            try:
                info = api.model_info(repo, revision=revision, files_metadata=True, timeout=LOOK_UP)
                # Anyone may read the description of a gated model; whether its files may be had is another question.
                if info.gated:
                    api.auth_check(repo)
            except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
                raise
            except Exception:  # no network, hub down: the cache may do
                pass
            else:
                files = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
                dtypes = info.safetensors.parameters if info.safetensors else {}
                return Found(info.sha, {name: files[name] for name in wanted_files(list(files), variant)}, dict(dtypes))
        folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True))
        sizes: dict[str, int | None] = {
            path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()
        }
        return Found(_commit(folder), sizes)


def list_author(author: str) -> list[str]:
    """The ids of an author's models, sorted.

    Raises:
        InputError: the hub cannot be asked, or knows no models of theirs.
    """
    import huggingface_hub

    try:
        found = sorted(model.id for model in huggingface_hub.HfApi().list_models(author=author))
    except Exception as error:
        raise InputError(f"the models of {author}: the hub cannot be asked for them: {first_line(error)}") from error
    if not found:
        raise InputError(f"the models of {author}: the hub knows none")
    return found


def download(repo: str, revision: str | None, variant: str | None = None) -> tuple[Path, str | None]:
    """The folder in the hub's cache that holds the model, and its commit.

    Raises:
        InputError: not found, gated, no access, offline and not cached, no network.
    """
    import huggingface_hub

    with explained(repo, revision):
        names = _list_files(repo, revision)
        # Without a listing (offline, or cached by another tool) whatever is cached is taken and checked later.
        patterns = [glob.escape(name) for name in wanted_files(names, variant)] if names else None
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=patterns, local_files_only=names is None
        )
    return Path(folder), _commit(Path(folder))


def remember(repo: str, revision: str | None, commit: str | None) -> None:
    """Let the cache know which commit a branch or tag is, so that it is found by that name without a network.

    What is downloaded by its commit is in the cache under that alone. Nothing is noted if the branch has moved on
    (its new commit is not in the cache) or the hub cannot be asked: this is a help, and fails nothing.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or commit is None or revision == commit:
        return
    try:
        if huggingface_hub.HfApi().model_info(repo, revision=revision, timeout=LOOK_UP).sha == commit:
            # For the note that it leaves of the branch; the file itself is there by its commit.
            huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns="config.json")
    except Exception:
        return


@contextmanager
def explained(repo: str, revision: str | None) -> Iterator[None]:
    """Whatever huggingface_hub raises, as one line; our own errors pass.

    Raises:
        InputError: instead of it.
        Unfinished: the hub cannot be reached, or a transfer failed.
    """
    from huggingface_hub import errors

    name = f"{repo}@{revision}" if revision else repo
    try:
        yield
    except InputError:
        raise
    # Before RepositoryNotFoundError, of which it is a kind.
    except errors.GatedRepoError as error:
        raise InputError(f"{name}: a gated model: ask for access on the hub, then log in or set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{repo}: the hub has no revision {revision!r} of it") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{name}: no such folder, and no such model on the hub (or it is private: set HF_TOKEN)"
        ) from error
    except errors.HFValidationError as error:
        raise InputError(f"{name}: no such folder, and not a valid hub id") from error
    except errors.LocalEntryNotFoundError as error:
        raise Unfinished(
            f"{name}: no such folder, and not in the hub's cache while the hub is offline or cannot be reached"
        ) from error
    except Exception as error:
        raise Unfinished(f"{name}: download failed: {first_line(error)}") from error


def _commit(folder: Path) -> str | None:
    """The commit that a snapshot's folder is named after."""
    return folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None


def _list_files(repo: str, revision: str | None) -> list[str] | None:
    """Names of all files of a revision; None if the hub cannot be asked."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    if not constants.HF_HUB_OFFLINE:
        try:
            info = huggingface_hub.HfApi().model_info(repo, revision=revision)
            return [sibling.rfilename for sibling in info.siblings or []]
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
            raise
        except Exception:  # no network, hub down: the cache may do
            pass
    try:
        tree = huggingface_hub.get_cached_repo_tree(repo, revision=revision)
    except Exception:  # not cached, or cached without its listing
        return None
    return [entry.path for entry in tree]
