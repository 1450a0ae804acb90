"""Names of weights in other libraries, mapped to those of timm.

Each map has a name by which it is recognized and that no other library has, and changes names by
rules in order. Tensors are changed where timm stores them otherwise: queries, keys and values are
joined, and tokens get the axis of the batch.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastsal.models.extras import kind_of_extra
from fastsal.models.state_dicts import State

Rules = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class KeyMap:
    """A map of names.

    Attributes:
        label: Name of the library and the architecture.
        sign: Pattern of a name that only files of this kind have.
        rules: Patterns and their replacements, applied in order.
        finish: Changes the renamed tensors; None for nothing.
    """

    label: str
    sign: str
    rules: Rules
    finish: Callable[[State], State] | None = None

    def applies(self, state: State) -> bool:
        """Whether the names are those of this map."""
        return any(re.search(self.sign, name) for name in state)

    def __call__(self, state: State) -> State:
        """Return the tensors under the names of timm."""
        found: State = {}
        for name, value in state.items():
            new = name
            for pattern, replacement in self.rules:
                new = re.sub(pattern, replacement, new)
            found[new] = value
        return found if self.finish is None else self.finish(found)


def _joined(state: State) -> State:
    """Join `attn.q`, `attn.k` and `attn.v` to `attn.qkv`; without a bias of the keys it is zero."""
    found: State = {}
    for name, value in state.items():
        match = re.fullmatch(r"(.*attn\.)([qkv])\.(weight|bias)", name)
        if match is None:
            found[name] = value
            continue
        parts = [state.get(f"{match[1]}{part}.{match[3]}") for part in "qkv"]
        if match[2] != "q" or parts[0] is None or parts[2] is None:
            if parts[0] is None or parts[2] is None:
                found[name] = value  # incomplete, and told so as a name that the model lacks
            continue
        keys = torch.zeros_like(parts[0]) if parts[1] is None else parts[1]
        found[f"{match[1]}qkv.{match[3]}"] = torch.cat([parts[0], keys, parts[2]])
    return found


def _joined_clip(state: State) -> State:
    """Join queries, keys and values, and give the tokens of CLIP the axis of the batch."""
    found = _joined(state)
    if "cls_token" in found:
        found["cls_token"] = found["cls_token"].reshape(1, 1, -1)
    if "pos_embed" in found:
        found["pos_embed"] = found["pos_embed"][None]
    if "head.weight" in found:
        weight = found["head.weight"]
        found["head.bias"] = torch.zeros(len(weight), dtype=torch.float32, device="cpu")  # as timm
    return found


def _joined_dinov3(state: State) -> State:
    """Join queries, keys and values; keys have no bias, and timm keeps the others apart."""
    found = _joined(state)
    for name in [name for name in found if name.endswith("attn.qkv.bias")]:
        queries, _, values = found.pop(name).chunk(3)
        found[name.replace("qkv.bias", "q_bias")] = queries
        found[name.replace("qkv.bias", "v_bias")] = values
    return found


_HF_VIT: Rules = (
    (r"^(?:vit|deit|dinov2|dinov2_with_registers)\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
    (r"^(?:cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
)

KEY_MAPS = (
    KeyMap(
        "ViT or DINOv2 of transformers",
        r"^(?:\w+\.)?encoder\.layer\.0\.attention\.attention\.query\.weight$",
        _HF_VIT,
        _joined,
    ),
    KeyMap(
        "DINOv3 of transformers",
        r"^(?:\w+\.)?layer\.0\.attention\.q_proj\.weight$",
        (
            (r"^(?:dinov3_vit|model)\.", ""),
            (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
            (r"^embeddings\.register_tokens$", "reg_token"),
            (r"^embeddings\.", ""),
            (r"^layer\.", "blocks."),
            (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
            (r"\.attention\.o_proj\.", ".attn.proj."),
            (r"\.layer_scale([12])\.lambda1$", r".gamma_\1"),
            (r"\.mlp\.up_proj\.", ".mlp.fc1."),
            (r"\.mlp\.down_proj\.", ".mlp.fc2."),
        ),
        _joined_dinov3,
    ),
    KeyMap(
        "ResNet of transformers",
        r"^(?:resnet\.)?embedder\.embedder\.convolution\.weight$",
        (
            (r"^resnet\.", ""),
            (r"^embedder\.embedder\.convolution\.", "conv1."),
            (r"^embedder\.embedder\.normalization\.", "bn1."),
            *((rf"^encoder\.stages\.{k}\.layers\.", f"layer{k + 1}.") for k in range(4)),
            (r"\.shortcut\.convolution\.", ".downsample.0."),
            (r"\.shortcut\.normalization\.", ".downsample.1."),
            *((rf"\.layer\.{k}\.convolution\.", f".conv{k + 1}.") for k in range(3)),
            *((rf"\.layer\.{k}\.normalization\.", f".bn{k + 1}.") for k in range(3)),
            (r"^classifier\.1\.", "fc."),
        ),
    ),
    KeyMap(
        "CLIP of transformers",
        r"^vision_model\.embeddings\.class_embedding$",
        (
            (r"^visual_projection\.", "head."),
            (r"^vision_model\.embeddings\.class_embedding$", "cls_token"),
            (r"^vision_model\.embeddings\.patch_embedding\.", "patch_embed.proj."),
            (r"^vision_model\.embeddings\.position_embedding\.weight$", "pos_embed"),
            (r"^vision_model\.embeddings\.", ""),
            (r"^vision_model\.pre_layrnorm\.", "norm_pre."),
            (r"^vision_model\.post_layernorm\.", "norm."),
            (r"^vision_model\.encoder\.layers\.", "blocks."),
            (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
            (r"\.self_attn\.out_proj\.", ".attn.proj."),
            (r"\.layer_norm([12])\.", r".norm\1."),
        ),
        _joined_clip,
    ),
    KeyMap(
        "ViT of torchvision",
        r"^encoder\.layers\.encoder_layer_0\.self_attention\.in_proj_weight$",
        (
            (r"^conv_proj\.", "patch_embed.proj."),
            (r"^class_token$", "cls_token"),
            (r"^encoder\.pos_embedding$", "pos_embed"),
            (r"^encoder\.layers\.encoder_layer_", "blocks."),
            (r"\.ln_([12])\.", r".norm\1."),
            (r"\.self_attention\.in_proj_", ".attn.qkv."),
            (r"\.self_attention\.out_proj\.", ".attn.proj."),
            (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
            (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
            (r"^encoder\.ln\.", "norm."),
            (r"^heads\.(?:head|0)\.", "head."),
        ),
    ),
    KeyMap(
        "ViT of mmpretrain",
        r"^layers\.0\.ffn\.layers\.0\.0\.weight$",
        (
            (r"^ln1\.", "norm."),
            (r"^patch_embed\.projection\.", "patch_embed.proj."),
            (r"^layers\.", "blocks."),
            (r"\.ln([12])\.", r".norm\1."),
            (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
            (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
            (r"\.attn\.gamma1\.weight$", ".ls1.gamma"),
            (r"\.ffn\.gamma2\.weight$", ".ls2.gamma"),
        ),
    ),
    KeyMap(
        "DINOv2 with blocks in chunks",
        r"^blocks\.\d+\.\d+\.norm1\.weight$",
        ((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),),
    ),
    KeyMap(
        "ResNet as a sequence of its children",
        r"^4\.0\.conv1\.weight$",
        (
            (r"^0\.", "conv1."),
            (r"^1\.", "bn1."),
            *((rf"^{k}\.", f"layer{k - 3}.") for k in range(4, 8)),
        ),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Converted:
    """A state dict under other names.

    Attributes:
        label: Where the former names come from; empty if it does not matter.
        state: The tensors.
        made: Names of tensors that timm calculated from others, such as resampled embeddings.
        left: Former names that are no part of it, and what they belong to.
    """

    label: str
    state: State
    made: tuple[str, ...] = ()
    left: tuple[tuple[str, str], ...] = ()


def conversions(state: State, model: nn.Module) -> Iterator[Converted]:
    """Yield a state dict under the names that it may have in a model.

    First as it is, then by a map of names, then both by timm's own filter of the model's family.
    """
    found = [Converted("", state)]
    found += [Converted(each.label, each(state)) for each in KEY_MAPS if each.applies(state)]
    yield from found
    for each in found:
        filtered = _by_timm(each, model)
        if filtered is not None:
            yield filtered


def _by_timm(given: Converted, model: nn.Module) -> Converted | None:
    """Return what timm's filter makes of a state dict; None if there is none, or it fails.

    A filter that loses weights which are not known to be superfluous fails, too.
    """
    module = type(model).__module__
    function = getattr(sys.modules.get(module), "checkpoint_filter_fn", None)
    if not module.startswith("timm.models.") or not callable(function):
        return None
    try:
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            found = function(dict(given.state), model)
    except Exception:  # of a file that the filter was not made for
        return None
    if not isinstance(found, dict) or not all(isinstance(v, torch.Tensor) for v in found.values()):
        return None
    before = {_place(value) for value in given.state.values()}
    after = {_place(value) for value in found.values()}
    made = tuple(name for name, value in found.items() if _place(value) not in before)
    gone = [n for n, v in given.state.items() if n not in found and _place(v) not in after]
    kinds = {name: kind_of_extra(name) for name in gone}
    lost = [n for n, kind in kinds.items() if kind is None and bool((given.state[n] != 0).any())]
    if len(lost) > len(made):
        return None
    left = tuple((name, kind) for name, kind in kinds.items() if kind is not None)
    return Converted(given.label, found, made, left)


def _place(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()
