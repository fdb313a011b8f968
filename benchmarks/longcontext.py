"""How faithful a small set of cached tokens is to all of them: retrieval, its peers, an oracle, chance, side by side.

    python benchmarks/longcontext.py MODEL.gguf [--head DIR] [--context 4096] [--budgets 128 256 512]
        [--tasks prose code perplexity needle1 needle4 needle8 values queries turns variables passkey copy]
        [--methods full oracle ours head quest snapkv streaming reuse chance] [--items 30] [--seeds 3] [--json FILE]

Every item is prefilled once, with full attention; then each method runs the same steps from that snapshot, one token
at a time, attending to as many cached tokens as the budget says. Questions and answers are steps, so no method sees
them before. Teacher-forced: KL and top-1 are against full attention's own logits; `answer` is the share of answer
tokens that a method's best logit gives; `recall` is the share of the answer's tokens in the context that are in the
set.
Everything but attention is edgert's graphs over the file's weights (bfloat16 where the processor is faster with it);
means with 95 % intervals over items. A cell where full attention fails says nothing about a method.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from longcontext_items import Encode, Item, Texts, fidelity, needle, repository_copy, variables
from longcontext_model import Floats, Selector, SparseModel
from longcontext_selectors import Chance, Full, OneSet, Oracle, Ours, Quest, Reuse, SnapKV, Streaming

from edgert.engine.retrieval_head import RetrievalHead
from edgert.ggml.library import load_libraries
from edgert.gguf.model_file import ModelFile
from edgert.text.tokenizer import Tokenizer
from retrieval.choosing import observed_layers
from retrieval.distillation.text import Document
from retrieval.selection import Policy

_METHODS = ("full", "oracle", "ours", "head", "quest", "snapkv", "streaming", "reuse", "chance")
_DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.98)
_N_FIDELITY_STEPS, _N_PERPLEXITY_STEPS = 64, 256


@dataclass(frozen=True, slots=True)
class Outcome:
    """One method on one item. Not a number where the item does not ask for it."""

    kl: float
    top1: float
    nll_difference: float
    answer: float
    recall: float


def item_of(task: str, texts: Texts, encode: Encode, n_tokens: int, seed: int, index: int) -> Item:
    """One item of a task, the same for the same seed and index."""
    rng, prose, code = Random(f"{task}/{seed}/{index}"), texts.prose, texts.code

    def facts(**options: Any) -> Item:
        return needle(prose, encode, rng, n_tokens, kind=task, **options)

    def going_on(documents: list[Document], n_steps: int = _N_FIDELITY_STEPS) -> Item:
        return fidelity(documents, encode, rng, n_tokens, n_steps, task)

    makers: dict[str, Callable[[], Item]] = {
        "prose": lambda: going_on(prose), "code": lambda: going_on(code),
        "perplexity": lambda: going_on((prose, code)[index % 2], _N_PERPLEXITY_STEPS),
        "needle1": facts, "needle4": lambda: facts(n_keys=4), "needle8": lambda: facts(n_keys=8),
        "values": lambda: facts(n_keys=4, n_values=4), "queries": lambda: facts(n_keys=4, n_queries=4),
        "turns": lambda: facts(n_keys=4, n_queries=2, last_only=True),
        "variables": lambda: variables(prose, encode, rng, n_tokens),
        "passkey": lambda: facts(depth=_DEPTHS[index % len(_DEPTHS)]),
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
                   float(np.mean(found)) if found else math.nan)


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)), np.float32)


def selectors_of(methods: Sequence[str], budget: int, full: Full, head: RetrievalHead | None,
                 observed: frozenset[int]) -> dict[str, Selector]:
    """The methods at one budget. Those that need a head are left out where there is none."""
    made: dict[str, Callable[[], Selector]] = {
        "oracle": lambda: Oracle(budget, full), "quest": lambda: Quest(budget), "snapkv": lambda: SnapKV(budget),
        "streaming": lambda: Streaming(budget), "reuse": lambda: Reuse(budget, full), "chance": lambda: Chance(budget)}
    if head is not None:
        made["ours"] = lambda: Ours(Policy(budget), head, observed)
        made["head"] = lambda: Ours(Policy(budget, survivor_share=0.0), head, observed)
    return {name: made[name]() for name in methods if name in made}


def compare(model: SparseModel, item: Item, methods: Sequence[str], budgets: Sequence[int],
            head: RetrievalHead | None) -> dict[tuple[str, int], Outcome]:
    """Every method at every budget on one item, from one prefill."""
    snapshot, full = model.prefill(item.context), Full()
    logits = model.run(snapshot, item.steps, full)
    outcomes = {("full", 0): judge(item, logits, logits, full)}
    for budget in budgets:
        for name, selector in selectors_of(methods, budget, full, head, observed_layers(model.arch.hp)).items():
            outcomes[name, budget] = judge(item, model.run(snapshot, item.steps, selector), logits, selector)
    return outcomes


def summary(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by the normal approximation."""
    known = np.array([value for value in values if not math.isnan(value)])
    if not len(known):
        return math.nan, math.nan
    half = 1.96 * float(known.std(ddof=1)) / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return float(known.mean()), half


def print_task(task: str, cells: dict[tuple[str, int], list[Outcome]]) -> list[dict[str, object]]:
    """The table of one task; its rows as they go to JSON."""
    n_items = len(next(iter(cells.values())))
    print(f"\n{task}: {n_items} items\n{'method':<10} {'budget':>6}  " + "  ".join(
        f"{name:<15}" for name in ("KL", "top-1", "NLL difference", "answer", "recall")), flush=True)
    rows = list[dict[str, object]]()
    for (method, budget), outcomes in cells.items():
        row: dict[str, object] = {"task": task, "method": method, "budget": budget, "items": n_items}
        shown = list[str]()
        for name in ("kl", "top1", "nll_difference", "answer", "recall"):
            mean, half = summary([getattr(outcome, name) for outcome in outcomes])
            row[name], row[f"{name}_ci95"] = (None if math.isnan(x) else round(x, 5) for x in (mean, half))
            shown.append(f"{'-' if math.isnan(mean) else f'{mean:.3f} +- {half:.3f}':<15}")
        print(f"{method:<10} {budget or 'all':>6}  " + "  ".join(shown), flush=True)
        rows.append(row)
    return rows


def main() -> None:
    args = _arguments()
    load_libraries()
    file = ModelFile.open(args.model)
    tokenizer = Tokenizer.open(args.model)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special=False, parse_special=False)

    model = SparseModel(file, args.context + 64, args.threads)
    head = _head(args.head, file, model)
    rows = list[dict[str, object]]()
    for task in args.tasks:
        cells: dict[tuple[str, int], list[Outcome]] = defaultdict(list)
        for seed in range(args.seeds):
            texts = Texts.of(args.text, seed) if args.text else Texts.installed(seed)
            for index in range(max(1, args.items // args.seeds)):
                item = item_of(task, texts, encode, args.context, seed, index)
                for cell, outcome in compare(model, item, args.methods, args.budgets, head).items():
                    cells[cell].append(outcome)
                print(".", end="", file=sys.stderr, flush=True)
        rows += print_task(task, cells)
        if args.json:
            args.json.write_text("".join(json.dumps({"model": file.path.name, "context": args.context, **row}) + "\n"
                                         for row in rows))
    model.close()


def _head(path: Path | None, file: ModelFile, model: SparseModel) -> RetrievalHead | None:
    from retrieval.head import find_head, open_head

    head = open_head(path, file, model.arch.hp) if path else find_head(file, model.arch.hp)
    if head is None:
        print("no head for this model: `ours` and `head` are left out", file=sys.stderr)
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="a line for each row")
    return parser.parse_args()


if __name__ == "__main__":
    main()
