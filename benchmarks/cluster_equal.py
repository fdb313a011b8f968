"""How near a cluster's answers are to one device's, with every number of devices and every wire.

Told by benchmarks/cluster.py. Nothing is timed here.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from cluster_models import PROMPT, load, running, step
from numpy.typing import NDArray

from edgert.runtime import Runtime
from tensorpar.workers import ClusterOptions

_AT_ONCE = 128


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def equal(args: argparse.Namespace) -> None:
    """160 tokens of one device's own answer, teacher-forced through every split and wire."""
    with running(3):
        with load(args.model, None) as runtime:
            generation = runtime.generate(PROMPT, max_tokens=160)
            generation.result()
            text = [*PROMPT, *generation.token_ids, *range(100, 260)][:64 + 160]
            runtime.engine.kv.truncate(0)
            expected = step(runtime, text, 160).copy()
        reference, targets = _log_softmax(expected), np.array(text[-159:])
        perplexity = np.exp(-reference[np.arange(159), targets].mean())
        print(f"{'devices':>7} {'wire':>5} {'worst deviation':>16} {'mean KL':>10} {'perplexity':>11} {'change':>8}")
        for n_devices in (1, 2, 3, 4):
            for wire in ("f32", "f16", "q8") if n_devices > 1 else ("f32",):
                options = ClusterOptions(n_devices, discovery_s=0, wire=cast(Any, wire))
                with load(args.model, options) as runtime:
                    n_used = len(runtime.plan()["cluster"]["devices"])
                    got = step(runtime, text, 160).copy()
                ours = _log_softmax(got)
                chosen = expected[np.arange(160), got.argmax(axis=1)]
                deviation = ((expected.max(axis=1) - chosen) / expected.std(axis=1)).max()
                kl = (np.exp(reference) * (reference - ours)).sum(axis=1).mean()
                own = np.exp(-ours[np.arange(159), targets].mean())
                print(f"{n_used:>7} {wire:>5} {deviation:>13.4f} sd {kl:>10.2e} {own:>11.3f} "
                      f"{(own / perplexity - 1) * 100:>7.2f}%", flush=True)


def perplexity(args: argparse.Namespace) -> None:
    """Texts of some length through the 8-bit wire: how much less sure of each next token the cluster is."""
    with running(3):
        with load(args.model, None) as runtime:
            texts = {path.name: runtime.tokenize(path.read_bytes())[:args.tokens] for path in args.texts or _texts()}
            expected = {name: surprise(runtime, text) for name, text in texts.items()}
        n_tokens = sum(len(one) for one in expected.values())
        alone = np.exp(np.concatenate([*expected.values()]).mean())
        print(f"{len(texts)} texts, {n_tokens} tokens: perplexity of one device {alone:.4f}; with the 8-bit wire it "
              f"changes by", flush=True)
        for n_devices in (2, 3, 4):
            with load(args.model, ClusterOptions(n_devices, discovery_s=0, wire="q8")) as runtime:
                n_used = len(runtime.plan()["cluster"]["devices"])
                change = {name: surprise(runtime, text) - expected[name] for name, text in texts.items()}
            every = np.concatenate([*change.values()])
            error = every.std() / np.sqrt(len(every))
            each = ", ".join(f"{name} {np.expm1(one.mean()):+.2%}" for name, one in change.items())
            print(f"{n_used} devices: {np.expm1(every.mean()):+.3%} (standard error {error:.3%}; goal 0.5 %); {each}",
                  flush=True)


def surprise(runtime: Runtime, text: Sequence[int]) -> NDArray[np.float64]:
    """(n_tokens - 1,): minus the log probability of each token after those before it."""
    runtime.engine.kv.truncate(0)
    parts = []
    for start in range(0, len(text) - 1, _AT_ONCE):
        part = text[start:start + _AT_ONCE]
        targets = np.array(text[start + 1:start + 1 + len(part)])
        logs = _log_softmax(step(runtime, part, len(part)))
        parts.append(-logs[np.arange(len(targets)), targets])
    return np.concatenate(parts)


def _texts() -> list[Path]:
    """Prose, code and a licence that every checkout and every Python have."""
    here = Path(__file__).parents[1]
    return [here / "README.md", here / "CONTRIBUTING.md", here / "tensorpar" / "leader.py", Path(argparse.__file__),
            Path(textwrap.__file__)]
