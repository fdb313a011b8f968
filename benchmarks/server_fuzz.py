"""Sends what the API's own description allows, and what it does not, until something answers with a 500.

    pip install schemathesis
    python benchmarks/server_fuzz.py MODEL.gguf --examples 50

What loads a model comes last: with a context of thousands of tokens, an answer that nobody bounds takes minutes.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

_LOADING = "/edgert/models/load"
_START = "import sys; from apps.cli.main import main; sys.exit(main(sys.argv[1:]))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--examples", type=int, default=50)
    args = parser.parse_args()
    process = subprocess.Popen([sys.executable, "-c", _START, "serve", str(args.model), "--port", "0", "--context",
                                "256", "--threads", "1"], stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stderr is not None
    try:
        url = (re.search(r"serves on (\S+)", process.stderr.readline()) or sys.exit("no server"))[1]
        statuses = [fuzz(url, args.examples, which, _LOADING) for which in ("--exclude-path", "--include-path")]
    finally:
        process.terminate()
        process.wait()
    sys.exit(max(statuses))


def fuzz(url: str, n_examples: int, *which: str) -> int:
    """Schemathesis' exit status."""
    with tempfile.TemporaryDirectory() as directory:  # it leaves notes where it runs
        return subprocess.run(
            [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "--checks",
             "not_a_server_error", "--max-examples", str(n_examples), "--seed", "1", "--phases",
             "examples,coverage,fuzzing", "--request-timeout", "120", *which], check=False, cwd=directory).returncode


if __name__ == "__main__":
    main()
