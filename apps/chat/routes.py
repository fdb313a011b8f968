"""The chat app's own API, under /edgert/chats, /edgert/messages and their like: what the page does, and its answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote, unquote

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from apps.chat import transfer
from apps.chat.answers import Answers
from apps.chat.attachments import safe_name, text_of
from apps.chat.database import Database
from apps.chat.records import Chat, Message
from apps.chat.store import title_of
from apps.server.bodies import read_body, read_json
from apps.server.fields import Fields
from apps.server.guard import client_of
from apps.server.host import Host
from apps.server.openai_requests import read_sampling
from apps.server.replies import Json, Refusal, answering_errors
from apps.server.settings import MAX_UPLOAD_BYTES
from apps.server.streams import event, sse
from edgert.errors import EdgertError

_MAX_TITLE_CHARS, _MAX_SYSTEM_CHARS, _MAX_CONTENT_CHARS = 200, 2**18, 2**22
_MAX_FILES = 20
_CHARS_PER_TOKEN = 4  # of English, for a count without a model


class ChatRoutes:
    """The routes, over one database and the answers in the making."""

    def __init__(self, host: Host, database: Database, answers: Answers) -> None:
        self._host, self._database, self._answers = host, database, answers

    def routes(self) -> list[Route]:
        table = [("GET", "/chats", self.list), ("POST", "/chats", self.create), ("GET", "/chats/{id}", self.read),
                 ("PATCH", "/chats/{id}", self.change), ("DELETE", "/chats/{id}", self.delete),
                 ("POST", "/chats/{id}/messages", self.send), ("POST", "/chats/{id}/summarise", self.summarise),
                 ("GET", "/chats/{id}/export", self.export), ("GET", "/export", self.export_all),
                 ("POST", "/import", self.load), ("GET", "/search", self.search),
                 ("POST", "/messages/{id}/regenerate", self.regenerate), ("POST", "/messages/{id}/edit", self.edit),
                 ("POST", "/messages/{id}/stop", self.stop), ("GET", "/messages/{id}/events", self.events),
                 ("POST", "/attachments", self.attach), ("GET", "/presets", self.presets),
                 ("POST", "/presets", self.save_preset), ("DELETE", "/presets/{id}", self.delete_preset)]
        return [Route(f"/edgert{path}", answering_errors(route), methods=[method]) for method, path, route in table]

    async def list(self, _: Request) -> Response:
        chats = await self._database.do(lambda store: store.chats())
        return Json({"chats": [chat.to_dict() for chat in chats]})

    async def create(self, request: Request) -> Response:
        values = _chat_values(Fields(await read_json(request)))
        chat = await self._database.do(lambda store: store.create_chat(
            values.get("title") or "New chat", values.get("system") or "", values.get("model"), values.get("settings")))
        return Json(chat.to_dict(), 201)

    async def read(self, request: Request) -> Response:
        chat_id = request.path_params["id"]
        chat = await self._database.do(lambda store: store.chat(chat_id))
        messages = await self._database.do(lambda store: store.messages(chat_id))
        return Json({**chat.to_dict(), "messages": [self._told(one) for one in messages]})

    def _told(self, message: Message) -> dict[str, Any]:
        """A message; of one that is being written, what it says by now."""
        running = self._answers.running(message.id)
        return {**message.to_dict(), **({"content": running.text} if running is not None else {})}

    async def change(self, request: Request) -> Response:
        fields = Fields(await read_json(request))
        values = _chat_values(fields)
        if fields.has("leaf_id"):
            values["leaf_id"] = fields.required_text("leaf_id", 64)
        chat = await self._database.do(lambda store: store.change_chat(request.path_params["id"], **values))
        return Json(chat.to_dict())

    async def delete(self, request: Request) -> Response:
        chat_id = request.path_params["id"]
        for message in await self._database.do(lambda store: store.messages(chat_id)):
            self._answers.stop(message.id)
        await self._database.do(lambda store: store.delete_chat(chat_id))
        return Json({"deleted": chat_id})

    async def send(self, request: Request) -> Response:
        """A user's message, and the beginning of its answer."""
        fields = Fields(await read_json(request))
        content = fields.text("content", "", _MAX_CONTENT_CHARS) or ""
        parent_id, files = fields.text("parent_id", None, 64), _file_ids(fields)
        if not content.strip() and not files:
            raise fields.wrong("content", "a text")
        chat = await self._chat(request.path_params["id"])
        await self._host.shelf.find(chat.model)  # refused before anything is written
        message = await self._database.do(lambda store: store.add_message(chat.id, parent_id, "user", content,
                                                                          attachment_ids=files))
        if parent_id is None and chat.title == "New chat":
            title = title_of(content or message.attachments[0].name)
            chat = await self._database.do(lambda store: store.change_chat(chat.id, title=title))
        return await self._answered(request, chat, message)

    async def _answered(self, request: Request, chat: Chat, message: Message) -> Response:
        """The message with its answer; without one where the queue is full, so that the message is not lost."""
        try:
            answer = await self._answers.start(chat, message.id, client_of(request))
        except EdgertError as error:
            from apps.server.replies import error_body

            return Json({"message": message.to_dict(), "answer": None, **error_body(error)}, 201)
        return Json({"message": message.to_dict(), "answer": answer.to_dict()}, 201)

    async def regenerate(self, request: Request) -> Response:
        """Another answer beside this one (or the first to a user's message). `leave_out` allows to drop old turns, from
        here on: whoever was asked once is not asked at every turn."""
        fields = Fields(await read_json(request))
        message = await self._message(request)
        parent_id = message.id if message.role == "user" else message.parent_id
        if parent_id is None:
            raise Refusal(400, "this message answers nothing")
        chat = await self._chat(message.chat_id)
        if fields.flag("leave_out"):
            settings = {**chat.settings, "leave_out": True}
            chat = await self._database.do(lambda store: store.change_chat(message.chat_id, settings=settings))
        answer = await self._answers.start(chat, parent_id, client_of(request), model=fields.text("model", None, 4096))
        return Json({"answer": answer.to_dict()}, 201)

    async def edit(self, request: Request) -> Response:
        """Another version of a message beside it; a user's is answered anew."""
        fields = Fields(await read_json(request))
        content = fields.required_text("content", _MAX_CONTENT_CHARS)
        message = await self._message(request)
        new = await self._database.do(lambda store: store.add_message(message.chat_id, message.parent_id, message.role,
                                                                      content, model=message.model))
        await self._database.do(lambda store: store.copy_attachments(message.id, new.id))
        if new.role == "assistant":
            return Json({"message": new.to_dict(), "answer": None}, 201)
        return await self._answered(request, await self._chat(new.chat_id), new)

    async def stop(self, request: Request) -> Response:
        return Json({"stopped": self._answers.stop(request.path_params["id"])})

    async def events(self, request: Request) -> Response:
        """What an answer says, from its beginning; of one that is finished, its end."""
        message = await self._message(request)
        return sse(self._follow(message), lambda: None)

    async def _follow(self, message: Message) -> AsyncIterator[bytes]:
        running = self._answers.running(message.id)
        if running is None:
            finished = await self._database.do(lambda store: store.message(message.id))
            yield event({"message": finished.to_dict()}, "end")
            return
        async for name, data in running.follow():
            yield event(data, name)

    async def summarise(self, request: Request) -> Response:
        """A new chat that begins with a summary of this one."""
        chat = await self._chat(request.path_params["id"])
        if chat.leaf_id is None:
            raise Refusal(400, "the chat is empty")
        new, answer = await self._answers.summarise(chat, chat.leaf_id, client_of(request))
        return Json({"chat": new.to_dict(), "answer": answer.to_dict()}, 201)

    async def search(self, request: Request) -> Response:
        text = request.query_params.get("q", "")[:500]
        return Json({"hits": [hit.to_dict() for hit in await self._database.do(lambda store: store.search(text))]})

    async def export(self, request: Request) -> Response:
        """One chat: ?format=md is the branch that is shown, json everything."""
        chat = await self._chat(request.path_params["id"])
        if request.query_params.get("format", "json") == "md":
            leaf = chat.leaf_id
            branch = await self._database.do(lambda store: store.branch(leaf)) if leaf else []
            return _file(transfer.to_markdown(chat, branch).encode(), f"{chat.title}.md", "text/markdown")
        messages = await self._database.do(lambda store: store.messages(chat.id))
        return _file(Json(transfer.to_json([(chat, messages)])).body, f"{chat.title}.json", "application/json")

    async def export_all(self, _: Request) -> Response:
        chats = await self._database.do(lambda store: [(chat, store.messages(chat.id)) for chat in store.every_chat()])
        return _file(Json(transfer.to_json(chats)).body, "edgert-chats.json", "application/json")

    async def load(self, request: Request) -> Response:
        """Add the chats of an exported file."""
        chats = transfer.from_json(await read_json(request))
        for chat, messages in chats:
            await self._database.do(lambda store, c=chat, m=messages: store.insert_all(c, m))  # type: ignore[misc]
        return Json({"chats": [chat.to_dict() for chat, _ in chats]}, 201)

    async def attach(self, request: Request) -> Response:
        """A file's bytes as the body, its name in X-File-Name (percent-encoded); its token count comes back."""
        name = safe_name(unquote(request.headers.get("x-file-name", "")[:2000]))
        content = await text_of(name, await read_body(request, MAX_UPLOAD_BYTES))
        model = request.query_params.get("model")
        try:
            (n_tokens,), exact = await self._host.count_tokens(model, [content], client_of(request)), True
        except EdgertError:  # no model yet
            n_tokens, exact = -(-len(content) // _CHARS_PER_TOKEN), False
        attachment = await self._database.do(lambda store: store.add_attachment(name, content, n_tokens))
        return Json({**attachment.to_dict(), "exact": exact}, 201)

    async def presets(self, _: Request) -> Response:
        return Json({"presets": [one.to_dict() for one in await self._database.do(lambda store: store.presets())]})

    async def save_preset(self, request: Request) -> Response:
        fields = Fields(await read_json(request))
        values, name = _chat_values(fields), fields.required_text("name", _MAX_TITLE_CHARS).strip()
        if not name:
            raise fields.wrong("name", "a name")
        preset = await self._database.do(lambda store: store.save_preset(name, values.get("system") or "",
                                                                         values.get("settings") or {}))
        return Json(preset.to_dict(), 201)

    async def delete_preset(self, request: Request) -> Response:
        await self._database.do(lambda store: store.delete_preset(request.path_params["id"]))
        return Json({"deleted": request.path_params["id"]})

    async def _chat(self, chat_id: str) -> Chat:
        return await self._database.do(lambda store: store.chat(chat_id))

    async def _message(self, request: Request) -> Message:
        return await self._database.do(lambda store: store.message(request.path_params["id"]))


def _chat_values(fields: Fields) -> dict[str, Any]:
    """The changes of a chat that a request names, checked."""
    values: dict[str, Any] = {}
    for name, max_chars in (("title", _MAX_TITLE_CHARS), ("system", _MAX_SYSTEM_CHARS), ("model", 4096)):
        if fields.has(name):
            values[name] = fields.text(name, None, max_chars)
    settings = fields.object("settings")
    if settings is not None:
        own = {"max_tokens": settings.whole("max_tokens", 1, 2**31 - 1),
               "leave_out": settings.flag("leave_out") or None}
        values["settings"] = {**read_sampling(settings), **{name: one for name, one in own.items() if one is not None}}
    return values


def _file_ids(fields: Fields) -> list[str]:
    ids = fields.items("attachments", _MAX_FILES)
    if not all(isinstance(one, str) and len(one) <= 64 for one in ids):
        raise fields.wrong("attachments", "ids of attached files")
    return ids


def _file(body: bytes | memoryview, name: str, media_type: str) -> Response:
    """A reply that a browser saves; it is never shown as a page."""
    return Response(bytes(body), media_type=media_type, headers={
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}"})
