from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

import fastsal
from fastsal.data.image_set import ImageSet
from fastsal.errors import InvalidArgument
from fastsal.models.features import features
from fastsal.models.inputs import InputSpec
from fastsal.transfer import Task, fit_heads
from fastsal.transfer.headed import (
    PREFIX,
    Headed,
    SegmentedCrossEntropy,
    backbone_parameters,
)

SPEC = InputSpec(3, (32, 32), (0.5,) * 3, (0.5,) * 3)
pytestmark = pytest.mark.usefixtures("one_thread")


def images(n: int, classes: int, seed: int = 0) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    x = torch.randint(0, 100, (n, 32, 32, 3), generator=generator)
    x += (150 * y // classes)[:, None, None, None]  # brighter by class, so that heads say something
    return ImageSet(x.byte().numpy(), y.numpy())


@pytest.fixture(scope="module", params=["resnet18", "vit_tiny_patch16_224"])
def backbone(request):
    size = {"img_size": 32} if "vit" in request.param else {}
    torch.manual_seed(0)
    return timm.create_model(request.param, num_classes=4, **size).eval()


def heads_of(model, *classes):
    tasks = [Task.cut(str(k), images(12 * k, k, k)) for k in classes]
    return [fit_heads(model, task, spec=SPEC)[task.name] for task in tasks]


def test_logits_are_those_of_the_head_on_the_features(backbone):
    (head,) = heads_of(backbone, 3)
    x = torch.randn(5, 3, 32, 32)
    want = head.scale * head(features(backbone, x))
    found = Headed(backbone, [head]).eval()(x)
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(Headed(backbone, [head]).forward_features(x), features(backbone, x))


def test_several_heads_stand_side_by_side(backbone):
    heads = heads_of(backbone, 3, 2)
    own = fit_heads(backbone, Task.cut("own", images(48, 4)), kind="own", spec=SPEC)["own"]
    x = torch.randn(5, 3, 32, 32)
    found = Headed(backbone, [*heads, own]).eval()(x)
    assert found.shape == (5, 9)
    for columns, head in ((slice(0, 3), heads[0]), (slice(3, 5), heads[1]), (slice(5, 9), own)):
        assert torch.equal(found[:, columns], Headed(backbone, [head]).eval()(x))
    torch.testing.assert_close(found[:, 5:], backbone(x))


def test_what_is_done_to_it_is_done_to_the_backbone(backbone):
    model = copy.deepcopy(backbone)
    (head,) = heads_of(model, 3)
    headed = Headed(model, [head])
    names = [PREFIX + name for name in backbone_parameters(model)]
    result = fastsal.prune(headed, None, 0.5, criterion="magnitude", compensate=False,
                           parameters=names)  # fmt: skip
    assert set(result.masks) == set(names)
    pruned = sum(int((p == 0).sum()) for n, p in model.named_parameters() if PREFIX + n in names)
    assert pruned == result.masks.total - sum(result.masks.kept.values())


def test_the_classifier_is_no_part_of_the_backbone(backbone):
    classifier = backbone.get_classifier().weight
    names = backbone_parameters(backbone)
    assert all(p is not classifier for n, p in backbone.named_parameters() if n in names)
    assert len(names) == len(fastsal.select_parameters(backbone)) - 1
    # Whoever names it means it.
    whole = backbone_parameters(backbone, ["*.weight"])
    assert any(p is classifier for n, p in backbone.named_parameters() if n in whole)


def test_statistics_go_through_the_head(backbone):
    (head,) = heads_of(backbone, 3)
    headed = Headed(backbone, [head]).eval()
    x, y = torch.randn(3, 3, 32, 32), torch.tensor([0, 2, 1])
    name = PREFIX + backbone_parameters(backbone)[-1]
    fisher = fastsal.collect(headed, [(x, y)], parameters=[name])
    weight = dict(headed.named_parameters())[name]
    want = torch.zeros_like(weight)
    for image, label in zip(x, y, strict=True):
        loss = F.cross_entropy(headed(image[None]), label[None])
        want += torch.autograd.grad(loss, weight)[0] ** 2 / 3
    torch.testing.assert_close(fisher.diagonal()[name].float(), want, rtol=1e-3, atol=1e-9)


def test_training_leaves_heads_and_normalisation_as_they_are(backbone):
    model = copy.deepcopy(backbone)
    heads = heads_of(model, 3, 2)
    headed = Headed(model, heads)
    before = {n: p.detach().clone() for n, p in headed.named_parameters()}
    names = [PREFIX + name for name in backbone_parameters(model)]
    masks = fastsal.Masks({n: torch.ones_like(before[n]) for n in names})
    batches = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 3, 4]))]
    loss = SegmentedCrossEntropy([3, 2])
    fastsal.finetune(headed, batches, masks, epochs=1, lr=0.1, loss=loss)
    after = dict(headed.named_parameters())
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved
    assert not any("norm" in n or ".bn" in n or "linear" in n for n in moved)
    assert PREFIX + "fc.weight" not in moved
    assert PREFIX + "head.weight" not in moved


def test_labels_compete_in_their_own_task_only():
    torch.manual_seed(0)
    outputs = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 2, 3, 4, 1, 3])
    found = SegmentedCrossEntropy([3, 2])(outputs, labels)
    for i, label in enumerate(labels):
        part, shift = (outputs[i, :3], 0) if label < 3 else (outputs[i, 3:], 3)
        want = F.cross_entropy(part[None].float(), label[None] - shift)
        assert found[i].item() == pytest.approx(want.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), outputs)
    assert gradient.isfinite().all()
    assert (gradient[1, 3:] == 0).all()


def test_a_head_without_a_gradient_is_refused(backbone):
    task = Task.cut("a", images(60, 3))
    knn = fit_heads(backbone, task, kind="knn", k=2, spec=SPEC)["a"]
    with pytest.raises(InvalidArgument, match="must be differentiable .*, got a KnnHead"):
        Headed(backbone, [knn])
    with pytest.raises(InvalidArgument, match="heads must hold at least one head"):
        Headed(backbone, [])
