"""Benchmarks: ratios measured alternately in one run. ``launch/bench.py NAME`` calls ``bench/NAME.py``."""
