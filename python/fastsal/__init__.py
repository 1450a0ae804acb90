"""fastsal: second-order saliency and pruning of pre-trained vision models.

Names are loaded when they are first used, so that `import fastsal` and the command line start
without waiting for PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastsal.utils.lazy import lazy_names

if TYPE_CHECKING:
    from fastsal.data.corruptions import corrupt
    from fastsal.data.folders import load_images
    from fastsal.data.image_set import ImageSet
    from fastsal.data.imbalance import imbalanced
    from fastsal.data.opening import open_images
    from fastsal.deploy.export import ExportResult, export
    from fastsal.deploy.meter import Measurement, measure_against
    from fastsal.deploy.runs import load_run, save_run
    from fastsal.errors import (
        DataError,
        FactorizationError,
        FastsalError,
        FileFormatError,
        GradientOverflow,
        InvalidArgument,
        MaskError,
        NonFiniteGradient,
        NonFiniteLoss,
        PrecisionWarning,
        UnknownParameter,
        UnsupportedLayer,
    )
    from fastsal.finetuning.finetune import FinetuneResult, finetune
    from fastsal.fisher.block_fisher import BlockFisher
    from fastsal.fisher.collection.collect import collect
    from fastsal.fisher.memory_plan import MemoryPlan
    from fastsal.fisher.merging import merge_files
    from fastsal.gradients import per_sample_gradients, select_parameters
    from fastsal.gradients.weight_macs import weight_macs
    from fastsal.models.inputs import input_spec
    from fastsal.models.loading import load_model
    from fastsal.pruning.compensation import CompensationReport, compensate
    from fastsal.pruning.criteria import CRITERIA, score
    from fastsal.pruning.forecast import plan_memory
    from fastsal.pruning.limits.limit import SafetyReport
    from fastsal.pruning.masks.joint import rank_pattern
    from fastsal.pruning.masks.masks import Masks
    from fastsal.pruning.masks.ranking import rank
    from fastsal.pruning.prune import prune
    from fastsal.pruning.prune_result import PruneResult
    from fastsal.pruning.reconstruction.reconstruct import reconstruct
    from fastsal.pruning.reconstruction_result import Reconstruction
    from fastsal.pruning.refit.refit import refit
    from fastsal.pruning.refit.settings import Refit
    from fastsal.pruning.refit_result import RefitResult
    from fastsal.pruning.structured.prune_structure import prune_structure
    from fastsal.pruning.structured.result import StructureResult
    from fastsal.study import Study, load_study, run_study
    from fastsal.transfer import Task, evaluate, fit_heads
    from fastsal.transfer.fisher_overlap import fisher_overlap
    from fastsal.transfer.splits import Shares
    from fastsal.utils.threads import get_num_threads, set_num_threads

_HOME = {
    "input_spec": "models.inputs",
    "load_model": "models.loading",
    "load_images": "data.folders",
    "Study": "study",
    "run_study": "study",
    "load_study": "study",
    "open_images": "data.opening",
    "Shares": "transfer.splits",
    "ImageSet": "data.image_set",
    "collect": "fisher.collection.collect",
    "CompensationReport": "pruning.compensation",
    "compensate": "pruning.compensation",
    "corrupt": "data.corruptions",
    "CRITERIA": "pruning.criteria",
    "score": "pruning.criteria",
    "DataError": "errors",
    "FactorizationError": "errors",
    "FastsalError": "errors",
    "FileFormatError": "errors",
    "GradientOverflow": "errors",
    "InvalidArgument": "errors",
    "MaskError": "errors",
    "NonFiniteGradient": "errors",
    "NonFiniteLoss": "errors",
    "PrecisionWarning": "errors",
    "UnknownParameter": "errors",
    "UnsupportedLayer": "errors",
    "FinetuneResult": "finetuning.finetune",
    "finetune": "finetuning.finetune",
    "BlockFisher": "fisher.block_fisher",
    "per_sample_gradients": "gradients",
    "select_parameters": "gradients",
    "weight_macs": "gradients.weight_macs",
    "imbalanced": "data.imbalance",
    "Masks": "pruning.masks.masks",
    "MemoryPlan": "fisher.memory_plan",
    "merge_files": "fisher.merging",
    "plan_memory": "pruning.forecast",
    "PruneResult": "pruning.prune_result",
    "rank_pattern": "pruning.masks.joint",
    "SafetyReport": "pruning.limits.limit",
    "prune": "pruning.prune",
    "StructureResult": "pruning.structured.result",
    "prune_structure": "pruning.structured.prune_structure",
    "ExportResult": "deploy.export",
    "export": "deploy.export",
    "Measurement": "deploy.meter",
    "measure_against": "deploy.meter",
    "load_run": "deploy.runs",
    "save_run": "deploy.runs",
    "Reconstruction": "pruning.reconstruction_result",
    "reconstruct": "pruning.reconstruction.reconstruct",
    "Refit": "pruning.refit.settings",
    "RefitResult": "pruning.refit_result",
    "refit": "pruning.refit.refit",
    "rank": "pruning.masks.ranking",
    "get_num_threads": "utils.threads",
    "set_num_threads": "utils.threads",
    "Task": "transfer",
    "evaluate": "transfer",
    "fit_heads": "transfer",
    "fisher_overlap": "transfer.fisher_overlap",
}

# Packages that `fastsal.NAME` imports on first use, so that `import fastsal` is enough for them.
_ROOMS = (
    "data", "deploy", "distributed", "finetuning", "fisher", "gradients",
    "models", "pruning", "study", "transfer",
)  # fmt: skip

__all__ = [
    "CRITERIA",
    "BlockFisher",
    "CompensationReport",
    "DataError",
    "ExportResult",
    "FactorizationError",
    "FastsalError",
    "FileFormatError",
    "FinetuneResult",
    "GradientOverflow",
    "ImageSet",
    "InvalidArgument",
    "MaskError",
    "Masks",
    "Measurement",
    "MemoryPlan",
    "NonFiniteGradient",
    "NonFiniteLoss",
    "PrecisionWarning",
    "PruneResult",
    "Reconstruction",
    "Refit",
    "RefitResult",
    "SafetyReport",
    "Shares",
    "StructureResult",
    "Study",
    "Task",
    "UnknownParameter",
    "UnsupportedLayer",
    "__version__",
    "collect",
    "compensate",
    "corrupt",
    "evaluate",
    "export",
    "finetune",
    "fisher_overlap",
    "fit_heads",
    "get_num_threads",
    "imbalanced",
    "input_spec",
    "load_images",
    "load_model",
    "load_run",
    "load_study",
    "measure_against",
    "merge_files",
    "open_images",
    "per_sample_gradients",
    "plan_memory",
    "prune",
    "prune_structure",
    "rank",
    "rank_pattern",
    "reconstruct",
    "refit",
    "run_study",
    "save_run",
    "score",
    "select_parameters",
    "set_num_threads",
    "weight_macs",
]


_find = lazy_names(__name__, _HOME)


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"fastsal.{name}")
    if name == "__version__":
        import fastsal._core as _core

        globals()[name] = _core.build_info()[0]
        return globals()[name]
    return _find(name)


def __dir__() -> list[str]:
    return sorted(__all__)
