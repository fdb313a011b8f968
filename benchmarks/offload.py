"""`python benchmarks/offload.py ...`: the tables of benchmarks/beyond_memory.py, named after what they measure.

A script beside this file that says `import offload` means the package, and finds this file first: it makes way.
"""

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    from beyond_memory import main

    main()
else:
    here = sys.path.index(str(Path(__file__).parent))
    path = sys.path.pop(here)
    del sys.modules[__name__]
    importlib.import_module(__name__)
    sys.path.insert(here, path)
