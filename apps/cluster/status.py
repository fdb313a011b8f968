"""`edgert cluster status`: which devices are there, what each does, and what went wrong last."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from apps.cli.terminal import without_controls
from apps.cluster.pair import required
from edgert.errors import ClusterError
from edgert.units import format_bytes
from tensorpar.members import Member, Membership, parse_address
from tensorpar.peer import ask_status

_EVERY_S = 1.0
_CLEAR = "\x1b[H\x1b[2J"


def status(peers: Sequence[str], *, watch: bool, as_json: bool) -> int:
    membership = required()
    addresses = [parse_address(one) for one in peers]
    while True:
        seen = ask_all(membership, addresses)
        if as_json:
            print(json.dumps({"name": membership.name, "role": membership.role, "devices": seen}), flush=True)
        else:
            print((_CLEAR if watch else "") + "\n".join(lines(membership, seen)), flush=True)
        if not watch:
            return 0
        time.sleep(_EVERY_S)


def ask_all(membership: Membership, addresses: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """Every worker's own words, or why there are none. On a worker: who leads it."""
    if membership.role == "worker":
        return [{"name": one.name, "role": "leader"} for one in membership.members]
    with ThreadPoolExecutor(max(1, len(membership.members)), "status") as pool:
        return list(pool.map(lambda one: _ask(membership, one, addresses), membership.members))


def _ask(membership: Membership, member: Member, addresses: Sequence[tuple[str, int]]) -> dict[str, Any]:
    problem = "nobody knows where it is"
    for host, port in (*addresses, *([(member.host, member.port)] if member.host else [])):
        try:
            return {**ask_status(member, membership.identity, host, port), "name": member.name, "role": "worker",
                    "address": f"{host}:{port}"}
        except ClusterError as error:
            problem = error.message
    return {"name": member.name, "role": "worker", "problem": problem}


def lines(membership: Membership, devices: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A table for 100 columns."""
    yield f"{membership.name} {'leads' if membership.role == 'leader' else 'works'}; {len(devices)} other devices"
    if not devices or membership.role == "worker":
        yield from (f"  {one['name']} leads" for one in devices)
        return
    yield f"  {'device':<16} {'state':<14} {'part':>10} {'memory':>10} {'speed':>10} {'rtt ms':>7} " \
          f"{'compute':>8} {'wait':>6}  last error"
    for one in devices:
        yield without_controls(_line(one))


def _line(one: dict[str, Any]) -> str:
    if "problem" in one:
        return f"  {one['name']:<16} {'away':<14} {one['problem']}"
    session, profile = one.get("session"), one.get("profile") or {}
    state = "waits" if not session else f"rank {session.get('rank')} of {session.get('world_size')}"
    part = format_bytes(session["slice_bytes"]) if session else "-"
    compute = wait = "-"
    if session and session["session_s"] > 0:
        share = min(1.0, session["compute_s"] / session["session_s"])
        compute, wait = f"{share:.0%}", f"{1 - share:.0%}"
    return (f"  {one['name']:<16} {state:<14} {part:>10} {format_bytes(int(profile.get('memory_bytes', 0))):>10} "
            f"{format_bytes(int(profile.get('bytes_per_s', 0))):>8}/s {one.get('rtt_ms', 0):>7.2f} {compute:>8} "
            f"{wait:>6}  {one.get('last_error') or '-'}")
