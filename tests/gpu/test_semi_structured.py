"""2:4 weights as PyTorch stores them on a GPU: in a file, and while a model is measured."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastsal
from fastsal.deploy.meter import measure_against
from fastsal.deploy.semi_structured import (
    has_two_of_four,
    semi_structured,
    two_of_four_layers,
)
from fastsal.errors import InvalidArgument


class Wide(nn.Module):
    """Two layers that PyTorch can compress, one whose shape it cannot, and one without zeros."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3 * 8 * 8, 128), nn.Linear(128, 64)
        self.narrow, self.head = nn.Linear(64, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.fc2(torch.relu(self.fc1(x.flatten(1))))
        return self.head(torch.relu(self.narrow(x)))


@pytest.fixture
def pruned():
    torch.manual_seed(0)
    model = Wide().eval()
    weights = {n: p for n, p in model.named_parameters() if p.ndim == 2 and "head" not in n}
    masks = fastsal.rank(
        {n: p.detach() ** 2 for n, p in weights.items()}, pattern="2:4", model=model
    )
    masks.apply(model)
    return model


@pytest.fixture
def images():
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_layers_are_known_by_their_zeros(pruned):
    assert list(two_of_four_layers(pruned)) == ["fc1", "fc2", "narrow"]
    assert has_two_of_four(torch.tensor([[0.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 3.0]]))
    assert not has_two_of_four(torch.tensor([[1.0, 1.0, 2.0, 0.0]]))
    assert not has_two_of_four(torch.tensor([[0.0, 1.0, 2.0, 0.0, 0.0, 0.0]]))
    assert not has_two_of_four(torch.zeros(4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_is_refused(pruned, images, tmp_path):
    for call in (
        lambda: fastsal.export(pruned, tmp_path / "x.pt", "torch-2:4", images=images),
        lambda: measure_against(pruned, pruned, images, runtime="torch-2:4"),
    ):
        with pytest.raises(InvalidArgument, match="requires a GPU of CUDA.*there is none here"):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_file_has_the_same_weights_and_outputs(pruned, images, tmp_path, dtype):
    before = copy.deepcopy(pruned.state_dict())
    path = tmp_path / "pruned.pt"
    found = fastsal.export(pruned, path, "torch-2:4", images=images, dtype=dtype)
    assert found.values == 192 * 128 + 128 * 64
    assert found.zeros == found.values // 2
    assert found.difference <= 1e-2
    assert found.bytes == path.stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["pruned.pt"]
    for name, value in pruned.state_dict().items():
        assert torch.equal(value, before[name]), name
    stored = torch.load(path, weights_only=False)
    model = Wide().to("cuda", getattr(torch, dtype)).eval()
    model.load_state_dict(stored, assign=True)
    with torch.no_grad():
        got = model(images.to("cuda", getattr(torch, dtype))).float().cpu()
    assert (got - pruned(images)).abs().max() <= 0.05 * pruned(images).abs().max()


@pytest.mark.gpu
def test_layers_that_cannot_be_compressed_stay_dense(pruned):
    stored, layers = semi_structured(pruned, torch.float16)
    assert layers == {"fc1": 192 * 128, "fc2": 128 * 64}
    assert type(stored.narrow.weight) is nn.Parameter
    with pytest.raises(InvalidArgument, match="no linear layer has two zeros"):
        semi_structured(Wide(), torch.float16)


@pytest.mark.gpu
def test_a_measurement_names_what_is_skipped(pruned, images):
    dense = Wide().eval()
    found = measure_against(dense, pruned, images, batches=[1, 4], runtime="torch-2:4", seconds=0.1)
    assert f"PyTorch skips {(192 * 128 + 128 * 64) // 2:,} of them" in found.zeros
    assert found.machine["gpu"]
    assert [timing.batch for timing in found.timings] == [1, 4]
