"""Stores that were copied or kept badly: said before training, put right where the sources are."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mambamim_jax.data import arrays, datasets, store
from mambamim_jax.data.phantom import write_phantoms
from tests.data import ct_files

ROOT = Path(__file__).parents[2]


def _contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _damage(path, how):
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        parts = {"short": content[:-1], "long": content + b"x", "empty": b"", "other": b"x" * len(content)}
        path.write_bytes(parts[how])


@pytest.fixture(scope="module", params=["npy", "blosc2"])
def prepared(request, tmp_path_factory):
    """Cases with a labelled one, and their store."""
    folder = tmp_path_factory.mktemp(request.param)
    write_phantoms(folder / "ct", count=2)
    cases = datasets.discover(folder / "ct")
    store.prepare(cases, folder / "store", spacing=(6.0, 6.0, 6.0), encoding=request.param, workers=0)
    return cases, folder / "store", request.param


@pytest.mark.parametrize("how", ["short", "long", "empty", "other", "gone"])
@pytest.mark.parametrize("part", ["image", "label", "index"])
def test_damaged_volumes_are_named_and_made_again(prepared, tmp_path, part, how):
    cases, whole, encoding = prepared
    folder = shutil.copytree(whole, tmp_path / "store")
    assert len(store.open_store(folder)) == 2
    (path,) = sorted(folder.glob(f"volumes/*/{part}.*"))[1:]
    _damage(path, how)
    with pytest.raises(store.StoreError, match="1 of 2 volumes are damaged, first") as refused:
        store.open_store(folder)
    assert str(path.parent / part) in str(refused.value)
    assert str(refused.value).endswith("copy the store again, or preprocess again")
    assert "\n" not in str(refused.value)
    again = store.prepare(cases, folder, spacing=(6.0, 6.0, 6.0), encoding=encoding, workers=0)
    assert len(again) == 2
    assert _contents(folder) == _contents(whole)


def test_what_is_damaged_while_it_is_used_is_named(tmp_path):
    folder = ct_files.dataset(tmp_path / "source", 1)
    opened = store.prepare(datasets.discover(folder), tmp_path / "store", workers=0)
    path = Path(opened.path(0, "image") + ".npy")
    _damage(path, "short")
    with pytest.raises(store.StoreError, match=r"image\.npy: found \d+ bytes, expected \d+"):
        opened.image(0)
    path.unlink()
    with pytest.raises(store.StoreError, match=r"image\.npy: no such file"):
        opened.image(0)


def test_a_whole_array_is_not_damaged(tmp_path):
    for encoding in arrays.ENCODINGS:
        for shape in ((3, 4, 5), (70, 65, 66), (2, 3, 4, 2)):
            stem = tmp_path / f"{encoding}{len(shape)}{shape[0]}"
            arrays.write(stem, np.arange(np.prod(shape), dtype=np.int16).reshape(shape), encoding)
            assert arrays.damage(str(stem)) is None


def test_a_compact_store_without_its_library_is_refused_when_opened(tmp_path, monkeypatch):
    cases = datasets.discover(ct_files.dataset(tmp_path / "source", 1))
    store.prepare(cases, tmp_path / "store", encoding="blosc2", workers=0)
    monkeypatch.setitem(sys.modules, "blosc2", None)
    with pytest.raises(
        store.StoreError, match=r"store: encoding 'blosc2' needs its library: .* pip install blosc2"
    ):
        store.open_store(tmp_path / "store")
    with pytest.raises(store.StoreError, match="needs its library"):
        store.prepare(cases, tmp_path / "other", encoding="blosc2", workers=0)


def test_pretraining_from_a_damaged_store_ends_with_2_before_any_work(tmp_path):
    write_phantoms(tmp_path / "ct", count=2)
    store.prepare(datasets.discover(tmp_path / "ct"), tmp_path / "store", spacing=(4.0, 4.0, 4.0), workers=0)
    _damage(next((tmp_path / "store").glob("volumes/*/image.npy")), "short")
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--config=configs/pretrain.py:demo"]
    command += [f"--config.data.source={tmp_path / 'store'}", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: 1 of 2 volumes are damaged, first ")
    assert done.stderr.count("\n") == 1
