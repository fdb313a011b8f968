"""Text that lies on any machine with Python: code of the standard library, prose of packages' descriptions.

Knows which files may be learned from, and which are kept for evaluation (benchmarks/longcontext.py reads those).
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from zlib import crc32

MIN_BYTES, MAX_BYTES = 2_000, 400_000  # shorter files teach little, longer ones are data
_MAX_FILES = 20_000
_PROSE, _CODE = (".md", ".rst", ".txt", ".pod"), (".py", ".c", ".h", ".js", ".rs", ".go", ".java")


@dataclass(frozen=True, slots=True)
class Document:
    """One text, and whether it is code."""

    name: str
    text: str
    is_code: bool


def is_for_evaluation(path: Path) -> bool:
    """Whether a file is kept from training: an eighth of all, by their names; and Python's reference (topics.py)."""
    return path.name == "topics.py" or crc32(f"{path.parent.name}/{path.name}".encode()) % 8 == 0


def documents(directories: Sequence[Path], seed: int, *, evaluation: bool = False) -> list[Document]:
    """Every usable text, shuffled: of `directories`, or of this machine's Python where there are none."""
    found = list(_own_files(directories) if directories else _installed_files())
    chosen = [path for path in found if is_for_evaluation(path) == evaluation]
    read = [document for path in chosen[:_MAX_FILES] if (document := _read(path)) is not None]
    if not directories:
        read += [prose for code in read if code.is_code and (prose := _docstrings(code)) is not None]
    Random(seed).shuffle(read)
    return read


def _installed_files() -> Iterator[Path]:
    library, packages = (Path(sysconfig.get_paths()[key]) for key in ("stdlib", "purelib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3", "encodings"}
    for path in sorted(library.rglob("*.py")):
        if skipped.isdisjoint(path.relative_to(library).parts):
            yield path
    yield from sorted(packages.glob("*.dist-info/METADATA"))
    yield from sorted(packages.glob("*.dist-info/**/LICENSE*"))


def _own_files(directories: Sequence[Path]) -> Iterator[Path]:
    for directory in directories:
        yield from sorted(path for path in directory.rglob("*") if path.suffix in (*_PROSE, *_CODE))


def _read(path: Path) -> Document | None:
    try:
        if not path.is_file() or not MIN_BYTES <= path.stat().st_size <= MAX_BYTES:
            return None
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if path.name == "METADATA":  # a message: its headers say nothing
        text = text.partition("\n\n")[2]
    return Document(path.name, text, path.suffix in _CODE) if len(text) >= MIN_BYTES else None


def _docstrings(code: Document) -> Document | None:
    """The documentation inside a module of Python, as prose of its own."""
    try:
        tree = ast.parse(code.text)
    except (SyntaxError, ValueError):
        return None
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [text for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node))]
    prose = "\n\n".join(text for text in texts if len(text) > 80)
    return Document(f"{code.name} (documentation)", prose, False) if len(prose) >= MIN_BYTES else None
