"""What a network says of images, in blocks that the devices share."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from numpy.typing import NDArray

import jaxent
from mnist.config import Config
from mnist.devices import divided, make_mesh, whole
from mnist.model import Committee, make_network

AT_ONCE = 100  # images on each device: few enough for a CPU's caches
VIEWS = [(down, right) for down in (1, 0, 2) for right in (1, 0, 2)]  # of an image with a margin of 1: itself first


def in_blocks(images: NDArray[np.uint8], mesh: Mesh) -> jax.Array:
    """Return the images, and some empty ones, as blocks to evaluate at once: (blocks, size, 28, 28, 1)."""
    size = mesh.size * min(AT_ONCE, -(-len(images) // mesh.size))
    blocks = -(-len(images) // size)
    padded = np.zeros((blocks * size, *images.shape[1:]), np.uint8)
    padded[: len(images)] = images
    return jax.device_put(padded.reshape(blocks, size, *images.shape[1:]), divided(mesh, 1))


@partial(jax.jit, static_argnums=(0, 1))
def logits_of(model: nnx.GraphDef[Committee], mesh: Mesh, params: Any, blocks: jax.Array) -> jax.Array:
    """Return the logits (N, 10) of all images, on every device."""
    logits = jax.lax.map(nnx.merge(model, params), blocks)
    return jax.lax.with_sharding_constraint(logits.reshape(-1, logits.shape[-1]).astype(jnp.float32), whole(mesh))


def scores(logits: jax.Array, labels: NDArray[np.uint8]) -> tuple[float, float]:
    """Return the mean loss, and the share of images that are labelled rightly."""
    logits = logits[: len(labels)]
    return float(jaxent.cross_entropy(logits, labels)), int((logits.argmax(-1) == labels).sum()) / len(labels)


def probabilities(config: Config, params: Any, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the probabilities (N, 10) of images (N, 28, 28, 1).

    They are the mean over nine views of each image, itself and moved by one pixel in every direction: where the
    digit lies says nothing of what it is, and what the network makes of it nevertheless averages out.
    """
    mesh = make_mesh()
    model, _ = nnx.split(make_network(config))
    params = jax.device_put(params, whole(mesh))
    height, width = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    views = [padded[:, down : down + height, right : right + width] for down, right in VIEWS]
    p = [jaxent.softmax(logits_of(model, mesh, params, in_blocks(view, mesh))) for view in views]
    return np.asarray(jnp.mean(jnp.stack(p), axis=0))[: len(images)]
