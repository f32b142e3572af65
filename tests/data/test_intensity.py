"""Normalisation by channel, the same for training and prediction."""

import numpy as np
import pytest

from mambamim_jax.data.intensity import normalise

WINDOW, ZSCORE = {"kind": "window", "low": -175, "high": 250}, {"kind": "zscore"}


def test_each_channel_has_its_own_rule():
    hu = np.array([-1000.0, -175.0, 37.5, 250.0, 3000.0])
    mri = np.array([0.0, 2.0, 4.0, 6.0, 0.0])
    image = np.stack([hu, mri], axis=-1).reshape(5, 1, 1, 2)
    found = normalise(image, [WINDOW, ZSCORE])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:, 0, 0, 0], [0, 0, 0.5, 1, 1], atol=1e-6)
    root = np.sqrt(1.5)  # the non-zero ones, 2, 4 and 6, have mean 4 and variance 8/3
    np.testing.assert_allclose(found[:, 0, 0, 1], [0, -root, 0, root, 0], atol=1e-6)


def test_an_empty_channel_stays_zero():
    assert not normalise(np.zeros((2, 2, 2, 1)), [ZSCORE]).any()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="expected \\(h, w, d, 2\\)"):
        normalise(np.zeros((2, 2, 2, 1)), [ZSCORE, ZSCORE])
    with pytest.raises(ValueError, match="expected one of window, zscore"):
        normalise(np.zeros((2, 2, 2, 1)), [{"kind": "minmax"}])
