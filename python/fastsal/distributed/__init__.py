"""Statistics and pruning by several processes: `torchrun --nproc-per-node 2 -m fastsal prune ...`.

Samples and sums are divided among the processes ("ranks"). Every rank runs the model on its part of
each micro-batch, and sends the gradients of each parameter to the rank that owns its sums. So each
rank stores `1 / ranks` of the statistics, and the sums are those of one process, in the same order.
Scores are not exchanged: a global threshold is found from histograms that are added. All ranks get
the same masks and the same weights.
"""

from fastsal.distributed.collecting import collect, save
from fastsal.distributed.prune import prune
from fastsal.distributed.ranks import Ranks

__all__ = ["Ranks", "collect", "prune", "save"]
