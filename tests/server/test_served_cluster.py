"""A server whose model is computed by several devices: it answers, tells their shares, and outlives a loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from served import Served

from apps.server.state_routes import cluster_of
from benchmarks.cluster_processes import cluster

BODY: dict[str, Any] = {"prompt": list(range(5, 25)), "max_tokens": 8, "temperature": 0}


def value(page: str, name: str) -> float:
    """A figure of /metrics."""
    return float(page.partition(f"\n{name} ")[2].partition("\n")[0])


def test_devices_and_shares_are_told_and_a_lost_one_is_not_missed(tiny_model: Callable[..., Path],
                                                                  tmp_path: Path) -> None:
    model = tiny_model("qwen2", quantisation="F32", n_heads=8, n_kv_heads=4, head_dim=32, n_layers=4)
    with cluster(tmp_path, 1) as devices, Served(devices.leader_home, model, "--context", "512", "--cluster",
                                                 "--devices", "all") as server:
        text = server.ask("POST", "/v1/completions", BODY)[1]["choices"][0]["text"]
        told = server.state()["cluster"]
        assert [one["name"] for one in told["devices"]] == ["leader", "worker1"] and told["reason"]
        assert sum(one["share"] for one in told["devices"]) == 1 and all(one["bytes"] for one in told["devices"])
        page = server.ask("GET", "/metrics")[1]
        for direction in ("sent", "received"):
            assert value(page, f'edgert_peer_bytes_total{{direction="{direction}",peer="worker1"}}') > 10_000
        n_sums = BODY["max_tokens"] * (2 * 4 - 1)  # the prompt's pass gives the first token
        assert value(page, "edgert_allreduce_seconds_count") == n_sums
        assert value(page, 'edgert_allreduce_seconds_bucket{le="+Inf"}') == n_sums
        assert 0 < value(page, "edgert_allreduce_seconds_sum") < 100
        devices.workers[0].kill()
        assert server.ask("POST", "/v1/completions", BODY)[1]["choices"][0]["text"] == text
        assert [one["name"] for one in server.state()["cluster"]["devices"]] == ["leader"]


def test_a_plan_without_devices_has_no_cluster() -> None:
    assert cluster_of({"weights": "resident"}) is None
