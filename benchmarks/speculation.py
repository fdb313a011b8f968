"""Prompt-lookup speculation: answers with and without it, in turn, on text that repeats and on text that does not.

    python benchmarks/speculation.py MODEL.gguf [--memory 540M] [--speculate auto|on] [--rounds 3] [--tokens 300]

The copy-heavy task is to edit a function of 60 lines; the other is prose. Without --memory the budget is half the
model. Prints for each task the speed of both, the ratio as the median over rounds (which a noisy machine moves least),
tokens per pass and guesses that were right, and a JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from edgert import Runtime, SamplingParams
from edgert.speculation import Speculate
from edgert.text.template import Message

_FUNCTION = '''\
def parse_invoice(lines, currency="EUR", strict=False):
    """Turn the lines of an invoice into a dictionary."""
    invoice = {"currency": currency, "items": [], "errors": []}
    total = 0
    discount = 0
    section = "header"
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if line == "[items]":
            section = "items"
            continue
        if line == "[footer]":
            section = "footer"
            continue
        if section == "header":
            key, separator, value = line.partition(":")
            if not separator:
                invoice["errors"].append((number, "header without a value"))
                if strict:
                    raise ValueError(f"line {number}: header without a value")
                continue
            key = key.strip().lower()
            value = value.strip()
            if key == "date":
                invoice["date"] = value
            elif key == "customer":
                invoice["customer"] = value
            elif key == "number":
                invoice["number"] = int(value)
            else:
                invoice.setdefault("other", {})[key] = value
        elif section == "items":
            parts = [part.strip() for part in line.split(";")]
            if len(parts) != 3:
                invoice["errors"].append((number, "an item has three parts"))
                if strict:
                    raise ValueError(f"line {number}: an item has three parts")
                continue
            name, quantity, price = parts
            try:
                quantity = int(quantity)
                price = float(price)
            except ValueError:
                invoice["errors"].append((number, "not a number"))
                if strict:
                    raise
                continue
            amount = quantity * price
            total += amount
            invoice["items"].append({"name": name, "quantity": quantity, "price": price, "amount": amount})
        elif section == "footer":
            key, _, value = line.partition(":")
            if key.strip().lower() == "discount":
                discount = float(value.strip().rstrip("%")) / 100
    invoice["subtotal"] = total
    invoice["discount"] = total * discount
    invoice["total"] = total - invoice["discount"]
    return invoice
'''
TASKS = {
    "edit": f"Rename the variable `total` to `subtotal` in this function. Answer with the whole function, and nothing "
            f"else.\n\n```python\n{_FUNCTION}```",
    "prose": "Tell me a story about a lighthouse keeper who finds a letter in a bottle. Do not repeat yourself.",
}


def answer(runtime: Runtime, task: str, n_tokens: int) -> dict[str, Any]:
    """Figures of one answer, its prompt computed anew."""
    runtime.generate([1], max_tokens=1).result()
    messages: list[Message] = [{"role": "user", "content": task}]
    generation = runtime.chat(messages, max_tokens=n_tokens, sampling=SamplingParams(temperature=0))
    generation.result()
    return {**generation.timings.to_dict(), "token_ids": generation.token_ids}


def compare(args: argparse.Namespace, task: str) -> dict[str, Any]:
    """Both ways in turn, now the one first and now the other, in a runtime each, loaded anew: they would not fit side
    by side."""
    modes: tuple[Speculate, Speculate] = ("off", args.speculate)
    runs: dict[str, list[dict[str, Any]]] = {"off": [], args.speculate: []}
    for number in range(args.rounds):
        for mode in modes if number % 2 else modes[::-1]:
            with Runtime.load(args.model, memory=args.memory, context=args.context, speculate=mode) as runtime:
                runs[mode].append(answer(runtime, TASKS[task], args.tokens))
    off, on = runs["off"], runs[args.speculate]
    ratios = [b["predicted_per_second"] / a["predicted_per_second"] for a, b in zip(off, on, strict=True)]
    last = on[-1]
    n_same = next((i for i, (a, b) in enumerate(zip(off[-1]["token_ids"], last["token_ids"], strict=False)) if a != b),
                  min(len(off[-1]["token_ids"]), len(last["token_ids"])))
    n_passes = last["predicted_n"] - last["draft_n_accepted"]
    return {"task": task, "ratio": statistics.median(ratios), "ratios": [round(ratio, 3) for ratio in ratios],
            "tok_s_off": statistics.median(run["predicted_per_second"] for run in off),
            "tok_s": statistics.median(run["predicted_per_second"] for run in on),
            "tokens_per_pass": last["predicted_n"] / n_passes, "draft_n": last["draft_n"],
            "draft_n_accepted": last["draft_n_accepted"], "predicted_n": last["predicted_n"], "n_same": n_same,
            "unaccounted": max(_unaccounted(run) for run in (*off, *on))}


def _unaccounted(run: dict[str, Any]) -> float:
    """The share of the answer's time that its parts do not explain."""
    parts: float = sum(run[f"predicted_{part}_ms"] for part in ("compute", "wait", "rest"))
    predicted_ms: float = run["predicted_ms"]
    return abs(predicted_ms - parts) / predicted_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", help="the budget (default: half the model); 0 is no budget")
    parser.add_argument("--speculate", choices=("auto", "on"), default="auto")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", default=",".join(TASKS))
    args = parser.parse_args()
    if args.memory is None:
        args.memory = args.model.stat().st_size // 2
    elif args.memory == "0":
        args.memory = None
    for task in args.tasks.split(","):
        result = compare(args, task)
        print(f"{task:6} {result['tok_s_off']:6.2f} -> {result['tok_s']:6.2f} tok/s  x{result['ratio']:.2f}  "
              f"{result['tokens_per_pass']:.1f} tokens a pass, {result['draft_n_accepted']} of {result['draft_n']} "
              f"guesses right", flush=True)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
