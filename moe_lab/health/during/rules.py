"""The rules of a watch, in the order in which they are asked.

Limits stand on top of the file whose rule has them, those that several rules share in state.py and tracking.py, and nowhere
else. They were chosen on one half of the runs of `make detection` and judged on the other (benchmarks/detection.json).
"""

from __future__ import annotations

