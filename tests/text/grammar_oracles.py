"""Two other views of a GBNF grammar: llama.cpp's sampler over a vocabulary, and a slow recogniser of texts."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path

from llama_cpp import llama_cpp

from edgert.text.constraint_gbnf import Alt, Chars, Node, Ref, Repeat, Rules, Seq, Text

Ends = Mapping[tuple[str, int], frozenset[int]]


class LlamaGrammar:
    """llama.cpp's grammar sampler: which tokens of a vocabulary may come next."""

    def __init__(self, path: Path, grammar: str) -> None:
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._n_tokens = llama_cpp.llama_vocab_n_tokens(vocab)
        self._sampler = llama_cpp.llama_sampler_init_grammar(vocab, grammar.encode(), b"root")
        assert self._sampler, "llama.cpp refuses the grammar"

    def allowed(self) -> set[int]:
        rows = (llama_cpp.llama_token_data * self._n_tokens)()
        for token_id, row in enumerate(rows):
            row.id = token_id
        candidates = llama_cpp.llama_token_data_array(rows, self._n_tokens, -1, False)
        llama_cpp.llama_sampler_apply(self._sampler, ctypes.byref(candidates))
        return {candidates.data[i].id for i in range(candidates.size) if candidates.data[i].logit == 0}

    def accept(self, token_id: int) -> None:
        llama_cpp.llama_sampler_accept(self._sampler, token_id)

    def close(self) -> None:
        llama_cpp.llama_sampler_free(self._sampler)
        llama_cpp.llama_model_free(self._model)


def matches(rules: Rules, text: str) -> bool:
    """Whether `root` matches the whole text: all ends of all rules at all places, until nothing is added."""
    ends: Ends = {(name, start): frozenset() for name in rules for start in range(len(text) + 1)}
    while True:
        more = {(name, start): ends[name, start] | _ends(rules[name], text, start, ends) for name, start in ends}
        if more == ends:
            return len(text) in ends["root", 0]
        ends = more


def _ends(node: Node, text: str, start: int, known: Ends) -> frozenset[int]:
    match node:
        case Ref(name):
            return known[name, start]
        case Text(literal):
            return frozenset([start + len(literal)]) if text.startswith(literal, start) else frozenset()
        case Chars(ranges):
            fits = start < len(text) and any(low <= ord(text[start]) <= high for low, high in ranges)
            return frozenset([start + 1]) if fits else frozenset()
        case Alt(options):
            return frozenset().union(*(_ends(option, text, start, known) for option in options))
        case Seq(parts):
            reached = frozenset([start])
            for part in parts:
                reached = frozenset().union(*(_ends(part, text, at, known) for at in reached))
            return reached
        case Repeat(inner, least, most):
            reached, found = frozenset([start]), set()
            for count in range((least + len(text) + 1 if most is None else most) + 1):
                if count >= least:
                    found |= reached
                reached = frozenset().union(*(_ends(inner, text, at, known) for at in reached))
            return frozenset(found)
