"""What is asked of a long context: prose and code to go on with, facts to find, passages to copy.

The generator follows the tasks of RULER (arXiv 2404.06654) in words of its own. Templates, words and numbers are none
of those that heads are trained with (retrieval/distillation/synthetic.py), and its texts are files that training never
reads.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray

from retrieval.distillation.text import Document, documents

Encode = Callable[[str], list[int]]
_KEYS = (
    "harbour", "meadow", "lantern", "glacier", "orchard", "falcon", "copper", "velvet", "thunder", "walnut",
    "saffron", "canyon", "mustard", "pebble", "whisper", "anchorage", "juniper", "marble", "ribbon", "tundra")
_ASKED_TOKENS = 64  # room for any one question and its answer
_KINDS = ("archive", "vault", "beacon", "garden", "station", "library")


@dataclass(frozen=True, slots=True)
class Item:
    """`context` is prefilled; `steps` are fed one by one. `answers` are indices of steps whose next token is one of
    the answer; `critical` the context's tokens that hold it."""

    kind: str
    context: NDArray[np.int32]
    steps: tuple[int, ...]
    answers: tuple[int, ...] = ()
    critical: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Texts:
    """Prose and code that no head was trained on."""

    prose: list[Document]
    code: list[Document]

    @classmethod
    def installed(cls, seed: int) -> Texts:
        """Of this machine's Python: the language reference as prose, and the modules that training leaves out."""
        from pydoc_data.topics import topics  # the reference's chapters, as text

        held = documents([], seed, evaluation=True)
        chapters = [Document(name, text, False) for name, text in sorted(topics.items()) if len(text) > 2000]
        Random(seed).shuffle(chapters)
        library = sysconfig.get_paths()["stdlib"]
        code = [d for d in held if d.is_code and (Path(library) / d.name).exists()] or [d for d in held if d.is_code]
        return cls(chapters, code)

    @classmethod
    def of(cls, path: Path, seed: int) -> Texts:
        """One file, or a directory of files."""
        found = ([Document(path.name, path.read_text("utf-8"), path.suffix == ".py")] if path.is_file()
                 else documents([path], seed, evaluation=True))
        return cls([d for d in found if not d.is_code] or found, [d for d in found if d.is_code] or found)


def _tokens(texts: list[Document], encode: Encode, rng: Random, n: int) -> list[int]:
    """`n` tokens of as many whole documents as that takes, from a random one on."""
    ids, at = list[int](), rng.randrange(len(texts))
    while len(ids) < n:
        ids += encode(texts[at % len(texts)].text + "\n\n")
        at += 1
    return ids[:n]


def fidelity(texts: list[Document], encode: Encode, rng: Random, n_tokens: int, n_steps: int, kind: str) -> Item:
    """A document, and its own next tokens."""
    ids = _tokens(texts, encode, rng, n_tokens)
    return Item(kind, np.array(ids[:-n_steps], np.int32), tuple(ids[-n_steps:]))


@dataclass(frozen=True, slots=True)
class Fact:
    """Said in the context as `text` with the value at its end; asked as `question`, which the value answers."""

    text: str
    value: str
    question: str


def _fact(rng: Random, key: str, kind: str) -> Fact:
    value = str(rng.randint(10**6, 10**7 - 1))
    return Fact(f"\nOne of the special magic numbers for the {key} {kind} is:", f" {value}",
                f"\nWhat is the special magic number for the {key} {kind} mentioned in the text? The special magic "
                f"number for the {key} {kind} mentioned in the text is:")


def needle(texts: list[Document], encode: Encode, rng: Random, n_tokens: int, n_keys: int = 1, n_values: int = 1,
           n_queries: int = 1, depth: float | None = None, last_only: bool = False, ask: int | None = None,
           kind: str = "needle") -> Item:
    """Facts in prose, one or more asked for. Several values of one key are asked for together. With `last_only`, the
    questions before the last are only turns of a conversation. With `ask`, that fact alone is asked for: the context is
    the same for each."""
    keys, place = rng.sample(_KEYS, max(n_keys, n_queries)), rng.choice(_KINDS)
    facts = [_fact(rng, key, place) for key in keys]
    asked = facts[:n_queries] if ask is None else [facts[ask]]
    more = [_fact(rng, keys[0], place) for _ in range(n_values - 1)]
    questions = [(fact.question, [fact.value]) for fact in asked]
    if more:
        questions = [(asked[0].question.replace("number", "numbers").replace(" is", " are"),
                      [fact.value for fact in (asked[0], *more)])]
    placed = sorted([(rng.random() if depth is None else depth, index, fact)
                     for index, fact in enumerate([*facts, *more])], key=lambda one: one[:2])
    return _assemble(texts, encode, rng, n_tokens, placed, questions, kind, len(questions) - 1 if last_only else 0,
                     None if ask is None else _ASKED_TOKENS)


def variables(texts: list[Document], encode: Encode, rng: Random, n_tokens: int, n_hops: int = 2) -> Item:
    """A value handed from variable to variable, each line somewhere else."""
    names = [f"VAR_{''.join(rng.sample('ABCDEFGHJKLMNPQRSTUVWXYZ', 4))}" for _ in range(n_hops + 1)]
    value = str(rng.randint(10**4, 10**5 - 1))
    lines = [Fact(f"\nVAR {names[0]} =", f" {value}", "")]
    lines += [Fact(f"\nVAR {b} =", f" {a}", "") for a, b in pairwise(names)]
    depths = sorted(rng.random() for _ in lines)
    placed = [(depth, index, line) for index, (depth, line) in enumerate(zip(depths, lines, strict=True))]
    question = f"\nQuestion: what is the value of VAR {names[-1]}? Answer: the value of VAR {names[-1]} is"
    return _assemble(texts, encode, rng, n_tokens, placed, [(question, [f" {value}"])], "variables")


def _assemble(texts: list[Document], encode: Encode, rng: Random, n_tokens: int, placed: list[tuple[float, int, Fact]],
              questions: list[tuple[str, list[str]]], kind: str, first_judged: int = 0,
              n_asked: int | None = None) -> Item:
    steps, answers = list[int](), list[int]()
    wanted = {value for _, values in questions[first_judged:] for value in values}
    for number, (question, values) in enumerate(questions):
        steps += encode(question)
        for value in values:
            value_ids = encode(value)
            if number >= first_judged:
                answers += range(len(steps) - 1, len(steps) - 1 + len(value_ids))
            steps += value_ids + (encode(",") if len(values) > 1 else [])
    coded = [(depth, encode(fact.text), encode(fact.value), fact.value in wanted) for depth, _, fact in placed]
    n_filler = n_tokens - (n_asked or len(steps)) - sum(len(text) + len(value) + 1 for _, text, value, _ in coded)
    filler, ids, critical, done = _tokens(texts, encode, rng, n_filler), list[int](), list[int](), 0
    for depth, text_ids, said_ids, is_wanted in coded:
        end = int(depth * n_filler)
        ids += filler[done:end] + text_ids
        if is_wanted:
            critical += range(len(ids), len(ids) + len(said_ids))
        ids += said_ids + encode(".")[:1]
        done = end
    ids += filler[done:]
    return Item(kind, np.array(ids, np.int32), tuple(steps), tuple(answers), tuple(critical))


def repository_copy(texts: list[Document], encode: Encode, rng: Random, n_tokens: int, n_copied: int = 48) -> Item:
    """Code whose last lines repeat earlier ones word for word: what a coder model does when it edits."""
    ids = _tokens(texts, encode, rng, n_tokens - n_copied - 16)
    start = rng.randrange(len(ids) // 8, len(ids) // 2)
    copied, lead = ids[start:start + n_copied], ids[start - 16:start]
    context = [*ids, *lead]
    return Item("copy", np.array(context, np.int32), tuple(copied), tuple(range(8, n_copied - 1)),
                tuple(range(start + 8, start + n_copied)))
