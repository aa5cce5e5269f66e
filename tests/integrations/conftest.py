"""Frameworks that are not installed are stood in for by doubles of the hooks that we fill."""

import sys
from pathlib import Path

DOUBLES = str(Path(__file__).parent / "doubles")
if DOUBLES not in sys.path:
    sys.path.append(DOUBLES)  # at the end: a framework that is installed wins
