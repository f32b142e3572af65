"""Shapes that tests and benchmarks of one operation share."""

from __future__ import annotations

SCAN = ((2, 1, 8, 4), (1, 7, 40, 16), (2, 16, 32, 4), (2, 37, 24, 3), (1, 130, 5, 1))
"""(b, l, e, n) of the selective scan: one token, odd lengths, whole and broken chunks, odd widths and states."""
