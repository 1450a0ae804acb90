"""Weights in checkpoints that are no part of a backbone or its classifier, by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable

# What a name belongs to, the first that fits; patterns are matched at its beginning.
_KINDS: tuple[tuple[str, str], ...] = (
    ("momentum encoder", r"(?:encoder_k|momentum\w*|target\w*|\w+_momentum|\w+_target|ema)\."),
    ("student", r"student\."),
    ("queue", r"(?:module\.)?queue\w*$"),
    ("decoder", r"decoder\w*(?:\.|$)"),
    ("mask token", r"(?:[\w.]+\.)?(?:mask_token|masked_embed)$"),
    (
        "projection head",
        r"(?:projection_head|prediction_head|projector|predictor|prototypes|dino_head|ibot_head|"
        r"mlp_head|neck|projetion|online_predictor|online_projector|contrastive_head|projectors)"
        r"\w*(?:\.|$)",
    ),
    ("projection head", r"head\.(?:mlp2?|last_layer2?)(?:\.|$)"),
    ("pooler", r"(?:\w+\.)?pooler\."),
    (
        "text tower",
        r"(?:text_model|transformer|token_embedding|ln_final|text)\.|text_projection(?:\.|$)|"
        r"positional_embedding$|(?:vocab_size|context_length|input_resolution)$",
    ),
    ("scale of logits", r"logit_(?:scale|bias)$"),
    ("visual projection", r"visual_projection\.|visual\.(?:head\.|proj$)"),
    ("online classifier", r"(?:online_)?classifier\."),
    ("constant", r".*(?:position_ids|\.periods|bias_mask)$"),
    ("normalization of pixels", r"data_preprocessor\."),
    ("local class token", r"local_cls_norm\."),
)  # fmt: skip
_COMPILED = tuple((kind, re.compile(pattern)) for kind, pattern in _KINDS)


def kind_of_extra(name: str) -> str | None:
    """Return what a name belongs to beside a backbone; None if it is unknown."""
    return next((kind for kind, pattern in _COMPILED if pattern.match(name)), None)


def described(extras: Iterable[tuple[str, str]]) -> str:
    """Describe what is left out, from names and their kinds: `queue (queue, queue_ptr)`."""
    groups: dict[str, dict[str, None]] = {}
    for name, kind in extras:
        first = name.split(".")[0]
        groups.setdefault(kind, {})[first] = None
    return ", ".join(
        kind if list(firsts) == [kind] else f"{kind} ({', '.join(firsts)})"
        for kind, firsts in groups.items()
    )
