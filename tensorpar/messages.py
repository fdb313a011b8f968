"""What leader and worker tell each other in JSON, each field checked for its type and its bounds."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, cast, get_args

from edgert.architectures.base import MAX_CONTEXT
from edgert.engine.kv_cache import KVType
from edgert.engine.layouts import LayoutChoice
from tensorpar.collectives import Algorithm, Network
from tensorpar.frames import BadFrame
from tensorpar.identity import check_certificate
from tensorpar.members import MAX_MEMBERS
from tensorpar.slice_cache import KEY_BYTES
from tensorpar.wire import WIRES, WireName

_MAX_BATCH = 8192
_KEY = re.compile(rf"[0-9a-f]{{{2 * KEY_BYTES}}}", re.ASCII)
_MAX_SLICE_BYTES = 2**44
_MEETING = re.compile(r"[0-9a-f]{32}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Settings:
    """How every rank opens its engine: all caches hold the same tokens, all batches are cut alike. With a budget of its
    own, a rank takes layout `auto` for `plain`."""

    context_length: int
    batch_size: int
    kv_type: KVType
    layout: LayoutChoice


@dataclass(frozen=True, slots=True)
class Setup:
    """One rank's part in an epoch. `slice_key` (hex) and `slice_bytes` say what it must have."""

    epoch: int
    rank: int
    world_size: int
    slice_key: str
    slice_bytes: int
    settings: Settings
    network: Network
    wire: WireName
    algorithm: Algorithm | None
    splits_head: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def key(self) -> bytes:
        return bytes.fromhex(self.slice_key)

    @classmethod
    def of_message(cls, raw: dict[str, Any]) -> Setup:
        """Raises BadFrame for anything that no leader of this version says."""
        settings, network = _object(raw, "settings"), _object(raw, "network")
        world_size = whole(raw, "world_size", 2, MAX_MEMBERS + 1)
        key, kv_type, layout = raw.get("slice_key"), settings.get("kv_type"), settings.get("layout")
        wire, algorithm = raw.get("wire"), raw.get("algorithm")
        known = (kv_type in get_args(KVType), layout in get_args(LayoutChoice), wire in tuple(WIRES),
                 algorithm in (None, *get_args(Algorithm)))
        if not isinstance(key, str) or not _KEY.fullmatch(key) or not all(known):
            raise BadFrame("a plan with impossible names")
        return cls(
            whole(raw, "epoch", 1, 2**31), whole(raw, "rank", 1, world_size - 1), world_size, key,
            whole(raw, "slice_bytes", 1, _MAX_SLICE_BYTES),
            Settings(whole(settings, "context_length", 1, MAX_CONTEXT), whole(settings, "batch_size", 1, _MAX_BATCH),
                     cast(KVType, kv_type), cast(LayoutChoice, layout)),
            network_of_message(network),
            cast(WireName, wire), cast("Algorithm | None", algorithm), raw.get("splits_head") is True)


@dataclass(frozen=True, slots=True)
class Introduced:
    """Another worker of the epoch: where it listens, and its certificate."""

    rank: int
    host: str
    port: int
    certificate: str


@dataclass(frozen=True, slots=True)
class Introduction:
    """The others of an epoch, to one of them. `meeting` is a secret of theirs."""

    meeting: str
    others: tuple[Introduced, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_message(cls, raw: dict[str, Any]) -> Introduction:
        """Raises BadFrame."""
        meeting, others = raw.get("meeting"), raw.get("others")
        if not (isinstance(meeting, str) and _MEETING.fullmatch(meeting) and isinstance(others, list)
                and len(others) < MAX_MEMBERS and all(isinstance(one, dict) for one in others)):
            raise BadFrame("no introduction")
        return cls(meeting, tuple(cls._introduced(one) for one in others))

    @staticmethod
    def _introduced(raw: dict[str, Any]) -> Introduced:
        try:
            certificate = check_certificate(raw.get("certificate"))
        except ValueError as error:
            raise BadFrame("an introduction without a certificate") from error
        return Introduced(whole(raw, "rank", 1, MAX_MEMBERS), text(raw, "host", 255), whole(raw, "port", 1, 2**16 - 1),
                          certificate)


def network_of_message(raw: dict[str, Any]) -> Network:
    """Raises BadFrame."""
    return Network(number(raw, "latency_s"), number(raw, "bytes_per_s"), raw.get("is_mesh") is True)


def whole(raw: dict[str, Any], key: str, least: int, most: int) -> int:
    """A whole number within bounds. Raises BadFrame."""
    value = raw.get(key)
    if type(value) is not int or not least <= value <= most:
        raise BadFrame(f"{key} is not a number from {least} to {most}")
    return value


def number(raw: dict[str, Any], key: str) -> float:
    value = raw.get(key)
    if not isinstance(value, (int, float)) or not 0 < value < 1e15:
        raise BadFrame(f"{key} is not a positive number")
    return float(value)


def _object(raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key)
    if not isinstance(value, dict):
        raise BadFrame(f"{key} is missing")
    return value


def text(raw: dict[str, Any], key: str, max_length: int = 300) -> str:
    """A short printable text, whatever came."""
    return "".join(filter(str.isprintable, str(raw.get(key, ""))))[:max_length]
