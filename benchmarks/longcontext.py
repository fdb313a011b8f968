"""How faithful a small set of cached tokens is to all of them: retrieval, its peers, an oracle, chance, side by side.

    python benchmarks/longcontext.py MODEL.gguf [--head DIR] [--context 4096] [--budgets 128 256 512]
        [--tasks prose code perplexity_prose perplexity_code needle1 needle4 needle8 shared values queries turns
                 variables passkey copy passkey0 passkey25 passkey50 passkey75 passkey98]
        [--methods full oracle ours grows untrained head quest snapkv streaming reuse chance]
        [--items 30] [--seeds 3] [--minutes M] [--json FILE]

Every context is prefilled once, with full attention; then each method runs the same steps from that snapshot, one
token at a time, attending to as many cached tokens as the budget says. Questions and answers are steps, so no method
sees them before. Teacher-forced: KL, top-1 and perplexity are against full attention's own; `answer` is the share of
answer tokens that a method's best logit gives; `recall` is the share of the answer's tokens in the context that are in
the set; `tokens` are those of one set for all layers, on average. `ours` keeps to the budget; `grows` is what edgert
does, a quarter more where the head is unsure. `shared` asks ten questions about each context. `untrained` is retrieval
without its head.
With --json FILE, what was found is kept: the same command goes on where it was stopped, or --minutes were over.
Everything but attention is edgert's graphs over the file's weights (bfloat16 where the processor is faster with it);
means with 95 % intervals over items. A cell where full attention fails says nothing about a method.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from longcontext_items import Encode, Item, Texts, fidelity, needle, repository_copy, variables
from longcontext_model import Selector, Snapshot, SparseModel
from longcontext_results import Cell, Journal, Outcome, Place, settings_of
from longcontext_selectors import Chance, Full, OneSet, Oracle, Ours, Quest, Reuse, SnapKV, Streaming
from numpy.typing import NDArray

from edgert.architectures.registry import open_architecture
from edgert.ggml.library import load_libraries
from edgert.gguf.model_file import ModelFile
from edgert.text.tokenizer import Tokenizer
from retrieval.arrays import Floats
from retrieval.choosing import observed_layers
from retrieval.distillation.text import Document
from retrieval.head import Head, find_head, open_head
from retrieval.selection import Policy
from retrieval.sizes import policy_for

_METHODS = ("full", "oracle", "ours", "grows", "untrained", "head", "quest", "snapkv", "streaming", "reuse", "chance")
_DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.98)
N_SHARED = 10  # questions about one context
_N_FIDELITY_STEPS, _N_PERPLEXITY_STEPS = 64, 256


def item_of(task: str, texts: Texts, encode: Encode, n_tokens: int, seed: int, index: int) -> Item:
    """One item of a task, the same for the same seed and index."""
    n_each = N_SHARED if task == "shared" else 1
    rng, prose, code = Random(f"{task}/{seed}/{index // n_each}"), texts.prose, texts.code

    def facts(**options: Any) -> Item:
        return needle(prose, encode, rng, n_tokens, kind=task, **options)

    def going_on(documents: list[Document], n_steps: int = _N_FIDELITY_STEPS) -> Item:
        return fidelity(documents, encode, rng, n_tokens, n_steps, task)

    makers: dict[str, Callable[[], Item]] = {
        "prose": lambda: going_on(prose), "code": lambda: going_on(code),
        "perplexity_prose": lambda: going_on(prose, _N_PERPLEXITY_STEPS),
        "perplexity_code": lambda: going_on(code, _N_PERPLEXITY_STEPS),
        "needle1": facts, "needle4": lambda: facts(n_keys=4), "needle8": lambda: facts(n_keys=8),
        "shared": lambda: facts(n_keys=N_SHARED, ask=index % N_SHARED),
        "values": lambda: facts(n_keys=4, n_values=4), "queries": lambda: facts(n_keys=4, n_queries=4),
        "turns": lambda: facts(n_keys=4, n_queries=2, last_only=True),
        "variables": lambda: variables(prose, encode, rng, n_tokens),
        "passkey": lambda: facts(depth=_DEPTHS[index % len(_DEPTHS)]),
        **{f"passkey{round(100 * depth)}": partial(facts, depth=depth) for depth in _DEPTHS},
        "copy": lambda: repository_copy(code, encode, rng, n_tokens)}
    if task not in makers:
        raise SystemExit(f"no task {task}: there are {', '.join(makers)}")
    return makers[task]()


def judge(item: Item, logits: Floats, full_logits: Floats, selector: Selector) -> Outcome:
    """A method's steps beside those of full attention."""
    ours, theirs = _log_softmax(logits[:-1]), _log_softmax(full_logits[:-1])
    following = np.array(item.steps[1:])
    steps = np.arange(len(following))
    best = ours.argmax(-1)
    asked = np.array(item.answers, int)
    found = [np.isin(item.critical, selector.sets[step]).mean() for step in item.answers] \
        if isinstance(selector, OneSet) and item.critical else []
    return Outcome(float((np.exp(theirs) * (theirs - ours)).sum(-1).mean()),
                   float((best == theirs.argmax(-1)).mean()),
                   float((theirs[steps, following] - ours[steps, following]).mean()),
                   float((best[asked] == following[asked]).mean()) if len(asked) else math.nan,
                   float(np.mean(found)) if found else math.nan,
                   float(np.mean([len(one) for one in selector.sets])) if isinstance(selector, OneSet) else math.nan)


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)), np.float32)


def selectors_of(methods: Sequence[str], budget: int, full: Full, head: Head | None,
                 observed: frozenset[int], token_ids: Sequence[int]) -> dict[str, Selector]:
    """The methods at one budget, for an item of these tokens. Those that need a head are left out where there is
    none."""
    made: dict[str, Callable[[], Selector]] = {
        "oracle": lambda: Oracle(budget, full), "quest": lambda: Quest(budget), "snapkv": lambda: SnapKV(budget),
        "streaming": lambda: Streaming(budget), "reuse": lambda: Reuse(budget, full), "chance": lambda: Chance(budget)}
    made["untrained"] = lambda: Ours(Policy(budget), None, observed, token_ids)
    if head is not None:
        made["ours"] = lambda: Ours(Policy(budget), head, observed, token_ids)
        made["grows"] = lambda: Ours(policy_for(budget), head, observed, token_ids)
        alone = Policy(budget, survivor_weight=0.0, repeat_weight=0.0)
        made["head"] = lambda: Ours(alone, head, observed, token_ids)
    return {name: made[name]() for name in methods if name in made}


def places(tasks: Sequence[str], n_seeds: int, n_each: int) -> list[Place]:
    """Every item, so that all tasks have some soon, and those of one context follow each other."""
    return [Place(task, seed, index) for first in range(0, n_each, N_SHARED) for task in tasks
            for seed in range(n_seeds) for index in range(first, min(first + N_SHARED, n_each))]


class Comparison:
    """A model, and the snapshot of the context that was prefilled last."""

    def __init__(self, model: SparseModel, head: Head | None) -> None:
        self._model, self._head = model, head
        self._context: NDArray[np.int32] | None = None
        self._snapshot: Snapshot

    def of(self, item: Item, methods: Sequence[str], budgets: Sequence[int]) -> dict[Cell, Outcome]:
        """Every method at every budget on one item, from one prefill."""
        if self._context is None or not np.array_equal(self._context, item.context):
            self._snapshot, self._context = self._model.prefill(item.context), item.context
        full, token_ids = Full(), [*item.context.tolist(), *item.steps]
        logits = self._model.run(self._snapshot, item.steps, full)
        outcomes = {("full", 0): judge(item, logits, logits, full)}
        observed = observed_layers(self._model.arch.hp)
        for budget in budgets:
            for name, selector in selectors_of(methods, budget, full, self._head, observed, token_ids).items():
                outcomes[name, budget] = judge(item, self._model.run(self._snapshot, item.steps, selector), logits,
                                               selector)
        return outcomes


def main() -> None:
    args, start_s = _arguments(), time.monotonic()
    load_libraries()
    file = ModelFile.open(args.model)
    tokenizer = Tokenizer.open(args.model)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special=False, parse_special=False)

    head = _head(args.head, file)
    model = SparseModel(file, args.context + 64, args.threads, head.feature_layers if head else ())
    journal = Journal(args.json, settings_of(model=file.fingerprint(), context=args.context,
                                             head=zlib.crc32(head.card.to_json().encode()) if head else None,
                                             text=str(args.text or "")))
    methods = [method for method in args.methods if head is not None or method not in ("ours", "grows", "head")]
    wanted = {(method, budget) for method in methods for budget in args.budgets if method != "full"} | {("full", 0)}
    texts = [Texts.of(args.text, seed) if args.text else Texts.installed(seed) for seed in range(args.seeds)]
    comparison = Comparison(model, head)
    for place in places(args.tasks, args.seeds, max(1, args.items // args.seeds)):
        if time.monotonic() - start_s > 60 * args.minutes:
            break
        if wanted <= set(journal.outcomes[place]):
            continue
        item = item_of(place.task, texts[place.seed], encode, args.context, place.seed, place.index)
        journal.add(place, comparison.of(item, methods, args.budgets))
        print(".", end="", file=sys.stderr, flush=True)
    for task in args.tasks:
        journal.print_task(task, _METHODS)
    model.close()


def _head(path: Path | None, file: ModelFile) -> Head | None:
    hp = open_architecture(file).hp
    head = open_head(path, file, hp) if path else find_head(file, hp)
    if head is None:
        print("no head for this model: `ours`, `grows` and `head` are left out", file=sys.stderr)
    return head


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--head", type=Path, metavar="DIR", help="with head.onnx and card.json; else the shipped one")
    parser.add_argument("--text", type=Path, metavar="PATH", help="own text instead of this machine's Python")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--budgets", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--tasks", nargs="+", default=["prose", "code", "needle1", "needle4", "needle8", "turns"])
    parser.add_argument("--methods", nargs="+", choices=_METHODS, default=list(_METHODS))
    parser.add_argument("--items", type=int, default=30, help="of each task, over all seeds")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many, with what there is")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every outcome, and go on where it ends")
    return parser.parse_args()


if __name__ == "__main__":
    main()
