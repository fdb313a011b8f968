"""`edgert cluster plan MODEL`: how fast every useful set of devices would answer, predicted from measurements."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from edgert.architectures.registry import open_architecture
from edgert.cpu import usable_cores
from edgert.device import cluster_profile, matrix_types
from edgert.ggml.library import load_libraries
from edgert.gguf.model_file import ModelFile
from edgert.models.catalog import Catalog
from edgert.paths import Paths
from edgert.planning import EngineOptions, context_length_of
from edgert.units import format_bytes
from tensorpar.members import Membership, parse_address
from tensorpar.planner import Device, Prediction, predictions, reason
from tensorpar.shares import Cut
from tensorpar.workers import ClusterOptions, Workers

_SHOWN = 16
_log = logging.getLogger(__name__)


def plan(args: argparse.Namespace) -> int:
    membership = Membership.leading(Paths.of_user())
    file = ModelFile.open(Catalog(Paths.of_user(), args.models_dir).find(str(Path(args.model))))
    load_libraries()
    arch = open_architecture(file)
    workers = Workers(membership, ClusterOptions("all", tuple(map(parse_address, args.peer))), lambda: False)
    try:
        for problem in workers.connect():
            _log.warning("%s", problem)
        options = EngineOptions(args.memory, n_threads=args.threads or usable_cores())
        own = cluster_profile(Paths.of_user(), options, matrix_types(file), arch.hp.head_dim, file.path)
        devices = [Device(membership.name, own),
                   *(Device(one.member.name, one.profile, one.latency_s, one.bytes_per_s)
                     for one in workers.connected)]
    finally:
        workers.close()
    found = predictions(Cut.of(file, arch, context_length_of(arch, options), options.kv_type), arch.hp, devices)
    if args.json:
        print(json.dumps({"model": str(file.path), "predictions": [_object(one) for one in found],
                          "reason": reason(found[0], found)}))
        return 0
    print(f"{'tokens/s':>9} {'compute ms':>11} {'network ms':>11} {'from disk':>11}  devices")
    for one in found[:_SHOWN]:
        print(f"{one.tokens_per_s:>9.1f} {one.compute_s * 1000:>11.1f} {one.network_s * 1000:>11.1f} "
              f"{format_bytes(one.missing_bytes):>11}  {', '.join(one.devices)}")
    print(reason(found[0], found))
    return 0


def _object(one: Prediction) -> dict[str, object]:
    return {"devices": list(one.devices), "tokens_per_s": round(one.tokens_per_s, 3),
            "compute_ms": round(one.compute_s * 1000, 3), "network_ms": round(one.network_s * 1000, 3),
            "missing_bytes": one.missing_bytes,
            "parts": [{"heads": part.heads, "ffn": part.ffn, "head_rows": part.head_rows} for part in one.shards]}
