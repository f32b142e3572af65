"""What pre-training is fed with: a store or raw folders, several sources by weight, HU windowed on the device."""

import dataclasses
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console

from mambamim_jax.checks import ConfigError
from mambamim_jax.data import datasets, preprocess, store, worker
from mambamim_jax.data.phantom import write_phantoms
from mambamim_jax.data.volume import window_intensity
from mambamim_jax.settings import DataConfig, PretrainConfig
from mambamim_jax.train.pretrain import mim_task, prepare_data
from mambamim_jax.train.progress import Terminal
from mambamim_jax.train.volumes import VOLUMES, same_volumes

DATA = DataConfig(
    crop=(32, 32, 32), spacing=(6.0, 6.0, 6.0), crops_per_volume=1, volumes_per_batch=2, workers=1
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return [write_phantoms(folder / name, seed=seed, count=2) for seed, name in enumerate("ab")]


def loader_of(workdir, **changes):
    terminal = Terminal(Console(file=io.StringIO()))
    return prepare_data(PretrainConfig(data=dataclasses.replace(DATA, **changes)), workdir, terminal)


def test_a_store_and_raw_folders_give_the_same(sources, tmp_path):
    both = ",".join(map(str, sources))
    raw = loader_of(tmp_path / "run", source=both)
    cases = [case for source in sources for case in datasets.discover(source)]
    store.prepare(cases, tmp_path / "store", spacing=DATA.spacing, workers=1)
    ready = loader_of(tmp_path / "other", source=str(tmp_path / "store"))
    assert len(raw.store) == len(ready.store) == 4
    assert raw.store.fingerprint == ready.store.fingerprint
    batches = [next(iter(loader)) for loader in (raw, ready)]
    assert np.array_equal(batches[0]["image"], batches[1]["image"])
    assert not (tmp_path / "other" / "store").exists()


def test_labels_of_an_earlier_recipe_do_not_matter(sources, tmp_path, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr(preprocess, "RECIPE", 1)
        old = loader_of(tmp_path, source=str(sources[0])).store
    assert old.entries[0].has_label
    monkeypatch.setattr(
        worker, "run_jobs", lambda jobs, workers: iter(jobs and pytest.fail("prepared again"))
    )
    assert loader_of(tmp_path, source=str(sources[0])).store.fingerprint == old.fingerprint


def test_weights_decide_how_often_a_source_is_drawn(sources, tmp_path):
    both = ",".join(map(str, sources))
    mixed = loader_of(tmp_path, source=both, weights="a=3,b=1")
    drawn = [Path(mixed.store.entries[mixed.volume_of(n)].source).name for n in range(40)]
    assert drawn.count("a") == 30


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ("a=1", "no weight for source .*b; weights are given for a"),
        ("a=1,b=1,c=1", "weight for 'c', but the"),
    ],
)
def test_weights_of_other_sources_are_refused_before_anything_is_prepared(sources, tmp_path, weights, says):
    both = ",".join(map(str, sources))
    with pytest.raises(ConfigError, match=f"config.data.weights: {says}"):
        loader_of(tmp_path, source=both, weights=weights)
    assert list(tmp_path.iterdir()) == []
    cases = [case for source in sources for case in datasets.discover(source)]
    store.prepare(cases, tmp_path / "store", spacing=DATA.spacing, workers=1)
    with pytest.raises(ConfigError, match=says):  # it knows the sources itself
        loader_of(tmp_path, source=str(tmp_path / "store"), weights=weights)


def test_the_step_windows_what_the_loader_left_in_hu(sources, tmp_path):
    loader = loader_of(tmp_path, source=str(sources[0]))
    batch = next(iter(loader))
    assert batch["image"].dtype == np.int16
    config = PretrainConfig(data=DATA)
    prepared = mim_task(config).prepare({"image": batch["image"]}, jax.random.key(0))
    assert np.array_equal(prepared["image"], window_intensity(batch["image"], DATA.window))


def test_volumes_that_have_changed_since_are_named(sources, tmp_path):
    files = [path for source in sources for path in sorted(source.glob("imagesTr/*.nii.gz"))]
    data, workdir, saved = tmp_path / "data", tmp_path / "run", []
    checkpoints = SimpleNamespace(steps=lambda: [len(saved)] * len(saved), meta=lambda _: {"data": saved[-1]})

    def loader_with(names):
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir()
        for name, file in zip(names, files):
            shutil.copy(file, data / f"{name}.nii.gz")
        return loader_of(workdir, source=str(data))

    loader = loader_with("abcd")
    same_volumes(loader, workdir, checkpoints)
    saved.append(json.loads(json.dumps(iter(loader).get_state())))
    for names, differs in (
        ("bacz", r"1 new \(z\), 1 gone \(d\), 2 changed \(a, b\)"),
        ("z", r"1 new \(z\), 4 gone \(a, b, c, …\)"),
    ):
        loader = loader_with(names)
        with pytest.raises(
            ConfigError, match=f"config.data: found {differs}; expected the volumes of the run"
        ):
            same_volumes(loader, workdir, checkpoints)
    same_volumes(loader_with("abcd"), workdir, checkpoints)
    for content in ("5", '{"identity": {"seed": 7}, "volumes": {}}'):  # of another run
        (workdir / VOLUMES).write_text(content)
        same_volumes(loader, workdir, checkpoints)  # left to the loader's state
        assert (workdir / VOLUMES).read_text() == content
