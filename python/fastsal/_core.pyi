"""Types of the compiled core; held to the module by stubtest."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ROWS_PER_STEP",
    "LargeRowError",
    "NanScoreError",
    "NonFiniteRowError",
    "accumulate",
    "blocks",
    "build_info",
    "compensate",
    "count_keys",
    "diagonal",
    "dual_inverse_diagonal",
    "eliminate",
    "group_costs",
    "instruction_sets",
    "inverse",
    "inverse_diagonal",
    "kth_smallest",
    "largest",
    "mask_below",
    "n_of_m",
    "n_of_m_joint",
    "num_threads",
    "packed_len",
    "prune_smallest",
    "score_of_key",
    "set_num_threads",
]

# Rows that `accumulate` sums before it adds them to the statistics.
ROWS_PER_STEP: int

_Floats = NDArray[np.float32] | NDArray[np.float64]
# packed sums, number of weights, samples, kept weights or None for all
_Parameter = tuple[_Floats, int, float, NDArray[np.bool_] | None]
# values, failed blocks, sensitivity of each block
_Inverse = tuple[NDArray[np.float64], list[int], NDArray[np.float64]]

class LargeRowError(ArithmeticError): ...
class NonFiniteRowError(ArithmeticError): ...
class NanScoreError(ArithmeticError): ...

def build_info() -> tuple[str, str, bool]: ...
def instruction_sets() -> list[str]: ...
def num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def packed_len(d: int, block_size: int) -> int: ...
def accumulate(
    rows: NDArray[np.generic],
    dtype: str,
    block_size: int,
    packed: _Floats,
    sums: _Floats,
    fresh: bool = False,
) -> None: ...
def largest(rows: NDArray[np.generic], dtype: str) -> float: ...
def blocks(parameter: _Parameter, block_size: int) -> NDArray[np.float64]: ...
def diagonal(parameter: _Parameter, block_size: int) -> NDArray[np.float64]: ...
def inverse(
    parameters: Sequence[_Parameter], block_size: int, damping: float
) -> list[_Inverse]: ...
def inverse_diagonal(
    parameters: Sequence[_Parameter], block_size: int, damping: float
) -> list[_Inverse]: ...
def dual_inverse_diagonal(
    gradients: _Floats,
    dtype: str,
    block_size: int,
    samples: float,
    kept: NDArray[np.bool_] | None,
    damping: float,
) -> _Inverse: ...
def eliminate(
    parameters: Sequence[_Parameter],
    weights: Sequence[NDArray[np.float32]],
    block_size: int,
    damping: float,
) -> list[tuple[NDArray[np.float32], NDArray[np.uint32], list[int], NDArray[np.float64]]]: ...
def n_of_m_joint(
    parameters: Sequence[_Parameter],
    weights: Sequence[NDArray[np.float32]],
    shapes: Sequence[tuple[int, int, int]],
    block_size: int,
    n: int,
    m: int,
    damping: float,
) -> list[tuple[NDArray[np.bool_], list[int]]]: ...
def group_costs(
    parameters: Sequence[_Parameter],
    weights: Sequence[NDArray[np.float32]],
    shapes: Sequence[tuple[int, int, int]],
    block_size: int,
    m: int,
    damping: float,
) -> list[tuple[NDArray[np.float32], list[int]]]: ...
def compensate(
    parameters: Sequence[_Parameter],
    weights: Sequence[NDArray[np.float32]],
    masks: Sequence[NDArray[np.bool_]],
    block_size: int,
    damping: float,
) -> list[tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64], list[int]]]: ...
def prune_smallest(
    scores: Sequence[NDArray[np.float32]], k: int, floors: Sequence[int]
) -> tuple[list[NDArray[np.bool_]], float | None]: ...
def kth_smallest(scores: Sequence[NDArray[np.float32]], k: int) -> float | None: ...
def n_of_m(
    scores: NDArray[np.float32], shape: tuple[int, int, int], n: int, m: int
) -> NDArray[np.bool_]: ...
def count_keys(
    scores: NDArray[np.float32], upper: int | None = None, below: int = ...
) -> NDArray[np.uint64]: ...
def mask_below(scores: NDArray[np.float32], key: int, ties: int) -> NDArray[np.bool_]: ...
def score_of_key(key: int) -> float: ...
