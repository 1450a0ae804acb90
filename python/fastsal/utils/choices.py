"""Valid values of arguments, defined once for functions and for the command line."""

from __future__ import annotations

from typing import Literal, get_args

# Saliency criteria, see `fastsal.pruning.criteria`.
CriterionName = Literal[
    "magnitude", "random", "taylor", "diag-fisher", "block-fisher", "obs-greedy"
]  # fmt: skip
CRITERION_NAMES: tuple[CriterionName, ...] = get_args(CriterionName)

# How a sparsity is allocated to parameters, see `fastsal.rank`.
Scope = Literal["global", "layer", "erk"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

# Learning-rate schedules of `fastsal.finetune`.
Schedule = Literal["cosine", "linear", "constant"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)

# Outputs that `fastsal.refit` matches besides the features: those of all blocks, or none.
RefitWindows = Literal["blocks", "whole"]
REFIT_WINDOWS: tuple[RefitWindows, ...] = get_args(RefitWindows)

# Units that `fastsal.prune_structure` removes: hidden units of MLPs, attention heads, channels.
Structure = Literal["mlp", "heads", "channels"]
STRUCTURES: tuple[Structure, ...] = get_args(Structure)
# What is to be removed a fraction of: units, parameters, multiply-accumulates, measured latency.
Budget = Literal["units", "parameters", "macs", "latency"]
BUDGETS: tuple[Budget, ...] = get_args(Budget)
# What a sparsity of single weights is a fraction of: their number, or multiply-accumulates.
WeightBudget = Literal["weights", "macs"]
WEIGHT_BUDGETS: tuple[WeightBudget, ...] = get_args(WeightBudget)
# Units of all layers compete, each layer loses the same fraction, or what is best of several.
StructureScope = Literal["auto", "global", "layer"]
STRUCTURE_SCOPES: tuple[StructureScope, ...] = get_args(StructureScope)
StructureCriterion = Literal["joint", "magnitude", "variance", "random"]
STRUCTURE_CRITERIA: tuple[StructureCriterion, ...] = get_args(StructureCriterion)
# How errors of different layers are compared.
Weighting = Literal["features", "relative"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)

# Floating-point types in which statistics are accumulated.
Precision = Literal["float32", "float64"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

# Data that processes of a distributed job send each other: gradients of single samples, partial
# sums, or whichever is fewer bytes.
Exchange = Literal["rows", "sums", "auto"]
EXCHANGES: tuple[Exchange, ...] = get_args(Exchange)

# Types of mixed-precision passes.
Autocast = Literal["bfloat16", "float16"]
AUTOCAST_TYPES: tuple[Autocast, ...] = get_args(Autocast)

# Loss whose per-sample gradients define the statistics: at the given label (empirical Fisher), at a
# label drawn from the model (true Fisher), or of matching noisy features.
Curvature = Literal["empirical", "sampled", "features"]
CURVATURES: tuple[Curvature, ...] = get_args(Curvature)

# The classifier that a task is measured through: ridge regression, k-nearest neighbors, logistic
# regression (a linear probe), or the model's own.
HeadKind = Literal["ridge", "knn", "probe", "own"]
HEAD_KINDS: tuple[HeadKind, ...] = get_args(HeadKind)

# Image corruptions, see `fastsal.data.corruptions`.
CorruptionKind = Literal["gaussian-noise", "blur", "jpeg", "brightness", "contrast"]
CORRUPTION_KINDS: tuple[CorruptionKind, ...] = get_args(CorruptionKind)

# What a study saves for each cell beside its numbers.
Saved = Literal["none", "masks", "models"]
SAVED: tuple[Saved, ...] = get_args(Saved)

# How images are resized and cropped for a model, as timm names it; see `fastsal.models.InputSpec`.
Interpolation = Literal["bicubic", "bilinear", "nearest", "box", "hamming", "lanczos"]
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)
CropMode = Literal["center", "squash", "border"]
CROP_MODES: tuple[CropMode, ...] = get_args(CropMode)

# Runtimes that `fastsal prune --target` knows the layers and patterns of.
Target = Literal["xnnpack", "coreml", "openvino", "tensorrt", "torch"]
TARGETS: tuple[Target, ...] = get_args(Target)

# Files that `fastsal.export` writes.
ExportFormat = Literal["packed", "onnx", "openvino", "executorch", "coreml", "litert", "torch-2:4"]
EXPORT_FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)
# Libraries that `fastsal measure` times a model with.
Runtime = Literal["torch", "torch-2:4", "onnxruntime", "openvino"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
