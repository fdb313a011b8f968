"""Compiles a grammar with llguidance within limits, and says in a user's words why it fails.

The limits hold while an answer is written too. They do not hold for the compiler's own recursion and for some of its
work: constraint_probe.py tries that out in a process of its own.
"""

from __future__ import annotations

import re
from typing import Any

from edgert.errors import GrammarError

_MAX_LEXER_STATES = 50_000  # the characters that one bounded string may have take 5 MiB; hostile states take more
_MAX_REASON_CHARS = 300
_LISTING = re.compile(r"\n +\d+ \| ")
_NOISE = re.compile(r"^at \d+\(\d+\): |failed to compile JSON schema: |Unsatisfiable schema: ")


def compile_grammar(tokenizer: Any, grammar: str) -> Any:
    """An LLMatcher at the beginning of `grammar` (llguidance's Lark) for an LLTokenizer. Raises GrammarError."""
    from llguidance import LLMatcher, LLParserLimits

    # Large lexemes precomputed on all tokens of a vocabulary would cost more than they save in one answer.
    limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, precompute_large_lexemes=False, verbose_errors=False)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    check(matcher)
    return matcher


def check(matcher: Any) -> None:
    """Raises GrammarError when `matcher` has failed, which it never says by itself."""
    if not matcher.is_error():
        return
    reason = _readable(matcher.get_error())
    if reason.startswith("NoExtension"):
        raise GrammarError("the grammar allows nothing that the model could write here",
                           "Look for references that never end, and for bounds that exclude each other.")
    if reason.startswith("oneOf"):
        raise GrammarError("schema: alternatives of oneOf may overlap", "Use anyOf, or make them differ in a const.")
    raise GrammarError(f"the grammar is refused: {reason}", "Correct or simplify it.")


def _readable(error: str) -> str:
    """llguidance's reason, without its listing of the grammar and without backtraces."""
    if error.startswith("panic"):
        return "its compiler fails, perhaps for its size"
    text = " ".join(_LISTING.split(error)[0].replace("<non-verbose/>", "").split())
    if "regex parse error:" in text:
        return f"a pattern is not possible: {_printable(text.rpartition('error: ')[2])}"
    return _printable(_NOISE.sub("", text)) or "it is too complex"


def _printable(text: str) -> str:
    return "".join(filter(str.isprintable, text))[:_MAX_REASON_CHARS]
