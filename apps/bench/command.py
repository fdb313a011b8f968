"""`edgert bench`: what is asked for is checked before anything is measured, and printed as it comes.

How things are measured is in session.py, how they look in formats.py, table.py, plots.py and report.py.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from apps.bench.options import add_options

if TYPE_CHECKING:
    from apps.bench.asked import Asked
    from apps.bench.formats import Format, FormatName
    from apps.bench.progress import Progress
    from apps.bench.results import Row, Subject
    from apps.bench.session import Session
    from edgert.gguf.model_file import ModelFile

_log = logging.getLogger(__name__)
_DESCRIPTION = """\
Measure a model's speed with llama-bench's tests, names and numbers: pp512 is a
prompt of 512 tokens, tg128 is 128 tokens generated one by one, @ d512 is with
512 tokens before them. Lists are 0,512 or 128-1024*2 or 100-500+100. A rate of
generation counts from the first token to the last.
"""


def add_subcommand(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add `bench`; its `func` takes the parsed arguments and returns the exit status."""
    parser = subparsers.add_parser("bench", help="measure a model's speed, memory and energy",
                                   description=_DESCRIPTION, usage="%(prog)s [options] MODEL")
    add_options(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Measure, or compare what was measured."""
    from edgert.errors import UsageError

    if (args.compare is None) == (args.model is None):
        raise UsageError("bench takes a MODEL, or --compare A.json B.json", "See `edgert bench --help`.")
    if args.compare is not None:
        from apps.bench.compare import compare

        _print(compare(*args.compare))
        return 0
    return _measure(args)


def _measure(args: argparse.Namespace) -> int:
    """Ctrl-C ends it; tests that were done are printed, drawn and reported."""
    from apps.bench.formats import format_named
    from apps.bench.progress import Progress
    from apps.bench.sampler import Sampler
    from apps.bench.session import Session
    from apps.cli.interrupts import Interrupts, exit_status

    asked, model, varies = prepare(args)
    form = format_named(_output(args), has_baseline=args.baseline is not None, sweeps=varies)
    with Interrupts() as interrupts, Sampler() as sampler, Progress() as progress:
        session = Session(asked, progress, sampler)
        with interrupts.stopping(session.stop):
            rows = _rows(session, asked, model, form, progress)
    _keep(args, rows)
    return 0 if interrupts.stopped_by is None else exit_status(interrupts.stopped_by)


def _rows(session: Session, asked: Asked, model: ModelFile, form: Format, progress: Progress) -> list[Row]:
    """Every row, printed as soon as it is there; those until it was stopped."""
    from apps.bench.process import Stopped
    from apps.bench.results import row

    rows: list[Row] = []
    _print(form.head())
    try:
        subject = describe_subject(asked, model, session.survey(), progress)
        for results in session.results():
            new = [row(subject, result) for result in results]
            rows += new
            with progress.aside():
                _print(form.rows(new))
    except Stopped:
        _log.info("stopped")
    with progress.aside():
        _print(form.foot())
    return rows


def prepare(args: argparse.Namespace) -> tuple[Asked, ModelFile, tuple[str, ...]]:
    """What to measure, the model's header, and which columns vary. Raises whatever would end it later."""
    from apps.bench.asked import OURS, Asked, Peer
    from apps.bench.options import sweep_of, tests_of
    from edgert.gguf.model_file import ModelFile
    from edgert.models.catalog import Catalog
    from edgert.paths import Paths
    from edgert.planning import check_options

    tests = tests_of(args)
    sweep = sweep_of(args, tests)
    _check_outputs(args)
    _check_limit(args)
    _check_temperature(args)
    path = Catalog(Paths.of_user(), args.models_dir).find(args.model)
    model = ModelFile.open(path)
    for setup in sweep.setups:
        check_options(setup.engine_options())
    peers = (OURS, *([Peer("llama.cpp", "llama.cpp")] if args.baseline else []))
    asked = Asked(path, model.parts, sweep.setups, tests, args.repetitions, peers, args.limit, args.cold, args.delay,
                  args.cooldown_to, _cluster(args), not args.no_predict, args.verbose, args.log_json)
    return asked, model, sweep.varies


def _cluster(args: argparse.Namespace) -> dict[str, Any] | None:
    """What a contender's process is told of the cluster. Raises UsageError, ClusterError."""
    from apps.cli.arguments import cluster_options
    from edgert.errors import UsageError

    if cluster_options(args) is None:
        return None
    if args.memory is not None and len(args.memory) > 1:
        raise UsageError("--cluster takes one --memory", "Name one budget, for this device's part.")
    return {"devices": args.devices, "peers": args.peer, "wire": args.wire}


def _check_outputs(args: argparse.Namespace) -> None:
    """A file that cannot be written is said before an hour of measuring, not after it."""
    if args.plot is not None:
        from apps.bench.plots import check_plot

        check_plot(args.plot)
    if args.report is not None:
        from apps.bench.report import check_report

        check_report(args.report)


def _check_limit(args: argparse.Namespace) -> None:
    from apps.bench.control_group import why_impossible
    from edgert.errors import UsageError

    if not args.limit:
        return
    if args.memory is None:
        raise UsageError("--limit needs a budget to hold", "Name it with --memory, such as --memory 1G --limit.")
    why = why_impossible()
    if why is not None:
        raise UsageError(f"--limit cannot be had here: {why}",
                         "Run it as root where control groups can be written, or measure without --limit: the budget "
                         "of --memory holds by itself.")


def _check_temperature(args: argparse.Namespace) -> None:
    from apps.bench.thermal import temperature_sensors, warmest_c
    from edgert.errors import UsageError

    if args.cooldown_to is not None and warmest_c(temperature_sensors()) is None:
        raise UsageError("--cooldown-to: this system shows no temperature", "Wait a fixed time with --delay instead.")


def describe_subject(asked: Asked, model: ModelFile, environment: dict[str, Any], progress: Progress) -> Subject:
    """What is measured, in llama-bench's words, and the environment block."""
    from apps.bench.environment import model_sha256
    from apps.bench.results import Subject
    from edgert.models.describe import describe
    from edgert.paths import Paths

    told, n_params = describe(model.path), model.n_parameters
    size = f"{n_params / 1e9:.1f}B" if n_params >= 1e9 else f"{n_params / 1e6:.0f}M"
    progress.doing("the model's SHA-256")
    sha256 = model_sha256(asked.parts, Paths.of_user().cache / "sha256.json")
    commit = environment["edgert_commit"] or environment["edgert_version"]
    return Subject(
        f"edgert-{commit}+ggml-{environment['ggml_version']}", environment["cpu"], str(model.path),
        f"{told.architecture} {size} {told.quantisation}", sum(told.block_bytes.values()), n_params,
        {**environment, "model_name": model.path.name, "model_sha256": sha256})


def _output(args: argparse.Namespace) -> FormatName:
    chosen: FormatName | None = args.output
    return chosen or ("table" if sys.stdout is not None and sys.stdout.isatty() else "md")


def _keep(args: argparse.Namespace, rows: list[Row]) -> None:
    if not rows:
        return
    if args.plot is not None:
        from apps.bench.plots import plot

        plot(args.plot, rows)
    if args.report is not None:
        from apps.bench.report import write_report

        print(f"report: {write_report(args.report, rows)}", file=sys.stderr)


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)
