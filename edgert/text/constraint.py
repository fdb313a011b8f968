"""Holds an answer to a JSON schema or a GBNF grammar: before each token, says which tokens may come.

Made by llguidance. On Qwen2.5-Coder-0.5B (152k tokens, 20 ms a decode step, 2 cores) a mask of all tokens costs
%%FIGURES%%
So the logits are masked before sampling, always, and the model's distribution over what is allowed stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgert.errors import GrammarError, UsageError
from edgert.text.constraint_check import GrammarCheck
from edgert.text.constraint_compile import check, compile_grammar
from edgert.text.constraint_gbnf import parse_gbnf
from edgert.text.constraint_lexemes import to_llguidance
from edgert.text.constraint_schema import schema_to_llguidance

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgert.text.tokenizer import Tokenizer

JSONSchema = str | Mapping[str, Any] | bool
# llguidance keeps a tree of the tokens that fit into any JSON string and takes it as a whole where that much room is
# left: 28 MiB and 1.5 ms less in a mask. Its own four such classes take 56 MiB and are no faster.
_SLICES = [r'[^"\\\x00-\x1F\x7F]{1,16}']
# Of llguidance's tree of tokens, which panics beyond; vocabularies in use have 1.8 million bytes.
_MAX_PIECE_BYTES, _MAX_TREE_BYTES = 1000, 4_000_000
_MAX_CHECKED = 64  # grammars remembered as checked


def translate(*, json_schema: JSONSchema | None = None, grammar: str | None = None) -> str:
    """A JSON schema or a GBNF grammar as llguidance's compiler takes it, which may still refuse it. A few ms.

    Raises GrammarError, and UsageError unless exactly one is given.
    """
    if json_schema is not None and grammar is None:
        return schema_to_llguidance(json_schema)
    if grammar is not None and json_schema is None:
        return to_llguidance(parse_gbnf(grammar))
    raise UsageError("an answer follows either a JSON schema or a grammar", "Give one of them.")


class Constraints:
    """Makes constraints for one vocabulary. Prepared at the first one: 0.5 s and 28 MiB for 152k tokens."""

    def __init__(self, tokenizer: Tokenizer, n_vocab: int) -> None:
        """`n_vocab` logits come from the model; those without a token are never allowed."""
        self._tokenizer, self._n_vocab = tokenizer, n_vocab
        self._prepared: Any = None
        self._checked: dict[str, None] = {}

    def make(self, *, json_schema: JSONSchema | None = None, grammar: str | None = None) -> Constraint:
        """A constraint at its beginning, for one answer. Raises GrammarError, and UsageError unless one is given."""
        text = translate(json_schema=json_schema, grammar=grammar)
        if text in self._checked:
            prepared = self._prepare()
        else:
            with GrammarCheck(text) as running:
                prepared = self._prepare()
                running.wait()
            if len(self._checked) >= _MAX_CHECKED:
                del self._checked[next(iter(self._checked))]
            self._checked[text] = None
        return Constraint(compile_grammar(prepared, text), self._tokenizer.n_tokens, self._n_vocab)

    def _prepare(self) -> Any:
        if self._prepared is None:
            from llguidance import LLTokenizer

            tokens = _Tokens(self._tokenizer)
            self._prepared = LLTokenizer(tokens, eos_token=tokens.end_ids, slices=_SLICES)  # type: ignore[arg-type]
        return self._prepared


class _Tokens:
    """A vocabulary in the form that llguidance reads, like its TokenizerWrapper."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.end_ids = tokenizer.end_ids()
        if not self.end_ids:
            raise GrammarError("the model has no end token, so that no grammar can end", "Try another model.")
        self.eos_token_id = self.end_ids[0]
        # What a token shows is what it counts for. Control tokens show nothing, and nothing is never allowed.
        self.tokens = [piece if len(piece) <= _MAX_PIECE_BYTES else b"" for piece in tokenizer.pieces()]
        for token_id in self.end_ids:
            self.tokens[token_id] = b""
        if sum(map(len, self.tokens)) > _MAX_TREE_BYTES:
            raise GrammarError("the model's vocabulary is too large to be constrained", "Try another model.")

    def __call__(self, text: bytes) -> list[int]:
        raise AssertionError("no_forcing: llguidance never asks for the tokens of a text")


class Constraint:
    """One answer's place in a grammar. For one thread at a time; holds 4 bytes per token of the vocabulary."""

    def __init__(self, matcher: Any, n_tokens: int, n_vocab: int) -> None:
        import numpy as np

        self._matcher, self._n_vocab = matcher, n_vocab
        n_words = -(-n_tokens // 32)  # 32 tokens each
        self._allowed = np.zeros(max(n_words, -(-n_vocab // 32)), np.uint32)
        self._n_allowed_bytes = n_words * 4
        # Row b has 0 where byte b has a one and -inf where it has a zero, the lowest bit first.
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
        self._penalties = np.where(bits, np.float32(0), np.float32(-np.inf))  # (256, 8) float32
        self._masked = np.empty((self._allowed.nbytes, 8), np.float32)

    def mask(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """`logits` with -inf for the tokens that may not come now; valid until the next call. (n_vocab,) float32

        Raises GrammarError when the grammar is too complex to go on, or nothing in the vocabulary fits.
        """
        import numpy as np

        self._matcher.unsafe_compute_mask_ptr(self._allowed.ctypes.data, self._n_allowed_bytes)
        check(self._matcher)
        np.take(self._penalties, self._allowed.view(np.uint8), axis=0, out=self._masked, mode="clip")
        masked = self._masked.reshape(-1)[:self._n_vocab]
        return np.add(masked, logits, out=masked)

    def accept(self, token_id: int) -> None:
        """Go on with a token that the last mask allowed. Raises GrammarError for others."""
        if not self._matcher.consume_token(token_id):
            check(self._matcher)
            raise GrammarError(f"token {token_id} is not allowed here", "Choose from the masked logits.")

    @property
    def is_complete(self) -> bool:
        """Whether the answer is complete and nothing more may follow."""
        return bool(self._matcher.is_stopped())
