"""How a server is to run: values read once from the command line. Knows bounds, does nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensorpar.workers import ClusterOptions

DEFAULT_KEEP_ALIVE_S = 15 * 60.0
MAX_BODY_BYTES = 16 * 2**20  # as much as the tokenizer takes
MAX_UPLOAD_BYTES = 32 * 2**20  # an attachment before its text is taken out
MAX_WAITING = 64  # requests in the queue; each may hold a body
BODY_DEADLINE_S = 60.0  # for a client that sends its request slowly
PING_S = 15.0  # silence after which a streamed answer says that it lives


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What Runtime.load is told besides the model."""

    memory: int | None = None
    context: int | None = None
    threads: int | None = None
    batch: int = 512
    kv_type: str = "f16"
    layout: str = "auto"
    models_dirs: tuple[Path, ...] = ()
    kv_budget: int | str | None = None  # tokens that a step attends to, or "full"
    kv_store: Path | None = None
    cluster: ClusterOptions | None = None

    def to_frame(self) -> Mapping[str, Any]:
        return {"memory": self.memory, "context": self.context, "threads": self.threads, "batch": self.batch,
                "kv_type": self.kv_type, "layout": self.layout, "models_dirs": [str(one) for one in self.models_dirs],
                "kv_budget": self.kv_budget, "kv_store": None if self.kv_store is None else str(self.kv_store),
                "cluster": None if self.cluster is None else asdict(self.cluster)}


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """`host` is where to listen; `api_key` None asks for none. `keep_alive_s` None keeps a model loaded for ever."""

    host: str = "127.0.0.1"
    api_key: str | None = None
    allowed_hosts: frozenset[str] = frozenset()
    cors_origins: frozenset[str] = frozenset()
    keep_alive_s: float | None = DEFAULT_KEEP_ALIVE_S
    max_waiting: int = MAX_WAITING
    load: LoadOptions = field(default_factory=LoadOptions)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on `host`."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
