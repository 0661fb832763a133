"""What is predicted, against the same network applied image by image."""

import numpy as np
import pytest
import scipy.ndimage
import scipy.special

pytest.importorskip("flax")
pytest.importorskip("tensorflow_datasets")

from flax import nnx

from mnist import data
from mnist.config import Config
from mnist.evaluation import probabilities
from mnist.model import Committee


def test_probabilities_are_the_mean_over_nine_views():
    images = data.load(data.SAMPLE)["test"].images[:7]
    network = Committee(nnx.Rngs(2))
    _, params = nnx.split(network)
    moved = [(0, i, j, 0) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    views = [scipy.ndimage.shift(images, shift, order=0, mode="constant") for shift in moved]
    expected = np.mean([scipy.special.softmax(network(view), axis=-1) for view in views], axis=0)
    got = probabilities(Config(), params, images)
    assert got.shape == (7, 10)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)
    assert np.abs(got - scipy.special.softmax(network(images), axis=-1)).max() > 0.01  # one view says something else
