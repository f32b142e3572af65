"""A patient's trunk as a CT: organs painted into a grid and scanned.

Coordinates are mm in RAS: x to the right, y to the front, z upwards from the pelvis; the spine runs along x = 0.
Structures are painted from large to small, blurred as a scanner does, and given noise.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from mambamim_jax.types import NumpyArray

LABELS = {
    "background": 0,
    "lung": 1,
    "liver": 2,
    "spleen": 3,
    "right_kidney": 4,
    "left_kidney": 5,
    "stomach": 6,
    "heart": 7,
    "aorta": 8,
    "vena_cava": 9,
    "pancreas": 10,
    "bone": 11,
    "gallbladder": 12,
}
_DIAPHRAGM = 190.0
"""mm: height of the lungs' floor at its rim."""


class _Patient:
    """The grid being painted, in this patient's own coordinates."""

    def __init__(
        self, rng: np.random.Generator, spacing: tuple[float, ...], reach: tuple[float, float]
    ) -> None:
        self.rng, self.spacing = rng, spacing
        extent = (360.0, 280.0, float(reach[1] - reach[0]))
        shape = tuple(round(e / s) for e, s in zip(extent, spacing))
        start = (-180.0, -140.0, float(reach[0]))
        axes = [o + s * np.arange(n, dtype=np.float32) for o, s, n in zip(start, spacing, shape)]
        grow = rng.normal(1.0, 0.05, 3)  # a patient is wider, deeper or taller than the next
        self.x = (axes[0] / np.float32(grow[0]))[:, None, None]
        self.y = (axes[1] / np.float32(grow[1]))[None, :, None]
        self.z = (axes[2] / np.float32(grow[2]))[None, None, :]
        self.hu = np.full(shape, -1000.0, np.float32)
        self.label = np.zeros(shape, np.uint8)
        self.contrast = float(rng.choice([0.0, 0.6, 0.8, 1.0]))

    def noise(self, scale: float) -> NumpyArray:
        """Gaussian noise of unit variance, smooth over ``scale`` mm."""
        raw = self.rng.standard_normal(self.hu.shape, np.float32)
        smooth = ndimage.gaussian_filter(raw, [scale / s for s in self.spacing], truncate=2.5)
        return smooth / smooth.std()

    def ellipsoid(
        self, center: tuple[float, ...], radii: tuple[float, ...], power: float = 2.0
    ) -> NumpyArray:
        """Distance from the centre, 1 at the surface (a superellipsoid's, for a power above 2)."""
        terms = (
            np.abs((axis - c) / r) ** power for axis, c, r in zip((self.x, self.y, self.z), center, radii)
        )
        a, b, c = terms
        return (a + b) + c

    def column(
        self, center: tuple[float, float], radii: tuple[float, float], power: float = 2.0
    ) -> NumpyArray:
        """Like ``ellipsoid``, for a structure that runs along z."""
        return (
            np.abs((self.x - center[0]) / radii[0]) ** power
            + np.abs((self.y - center[1]) / radii[1]) ** power
        )

    def paint(self, mask: NumpyArray, hu: NumpyArray | float, label: str | None = None) -> None:
        mask = np.broadcast_to(mask, self.hu.shape)
        np.copyto(self.hu, np.float32(hu), where=mask)
        if label:
            self.label[mask] = LABELS[label]

    def vary(self, value: float, spread: float) -> float:
        return float(self.rng.normal(value, spread))


def draw_phantom(
    rng: np.random.Generator, spacing: tuple[float, float, float], reach: tuple[float, float]
) -> tuple[NumpyArray, NumpyArray]:
    """HU int16 and labels uint8 (h, w, d) of one patient, scanned from ``reach[0]`` to ``reach[1]`` mm along
    z.
    """
    patient = _Patient(rng, spacing, reach)
    texture, lumps = patient.noise(3.5), patient.noise(9.0)
    cavity, dome = _trunk(patient, texture)
    _abdomen(patient, texture, lumps, cavity & (patient.z < dome))
    _chest(patient, texture, lumps, cavity & (patient.z >= dome))
    _vessels(patient)
    _bones(patient, texture)
    _couch(patient)
    blurred = ndimage.gaussian_filter(patient.hu, 0.55, truncate=3.0)
    grain = ndimage.gaussian_filter(rng.standard_normal(blurred.shape, np.float32), 0.5, truncate=2.0)
    blurred += grain * np.float32(patient.vary(22.0, 3.0))
    return np.clip(np.rint(blurred), -1024, 3071).astype(np.int16), patient.label


def _trunk(p: _Patient, texture: NumpyArray) -> tuple[NumpyArray, NumpyArray]:
    """Skin, fat and muscle wall; returns the cavity and the diaphragm's height."""
    fat = p.vary(16.0, 6.0)
    fat = min(max(fat, 6.0), 30.0)
    waist = 1.0 - 0.07 * np.exp(-(((p.z - 110.0) / 50.0) ** 2))
    shoulder = 1.0 - 0.25 * np.clip((p.z - 290.0) / 60.0, 0.0, 1.0) ** 2
    wide, deep = 158.0 * waist * shoulder, 112.0 * shoulder * (1.0 - 0.05 * waist)
    belly = p.y - 4.0

    def inside(margin: float) -> NumpyArray:
        return np.abs(p.x / (wide - margin)) ** 2.5 + np.abs(belly / (deep - margin)) ** 2.3 < 1.0

    p.paint(inside(0.0), 15.0)
    p.paint(inside(2.5), -105.0 + 5.0 * texture)
    p.paint(inside(2.5 + fat), 55.0 + 6.0 * texture)
    cavity = inside(2.5 + fat + 13.0) & (p.y > -72.0 - 10.0 * np.abs(p.x / 60.0).clip(0, 1))
    p.paint(cavity, -100.0 + 8.0 * texture)
    for side in (-1.0, 1.0):  # muscles along the spine, and psoas
        p.paint(p.column((side * 38.0, -84.0), (30.0, 20.0), 2.4) < 1.0, 58.0 + 7.0 * texture)
        p.paint(
            (p.column((side * 46.0, -46.0), (19.0, 20.0)) < 1.0) & (p.z < 130.0) & cavity,
            56.0 + 6.0 * texture,
        )
    right = 38.0 * np.exp(-(((p.x - 70.0) / 55.0) ** 2) - ((p.y - 10.0) / 75.0) ** 2)
    left = 28.0 * np.exp(-(((p.x + 70.0) / 55.0) ** 2) - ((p.y - 10.0) / 75.0) ** 2)
    return cavity, _DIAPHRAGM + right + left - 22.0


def _abdomen(p: _Patient, texture: NumpyArray, lumps: NumpyArray, room: NumpyArray) -> None:
    """Bowel in fat, then the solid organs, all below the diaphragm."""
    gain = p.contrast
    low = room & (p.z < 140.0) & (p.y > -40.0) & (p.ellipsoid((0, 22, 60), (125, 75, 95), 3.0) < 1.0)
    loops = np.abs(lumps + 0.25 * texture)
    p.paint(low & (loops > 0.32), 42.0 + 30.0 * gain)
    p.paint(low & (loops > 0.5), 25.0 + 8.0 * texture)
    p.paint(low & (lumps > 1.25) & (p.y > 20.0), -850.0)

    shift = p.rng.normal(0.0, 4.0, 3)
    liver = p.ellipsoid((78 + shift[0], 8, 166), (88, 82, 76), 2.3) + 0.06 * lumps < 1.0
    liver |= p.ellipsoid((8, 42, 172 + shift[2]), (75, 38, 34)) + 0.06 * lumps < 1.0
    p.paint(liver & room, p.vary(58, 5) + 48 * gain + 5 * texture, "liver")
    branches = np.abs(lumps + 0.6 * texture) < 0.09
    p.paint(liver & room & branches, 45.0 + 125.0 * gain)
    stomach = p.ellipsoid((-58, 40 + shift[1], 160), (46, 34, 48)) + 0.05 * lumps
    p.paint((stomach < 1.0) & room, 48.0 + 25 * gain, "stomach")
    p.paint((stomach < 0.78) & room, 18.0 + 9 * texture, "stomach")
    p.paint((stomach < 0.78) & room & (p.y > 52 + 2 * shift[0]), -930.0, "stomach")
    spleen = p.ellipsoid((-103, -26, 168 + shift[2]), (30, 46, 44)) + 0.05 * lumps < 1.0
    p.paint(spleen & room, p.vary(50, 4) + 68 * gain + 4 * texture, "spleen")
    pancreas = p.ellipsoid((-8, 2, 118 + shift[1]), (62, 13, 15), 2.2) + 0.15 * lumps < 1.0
    p.paint(pancreas & room, 42 + 48 * gain + 8 * texture, "pancreas")
    p.paint((p.ellipsoid((62, 52, 118), (17, 17, 27)) < 1.0) & room, 8.0 + 3 * texture, "gallbladder")
    for side, name in ((1.0, "right_kidney"), (-1.0, "left_kidney")):
        drop = 96.0 + (6.0 if side < 0 else 0.0) + shift[1]
        lean = 0.14 * (p.z - drop) * side
        kidney = ((p.x - side * 68 - -lean) / 27) ** 2 + ((p.y + 42) / 27) ** 2 + ((p.z - drop) / 52) ** 2
        p.paint((kidney < 1.0) & room, 34 + 165 * gain + 5 * texture, name)
        p.paint((kidney < 0.52) & room, 28 + 95 * gain + 5 * texture, name)
        p.paint((kidney + 0.5 * (side * p.x - 68) / 27 < 0.0) & (kidney < 0.5) & room, -70.0)


def _chest(p: _Patient, texture: NumpyArray, lumps: NumpyArray, room: NumpyArray) -> None:
    """Mediastinum, lungs with their vessels and airways, heart."""
    gain = p.contrast
    p.paint(room, 35.0 + 8 * texture)
    p.paint(room & (p.column((0, 10), (34, 70)) < 1.0), -70.0 + 20 * texture)
    density = p.vary(-845.0, 20.0)
    for side in (-1.0, 1.0):
        lung = p.ellipsoid((side * 76, -8, 215), (62, 88, 128), 2.6) < 1.0
        lung &= room & (np.abs(p.x) > 17.0 + 10.0 * np.exp(-(((p.y - 5.0) / 30.0) ** 2)))
        p.paint(lung, density + 0.28 * (-p.y) + 22 * texture, "lung")
        hilum = np.sqrt((p.x - side * 34) ** 2 + (p.y + 5) ** 2 + (p.z - 245) ** 2)
        width = np.clip(0.32 - 0.0016 * hilum, 0.07, 0.3)
        p.paint(lung & (np.abs(lumps + 0.9 * texture) < width), 20.0 + 140 * gain)
    heart = p.ellipsoid((-22, 28, 218), (58, 46, 48), 2.2) + 0.04 * lumps
    above = p.z > 178.0
    p.paint((heart < 1.25) & above & room, -85.0)
    p.paint((heart < 1.0) & above & room, 48.0 + 55 * gain + 4 * texture, "heart")
    for center, radii, bright in (((-46, 20, 214), (25, 21, 30), 230), ((4, 38, 216), (26, 19, 30), 190)):
        p.paint((p.ellipsoid(center, radii) < 1.0) & above & room, 42.0 + bright * gain, "heart")
    p.paint((p.column((3, -14), (9, 9)) < 1.0) & (p.z > 262), -980.0)
    for side in (-1.0, 1.0):
        bronchus = (p.x - side * (262 - p.z) * 0.8) ** 2 + (p.y + 14) ** 2
        p.paint((bronchus < 45) & (p.z > 228) & (p.z <= 262), -960.0)


def _vessels(p: _Patient) -> None:
    """Aorta with its arch, vena cava and the iliac arteries; calcified now and then."""
    aorta, vein = 42.0 + 270.0 * p.contrast, 40.0 + 120.0 * p.contrast
    p.paint((p.column((24, -28), (12, 10)) < 1.0) & (p.z < 205) & (p.z > 40), vein, "vena_cava")
    p.paint((p.column((20, 14), (10, 10)) < 1.0) & (p.z > 255), vein + 60 * p.contrast, "vena_cava")
    down = p.column((-18, -34), (12, 12))
    p.paint((down < 1.0) & (p.z < 285) & (p.z > 48), aorta, "aorta")
    ring = np.sqrt((p.y + 4) ** 2 + (p.z - 283) ** 2) - 30.0
    arch = (ring / 12) ** 2 + ((p.x + 6 + 0.35 * p.y) / 13) ** 2
    p.paint((arch < 1.0) & (p.z >= 283), aorta, "aorta")
    p.paint((p.column((-2, 26), (14, 14)) < 1.0) & (p.z > 250) & (p.z < 284), aorta, "aorta")
    for side in (-1.0, 1.0):
        across = p.x + 16 - side * (48 - p.z) * 0.9
        p.paint((across**2 + (p.y + 26 - 0.1 * (48 - p.z)) ** 2 < 64) & (p.z <= 48), aorta, "aorta")
        renal = ((p.z - 100) ** 2 + (p.y + 36) ** 2 < 22) & (side * p.x > 8) & (side * p.x < 52)
        p.paint(renal, aorta * 0.9)
    if p.rng.random() < 0.5:
        patches = np.sin(p.z / 7.0) * np.sin(3.0 * np.arctan2(p.y + 34, p.x + 18)) > 0.6
        p.paint((down > 0.75) & (down < 1.1) & patches & (p.z < 200) & (p.z > 48), 600.0)


def _bones(p: _Patient, texture: NumpyArray) -> None:
    """Vertebrae with discs and processes, ribs, breastbone, hip bones: hard shells around spongy marrow."""
    hard = p.vary(620.0, 60.0)
    marrow = p.vary(190.0, 30.0) + 45 * texture
    phase = np.mod(p.z, 33.0)
    disc = phase < 7.0
    body = p.column((0, -62), (23, 18), 2.3)
    p.paint((body < 1.0) & disc, 95.0 + 8 * texture)
    p.paint((body < 1.0) & ~disc, marrow, "bone")
    p.paint((body < 1.0) & ~disc & ((body > 0.78) | (np.abs(phase - 20.0) > 11.5)), hard, "bone")
    arch = p.column((0, -90), (17, 15))
    p.paint((arch < 1.0) & (phase > 9) & (phase < 29), 0.8 * hard, "bone")
    spine = (np.abs(p.x) < 4.0) & (p.y < -98) & (p.y > -122) & (phase > 10) & (phase < 25)
    across = (np.abs(p.y + 86) < 5.5) & (np.abs(p.x) < 42) & (np.abs(phase - 20) < 6)
    p.paint(spine | across, 0.75 * hard, "bone")
    p.paint(p.column((0, -88), (9, 8.5)) < 1.0, 28.0)
    p.label[np.broadcast_to(p.column((0, -88), (9, 8.5)) < 1.0, p.label.shape)] = 0

    narrow = 1.0 - 0.3 * np.clip((p.z - 240.0) / 90.0, 0.0, 1.0) ** 1.5
    wall = np.sqrt(np.abs(p.x / (126.0 * narrow)) ** 2.4 + np.abs((p.y + 2) / (88.0 * narrow)) ** 2.4)
    slope = np.mod(p.z + 0.42 * p.y + 0.1 * np.abs(p.x), 27.0) - 13.5
    cage = (p.z > 150.0 + 0.35 * (p.y + 90)) & (np.abs(p.x) > 14) & (p.y < 84 * narrow)
    across_rib = ((wall - 1.0) * 95.0 / 5.5) ** 2 + (slope / 6.5) ** 2
    p.paint(cage & (across_rib < 1.0), hard, "bone")
    p.paint(cage & (across_rib < 0.3), 220.0 + 40 * texture, "bone")
    front = 87.0 * narrow
    breast = (np.abs(p.x / 17) ** 4 + np.abs((p.y - front) / 6.5) ** 4 < 1.0) & (p.z > 205) & (p.z < 325)
    p.paint(breast, 330.0 + 40 * texture, "bone")
    for side in (-1.0, 1.0):
        hip = p.ellipsoid((side * 62, 12, 8), (60, 92, 66), 2.0)
        plate = (hip > 0.86) & (hip < 1.07) & (p.z < 66) & (side * p.x > 62 - 0.2 * (p.y + 60)) & (p.y < 48)
        p.paint(plate & (side * p.x > 40), hard, "bone")
        p.paint(plate & (side * p.x > 40) & (hip > 0.92) & (hip < 1.01), 260.0 + 40 * texture, "bone")


def _couch(p: _Patient) -> None:
    """The table under the patient, in some scans."""
    if p.rng.random() < 0.6:
        height = -127.0 + 0.0009 * p.x**2
        shell = (np.abs(p.y - height) < 2.2) & (np.abs(p.x) < 165) & (p.hu < -900)
        p.paint(shell, 20.0)
        p.paint((p.y < height - 2.2) & (p.hu < -900) & (np.abs(p.x) < 160), -950.0)
