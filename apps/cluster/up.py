"""`edgert cluster up`: this device works for the one that it joined, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import logging
import signal
from contextlib import nullcontext
from pathlib import Path
from types import FrameType

from apps.cluster.pair import listening, required
from edgert.cpu import usable_cores
from edgert.device import cluster_profile
from edgert.engine.collective import Collective
from edgert.engine.engine import Engine
from edgert.ggml.library import load_libraries
from edgert.gguf.model_file import ModelFile
from edgert.paths import Paths
from edgert.planning import EngineOptions
from edgert.runtime import open_engine
from tensorpar import discovery
from tensorpar.messages import Settings
from tensorpar.profile import COMMON_TYPES
from tensorpar.slice_cache import DEFAULT_CAP_BYTES, SliceCache
from tensorpar.worker import Worker

_HEAD_DIM = 128  # of most models; what is measured for others is not far off
_log = logging.getLogger(__name__)


def up(port: int, *, memory_bytes: int | None, n_threads: int | None, cache_bytes: int | None,
       announces: bool = True) -> int:
    membership, paths = required("worker"), Paths.of_user()
    identity, n_cores = membership.identity, n_threads or usable_cores()
    load_libraries()

    def open_slice(path: Path, settings: Settings, collective: Collective) -> Engine:
        options = EngineOptions(memory_bytes, settings.context_length, n_cores, settings.batch_size, settings.kv_type,
                                settings.layout)
        return open_engine(ModelFile.open(path), paths, options, collective=collective)

    with listening(port) as server:
        cache = SliceCache(paths, cache_bytes or DEFAULT_CAP_BYTES)
        profile = cluster_profile(paths, EngineOptions(memory_bytes, n_threads=n_cores), COMMON_TYPES, _HEAD_DIM,
                                  cache.largest())
        worker = Worker(server, paths, profile, open_slice, cache)

        def stop(number: int, frame: FrameType | None) -> None:
            worker.stop()

        handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            bound = server.getsockname()[1]
            with discovery.announced("work", identity.fingerprint, bound) if announces else nullcontext():
                print(f"{membership.name} works on port {bound}. Ctrl-C ends it.", flush=True)
                worker.serve()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return 0
