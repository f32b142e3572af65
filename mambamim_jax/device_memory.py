"""What XLA says where a device's memory is not enough, in a line."""

from __future__ import annotations

import re


def exhausted(error: Exception) -> str | None:
    """ "out of memory, 12.3 GiB were wanted", the size if XLA tells it; None for an error that is another one.

    Args:
      error: what JAX raised, ``jax.errors.JaxRuntimeError`` for instance.
    """
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    found = re.search(r"allocat\w* (\d+) bytes|allocat\w* ([\d.]+)\s?([KMGT])iB", text)
    if found is None:
        return "out of memory"
    size = int(found[1]) if found[1] else float(found[2]) * 2 ** (10 * ("KMGT".index(found[3]) + 1))
    return f"out of memory, {size / 2**30:.1f} GiB were wanted"
