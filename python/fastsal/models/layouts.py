"""Layouts of checkpoints: which part is the backbone, and what its names are in the model.

Training without labels stores more than a backbone: momentum encoders, queues, projection heads.
The part that the field evaluates is loaded, what is left out is told, and a file that has no
classifier leaves that of the model random. A layout is accepted only if every weight of the model
but those of its classifier is in the file, in its shape, and every other name in the file is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from fastsal.errors import FileFormatError
from fastsal.models.classifier import classifier_of
from fastsal.models.extras import described, kind_of_extra
from fastsal.models.fitting import fill_aliases, misfits
from fastsal.models.key_maps import Converted, conversions
from fastsal.models.state_dicts import State
from fastsal.models.wrappers import plain_name

_RESAMPLED = ("pos_embed", "patch_embed.proj.weight")  # by timm, to the size of the model
# Names of classifiers in the models of the field, and of projection heads in the place of one.
_HEADS = ("fc", "head", "heads", "classifier", "head_dist")


@dataclass(frozen=True)
class Part:
    """The backbone in a checkpoint.

    Attributes:
        label: Name of the method or library; empty for a bare backbone.
        prefix: What its names began with.
        state: Its tensors, without the prefix.
        left: Names of the tensors that are left out, and what they belong to.
        has_classifier: Whether what is in the place of a classifier is one, rather than a
            projection head. None if it is a projection that a model may have as its classifier.
    """

    label: str
    prefix: str
    state: State
    left: list[tuple[str, str]] = field(default_factory=list)
    has_classifier: bool | None = True


@dataclass(frozen=True)
class Found:
    """Weights of a model from a checkpoint of a known layout.

    Attributes:
        state: The tensors under the names of the model; without those of its classifier if the
            file has none.
        note: What was found and left out.
        lacks_classifier: Whether the classifier of the model keeps its weights.
    """

    state: State
    note: str
    lacks_classifier: bool


@dataclass(frozen=True)
class _Attempt:
    """A state dict compared with a model; `found` is None if it does not fit."""

    label: str
    problems: list[str]
    found: Found | None


_CLIP = "CLIP"
# Label, prefix of the backbone, and a prefix that must be there beside it. What training without
# labels has in the place of a classifier is a projection head.
_TRAINED = (
    ("MoCo v1 or v2", "encoder_q.", ""),
    ("MoCo v3", "base_encoder.", ""),
    ("DINOv2, the teacher", "teacher.backbone.", "student.backbone."),
    ("DINOv2, the teacher", "teacher.backbone.", "teacher.dino_head."),
    ("DINOv2", "backbone.", "dino_head."),
    ("iBOT", "backbone.", "backbone.masked_embed"),
    ("DINO", "backbone.", "head.last_layer"),
    ("DINO", "backbone.", "head.mlp."),
    ("BYOL", "online_encoder.net.", "target_encoder."),
    ("BYOL", "online_network.", "target_network."),
    ("BYOL", "online_net.0.", "target_net.0."),
    ("BYOL", "backbone.", "target_net."),
    ("BYOL", "backbone.", "backbone_momentum."),
    ("BYOL", "backbone.", "momentum_backbone."),
    ("OpenCLIP", "visual.trunk.", ""),
    ("SimSiam", "encoder.", "predictor."),
    ("SimCLR or BYOL", "encoder.", "projetion."),
    ("a backbone with a projection head", "backbone.", "projection_head."),
    ("a backbone with a projection head", "backbone.", "projector."),
    ("a backbone with a projection head", "backbone.", "neck."),
)  # fmt: skip
# Layouts without a prefix, by a name that only they have.
_BARE = (
    ("SwAV", "prototypes."),
    ("SwAV", "projection_head."),
    ("MAE", "decoder_embed."),
    ("MAE", "decoder_pos_embed"),
    (_CLIP, "visual."),
    (_CLIP, "vision_model."),
)


def recognized(state: State, model: nn.Module, own: State, path: object) -> Found | None:
    """Return the weights of a model in a checkpoint of a known layout; None if there are none.

    Args:
        state: Tensors of the file.
        model: The model.
        own: Its own tensors.
        path: Path of the file, for messages.

    Raises:
        FileFormatError: The file has several backbones that fit, or its layout is known, but no
            part of it fits the model.
    """
    plain = _without_shared_prefix({plain_name(name): value for name, value in state.items()}, own)
    if len(plain) != len(state):
        return None
    classifier = _classifier_names(model, own)
    known: list[tuple[str, _Attempt]] = []
    for part in _parts(plain):
        attempts = [
            _attempt(each, part, own, classifier) for each in conversions(part.state, model)
        ]
        good = [each for each in attempts if each.found is not None]
        if good:
            known.append((part.prefix, good[0]))
        elif part.label or any(each.label for each in attempts):
            # What it is closest to, for the message.
            least = min(attempts, key=lambda each: (not each.label, _size_of(each.problems)))
            known.append((part.prefix, least))
    fitting = {prefix: each.found for prefix, each in known if each.found is not None}
    if len(fitting) > 1:
        keys = ", ".join(prefix.rstrip(".") or "no prefix" for prefix in fitting)
        raise FileFormatError(
            f"weights: {path} contains several sets of weights; weights_key must be one of {keys}"
        )
    if fitting:
        return next(iter(fitting.values()))
    if known:
        attempt = known[0][1]
        raise FileFormatError(
            f"weights: {path} is recognized as {attempt.label}, but does not fit the model: "
            f"{'; '.join(attempt.problems)}"
        )
    return None


def _parts(state: State) -> Iterator[Part]:
    """Yield the parts of a checkpoint that may be the backbone, of known layouts first."""
    prefixes: set[str] = set()
    for label, prefix, beside in _TRAINED:
        there = [name for name in state if name.startswith(prefix)]
        if prefix in prefixes or not there or not any(n.startswith(beside) for n in state):
            continue
        prefixes.add(prefix)
        inside = {name[len(prefix) :]: state[name] for name in there}
        yield Part(label, prefix, inside, _rest(state, prefix), has_classifier=False)
    if prefixes:
        return
    if any(name.startswith("backbone.") for name in state) and any(
        name.startswith(("head.fc.", "head.layers.head.")) for name in state
    ):
        yield _of_mmpretrain(state)
        return
    label = next((each for each, sign in _BARE if any(n.startswith(sign) for n in state)), "")
    yield Part(label, "", state, has_classifier=None if label == _CLIP else True)


def _rest(state: State, prefix: str) -> list[tuple[str, str]]:
    """Return the names outside of a prefix whose tensors are not those inside, and their kinds."""
    inside = {value.data_ptr() for name, value in state.items() if name.startswith(prefix)}
    return [
        (name, kind_of_extra(name) or "projection head")
        for name, value in state.items()
        if not name.startswith(prefix) and value.data_ptr() not in inside
    ]


def _without_shared_prefix(state: State, own: State) -> State:
    """Remove segments that all names begin with, unless names of the model begin with them."""
    while state:
        first = next(iter(state)).partition(".")[0] + "."
        if not all(name.startswith(first) for name in state) or any(
            name.startswith(first) for name in own
        ):
            break
        state = {name[len(first) :]: value for name, value in state.items()}
    return state


def _of_mmpretrain(state: State) -> Part:
    """Return the backbone with the classifier beside it, which has the names of both libraries."""
    inside, left = {}, []
    for name, value in state.items():
        if name.startswith("backbone."):
            inside[name.removeprefix("backbone.")] = value
        elif name.startswith("head.fc."):
            inside[name.removeprefix("head.")] = value
        elif name.startswith("head.layers.head."):
            inside[name.replace("head.layers.head.", "head.")] = value
        else:
            left.append((name, kind_of_extra(name) or "other"))
    return Part("mmpretrain", "backbone.", inside, left)


def _attempt(converted: Converted, part: Part, own: State, classifier: set[str]) -> _Attempt:
    """Compare a converted state dict with a model."""
    label = " in ".join(each for each in (converted.label, part.label) if each)
    left = [*part.left, *converted.left]
    fits_head = all(
        name in own and value.shape == own[name].shape
        for name, value in converted.state.items()
        if name.split(".")[0] in _HEADS
    )
    is_projection = part.has_classifier is False or (part.has_classifier is None and not fits_head)
    state: State = {}
    for name, value in converted.state.items():
        kind = None if name in own else kind_of_extra(name)
        if is_projection and name.split(".")[0] in _HEADS:
            kind = "projection head" if part.has_classifier is False else "visual projection"
        if kind is None:
            state[name] = value
        else:
            left.append((name, kind))
    fill_aliases(state, own)
    missing = {name for name in own if name not in state}
    lacks = bool(missing) and missing == classifier
    if lacks or not classifier:
        # What is in the place of the classifier and has other names: a projection head, or the
        # classifier of the file for a model that has none.
        roots = {name.split(".")[0] for name in classifier} or set(_HEADS)
        for name in [n for n in state if n not in own and n.split(".")[0] in roots]:
            del state[name]
            left.append((name, "classifier" if not classifier else "projection head"))
    wanted = {name: value for name, value in own.items() if not lacks or name not in classifier}
    problems = misfits(state, wanted)
    if problems:
        return _Attempt(label, problems, None)
    notes = [f"found {label}"] if label else []
    if part.prefix:
        notes.append(f"weights under {part.prefix[:-1]!r} are loaded")
    if left:
        notes.append(f"left out: {described(left)}")
    resampled = [
        name for name in converted.made if name in ("pos_embed", "patch_embed.proj.weight")
    ]
    if resampled:
        notes.append(f"resampled to the size of the model: {', '.join(resampled)}")
    if lacks:
        notes.append("the file has no classifier: that of the model is random")
    return _Attempt(label, [], Found(state, "; ".join(notes), lacks))


def _classifier_names(model: nn.Module, own: State) -> set[str]:
    """Return the names of the tensors of the classifier; empty if the model has none."""
    layers = set(classifier_of(model))
    prefixes = [f"{name}." for name, module in model.named_modules() if module in layers and name]
    return {name for name in own if name.startswith(tuple(prefixes))} if prefixes else set()


def _size_of(problems: list[str]) -> int:
    return sum(int(problem.split(" ")[0]) for problem in problems)
