"""Arithmetic rounded to float32 after every step, as llama.cpp's C computes it.

One rounding more or less in a constant moves the last bit of every logit.
"""

from __future__ import annotations

import ctypes
import math


def float32(value: float) -> float:
    """`value` rounded to float32. A product, quotient or root of float32 values loses nothing by the detour."""
    return ctypes.c_float(value).value


def inverse_sqrt(n: float) -> float:
    """1 / sqrt(n), with the root and the quotient each rounded."""
    return float32(1.0 / float32(math.sqrt(n)))
