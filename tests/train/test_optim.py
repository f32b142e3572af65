import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mambamim_jax.train.optim import AdamW, Schedule, paths, under

GOLDEN = Path(__file__).parents[1] / "goldens" / "schedule.npz"


def test_schedule_is_the_released_one():
    with np.load(GOLDEN) as golden:
        meta, expected = json.loads(str(golden["meta"])), golden["lr_wd"]
    schedule = Schedule(meta["peak_lr"], meta["warmup"], meta["steps"], meta["wd"], meta["wd_end"])
    np.testing.assert_allclose(schedule.table(), expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 5), (4, 5), (1, 2)])
def test_schedule_of_short_runs(warmup, steps):
    table = Schedule(1e-3, warmup, steps, 0.1, 0.2).table()
    assert table.shape == (steps, 2)
    assert np.isfinite(table).all()
    assert (table[:, 0] > 0).all()
    assert (table[:, 0] <= 1e-3).all()


def parameters():
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 4), "b": (5,), "c": (2, 2, 2)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def gradients(step):
    """Alternately above and below the clipping norm."""
    rng = np.random.default_rng(100 + step)
    scale = 10.0 if step % 2 else 0.1
    return {name: (scale * rng.normal(size=p.shape)).astype(np.float32) for name, p in parameters().items()}


def ours(steps=8):
    adamw, schedule = AdamW(clip_norm=5.0), Schedule(1e-2, 3, steps, 0.04, 0.2).table()
    params = {name: jnp.asarray(p) for name, p in parameters().items()}
    state = adamw.init(params)
    for step, (lr, decay) in enumerate(np.float32(schedule)):
        params, state, squares = adamw.update(gradients(step), state, params, lr, decay)
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in gradients(step).values()))
        np.testing.assert_allclose(np.sqrt(np.sum(squares)), norm, rtol=1e-6)
    return {name: np.asarray(p) for name, p in params.items()}


def test_adamw_is_that_of_torch():
    torch = pytest.importorskip("torch")
    params = {name: torch.nn.Parameter(torch.tensor(p)) for name, p in parameters().items()}
    optimiser = torch.optim.AdamW(params.values(), lr=1.0, betas=(0.9, 0.999), eps=1e-8)
    for step, (lr, decay) in enumerate(Schedule(1e-2, 3, 8, 0.04, 0.2).table()):
        for name, g in gradients(step).items():
            params[name].grad = torch.tensor(g)
        torch.nn.utils.clip_grad_norm_(params.values(), 5.0)
        optimiser.param_groups[0].update(lr=lr, weight_decay=decay)
        optimiser.step()
    for name, mine in ours().items():
        np.testing.assert_allclose(mine, params[name].detach().numpy(), rtol=2e-6, atol=2e-7, err_msg=name)


def test_adamw_keeps_the_numbers_that_torch_gave():
    """As the test above, with torch 2.13's results stored."""
    mine = ours()
    np.testing.assert_allclose(mine["b"], STORED, rtol=2e-6, atol=2e-7)


STORED = [
    -2.297574996948242,
    -0.22274143993854523,
    -1.2145707607269287,
    -0.725997269153595,
    -0.5206607580184937,
]


def test_prefixes_end_at_a_path_component():
    assert under("encoder/skips/0/conv/kernel", ("encoder/skips/0",))
    assert under("encoder", ("encoder",))
    assert not under("encoder/skips/01/kernel", ("encoder/skips/0",))


def test_untrained_parameters_have_no_moments():
    adamw = AdamW(untrained=("a",))
    tree = {"a": {0: jnp.ones(2)}, "b": jnp.ones(3)}
    assert list(paths(adamw.init(tree)["mu"])) == ["b"]
