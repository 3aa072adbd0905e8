"""Makes `csrc/build.py` and the helpers of this folder importable in any import mode."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parents[1] / "csrc"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
