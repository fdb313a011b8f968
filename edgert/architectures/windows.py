"""Which layers see only a sliding window of the context (keys {arch}.attention.sliding_window*)."""

from __future__ import annotations

from edgert.errors import ModelFileError
from edgert.gguf.model_file import ModelFile


def window_layers(model: ModelFile, n_layers: int, period: int, *, full_first: bool = False) -> frozenset[int]:
    """The layers with a window: the file names them one by one, or one layer in `period` sees everything.

    The file's own period counts before the given one; 0 means that every layer has a window. The layer that sees
    everything is the period's last, or its first with `full_first`.
    """
    key = "{arch}.attention.sliding_window_pattern"
    if not model.has(key):
        return _periodic(n_layers, period, full_first)
    flags = model.get_ints(key)
    if len(flags) == 1:
        return _periodic(n_layers, flags[0], full_first)
    if len(flags) != n_layers:
        raise ModelFileError(str(model.path), f"sliding_window_pattern has {len(flags)} entries for {n_layers} layers")
    return frozenset(layer for layer, has_window in enumerate(flags) if has_window)


def _periodic(n_layers: int, period: int, full_first: bool) -> frozenset[int]:
    if period == 0:
        return frozenset(range(n_layers))
    full = 0 if full_first else period - 1
    return frozenset(layer for layer in range(n_layers) if layer % period != full)
