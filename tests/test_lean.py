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


def test_options_for_gpus_are_known_to_the_compiler():
    lowered = jax.jit(lambda x: x + 1).lower(jnp.ones(3))
    assert lowered.compile(compiler_options=lean._ON_GPU)(jnp.ones(3)).tolist() == [2, 2, 2]
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        lowered.compile(compiler_options={f"{name}_": value for name, value in lean._ON_GPU.items()})


@pytest.mark.parametrize(
    ("backend", "options"), [("cpu", lean._ON_CPU), ("gpu", lean._ON_GPU), ("tpu", None)]
)
def test_options_follow_the_backend(backend, options, monkeypatch):
    class Lowered:
        def compile(self, compiler_options):
            return compiler_options

    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert lean.compile_lean(Lowered()) == options
