"""The moves of kept weights are those of one plain solve for each row."""

from __future__ import annotations

import pytest
import torch

from fastsal.pruning.reconstruction import solving
from fastsal.pruning.reconstruction.solving import solve_rows

pytestmark = pytest.mark.usefixtures("one_thread")


def problem(groups, outputs, width, kept, rows=None):
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(groups, rows or 3 * width, width, generator=generator, dtype=torch.float64)
    x[:, :, 0] *= 10
    moments = x.transpose(1, 2) @ x / x.shape[1]
    residuals = torch.randn(groups, outputs, width, generator=generator, dtype=torch.float64)
    masks = torch.rand(groups, outputs, width, generator=generator) < kept
    return moments, residuals, masks


def plain(moments, residuals, kept, damping):
    found = torch.zeros_like(residuals)
    for g in range(kept.shape[0]):
        for o in range(kept.shape[1]):
            at = kept[g, o].nonzero()[:, 0]
            matrix = moments[g][at][:, at] + damping[g] * torch.eye(len(at), dtype=torch.float64)
            found[g, o, at] = torch.linalg.solve(matrix, residuals[g, o, at])
    return found


@pytest.mark.parametrize("kept", [0.05, 0.5, 1.0])
@pytest.mark.parametrize(("groups", "outputs", "width"), [(1, 7, 33), (3, 2, 9), (8, 1, 25)])
def test_rows_are_solved_one_by_one(groups, outputs, width, kept):
    moments, residuals, masks = problem(groups, outputs, width, kept)
    damping = torch.linspace(1e-6, 0.1, groups, dtype=torch.float64)
    found = solve_rows(moments, residuals, masks, damping)
    torch.testing.assert_close(
        found, plain(moments, residuals, masks, damping), rtol=1e-9, atol=1e-9
    )
    assert not bool(found[~masks].any())


@pytest.mark.parametrize("width", [20, 200])
def test_rows_that_keep_the_same_inputs_or_none_are_solved_together(width, monkeypatch):
    monkeypatch.setattr(solving, "_by_factorization", None)
    monkeypatch.setattr(solving, "_by_conjugate_gradients", None)
    moments, residuals, _ = problem(2, 30, width, 1.0)
    columns = torch.rand(2, 1, width, generator=torch.Generator().manual_seed(0)) < 0.6
    rows = torch.arange(30)[:, None] % 3 != 0
    masks = columns & rows
    damping = torch.tensor([0.0, 0.1], dtype=torch.float64)
    found = solve_rows(moments, residuals, masks, damping)
    torch.testing.assert_close(found, plain(moments, residuals, masks, damping))
    assert not bool(found[~masks].any())
    broken = moments.clone()
    broken[0, :3, :3] = -1.0  # not positive definite
    found = solve_rows(broken, residuals, columns.expand(2, 30, width), damping)
    assert bool(found[0][columns[0].expand(30, width)].isnan().all())
    torch.testing.assert_close(
        found[1], plain(moments, residuals, columns.expand(2, 30, width), damping)[1]
    )


def test_rows_of_very_different_sizes_share_a_chunk(monkeypatch):
    moments, residuals, masks = problem(1, 9, 40, 1.0)
    for o in range(9):
        masks[0, o, 5 * o :] = False
    damping = torch.full((1,), 1e-3, dtype=torch.float64)
    wanted = plain(moments, residuals, masks, damping)
    for chunk in (1, 30_000, 2**27):
        monkeypatch.setattr(solving, "_CHUNK_BYTES", chunk)
        torch.testing.assert_close(solve_rows(moments, residuals, masks, damping), wanted)


def test_singular_moments_need_damping():
    moments, residuals, masks = problem(1, 3, 20, 1.0, rows=5)
    damping = torch.full((1,), 0.01, dtype=torch.float64)
    found = solve_rows(moments, residuals, masks, damping)
    torch.testing.assert_close(found, plain(moments, residuals, masks, damping))
    constant = solve_rows(torch.zeros_like(moments), residuals, masks, 0 * damping)
    assert bool(constant.isnan().all())  # reported, not a huge number


def test_many_kept_inputs_of_many_rows_lower_the_objective(monkeypatch):
    """Conjugate gradients end near the solution, and each step is better than the one before."""
    moments, residuals, masks = problem(2, 30, 60, 0.9)
    damping = torch.full((2,), 0.05, dtype=torch.float64)
    wanted = plain(moments, residuals, masks, damping)

    def objective(moves):
        image = moves @ moments + damping[:, None, None] * moves
        return float((moves * image / 2 - moves * residuals).sum())

    best, values = objective(wanted), [0.0]
    for steps in (1, 2, 4, 8, 60):
        monkeypatch.setattr(solving, "_STEPS", steps)
        found = solving._by_conjugate_gradients(moments, residuals, masks, damping)
        assert not bool(found[~masks].any())
        values.append(objective(found))
    assert values == sorted(values, reverse=True)
    assert values[-1] - best < 1e-4 * abs(best)
    monkeypatch.setattr(solving, "_STEPS", 2)
    chosen = solve_rows(moments, residuals, masks, damping)  # fewer operations than factorization
    assert objective(chosen) == pytest.approx(values[2])
