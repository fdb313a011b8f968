"""What a cluster costs and brings, in tables: processes of this machine, real sockets, TLS, and delays by a relay.

    python benchmarks/cluster.py collectives                   a sum of 4096 values: algorithms, ranks, delays, TLS
    python benchmarks/cluster.py tls MODEL                     what encryption costs each token of a model
    python benchmarks/cluster.py pays MODEL                    two processes on a core each against one on one core
    python benchmarks/cluster.py composition MODEL             the same with 0.6 of the model's size in memory each
    python benchmarks/cluster.py sets MODEL                    tokens over 512 of a long text against over all of it
    python benchmarks/cluster.py near-limit MODEL              time per token against compute + 2L sums, 1 ms delay
    python benchmarks/cluster.py equal MODEL                   160 tokens teacher-forced: deviations and KL, every wire
    python benchmarks/cluster.py perplexity MODEL              the 8-bit wire on longer texts: change of perplexity
    python benchmarks/cluster.py predicted MODEL               tokens/s as predicted and as measured, at three delays

Every figure is a median; what is compared is measured in turn. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cluster_equal import equal, perplexity
from cluster_speed import composition, near_limit, pays, predicted, sets
from cluster_sums import collectives, tls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function, n_runs in (("collectives", collectives, 0), ("tls", tls, 3), ("pays", pays, 5),
                                   ("composition", composition, 3), ("sets", sets, 2), ("near-limit", near_limit, 0),
                                   ("equal", equal, 0),
                                   ("perplexity", perplexity, 0), ("predicted", predicted, 0)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        if function is not collectives:
            command.add_argument("model", type=Path)
        if n_runs:
            command.add_argument("--runs", type=int, default=n_runs)
        if function is sets:
            command.add_argument("--context", type=int, default=8192)
        if function is predicted:
            command.add_argument("--delays", type=float, nargs="+", default=[0.0, 1.0, 5.0], metavar="MS")
        if function is perplexity:
            command.add_argument("--texts", type=Path, nargs="+", default=None)
            command.add_argument("--tokens", type=int, default=1024, help="of each text (1024)")
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
