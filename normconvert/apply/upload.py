"""A finished output on the hub."""

from __future__ import annotations

from pathlib import Path

from normconvert.errors import InputError, first_line


def check_repository(repo: str, source: str) -> None:
    """Refuse a repository before any work is done.

    Raises:
        InputError: it has no name of one, or is the source itself.
    """
    from normconvert.sources.hub import HUB_ID

    if not HUB_ID.fullmatch(repo):
        raise InputError(f"--push-to-hub {repo}: not a hub id (name or org/name)")
    if repo == source.partition("@")[0]:
        raise InputError(f"--push-to-hub {repo}: that is the source itself, which would be written over")


def upload(folder: Path, repo: str, method: str, *, private: bool, output: str = "") -> None:
    """Upload a converted folder to a repository, which is made if it is not there.

    Args:
        folder: a complete output.
        repo: ``name`` or ``org/name``.
        method: the conversion, for the commit's message.
        private: make the repository a private one if it has to be made.
        output: what the user calls the folder, for the error.

    Raises:
        InputError: the hub refuses it, or cannot be reached; the folder stays as it is.
    """
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            # The state holds times and inodes of this machine.
            repo_id=repo, folder_path=folder, ignore_patterns=[".cache/**"],
            commit_message=f"Converted by normconvert ({method})",
        )  # fmt: skip
    except Exception as error:
        reason = first_line(error)
        raise InputError(f"{output or folder}: complete, but not uploaded to {repo}: {reason}") from error
