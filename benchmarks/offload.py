"""`python benchmarks/offload.py ...`: the tables of benchmarks/beyond_memory.py, under the name of what they measure."""

import sys

sys.path.append(sys.path.pop(0))  # behind everything else: this file must not stand in for the package `offload`

from beyond_memory import main  # noqa: E402

if __name__ == "__main__":
    main()
