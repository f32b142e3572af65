"""The selective scan of Mamba: one contract, one specification, several implementations."""

from mambamim_jax.ops.selective_scan.api import IMPLEMENTATIONS, selective_scan

__all__ = ["IMPLEMENTATIONS", "selective_scan"]
