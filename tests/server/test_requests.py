"""What happens to requests: cancelled, queued, refused, crashed under, kept alive."""

from __future__ import annotations

import json
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import psutil
import pytest
from served import Served, events

LONG = [{"role": "user", "content": "word " * 2500}]
HELLO = [{"role": "user", "content": "hello"}]
ENDLESS: dict[str, Any] = {"messages": HELLO, "temperature": 0, "stream": True, "stop": None}


def metric(server: Served, name: str) -> float:
    page = server.ask("GET", "/metrics")[1]
    return sum(float(line.rpartition(" ")[2]) for line in page.splitlines()
               if line.partition("{")[0].partition(" ")[0] == name)


def cancelled(server: Served) -> float:
    page = server.ask("GET", "/metrics")[1]
    return sum(float(line.rpartition(" ")[2]) for line in page.splitlines()
               if line.startswith('edgert_requests_total{finish_reason="cancelled"}'))


def hang_up(reply: HTTPResponse) -> None:
    """Close the connection, as a browser tab does."""
    assert reply.fp is not None
    sock: socket.socket = reply.fp.raw._sock  # type: ignore[attr-defined]
    sock.shutdown(socket.SHUT_RDWR)
    reply.close()


def post_raw(server: Served, body: dict[str, Any]) -> socket.socket:
    """A request whose reply nobody waits for yet."""
    data = json.dumps(body).encode()
    sock = socket.create_connection(("127.0.0.1", server.port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n\r\n"
    sock.sendall(head.encode() + data)
    return sock


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_in_prefill_ends_it(stream: bool, busy: Served) -> None:
    before, said = cancelled(busy), metric(busy, "edgert_generation_tokens_total")
    with post_raw(busy, {"messages": LONG, "stream": stream}):
        busy.until(lambda state: state["prefill"], "prefill begins")
    busy.until(lambda state: not state["running"], "prefill ends")
    assert cancelled(busy) == before + 1
    assert metric(busy, "edgert_generation_tokens_total") == said  # no token was computed: it ended in the prompt


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_in_decode_ends_it(stream: bool, busy: Served) -> None:
    before = cancelled(busy)
    request = {**ENDLESS, "stream": stream, "logit_bias": {str(one): -100 for one in (317, 318, 319)}}
    if stream:
        reply = busy.open("POST", "/v1/chat/completions", request)
        assert next(events(reply))["choices"]
        hang_up(reply)
    else:
        with post_raw(busy, request):
            busy.until(lambda state: state["running"], "it runs")
    busy.until(lambda state: not state["running"], "it ends")
    assert cancelled(busy) == before + 1


def test_waiting_clients_see_their_place_and_too_many_are_refused(busy: Served) -> None:
    with post_raw(busy, {"messages": LONG}) as running:
        busy.until(lambda state: state["running"], "the first runs")
        body = {"messages": HELLO, "max_tokens": 1, "stream": True, "return_progress": True}
        waiting = [busy.open("POST", "/v1/chat/completions", {**body, "user": f"user {i}"}) for i in range(3)]
        assert [next(events(reply))["queue"]["requests_ahead"] for reply in waiting] == [1, 2, 3]
        reply = busy.open("POST", "/v1/chat/completions", {"messages": HELLO})
        assert reply.status == 429 and 1 <= int(reply.headers["retry-after"]) <= 120
        assert json.loads(reply.read())["error"]["code"] == "queue_full"
        status, body = busy.ask("GET", "/health")
        assert (status, body) == (200, {"status": "ok"})
        long = busy.open("POST", "/v1/chat/completions", {"messages": LONG * 4, "stream": True})
        assert long.status in (400, 429)
        running.shutdown(socket.SHUT_RDWR)
        for reply in waiting:
            assert list(events(reply))[-1] == "[DONE]"
    assert metric(busy, "edgert_requests_refused_total") >= 1


def test_a_waiting_request_that_does_not_fit_is_refused_before_its_turn(busy: Served) -> None:
    with post_raw(busy, {"messages": LONG}):
        busy.until(lambda state: state["running"], "the first runs")
        status, body = busy.ask("POST", "/v1/chat/completions", {"messages": LONG * 4, "stream": True})
        assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
        assert busy.state()["running"]


def test_an_abort_ends_one_request_and_the_server_goes_on(tmp_path: Path, tiny: Path) -> None:
    with Served(tmp_path, tiny, "--context", "1k") as server:
        assert server.ask("POST", "/v1/chat/completions", {"messages": HELLO, "max_tokens": 1})[0] == 200
        first = server.state()["process"]
        reply = server.open("POST", "/v1/chat/completions",
                            {**ENDLESS, "logit_bias": {str(one): -100 for one in (317, 318, 319)}})
        told = events(reply)
        next(told)
        os.kill(first, signal.SIGABRT)  # what a failed check in ggml does
        last = list(told)[-1]
        assert last["error"]["code"] == "model_crashed" and "SIGABRT" in last["error"]["message"]
        assert server.ask("GET", "/health")[0] == 200
        answer = server.ask("POST", "/v1/chat/completions", {"messages": HELLO, "max_tokens": 1})
        assert answer[0] == 200 and server.state()["process"] != first
        os.kill(server.state()["process"], signal.SIGKILL)
        assert server.ask("POST", "/v1/chat/completions", {"messages": HELLO, "max_tokens": 1})[0] in (200, 500)
        assert server.ask("POST", "/v1/chat/completions", {"messages": HELLO, "max_tokens": 1})[0] == 200
        assert server.stop() == 0


def test_a_model_is_loaded_when_asked_and_given_back_when_idle(tmp_path: Path, tiny: Path) -> None:
    with Served(tmp_path, "--keep-alive", "1", "--models-dir", tiny.parent) as server:
        assert server.state()["process"] is None
        status, body = server.ask("POST", "/v1/chat/completions", {"model": tiny.stem, "messages": HELLO,
                                                                   "max_tokens": 1})
        assert status == 200 and body["model"] == tiny.stem
        (worker,) = psutil.Process(server.process.pid).children()
        server.until(lambda state: state["process"] is None and not worker.is_running(), "unloading")
        assert server.ask("POST", "/v1/chat/completions", {"messages": HELLO, "max_tokens": 1})[0] in (200, 404)


def test_a_server_that_is_killed_takes_its_model_with_it(tmp_path: Path, tiny: Path) -> None:
    with Served(tmp_path, tiny) as server:
        assert server.ask("POST", "/v1/chat/completions", {"messages": HELLO, "max_tokens": 1})[0] == 200
        worker = psutil.Process(server.state()["process"])
        server.kill()
        assert worker.wait(60) is not None or not worker.is_running()


def test_a_small_storm_leaves_nothing_behind(served: Served) -> None:
    """A dose of benchmarks/server_load.py: many at once, a third of them leaving in the middle."""
    process = psutil.Process(served.process.pid)
    body = {"messages": HELLO, "max_tokens": 8, "temperature": 0}
    right = served.ask("POST", "/v1/chat/completions", body)[1]["choices"][0]["message"]["content"]
    n_files, n_threads = process.num_fds(), process.num_threads()

    def client(number: int) -> bool:
        if number % 3 == 0:
            reply = served.open("POST", "/v1/chat/completions", {**body, "stream": True})
            next(events(reply), None)
            hang_up(reply)
            return True
        status, answer = served.ask("POST", "/v1/chat/completions", body)
        return status == 200 and answer["choices"][0]["message"]["content"] == right

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(client, range(36)))
    served.until(lambda state: not state["running"] and not state["waiting"], "quiet")
    served.until(lambda _: process.num_fds() <= n_files, "files are closed")
    assert process.num_threads() <= n_threads + 16  # to_thread's pool, which is bounded


def test_the_state_and_the_metrics_tell_what_goes_on(served: Served) -> None:
    served.ask("POST", "/v1/chat/completions", {"messages": HELLO, "max_tokens": 9})
    state = served.state()
    assert state["context_length"] == 8192 and state["plan"]["weights"] == "resident" and state["memory"]["rss_bytes"]
    page = served.ask("GET", "/metrics")[1]
    for name in ("requests_running", "requests_waiting", "kv_cache_usage_ratio", "weight_cache_bytes", "rss_bytes",
                 "prompt_tokens_total", "generation_tokens_total", "weight_read_bytes_total",
                 "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket"):
        assert f"\nedgert_{name}" in page
    told = events(served.open("GET", "/edgert/events"))
    assert next(told)["model"] == state["model"]


def test_tokens_are_counted_and_a_budget_can_be_set_and_refused(tmp_path: Path, tiny: Path) -> None:
    with Served(tmp_path, tiny, "--context", "512") as server:
        status, counted = server.ask("POST", "/edgert/tokens", {"texts": ["hello", ""]})
        assert status == 200 and counted["counts"][0] > 0 == counted["counts"][1]
        status, told = server.ask("POST", "/edgert/models/load", {"memory": 2**20})
        assert status == 400 and "smallest that works" in told["error"]["message"]
        status, _ = server.ask("POST", "/edgert/models/load", {"memory": 2**30})
        assert status == 200 and server.state()["budget_bytes"] == 2**30
        assert server.ask("POST", "/v1/chat/completions", {"messages": HELLO, "max_tokens": 1})[0] == 200
        assert server.ask("POST", "/edgert/models/unload")[0] == 200 and server.state()["process"] is None
