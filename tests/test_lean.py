"""How programs are compiled for a CPU."""

import os

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


@pytest.mark.parametrize(
    ("version", "before", "after"),
    [
        ((0, 10, 2), "", ""),
        ((0, 11, 2), "", lean.OLDER_EMITTERS),
        ((0, 12, 0), "--one=1", f"--one=1 {lean.OLDER_EMITTERS}"),
        ((0, 11, 2), "--xla_backend_extra_options=mine", "--xla_backend_extra_options=mine"),
    ],
)
def test_older_emitters_from_the_version_that_needs_them(version, before, after, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", before)
    monkeypatch.setattr(jax, "__version_info__", version)
    lean.with_older_emitters()
    assert os.environ["XLA_FLAGS"] == after
