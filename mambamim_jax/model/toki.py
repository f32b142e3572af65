"""TOKI, state space token interpolation: what stands at the hidden places of the deepest scale (METHOD section 4).

Every filler is a pure function of the tokens in raster order, of which are active, and of its one parameter. Anchors
are the active tokens and, forcibly, the first and the last. Between consecutive anchors p < q, with r = q - p and
j = 0..r-1, the released code computes

    V_j = (1 - alpha_j) x_p + alpha_j x_q,    alpha_j = j / (r - 1)  (0 where r = 1)
    z_{p+j} = sum_{s=0..j} A^{r-1-s} V_s,     z_{l-1} = A x_{l-1}

and the paper (MambaMIM, section 3.3) z_{p+j} = sum_{s=0..j} A^{j-s} V_s with alpha_j = j / (r + 1) and a
discretisation factor that needs the inverse of A; as A starts at zero it is left out here. Active tokens keep x.

Powers are those of the anchors (`ops.anchor_powers`), as V is a mix of two of them; sums: `ops.segment_cumsum`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from mambamim_jax.ops.anchor_powers import anchor_powers
from mambamim_jax.ops.segment_cumsum import segment_cumsum
from mambamim_jax.types import Array

Filler: TypeAlias = Callable[[Array, Array, Any], Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments:
    """For each of l tokens its place between anchors, int32 (b, l): p, q (the last token: both its own), j, r."""

    start: Array
    end: Array
    offset: Array
    gap: Array


def find_segments(active: Array) -> Segments:
    """The anchors around each token.

    Args:
      active: bool (b, l); the first and the last token are anchors in any case.
    """
    length = active.shape[1]
    places = jnp.arange(length, dtype=jnp.int32)
    anchor = active | (places == 0) | (places == length - 1)
    start = lax.cummax(jnp.where(anchor, places, 0), axis=1)
    after = lax.cummin(jnp.where(anchor, places, length - 1), axis=1, reverse=True)
    end = jnp.minimum(jnp.concatenate([after[:, 1:], after[:, -1:]], axis=1), length - 1)
    return Segments(start, end, places - start, end - start)


def _gather(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, index[..., None], axis=1)


def interpolate(x: Array, segments: Segments, alpha: Array) -> Array:
    """V = (1 - alpha) x_p + alpha x_q for tokens x (b, l, c) and weights alpha (b, l)."""
    alpha = alpha.astype(x.dtype)[..., None]
    return (1 - alpha) * _gather(x, segments.start) + alpha * _gather(x, segments.end)


def segment_recurrence(y: Array, A: Array, offset: Array) -> Array:
    """z_j = A z_{j-1} + y_j along l, restarting where offset is 0: the sum over s of A**(j-s) y_s by doubling."""
    step = 1
    while step < y.shape[1]:
        shifted = jnp.pad(y, ((0, 0), (step, 0), (0, 0)))[:, :-step]
        reach = (offset >= step)[..., None]
        moved = jnp.einsum("blc,ec->ble", shifted, A, precision=lax.Precision.HIGHEST)
        y = y + jnp.where(reach, moved, 0)
        step *= 2
        square = jnp.matmul(A, A, precision=lax.Precision.HIGHEST)
        A = jnp.where(jnp.any(offset >= step), square, jnp.zeros_like(A))
    return y


def _released_tokens(x: Array, active: Array, A: Array) -> Array:
    """z of the released formula for every token, active ones included."""
    segments = find_segments(active)
    return segment_cumsum(anchor_powers(x, A, segments.start, segments.end), segments.offset)


def _keep_active(x: Array, active: Array, filled: Array) -> Array:
    return jnp.where(active[..., None], x, filled)


def toki(x: Array, active: Array, A: Array) -> Array:
    """TOKI as the released code computes it, read as (token, channel).

    Args:
      x: (b, l, c) tokens in raster order; hidden ones matter only at the first and the last place.
      active: bool (b, l).
      A: (c, c), the learned transition, initialised to zero.

    Returns:
      (b, l, c): x at active places, interpolated tokens at hidden ones.
    """
    return _keep_active(x, active, _released_tokens(x, active, A))


def toki_scrambled(x: Array, active: Array, A: Array) -> Array:
    """`toki` with the released code's layout: the (l, c) result read as if it were (c, l). For ablations only."""
    b, length, channels = x.shape
    scrambled = _released_tokens(x, active, A).reshape(b, channels, length).swapaxes(1, 2)
    return _keep_active(x, active, scrambled)


def toki_paper(x: Array, active: Array, A: Array) -> Array:
    """TOKI as the paper writes it, without the discretisation factor; arguments as `toki`."""
    segments = find_segments(active)
    alpha = segments.offset.astype(x.dtype) / (segments.gap + 1)
    filled = segment_recurrence(interpolate(x, segments, alpha), A, segments.offset)
    return _keep_active(x, active, filled)


def linear(x: Array, active: Array, A: None = None) -> Array:
    """Linear interpolation alone, weight j/r between anchors; it has no parameter."""
    del A
    segments = find_segments(active)
    alpha = segments.offset.astype(x.dtype) / jnp.maximum(segments.gap, 1)
    return _keep_active(x, active, interpolate(x, segments, alpha))


def learned_token(x: Array, active: Array, token: Array) -> Array:
    """One learned token (c,) at every hidden place, as masked autoencoders do."""
    return _keep_active(x, active, token.astype(x.dtype))


FILLERS: dict[str, Filler] = {
    "toki": toki,
    "toki_paper": toki_paper,
    "toki_scrambled": toki_scrambled,
    "linear": linear,
    "learned_token": learned_token,
}
"""Fillers by name: f(x (b, l, c), active (b, l), parameter) -> (b, l, c)."""


def filler_parameter_shape(name: str, channels: int) -> tuple[int, ...] | None:
    """Shape of a filler's parameter: (c, c) for the TOKI family, (c,) for a learned token, None where it has none."""
    return {"learned_token": (channels,), "linear": None}.get(name, (channels, channels))
