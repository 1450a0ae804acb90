"""P1 and P2: differences against an obvious computation, verdicts against the printed rule."""

from __future__ import annotations

import statistics

import pytest

from fastsal.study.report.findings import Change, judge_pruning, judge_tuning, pooled, sections
from fastsal.study.report.intervals import Interval
from fastsal.study.report.results import Variant, read_results
from fastsal.study.report.summaries import winner, wins

from .study_folder import change_table, read_table, write_study

METHOD = Variant("obs-greedy", 1, "obs-greedy", 0)


def judged(folder, margin=1.0):
    return sections(read_results(folder), margin)


def slow_changes(path, criterion, sparsity, later, earlier):
    """Mean over tasks within a seed, in points, from the text of the file."""
    rows = [r for r in read_table(path)
            if r["criterion"] == criterion and float(r["sparsity"]) == sparsity
            and r["status"] == "done"]  # fmt: skip
    found = {}
    for role in ("source", "transfer"):
        found[role] = [
            statistics.fmean(
                100 * (float(r[later]) - float(r[earlier]))
                for r in rows
                if r["seed"] == seed and r["role"] == role
            )
            for seed in sorted({r["seed"] for r in rows})
        ]
    return found


@pytest.mark.parametrize(("which", "later", "earlier"),
                         [("p1", "pruned", "dense"), ("p2", "tuned", "pruned")])  # fmt: skip
def test_changes_are_paired_by_seed(tmp_path, which, later, earlier):
    stats = pytest.importorskip("scipy.stats", reason="needs SciPy to compare with")
    folder = write_study(tmp_path, failed=[("magnitude", 0.9, 1)])
    (part,) = judged(folder)
    found = getattr(part, which)
    assert len(found) == 15
    for finding in found:
        change = finding.change
        slow = slow_changes(
            folder / "results.csv", change.variant.criterion, change.sparsity, later, earlier
        )
        gap = [t - s for s, t in zip(slow["source"], slow["transfer"], strict=True)]
        for interval, values in (
            (change.source, slow["source"]), (change.transfer, slow["transfer"]), (change.gap, gap)
        ):  # fmt: skip
            n = len(values)
            low, high = stats.t.interval(0.95, n - 1, statistics.fmean(values), stats.sem(values))
            assert (
                interval.n
                == n
                == (2 if (change.variant.criterion, change.sparsity) == ("magnitude", 0.9) else 3)
            )
            assert interval.mean == pytest.approx(statistics.fmean(values), abs=1e-9)
            assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-8)


def change_of(source, transfer):
    def interval(bounds):
        return None if bounds is None else Interval(sum(bounds) / 2, *bounds, n=3)

    return Change(METHOD, 0.7, interval(source), interval(transfer), None, None, {})


P1_CASES = [
    ((-0.9, 0.1), (-0.5, 0.3), "kept", "kept", "held"),
    ((-1.0, 0.1), (-1.0, -0.2), "kept", "kept", "held"),  # a bound on the margin is kept
    ((-1.1, 0.1), (-0.5, 0.3), "inconclusive", "kept", "inconclusive"),
    ((-1.1, -0.1), (-0.5, 0.3), "dropped", "kept", "did not hold"),
    ((-0.5, 0.5), (-9.0, -7.0), "kept", "dropped", "did not hold"),
    ((-1.1, 0.0), (-5.0, 3.0), "inconclusive", "inconclusive", "inconclusive"),
    (None, (-0.5, 0.3), "not measured", "kept", "not measured"),
]
P2_CASES = [
    ((0.1, 2.0), (-0.9, 0.5), "raised", "not lowered", "held"),
    ((0.1, 2.0), (0.2, 0.5), "raised", "raised", "held"),
    ((0.0, 2.0), (0.2, 0.5), "inconclusive", "raised", "inconclusive"),
    ((-2.0, 0.0), (0.2, 0.5), "not raised", "raised", "did not hold"),
    ((0.1, 2.0), (-3.0, -0.5), "raised", "lowered", "did not hold"),
    ((0.1, 2.0), (-3.0, 0.5), "raised", "inconclusive", "inconclusive"),
    ((0.1, 2.0), None, "raised", "not measured", "not measured"),
]


@pytest.mark.parametrize(("source", "transfer", "first", "second", "verdict"), P1_CASES)
def test_rule_of_p1(source, transfer, first, second, verdict):
    found = judge_pruning(change_of(source, transfer), 1.0)
    assert (found.source, found.transfer, found.verdict) == (first, second, verdict)


@pytest.mark.parametrize(("source", "transfer", "first", "second", "verdict"), P2_CASES)
def test_rule_of_p2(source, transfer, first, second, verdict):
    found = judge_tuning(change_of(source, transfer), 1.0)
    assert (found.source, found.transfer, found.verdict) == (first, second, verdict)


def test_one_seed_gives_no_verdict(tmp_path):
    (part,) = judged(write_study(tmp_path, seeds=(3,)))
    assert {f.verdict for f in [*part.p1, *part.p2]} == {"no interval"}
    assert all(f.change.source.low is None for f in part.p1)


def test_a_wider_margin_never_takes_back_what_held(tmp_path):
    folder = write_study(tmp_path)
    (narrow,), (wide,) = judged(folder, 0.5), judged(folder, 30.0)
    was = [f.verdict == "held" for f in narrow.p1]
    now = [f.verdict == "held" for f in wide.p1]
    assert all(b for a, b in zip(was, now, strict=True) if a)
    assert sum(now) > sum(was)


def test_a_seed_that_lacks_a_task_is_left_out_of_the_mean(tmp_path):
    folder = write_study(tmp_path, criteria=("obs-greedy",), sparsities=(0.7,))
    change_table(
        folder / "results.csv",
        lambda rows: [r for r in rows if (r["task"], r["seed"]) != ("mnist", "1")],
    )
    (part,) = judged(folder)
    assert part.p1[0].change.transfer.n == 2
    assert part.p1[0].change.source.n == 3


def test_without_fine_tuning_there_is_no_p2(tmp_path):
    (part,) = judged(write_study(tmp_path, tuned=False))
    assert part.p2 == []
    assert len(part.p1) == 15


def test_without_transfer_tasks_p1_is_not_measured(tmp_path):
    (part,) = judged(write_study(tmp_path, transfer=()))
    assert {f.verdict for f in part.p1} == {"not measured", "did not hold"}
    assert all(f.change.transfer is None and f.change.worst is None for f in part.p1)


def test_pooled_is_the_mean_over_the_grid_within_a_seed(tmp_path):
    folder = write_study(tmp_path)
    (part,) = judged(folder)
    count, source, transfer = pooled(part.p2)
    whole = {"source": [], "transfer": []}
    for finding in part.p2:
        slow = slow_changes(folder / "results.csv", finding.change.variant.criterion,
                            finding.change.sparsity, "tuned", "pruned")  # fmt: skip
        for role, values in slow.items():
            whole[role].append(values)
    assert count == 15
    for interval, role in ((source, "source"), (transfer, "transfer")):
        means = [statistics.fmean(column) for column in zip(*whole[role], strict=True)]
        assert interval.mean == pytest.approx(statistics.fmean(means))
        assert interval.high - interval.mean == pytest.approx(
            4.302652729911275 * statistics.stdev(means) / 3**0.5
        )


def test_pooled_leaves_out_a_seed_that_failed_somewhere(tmp_path):
    (part,) = judged(write_study(tmp_path, failed=[("magnitude", 0.9, 1)]))
    assert pooled(part.p2)[1].n == 2


def test_winner_has_the_highest_mean_and_its_margin_is_paired(tmp_path):
    folder = write_study(tmp_path)
    (part,) = judged(folder)
    rows = [r for r in read_table(folder / "results.csv")
            if r["task"] == "mnist" and float(r["sparsity"]) == 0.9]  # fmt: skip
    means = {
        c: statistics.fmean(float(r["tuned"]) for r in rows if r["criterion"] == c)
        for c in {r["criterion"] for r in rows}
    }
    first, second, *_ = sorted(means, key=means.get, reverse=True)
    best = winner(part, "mnist", 0.9, after=True)
    assert best.variant.criterion == first
    assert best.second == second
    assert best.accuracy == pytest.approx(means[first])
    assert best.margin.startswith(f"+{100 * (means[first] - means[second]):.2f} [")


def test_worst_task_is_that_of_the_least_mean(tmp_path):
    folder = write_study(tmp_path, criteria=("obs-greedy",), sparsities=(0.9,))

    def change(rows):
        for r in rows:
            if r["task"] == "digits":
                r["pruned"] = repr(float(r["dense"]) - 0.5)

    change_table(folder / "results.csv", change)
    (part,) = judged(folder)
    task, value = part.p1[0].change.worst
    assert task == "digits"
    assert value == pytest.approx(-50)


def test_cells_with_nothing_pruned_are_a_control_and_judged_by_nobody(tmp_path):
    (part,) = judged(write_study(tmp_path, sparsities=(0.0, 0.7)))
    assert {f.change.sparsity for f in [*part.p1, *part.p2]} == {0.7}
    assert part.pruned_at == [0.7]
    assert part.control.sparsity == 0
    assert part.control.source.n == 3


def test_a_tie_is_nobodys_win(tmp_path):
    folder = write_study(tmp_path, criteria=("obs-greedy", "magnitude"), sparsities=(0.5,))

    def change(rows):
        for r in rows:
            if r["task"] == "mnist":
                r["pruned"] = "0.5"

    change_table(folder / "results.csv", change)
    (part,) = judged(folder)
    counts, ties = wins(part, after=False)
    assert ties == 1
    assert sum(count for _, count in counts) == len(part.tasks) - 1
