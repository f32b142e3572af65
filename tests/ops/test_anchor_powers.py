"""Powers along segments against matrix powers, values and gradients, in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mambamim_jax.ops import anchor_powers as anchor_powers_module
from mambamim_jax.ops.anchor_powers import anchor_powers

CASES = {
    "one gap": (1, 7, []),
    "all anchors": (1, 5, [1, 2, 3]),
    "two tokens": (1, 2, []),
    "one token": (2, 1, []),
    "uneven": (1, 23, [1, 2, 9, 15, 16]),
    "batch": (3, 40, [4, 5, 20, 33]),
    "more anchors than slots": (2, 150, range(2, 150, 3)),
}


def anchors(batch, length, inner):
    """Start and end of every token's segment, another set of inner anchors in each sample."""
    start, end = np.zeros((2, batch, length), np.int32)
    for sample in range(batch):
        places = sorted({0, length - 1} | {(p * (sample + 1)) % length for p in inner})
        for token in range(length):
            start[sample, token] = max(p for p in places if p <= token)
            end[sample, token] = min((p for p in places if p > token), default=length - 1)
    return start, end


def reference(x, A, start, end):
    """One matrix power per token."""
    length = x.shape[1]
    place = np.arange(length)
    power = np.where(place == length - 1, 1, np.maximum(end - 1 - place, 0))
    table = [jnp.eye(len(A), dtype=A.dtype)]
    for _ in range(power.max()):
        table.append(table[-1] @ A)
    matrices = jnp.stack(table)[power]
    p, q = (jnp.take_along_axis(x, jnp.asarray(anchor)[..., None], axis=1) for anchor in (start, end))
    alpha = ((place - start) / np.maximum(end - start - 1, 1))[..., None]
    return jnp.einsum("blec,blc->ble", matrices, (1 - alpha) * p + alpha * q)


# Steps that the slots are made for, and steps that a loop takes at a time: each other value lays chains another way,
# with slots that long chains leave empty, chains that go on in the next slot, and a last slot filled in part.
WAYS = [(name, 20, 1) for name in CASES]
WAYS += [
    ("uneven", 20, 4),
    ("batch", 20, 4),
    ("batch", 3, 1),
    ("batch", 60, 1),
    ("more anchors than slots", 5, 3),
]


@pytest.mark.parametrize(("name", "steps", "unrolled"), WAYS)
def test_equals_matrix_powers(name, steps, unrolled, monkeypatch):
    monkeypatch.setattr(anchor_powers_module, "STEPS", steps)
    monkeypatch.setattr(anchor_powers_module, "UNROLLED_CPU", unrolled)
    batch, length, inner = CASES[name]
    start, end = anchors(batch, length, inner)
    draw = np.random.default_rng(0)
    with jax.enable_x64(True):
        weights = jnp.asarray(draw.standard_normal((batch, length, 6)))

        def loss(function, x, A):
            y = function(x, A, start, end)
            return jnp.sum(weights * y**2), y

        both = [
            jax.jit(jax.value_and_grad(functools.partial(loss, f), argnums=(0, 1), has_aux=True))
            for f in (anchor_powers, reference)
        ]
        for scale in (0.0, 0.4):
            x = jnp.asarray(draw.standard_normal((batch, length, 6)))
            A = jnp.asarray(scale * draw.standard_normal((6, 6)))
            (_, found), gradients = both[0](x, A)
            (_, expected), right = both[1](x, A)
            np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)
            for a, b in zip(gradients, right):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * float(jnp.abs(b).max() + 1))


def test_powers_that_no_token_needs_cannot_overflow():
    start, end = anchors(1, 64, range(2, 62, 2))
    x, A = jnp.ones((1, 64, 4)), 1e9 * jnp.ones((4, 4))

    def total(x, A):
        return jnp.sum(anchor_powers(x, A, jnp.asarray(start), jnp.asarray(end)))

    for gradient in jax.grad(total, argnums=(0, 1))(x, A):
        assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("steps", [2, 8, 20, 50])
def test_a_table_holds_every_power_once_and_after_the_one_before(steps, monkeypatch):
    monkeypatch.setattr(anchor_powers_module, "STEPS", steps)
    plan_of = jax.jit(functools.partial(anchor_powers_module._plan, 16))
    draw = np.random.default_rng(steps)
    for _ in range(40):
        start, end = anchors(2, 37, draw.choice(37, draw.integers(0, 37), replace=False))
        plan = jax.device_get(plan_of(start, end, np.zeros(start.shape, np.float32)))
        table, rows = plan.table, int(plan.table.rows)
        counts = table.slots - (np.arange(table.steps) >= table.full)
        assert counts.sum() == rows == table.chain.sum()
        assert counts.max() <= 16
        step = np.repeat(np.arange(table.steps), counts)
        found = list(zip(plan.rows.token[:rows].tolist(), plan.rows.power[:rows].tolist()))
        assert len(set(found)) == rows
        for row, (token, power) in enumerate(found):
            assert table.row(token, power) == row
            if power > 1:
                assert found[plan.rows.parent[row]] == (token, power - 1)
                assert step[plan.rows.parent[row]] < step[row]
