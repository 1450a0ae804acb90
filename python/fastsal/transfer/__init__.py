"""Transfer: tasks, their frozen heads, and the accuracy of a pruned backbone on each."""

from fastsal.transfer.evaluation import Measurement, accuracy, evaluate, measure
from fastsal.transfer.heads import Head, fit_heads
from fastsal.transfer.tasks import Task

__all__ = ["Head", "Measurement", "Task", "accuracy", "evaluate", "fit_heads", "measure"]
