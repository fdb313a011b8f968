"""`edgert serve` and `edgert chat`: one server, told about as an address or shown as a window.

Knows options and what is printed. The server is apps/server, the page apps/chat; both are imported when they start.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from apps.cli.arguments import add_cluster_options, add_engine_options, cluster_options, token_count, whole

if TYPE_CHECKING:
    import socket

    from apps.server.settings import ServerSettings

_SERVE = """\
Serve models over HTTP: OpenAI's API under /v1, Ollama's under /api, and a chat
page at /. Without MODEL, requests name one of `edgert list`. Any address but
this machine's own asks clients for an API key.
"""
_CHAT = """\
Open the chat app: a window where pywebview is installed (the extra `desktop`),
else the browser. Conversations are kept on this machine.
"""
_PORT, _CHAT_PORT = 7441, 7442


def add_subcommands(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add both; `func` takes the parsed arguments and returns the exit status."""
    server = subparsers.add_parser("serve", help="serve models over HTTP, as OpenAI's API", description=_SERVE,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    chat = subparsers.add_parser("chat", help="open the chat app", description=_CHAT,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    for parser in (server, chat):
        parser.add_argument("model", nargs="?", metavar="MODEL",
                            help="a path, a name of `edgert list`, or user/repo:quant")
        group = parser.add_argument_group("server")
        group.add_argument("--port", type=_port, default=_PORT if parser is server else None, metavar="N",
                           help=f"where to listen ({_PORT if parser is server else _CHAT_PORT}; 0 is any)")
        group.add_argument("--keep-alive", type=_seconds, default=900.0, metavar="TIME",
                           help="unload an idle model after this time: 90s, 15m, 1h; -1 is never (15m)")
        add_engine_options(parser)
        parser.add_argument("--context", type=token_count, metavar="N",
                            help="tokens of prompt and answer together: 8192 or 8k")
        add_cluster_options(parser)
    group = server.add_argument_group("network")
    group.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (127.0.0.1)")
    group.add_argument("--insecure", action="store_true", help="ask for no API key, whatever the address")
    group.add_argument("--allow-host", action="append", default=[], metavar="NAME",
                       help="a name under which clients reach the server; may be given several times")
    group.add_argument("--cors-origin", action="append", default=[], metavar="ORIGIN",
                       help="a site whose pages may use the server; may be given several times")
    group.add_argument("--queue", type=whole, default=64, metavar="N", help="requests that may wait (64)")
    chat.add_argument("--browser", action="store_true", help="open the browser, not a window")
    chat.set_defaults(host="127.0.0.1", insecure=False, allow_host=[], cors_origin=[], queue=64)
    server.set_defaults(func=run_serve)
    chat.set_defaults(func=run_chat)


def run_serve(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM, which end it in order."""
    from apps.server.serving import listen, run, url_of

    with listen(args.host, args.port) as listening:
        url = url_of(args.host, listening)
        app, settings = _application(args)
        server = run(app, listening, lambda: _say(f"edgert serves on {url} (chat: {url}/)"))
        server.run(sockets=[listening])
        assert settings is not None
    return 0


def run_chat(args: argparse.Namespace) -> int:
    """Serve this machine alone, and show the page until its window is closed or Ctrl-C."""
    from apps.chat.window import show
    from apps.server.serving import run, url_of

    with _listen_for_chat(args.host, args.port) as listening:
        app, _ = _application(args)
        return show(lambda ready: run(app, listening, ready), listening, url_of(args.host, listening),
                    browser=args.browser)


def _listen_for_chat(host: str, port: int | None) -> socket.socket:
    """Where the user said; else always at the same port, by which a browser knows the user's choices again, unless
    somebody is there."""
    from apps.server.serving import listen
    from edgert.errors import UsageError

    if port is not None:
        return listen(host, port)
    try:
        return listen(host, _CHAT_PORT)
    except UsageError:
        return listen(host, 0)


def _application(args: argparse.Namespace) -> tuple[Any, ServerSettings]:
    from apps.chat.part import ChatPart
    from apps.server.app import build_app
    from apps.server.host import Host
    from apps.server.measures import Measures
    from apps.server.serving import api_key
    from apps.server.settings import LoadOptions, ServerSettings
    from apps.server.shelf import Shelf
    from edgert.models.catalog import Catalog
    from edgert.paths import Paths

    paths = Paths.of_user()
    catalog = Catalog(paths, args.models_dir)
    served = catalog.find(args.model) if args.model else None  # refused now, not at the first request
    key, said = api_key(args.host, paths.config, args.insecure)
    if said:
        _say(said)
    load = LoadOptions(args.memory, args.context, args.threads, args.batch, args.kv_type, args.layout,
                       tuple(args.models_dir), args.kv_budget, args.kv_store, cluster_options(args))
    settings = ServerSettings(args.host, key, frozenset(args.allow_host), frozenset(args.cors_origin),
                              None if args.keep_alive < 0 else args.keep_alive, args.queue, load)
    host = Host(settings, Shelf(catalog, served), Measures())
    return build_app(host, lambda host: [ChatPart(host, catalog)]), settings


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _port(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 6 else -1
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return number


def _seconds(text: str) -> float:
    """`90s`, `15m`, `1h` or a number of seconds; -1 is for ever."""
    if text == "-1":
        return -1.0
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("s", "m", "h") else (text, "s")
    if not (number.isascii() and number.isdigit() and len(number) < 8):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90s, 15m or 1h")
    return float(number) * {"s": 1, "m": 60, "h": 3600}[unit]
