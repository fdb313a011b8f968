"""The README and CONTRIBUTING lead somewhere: what they name exists, and says what they say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgert import errors
from edgert.architectures.registry import SUPPORTED

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md") if (ROOT / name).exists()]
# Where something of the repository can lie; what begins otherwise in backticks is a command, a name or a value.
_PLACES = ("apps", "benchmarks", "edgert", "offload", "retrieval", "tensorpar", "tests", ".ci")
_IN_BACKTICKS = re.compile(rf"`((?:{'|'.join(map(re.escape, _PLACES))})/[\w./-]*"
                           r"|[A-Z]\w*\.md|LICENSE|Makefile|pyproject\.toml)`")
_IN_A_FIGURE = re.compile(rf"(?<![\w./~-])((?:{'|'.join(map(re.escape, _PLACES))})/[\w./-]+)")


def named_paths(text: str) -> Iterator[str]:
    """Every path of the repository that the text names: in backticks, and in its indented figures and commands."""
    yield from _IN_BACKTICKS.findall(text)
    for line in text.splitlines():
        if line.startswith("    "):
            yield from (path.rstrip(".") for path in _IN_A_FIGURE.findall(line))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_that_is_named_exists(document: Path) -> None:
    paths = list(named_paths(document.read_text()))
    assert paths
    missing = [path for path in paths if not (ROOT / path.rstrip("/")).exists()]
    assert missing == [], f"{document.name} names what is not there"


def test_paths_are_found_where_they_are_named() -> None:
    text = ("`edgert/runtime.py` and `edgert run MODEL`, `make test`, `LICENSE`, `CONTRIBUTING.md`, `tests/engine/`\n"
            "    ├──▶ edgert/engine/resident.py | offload/window.py   where `x/y` is ~/edgert/models, ./tests/a.py\n"
            "prose about edgert/nothing.py")
    assert list(named_paths(text)) == ["edgert/runtime.py", "LICENSE", "CONTRIBUTING.md", "tests/engine/",
                                       "edgert/engine/resident.py", "offload/window.py"]


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="there is no README yet")
def test_the_readme_names_every_architecture_and_exit_code() -> None:
    text = (ROOT / "README.md").read_text()
    assert [name for name in SUPPORTED if name not in text] == []
    codes = {one.exit_code for one in vars(errors).values()
             if isinstance(one, type) and issubclass(one, errors.EdgertError)}
    documented = {int(code) for code in re.findall(r"\| (\d+) \|", text)}
    assert codes - documented == set()
