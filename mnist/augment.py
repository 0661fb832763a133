"""Random distortions of the training images, inside jit: each is seen through its own smooth map of the plane."""

import jax
import jax.numpy as jnp
import numpy as np

ROTATION = 0.2  # radians, at most, in either direction
SCALE = 0.1  # the logarithm of the factors by which height and width change, at most
SHEAR = 0.15  # columns that a row moves by for each row away from the centre, at most
SHIFT = 2.0  # pixels along each axis, at most
WARP = 1.0  # pixels, the standard deviation of the moves of a coarse grid of points, the rest in between
WARP_POINTS = 7  # of that grid, along each axis


def augmented(key: jax.Array, images: jax.Array, strength: jax.typing.ArrayLike = 1.0) -> jax.Array:
    """Return images (N, H, W, 1) of bytes as distorted ones, float32 of the same shape, 0 to 255; 0: as they are."""
    affine_key, warp_key = jax.random.split(key)
    rows, columns = affine_positions(affine_key, *images.shape[:3])
    warp = warps(warp_key, *images.shape[:3])
    row, column = jnp.arange(images.shape[1])[:, None], jnp.arange(images.shape[2])[None, :]
    down, right = rows + warp[:, 0] - row, columns + warp[:, 1] - column
    return sample(images, row + strength * down, column + strength * right)


def affine_positions(key: jax.Array, count: int, height: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Return the row and the column that each pixel is taken from, (N, H, W) each, under random affine maps."""
    uniform = jax.random.uniform(key, (6, count, 1, 1), minval=-1)
    angle, shear, *logarithms, down, right = (
        uniform * jnp.array([ROTATION, SHEAR, SCALE, SCALE, SHIFT, SHIFT])[:, None, None, None]
    )
    tall, wide = map(jnp.exp, logarithms)
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    row = (jnp.arange(height) - (height - 1) / 2)[:, None] * tall
    column = (jnp.arange(width) - (width - 1) / 2)[None, :] * wide + shear * row
    rows = cosine * row - sine * column + (height - 1) / 2 + down
    return rows, sine * row + cosine * column + (width - 1) / 2 + right


def warps(key: jax.Array, count: int, height: int, width: int) -> jax.Array:
    """Return moves (N, 2, H, W) that vary smoothly: normal on a coarse grid, blended by a Gaussian in between."""
    moves = WARP * jax.random.normal(key, (count, 2, WARP_POINTS, WARP_POINTS))
    return jnp.einsum("yi,nkij,xj->nkyx", blend(height), moves, blend(width))


def blend(size: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Return the weights (size, WARP_POINTS) with which the coarse points count at every pixel."""
    distance = np.linspace(0, WARP_POINTS - 1, size)[:, None] - np.arange(WARP_POINTS)
    weights = np.exp(-(distance**2))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def sample(images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Return images (N, H, W, 1) of bytes at fractional positions (N, H, W): bilinear, and 0 outside.

    The four neighbours lie in one integer, so that one gather fetches them; it is what takes the time on a CPU.
    """
    count, height, width, _ = images.shape
    padded = jnp.pad(images[..., 0], ((0, 0), (1, 2), (1, 2))).astype(jnp.uint32)
    left, right = padded[:, :, :-1], padded[:, :, 1:] << 8
    pairs = left | right
    packed = (pairs[:, :-1] | pairs[:, 1:] << 16).reshape(count, -1)
    rows, columns = jnp.clip(rows, -1, height) + 1, jnp.clip(columns, -1, width) + 1
    top, left = jnp.floor(rows), jnp.floor(columns)
    index = (top * (width + 2) + left).astype(jnp.int32).reshape(count, -1)
    found = jnp.take_along_axis(packed, index, axis=1, mode="promise_in_bounds").reshape(rows.shape)
    upper_left, upper_right, lower_left, lower_right = (
        (found >> shift & 255).astype(jnp.float32) for shift in (0, 8, 16, 24)
    )
    below, beside = rows - top, columns - left
    upper = upper_left + beside * (upper_right - upper_left)
    lower = lower_left + beside * (lower_right - lower_left)
    return (upper + below * (lower - upper))[..., None]
