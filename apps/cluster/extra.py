"""The packages that only a cluster needs, and what to do where they are missing."""

from __future__ import annotations

from importlib.util import find_spec

from edgert.errors import ClusterError

_PACKAGES = ("cryptography", "ifaddr", "spake2", "zeroconf")


def require_packages() -> None:
    """Raises ClusterError naming what is not installed."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise ClusterError(f"a cluster needs {', '.join(missing)}", "Install them: pip install 'edgert[cluster]'.")
