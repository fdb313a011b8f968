"""Synthetic sequences in which a later text needs an earlier one: what a head must learn to find.

Facts lie in filler, and questions about them follow. The templates, words and kinds of values here are for training;
benchmarks/longcontext.py has its own, and shares none with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

TEXT, FACT, ANSWER = 0, 1, 2  # the role of a piece of text
_SYLLABLES = (
    "ba", "be", "bo", "ca", "co", "da", "de", "di", "do", "fa", "fi", "ga", "go", "ha", "ki", "ko", "la", "le", "lo",
    "ma", "mi", "mo", "na", "ne", "no", "pa", "pe", "ra", "re", "ri", "ro", "sa", "se", "si", "so", "ta", "te", "ti",
    "to", "va", "vi", "vo", "za", "zo")
_THINGS = (
    "lamp", "kettle", "ladder", "basket", "bucket", "hammer", "pillow", "carpet", "bottle", "mirror", "candle",
    "wallet", "ticket", "helmet", "jacket", "saddle", "violin", "trumpet", "compass", "anchor")
_PLACES = (
    "Lisbon", "Oslo", "Quito", "Nairobi", "Hanoi", "Dublin", "Prague", "Lima", "Cairo", "Riga", "Bergen", "Malaga",
    "Turin", "Ghent", "Accra", "Osaka", "Perth", "Bogota", "Tallinn", "Zagreb")
_COLOURS = (
    "crimson", "turquoise", "amber", "violet", "ivory", "olive", "maroon", "indigo", "beige", "scarlet")


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text and its role."""

    text: str
    role: int = TEXT


@dataclass(frozen=True, slots=True)
class Item:
    """A fact, as pieces, and what is asked about it later, as pieces whose ANSWER repeats the FACT's."""

    fact: tuple[Piece, ...]
    question: tuple[Piece, ...]


def _word(rng: Random) -> str:
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 4)))


def _name(rng: Random) -> str:
    return f"{_word(rng).capitalize()} {_word(rng).capitalize()}"


def _digits(rng: Random) -> str:
    return str(rng.randint(10 ** 3, 10 ** rng.choice((4, 5, 6, 8)) - 1))


def _hex(rng: Random) -> str:
    return f"{rng.getrandbits(32):08x}"


def _item(before: str, value: str, after: str, asked: str, answer: str, end: str) -> Item:
    return Item((Piece(before), Piece(value, FACT), Piece(after)), (Piece(asked), Piece(answer, ANSWER), Piece(end)))


def _invoice(rng: Random) -> Item:
    number, value = _digits(rng), _digits(rng)
    return _item(f"\nInvoice {number} was sent; the amount due is", f" {value}", " euros.\n",
                 f"\nHow much is due on invoice {number}? The sum is", f" {value}", " euros.\n")


def _extension(rng: Random) -> Item:
    who, value = _name(rng), _digits(rng)
    return _item(f"\n{who} can be reached at extension", f" {value}", ".\n",
                 f"\nTo speak to {who}, dial", f" {value}", ".\n")


def _constant(rng: Random) -> Item:
    name, value = "_".join((_word(rng), _word(rng))).upper(), _digits(rng)
    return _item(f"\n{name} =", f" {value}", "\n", f"\nassert {name} ==", f" {value}", "\n")


def _setting(rng: Random) -> Item:
    name, value = f"{_word(rng)}.{_word(rng)}", _hex(rng)
    return _item(f'\nset {name} "', value, '"\n', f'\n> get {name}\n"', value, '"\n')


def _record(rng: Random) -> Item:
    name, value = _word(rng), _hex(rng)
    return _item(f'\n{{"user": "{name}", "token": "', value, '"}\n',
                 f'\n{{"token_of": "{name}", "is": "', value, '"}\n')


def _home(rng: Random) -> Item:
    who, where = _name(rng), rng.choice(_PLACES)
    return _item(f"\n{who} moved to", f" {where}", " in the spring.\n",
                 f"\nThe city where {who} lives now is", f" {where}", ".\n")


def _thing(rng: Random) -> Item:
    thing, colour, where = rng.choice(_THINGS), rng.choice(_COLOURS), f"{_word(rng)} {_word(rng)}"
    return _item(f"\nAnna put the {colour} {thing} into the cupboard marked", f" {where}", ".\n",
                 f"\nUser: Where is the {colour} {thing}?\nAssistant: It is in the cupboard marked", f" {where}", ".\n")


def _chain(rng: Random) -> Item:
    names, value = [_word(rng) for _ in range(rng.randint(2, 4))], _digits(rng)
    links = "".join(f"\nlet {b} = {a};" for a, b in pairwise(names))
    return _item(f"\nlet {names[0]} =", f" {value}", f";{links}\n",
                 f"\nassert({names[-1]} ==", f" {value}", ");\n")


def _several(rng: Random) -> Item:
    club, members = _word(rng).capitalize(), [_word(rng).capitalize() for _ in range(rng.randint(2, 4))]
    fact: list[Piece] = []
    asked: list[Piece] = [Piece(f"\nThe members of the {club} club are")]
    for member in members:
        fact += [Piece(f"\nThe {club} club admitted"), Piece(f" {member}", FACT), Piece(".\n")]
        asked += [Piece(f" {member}", ANSWER), Piece(",")]
    return Item(tuple(fact), (*asked, Piece(" as was said.\n")))


def _definition(rng: Random) -> Item:
    function, names = _word(rng), [_word(rng) for _ in range(3)]
    body = f"({', '.join(names)})"
    return _item(f"\ndef {function}", body, ":\n    return None\n", f"\n# the signature again: {function}", body, "\n")


_KINDS: tuple[Callable[[Random], Item], ...] = (_invoice, _extension, _constant, _setting, _record, _home, _thing,
                                                _chain, _several, _definition)
N_KINDS = len(_KINDS)


def _quotation(rng: Random, filler: str) -> Item:
    """A passage of the filler that is said again, word for word."""
    words = filler.split(" ")
    start = rng.randrange(max(1, len(words) - 60))
    passage = " ".join(words[start:start + rng.randint(15, 50)])
    return Item((Piece("\n"), Piece(passage, FACT), Piece("\n")), (Piece("\nIt says:\n"), Piece(passage, ANSWER),
                                                                    Piece("\n")))


def compose(filler: str, rng: Random, kinds: Sequence[int]) -> list[Piece]:
    """A sequence of about the filler's length: facts in it, questions in its second half and at its end."""
    items = [_KINDS[rng.choice(kinds)](rng) for _ in range(rng.randint(6, 14))]
    if rng.random() < 0.5:  # many of one kind, so that only the key tells them apart
        kind = rng.choice(kinds)
        items = [_KINDS[kind](rng) for _ in items]
    quoted = [_quotation(rng, filler)]
    facts = [(rng.random() * 0.8, fact) for item in (*items, *quoted) for fact in _facts(item)]
    asked = [item for item in items if rng.random() < 0.7] + quoted
    late = [(0.82 + 0.1 * rng.random(), item.question) for item in asked[: len(asked) // 2]]
    end = [(1.0, item.question) for item in asked[len(asked) // 2:]]
    return _inserted(filler, sorted([*facts, *late, *end], key=lambda placed: placed[0]))


def _facts(item: Item) -> list[tuple[Piece, ...]]:
    """Each fact of an item lies somewhere else."""
    return [item.fact[start:start + 3] for start in range(0, len(item.fact), 3)]


def _inserted(filler: str, placed: Sequence[tuple[float, Sequence[Piece]]]) -> list[Piece]:
    pieces, done = list[Piece](), 0
    for where, inserted in placed:
        end = filler.find("\n", int(where * len(filler)))
        end = len(filler) if end < 0 or where >= 1 else max(done, end)
        pieces += [Piece(filler[done:end]), *inserted]
        done = end
    return [piece for piece in (*pieces, Piece(filler[done:])) if piece.text]
