"""The models on this machine, and which of them a MODEL on the command line means.

Knows names, places and which of several files is meant; opens a file only to say its architecture (`list`).
Existing GGUFs are used where they lie: nothing here writes, copies or renames.
"""

from __future__ import annotations

import builtins
import difflib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from edgert.errors import ModelFileError, ModelNotFound, UsageError
from edgert.models.known import KNOWN_MODELS, KnownModel, known_model
from edgert.models.names import HubReference, choose_file, parse_reference, parse_split
from edgert.models.places import places
from edgert.models.scan import FoundModel, scan
from edgert.paths import Paths

MAX_CANDIDATES = 8  # named in one message
MAX_MODEL_CHARS = 4096  # a MODEL longer than a path can be is nobody's name


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One model of `edgert list`. `problem` says why it cannot be opened, and is empty where it can."""

    name: str
    path: Path
    parts: tuple[Path, ...]
    size_bytes: int
    architecture: str
    problem: str
    source: Path  # the directory that was searched
    repo: str | None  # user/repo, where it is known
    repo_path: str  # the path inside the repository
    ours: bool  # in edgert's own directory, so that `edgert rm` may delete it
    unfinished: bool  # a download that `edgert pull` would resume


class Catalog:
    """Finds models by name. The disk is searched once, when the first question needs it."""

    def __init__(self, paths: Paths, models_dirs: Sequence[Path] = (),
                 environ: Mapping[str, str] | None = None) -> None:
        """`models_dirs` come from --models-dir; those of EDGERT_MODELS_DIR and of other programs are added.

        Raises UsageError if one of `models_dirs` is no directory.
        """
        self.paths = paths
        self._places = places(paths.models, models_dirs, os.environ if environ is None else environ)

    def find(self, model: str) -> Path:
        """The file that `model` means: a path, a name of `list`, or user/repo[:quant]; the first of a split model.

        Raises UsageError if several models answer to it, ModelNotFound (with similar names) if none does.
        """
        path = _existing_file(model)
        return path if path is not None else self.entry(model).path

    def entry(self, model: str) -> ModelEntry:
        """As `find`, but only what `list` shows, and without its architecture. The same errors."""
        entries = [entry for entry in self.entries if not entry.unfinished]
        found = matching(entries, model)
        if found is not None:
            return found
        known = known_model(model)
        if known is not None or parse_reference(model) is not None:
            raise ModelNotFound(model, next_step=f"Fetch it with `edgert pull {model}`, or see `edgert list`.")
        raise ModelNotFound(model, near(model, [*(entry.name for entry in entries), *KNOWN_MODELS]))

    def list(self) -> builtins.list[ModelEntry]:
        """Every model with its architecture, edgert's own first, then place by place."""
        return [_described(entry) for entry in self.entries]

    @cached_property
    def entries(self) -> tuple[ModelEntry, ...]:
        """Every model without its architecture: no file is opened."""
        seen: set[tuple[int, int]] = set()
        found = [model for place in self._places for model in scan(place, seen)]
        return tuple(_entry(model, name) for model, name in zip(found, _names(found), strict=True))

    def refresh(self) -> None:
        """Forget what was found: the disk has changed."""
        self.__dict__.pop("entries", None)


def matching(entries: Sequence[ModelEntry], model: str) -> ModelEntry | None:
    """The one entry that `model` means, or None. Raises UsageError naming the candidates if several answer to it."""
    wanted = model.lower()
    found = [entry for entry in entries if wanted == entry.name.lower()] or \
        [entry for entry in entries if wanted in _answers_to(entry)]
    if len(found) > 1:
        raise UsageError(f"{model!r} is the name of {len(found)} models", _choices(found))
    if found:
        return found[0]
    reference = parse_reference(model)
    return None if reference is None else _of_repository(entries, reference)


def existing_parts(path: Path) -> list[Path]:
    """The files of the model at `path`: itself, or those of its parts that are there."""
    split = parse_split(path.name)
    parts = [path.with_name(name) for name in split.parts] if split else [path]
    return [part for part in parts if part.exists()]


def near(model: str, names: Sequence[str]) -> tuple[str, ...]:
    """Up to three of `names` that `model` may be a slip or a piece of."""
    wanted = model.lower()
    if not wanted or len(wanted) > MAX_MODEL_CHARS:
        return ()
    by_lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(wanted, by_lower, n=3, cutoff=0.6)
    pieces = [name for name in by_lower if wanted in name and name not in close]
    return tuple(by_lower[name] for name in [*close, *pieces][:3])


def _of_repository(entries: Sequence[ModelEntry], reference: HubReference) -> ModelEntry | None:
    by_path: dict[str, ModelEntry] = {}
    for entry in entries:
        if (entry.repo or "").lower() == reference.repo.lower():
            by_path.setdefault(entry.repo_path, entry)  # the same file in two places: the more particular place
    chosen = choose_file(by_path, reference.quant)
    return None if chosen is None else by_path[chosen]


def _existing_file(model: str) -> Path | None:
    # os.path, since pathlib raises for a name that is too long or holds a zero byte.
    text = os.path.expanduser(model)  # noqa: PTH111
    if len(text) > MAX_MODEL_CHARS or not os.path.isfile(text):  # noqa: PTH113
        return None
    path = Path(text)
    split = parse_split(path.name)
    first = path.with_name(split.part(1)) if split else path
    return first if first.is_file() else path


def _names(models: Sequence[FoundModel]) -> Iterator[str]:
    """A name for each that no other has: the stem, or user/repo/stem, or the whole path. A known model, where it was
    found first, has its short name."""
    stems = Counter(model.stem.lower() for model in models)
    relative = Counter(model.relative_name.lower() for model in models)
    short = set(KNOWN_MODELS)
    for model in models:
        known = next((name for name in short if _is_known(model.path.name, model.size_bytes, KNOWN_MODELS[name])), None)
        if known is not None and stems[known] == 0:
            short.remove(known)
            yield known
        elif stems[model.stem.lower()] == 1:
            yield model.stem
        else:
            yield model.relative_name if relative[model.relative_name.lower()] == 1 else str(model.path)


def _entry(model: FoundModel, name: str) -> ModelEntry:
    problem = ""
    if model.unfinished:
        problem = "unfinished download"
    elif model.missing:
        total = len(model.parts) + len(model.missing)
        problem = f"{len(model.missing)} of {total} parts missing: {model.missing[0]}"
    return ModelEntry(name, model.path, model.parts, model.size_bytes, "", problem, model.place.path, model.repo,
                      model.repo_path, model.place.ours, model.unfinished)


def _is_known(file_name: str, size_bytes: int, known: KnownModel) -> bool:
    return file_name == known.file_name and size_bytes == known.size_bytes


def _answers_to(entry: ModelEntry) -> set[str]:
    file_name = entry.path.name.lower().removesuffix(".partial")
    names = {entry.name.lower(), file_name, file_name.removesuffix(".gguf")}
    split = parse_split(entry.path.name)
    if split is not None:
        names.add(split.prefix.lower())
    return names | {name for name, known in KNOWN_MODELS.items() if _is_known(entry.path.name, entry.size_bytes, known)}


def _choices(entries: Sequence[ModelEntry]) -> str:
    named = ", ".join(entry.name for entry in entries[:MAX_CANDIDATES])
    more = f" and {len(entries) - MAX_CANDIDATES} more" if len(entries) > MAX_CANDIDATES else ""
    return f"Say which one: {named}{more}."


def _described(entry: ModelEntry) -> ModelEntry:
    if entry.problem:
        return entry
    from edgert.gguf.model_file import ModelFile

    try:
        return replace(entry, architecture=ModelFile.open(entry.path).architecture)
    except ModelFileError as error:
        return replace(entry, problem=error.problem)
    except ModelNotFound as error:  # deleted meanwhile
        return replace(entry, problem=error.message)
    except OSError as error:
        return replace(entry, problem=error.strerror or str(error))
