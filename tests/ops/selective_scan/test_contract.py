"""The selective scan's checks and its choice of an implementation."""

from __future__ import annotations

import pytest

from mambamim_jax.ops.selective_scan import selective_scan, triton, tuning
from tests.ops.selective_scan.cases import assert_close, random_inputs, run

SHAPE = (2, 7, 8, 4)


def test_auto_equals_the_reference():
    inputs = random_inputs(SHAPE)
    assert_close(run(inputs, "auto"), run(inputs, "reference"), 1e-5, "auto")


@pytest.mark.parametrize("field", ["delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"])
def test_wrong_shape_is_named(field):
    inputs = random_inputs(SHAPE)
    wrong = inputs._replace(**{field: getattr(inputs, field)[..., :-1]})
    with pytest.raises(ValueError, match=f"selective_scan: found (u .* and )?{field} .*expected"):
        run(wrong, "auto") if field != "A" else run(wrong._replace(A=wrong.A[0]), "auto")


def test_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="'fast', expected one of"):
        run(random_inputs(SHAPE), "fast")


def test_reserved_implementation_says_so():
    with pytest.raises(NotImplementedError, match="pallas_mosaic"):
        run(random_inputs(SHAPE), "pallas_mosaic")


def test_kernel_says_why_it_refuses():
    inputs = random_inputs(SHAPE)
    assert triton.refusal(inputs, "gpu", "9.0") is None
    assert "expected 8.0" in str(triton.refusal(inputs, "gpu", "7.5"))
    assert "platform tpu" in str(triton.refusal(inputs, "tpu", ""))
    assert "state of 64" in str(triton.refusal(random_inputs((1, 2, 4, 64)), "gpu", "8.0"))
    assert "float64" in str(triton.refusal(random_inputs(SHAPE, "float64"), "gpu", "8.0"))


def test_launch_of_an_unlisted_card_is_the_older_row():
    assert tuning.launch_for((8, 9)) == tuning.TUNED[8, 0]
    assert tuning.launch_for((12, 0)) == tuning.TUNED[9, 0]


def test_no_tokens_is_an_error():
    *arrays, _ = random_inputs((1, 0, 8, 4))
    with pytest.raises(ValueError, match="l ≥ 1"):
        selective_scan(*arrays)
