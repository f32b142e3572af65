"""What XLA says where a device's memory is not enough, in a line."""

from __future__ import annotations

import re


class DeviceMemoryError(MemoryError):
    """A device has less memory than is wanted; the line says for what, and what needs less."""

    exit_code = 2


def exhausted(error: Exception) -> str | None:
    """ "out of memory, 12.3 GiB were wanted", the size if XLA tells it; None for an error that is another one.

    Args:
      error: what JAX raised, ``jax.errors.JaxRuntimeError`` for instance.
    """
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    found = re.search(r"allocat\w* (?:request for )?(?:(\d+) bytes|([\d.]+)\s?([KMGT])iB)", text)
    if found is None:
        return "out of memory"
    size = int(found[1]) if found[1] else float(found[2]) * 2 ** (10 * ("KMGT".index(found[3]) + 1))
    unit, scale = ("GiB", 2**30) if size >= 2**30 else ("MiB", 2**20) if size >= 2**20 else ("KiB", 2**10)
    return f"out of memory, {size / scale:.1f} {unit} were wanted"
