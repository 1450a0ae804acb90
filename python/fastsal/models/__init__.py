"""Models: construction, weights, inputs, features, and selection of parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastsal.utils.lazy import lazy_names

if TYPE_CHECKING:
    from fastsal.models.inputs import InputSpec, input_spec
    from fastsal.models.loading import load_model
    from fastsal.models.weights import load_weights, read_weights, save_weights

__all__ = ["InputSpec", "input_spec", "load_model", "load_weights", "read_weights", "save_weights"]

__getattr__ = lazy_names(
    __name__,
    {
        "InputSpec": "inputs",
        "input_spec": "inputs",
        "load_model": "loading",
        "load_weights": "weights",
        "read_weights": "weights",
        "save_weights": "weights",
    },
)
