"""The arrays that the modules here hand to each other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]  # of tokens in their text, or of their rows in a buffer
Halves = NDArray[np.float16]  # keys and values, as they lie in a cache
Floats = NDArray[np.float32]
Amounts = NDArray[np.float64]  # shared out among tokens: float32 would lose the order of those that a sure head leaves
