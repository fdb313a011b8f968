"""`python benchmarks/offload.py ...`: the tables of benchmarks/beyond_memory.py, named after what they measure."""

import sys

sys.path.append(sys.path.pop(0))  # behind everything else: this file must not stand in for the package `offload`

from beyond_memory import main

if __name__ == "__main__":
    main()
