"""Released weights ↔ ours: exact both ways, complete, and clear about what does not fit.

With MAMBAMIM_RELEASED=PATH (a checkout of the authors' code) the real classes load what comes out.
"""

from __future__ import annotations

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
from mambamim_jax.weight_files import nest

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


def test_sizes_that_no_network_has_are_one_line():
    with pytest.raises(ConversionError, match=r"no network has their sizes .*found 3, expected") as caught:
        from_official(golden("pretrain_paper")[0], {"decoder_width": 3})
    assert "\n" not in str(caught.value)


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
