"""/health, /metrics, /edgert/state, /edgert/events and the models with their forecasts: what goes on in the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import edgert
from apps.server import measures
from apps.server.asked import Prefill
from apps.server.bodies import read_json
from apps.server.fields import Fields
from apps.server.forecast import Forecast, Shape, Speeds, forecast, learned, planned
from apps.server.guard import client_of
from apps.server.host import Host
from apps.server.replies import Json, Refusal, answering_errors
from apps.server.shelf import ShelfModel
from apps.server.streams import event, sse, while_client_waits
from edgert.errors import InvalidRequest, OutOfMemory
from edgert.memory.probe import MemoryProbe
from edgert.models.describe import Description
from edgert.paths import Paths

_WATCH_S = 0.5  # how often the state is compared for whoever listens
MAX_BUDGET_BYTES = 2**50
_DEFAULT_CONTEXT = 8192  # Runtime's own, where nothing is asked for
_SHARE_OF_AVAILABLE = 0.9  # what Runtime takes of the memory that is left


class StateRoutes:
    """The routes, over one host."""

    def __init__(self, host: Host, probe: MemoryProbe) -> None:
        self._host, self._probe, self._paths = host, probe, Paths.of_user()
        self._speeds = Speeds()
        self._learned_from: tuple[str, float] | None = None
        host.measures.watch("edgert_requests_running", "Requests being answered", lambda: host.running is not None)
        host.measures.watch("edgert_requests_waiting", "Requests in the queue", lambda: host.n_waiting)
        host.measures.watch("edgert_rss_bytes", "Resident memory of the server and the model's process",
                            self._rss_bytes)

    def routes(self) -> list[Route]:
        health = answering_errors(self.health)
        return [Route("/health", health), Route("/v1/health", health),
                Route("/metrics", answering_errors(self.metrics)),
                Route("/edgert/state", answering_errors(self.state)),
                Route("/edgert/events", answering_errors(self.events)),
                Route("/edgert/models", answering_errors(self.models)),
                Route("/edgert/forecast", answering_errors(self.predict)),
                Route("/edgert/models/load", answering_errors(self.load), methods=["POST"]),
                Route("/edgert/models/unload", answering_errors(self.unload), methods=["POST"]),
                Route("/edgert/tokens", answering_errors(self.tokens), methods=["POST"])]

    async def health(self, _: Request) -> Response:
        if self._host.loading is not None:
            return Json({"status": "loading model"}, 503)
        return Json({"status": "ok"})

    async def metrics(self, _: Request) -> Response:
        return Response(self._host.measures.page(), media_type=measures.CONTENT_TYPE)

    async def state(self, _: Request) -> Response:
        return Json(self._state())

    async def events(self, _: Request) -> Response:
        return sse(self._changes(), lambda: None)

    async def _changes(self) -> AsyncIterator[bytes]:
        """The state now, and whenever it is another."""
        last: dict[str, Any] | None = None
        while True:
            state = self._state()
            if last is None or {**state, "memory": None} != {**last, "memory": None}:
                yield event(state, "state")
                last = state
            await asyncio.sleep(_WATCH_S)

    def _state(self) -> dict[str, Any]:
        host = self._host
        loaded, progress = host.loaded, host.progress
        return {"version": edgert.__version__, "model": loaded.name if loaded else None, "loading": host.loading,
                "process": loaded.process.pid if loaded and loaded.process.alive else None,
                "plan": loaded.process.info["plan"] if loaded else None,
                "context_length": loaded.process.info["context_length"] if loaded else None,
                "budget_bytes": host.load_options.memory, "context_option": host.load_options.context,
                "running": host.running is not None, "waiting": host.n_waiting,
                "prefill": asdict(progress) if isinstance(progress, Prefill) else None,
                "memory": {**(dict(loaded.process.info["memory"]) if loaded else {}), "rss_bytes": self._rss_bytes(),
                           "available_bytes": self._probe.available_bytes()},
                "tokens_per_second": host.measures.tokens_per_s.get(loaded.name) if loaded else None,
                "cluster": cluster_of(loaded.process.info["plan"]) if loaded else None}

    def _rss_bytes(self) -> int:
        loaded = self._host.loaded
        pids = [psutil.Process().pid, *([loaded.process.pid] if loaded and loaded.process.alive else [])]
        total = 0
        for pid in pids:
            try:
                total += psutil.Process(pid).memory_info().rss
            except psutil.Error:
                continue
        return total

    async def models(self, request: Request) -> Response:
        """Every model with its forecast within the budget that holds now; ?fresh=1 looks at the disk first."""
        if request.query_params.get("fresh") == "1":
            self._host.shelf.forget()
        budget_bytes = self.budget_bytes()
        models = await self._host.shelf.list()
        return Json({"budget_bytes": budget_bytes, "available_bytes": self._probe.available_bytes(),
                     "total_bytes": psutil.virtual_memory().total, "default": self._host.shelf.default_name,
                     "models": [self._told(model, budget_bytes) for model in models]})

    def _told(self, model: ShelfModel, budget_bytes: int) -> dict[str, Any]:
        known, loaded = model.description, self._host.loaded
        predicted = self._forecast(model.path, known, budget_bytes, None).to_dict() if known else None
        return {"name": model.name, "size_bytes": model.size_bytes, "problem": model.problem or None,
                "architecture": known.architecture if known else None,
                "quantisation": known.quantisation if known else None,
                "n_parameters": known.n_parameters if known else None,
                "context_length": known.context_length if known else None,
                "licence": known.licence if known else None,
                "has_chat_template": known.has_chat_template if known else False,
                "loaded": loaded is not None and loaded.path == model.path, "forecast": predicted}

    async def predict(self, request: Request) -> Response:
        """What a model would do within ?memory= bytes and ?context= tokens."""
        query = Fields({key: int(value) if value.isdigit() and len(value) < 18 else value
                        for key, value in request.query_params.items() if key != "model"})
        memory = query.whole("memory", 1, MAX_BUDGET_BYTES)
        context = query.whole("context", 8, 2**24)
        name, path = await self._host.shelf.find(request.query_params.get("model"))
        for model in await self._host.shelf.list():
            if model.path == path and model.description is not None:
                told = self._forecast(path, model.description, memory or self.budget_bytes(), context)
                return Json({"model": name, **told.to_dict()})
        raise Refusal(404, f"{name} cannot be read", "Fetch it again.", "model_not_found")

    def _forecast(self, path: Path, model: Description, budget_bytes: int, context: int | None) -> Forecast:
        self._learn(model)
        length = context or self._host.load_options.context or _DEFAULT_CONTEXT
        return planned(self._paths, path, budget_bytes, length) \
            or forecast(Shape.of(model), budget_bytes, length, self._speeds)

    def _learn(self, model: Description) -> None:
        """Take the speed of the last answer, once, where it was this model's."""
        loaded = self._host.loaded
        speed = self._host.measures.tokens_per_s.get(loaded.name) if loaded else None
        if loaded is None or speed is None or loaded.path != model.path or self._learned_from == (loaded.name, speed):
            return
        self._learned_from = loaded.name, speed
        streamed = int(loaded.process.info["plan"].get("streamed_bytes_per_pass", 0))
        self._speeds = learned(self._speeds, Shape.of(model), speed, streamed)

    def budget_bytes(self) -> int:
        """The memory that a model would get now."""
        asked = self._host.load_options.memory
        held = self._rss_bytes() if self._host.loaded is not None else 0
        return asked if asked is not None else held + int(self._probe.available_bytes() * _SHARE_OF_AVAILABLE)

    async def load(self, request: Request) -> Response:
        """Load a model within a budget (`memory` in bytes; null for what is left) and with a `context` (0 for the
        model's own; null for the one before)."""
        fields = Fields(await read_json(request))
        context = fields.whole("context", 0, 2**24, self._host.load_options.context)
        options = replace(self._host.load_options, memory=fields.whole("memory", 1, MAX_BUDGET_BYTES),
                          context=context or None)
        model = fields.text("model", None, 4096)
        before = self._host.load_options
        try:
            loaded = await while_client_waits(request, self._host.ready(model, client_of(request), options))
        except BaseException as error:
            self._host.load_options = before  # the budget was impossible: the next request must not meet it
            if isinstance(error, OutOfMemory):  # by the client's own wish
                raise Refusal(400, error.message, error.next_step, "budget_too_small") from error
            raise
        return Json({"model": loaded.name, **loaded.process.info})

    async def unload(self, _: Request) -> Response:
        if self._host.running is not None:
            raise InvalidRequest("an answer is being made", "Stop it first.")
        await self._host.unload()
        return Json({"model": None})

    async def tokens(self, request: Request) -> Response:
        """Token counts of texts, as the model sees them."""
        fields = Fields(await read_json(request))
        texts = fields.items("texts", 64)
        if not all(isinstance(text, str) for text in texts):
            raise fields.wrong("texts", "a list of texts")
        counts = await self._host.count_tokens(fields.text("model", None, 4096), texts, client_of(request))
        return Json({"counts": counts})


def cluster_of(plan: Mapping[str, Any]) -> dict[str, Any] | None:
    """The devices of a plan with their shares of the weights, and why these; None where no cluster was asked for."""
    told = plan.get("cluster")
    if told is None:
        return None
    whole_bytes = sum(one["bytes"] for one in told["devices"])
    devices = [{"name": one["name"], "bytes": one["bytes"], "share": round(one["bytes"] / max(1, whole_bytes), 4)}
               for one in told["devices"]]
    return {"devices": devices, "reason": told["reason"], "wire": told["wire"]}
