"""Where a model's folder is, and what the model is called.

An operator writes one of these, each with or without `NAME=` before it:

    a diffusers folder                        called like the folder
    a hub id, owner/name                      fetched into the hub's cache, called `name`
    models--owner--name                       of that cache: its main revision, called `name`
    models--owner--name/snapshots/REVISION    one revision, called `name` all the same

A name that the operator gives stands above that of card.json, which stands above these.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download

INDEX = "model_index.json"
_MODULAR_INDEX = "modular_model_index.json"
_CACHED = "models--"  # how the hub's cache calls a repository's folder
_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._+/:@-]{0,127}")  # control refuses others
_NAMES_ALLOWED = "1 to 128 of A-Z a-z 0-9 . _ + / : @ -, a letter or digit first"
_SHOWN_MAX = 5  # of what a folder has instead


class LoadError(Exception):
    """A model that cannot be loaded.

    Fields: `source`, `missing` (the file, component or class at fault), `reason`.
    """

    def __init__(self, source: str, missing: str, reason: str) -> None:
        super().__init__(f"{source}: {missing}: {reason}")
        self.source, self.missing, self.reason = source, missing, reason


class ModelSource(NamedTuple):
    """A model's folder."""

    asked: str  # as the operator wrote it
    folder: Path
    name: str
    named: bool  # by the operator: card.json does not change it


def located(asked: str) -> ModelSource:
    """The folder, fetched from the hub where it is a hub id. Raises `LoadError`."""
    name, path = _split(asked)
    if name is not None:
        check_name(asked, name)
    folder = Path(path).expanduser()
    if folder.is_symlink() and not folder.exists():
        raise LoadError(asked, path, f"a dangling link to {os.readlink(folder)}")
    if folder.is_file():
        wanted = f"a folder with {INDEX} and a folder for each component is needed"
        raise LoadError(asked, path, f"a file; {wanted}")
    if not folder.is_dir():
        folder = _fetched(asked, path)
    folder = Path(os.path.abspath(folder))  # with its links: they are how the operator calls it
    if folder.name.startswith(_CACHED) and (folder / "snapshots").is_dir():
        folder = _main_revision(asked, folder)
    _check_pipeline(asked, folder)
    return ModelSource(asked, folder, name or _name_of(folder), name is not None)


def check_name(asked: str, name: str) -> None:
    """A cluster can call a model so. Raises `LoadError`."""
    if not _NAME.fullmatch(name):
        reason = f"found {name!r}; allowed: {_NAMES_ALLOWED}; NAME=FOLDER gives another"
        raise LoadError(asked, "name", reason)


def _split(asked: str) -> tuple[str | None, str]:
    """Name, where one was given, and path."""
    name, sign, path = asked.partition("=")
    if not sign or Path(asked).exists():
        return None, asked
    if not path:
        raise LoadError(asked, "path", f"found none after {name}=; allowed: a folder or a hub id")
    return name, path


def _fetched(asked: str, path: str) -> Path:
    if Path(path).is_absolute() or path.count("/") != 1 or path.startswith((".", "~")):
        raise LoadError(asked, path, "no such folder, and not a hub id (owner/name)")
    try:
        return Path(snapshot_download(path))
    except (OSError, ValueError) as error:  # all of the hub's errors are one of these
        raise LoadError(asked, path, f"cannot be fetched from the hub: {error}") from error


def _main_revision(asked: str, root: Path) -> Path:
    """The snapshot that a repository's folder in the hub's cache stands for."""
    there = sorted(folder.name for folder in (root / "snapshots").iterdir() if folder.is_dir())
    main = root / "refs" / "main"
    if main.is_file():
        revision = main.read_text(encoding="utf-8").strip()
        if revision in there:
            return root / "snapshots" / revision
        reason = f"names revision {revision}, of which snapshots/ has nothing: fetch it again"
        raise LoadError(asked, "refs/main", reason)
    if len(there) == 1:
        return root / "snapshots" / there[0]
    found = ", ".join(there[:_SHOWN_MAX]) or "none"
    raise LoadError(asked, "snapshots", f"found {found}, and no refs/main; name one of them")


def _name_of(folder: Path) -> str:
    inside = folder.parent.name == "snapshots"
    repository = folder.parent.parent.name if inside else folder.name
    if repository.startswith(_CACHED):
        return repository.rsplit("--", 1)[-1]
    return folder.name


def _check_pipeline(asked: str, folder: Path) -> None:
    """The folder has the index of a pipeline, or it is told what the folder is instead."""
    index = folder / INDEX
    if index.is_symlink() or index.exists():
        return
    if (folder / _MODULAR_INDEX).exists():
        reason = f"only a modular pipeline ({_MODULAR_INDEX}); a folder with {INDEX} is needed"
        raise LoadError(asked, INDEX, reason)
    if (folder / "config.json").exists():
        reason = "the folder has no such file; with config.json it is one component of a model"
        raise LoadError(asked, INDEX, reason)
    cached = sorted(path.name for path in folder.glob(f"{_CACHED}*"))
    if cached:
        found = ", ".join(cached[:_SHOWN_MAX])
        reason = f"a hub cache of {len(cached)} repositories; name one of them: {found}"
        raise LoadError(asked, INDEX, reason)
    raise LoadError(asked, INDEX, "the folder has no such file")
