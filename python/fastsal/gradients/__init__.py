"""Per-sample gradients of the weights of a model, computed during one ordinary backward pass.

Every call of `F.linear`, `F.convNd` and `F.embedding` on a tracked weight is intercepted, so that
layers that override `forward`, shared weights and layers called twice are supported. Other uses of
a weight are differentiated by `torch.func`. An unsupported use raises; it is never skipped.

Axes: n samples, L positions, O output and C input features or channels, G groups, k kernel,
P output positions of a convolution, V rows and D columns of an embedding.
"""

from fastsal.gradients.engine import GradientEngine
from fastsal.gradients.micro_batch import choose_micro_batch
from fastsal.gradients.per_sample import per_sample_gradients
from fastsal.gradients.rules import conv as _conv
from fastsal.gradients.rules import embedding as _embedding
from fastsal.gradients.rules import linear as _linear
from fastsal.models.selection import select_parameters

del _conv, _embedding, _linear

__all__ = [
    "GradientEngine",
    "choose_micro_batch",
    "per_sample_gradients",
    "select_parameters",
]
