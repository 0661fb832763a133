"""PyTorch's softmax, log_softmax, nll, cross_entropy and linear_cross_entropy for JAX."""

from ._cross_entropy import LossStats as LossStats
from ._cross_entropy import cross_entropy as cross_entropy
from ._distillation import distillation_loss as distillation_loss
from ._entropy import entropy as entropy
from ._linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from ._linear_distillation_loss import linear_distillation_loss as linear_distillation_loss
from ._linear_log_probs import linear_log_probs as linear_log_probs
from ._nll import nll as nll
from ._nll import nll as nll_loss
from ._softmax import log_softmax as log_softmax
from ._softmax import softmax as softmax

__all__ = [
    "LossStats",
    "cross_entropy",
    "distillation_loss",
    "entropy",
    "linear_cross_entropy",
    "linear_distillation_loss",
    "linear_log_probs",
    "log_softmax",
    "nll",
    "nll_loss",
    "softmax",
]
__version__ = "0.1.0"
