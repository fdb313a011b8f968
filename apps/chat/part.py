"""The chat app as a part of the server: its page, its API, its database, fetching models."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from apps.chat.answers import Answers
from apps.chat.database import Database
from apps.chat.downloads import Downloads, suggest
from apps.chat.routes import ChatRoutes
from apps.server.app import Part
from apps.server.bodies import read_json
from apps.server.fields import Fields
from apps.server.forecast import Speeds
from apps.server.host import Host
from apps.server.replies import Json, answering_errors
from edgert.memory.probe import MemoryProbe
from edgert.models.catalog import Catalog

STATIC = Path(__file__).parent / "static"
_SHARE_OF_AVAILABLE = 0.9


class ChatPart(Part):
    """Conversations lie in `chats.sqlite3` beside the models directory, or at `path`."""

    def __init__(self, host: Host, catalog: Catalog, path: Path | None = None) -> None:
        self._host, self._catalog = host, catalog
        self._database = Database(path or catalog.paths.models.parent / "chats.sqlite3")
        self._answers = Answers(host, self._database)
        self._downloads = Downloads(catalog)
        self.routes: list[BaseRoute] = [
            Route("/", self._page), Mount("/static", _Files(directory=STATIC)),
            Route("/edgert/first-run", answering_errors(self._first_run)),
            Route("/edgert/download", answering_errors(self._download), methods=["GET", "POST", "DELETE"]),
            *ChatRoutes(host, self._database, self._answers).routes()]

    async def open(self) -> None:
        await self._database.open()

    async def close(self) -> None:
        await self._downloads.close()
        await self._answers.close()
        await self._database.close()

    async def _page(self, _: Request) -> Response:
        return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})

    async def _first_run(self, _: Request) -> Response:
        """Models to begin with, and where a file of the user's own may be put."""
        memory = self._host.load_options.memory or int(MemoryProbe().available_bytes() * _SHARE_OF_AVAILABLE)
        return Json({"models_dir": str(self._catalog.paths.models), "suggestions": [
            {"model": one.model, "title": one.title, "about": one.about, "size_bytes": one.file_bytes,
             "forecast": predicted.to_dict()} for one, predicted in suggest(memory, Speeds())]})

    async def _download(self, request: Request) -> Response:
        """POST starts one, GET says how far it is, DELETE stops it."""
        if request.method == "POST":
            self._downloads.start(Fields(await read_json(request)).required_text("model", 512))
        elif request.method == "DELETE":
            self._downloads.stop()
        current = self._downloads.current
        if current is not None and current.finished:
            self._host.shelf.forget()
        return Json({"download": current.to_dict() if current is not None else None})


class _Files(StaticFiles):
    """The page's files; a browser asks each time whether they have changed, as they do with an update."""

    def file_response(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        reply = super().file_response(*args, **kwargs)
        reply.headers.setdefault("Cache-Control", "no-cache")
        return reply
