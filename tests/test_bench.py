"""The benchmarks' own machinery: sides in processes, FLOP counts, profiles. Speed is never asserted."""

from __future__ import annotations

import argparse
import gzip
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mambamim_jax.bench import loader, mixer, predict, profile, scan, scan_launches, step, toki
from mambamim_jax.bench.alternate import Side, SideError, measure
from mambamim_jax.checks import ConfigError
from mambamim_jax.ops.selective_scan import triton_plan, tuning
from tests.data import ct_files

ROOT = Path(__file__).parents[1]
HLO = """
%cudnn.3 = (f32[2,6]{1,0}, u8[0]{0}) custom-call(%a), custom_call_target="conv", metadata={op_name="jit(f)/conv"}
ROOT %fusion.1 = f32[4]{0} fusion(%x), kind=kLoop, metadata={op_name="jit(f)/transpose(jvp())/while/mul"}
%while.2 = (s32[], f32[4]{0}) while(%tuple), condition=%c, body=%b
"""


class Counter:
    """A side for the tests: counts its steps."""

    def __init__(self, start: int, fail_at: int = 0):
        self.count, self.fail_at = start, fail_at

    def __call__(self) -> int:
        print("noise on the standard output must not spoil the replies")
        self.count += 1
        if self.count == self.fail_at:
            raise ValueError("gave up\nat length")
        return self.count

    def facts(self) -> dict[str, int]:
        return {"count": self.count}


def test_sides_step_in_turn_and_report_facts():
    sides = [Side(f"from {n}", "tests.test_bench:Counter", {"start": n}) for n in (0, 10)]
    measure(sides, steps=2, warm_up=1)
    assert [side.facts["count"] for side in sides] == [3, 13]
    assert all(len(side.seconds) == 2 and side.peak_bytes > 0 for side in sides)


def test_a_turn_is_as_many_steps_as_it_has_time_for():
    side = Side("many", "tests.test_bench:Counter", {"start": 0}, turn=0.05)
    measure([side], steps=2, warm_up=0)
    assert side.facts["count"] > 2
    assert all(0 < seconds < 0.05 for seconds in side.seconds)


def test_a_failing_side_is_named_in_one_line():
    side = Side("weak", "tests.test_bench:Counter", {"start": 0, "fail_at": 2})
    with pytest.raises(SideError, match=r"^weak: ValueError: gave up$"):
        measure([side], steps=3, warm_up=0)
    assert side.process.poll() is not None


def test_matrix_flops_of_products_convolutions_and_loops():
    x, w = jnp.ones((4, 6)), jnp.ones((6, 6))
    assert profile.matrix_flops(jax.make_jaxpr(jnp.matmul)(x, w)) == 2 * 4 * 6 * 6

    def looped(x):
        return jax.lax.scan(lambda carry, _: (carry @ w, None), x, None, length=5)[0]

    assert profile.matrix_flops(jax.make_jaxpr(jax.jit(looped))(x)) == 5 * 2 * 4 * 6 * 6

    def told(x):
        jax.debug.callback(lambda x: None, x)  # an operation without a result, as a kernel's loops may be
        return x @ w

    assert profile.matrix_flops(jax.make_jaxpr(told)(x)) == 2 * 4 * 6 * 6
    image, kernel = jnp.ones((1, 8, 8, 8, 2)), jnp.ones((3, 3, 3, 2, 7))
    numbers = ("NDHWC", "DHWIO", "NDHWC")
    conv = jax.make_jaxpr(
        lambda a, b: jax.lax.conv_general_dilated(a, b, (1, 1, 1), "SAME", dimension_numbers=numbers)
    )
    assert profile.matrix_flops(conv(image, kernel)) == 2 * 8**3 * 7 * 27 * 2


def test_profiles_are_ranked_by_jax_operation(tmp_path):
    table = profile.instructions(HLO)
    assert table["cudnn.3"] == ("conv", "conv f32[2,6]")
    assert table["fusion.1"] == ("fusion", "while/mul (backward) f32[4]")
    stream = {"pid": 1, "tid": 7, "ph": "X"}
    events = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 7, "args": {"name": "Stream #13(Compute)"}},
        {"ph": "M", "name": "process_name", "pid": 2, "args": {"name": "/host:CPU"}},
        stream | {"name": "sm90_conv", "dur": 3000, "args": {"hlo_op": "cudnn.3"}},
        stream | {"name": "loop_mul", "dur": 500, "args": {"hlo_op": "fusion.1"}},
        stream | {"name": "loop_mul", "dur": 500, "args": {"hlo_op": "fusion.1"}},
        stream | {"name": "while.2", "dur": 9000, "args": {"hlo_op": "while.2"}},
        {"ph": "X", "pid": 2, "tid": 1, "name": "host work", "dur": 99999, "args": {}},
    ]
    with gzip.open(tmp_path / "x.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    found = profile.read_events(tmp_path / "x.trace.json.gz")
    first, second = profile.rank(found, table, steps=1, count=5)
    assert (first.name, first.milliseconds, first.share) == ("conv", 3.0, 0.75)
    assert (second.milliseconds, second.calls) == (1.0, 2)


def test_toki_without_the_baseline(capsys):
    assert toki.main(["--side=2", "--channels=8", "--active=3", "--masks=2", "--turn=0.01"]) == 0
    shown = capsys.readouterr().out
    assert "| ours" in shown
    assert "3 active, 2 masks" in shown


def test_command_lines_are_refused_in_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        toki.main(["--stepz=3"])
    assert end.value.code == 2
    assert runpy.run_path(str(ROOT / "launch" / "bench.py"))["main"](["nothing"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "unrecognized arguments: --stepz=3; --help" in first
    assert "found nothing, expected one of step, toki" in second


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--grid=4by54", "--grid: found '4by54', expected batch x length"),
        ("--grid=0x54", "--grid: found '0x54', expected batch x length"),
        ("--implementations=sequential,fast", "--implementations: found 'fast', expected some of auto"),
    ],
)
def test_scan_checks_its_arguments_before_any_work(argument, said, capsys):
    with pytest.raises(SystemExit) as end:
        scan.main([argument])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("bench", "argument", "said"),
    [
        (
            step,
            "--released=nowhere",
            "--released: found nowhere, without models/MambaMIM.py, expected a checkout",
        ),
        (step, "--batch=4,0", "--batch: found 0, expected a whole number, at least 1"),
        (step, "--warm-up=x", "--warm-up: found x, expected a whole number, at least 0"),
        (mixer, "--dtypes=float16", "--dtypes: found 'float16', expected some of float32, bfloat16"),
        (toki, "--threads=-1", "--threads: found -1, expected a whole number, at least 0"),
        (toki, "--active=217", "--active: found 217, expected at most 216"),
        (predict, "--window=17", "--window: found 17, expected voxels divisible by 16"),
        (predict, "--overlap=1", "--overlap: found 1, expected a share from 0 to 0.9"),
        (predict, "--volume=9,9", "--volume: found 9,9, expected 3 whole numbers separated by commas"),
    ],
)
def test_benches_check_numbers_and_paths_before_any_work(bench, argument, said, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main([argument])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_step_checks_its_arguments_before_any_work(capsys, tmp_path):
    assert step.main(["--dtype=float31"]) == 2
    assert "float31" in capsys.readouterr().err
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "MambaMIM.py").touch()
    assert step.main([f"--released={tmp_path}", "--config.data.crop=(96,96,64)"]) == 2
    assert "hymamba with state 16 on a cube" in capsys.readouterr().err
    sizes = step.released_sizes(step.settings([]))
    assert sizes["depths"] == (1, 2, 2, 2, 1)
    assert sizes["size"] == 96
    with pytest.raises(ConfigError, match="no such key"):
        step.settings(["--config.model.width=3"])


@pytest.mark.slow
def test_loader_reads_every_encoding_warm_and_cold(tmp_path, capsys):
    source = ct_files.dataset(tmp_path / "source", 3)
    options = [f"--source={source}", "--volumes=2", "--crop=16", "--batches=2", "--steps=1", "--cold"]
    assert loader.main(options) == 0
    printed = capsys.readouterr().out
    assert "2 volumes: npy" in printed
    assert all(f"| {encoding} int16, cold" in printed for encoding in ("npy", "blosc2"))
    assert loader.main([f"--source={tmp_path / 'nowhere'}"]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_prediction_alone_has_its_windows_and_compares_results(tmp_path, monkeypatch):
    tiny = {"channels": (4, 6, 4, 4, 6), "depths": (1, 1, 1, 1), "expansion": (1, 1, 1, 1), "mamba_depth": 1}
    monkeypatch.setitem(predict.SIZES, "tiny", tiny)
    sizes = predict.write_weights(tmp_path / "weights.npz", "tiny", classes=3, window=16)
    assert (sizes["depths"], sizes["size"], sizes["classes"]) == ((1, 1, 1, 1, 1), 16, 3)
    ours = predict.Ours(
        str(tmp_path / "weights.npz"), (16, 16, 24), 16, 0.5, batch=1, result=str(tmp_path / "result.npy")
    )
    assert ours() > 0
    assert ours.facts() == {"windows": 2}
    found = np.load(tmp_path / "result.npy")
    assert found.shape == (16, 16, 24, 3)
    assert "at most 0.0e+00" in predict._agreement(found, found)
    assert "labels equal: 100.0000%" in predict._agreement(found, found)


@pytest.mark.parametrize(
    ("card", "n", "floor"), [("NVIDIA H200", 16, 50.6e-6), ("NVIDIA H200", 32, None), ("NVIDIA L4", 16, None)]
)
def test_the_floor_of_the_scan_is_of_known_cards_and_states(card, n, floor, monkeypatch):
    """20 exponentials for each of 64 x 216 x 768 at 4.2 T/s."""
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=card)])
    found = scan.floor_seconds(64, 216, 768, n, "forward", "float32")
    assert found == (floor if floor is None else pytest.approx(floor, rel=1e-3))


@pytest.mark.parametrize("mode", scan.NEEDS)
@pytest.mark.parametrize("b", [1, 64], ids=["segmented", "whole"])
def test_the_sweep_of_the_scan_tries_what_its_kernels_take(mode, b):
    base, inputs = tuning.TUNED[9, 0], scan.make_inputs(b, 6, 768, 16, "float32")
    launches = scan_launches.sweep_launches(base, b * 768, mode)
    assert base in launches
    assert len(set(launches)) == len(launches) > 2
    for launch in launches:
        for work in ("inference",) if mode == "forward" else ("saves", "backward"):
            triton_plan.walk(inputs, launch, work, False, False)  # raises for a wrong one


def test_another_launch_of_the_scan_is_named_by_its_fields():
    assert scan_launches.changed("abreast_below=0,few=528") == {"abreast_below": 0, "few": 528}
    for text in ("few", "few=many", "few=-1", "fewer=1", ""):
        with pytest.raises(argparse.ArgumentTypeError, match=f"found {text!r}, expected FIELD=NUMBER"):
            scan_launches.changed(text)


def test_the_mixer_is_timed_in_both_precisions_beside_its_convolution(capsys):
    assert mixer.main(["--grid=1x5", "--channels=32", "--rounds=1", "--iterations=2"]) == 0
    rows = [
        line.split("|")[2:4] for line in capsys.readouterr().out.splitlines() if line.startswith("| 1, 5")
    ]
    sides = {"forward": ["mixer", "convolution alone"]}
    sides["forward + backward"] = [*sides["forward"], "convolution as JAX derives it"]
    assert [[cell.strip() for cell in row] for row in rows] == [
        [mode, f"{side}, {dtype}"]
        for mode in mixer.MODES
        for dtype in ("float32", "bfloat16")
        for side in sides[mode]
    ]


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_another_mixer_is_compared_with_ours_before_it_is_timed(factor, monkeypatch):
    class Other:
        def __init__(self, weights, x, g):
            assert set(weights) >= {"in_proj/kernel", "x_proj/kernel", "dt_proj/kernel", "out_proj/kernel"}
            assert set(weights) >= {"conv_kernel", "conv_bias", "A_log", "D", "dt_bias"}
            self.result = factor * np.asarray(nnx.merge(*inputs[0])(x))

        def once(self, mode, dtype):
            assert (mode, dtype) == ("forward", "float32")
            return self

        def detach(self):
            return self

        cpu = detach

        def numpy(self):
            return self.result

    inputs = mixer.make_inputs(1, 5, 32)
    monkeypatch.setattr(mixer, "MambaInner", Other)
    if factor == 1:
        assert isinstance(mixer.theirs(*inputs), Other)
    else:
        with pytest.raises(ValueError, match="from ours, expected"):
            mixer.theirs(*inputs)
