"""Transfer learning: tasks, frozen heads, and the accuracy of a pruned backbone on each task."""

from fastsal.transfer.evaluation import Measurement, accuracy, evaluate, measure, measure_tasks
from fastsal.transfer.head_cache import HeadCache, load_head, save_head
from fastsal.transfer.heads import AnyHead, fit_heads
from fastsal.transfer.knn import KnnHead
from fastsal.transfer.linear_head import Head
from fastsal.transfer.own import OwnHead
from fastsal.transfer.splits import Shares
from fastsal.transfer.tasks import Task

__all__ = [
    "AnyHead",
    "Head",
    "HeadCache",
    "KnnHead",
    "Measurement",
    "OwnHead",
    "Shares",
    "Task",
    "accuracy",
    "evaluate",
    "fit_heads",
    "load_head",
    "measure",
    "measure_tasks",
    "save_head",
]
