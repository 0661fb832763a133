"""The distortions of the MNIST example against SciPy, and what they keep."""

import jax
import numpy as np
from scipy import ndimage

from mnist import augment


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28, 1), np.uint8)


def grid(count: int) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.mgrid[:28, :28].astype(np.float32)
    return np.tile(rows, (count, 1, 1)), np.tile(columns, (count, 1, 1))


def test_undistorted_images_are_exact():
    inputs = images(5)
    assert np.array_equal(augment.sample(inputs, *grid(5)), inputs)
    assert np.array_equal(augment.augmented(jax.random.key(0), inputs, 0.0), inputs)


def test_sampling_equals_scipys_map_coordinates():
    inputs = images(6)
    rows, columns = np.random.default_rng(1).uniform(-5, 33, (2, 6, 28, 28)).astype(np.float32)
    got = augment.sample(inputs, rows, columns)[..., 0]
    for image, row, column, result in zip(inputs[..., 0], rows, columns, got, strict=True):
        wanted = ndimage.map_coordinates(image.astype(float), [row, column], order=1, mode="grid-constant")
        np.testing.assert_allclose(result, wanted, atol=2e-3)  # positions near 32 are rounded to 2e-6 pixels


def test_affine_maps_equal_scipys_affine_transform(monkeypatch):
    """The matrix of each image is read off three of its positions; SciPy then does the resampling."""
    monkeypatch.setattr(augment, "WARP", 0.0)
    inputs, key = images(8), jax.random.key(3)
    affine_key, _ = jax.random.split(key)
    rows, columns = augment.affine_positions(affine_key, 8, 28, 28)
    positions = np.stack([rows, columns], 1).astype(float)
    for image, position, result in zip(
        inputs[..., 0], positions, augment.augmented(key, inputs)[..., 0], strict=True
    ):
        offset = position[:, 0, 0]
        matrix = np.stack([position[:, 27, 0] - offset, position[:, 0, 27] - offset], 1) / 27
        angle = np.arctan2(matrix[1, 0], matrix[0, 0])
        assert abs(angle) < 0.5
        wanted = ndimage.affine_transform(image.astype(float), matrix, offset, order=1, mode="grid-constant")
        np.testing.assert_allclose(result, wanted, atol=0.02)


def test_affine_maps_stay_within_their_bounds():
    rows, columns = augment.affine_positions(jax.random.key(0), 4000, 29, 29)  # an odd size has a centre
    centre = np.stack([rows[:, 14, 14], columns[:, 14, 14]], 1) - 14
    assert np.abs(centre).max() <= augment.SHIFT
    assert (np.abs(centre).max(0) > 0.98 * augment.SHIFT).all()
    right = np.stack([rows[:, 14, 15] - rows[:, 14, 14], columns[:, 14, 15] - columns[:, 14, 14]], 1)
    down = np.stack([rows[:, 15, 14] - rows[:, 14, 14], columns[:, 15, 14] - columns[:, 14, 14]], 1)
    angle = -np.arctan2(right[:, 0], right[:, 1])
    assert 0.98 * augment.ROTATION < np.abs(angle).max() <= augment.ROTATION + 1e-4
    area = np.abs(down[:, 0] * right[:, 1] - down[:, 1] * right[:, 0])
    assert np.abs(np.log(area)).max() <= 2 * augment.SCALE + 1e-4


def test_warps_are_smooth_and_as_large_as_said():
    warps = np.asarray(augment.warps(jax.random.key(0), 2000, 28, 28))
    assert abs(warps.mean()) < 0.01
    assert 0.4 * augment.WARP < warps.std() < augment.WARP
    assert max(np.abs(np.diff(warps, axis=axis)).std() for axis in (2, 3)) < 0.25 * augment.WARP


def test_every_image_has_its_own_distortion_and_stays_within_a_byte():
    results = np.asarray(jax.jit(augment.augmented)(jax.random.key(1), np.repeat(images(1), 8, 0)))
    assert (results.dtype, results.shape) == (np.float32, (8, 28, 28, 1))
    assert (results.min() >= 0) & (results.max() <= 255)
    assert len({result.tobytes() for result in results}) == 8
