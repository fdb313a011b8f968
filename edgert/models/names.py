"""What model names and file names mean: `user/repo:quant`, split GGUFs, and which file of a repository to take.

Pure functions over strings; knows nothing of disks or networks. Names from a server are hostile (`safe_relative`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

# The hub's own limit is 96 characters for each half; neither half may start with a dot or a dash.
_HALF = r"[A-Za-z0-9_][\w.-]{0,95}"
_REFERENCE = re.compile(rf"(?P<repo>{_HALF}/{_HALF})(?::(?P<quant>[\w.-]{{1,200}}))?", re.ASCII)
_SPLIT = re.compile(r"(?P<prefix>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf", re.ASCII | re.DOTALL)
# Files beside a model that are GGUFs too, but no language models: projectors, importance matrices, draft heads.
_COMPANIONS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
_DEFAULT_QUANTS = ("Q4_K_M", "Q8_0")  # the order in which llama.cpp's -hf looks
MAX_PATH_CHARS = 512  # a repository's path longer than this is no model's
MAX_COMPONENT_BYTES = 200  # file systems allow 255; `.partial.json.tmp` is added to it
MAX_PATH_DEPTH = 6
MAX_SHOWN_CHARS = 300
MAX_PARTS = 1000  # of a split GGUF; the largest published models have about 100


@dataclass(frozen=True, slots=True)
class HubReference:
    """A repository of the hub, and which of its files: a quantisation such as `Q4_K_M`, or a file name, or None."""

    repo: str
    quant: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}:{self.quant}" if self.quant else self.repo


@dataclass(frozen=True, slots=True)
class SplitName:
    """`PREFIX-00002-of-00003.gguf` taken apart; `index` counts from 1."""

    prefix: str
    index: int
    count: int

    def part(self, index: int) -> str:
        return f"{self.prefix}-{index:05d}-of-{self.count:05d}.gguf"

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.part(index) for index in range(1, self.count + 1))


def parse_reference(model: str) -> HubReference | None:
    """`user/repo[:quant]`, or None for anything else (a path to a .gguf file among it)."""
    match = _REFERENCE.fullmatch(model)
    if match is None or match["repo"].lower().endswith(".gguf"):
        return None
    return HubReference(match["repo"], match["quant"])


def parse_split(name: str) -> SplitName | None:
    """The split name in a file name or path, or None if the file stands alone or its numbers make no sense."""
    match = _SPLIT.fullmatch(name)
    if match is None:
        return None
    split = SplitName(match["prefix"], int(match["index"]), int(match["count"]))
    return split if 1 <= split.index <= split.count <= MAX_PARTS else None


def is_model(path: str) -> bool:
    """Whether the name is a language model's: a GGUF, and none of the companions that lie beside models."""
    name = path.rpartition("/")[2].lower()
    return name.endswith(".gguf") and not any(word in name for word in _COMPANIONS)


def choose_file(paths: Iterable[str], quant: str | None) -> str | None:
    """The path that `quant` means, the first part of it where it is split; None if there is no such file.

    As llama.cpp's `-hf` chooses: the first path that holds the quantisation, in any case, before a `.` or `-`;
    without one Q4_K_M, then Q8_0, then the first model. `quant` may also be a file's whole name.
    """
    models = [path for path in paths if is_model(path) and _is_first(path)]
    if quant is None:
        preferred = (_holding(models, name) for name in _DEFAULT_QUANTS)
        return next((path for path in preferred if path), next(iter(models), None))
    name = quant.lower().removesuffix(".gguf")
    exact = (path for path in models if stem(path.rpartition("/")[2]).lower() == name)
    return next(exact, None) or _holding(models, quant)


def prefers(path: str, reference: HubReference) -> bool:
    """Whether `path` is surely what the reference means, whatever else its repository holds."""
    return choose_file([path], reference.quant or _DEFAULT_QUANTS[0]) is not None


def parts_of(path: str, paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """All parts of the model that `path` belongs to, in order: those among `paths`, and those that are missing."""
    split = parse_split(path)
    wanted = split.parts if split else (path,)
    present = set(paths)
    return [part for part in wanted if part in present], [part for part in wanted if part not in present]


def stem(file_name: str) -> str:
    """The name without `.gguf` and without the number of the part."""
    split = parse_split(file_name)
    if split is not None:
        return split.prefix
    return file_name[: -len(".gguf")] if file_name.lower().endswith(".gguf") else file_name


def safe_relative(path: object) -> PurePosixPath | None:
    """`path` if it is a GGUF's path that stays below the directory it is joined to, else None.

    Refused: what is no string, absolute paths, `..`, hidden names, backslashes, control characters, overlong names.
    """
    if not isinstance(path, str) or not path.lower().endswith(".gguf") or len(path) > MAX_PATH_CHARS:
        return None
    components = path.split("/")
    if len(components) > MAX_PATH_DEPTH or not path.isprintable() or "\\" in path or ":" in path:
        return None
    for component in components:
        if not component or component.startswith(".") or len(component.encode()) > MAX_COMPONENT_BYTES:
            return None
    return PurePosixPath(path)


def printable(text: str, limit: int = MAX_SHOWN_CHARS) -> str:
    """`text` of a stranger, fit for one line of a terminal: no control characters, bounded."""
    shown = "".join(c if c.isprintable() else "?" for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _is_first(path: str) -> bool:
    split = parse_split(path)
    return split is None or split.index == 1


def _holding(paths: Sequence[str], quant: str) -> str | None:
    # The boundary before it keeps F16 from meaning BF16.
    pattern = re.compile(rf"(?<![A-Za-z0-9]){re.escape(quant)}[.-]", re.IGNORECASE)
    return next((path for path in paths if pattern.search(path)), None)
