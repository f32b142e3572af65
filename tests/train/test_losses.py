import jax.numpy as jnp
import numpy as np

from mambamim_jax.model.mask import Mask
from mambamim_jax.train.losses import reconstruction_loss

P = 4


def by_hand(reconstruction, image, active):
    """The definition in float64 loops."""
    total, count = 0.0, 0
    for b, h, w, d in zip(*np.nonzero(~active)):
        cube = np.s_[b, h * P : (h + 1) * P, w * P : (w + 1) * P, d * P : (d + 1) * P]
        x, y = image[cube].astype(np.float64).ravel(), reconstruction[cube].astype(np.float64).ravel()
        target = (x - x.mean()) / np.sqrt(x.var(ddof=1) + 1e-6)
        total, count = total + np.mean((y - target) ** 2), count + 1
    return total / count


def sample():
    rng = np.random.default_rng(0)
    image = rng.uniform(size=(2, 12, 8, 4, 1)).astype(np.float32)
    image[0, :P, :P, :P] = 0.25  # a constant patch: its variance is the floor alone
    reconstruction = rng.normal(size=image.shape).astype(np.float32)
    active = np.zeros((2, 6), bool)
    active[0, [1, 4]] = active[1, [0, 5]] = True
    return reconstruction, image, active.reshape(2, 3, 2, 1)


def test_loss_is_the_definition():
    reconstruction, image, active = sample()
    got = reconstruction_loss(reconstruction, image, Mask.from_active(active))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(float(got), by_hand(reconstruction, image, active), rtol=1e-5)


def test_visible_patches_do_not_count():
    reconstruction, image, active = sample()
    changed = reconstruction.copy()
    changed[1, :P, :P, :P] += 3.0
    mask = Mask.from_active(active)
    assert reconstruction_loss(changed, image, mask) == reconstruction_loss(reconstruction, image, mask)


def test_loss_is_float32_whatever_comes_in():
    reconstruction, image, active = (jnp.asarray(a) for a in sample())
    low = reconstruction.astype(jnp.bfloat16)
    mask = Mask.from_active(np.asarray(active))
    assert reconstruction_loss(low, image, mask) == reconstruction_loss(low.astype(jnp.float32), image, mask)
