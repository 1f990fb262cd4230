"""Where the repository and the data beside it are."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("PRIME_DATA") or ROOT.parent / "shared" / "data")
"""Public data sets for tests; not part of the repository."""
