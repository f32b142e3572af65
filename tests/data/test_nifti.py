"""What is read, and what is refused with which reason."""

import gzip

import nibabel
import numpy as np
import pytest

from mambamim_jax.data import nifti, volume
from tests.data import ct_files


def code_of(path, **options):
    with pytest.raises(volume.VolumeError) as caught:
        nifti.read(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert caught.value.code in volume.REASONS
    return caught.value.code


def patched(path, at, values):
    """Overwrite header bytes of an uncompressed file."""
    content = bytearray(path.read_bytes())
    content[at : at + values.nbytes] = values.tobytes()
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<i4", "<f4", "<f8"])
def test_reads_what_was_written(tmp_path, kind, ending, dtype):
    voxels = ct_files.body().astype(dtype)
    path = ct_files.write(tmp_path / f"x{ending}", voxels, kind=kind)
    read = nifti.read(path)
    assert np.array_equal(read.values(), voxels)
    np.testing.assert_allclose(read.affine, ct_files.affine_of("LPS"))


def test_slope_and_intercept(tmp_path):
    stored = (ct_files.body() + 1024).clip(0).astype(np.uint16)
    read = nifti.read(ct_files.write(tmp_path / "x.nii", stored, slope=(1.0, -1024.0)))
    assert np.array_equal(read.values(), stored - 1024.0)
    halved = (stored / 2).astype(np.uint16)
    read = nifti.read(ct_files.write(tmp_path / "x.nii", halved, slope=(2.0, -1024.0)))
    assert np.array_equal(read.values(), halved * 2.0 - 1024.0)


@pytest.mark.parametrize("slope", [0.0, np.nan, np.inf])
def test_useless_slope_means_none(tmp_path, slope):
    voxels = ct_files.body()
    path = ct_files.write(tmp_path / "x.nii", voxels)
    patched(path, 112, np.array([slope, 7.0], "<f4"))
    assert np.array_equal(nifti.read(path).values(), voxels)


def test_trailing_singleton_axis_is_dropped(tmp_path):
    path = ct_files.write(tmp_path / "x.nii.gz", ct_files.body()[..., None])
    assert nifti.read(path).voxels.shape == ct_files.body().shape


def test_geometry_comes_from_qform_where_there_is_no_sform(tmp_path):
    affine = ct_files.affine_of("PLI", spacing=(2.0, 2.5, 3.0))
    affine[:3, :3] = ct_files.rotation(12) @ affine[:3, :3]
    path = ct_files.write(tmp_path / "x.nii", ct_files.body(), affine, codes=(0, 1))
    np.testing.assert_allclose(nifti.read(path).affine, affine, atol=1e-4)


def test_units_are_minded(tmp_path):
    path = ct_files.write(tmp_path / "x.nii", ct_files.body(), ct_files.affine_of("LPS") / 1000)
    patched(path, 123, np.array([1], np.uint8))  # metres
    np.testing.assert_allclose(nifti.read(path).spacing, (2.0, 2.0, 3.0), rtol=1e-5)


def test_refuses_voxels_that_are_no_ct(tmp_path):
    body = ct_files.body()

    def code(voxels, **options):
        return code_of(ct_files.write(tmp_path / "x.nii.gz", voxels, **options))

    assert code(np.full(body.shape, -1000, np.int16)) == "air_only"
    assert code(np.clip(body // 4 + 128, 0, 255).astype(np.uint8)) == "not_hu"
    assert code((body * 1000.0).astype(np.float32)) == "not_hu"
    assert code(np.where(body > 60, np.nan, body).astype(np.float32)) == "non_finite"
    assert code(np.where(body > 60, np.inf, body).astype(np.float64)) == "non_finite"
    assert code(body.astype(np.complex64)) == "complex"
    assert code(np.zeros((9, 9, 9), [("R", "u1"), ("G", "u1"), ("B", "u1")])) == "rgb"
    assert code(np.stack([body, body], -1)) == "not_3d"
    assert code(body[:, :, 0]) == "not_3d"
    assert code(body[:, :, :1]) == "not_3d"
    path = ct_files.write(tmp_path / "x.nii", body)
    patched(path, 70, np.array([1536, 128], "<i2"))  # 128-bit float
    assert code_of(path) == "dtype"


def test_other_modalities_need_not_be_in_hu(tmp_path):
    voxels = np.clip(ct_files.body() + 1000, 0, None)
    path = ct_files.write(tmp_path / "x.nii.gz", voxels)
    assert code_of(path) == "not_hu"
    assert np.array_equal(nifti.read(path, hu=False).voxels, voxels)
    ct_files.write(path, np.where(voxels > 900, np.nan, voxels).astype(np.float32))
    assert code_of(path, hu=False) == "non_finite"


def test_refuses_impossible_geometry(tmp_path):
    def written(**options):
        return ct_files.write(tmp_path / "x.nii", ct_files.body(), **options)

    assert code_of(written(codes=(0, 0))) == "no_geometry"
    assert code_of(patched(written(), 280, np.zeros(12, "<f4"))) == "bad_affine"
    assert code_of(patched(written(), 280, np.full(4, np.nan, "<f4"))) == "bad_affine"
    assert code_of(patched(written(), 280, np.tile(np.float32([2, 0, 0, 0]), 3))) in (
        "bad_affine",
        "geometry_conflict",
    )
    assert code_of(patched(written(), 80, np.zeros(3, "<f4"))) == "zero_spacing"
    assert code_of(patched(written(), 80, np.full(3, np.nan, "<f4"))) == "zero_spacing"
    assert code_of(patched(written(), 80, np.float32([2, 2, 5]))) == "geometry_conflict"
    assert code_of(written(affine=ct_files.affine_of("LPS", (60.0, 2.0, 2.0)))) == "absurd_spacing"
    assert code_of(written(affine=ct_files.affine_of("LPS", (2.0, 2.0, 0.01)))) == "absurd_spacing"
    assert code_of(patched(written(), 112, np.float32([2.0, np.nan]))) == "bad_scaling"
    mirrored = written()
    patched(mirrored, 280, -np.frombuffer(mirrored.read_bytes()[280:296], "<f4"))  # sform only, not qform
    assert code_of(mirrored) == "geometry_conflict"


def test_refuses_broken_files(tmp_path):
    good = ct_files.write(tmp_path / "good.nii.gz", ct_files.body()).read_bytes()
    plain = gzip.decompress(good)

    def code(content, name="x.nii.gz"):
        (tmp_path / name).write_bytes(content)
        return code_of(tmp_path / name)

    assert code_of(tmp_path / "absent.nii.gz") == "missing"
    assert code(b"") == "not_nifti"
    assert code(b"hello" * 200) == "not_nifti"
    assert code(good[: len(good) // 2]) == "truncated"
    assert code(good[:-4]) == "truncated"
    two = gzip.compress(plain[:999]) + gzip.compress(plain[999:])
    assert code(two[:-4]) == "truncated"
    assert code(two + b"garbage!") == "excess_data"
    for extra in (b"g", b"garbage!", b"garbage, and more of it"):
        assert code(good + extra) == "excess_data"
        with pytest.raises(
            volume.VolumeError, match=f"stream is whole, but {len(extra)} bytes that are not gzip follow"
        ):
            nifti.read(tmp_path / "x.nii.gz")
    (tmp_path / "x.nii.gz").write_bytes(good + bytes(600))  # padded with zeros, as a tape does
    assert np.array_equal(nifti.read(tmp_path / "x.nii.gz").voxels, ct_files.body())
    assert code(good[:-8] + bytes([good[-8] ^ 1]) + good[-7:]) == "bad_crc"
    assert code(good[:-4] + b"\1\2\3\4") in ("bad_crc", "bad_gzip")
    broken = bytearray(good)
    broken[len(good) // 2] ^= 255
    assert code(bytes(broken)) in ("bad_gzip", "bad_crc", "truncated", "short_data")
    assert code(gzip.compress(plain[: len(plain) // 2])) == "short_data"
    assert code(plain[: len(plain) // 2], "x.nii") == "short_data"
    assert code(gzip.compress(plain + bytes(64))) == "excess_data"
    assert code(plain + b"x", "x.nii") == "excess_data"
    header = bytearray(plain)
    header[344:348] = b"ni1\0"
    assert code(bytes(header), "x.nii") == "not_nifti"
    huge = bytearray(plain)
    huge[42:48] = np.int16([900, 900, 900]).tobytes()
    assert code(gzip.compress(bytes(huge))) == "short_data"
    negative = bytearray(plain)
    negative[42:44] = np.int16([-3]).tobytes()
    assert code(bytes(negative), "x.nii") == "bad_header"


def test_labels(tmp_path):
    label = (ct_files.body() > 0).astype(np.uint8) * 3
    read = nifti.read(ct_files.write(tmp_path / "x.nii.gz", label.astype(np.float32)), label=True)
    assert np.array_equal(read.values(), label)
    assert code_of(ct_files.write(tmp_path / "x.nii.gz", label * 0.5), label=True) == "not_labels"
    assert code_of(ct_files.write(tmp_path / "x.nii.gz", label * 0.997), label=True) == "not_labels"
    assert (
        code_of(ct_files.write(tmp_path / "x.nii.gz", label.astype(np.int16) - 1), label=True) == "not_labels"
    )


@pytest.mark.parametrize(
    ("highest", "kind"),
    [(n, np.uint8) for n in (1, 3, 13, 100, 117, 255)]
    + [(n, np.int16) for n in (1, 13, 117, 205, 1000, 30_000)],
)
def test_labels_that_were_written_as_floats(tmp_path, highest, kind):
    """With the header of an integer image, which then scales them: to within rounding."""
    label = np.arange(8 * 9 * 10).reshape(8, 9, 10) * highest // 719
    image = nibabel.Nifti1Image(label.astype(np.float64), ct_files.affine_of("LPS"))
    image.header.set_data_dtype(kind)
    nibabel.save(image, tmp_path / "x.nii.gz")
    read = nifti.read(tmp_path / "x.nii.gz", label=True)
    assert np.array_equal(read.labels(), label)
    same = volume.resample(read, read.spacing, label=True, dtype=np.uint16)
    assert np.array_equal(np.sort(same.voxels, None), np.sort(label, None))


@pytest.mark.parametrize(("slope", "off"), [(0.4, "0.4"), (0.25, "0.5"), (0.6, "0.4"), (1 / 255, "0.5")])
def test_integers_that_a_slope_makes_other_than_labels(tmp_path, slope, off):
    voxels = np.arange(8 * 9 * 10).reshape(8, 9, 10).astype(np.uint8) % 200
    path = ct_files.write(tmp_path / "x.nii", voxels, slope=(slope, 0.0))
    with pytest.raises(
        volume.VolumeError, match=rf"up to {off} off whole numbers, expected whole 0 to 65535"
    ):
        nifti.read(path, label=True)


HARD = {
    "air_only.nii.gz": "air_only",
    "bad_affine_zero.nii.gz": "bad_affine",
    "bad_float_nan_inf.nii.gz": "non_finite",
    "bad_gz_crc.nii.gz": "bad_crc",
    "bad_gz_truncated.nii.gz": "truncated",
    "bad_pixdim_zero_codes0.nii.gz": "zero_spacing",
    "bad_short_data.nii.gz": "short_data",
    "ct_gantrytilt_uint8_slope7p1.nii.gz": None,
    "ct_oblique_uint8_nonHU.nii.gz": "not_hu",
    "ct_rgb24.nii.gz": "rgb",
    "mr_4d_int16.nii.gz": "not_3d",
    "mr_4d_slope_inter.nii": "not_3d",
    "mr_complex64.nii.gz": "complex",
    "mr_nifti2_4d.nii.gz": "not_3d",
    "odd_slope_nan.nii.gz": None,
    "odd_slope_zero.nii.gz": None,
    "phantom_head_tilt16p5_18sl.nii.gz": None,
    "rgb_2d_report.nii.gz": "rgb",
    "sform0_qform0.nii.gz": "no_geometry",
    "slice_2d.nii.gz": "not_3d",
    "trailing_singleton_4d.nii.gz": None,
}


@ct_files.needs_shared
def test_every_shared_hard_file_is_decided():
    assert {path.name for path in (ct_files.SHARED / "hard").iterdir()} == set(HARD)


@ct_files.needs_shared
@pytest.mark.parametrize("name", HARD)
def test_hard_files(name):
    path = ct_files.SHARED / "hard" / name
    if HARD[name]:
        assert code_of(path) == HARD[name]
        return
    read, image = nifti.read(path), nibabel.load(path)
    expected = np.asarray(image.dataobj, np.float32).squeeze()
    np.testing.assert_allclose(read.values(), expected, atol=1e-3)
    np.testing.assert_allclose(read.affine, image.affine, atol=1e-5)
