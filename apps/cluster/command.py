"""`edgert cluster`: the devices of a person as one. Options only; what they do is in the modules beside.

Imports nothing heavy: `edgert --help` builds all of this.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from apps.cli.arguments import Parser, add_model_options, token_count, whole
from apps.cluster.extra import require_packages
from edgert.units import parse_bytes

_PORT = 7440
_DESCRIPTION = """\
Let several devices answer together. On the device that holds the models:
`init` once, then `invite`, which shows a short code. On each other device:
`join CODE`, then `up`. After that `edgert run MODEL --cluster`.
"""


def add_subcommands(subparsers: argparse._SubParsersAction[Any]) -> Iterable[argparse.ArgumentParser]:
    """Add `cluster`; gives the parsers of its own commands."""
    parser = subparsers.add_parser("cluster", help="let several devices answer together", description=_DESCRIPTION,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    own: argparse._SubParsersAction[Any] = parser.add_subparsers(title="commands", metavar="COMMAND", required=True,
                                                                 parser_class=Parser)
    init = own.add_parser("init", help="let this device lead (once)")
    init.add_argument("--name", metavar="NAME", help="what others call it (default: its host name)")
    init.set_defaults(func=_init)
    invite = own.add_parser("invite", help="show a code with which one device may join")
    invite.add_argument("--port", type=whole, default=_PORT, help=f"where to wait for it ({_PORT})")
    invite.add_argument("--json", action="store_true", help="print the code as an object, at once")
    invite.set_defaults(func=_invite)
    join = own.add_parser("join", help="pair with the device that shows a code")
    join.add_argument("code", metavar="CODE", help="such as 7-otter-lamp")
    join.add_argument("--peer", metavar="HOST:PORT", help="where it waits, if mDNS does not find it")
    join.add_argument("--name", metavar="NAME", help="what others call this device (default: its host name)")
    join.add_argument("--port", type=whole, default=_PORT, help=f"where this device will work ({_PORT})")
    join.set_defaults(func=_join)
    _add_up(own)
    status = own.add_parser("status", help="who is there, and what each does")
    status.add_argument("--watch", action="store_true", help="again every second, until Ctrl-C")
    status.add_argument("--json", action="store_true", help="print one line: an object")
    status.add_argument("--peer", action="append", default=[], metavar="HOST:PORT", help="where a device is")
    status.set_defaults(func=_status)
    doctor = own.add_parser("doctor", help="find out why a device is not reached, and what helps")
    doctor.add_argument("--peer", action="append", default=[], metavar="HOST:PORT", help="where a device is")
    doctor.set_defaults(func=_doctor)
    plan = own.add_parser("plan", help="predict the speed of every useful set of devices")
    add_model_options(plan)
    plan.add_argument("--context", type=token_count, metavar="N", help="tokens of prompt and answer together")
    plan.add_argument("--peer", action="append", default=[], metavar="HOST:PORT", help="where a device is")
    plan.add_argument("--json", action="store_true", help="print one line: an object")
    plan.set_defaults(func=_plan)
    forget = own.add_parser("forget", help="trust a device no longer")
    forget.add_argument("name", metavar="NAME", help="as `status` shows it")
    forget.set_defaults(func=_forget)
    return own.choices.values()


def _add_up(own: argparse._SubParsersAction[Any]) -> None:
    up = own.add_parser("up", help="let this device work for the one that it joined")
    up.add_argument("--memory", type=parse_bytes, metavar="SIZE", help="memory for all of it, such as 2G; what does "
                                                                        "not fit streams from disk")
    up.add_argument("--threads", type=whole, metavar="N", help="threads that compute (default: physical cores)")
    up.add_argument("--port", type=whole, default=_PORT, help=f"where to listen ({_PORT})")
    up.add_argument("--cache", type=parse_bytes, metavar="SIZE", help="disk space for parts of models (64G)")
    up.add_argument("--no-mdns", action="store_true", help="do not announce this device on the network")
    up.set_defaults(func=_up)


def _init(args: argparse.Namespace) -> int:
    require_packages()
    from apps.cluster.pair import init

    return init(args.name)


def _invite(args: argparse.Namespace) -> int:
    require_packages()
    from apps.cluster.pair import invite

    return invite(args.port, as_json=args.json)


def _join(args: argparse.Namespace) -> int:
    require_packages()
    from apps.cluster.pair import join

    return join(args.code, args.peer, args.name, args.port)


def _up(args: argparse.Namespace) -> int:
    require_packages()
    from apps.cluster.up import up

    return up(args.port, memory_bytes=args.memory, n_threads=args.threads, cache_bytes=args.cache,
              announces=not args.no_mdns)


def _status(args: argparse.Namespace) -> int:
    require_packages()
    from apps.cluster.status import status

    return status(args.peer, watch=args.watch, as_json=args.json)


def _doctor(args: argparse.Namespace) -> int:
    require_packages()
    from apps.cluster.doctor import doctor

    return doctor(args.peer)


def _plan(args: argparse.Namespace) -> int:
    require_packages()
    from apps.cluster.plan import plan

    return plan(args)


def _forget(args: argparse.Namespace) -> int:
    require_packages()
    from apps.cluster.pair import forget

    return forget(args.name)
