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
from mnist.devices import divided, whole
from mnist.model import Cnn

AT_ONCE = 500  # images


def in_blocks(images: NDArray[np.uint8], mesh: Mesh) -> jax.Array:
    """Return the images, and some empty ones, as blocks to evaluate at once: (blocks, size, 28, 28, 1)."""
    size = mesh.size * -(-min(len(images), AT_ONCE) // mesh.size)
    blocks = -(-len(images) // size)
    padded = np.zeros((blocks * size, *images.shape[1:]), np.uint8)
    padded[: len(images)] = images
    return jax.device_put(padded.reshape(blocks, size, *images.shape[1:]), divided(mesh, 1))


@partial(jax.jit, static_argnums=(0, 1))
def logits_of(model: nnx.GraphDef[Cnn], mesh: Mesh, params: Any, blocks: jax.Array) -> jax.Array:
    """Return the logits (N, 10) of all images, on every device."""
    logits = jax.lax.map(nnx.merge(model, params), blocks)
    return jax.lax.with_sharding_constraint(logits.reshape(-1, logits.shape[-1]).astype(jnp.float32), whole(mesh))


def scores(logits: jax.Array, labels: NDArray[np.uint8]) -> tuple[float, float]:
    """Return the mean loss, and the share of images that are labelled rightly."""
    logits = logits[: len(labels)]
    return float(jaxent.cross_entropy(logits, labels)), int((logits.argmax(-1) == labels).sum()) / len(labels)
