"""The selective scan's checks and its choice of an implementation."""

from __future__ import annotations

import jax
import pytest

from mambamim_jax.ops.selective_scan import api, cards, triton, triton_plan, tuning
from mambamim_jax.ops.selective_scan.contract import ScanInputs
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
    for name in ("fast", "pallas_fast"):
        with pytest.raises(ValueError, match=f"'{name}', expected one of"):
            run(random_inputs(SHAPE), name)


@pytest.mark.parametrize("name", ["pallas_triton", "pallas_mosaic"])
def test_kernels_say_on_a_cpu_what_they_need(name, monkeypatch):
    monkeypatch.setattr(api, "_device", lambda: ("cpu", ""))
    needs = f"'{name}': found platform cpu, expected an NVIDIA GPU; use 'auto'"
    with pytest.raises(ValueError, match=needs):
        run(random_inputs(SHAPE), name)


@pytest.mark.parametrize("field", ScanInputs._fields)
@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_only_floats_are_taken(field, dtype):
    """Integers would make y integers, each cut off."""
    inputs = random_inputs(SHAPE)
    wrong = inputs._replace(**{field: getattr(inputs, field).astype(dtype)})
    with pytest.raises(ValueError, match=f"found {field} of {dtype}, expected one of bfloat16, .*float32"):
        run(wrong, "auto")


@pytest.mark.parametrize("implementation", ["auto", "reference", "associative", "sequential"])
def test_lists_are_taken(implementation):
    inputs = random_inputs(SHAPE)
    found = run(ScanInputs._make(x.tolist() for x in inputs), implementation)
    assert_close(found, run(inputs, implementation), 0, "lists")


def test_mosaic_names_what_it_cannot_take(monkeypatch):
    with pytest.raises(ValueError, match="'pallas_mosaic': found a state of 64"):
        run(random_inputs((1, 2, 4, 64)), "pallas_mosaic")
    monkeypatch.setattr(api, "_device", lambda: ("gpu", "8.0"))
    with pytest.raises(ValueError, match=r"found compute capability 8.0, expected 9.0"):
        run(random_inputs(SHAPE), "pallas_mosaic")


def test_auto_falls_back_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(api, "_device", lambda: ("gpu", "7.5"))
    api._log_once.cache_clear()
    inputs = random_inputs(SHAPE)
    with caplog.at_level("WARNING"):
        found = [run(inputs, "auto") for _ in range(2)]
    assert_close(found[0], run(inputs, "associative"), 0, "auto")
    assert [record.getMessage() for record in caplog.records] == [
        "selective_scan: the associative scan runs instead of the GPU kernel: "
        "found compute capability 7.5, expected 8.0 (Ampere) or newer"
    ]


def test_what_a_device_cannot_run_is_known_without_inputs(monkeypatch):
    for device, refused in {("cpu", ""): (True, True), ("gpu", "7.5"): (True, True), ("gpu", "8.0"): (False, True),
                            ("gpu", "9.0"): (False, False)}.items():  # fmt: skip
        monkeypatch.setattr(api, "_device", lambda device=device: device)
        found = [api.refusal(name) is not None for name in ("pallas_triton", "pallas_mosaic")]
        assert tuple(found) == refused
        assert not any(map(api.refusal, ("auto", "reference", "associative", "sequential")))


def test_kernel_says_why_it_refuses():
    inputs = random_inputs(SHAPE)
    assert cards.refusal(inputs, "gpu", "9.0") is None
    assert "expected 8.0" in str(cards.refusal(inputs, "gpu", "7.5"))
    assert "platform tpu" in str(cards.refusal(inputs, "tpu", ""))
    assert "state of 64" in str(cards.refusal(random_inputs((1, 2, 4, 64)), "gpu", "8.0"))
    assert "float64" in str(cards.refusal(random_inputs(SHAPE, "float64"), "gpu", "8.0"))


def test_launch_of_an_unlisted_card_is_the_older_row():
    assert tuning.launch_for((8, 9)) == tuning.TUNED[8, 0]
    assert tuning.launch_for((12, 0)) == tuning.TUNED[9, 0]


@pytest.mark.parametrize(
    ("change", "message"), [({"chunk": 3}, "chunk of 3 .* multiple of 4"), ({"channels": 3}, "3 channels")]
)
def test_a_launch_that_no_kernel_takes_is_named(change, message):
    inputs = random_inputs(SHAPE)
    with pytest.raises(ValueError, match=message):
        triton.forward(inputs, False, True, tuning.TUNED[9, 0]._replace(**change))


@pytest.mark.parametrize("work", ["inference", "saves", "backward"])
@pytest.mark.parametrize(("b", "l"), [(1, 110592), (2, 1728), (4, 1728), (1, 13824), (2, 333)])
def test_chunks_of_the_ends_cover_the_segments_and_cost_none(b, l, work):
    launch, tokens = (
        tuning.TUNED[9, 0]._replace(abreast_below=0),
        jax.ShapeDtypeStruct((b, l, 768), "float32"),
    )
    inputs = ScanInputs(tokens, tokens, jax.ShapeDtypeStruct((768, 16), "float32"), *[None] * 6)
    (walk, count), (_, plain) = (
        triton_plan.walk(inputs, some, work, False, False) for some in (launch, launch._replace(ends_chunk=1))
    )
    ends = triton_plan.ends(walk, launch)
    assert ends.chunk * ends.per_segment == walk.chunk * walk.per_segment
    assert ends.chunk in (walk.chunk, launch.ends_chunk)
    assert count == plain > 1
    if (b, l) == (1, 110592):
        assert ends.chunk == launch.ends_chunk


@pytest.mark.parametrize("shape", [(0, 3, 8, 4), (1, 0, 8, 4), (1, 3, 0, 4), (1, 3, 8, 0)])
def test_an_empty_size_is_an_error(shape):
    with pytest.raises(ValueError, match=r"found u .* and A .*, expected .*every size ≥ 1"):
        run(random_inputs(shape), "auto")
