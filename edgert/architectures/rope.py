"""Rotary position embedding as a file asks for it: none, linear or YaRN scaling.

Llama 3's frequency factors are a tensor (`rope_freqs.weight`), not a key: edgert/architectures/llama.py.
"""

from __future__ import annotations

import math

from edgert.architectures.rounding import float32
from edgert.errors import ModelFileError
from edgert.ggml.graph import Rope
from edgert.gguf.model_file import ModelFile

# Far beyond every published model (base 5e8, factor 64), and tame enough that angles stay finite in float32.
_MAX_BASE, _MIN_FACTOR, _MAX_FACTOR = 1e12, 1e-3, 1e6


def read_rope(model: ModelFile, mode: int, head_dim: int, context_length: int) -> Rope:
    """The keys {arch}.rope.*. Raises ModelFileError for values that no rotation can have."""
    path = str(model.path)
    n_dims = model.get_int("{arch}.rope.dimension_count", head_dim)
    if not 2 <= n_dims <= head_dim or n_dims % 2:
        raise ModelFileError(path, f"rope.dimension_count is {n_dims}, expected an even number up to {head_dim}")
    base = read_frequency_base(model, "{arch}.rope.freq_base", 10000.0)
    scaling = model.get_str("{arch}.rope.scaling.type", "linear")
    if scaling not in ("none", "linear", "yarn"):
        raise ModelFileError(path, f"RoPE scaling {scaling!r} is not supported",
                             "Supported: none, linear, yarn, and Llama 3's frequency factors.")
    scale = 1.0 if scaling == "none" else read_frequency_scale(model)
    attention_factor = model.get_float("{arch}.rope.scaling.attn_factor", 1.0)
    if not 0 < attention_factor <= _MAX_FACTOR:
        raise ModelFileError(path, f"rope.scaling.attn_factor is {attention_factor}, which is impossible")
    if scaling == "yarn":
        attention_factor = float32(_yarn_attention_factor(scale) * attention_factor)
    original = model.get_int("{arch}.rope.scaling.original_context_length", 0) or context_length
    return Rope(n_dims, mode, original, base, scale, 1.0 if scaling == "yarn" else 0.0, attention_factor)


def read_frequency_base(model: ModelFile, key: str, default: float) -> float:
    base = model.get_float(key, default)
    if not 0 < base <= _MAX_BASE:
        raise ModelFileError(str(model.path), f"{key.format(arch=model.architecture)} is {base}, which is impossible")
    return base


def read_frequency_scale(model: ModelFile) -> float:
    """1 / rope.scaling.factor; 1 where the file has none or 0. An old key stands in for the new one."""
    factor = model.get_float("{arch}.rope.scaling.factor", model.get_float("{arch}.rope.scale_linear", 0.0))
    if factor and not _MIN_FACTOR <= factor <= _MAX_FACTOR:
        raise ModelFileError(str(model.path), f"rope.scaling.factor is {factor}, which is impossible")
    return float32(1.0 / factor) if factor else 1.0


def _yarn_attention_factor(scale: float) -> float:
    """What to give ggml so that attention grows by YaRN's 0.1 ln(s) + 1 (arXiv 2309.00071, equation 22).

    ggml multiplies by that growth itself; llama.cpp divides it out again and puts its own in. The two cancel but for
    the last bit, which counts where logits are to be equal.
    """
    factor = float32(1.0 / scale)
    growth = float32(1.0 + float32(float32(0.1) * float32(math.log(factor))))
    wanted = growth if factor > 1.0 else 1.0
    return float32(wanted * float32(1.0 / growth))
