"""Released weights ↔ ours: exact both ways, complete, and clear about what does not fit.

With MAMBAMIM_RELEASED=PATH (a checkout of the authors' code) the real classes load what comes out.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from mambamim_jax.convert import ConversionError, abstract_trees, flatten, from_official, to_official
from mambamim_jax.official_names import rows
from mambamim_jax.official_sizes import sizes_of_official, sizes_of_ours, with_config
from mambamim_jax.settings import PretrainConfig
from mambamim_jax.weight_files import WeightFileError, nest, read_arrays, write_arrays

GOLDENS = Path(__file__).parent / "goldens"
RELEASED = os.environ.get("MAMBAMIM_RELEASED", "")


def golden(name: str) -> tuple[dict[str, np.ndarray], dict]:
    """The complete official state dict of a small network, and its sizes."""
    with np.load(GOLDENS / f"{name}.npz") as archive:
        weights = {
            key.removeprefix("weight."): archive[key] for key in archive.files if key.startswith("weight.")
        }
        return weights, json.loads(str(archive["config"]))


def encoder_alone() -> dict[str, np.ndarray]:
    weights, _ = golden("pretrain_paper")
    prefix = "sparse_encoder."
    return {name.removeprefix(prefix): a for name, a in weights.items() if name.startswith(prefix)}


def assert_equal(left: dict, right: dict) -> None:
    """Same names, dtypes and bits."""
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert array.dtype == right[name].dtype, name
        np.testing.assert_array_equal(array, right[name], err_msg=name, strict=True)


def random_trees(sizes):
    """Our network's trees at these sizes with random numbers."""
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda a: draw.standard_normal(a.shape, np.float32), abstract_trees(sizes))


@pytest.mark.parametrize("name", ["pretrain_paper", "segment"])
def test_official_to_ours_and_back(name):
    official, config = golden(name)
    weights = from_official(official, config)
    back = to_official(weights.params, weights.batch_stats, config)
    assert back.keys() == official.keys()
    assert {n: a.shape for n, a in back.items()} == {n: a.shape for n, a in official.items()}
    used = weights.report.matched
    assert_equal({n: back[n] for n in used}, {n: official[n] for n in used})
    assert used.keys() | weights.report.unused.keys() == official.keys()
    assert all(back[n].dtype == official[n].dtype for n in weights.report.unused)


@pytest.mark.parametrize("task", ["pretrain", "encoder", "segment"])
def test_ours_to_official_and_back(task):
    official = {
        "pretrain": golden("pretrain_paper")[0],
        "encoder": encoder_alone(),
        "segment": golden("segment")[0],
    }
    sizes = sizes_of_official(official[task])
    assert sizes.task == task
    params, stats = random_trees(sizes)
    state_dict = to_official(params, stats, {"size": 48})
    assert sizes_of_official(state_dict) == sizes
    back = from_official(state_dict)
    expected = flatten(params)
    if task == "segment":
        assert back.report.ours_alone == ["encoder/mamba/mask_token"]
        expected["encoder/mamba/mask_token"] = np.zeros_like(expected["encoder/mamba/mask_token"])
    assert_equal(flatten(back.params), expected)
    assert_equal(flatten(back.batch_stats), flatten(stats))
    assert jax.tree.structure(back.params) == jax.tree.structure(params)


def test_the_encoder_alone_is_the_encoder_of_the_whole():
    alone = from_official(encoder_alone())
    whole = from_official(golden("pretrain_paper")[0])
    assert alone.report.ok
    assert alone.batch_stats == {}
    assert_equal(flatten(alone.params), flatten(whole.params["encoder"]))


def test_what_the_released_network_never_uses_is_listed():
    official, config = golden("pretrain_paper")
    report = from_official(official).report
    dead = set(config["dead_parameters"])
    trained = {
        n
        for n in report.unused
        if not n.endswith(("pos_embed", "num_batches_tracked", "running_mean", "running_var"))
    }
    first_skip = {n for n in dead if ".encoder1." in n}  # dead in pre-training, needed by fine-tuning
    assert trained == dead - first_skip
    assert report.ok
    assert "Mamba's backward direction" in str(report)


def test_initial_values_are_deterministic_and_in_range():
    params, stats = random_trees(sizes_of_official(golden("pretrain_paper")[0]))
    first, second = (to_official(params, stats, {"size": 48}) for _ in range(2))
    assert_equal(first, second)
    official, _ = golden("pretrain_paper")
    layer = "sparse_encoder.mae.blocks.1.mamba."
    np.testing.assert_allclose(first[f"{layer}A_b_log"][0], np.log(np.arange(1, 17)), rtol=1e-6)
    assert (first[f"{layer}D_b"] == 1).all()
    assert np.abs(first[f"{layer}conv1d_b.weight"]).max() <= 0.5
    assert 0 < np.abs(first["mask_tokens.4"]).max() <= 0.02
    assert (first["dense_decoder.fuse.0.conv.1.running_var"] == 1).all()
    assert (first["dense_decoder.fuse.0.conv.0.bias"] == 0).all()
    position = "sparse_encoder.mae.pos_embed"
    np.testing.assert_allclose(first[position], official[position], atol=2e-7)


def test_without_batch_statistics_they_are_initial():
    weights = from_official(golden("pretrain_paper")[0])
    state_dict = to_official(weights.params, config={"size": 48})
    assert (state_dict["dense_decoder.dec.3.conv.4.running_var"] == 1).all()
    assert (state_dict["dense_decoder.dec.3.conv.4.running_mean"] == 0).all()


@pytest.mark.parametrize("wrapper", ["checkpoint", "ddp", "config"])
def test_wrappings_are_seen_through(wrapper):
    official, _ = golden("pretrain_paper")
    wrapped = {
        "checkpoint": {"args": "…", "epoch": 3, "module": official, "optimizer": {"state": {}}},
        "ddp": {f"module.{name}": array for name, array in official.items()},
        "config": official | {"config": {"mask_ratio": 0.75, "hierarchy": 5}},
    }[wrapper]
    assert_equal(flatten(from_official(wrapped).params), flatten(from_official(official).params))


def test_a_report_names_a_few_misfits_of_each_kind():
    official = {f"other.{name}": array for name, array in golden("pretrain_paper")[0].items()}
    with pytest.raises(ConversionError, match="missing") as caught:
        from_official(official, strict=False)  # of which nothing fits
    report = caught.value.report
    lines = str(report).splitlines()
    for kind, names in (("missing", report.missing), ("unexpected", report.unexpected)):
        shown = [line for line in lines if line.startswith(f"{kind} ") and len(line.split()) == 2]
        assert [line.split()[1] for line in shown] == names[:5]
        assert any(line.split() == [kind, "…", "and", str(len(names) - 5), "more"] for line in lines)


@pytest.mark.parametrize("kind", ["missing", "unexpected", "wrong shape"])
def test_misfits_fail_in_one_line(kind):
    official, _ = golden("pretrain_paper")
    name = "sparse_encoder.embeddings.expend2.weight"
    array = official.pop(name)
    if kind == "unexpected":
        official |= {name: array, "head.weight": np.zeros(3, np.float32)}
        name = "head.weight"
    elif kind == "wrong shape":
        official[name] = array[:, :, :1]
    with pytest.raises(ConversionError, match=f"1 .*{kind}.*first {name}") as caught:
        from_official(official)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value.report)
    assert not caught.value.report.ok
    partial = from_official(official, strict=False)
    assert ("kernel" in partial.params["encoder"]["expand"][1]) == (kind == "unexpected")


@pytest.mark.parametrize(
    "name", ["sparse_encoder.embeddings.stem.weight", "sparse_encoder.mae.blocks.100000.x"]
)
def test_sizes_that_no_network_has_are_misfits(name):
    official = golden("pretrain_paper")[0] | {name: np.zeros((0, 1, 3, 3, 3), np.float32)}
    sizes = sizes_of_official(official)
    assert sizes.channels[0] > 0
    assert sizes.mamba_depth <= len(official)
    with pytest.raises(ConversionError, match="no network has their sizes .decoder_width: found 3"):
        from_official(golden("pretrain_paper")[0], {"decoder_width": 3})


def test_sizes_given_are_insisted_on():
    official, config = golden("pretrain_paper")
    with pytest.raises(ConversionError, match=r"of a wrong shape .*expected \(96, 24"):
        from_official(official, config | {"decoder_width": 96})
    with pytest.raises(ConversionError, match="missing"):
        from_official(official, config | {"mamba_depth": 3})
    with pytest.raises(ConversionError, match="unexpected"):
        from_official(official, config | {"depths": [1, 2, 2, 1, 1]})


def test_our_own_configuration_gives_the_papers_sizes():
    sizes = with_config(sizes_of_official({"sparse_encoder.x": 0}), PretrainConfig())
    shapes = {row.ours for row in rows(sizes) if not row.unused}
    trees = abstract_trees(sizes)
    assert shapes == (flatten(trees[0]) | flatten(trees[1])).keys()
    assert sum(a.size for a in jax.tree.leaves(trees[0])) == pytest.approx(66.6e6, rel=0.02)


@pytest.mark.parametrize("filler", ["learned_token", "linear", "toki_paper"])
def test_other_fillers_choose_their_parameter(filler):
    official, _ = golden("pretrain_paper")
    weights = from_official(official, {"filler": filler})
    used = {"learned_token": "mask_tokens.0", "linear": None, "toki_paper": "A_interpolation"}[filler]
    assert {n for n in ("A_interpolation", "mask_tokens.0") if n in weights.report.matched} == {used} - {None}
    back = to_official(weights.params, weights.batch_stats, {"size": 48})
    assert back.keys() == official.keys()
    if used:
        np.testing.assert_array_equal(back[used], official[used])


def test_networks_without_an_official_form_are_refused():
    with pytest.raises(ConversionError, match="expected a HyMamba network"):
        to_official({"encoder": {"embed": {"kernel": np.zeros((2, 2))}}, "mask_tokens": {0: np.zeros(3)}})
    with pytest.raises(ConversionError, match="no arrays in the state dict"):
        from_official({"epoch": 3})
    vision = PretrainConfig(model=type(PretrainConfig().model)(encoder="vision_mamba"))
    with pytest.raises(ConversionError, match="only hymamba has an official form"):
        from_official(golden("pretrain_paper")[0], vision)


def launcher():
    spec = importlib.util.spec_from_file_location(
        "launch_convert", GOLDENS.parents[1] / "launch" / "convert.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth"])
def test_launch_script_both_ways(tmp_path, suffix, capsys):
    pytest.importorskip({".safetensors": "safetensors", ".pth": "torch"}.get(suffix, "numpy"))
    official, _ = golden("segment")
    start, ours, end = (tmp_path / f"{name}{suffix}" for name in ("start", "ours", "end"))
    write_arrays(start, official)
    assert launcher()(["--to=ours", str(start), str(ours)]) == 0
    assert "matched" in capsys.readouterr().out
    assert launcher()(["--to=official", "--size=48", str(ours), str(end)]) == 0
    read = {n: np.asarray(a) for n, a in read_arrays(end).items()}
    used = from_official(official).report.matched
    assert_equal({n: read[n] for n in used}, {n: official[n] for n in used})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(p.name for p in (start, ours, end))


def test_a_run_of_ours_becomes_official(tmp_path, capsys):
    ocp = pytest.importorskip("orbax.checkpoint")
    params, stats = random_trees(sizes_of_official(golden("pretrain_paper")[0]))
    for step, factor in ((9, 0.0), (10, 1.0)):
        state = {
            "params": jax.tree.map(lambda a, f=factor: f * a, params),
            "batch_stats": stats,
            "step": step,
        }
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "run" / "checkpoints" / str(step) / "state", state)
    out = tmp_path / "official.npz"
    assert launcher()(["--to=official", "--size=48", str(tmp_path / "run"), str(out)]) == 0
    assert_equal(read_arrays(out), to_official(params, stats, {"size": 48}))
    assert launcher()(["--to=official", str(tmp_path), str(out)]) == 2
    assert "found no checkpoints" in capsys.readouterr().err


def test_launch_script_fails_with_one_line(tmp_path, capsys):
    official, _ = golden("segment")
    del official["embeddings.stem.bias"]
    write_arrays(tmp_path / "in.npz", official)
    arguments = ["--to=ours", str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    assert launcher()(arguments) == 2
    assert "1 missing (first embeddings.stem.bias)" in capsys.readouterr().err
    assert launcher()([*arguments, "--partial"]) == 0
    assert launcher()(["--to=ours", str(tmp_path / "none.npz"), str(tmp_path / "out.npz")]) == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(WeightFileError, match=r"damaged.npz: not a readable .npz file"):
        read_arrays(tmp_path / "damaged.npz")
    with pytest.raises(WeightFileError, match=r"expected one of .npz"):
        read_arrays(tmp_path / "weights.h5")


def test_what_is_ours_already_is_told_in_one_line(tmp_path, capsys):
    write_arrays(tmp_path / "in.npz", golden("segment")[0])
    assert launcher()(["--to=ours", str(tmp_path / "in.npz"), str(tmp_path / "ours.npz")]) == 0
    capsys.readouterr()
    assert launcher()(["--to=ours", str(tmp_path / "ours.npz"), str(tmp_path / "again.npz")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "arrays of ours (first params/" in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "again.npz").exists()


@pytest.mark.parametrize("size", ["-5", "0", "17", "8", "1040"])
def test_sizes_that_the_official_network_cannot_have(size, tmp_path, capsys):
    weights = from_official(golden("segment")[0])
    write_arrays(tmp_path / "ours.npz", flatten({"params": weights.params}))
    arguments = ["--to=official", f"--size={size}", str(tmp_path / "ours.npz"), str(tmp_path / "out.npz")]
    assert launcher()(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"error: size: found {size}, expected voxels a side, divisible by 16, from 16 to 1024"
    )
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        (
            "params/encoder/stem/kernel",
            (3,),
            "our weights: found arrays that no HyMamba network has the shapes of",
        ),
        (
            "params/classify/bias",
            (99,),
            "our segment weights: 1 of a wrong shape (first classify/bias: found (99,)",
        ),
        ("params/classify/bias/x", (1,), "params/classify/bias/x: found an array of the name before x, too"),
    ],
)
def test_our_arrays_of_a_wrong_shape_are_refused(name, shape, said, tmp_path, capsys):
    weights = from_official(golden("segment")[0])
    arrays = flatten({"params": weights.params}) | {name: np.zeros(shape, np.float32)}
    write_arrays(tmp_path / "ours.npz", arrays)
    assert launcher()(["--to=official", str(tmp_path / "ours.npz"), str(tmp_path / "out.npz")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "out.npz").exists()


def test_torch_files_cannot_run_code(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"module": {"x": Path("harm")}}, tmp_path / "evil.pth")
    with pytest.raises(WeightFileError, match=r"evil.pth: not a readable .pth"):
        read_arrays(tmp_path / "evil.pth")


def test_half_precision_tensors_become_float32():
    torch = pytest.importorskip("torch")
    official, _ = golden("segment")
    half = {name: torch.from_numpy(array).to(torch.bfloat16) for name, array in official.items()}
    params = flatten(from_official(half).params)
    assert {a.dtype for a in params.values()} == {np.dtype(np.float32)}


@pytest.mark.skipif(not RELEASED, reason="MAMBAMIM_RELEASED is not set")
@pytest.mark.parametrize("name", ["pretrain_released", "segment"])
def test_the_released_classes_load_strictly(name):
    import torch

    from mambamim_jax.bench import torch_baseline

    official, config = golden(name)
    build = torch_baseline.build_segmenter if name == "segment" else torch_baseline.build_pretraining
    network = build(RELEASED, config)
    weights = from_official(network.state_dict(), config)
    assert weights.report.ok
    weights = from_official(official, config)
    back = to_official(weights.params, weights.batch_stats, config)
    network.load_state_dict({n: torch.from_numpy(a) for n, a in back.items()}, strict=True)


def test_sizes_are_read_off_our_trees():
    sizes = sizes_of_official(golden("segment")[0])
    params, _ = random_trees(sizes)
    assert sizes_of_ours(flatten(params)).channels == sizes.channels
    assert_equal(flatten(nest(flatten(params))), flatten(params))
