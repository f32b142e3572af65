"""How programs are compiled for a CPU."""

import jax
import jax.numpy as jnp
import pytest

from mambamim_jax import lean


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="options of the compiler for CPUs")
def test_batched_products_are_eigens():
    x = jnp.ones((64, 96, 192)), jnp.ones((64, 192, 96))
    lowered = jax.jit(lambda a, b: jnp.einsum("ptc,pco->pto", a, b)).lower(*x)
    compiled = lean.compile_lean(lowered)
    assert " dot(" in compiled.as_text()
    assert "ynn" not in compiled.as_text()
    assert compiled(*x).shape == (64, 96, 96)
