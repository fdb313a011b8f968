"""Where edgert keeps what belongs to the user: models, configuration, caches.

`EDGERT_HOME` moves everything under one directory; otherwise the platform's own places are used (XDG on Linux).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Paths:
    """The directories of one user. Nothing is created until something is written."""

    models: Path
    config: Path
    cache: Path

    @property
    def heads(self) -> Path:
        """Retrieval heads that were distilled here."""
        return self.models.parent / "heads"

    @property
    def sessions(self) -> Path:
        """Keys and values of conversations that go on later."""
        return self.models.parent / "sessions"

    @classmethod
    def of_user(cls) -> Paths:
        home = os.environ.get("EDGERT_HOME")
        if home:
            root = Path(home).expanduser()
            return cls(root / "models", root / "config", root / "cache")
        import platformdirs

        return cls(Path(platformdirs.user_data_dir("edgert")) / "models",
                   Path(platformdirs.user_config_dir("edgert")), Path(platformdirs.user_cache_dir("edgert")))
