import jax.numpy as jnp
import numpy as np
import pytest

from mambamim_jax.model.mask import Mask
from mambamim_jax.train.losses import reconstruction_loss, segmentation_loss, targets_of

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


def test_what_does_not_fit_is_refused():
    """Also shapes that broadcast."""
    reconstruction, image, active = sample()
    mask, same = Mask.from_active(active), "the same for both"
    for found, wanted in (
        (reconstruction, image[:1]),
        (reconstruction[0], image[0]),
        (reconstruction[..., 0],) * 2,
    ):
        with pytest.raises(ValueError, match=same):
            reconstruction_loss(found, wanted, mask)
    for wrong, match in (
        (active, "mask: found ndarray, expected a Mask"),
        (Mask.from_active(active[:1]), "mask: found 1 samples"),
        (Mask.from_active(active.swapaxes(2, 3)), r"on a grid of \(3, 1, 2\), expected 2 on \(3, 2, 1\)"),
        (Mask.from_active(np.ones_like(active)), "mask: hides none of 6 patches"),
    ):
        with pytest.raises(ValueError, match=match):
            reconstruction_loss(reconstruction, image, wrong)
    logits, label = segmentation_sample()
    for target in (targets_of(label, 3)[:1], label, targets_of(label, 1)):
        with pytest.raises(ValueError, match=same):
            segmentation_loss(logits, target)


def dice_by_hand(probability, target):
    """Mean over classes of 1 - soft Dice, in float64 loops over crops."""
    rows = []
    for p, t in zip(probability.astype(np.float64), target):
        for c in range(p.shape[-1]):
            both, total = (p[..., c] * t[..., c]).sum(), p[..., c].sum() + t[..., c].sum()
            rows.append(1 - (2 * both + 1e-5) / (total + 1e-5))
    return np.mean(rows)


def segmentation_sample(classes=3):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(2, 4, 5, 6, classes)).astype(np.float32)
    return logits, rng.integers(0, classes, (2, 4, 5, 6)).astype(np.uint8)


def test_dice_and_cross_entropy_are_the_definition():
    logits, label = segmentation_sample()
    target = targets_of(label, 3)
    np.testing.assert_array_equal(target, np.eye(3)[label])
    exp = np.exp(logits.astype(np.float64))
    p = exp / exp.sum(-1, keepdims=True)
    entropy = -np.log(np.take_along_axis(p, label[..., None].astype(int), -1)).mean()
    got = segmentation_loss(logits, target, dice=2.0, cross_entropy=3.0)
    dice = dice_by_hand(p[..., 1:], np.eye(3)[label][..., 1:])
    np.testing.assert_allclose(float(got), 2 * dice + 3 * entropy, rtol=1e-5)
    everything = segmentation_loss(logits, target, background=True, cross_entropy=0.0)
    np.testing.assert_allclose(float(everything), dice_by_hand(p, np.eye(3)[label]), rtol=1e-5)
    weight = np.where(label == 0, 0.25, 1.0)
    each = -np.log(np.take_along_axis(p, label[..., None].astype(int), -1))[..., 0]
    weighed = segmentation_loss(logits, target, dice=0.0, background_weight=0.25)
    np.testing.assert_allclose(float(weighed), (weight * each).sum() / weight.sum(), rtol=1e-5)
    whole = segmentation_loss(logits, target, batch=True, cross_entropy=0.0)
    one = [a.reshape(1, -1, 1, 1, 3)[..., 1:] for a in (p, np.eye(3)[label])]
    np.testing.assert_allclose(float(whole), dice_by_hand(*one), rtol=1e-5)


def test_regions_are_sigmoids_of_their_own():
    logits, label = segmentation_sample()
    regions = ((1, 2), (2,), (1,))
    target = targets_of(label, 3, regions)
    expected = np.stack([np.isin(label, inside) for inside in regions], -1)
    np.testing.assert_array_equal(target, expected)
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    entropy = -np.mean(np.where(expected, np.log(p), np.log(1 - p)))
    got = segmentation_loss(logits, target, overlapping=True)
    np.testing.assert_allclose(float(got), dice_by_hand(p, expected) + entropy, rtol=1e-5)


def test_a_sure_and_right_prediction_costs_nothing_even_for_absent_classes():
    label = np.zeros((1, 4, 4, 4), np.uint8)
    label[0, :2] = 1
    target = targets_of(label, 3)
    assert float(segmentation_loss(60.0 * target - 30.0, target)) < 1e-4
    assert float(segmentation_loss(30.0 - 60.0 * target, target)) > 1
