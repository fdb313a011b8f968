"""`edgert distill`: trains a retrieval head for a model, on this machine."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from apps.cli.arguments import above_zero, whole

_DESCRIPTION = """\
Train the small head that says which tokens of a long context a model needs
next (see --kv-budget of `edgert run`). The model reads text that lies on this
machine, or that --text names, and the head learns what its attention looks at.
What was captured is kept, so a run that was stopped goes on, and a longer one
adds to it. Needs pip install 'edgert[distill]'.
"""


def add_subcommand(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add `distill`; its `func` takes the parsed arguments and returns the exit status."""
    parser = subparsers.add_parser("distill", help="train a retrieval head for a long context",
                                   description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a path, a name that `edgert list` shows, or user/repo:quant")
    parser.add_argument("--models-dir", type=Path, action="append", default=[], metavar="DIR",
                        help="look for models there too")
    parser.add_argument("--text", type=Path, action="append", default=[], metavar="DIR",
                        help="learn from the texts and sources in DIR")
    parser.add_argument("--minutes", type=above_zero("minutes", 1e5), default=60.0, metavar="N",
                        help="how long, all in all (60)")
    parser.add_argument("--examples", type=whole, default=0, metavar="N",
                        help="capture exactly N sequences, however long it takes")
    parser.add_argument("--epochs", type=whole, default=12, metavar="N",
                        help="passes over the sequences, at most (12)")
    parser.add_argument("--dim", type=whole, default=64, metavar="N", help="values of a query and a key (64)")
    parser.add_argument("--feature-layers", type=int, nargs="+", default=[], metavar="N",
                        help="layers whose output the head sees (early, a third and two thirds on the way)")
    parser.add_argument("--seed", type=int, default=7, metavar="N")
    parser.add_argument("--threads", type=whole, default=None, metavar="N")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the head there instead of among edgert's files")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep what is captured there")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Distil one head; progress goes to standard error, the head's directory to standard output."""
    from edgert.errors import UsageError
    from edgert.ggml.library import load_libraries
    from edgert.gguf.model_file import ModelFile
    from edgert.models.catalog import Catalog
    from edgert.paths import Paths
    from edgert.text.tokenizer import Tokenizer

    try:
        from retrieval.distillation.distil import Options, distil
        from retrieval.distillation.training import Recipe
    except ImportError as error:
        raise UsageError(f"distilling needs {error.name}", "Install it: pip install 'edgert[distill]'.") from error

    for directory in args.text:
        if not directory.is_dir():
            raise UsageError(f"--text {directory} is no directory")
    from edgert.cpu import usable_cores

    paths = Paths.of_user()
    path = Catalog(paths, args.models_dir).find(args.model)
    model = ModelFile.open(path)
    name, start_s = f"{path.stem}-{model.fingerprint()[:8]}", time.monotonic()
    options = Options(args.minutes, args.work or paths.cache / "distill" / f"{name}-{args.seed}",
                      args.out or paths.heads / name, args.text, args.threads or usable_cores(), args.examples,
                      Recipe(dim=args.dim, n_epochs=args.epochs, seed=args.seed),
                      feature_layers=tuple(args.feature_layers))
    load_libraries()
    with Tokenizer.open(path) as tokenizer:
        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special=False, parse_special=False)

        def say(text: str) -> None:
            print(f"[{time.monotonic() - start_s:6.0f} s] {text}", file=sys.stderr, flush=True)

        card = distil(model, encode, options, say)
    for measure, value in card.quality.items():
        say(f"{measure} {value}")
    print(options.out)
    return 0
