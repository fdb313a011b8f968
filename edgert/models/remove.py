"""Deletes a model, all parts of it, from edgert's own directory and from nowhere else.

Knows what is edgert's: a plain file whose directory, with all links resolved, lies inside the models directory.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from edgert.errors import UsageError
from edgert.models.catalog import Catalog, existing_parts, matching
from edgert.models.names import parse_split
from edgert.models.partial import is_locked, partial_path, sidecar_path


@dataclass(frozen=True, slots=True)
class Removal:
    """What was deleted, and how many bytes that gave back."""

    paths: tuple[Path, ...]
    freed_bytes: int


def remove(model: str, catalog: Catalog) -> Removal:
    """Delete the model, or the unfinished download, that `model` means.

    Raises UsageError, with nothing deleted, if it is not edgert's own or is being fetched; ModelNotFound.
    """
    files = _files(model, catalog)
    models = catalog.paths.models.resolve()
    for file in files:
        _require_ours(file, models)
    targets = _targets(files[0])
    for target in targets:
        if is_locked(target):
            raise UsageError(f"{target} is being fetched by another process", "End that process first.")
    leftovers = [path for target in targets for path in (partial_path(target), sidecar_path(target))]
    removed: dict[Path, int] = {}
    for file in [*files, *leftovers]:
        with contextlib.suppress(FileNotFoundError):
            size_bytes = file.lstat().st_size
            file.unlink()
            removed[file] = size_bytes
    _remove_empty(targets[0].parent, models)
    catalog.refresh()
    return Removal(tuple(removed), sum(removed.values()))


def _files(model: str, catalog: Catalog) -> list[Path]:
    # What is edgert's comes first, so that a second copy elsewhere does not make the name ambiguous.
    own = [entry for entry in catalog.entries if entry.ours]
    for unfinished in (False, True):
        entry = matching([entry for entry in own if entry.unfinished == unfinished], model)
        if entry is not None:
            return list(entry.parts)
    path = catalog.find(model)
    return existing_parts(path) or [path]


def _targets(file: Path) -> list[Path]:
    """The names of all parts of the model, whether they are there, begun, or neither."""
    target = file.with_name(file.name.removesuffix(".partial"))
    split = parse_split(target.name)
    return [target.with_name(name) for name in split.parts] if split else [target]


def _require_ours(file: Path, models: Path) -> None:
    """Raises UsageError unless `file` is a plain GGUF inside `models`, which is resolved."""
    if file.is_symlink():
        raise UsageError(f"{file} is a link to {file.resolve()}",
                         "edgert deletes only what it has pulled; delete it yourself.")
    directory = file.parent.resolve()
    if not directory.is_relative_to(models):
        raise UsageError(f"it lies at {directory / file.name}, outside edgert's models ({models})",
                         "edgert deletes only what it has pulled; delete it yourself.")
    if not file.is_file() or not file.name.removesuffix(".partial").lower().endswith(".gguf"):
        raise UsageError(f"{file} is no model", "See `edgert list`.")


def _remove_empty(directory: Path, models: Path) -> None:
    """Remove the directories that the model leaves empty, up to the models directory itself."""
    with contextlib.suppress(OSError):  # the first that is not empty
        while directory.resolve() != models:
            directory.rmdir()
            directory = directory.parent
