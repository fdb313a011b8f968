"""edgert: language models on devices that are too small for them. Start with `Runtime.load`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgert.version import VERSION

if TYPE_CHECKING:
    from edgert.runtime import Runtime
    from edgert.text.sampler import SamplingParams

__all__ = ["Runtime", "SamplingParams"]
__version__ = VERSION


def __getattr__(name: str) -> Any:
    # Lazy: `edgert --help` and the packages that Runtime composes must not pull in numpy and ggml.
    if name == "Runtime":
        from edgert.runtime import Runtime

        return Runtime
    if name == "SamplingParams":
        from edgert.text.sampler import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'edgert' has no attribute {name!r}")
