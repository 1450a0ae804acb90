"""Checkpoints of the field, written in each layout from timm models and read back."""

from __future__ import annotations

import re
import warnings

import pytest
import timm
import torch
import torchvision
from torch import nn

import fastsal
from fastsal.errors import FileFormatError
from fastsal.models.classifier_signs import fresh_classifier
from fastsal.models.weights import load_weights

VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}


def resnet(seed=1, **options):
    torch.manual_seed(seed)
    model = timm.models.resnet.ResNet(
        timm.models.resnet.BasicBlock, (1, 1, 1, 1), channels=(8, 16, 24, 32),
        **{"num_classes": 10, **options},
    )  # fmt: skip
    return randomized(model)


def bottleneck(seed=1):
    """A ResNet with three convolutions a block."""
    torch.manual_seed(seed)
    kind = timm.models.resnet.Bottleneck
    channels = (16, 24, 32, 40)
    return randomized(timm.models.resnet.ResNet(kind, (1, 1, 1, 1), 10, channels=channels))


def vit(seed=1, **options):
    torch.manual_seed(seed)
    return randomized(
        timm.models.vision_transformer.VisionTransformer(**{**VIT, "num_classes": 10, **options})
    )


def randomized(model):
    """Give every tensor values of its own, so that no two are exchanged unseen."""
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) * 0.2 + 0.05)
    return model.eval()


def noise(*shape):
    return torch.rand(shape) + 0.1


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def without(state, *starts):
    return {name: value for name, value in state.items() if not name.startswith(starts)}


def renamed(state, *rules):
    """Return a state dict with names changed by the rules in order."""
    found = {}
    for name, value in state.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        found[name] = value
    return found


def split_qkv(state, names):
    """Split `attn.qkv` into three tensors, with the names of a library in its place."""
    found = {}
    for name, value in state.items():
        if "attn.qkv." not in name:
            found[name] = value
            continue
        for new, part in zip(names, value.chunk(3), strict=True):
            found[name.replace("attn.qkv", new)] = part
    return found


def headless(state):
    return without(state, "fc.", "head.")


MLP = {"0.weight": noise(8, 32), "0.bias": noise(8), "2.weight": noise(4, 8), "2.bias": noise(4)}


def moco(state, head):
    encoder = {**headless(state), **head}
    return {
        "epoch": 200,
        "arch": "resnet",
        "state_dict": {
            **under("module.encoder_q.", encoder),
            **under("module.encoder_k.", {n: v * 2 for n, v in encoder.items()}),
            "module.queue": noise(4, 16),
            "module.queue_ptr": torch.zeros(1, dtype=torch.int64),
        },
    }


def moco_v3(state, head):
    encoder = {**headless(state), **under(head, MLP)}
    predictor = under("module.predictor.", {n: v * 3 for n, v in MLP.items()})
    return {
        "state_dict": {
            **under("module.base_encoder.", encoder),
            **under("module.momentum_encoder.", {n: v * 2 for n, v in encoder.items()}),
            **predictor,
        }
    }


def dino(state, **more):
    head = {"head.mlp.0.weight": noise(8, 32), "head.last_layer.weight_v": noise(9, 8)}
    teacher = {**under("backbone.", {**headless(state), **more}), **head}
    return {
        "student": under("module.", {n: v * 2 for n, v in teacher.items()}),
        "teacher": teacher,
        "optimizer": {"state": {0: {"exp_avg": noise(3)}}},
        "dino_loss": {"center": noise(1, 9)},
        "epoch": 100,
    }


def dinov2(state, *, chunked=False, registers=False):
    state = headless(state)
    if registers:
        tokens = state.pop("cls_token"), state.pop("pos_embed"), state.pop("reg_token")
        first = noise(1, 1, 32)
        state["pos_embed"] = torch.cat([first, tokens[1]], 1)
        state["cls_token"], state["register_tokens"] = tokens[0] - first[:, 0], tokens[2]
    if chunked:
        state = renamed(state, (r"^blocks\.(\d+)\.", r"blocks.0.\1."))
    return {**state, "mask_token": noise(1, 32)}


def of_transformers(state, prefix="vit."):
    state = split_qkv(state, [f"attention.attention.{n}" for n in ("query", "key", "value")])
    return renamed(
        {**state, "norm_pooler": noise(2)},
        (r"^norm_pooler$", f"{prefix}pooler.dense.bias"),
        (r"^blocks\.", f"{prefix}encoder.layer."),
        (r"^norm\.", f"{prefix}layernorm."),
        (r"^head\.", "classifier."),
        (r"^(cls_token|mask_token)$", rf"{prefix}embeddings.\1"),
        (r"^pos_embed$", f"{prefix}embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", f"{prefix}embeddings.patch_embeddings.projection."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
    )


def dinov2_of_transformers(state):
    state = renamed(
        split_qkv(headless(state), [f"attention.attention.{n}" for n in ("query", "key", "value")]),
        (r"^norm\.", "layernorm."),
        (r"^blocks\.", "encoder.layer."),
        (r"^cls_token$", "embeddings.cls_token"),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    )
    return {**state, "embeddings.mask_token": noise(1, 32)}


def resnet_of_transformers(state):
    return renamed(
        state,
        (r"^conv1\.", "resnet.embedder.embedder.convolution."),
        (r"^bn1\.", "resnet.embedder.embedder.normalization."),
        *((rf"^layer{k}\.", f"resnet.encoder.stages.{k - 1}.layers.") for k in range(1, 5)),
        (r"\.downsample\.0\.", ".shortcut.convolution."),
        (r"\.downsample\.1\.", ".shortcut.normalization."),
        *((rf"\.conv{k}\.", f".layer.{k - 1}.convolution.") for k in range(1, 4)),
        *((rf"\.bn{k}\.", f".layer.{k - 1}.normalization.") for k in range(1, 4)),
        (r"^fc\.", "classifier.1."),
    )


def clip(state):
    """The names of OpenAI, with a text tower."""
    tower = renamed(
        {n: v for n, v in state.items() if n != "head.bias"},
        (r"^patch_embed\.proj\.", "conv1."),
        (r"^blocks\.", "transformer.resblocks."),
        (r"^cls_token$", "class_embedding"),
        (r"^pos_embed$", "positional_embedding"),
        (r"^norm_pre\.", "ln_pre."),
        (r"^norm\.", "ln_post."),
        (r"\.norm([12])\.", r".ln_\1."),
        (r"\.attn\.qkv\.", ".attn.in_proj_"),
        (r"\.attn\.proj\.", ".attn.out_proj."),
        (r"\.mlp\.fc1\.", ".mlp.c_fc."),
        (r"\.mlp\.fc2\.", ".mlp.c_proj."),
        (r"^head\.weight$", "proj"),
    )
    tower["class_embedding"] = tower["class_embedding"][0, 0]
    tower["positional_embedding"] = tower["positional_embedding"][0]
    tower["proj"] = tower["proj"].T
    text = {"transformer.resblocks.0.ln_1.weight": noise(8), "text_projection": noise(8, 8)}
    more = {"positional_embedding": noise(7, 8), "logit_scale": noise(1)[0]}
    return {**under("visual.", tower), **text, **more}


def clip_of_transformers(state):
    names = [f"self_attn.{n}_proj" for n in "qkv"]
    tower = renamed(
        split_qkv(without(state, "head.bias"), names),
        (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
        (r"^blocks\.", "encoder.layers."),
        (r"^cls_token$", "embeddings.class_embedding"),
        (r"^pos_embed$", "embeddings.position_embedding.weight"),
        (r"^norm_pre\.", "pre_layrnorm."),
        (r"^norm\.", "post_layernorm."),
        (r"\.norm([12])\.", r".layer_norm\1."),
        (r"\.attn\.proj\.", ".self_attn.out_proj."),
    )
    projection = tower.pop("head.weight")
    tower["embeddings.class_embedding"] = tower["embeddings.class_embedding"][0, 0]
    tower["embeddings.position_embedding.weight"] = tower["embeddings.position_embedding.weight"][0]
    tower["embeddings.position_ids"] = torch.arange(17)[None]
    text = {"text_model.final_layer_norm.weight": noise(8), "text_projection.weight": noise(8, 8)}
    return {**under("vision_model.", tower), "visual_projection.weight": projection, **text}


def vit_of_torchvision(state):
    return renamed(
        state,
        (r"^patch_embed\.proj\.", "conv_proj."),
        (r"^cls_token$", "class_token"),
        (r"^pos_embed$", "encoder.pos_embedding"),
        (r"^norm\.", "encoder.ln."),
        (r"^head\.", "heads.head."),
        (r"^blocks\.", "encoder.layers.encoder_layer_"),
        (r"\.norm([12])\.", r".ln_\1."),
        (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
        (r"\.attn\.proj\.", ".self_attention.out_proj."),
        (r"\.mlp\.fc1\.", ".mlp.0."),
        (r"\.mlp\.fc2\.", ".mlp.3."),
    )


def vit_of_mmpretrain(state):
    inside = renamed(
        headless(state),
        (r"^norm\.", "ln1."),
        (r"^patch_embed\.proj\.", "patch_embed.projection."),
        (r"^blocks\.", "layers."),
        (r"\.norm([12])\.", r".ln\1."),
        (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
        (r"\.mlp\.fc2\.", ".ffn.layers.1."),
    )
    head = {n: v for n, v in state.items() if n.startswith("head.")}
    return {"state_dict": {**under("backbone.", inside), **under("head.layers.", head)}, "meta": {}}


def resnet_of_mmpretrain(state):
    head = {n: v for n, v in state.items() if n.startswith("fc.")}
    pixels = {"data_preprocessor.mean": noise(3, 1, 1)}
    inside = under("backbone.", headless(state))
    return {"state_dict": {**inside, **under("head.", head), **pixels}}


def swav(state):
    more = {"projection_head.0.weight": noise(8, 32), "prototypes.weight": noise(30, 8)}
    return under("module.", {**headless(state), **more})


def simsiam(state):
    encoder = {**headless(state), **under("fc.", MLP)}
    whole = {**under("encoder.", encoder), **under("predictor.", MLP)}
    return {"state_dict": under("module.", whole)}


def byol(state):
    """lucidrains: the network twice, once shared, and its target."""
    online = headless(state)
    return {
        **under("net.", online),
        **under("online_encoder.net.", online),
        **under("online_encoder.projector.", MLP),
        **under("target_encoder.net.", {n: v * 2 for n, v in online.items()}),
        "online_predictor.0.weight": noise(8, 8),
    }


def solo_learn(state):
    """Lightning, with an online classifier."""
    online = headless(state)
    return {
        "state_dict": {
            **under("backbone.", online),
            **under("momentum_backbone.", {n: v * 2 for n, v in online.items()}),
            **under("projector.", MLP),
            "classifier.weight": noise(10, 32),
        },
        "pytorch-lightning_version": "2.4.0",
    }


def lightly(state):
    """A ResNet as the sequence of its children, as lightly's examples build it."""
    children = renamed(
        headless(state),
        (r"^conv1\.", "0."),
        (r"^bn1\.", "1."),
        *((rf"^layer{k}\.", f"{k + 3}.") for k in range(1, 5)),
    )
    return {
        "state_dict": {
            **under("backbone.", children),
            **under("backbone_momentum.", {n: v * 2 for n, v in children.items()}),
            **under("projection_head.layers.", MLP),
        }
    }


def mae(state):
    more = {"mask_token": noise(1, 1, 32), "decoder_embed.weight": noise(16, 32)}
    return {"model": {**headless(state), **more, "decoder_blocks.0.norm1.weight": noise(16)}}


def open_clip(state):
    text = {"text.transformer.resblocks.0.ln_1.weight": noise(8), "logit_scale": noise(1)[0]}
    head = {"visual.head.proj.weight": noise(5, 32)}
    whole = {**under("visual.trunk.", headless(state)), **head, **text}
    return {"state_dict": under("module.", whole)}


LAYERED = {"init_values": 0.1}
REGISTERS = {**LAYERED, "reg_tokens": 4, "no_embed_class": True}
CLIP = {"pre_norm": True}
SAME = ""

# Builder of the model, the file, whether it has a classifier, and what the note must contain.
LAYOUTS = {
    "MoCo v1": (
        resnet, lambda s: moco(s, {"fc.weight": noise(10, 32), "fc.bias": noise(10)}), False,
        r"found MoCo v1 or v2; weights under 'encoder_q' are loaded; left out: momentum encoder "
        r"\(encoder_k\), queue \(queue, queue_ptr\), projection head \(fc\); the file has no class",
    ),
    "MoCo v2": (resnet, lambda s: moco(s, under("fc.", MLP)), False, r"projection head \(fc\)"),
    "MoCo v3 ResNet": (resnet, lambda s: moco_v3(s, "fc."), False, "found MoCo v3"),
    "MoCo v3 ViT": (
        vit, lambda s: moco_v3(s, "head."), False,
        r"left out: momentum encoder \(momentum_encoder\), projection head \(predictor, head\)",
    ),
    "DINO ViT": (vit, dino, False, "'teacher' is loaded, not 'student'.*found DINO;.*left out: p"),
    "DINO ResNet": (resnet, dino, False, "found DINO"),
    "DINO, backbone alone": (vit, headless, False, "the file has no classifier"),
    "iBOT": (
        vit, lambda s: dino(s, masked_embed=noise(1, 32)), False,
        r"found iBOT;.*left out: projection head \(head\), mask token \(masked_embed\)",
    ),
    "DINOv2": (lambda seed=1: vit(seed, **LAYERED), dinov2, False, "left out: mask token"),
    "DINOv2 with registers": (
        lambda seed=1: vit(seed, **REGISTERS), lambda s: dinov2(s, registers=True), False,
        "left out: mask token",
    ),
    "DINOv2, blocks in chunks": (
        lambda seed=1: vit(seed, **LAYERED),
        lambda s: {
            "teacher": under("backbone.", dinov2(s, chunked=True)) | {"dino_head.mlp.0.b": noise(2)}
        },
        False, "found DINOv2 with blocks in chunks in DINOv2",
    ),
    "SwAV": (resnet, swav, False, r"found SwAV; left out: projection head \(projection_head, prot"),
    "SimSiam": (resnet, simsiam, False, "found SimSiam; weights under 'encoder'"),
    "BYOL, lucidrains": (resnet, byol, False, r"found BYOL;.*left out: projection head \(online_e"),
    "BYOL, solo-learn": (resnet, solo_learn, False, r"momentum encoder \(momentum_b.*online"),
    "BYOL, lightly": (resnet, lightly, False, "found ResNet as a sequence of its children in BYOL"),
    "MAE": (vit, mae, False, r"found MAE; left out: mask token .*, decoder \(decoder_embed, d"),
    "CLIP": (lambda seed=1: vit(seed, **CLIP), clip, None, r"found CLIP; left out: text tower"),
    "CLIP of transformers": (
        lambda seed=1: vit(seed, **CLIP), lambda s: clip_of_transformers(s), None,
        "found CLIP of transformers in CLIP; left out: .*text tower",
    ),
    "OpenCLIP": (vit, open_clip, False, r"found OpenCLIP;.*visual projection \(visual\), text"),
    "torchvision ViT": (vit, vit_of_torchvision, True, "found ViT of torchvision$"),
    "transformers ViT": (vit, of_transformers, True, "found ViT or DINOv2 of transfo.*out: pooler"),
    "transformers DINOv2": (
        lambda seed=1: vit(seed, **LAYERED), dinov2_of_transformers, False,
        "found ViT or DINOv2 of transformers; left out: mask token",
    ),
    "transformers ResNet": (resnet, resnet_of_transformers, True, "found ResNet of transformers$"),
    "transformers ResNet-50": (bottleneck, resnet_of_transformers, True, "found ResNet of"),
    "mmpretrain ResNet": (resnet, resnet_of_mmpretrain, True, "found mmpretrain;.*normalization"),
    "mmpretrain ViT": (vit, vit_of_mmpretrain, True, "found ViT of mmpretrain in mmpretrain"),
    "Lightning": (
        resnet, lambda s: {"state_dict": under("model.", s), "callbacks": {}}, True, SAME,
    ),
    "Lightning around MoCo": (
        resnet,
        lambda s: {"state_dict": under("model.", moco(s, under("fc.", MLP))["state_dict"])},
        False, "found MoCo v1 or v2",
    ),
}  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    def save(content):
        torch.save(content, tmp_path / "w.pth")
        return tmp_path / "w.pth"

    return save


def read(path, model, **options):
    """Load a file and return the notes."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        load_weights(model, path, **options)
    return [str(each.message) for each in told]


def images(model):
    torch.manual_seed(5)
    return torch.rand(2, 3, 32, 32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_read_back(saved, layout):
    build, written, has_classifier, note = LAYOUTS[layout]
    source, model = build(1), build(2)
    if has_classifier is None:  # a projection, which timm has as a classifier without bias
        nn.init.zeros_(source.head.bias)
    own = {n: v.clone() for n, v in model.state_dict().items()}
    with torch.no_grad():
        path = saved(written({n: v.clone() for n, v in source.state_dict().items()}))
    notes = read(path, model)
    assert [re.search(note, each) is not None for each in notes] == ([True] if note else [])
    x = images(model)
    with torch.no_grad():
        expected, got = source.forward_features(x), model.forward_features(x)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
        if has_classifier is not False:
            torch.testing.assert_close(model(x), source(x), atol=1e-6, rtol=1e-5)
    classifier = [n for n in own if n.startswith(("fc.", "head."))]
    if has_classifier is False:
        assert all(torch.equal(model.state_dict()[n], own[n]) for n in classifier)
        assert fresh_classifier(model) == "w.pth has no classifier"
    else:
        assert fresh_classifier(model) is None
    # Every other tensor is that of the file.
    for name, value in model.state_dict().items():
        if name not in classifier and "num_batches" not in name:
            torch.testing.assert_close(value, source.state_dict()[name], atol=1e-6, rtol=1e-5)


def test_torchvision_has_the_names_of_timm(saved):
    name = "resnet18"
    source = getattr(torchvision.models, name)(num_classes=4).eval()
    model = timm.create_model(name, num_classes=4)
    assert read(saved(source.state_dict()), model) == []
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), source(x))


def test_the_vit_of_torchvision_itself(saved):
    source = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=128,
        num_classes=10,
    )  # fmt: skip
    model = vit(2)
    (note,) = read(saved(randomized(source).state_dict()), model)
    assert note.endswith("found ViT of torchvision")
    with torch.no_grad():
        torch.testing.assert_close(model(images(model)), source(images(model)))


@pytest.mark.parametrize("biased", [True, False])
def test_dinov3_of_meta_and_of_transformers(saved, biased):
    def build(seed):
        torch.manual_seed(seed)
        return randomized(
            timm.models.eva.Eva(
                img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0,
                qkv_bias=biased, init_values=0.1, rope_type="dinov3", use_rot_pos_emb=True,
                use_abs_pos_emb=False, num_reg_tokens=4, use_fc_norm=False, global_pool="token",
            )
        )  # fmt: skip

    source, model = build(1), build(2)
    state = {n: v.clone() for n, v in source.state_dict().items()}
    meta, other = {}, {}
    for name, value in state.items():
        if name.endswith(("q_bias", "v_bias", "k_bias")):
            continue
        new = name.replace("reg_token", "storage_tokens").replace("gamma_", "ls")
        meta[re.sub(r"\.(ls[12])$", r".\1.gamma", new)] = value
    hub = split_qkv(without(state, "blocks.0.attn.q_b"), [f"attention.{n}_proj" for n in "qkv"])
    other = renamed(
        {n: v for n, v in hub.items() if not n.endswith(("q_bias", "v_bias", "k_bias"))},
        (r"^blocks\.", "layer."),
        (r"^cls_token$", "embeddings.cls_token"),
        (r"^reg_token$", "embeddings.register_tokens"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
        (r"\.attn\.proj\.", ".attention.o_proj."),
        (r"\.gamma_([12])$", r".layer_scale\1.lambda1"),
        (r"\.mlp\.fc1\.", ".mlp.up_proj."),
        (r"\.mlp\.fc2\.", ".mlp.down_proj."),
    )
    for k in range(2):
        bias = torch.zeros(96)
        if biased:
            queries, values = state[f"blocks.{k}.attn.q_bias"], state[f"blocks.{k}.attn.v_bias"]
            bias = torch.cat([queries, torch.full((32,), 7.0), values])
            other[f"layer.{k}.attention.q_proj.bias"] = queries
            other[f"layer.{k}.attention.v_proj.bias"] = values
        meta[f"blocks.{k}.attn.qkv.bias"] = bias
        meta[f"blocks.{k}.attn.qkv.bias_mask"] = noise(96)
    meta["rope_embed.periods"], meta["mask_token"] = noise(8), noise(1, 32)
    other["embeddings.mask_token"] = noise(1, 1, 32)
    for file, note in ((meta, "left out: "), (other, "found DINOv3 of transformers")):
        model = build(2)
        (told,) = read(saved(file), model)
        assert note in told
        with torch.no_grad():
            torch.testing.assert_close(model(images(model)), source(images(model)))
    if not biased:  # a bias that the model has no place for is not dropped
        meta["blocks.0.attn.qkv.bias"] = torch.ones(96)
        with pytest.raises(FileFormatError, match="does not fit the model"):
            read(saved(meta), build(2))


def test_an_embedding_of_another_size_is_resampled_and_told(saved):
    source, model = vit(1, img_size=48, **LAYERED), vit(2, **LAYERED)
    (note,) = read(saved(dinov2(source.state_dict())), model)
    assert "resampled to the size of the model: pos_embed" in note
    assert torch.equal(model.norm.weight, source.norm.weight)


def test_a_classifier_is_left_out_of_a_model_without_one(saved):
    source, model = resnet(1), resnet(2, num_classes=0)
    (note,) = read(saved(source.state_dict()), model)
    assert note.endswith("left out: classifier (fc)")
    x = images(model)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(x), source.forward_features(x))


def test_a_model_of_the_same_layout_is_loaded_as_it_is(saved):
    """A training script's own module, whose names are all in the file."""

    def build(seed):
        torch.manual_seed(seed)
        return nn.ModuleDict({"encoder_q": nn.Linear(3, 2), "encoder_k": nn.Linear(3, 2)})

    source, model = build(1), build(2)
    assert read(saved(source.state_dict()), model) == []
    assert torch.equal(model["encoder_k"].weight, source["encoder_k"].weight)


def test_another_part_is_chosen_by_its_key(saved):
    source = resnet(1)
    path = saved(moco(source.state_dict(), under("fc.", MLP)))
    name = "layer1.0.conv1.weight"
    for key in ("state_dict.module.encoder_k", "module.encoder_k", "encoder_k"):
        model = resnet(2)
        (note,) = read(path, model, weights_key=key)
        assert "left out: projection head (fc); the file has no classifier" in note
        torch.testing.assert_close(model.state_dict()[name], 2 * source.state_dict()[name])
    student = saved(dino(vit(1).state_dict()))
    model = vit(2)
    read(student, model, weights_key="student")
    expected = 2 * vit(1).state_dict()["norm.weight"]
    torch.testing.assert_close(model.state_dict()["norm.weight"], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("module.encoder_q.bn1.weight"), "missing: bn1.weight"),
        (
            lambda s: s.update({"module.encoder_q.bn1.weight": noise(9)}),
            r"bn1.weight \[9\] instead of \[64\]",
        ),
        (lambda s: s.update({"module.encoder_q.more.weight": noise(9)}), "unexpected: more.weight"),
    ],
)
def test_a_known_layout_that_does_not_fit_is_told(saved, change, message):
    content = moco(resnet(1).state_dict(), under("fc.", MLP))
    change(content["state_dict"])
    model = resnet(2)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(
        FileFormatError, match=f"recognized as MoCo v1 or v2, but does not.*{message}"
    ):
        read(saved(content), model)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_several_backbones_that_fit_are_candidates(saved):
    a, b = headless(resnet(1).state_dict()), headless(resnet(3).state_dict())
    with pytest.raises(FileFormatError, match="weights_key must be one of encoder_q, base_encoder"):
        read(saved({**under("encoder_q.", a), **under("base_encoder.", b)}), resnet(2))


def test_a_part_of_a_classifier_is_no_backbone(saved):
    with pytest.raises(FileFormatError, match="1 missing: fc.bias"):
        read(saved(without(resnet(1).state_dict(), "fc.bias")), resnet(2))


def test_the_random_classifier_warns_when_it_is_used(saved, tmp_path):
    (tmp_path / "m.py").write_text(
        "import timm\n\ndef build(num_classes=10):\n"
        "    return timm.create_model('test_resnet', num_classes=num_classes)\n"
    )
    state = headless(fastsal.load_model(f"{tmp_path / 'm.py'}:build").state_dict())
    with pytest.warns(UserWarning, match="the file has no classifier: that of the model is random"):
        model = fastsal.load_model(f"{tmp_path / 'm.py'}:build", weights=saved(state))
    batches = [(torch.rand(4, 3, 32, 32), torch.arange(4))]
    with pytest.warns(UserWarning, match="classifier of ResNet is random: w.pth has no classifier"):
        fastsal.collect(model, batches, block_size=8)
