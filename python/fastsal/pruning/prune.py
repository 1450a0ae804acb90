"""Prune a model: statistics, scores, masks and compensation, in one round or several."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastsal.data.batches import Batches, first_images
from fastsal.data.content import SeenImages
from fastsal.data.numbering import check_labels_of
from fastsal.data.unpacking import BatchRule
from fastsal.errors import InvalidArgument
from fastsal.gradients import select_parameters
from fastsal.gradients.feature_parameters import without_classifier
from fastsal.gradients.losses import LossFunction, cross_entropy, resolve_loss
from fastsal.gradients.weight_macs import weight_macs
from fastsal.gradients.weights_in_use import indirect, warn_if_computed
from fastsal.models.classifier import using_head
from fastsal.models.digest import model_digest
from fastsal.models.input_axis import layer_axes
from fastsal.models.left_out import left_out
from fastsal.pruning.arguments import Arguments
from fastsal.pruning.images_use import kept_images
from fastsal.pruning.job import Job
from fastsal.pruning.limits.limit import Limit
from fastsal.pruning.masks.ranking import check_ranking
from fastsal.pruning.masks.shares import Sparsity
from fastsal.pruning.process import Process
from fastsal.pruning.prune_result import PruneResult
from fastsal.pruning.prune_to_limit import prune_safely
from fastsal.pruning.recalibration import moments_kept_on_error
from fastsal.pruning.recipe import Recipe
from fastsal.pruning.refit.settings import Refit
from fastsal.pruning.rounds import prune_in_rounds, rising_goals
from fastsal.pruning.shelf import Shelf, copies
from fastsal.pruning.stages import (
    collection_options,
    holds_out_by_default,
    recalibrates_by_default,
    reconstruction_stage,
    refit_stage,
    with_curvature,
)
from fastsal.utils.choices import (
    CURVATURES,
    CriterionName,
    Curvature,
    Precision,
    Scope,
    WeightBudget,
)
from fastsal.utils.identity import identity_of
from fastsal.utils.suggestions import check_choice


def prune(
    model: nn.Module,
    batches: Batches | None,
    sparsity: Sparsity | None = None,
    *,
    criterion: CriterionName = "obs-greedy",
    rounds: int = 1,
    compensate: bool = True,
    damping: float | str = "auto",
    samples: int | None = None,
    block_size: int | None = 64,
    scope: Scope = "global",
    pattern: str | None = None,
    floor: float = 0.0,
    loss: str | LossFunction = "cross-entropy",
    curvature: Curvature | None = None,
    parameters: str | Sequence[str] | None = None,
    precision: Precision = "float32",
    micro_batch: int | None = None,
    autocast: torch.dtype | None = None,
    loss_scale: float | None = None,
    memory_budget: int | str | None = None,
    scratch: str | os.PathLike[str] | None = None,
    scratch_budget: int | str | None = None,
    progress: bool | Callable[[int, int | None], None] = False,
    seed: int = 0,
    max_loss_increase: float | None = None,
    max_accuracy_drop: float | None = None,
    loss_cap: float | None = None,
    confidence: float = 0.95,
    held_out: Batches | None = None,
    recalibrate: bool | None = None,
    reconstruct: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    head: str | Sequence[str] | None = None,
    batch: BatchRule | None = None,
    refit: str | Sequence[str] | Refit | None = None,
    budget: WeightBudget = "weights",
) -> PruneResult:
    """Prune a model in place.

    Each round r of `rounds` collects statistics (the Fisher `F`) at the current weights, scores the
    weights, prunes those with the lowest scores to a sparsity of `1 - (1 - sparsity)^(r / rounds)`
    and, with `compensate`, updates the kept weights. Pruned weights remain pruned. They are
    excluded from later rounds.

    Args:
        model: Any module; weights of `nn.Linear`, `nn.ConvNd` and `nn.Embedding` layers can be
            pruned. It runs in evaluation mode; its modes are restored. Of a wrapper
            (`DistributedDataParallel`, `torch.compile`, an average) the model inside is used.
        batches: Pairs `(images [n, ...], labels [n])`, or dicts of them, as for `fastsal.collect`;
            see also `batch`. An iterator is enough for one round; several
            rounds and `recalibrate` need something that can be iterated again, such as a list or a
            DataLoader. None is valid for `"magnitude"` and `"random"` without compensation.
        sparsity: Fraction of the weights to prune, in `[0, 1]`, or a dict from names or patterns
            of parameters to fractions of theirs, see `fastsal.rank`. None with an N:M pattern,
            which fixes it, and with a limit, which it is searched for.
        criterion: Score of a weight, low = prune first: `"magnitude"`, `"random"`, `"taylor"`,
            `"diag-fisher"`, `"block-fisher"` or `"obs-greedy"`; see `fastsal.score`.
        rounds: Number of rounds, at least 1.
        compensate: Whether kept weights are updated to compensate for pruned ones, see
            `fastsal.compensate`.
        damping: `λ` of `A = F + λI`. A positive number; a multiple of the mean diagonal of F in
            each round, such as `"0.1x"`; or `"auto"`: one sample in eight is held out, at most
            1,024 samples spread over all, and the `λ` with the least loss on them is used. A
            cross-entropy counts at most what guessing costs.
            The held-out samples are then added to the statistics; if that increases the held-out
            loss, the model pruned without them is kept. With several rounds, `λ` is chosen once, at
            the final sparsity.
        samples: Number of samples of each round; None for all.
        block_size: Number of consecutive weights of a parameter that form one block of F. None
            makes each parameter one block.
        scope: Weights that compete with each other: `"global"` (all), `"layer"` (those of one
            parameter, pruned to the same sparsity) or `"erk"` (those of one parameter, with
            Erdős-Rényi kernel densities); see `fastsal.rank`.
        pattern: None for single weights. `"N:M"` (such as `"2:4"`) keeps N of every M weights along
            the input axis, `"1xM"` (such as `"1x4"`) keeps or prunes M weights together; one round
            only. With `"block-fisher"` and `"obs-greedy"` and M up to 8, groups are compared by
            joint cost, see `fastsal.rank_pattern`; else by scores.
        floor: Least fraction of any parameter to keep, in `[0, 1]`.
        loss: `"cross-entropy"`, or a function `(outputs, labels)` to losses `[n]`; it gets what the
            model returns.
        curvature: Gradients that F is made of: `"empirical"` (of the loss at the given labels),
            `"sampled"` (at labels drawn from the model; batches need no labels) or `"features"` (of
            matching the features of the dense model; batches need no labels and the model no
            classifier). With `"features"`, weights of a classifier are pruned only if they are
            named exactly, and the held-out loss is `½ ‖f_θ(x) − f(x)‖² / F`, where `f` are features
            `[F]`; an image counts at most what the mean feature costs. None is `"features"` if the
            first batch has no labels, else `"empirical"`.
        parameters: Names or `fnmatch` patterns of the parameters to prune; a leading `!` excludes.
            None prunes those that `fastsal.select_parameters` selects by default.
        precision: Type in which F is accumulated.
        micro_batch: Samples of one forward and backward pass; None chooses it.
        autocast: Type of the passes under `torch.autocast`, such as `torch.bfloat16`; None disables
            it.
        loss_scale: Factor on the loss that keeps float16 gradients from underflowing; undone before
            gradients are squared. None chooses it.
        memory_budget: Bytes that pruning may add to the memory of the process, or text such as
            `"8GiB"`; None for no limit. It covers statistics, passes, scores, masks, copies and
            held-out images, which are read again for each use if `batches` can be iterated again.
        scratch: Folder for statistics and copies that exceed the budget. Without it, statistics
            that do not fit are recomputed on each use, which needs no disk but several times as
            long; `fastsal.plan_memory` estimates both.
        scratch_budget: Bytes that may be used in the scratch folder; None for no limit.
        progress: Whether a progress bar is shown, or a function `(done, total)` that is called.
        seed: Seed of all random numbers.
        max_loss_increase: Instead of `sparsity`: prune to the highest sparsity at which the mean
            loss on held-out images, capped at `loss_cap`, rises by at most this much, with a
            finite-sample guarantee. One round, no pattern. The sparsities that are tested are those
            of `fastsal.pruning.prune_to_limit.GRID`, 26 values from 0.1 to 0.99.
        max_accuracy_drop: Instead of `sparsity`: the same for top-1 accuracy, a fraction in (0, 1).
            The model must return logits `[n, C]`.
        loss_cap: With `max_loss_increase`: what the loss of an image counts at most. None is
            `log C`, the loss of guessing, for the cross-entropy; it is required for a function.
        confidence: Confidence of that guarantee, in (0, 1).
        held_out: Labeled images to test the limit on, in any order; None holds out one sample in
            four. The guarantee is for images like these, so they should not be training images of
            the model. Images that can be iterated again are read again for each model rather than
            kept in memory, with a memory budget or if they take more than 1 GiB.
        recalibrate: Whether the running statistics of batch normalization are averaged over the
            images again at the end. It is undone unless it lowers the held-out loss. One sample in
            eight is held out for it. With `damping="auto"`, each `λ` is then judged by the lower of
            the losses with and without it. None does it with `curvature="features"` where samples
            are held out anyway, for `damping="auto"`.
        reconstruct: Whether the kept weights of each layer are solved for after each round, so that
            the layer restores its outputs in the dense model from its inputs in the pruned one: a
            least squares problem in all inputs of a row. It is undone unless it lowers the held-out
            loss (before the last round, unless that rises by more than half); one sample in eight
            is held out for it. None does it with `curvature="features"`
            where samples are held out anyway, for `damping="auto"`; within a memory budget only if
            there is room, and with as many images and rows as fit.
        checkpoint: File with the state after each round, and before a refit, whose own state is in
            a file beside it that ends in `.refit`; rerun the same call to resume from them. Both
            are removed at the end. The file of a run with another model, images, labels, loss or
            other arguments is rejected; the images are read once to compare them.
        head: Name of the classifier's layer, or several; None finds it. Only
            `curvature="features"` uses it: features are its input.
        batch: Function from a batch to `(images, labels)`, for batches and held-out batches of
            another form.
        refit: After pruning, train the kept weights to match the outputs of the dense model, on
            these images, without labels: `"blocks"`, other windows or a `fastsal.Refit`; see
            `fastsal.refit`. One sample in eight is held out and decides which step is kept, if any.
            None for no refitting.
        budget: What `sparsity` is a fraction of: the `"weights"`, or their `"macs"`, the
            multiply-accumulates of one image, see `fastsal.weight_macs`. Weights then compete by
            score per multiply-accumulate. Only with the scope `"global"` and without a pattern or a
            limit.

    Returns:
        Masks, scores, the history with one `Round` for each round, and the report of a limit.

    Raises:
        InvalidArgument: An argument is invalid.
        UnknownParameter: A name or pattern of `parameters` matches nothing.
        DataError: Images or labels are invalid, or too few.
        UnsupportedLayer: The gradients of a weight for single samples cannot be computed.
        NonFiniteGradient: A gradient is NaN or infinite.
        FactorizationError: A block of F is not positive definite with this damping.
        FileFormatError: `checkpoint` is damaged, or belongs to another run.

        If an error is raised, the model has its original weights.
    """
    return prune_with(Process(), Arguments(**locals()))


def prune_with(process: Process, arguments: Arguments) -> PruneResult:
    """Prune as `prune` does, by a process that works alone or with others."""
    with using_head(arguments.model, arguments.head):
        return _prune(process, arguments.normalized())


def _prune(process: Process, given: Arguments) -> PruneResult:
    given = with_curvature(given)
    check_choice("curvature", given.curvature, CURVATURES)
    recipe = Recipe.of(
        given.criterion,
        compensate=given.compensate,
        damping=given.damping,
        ranking={"scope": given.scope, "pattern": given.pattern, "floor": given.floor},
        parameters=given.parameters,
        block_size=given.block_size,
        seed=given.seed,
    )
    refits = given.refit is not None
    if given.recalibrate is None:
        given = replace(given, recalibrate=recalibrates_by_default(given, recipe))
    is_asked = bool(given.reconstruct)
    if given.reconstruct is None:
        given = replace(given, reconstruct=holds_out_by_default(given, recipe))
    recalibrate, reconstructs = bool(given.recalibrate), bool(given.reconstruct)
    recipe.check(
        given.rounds,
        given.batches,
        recalibrate=recalibrate,
        reconstruct=reconstructs,
        refits=refits,
    )
    loss = resolve_loss(given.loss)
    limit = Limit.of(
        given.max_loss_increase,
        given.max_accuracy_drop,
        given.confidence,
        given.loss_cap,
        needs_cap=loss is not cross_entropy,
    )
    model, batches = given.model, given.batches
    uses_labels = given.curvature == "empirical" and recipe.needs_fisher
    if uses_labels or limit is not None:
        check_labels_of(batches, model)
        check_labels_of(given.held_out, model)
    chosen = select_parameters(model, given.parameters)
    images: Tensor | None = None
    is_indirect = bool(indirect(model, chosen))
    if batches is not None and (given.curvature == "features" or is_indirect or given.is_by_macs):
        images, batches = first_images(batches)
    if is_indirect:
        warn_if_computed(model, chosen, lambda: images)
    if given.curvature == "features":
        chosen = without_classifier(model, chosen, given.parameters, images)
        recipe = replace(recipe, parameters=list(chosen))
    if given.is_by_macs:
        macs = weight_macs(model, images)
        costs = {name: macs[name] for name in chosen}
        recipe = replace(recipe, ranking={**recipe.ranking, "costs": costs})
    nbytes = 0
    if given.memory_budget is not None:
        nbytes, batches = kept_images(batches, given.samples, recipe, limit, given.held_out)
    statistics = collection_options(given, recipe, chosen, process, nbytes)
    stage = refit_stage(given, chosen, nbytes)
    # The model has its dense weights until the second round.
    holds_out_later = given.rounds > 1 and (recalibrate or reconstructs)
    needs_copy = given.curvature == "features" and holds_out_later
    job = Job(
        model,
        batches,
        given.samples,
        recipe,
        chosen,
        statistics,
        loss,
        None,
        process,
        Shelf(given.scratch),
        None if given.checkpoint is None else SeenImages(),
        stage,
        reconstruction_stage(given, chosen, nbytes, is_asked=is_asked),
    )
    if needs_copy and not refits:
        job = replace(job, dense=copies(job.changed))
    with job.all_or_nothing() as dense, moments_kept_on_error(model):
        result = _to_sparsity(job, given, dense) if limit is None else _to_limit(job, given, limit)
        in_use = result.masks.in_use(model, images)
        return replace(result, left_out=left_out(model, chosen), in_use=in_use)


def _to_sparsity(job: Job, given: Arguments, dense: Mapping[str, Tensor]) -> PruneResult:
    """Prune to a sparsity, in rounds."""
    if given.held_out is not None:
        raise InvalidArgument(
            "held_out must be None without max_loss_increase or max_accuracy_drop"
        )
    # Invalid fractions are rejected before anything is computed.
    shapes = {name: tuple(p.shape) for name, p in job.chosen.items()}
    axes = None if given.pattern is None else layer_axes(job.model, shapes)
    check_ranking(shapes, given.sparsity, **job.recipe.ranking, axes=axes)
    checkpoint = None
    if given.checkpoint is not None and (seen := job.seen) is not None:
        asked = {
            "sparsity": given.sparsity,
            "rounds": given.rounds,
            "samples": given.samples,
            **job.recipe.asked(),
            "precision": given.precision,
            "curvature": given.curvature,
            "head": given.head,
            "loss": identity_of(given.loss),
            "autocast": given.autocast,
            "loss_scale": given.loss_scale,
            "micro_batch": given.micro_batch,
            "recalibrate": given.recalibrate,
            "reconstruct": given.reconstruct,
            "refit": None if job.refit is None else job.refit.settings.as_dict(),
        }
        rest = model_digest(job.model, without=job.chosen.values())
        checkpoint = job.process.checkpoint(given.checkpoint, asked, rest, seen)
    goals = rising_goals(given.sparsity, given.rounds)
    done = prune_in_rounds(
        job, goals, dense=dense, recalibrate=bool(given.recalibrate), checkpoint=checkpoint
    )
    return PruneResult(*done)


def _to_limit(job: Job, given: Arguments, limit: Limit) -> PruneResult:
    """Prune to the highest sparsity within a limit."""
    others = {
        "sparsity": given.sparsity is not None,
        "rounds": given.rounds != 1,
        "pattern": given.pattern is not None,
        "recalibrate": bool(given.recalibrate),
        "reconstruct": bool(given.reconstruct),
        "refit": given.refit is not None,
        "checkpoint": given.checkpoint is not None,
        "budget": given.is_by_macs,
    }
    if any(others.values()):
        named = ", ".join(name for name, is_given in others.items() if is_given)
        raise InvalidArgument(
            f"max_loss_increase and max_accuracy_drop exclude {named}: they find the sparsity, in "
            "one round and without a pattern"
        )
    check_ranking({n: p.shape for n, p in job.chosen.items()}, 0.0, **job.recipe.ranking)
    if job.batches is None and given.held_out is None:
        raise InvalidArgument("batches must be labeled images to test a limit on, got None")
    return PruneResult(*prune_safely(job, limit, given.held_out))
