"""Every implementation of the selective scan against the float64 reference, on one list of shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mambamim_jax.ops.selective_scan import (
    IMPLEMENTATIONS,
    mosaic,
    selective_scan,
    triton,
    triton_kernels,
    triton_plan,
    tuning,
)
from mambamim_jax.ops.selective_scan.contract import ScanInputs
from tests import shapes
from tests.ops.selective_scan.cases import (
    OPTIONAL,
    assert_close,
    cotangents,
    expected,
    random_inputs,
    run,
    values_and_gradients,
)

SMALL = (2, 7, 40, 3)
CASES = [
    (shape, reverse) for shape in shapes.SCAN for reverse in (False, True) if not reverse or shape[3] < 16
]
# Two or four tokens a chunk keep the interpreted programs small; segments of eight tokens, so that lengths are split.
LAUNCH = tuning.Launch(
    2,
    4,
    4,
    2,
    1,
    2,
    fill=16,
    shortest=8,
    halve_below=10**6,
    few=16,
    long=10**6,
    backward_fill=16,
    ends_chunk=2,
    abreast=4,
    abreast_below=0,
)
WIDE = LAUNCH._replace(halve_below=0)
"""States are saved with four channels a quad, and inference has as many: larger programs."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
    pytest.mark.slow,  # together
]


@pytest.fixture(autouse=True)
def _interpret_without_a_gpu(monkeypatch):
    """Kernels run interpreted where there is no GPU, with small launches; compiled with their own on one."""
    if jax.default_backend() == "gpu":
        yield
        return
    monkeypatch.setattr(triton, "_default_launch", lambda: LAUNCH)
    with triton.interpreted(), mosaic.interpreted():
        yield


@pytest.mark.parametrize("name", [x for x in IMPLEMENTATIONS if x != "auto"])
class TestImplementation:
    @pytest.mark.parametrize(("shape", "reverse"), CASES, ids=str)
    def test_values_and_gradients(self, name, shape, reverse, monkeypatch):
        if not reverse and jax.default_backend() != "gpu":
            monkeypatch.setattr(triton, "_default_launch", lambda: WIDE)
        out, gradients = values_and_gradients(random_inputs(shape), cotangents(shape), name, reverse)
        want, want_gradients = expected(shape, reverse)
        assert_close(out, want, 1e-5, "value")
        assert_close(gradients, want_gradients, 1e-4, "gradient")

    @pytest.mark.parametrize("absent", [OPTIONAL, ("z",), ("D", "initial_state")], ids="-".join)
    def test_optional_arguments(self, name, absent):
        inputs = random_inputs(SMALL)._replace(**dict.fromkeys(absent))
        out, gradients = values_and_gradients(inputs, cotangents(SMALL), name)
        want, want_gradients = expected(SMALL, absent=absent)
        assert_close(out, want, 1e-5, "value")
        assert_close(gradients, want_gradients, 1e-4, "gradient")

    def test_bfloat16_inputs(self, name):
        inputs = random_inputs(SMALL, jnp.bfloat16)
        (y, last), gradients = values_and_gradients(inputs, cotangents(SMALL), name)
        assert y.dtype == jnp.bfloat16
        assert last.dtype == jnp.float32
        assert all(g.dtype == jnp.bfloat16 for g in gradients)
        (want_y, want_last), want_gradients = expected(SMALL, dtype="bfloat16")
        assert_close(last, want_last, 1e-5, "last state")  # the arithmetic is float32
        assert_close(y, want_y, 6e-3, "y")
        assert_close(gradients, want_gradients, 1.5e-2, "gradient")

    def test_vmap(self, name):
        pairs = [random_inputs(SMALL, seed=seed) for seed in (0, 1)]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *pairs)
        weights = jax.tree.map(lambda x: jnp.stack([x, x]), cotangents(SMALL))

        def one(inputs, weights):
            out, pull = jax.vjp(lambda inputs: run(inputs, name), inputs)
            return out, pull(weights)[0]

        found = jax.jit(jax.vmap(one))(stacked, weights)
        single = [values_and_gradients(inputs, cotangents(SMALL), name) for inputs in pairs]
        assert_close(found, jax.tree.map(lambda *x: np.stack(x), *single), 1e-5, "vmap")

    def test_remat(self, name):
        if name == "pallas_mosaic" and jax.default_backend() != "gpu":
            pytest.skip("jax.checkpoint does not take the effects of the interpreter of Pallas for GPUs")
        inputs = random_inputs(SMALL)

        def loss(inputs):
            return jnp.sum(jnp.sin(run(inputs, name)[0]))

        plain = jax.jit(jax.grad(loss))(inputs)
        assert_close(jax.jit(jax.grad(jax.checkpoint(loss)))(inputs), plain, 1e-6, "remat")

    @pytest.mark.parametrize("reverse", [False, True], ids=["forth", "back"])
    def test_chained_halves_equal_the_whole(self, name, reverse):
        inputs = random_inputs((2, 23, 40, 4))
        whole = run(inputs, name, reverse)
        halves = []
        for part in (slice(None, 9), slice(9, None)):
            cut = {key: getattr(inputs, key)[:, part] for key in ("u", "delta", "B", "C", "z")}
            halves.append(inputs._replace(**cut))
        first, second = reversed(halves) if reverse else halves
        y_first, state = run(first, name, reverse)
        y_second, last = run(second._replace(initial_state=state), name, reverse)
        ys = (y_second, y_first) if reverse else (y_first, y_second)
        assert_close((jnp.concatenate(ys, 1), last), whole, 1e-5, "chained")

    def test_last_state_only_when_asked(self, name):
        *arrays, _ = random_inputs(SMALL)
        y = selective_scan(*arrays, implementation=name)
        assert y.shape == SMALL[:3]


@pytest.mark.parametrize("reverse", [False, True], ids=["forth", "back"])
def test_sequential_with_an_odd_number_of_channels(reverse):
    shape = (2, 37, 25, 3)
    out, gradients = values_and_gradients(random_inputs(shape), cotangents(shape), "sequential", reverse)
    want, want_gradients = expected(shape, reverse)
    assert_close(out, want, 1e-5, "value")
    assert_close(gradients, want_gradients, 1e-4, "gradient")


@pytest.mark.parametrize(("channels", "chunk"), [(1, 8), (2, 8), (4, 4)])
def test_triton_with_any_channels_of_a_quad(channels, chunk, monkeypatch):
    """One or two groups of tokens in half a chunk; some of the last chunk's were in the one before."""
    launch = WIDE._replace(chunk=chunk, channels=channels, inference_chunk=4, inference_channels=channels)
    monkeypatch.setattr(triton, "_default_launch", lambda: launch)
    shape = (2, 11, 40, 3)
    inputs = random_inputs(shape)
    out, gradients = values_and_gradients(inputs, cotangents(shape), "pallas_triton")
    want, want_gradients = expected(shape)
    assert_close(out, want, 1e-5, "value")
    assert_close(gradients, want_gradients, 1e-4, "gradient")
    assert_close(run(inputs, "pallas_triton"), want, 1e-5, "inference")


@pytest.mark.parametrize("reverse", [False, True], ids=["forth", "back"])
@pytest.mark.parametrize("n", [3, 20])
@pytest.mark.parametrize("few", [0, 16])
def test_triton_reads_rows_in_fours_where_warps_are_few(few, n, reverse, monkeypatch):
    """Inference with a warp or two and one or two sets of states."""
    shape = (*SMALL[:3], n)
    monkeypatch.setattr(triton, "_default_launch", lambda: LAUNCH._replace(few=few))
    inputs = random_inputs(shape)
    y = selective_scan(*inputs[:8], initial_state=inputs[8], reverse=reverse, implementation="pallas_triton")
    assert_close(y, expected(shape, reverse)[0][0], 1e-5, "inference")


@pytest.mark.parametrize("reverse", [False, True], ids=["forth", "back"])
@pytest.mark.parametrize("n", [3, 20])
def test_triton_with_eight_lanes_a_channel(n, reverse, monkeypatch):
    """Two segments, of one sequence with tokens that the last chunk takes again."""
    launch = LAUNCH._replace(inference_chunk=8, few=64, halve_below=100)
    monkeypatch.setattr(triton, "_default_launch", lambda: launch)
    shape = (2, 38, 40, n)
    assert triton_plan.inference(launch, 2, 38, 64) == (8, 1, 8, 64)
    assert_close(
        run(random_inputs(shape), "pallas_triton", reverse), expected(shape, reverse)[0], 1e-5, "value"
    )


@pytest.mark.parametrize("reverse", [False, True], ids=["forth", "back"])
@pytest.mark.parametrize(("length", "side"), [(4, 1), (5, 2), (11, 4), (17, 8), (32, 8), (33, 4), (70, 4)])
def test_triton_with_warps_that_walk_chunks_side_by_side(length, side, reverse, monkeypatch):
    """One turn of up to eight warps with four tokens each; where that is not enough, turns of up to four."""
    launch = LAUNCH._replace(fill=8 * 16, few=8 * 8, abreast_below=71)
    monkeypatch.setattr(triton, "_default_launch", lambda: launch)
    assert triton_plan.abreast(launch, 2, length, 64, 16) == side
    shape = (2, length, 40, 3)
    assert_close(
        run(random_inputs(shape), "pallas_triton", reverse), expected(shape, reverse)[0], 1e-5, "value"
    )


@pytest.mark.parametrize(
    "change", [{"absent": OPTIONAL}, {"absent": ("z",)}, {"absent": ("D",)}, {"dtype": "bfloat16"}], ids=str
)
def test_triton_side_by_side_with_other_inputs(change, monkeypatch):
    monkeypatch.setattr(
        triton, "_default_launch", lambda: LAUNCH._replace(fill=64, few=32, abreast_below=100)
    )
    shape, tolerance = (2, 19, 40, 3), 6e-3 if "dtype" in change else 1e-5
    inputs = random_inputs(shape, jnp.dtype(change.get("dtype", "float32")))
    inputs = inputs._replace(**dict.fromkeys(change.get("absent", ())))
    assert_close(run(inputs, "pallas_triton"), expected(shape, **change)[0], tolerance, "value")


@pytest.mark.parametrize("change", [{"abreast_below": 19}, {"warps": 2}], ids=str)
def test_triton_not_side_by_side(change):
    launch = LAUNCH._replace(fill=64, few=32, abreast_below=20)
    assert triton_plan.abreast(launch, 2, 19, 64, 16) == 2
    assert triton_plan.abreast(launch._replace(**change), 2, 19, 64, 16) == 1
    assert triton_plan.abreast(launch, 2, 19, 64, 32) == 1


@pytest.mark.parametrize("reverse", [False, True], ids=["forth", "back"])
def test_triton_saves_states_with_as_many_channels_or_twice_as_many(reverse, monkeypatch):
    """As many where segments would be short."""
    assert [triton_plan.is_wide(some, *SMALL[:2], 64) for some in (WIDE, LAUNCH)] == [True, False]
    monkeypatch.setattr(triton, "_default_launch", lambda: WIDE if reverse else LAUNCH)
    out, gradients = values_and_gradients(random_inputs(SMALL), cotangents(SMALL), "pallas_triton", reverse)
    want, want_gradients = expected(SMALL, reverse)
    assert_close(out, want, 1e-5, "value")
    assert_close(gradients, want_gradients, 1e-4, "gradient")


@pytest.mark.parametrize(("width", "warps"), [(64, 4), (96, 2)])
def test_triton_backward_programs_of_half_the_warps(width, warps, monkeypatch):
    """96 channels are no whole number of programs of four warps, with 64 channels each."""
    monkeypatch.setattr(triton, "_default_launch", lambda: LAUNCH._replace(backward_warps=4))
    shape = (4, 3, width, 3)
    assert triton._launch_of(random_inputs(shape)).backward_warps == warps
    gradients = values_and_gradients(random_inputs(shape), cotangents(shape), "pallas_triton")[1]
    assert_close(gradients, expected(shape)[1], 1e-4, "gradient")


@pytest.mark.parametrize(("chunk", "n", "found"), [(8, 16, 8), (8, 17, 4), (12, 32, 4), (4, 32, 4)])
def test_triton_chunks_are_shorter_for_more_states(chunk, n, found, monkeypatch):
    """Two sets of states; chunks stay multiples of four tokens."""
    monkeypatch.setattr(triton, "_default_launch", lambda: LAUNCH._replace(chunk=chunk))
    assert triton._launch_of(random_inputs((*SMALL[:3], n))).chunk == found


@pytest.mark.parametrize(("warps", "n"), [(1, 20), (4, 3), (8, 3)])
def test_triton_with_any_warps_of_a_program(warps, n, monkeypatch):
    """Rows of dB and dC for four tokens and one or two sets of states: more, as many and fewer than warps."""
    shape = (*SMALL[:3], n)
    monkeypatch.setattr(triton, "_default_launch", lambda: LAUNCH._replace(backward_warps=warps))
    gradients = values_and_gradients(random_inputs(shape), cotangents(shape), "pallas_triton")[1]
    assert_close(gradients, expected(shape)[1], 1e-4, "gradient")


@pytest.mark.parametrize("reverse", [False, True], ids=["forth", "back"])
def test_triton_with_arrays_too_large_to_be_flat(reverse, monkeypatch):
    monkeypatch.setattr(triton, "PLACES", 0)
    out, gradients = values_and_gradients(random_inputs(SMALL), cotangents(SMALL), "pallas_triton", reverse)
    want, want_gradients = expected(SMALL, reverse)
    assert_close(out, want, 1e-5, "value")
    assert_close(gradients, want_gradients, 1e-4, "gradient")


@pytest.mark.parametrize(
    ("length", "halve_below", "few", "channels"),
    [(70, 18, 8, 2), (70, 18, 16, 2), (70, 36, 16, 1), (70, 17, 16, 4), (300, 18, 16, 4), (70, 18, 7, 4)],
)
def test_triton_halves_channels_where_segments_would_be_short(
    length, halve_below, few, channels, monkeypatch
):
    """At four channels two samples make four warps, so that 16 are filled by four segments: 17 or 75 tokens each."""
    launch = LAUNCH._replace(halve_below=halve_below, few=few, inference_chunk=4)
    monkeypatch.setattr(triton, "_default_launch", lambda: launch)
    assert triton_plan.inference(launch, 2, length, 64)[:2] == (4, channels)
    inputs = random_inputs((2, length, 40, 3))
    assert_close(run(inputs, "pallas_triton"), run(inputs, "reference"), 1e-5, "inference")


@pytest.mark.parametrize(
    ("length", "fill", "segments"), [(79, 16, 4), (80, 16, 8), (400, 7, 1), (31, 64, 3)], ids=str
)
def test_triton_cuts_long_segments_in_two(length, fill, segments, monkeypatch):
    """Four warps, segments of eight tokens at least and cut from 20 on, if they fit; ends in longer chunks."""
    launch = WIDE._replace(fill=fill, long=20, ends_chunk=4)
    monkeypatch.setattr(triton, "_default_launch", lambda: launch)
    assert triton_plan.segments(launch, fill, 4, length) == segments
    inputs = random_inputs((2, length, 40, 3))
    assert_close(run(inputs, "pallas_triton"), run(inputs, "reference"), 1e-5, "inference")


@pytest.mark.parametrize(
    ("work", "length", "segments"), [("saves", 128, 16), ("backward", 128, 8), ("backward", 7, 1)]
)
def test_triton_fills_the_card_with_fewer_warps_in_the_backward_pass(work, length, segments):
    """Four warps fill it eight times over forward, four times backward; segments that are long are twice as many."""
    launch = WIDE._replace(fill=32, backward_fill=16, long=8, channels=4)
    inputs = ScanInputs(*(jnp.asarray(x) for x in random_inputs((2, length, 64, 4))))
    walk, count = triton_plan.walk(inputs, launch, work, False, True)
    assert count == segments
    assert walk.per_segment * walk.chunk * count >= length


@pytest.mark.parametrize("reverse", [False, True], ids=["forth", "back"])
def test_triton_with_more_segments_than_are_combined_at_once(reverse, monkeypatch):
    """Four tokens a segment make 20, so that 19 ends are combined, each of one chunk: a loop of 16 and three more."""
    shape = (1, 78, 8, 4)
    monkeypatch.setattr(triton_kernels, "AT_ONCE", 16)
    monkeypatch.setattr(
        triton,
        "_default_launch",
        lambda: LAUNCH._replace(fill=1600, shortest=4, ends_chunk=4, backward_fill=1600),
    )
    out, gradients = values_and_gradients(random_inputs(shape), cotangents(shape), "pallas_triton", reverse)
    want, want_gradients = expected(shape, reverse)
    assert_close(out, want, 1e-5, "value")
    assert_close(gradients, want_gradients, 1e-4, "gradient")
