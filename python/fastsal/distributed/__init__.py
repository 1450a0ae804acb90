"""Statistics and pruning by several processes: `torchrun --nproc-per-node 2 -m fastsal prune ...`.

Samples and sums are divided among the processes ("ranks"). The micro-batches of one process are
distributed to the ranks in turn, and the gradients of each parameter are sent to the rank that owns
its sums. So each rank stores `1 / ranks` of the statistics, and the sums are those of one process,
in the same order; on CPUs bit for bit, if that process runs PyTorch with as many threads as each
rank. Scores are not exchanged: a global threshold is found from histograms that are added. All
ranks get the same masks and the same weights.
"""

from fastsal.distributed.collecting import collect, save
from fastsal.distributed.failures import FailedRankError, LostRankError
from fastsal.distributed.prune import prune
from fastsal.distributed.ranks import Ranks

__all__ = ["FailedRankError", "LostRankError", "Ranks", "collect", "prune", "save"]
