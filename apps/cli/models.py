"""The subcommands that manage models: `edgert pull`, `list`, `show` and `rm`.

Knows their options and how they look on a terminal and as one line of JSON. Imports only the standard library at
start, since `edgert --help` builds every subcommand's parser.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgert.models.catalog import Catalog, ModelEntry

MAX_NAME_WIDTH = 46  # so that a line of `list` with a size and an architecture fits in 80 columns


def add_subcommands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the four; each sets `func`, which takes the parsed arguments and returns the exit status."""
    pull = subparsers.add_parser("pull", help="fetch a model, unless it is here already",
                                 description="Fetch a model into edgert's own directory. What has arrived of a hub's "
                                             "file before an interruption is not fetched again.")
    pull.add_argument("model", metavar="MODEL", help="a short name such as smollm2-135m, or user/repo[:quant] of the "
                                                     "Hugging Face hub (HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE)")
    listing = subparsers.add_parser("list", help="the models on this machine",
                                    description="The models on this machine: edgert's own, those of --models-dir and "
                                                "EDGERT_MODELS_DIR, and those that other programs keep.")
    show = subparsers.add_parser("show", help="what a model is: shape, bytes, licence",
                                 description="What a model's file says of it.")
    show.add_argument("model", metavar="MODEL", help="a path, a name of `edgert list`, or user/repo[:quant]")
    remove = subparsers.add_parser("rm", help="delete a model that edgert has pulled",
                                   description="Delete a model, all its parts, from edgert's own directory. Files "
                                               "elsewhere are never touched.")
    remove.add_argument("model", metavar="MODEL", help="a name of `edgert list`, a path, or user/repo[:quant]")
    listing.add_argument("--sessions", action="store_true", help="the sessions of `edgert run --session` instead")
    next(action for action in remove._actions if action.dest == "model").nargs = "?"
    remove.add_argument("--session", metavar="NAME", help="delete this session instead of a model")
    for parser, func in ((pull, run_pull), (listing, run_list), (show, run_show), (remove, run_remove)):
        parser.add_argument("--models-dir", metavar="DIR", type=Path, action="append", default=[],
                            help="a directory with GGUF files; may be given several times")
        parser.add_argument("--json", action="store_true", help="print one line of JSON")
        parser.set_defaults(func=func)


def run_pull(args: argparse.Namespace) -> int:
    """Fetch a model; its path goes to standard output, everything else to standard error."""
    from apps.cli.pull_progress import progress_for
    from edgert.errors import Interrupted
    from edgert.models.catalog import existing_parts
    from edgert.models.pull import pull

    try:
        path = pull(args.model, _catalog(args), progress_for(sys.stderr))
    except KeyboardInterrupt:
        raise Interrupted("interrupted", "Pull again; what has arrived of a hub's file is kept.") from None
    size_bytes = sum(part.stat().st_size for part in existing_parts(path))
    print(_json({"model": args.model, "path": str(path), "size_bytes": size_bytes}) if args.json else path)
    return 0


def run_list(args: argparse.Namespace) -> int:
    """Print every model, grouped by the directory that it was found in."""
    from edgert.units import format_bytes

    if args.sessions:
        return _list_sessions(args)
    entries = _catalog(args).list()
    if args.json:
        print(_json({"models": [_entry_json(entry) for entry in entries]}))
        return 0
    if not entries:
        print("No models yet. `edgert pull smollm2-135m` fetches the default one (94 MiB).", file=sys.stderr)
    width = min(MAX_NAME_WIDTH, max((len(entry.name) for entry in entries), default=0))
    source = None
    for entry in entries:
        if entry.source != source:
            print(_shown(_home(entry.source)))
            source = entry.source
        what = entry.problem or entry.architecture
        print(f"  {_shown(entry.name):<{width}}  {format_bytes(entry.size_bytes):>10}  {_shown(what)}")
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Print what a model's file says of it."""
    from apps.cli.model_card import card_json, card_lines
    from edgert.models.describe import describe

    description = describe(_catalog(args).find(args.model))
    print(_json(card_json(description)) if args.json else "\n".join(map(_shown, card_lines(description))))
    return 0


def run_remove(args: argparse.Namespace) -> int:
    """Delete a model of edgert's own, and say what was deleted."""
    from edgert.errors import UsageError
    from edgert.models.remove import remove
    from edgert.units import format_bytes

    if (args.model is None) == (args.session is None):
        raise UsageError("rm takes a MODEL, or --session NAME", "See `edgert rm --help`.")
    if args.session is not None:
        return _remove_session(args)
    removal = remove(args.model, _catalog(args))
    if args.json:
        print(_json({"removed": [str(path) for path in removal.paths], "freed_bytes": removal.freed_bytes}))
        return 0
    for path in removal.paths:
        print(f"removed {_shown(str(path))}")
    print(f"{format_bytes(removal.freed_bytes)} freed")
    return 0


def _list_sessions(args: argparse.Namespace) -> int:
    from edgert.paths import Paths
    from edgert.units import format_bytes
    from retrieval.session_list import list_sessions

    sessions = list_sessions(Paths.of_user().sessions)
    if args.json:
        print(_json({"sessions": [asdict(one) for one in sessions]}))
        return 0
    if not sessions:
        print("No sessions yet. `edgert run MODEL --session NAME` begins one.", file=sys.stderr)
    width = min(MAX_NAME_WIDTH, max((len(one.name) for one in sessions), default=0))
    for one in sessions:
        what = one.problem or f"{one.n_tokens} tokens  {one.model}"
        print(f"{_shown(one.name):<{width}}  {format_bytes(one.size_bytes):>10}  {_shown(what)}")
    return 0


def _remove_session(args: argparse.Namespace) -> int:
    from edgert.paths import Paths
    from edgert.units import format_bytes
    from retrieval.session_list import remove_session

    freed_bytes = remove_session(Paths.of_user().sessions, args.session)
    print(_json({"removed": [args.session], "freed_bytes": freed_bytes}) if args.json
          else f"{format_bytes(freed_bytes)} freed")
    return 0


def _catalog(args: argparse.Namespace) -> Catalog:
    from edgert.models.catalog import Catalog
    from edgert.paths import Paths

    return Catalog(Paths.of_user(), args.models_dir)


def _entry_json(entry: ModelEntry) -> dict[str, Any]:
    return {"name": entry.name, "path": str(entry.path), "size_bytes": entry.size_bytes,
            "architecture": entry.architecture or None, "problem": entry.problem or None,
            "source": str(entry.source), "repo": entry.repo, "n_parts": len(entry.parts), "ours": entry.ours,
            "unfinished": entry.unfinished}


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value)


def _shown(text: str) -> str:
    from edgert.models.names import printable

    return printable(text)


def _home(path: Path) -> str:
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
