from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mambamim_jax.train import step as step_module
from mambamim_jax.train.optim import AdamW, Schedule, paths
from mambamim_jax.train.sharding import one_device
from mambamim_jax.train.step import REMAT, RUN_SELDOM, explain_non_finite, initial_state, make_step
from tests.train.sharded import mini_task
from tests.train.tiny import tiny_batch, tiny_task

SCHEDULE = Schedule(peak=5e-2, warmup=2, steps=20, weight_decay=0.04, weight_decay_end=0.2)
TASK = tiny_task()
ADAMW = AdamW(untrained=TASK.unused_parameters)


@pytest.fixture(scope="module")
def step():
    return make_step(TASK, ADAMW, SCHEDULE, seed=3)


def run(step, steps, state=None):
    state = initial_state(TASK, ADAMW, seed=3) if state is None else state
    losses = []
    for index in range(int(state["step"]), steps):
        state, metrics = step(state, tiny_batch(index))
        losses.append(float(metrics["loss"]))
    return state, losses


def test_loss_falls_and_the_schedule_is_logged(step):
    state, losses = run(step, 20)
    assert int(state["step"]) == 20
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    _, metrics = step(initial_state(TASK, ADAMW, seed=3), tiny_batch(0))
    lr, decay = SCHEDULE.table()[0]
    assert float(metrics["lr"]) == np.float32(lr)
    assert float(metrics["weight_decay"]) == np.float32(decay)


def test_a_step_is_a_function_of_the_state_alone(step):
    _, whole = run(step, 6)
    half, first = run(step, 3)
    _, second = run(step, 6, jax.tree.map(jnp.asarray, jax.device_get(half)))
    assert first + second == whole


def test_unused_parameters_are_left_alone(step):
    before = jax.device_get(initial_state(TASK, ADAMW, seed=3))
    after, _ = run(step, 3)
    for name, leaf in paths(before["params"]["unused"]).items():
        np.testing.assert_array_equal(leaf, paths(after["params"]["unused"])[name])
    assert not [name for name in paths(before["opt_state"]["mu"]) if name.startswith("unused")]
    assert (before["params"]["layers"][0]["bias"] != after["params"]["layers"][0]["bias"]).any()


def test_accumulation_is_the_mean_over_micro_batches():
    plain = AdamW(clip_norm=np.inf)
    task = tiny_task(noise=0.0)
    twice = make_step(task, plain, SCHEDULE, seed=3, accumulate=2)
    state = initial_state(task, plain, seed=3)
    batch = tiny_batch(0)
    halves = [{"image": batch["image"][i::2]} for i in range(2)]
    gradient = jax.value_and_grad(task.loss, has_aux=True)
    expected_loss, expected = 0.0, []
    for half in halves:
        half = task.prepare(half, jax.random.key(0))
        (value, _), grads = gradient(state["params"], state["batch_stats"], half, jax.random.key(0))
        expected_loss += float(value) / 2
        expected.append(grads)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *expected)
    after, metrics = twice(state, batch)
    np.testing.assert_allclose(float(metrics["loss"]), expected_loss, rtol=1e-6)
    got = paths(after["opt_state"]["mu"])
    for name, leaf in paths(mean).items():
        np.testing.assert_allclose(got[name], 0.1 * leaf, rtol=1e-5, atol=1e-7)


def test_the_average_follows_the_parameters():
    task = replace(TASK, ema=0.5)
    state = initial_state(task, ADAMW, seed=3)
    step = make_step(task, ADAMW, SCHEDULE, seed=3)
    expected = jax.device_get(state["params"])
    for number in range(3):
        state, _ = step(state, tiny_batch(number))
        keep = min(0.5, (1 + number) / (10 + number))
        now = jax.device_get(state["params"])
        expected = jax.tree.map(lambda old, new, keep=keep: keep * old + (1 - keep) * new, expected, now)
    for name, leaf in paths(expected).items():
        np.testing.assert_allclose(paths(state["ema"])[name], leaf, rtol=1e-5, atol=1e-7, err_msg=name)


def test_loaded_parameters_replace_the_drawn_ones():
    kernel = np.full((6, 4), 0.25)
    task = replace(TASK, ema=0.5, loaded={"layers/0/kernel": kernel})
    drawn, state = initial_state(TASK, ADAMW, seed=3), initial_state(task, ADAMW, seed=3)
    for part in ("params", "ema"):
        for name, leaf in paths(state[part]).items():
            expected = kernel if name == "layers/0/kernel" else paths(drawn["params"])[name]
            np.testing.assert_array_equal(leaf, expected)
            assert leaf.dtype == jnp.float32


def test_scales_multiply_the_rate_of_what_lies_below():
    plain, scaled = AdamW(), AdamW(scales=(("layers/0", 0.0), ("layers", 0.5)))
    params = {"layers": {0: {"kernel": jnp.ones(3)}, 1: {"kernel": jnp.ones(3)}}, "norm": jnp.ones(3)}
    grads = jax.tree.map(jnp.ones_like, params)
    after = {
        name: paths(adamw.update(grads, adamw.init(params), params, 0.1, 0.2)[0])
        for name, adamw in (("plain", plain), ("scaled", scaled))
    }
    moved = {name: 1 - after["plain"][name] for name in after["plain"]}
    for name, factor in (("layers/0/kernel", 0.0), ("layers/1/kernel", 0.5), ("norm", 1.0)):
        np.testing.assert_allclose(1 - after["scaled"][name], factor * moved[name], rtol=1e-6)


def test_a_non_finite_step_is_discarded_and_named(step):
    before = jax.device_get(initial_state(TASK, ADAMW, seed=3))
    batch = tiny_batch(0)
    batch["image"][2, 3] = np.nan
    after, metrics = step(jax.tree.map(jnp.asarray, before), batch)
    assert not metrics["finite"]
    for name, leaf in paths(before).items():
        np.testing.assert_array_equal(leaf, paths(after)[name], err_msg=name)
    text = explain_non_finite(1, metrics, list(ADAMW.trained(before["params"])), after, batch)
    assert "step 1: loss nan" in text
    assert "non-finite inputs: batch/image (1)" in text
    assert "layers/0/kernel" in text
    assert "unused" not in text
    assert "\n" not in text


def test_what_is_computed_again_has_the_same_gradients():
    """On a network with one layer of every kind; convolutions and products are kept, activations are not."""
    task, keys = mini_task(), jax.random.split(jax.random.key(0), 4)

    def pulled(name):
        """The gradients, and what the backward pass was given."""
        loss = jax.checkpoint(task.loss, policy=REMAT[name]) if REMAT[name] else task.loss
        params, stats = task.init(keys[0])
        batch = task.prepare({"image": jax.random.uniform(keys[1], (8, 4, 4, 4, 1))}, keys[2])
        value, pull, _ = jax.vjp(lambda p: loss(p, stats, batch, keys[3]), params, has_aux=True)
        return pull(jnp.ones_like(value))[0], pull

    kept = {name: jax.tree.leaves(jax.eval_shape(lambda n=name: pulled(n)[1])) for name in REMAT}
    sizes = {name: sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) for name, leaves in kept.items()}
    assert sizes["dots"] < 0.8 * sizes["none"], sizes
    gradients = jax.jit(lambda: {name: pulled(name)[0] for name in REMAT}, compiler_options=RUN_SELDOM)()
    for name in REMAT:
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)  # noqa: E731
        jax.tree.map(close, gradients[name], gradients["none"])


def test_the_state_lies_where_the_placement_says_with_and_without_a_processor(monkeypatch):
    """Without one, as JAX_PLATFORMS=cuda has it, the default device draws."""
    placement, drawn = one_device(), []
    for host in (jax.devices("cpu")[0], None):
        monkeypatch.setattr(step_module, "host_device", lambda host=host: host)
        state = initial_state(TASK, ADAMW, seed=3, placement=placement)
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == placement.shardings(state)
        drawn.append(jax.device_get(state))
    jax.tree.map(np.testing.assert_array_equal, *drawn)
