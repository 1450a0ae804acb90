"""Statistics and pruning by several processes: `torchrun --nproc-per-node 2 -m fastsal prune ...`.

Samples are shared out, and so are the sums: the micro-batches of one process are dealt out to the
ranks, and the rows of each parameter's gradients go to the rank that owns its sums. So each rank
holds `1 / ranks` of the statistics, and the sums are those of one process, in the same order; on
CPUs bit for bit, where it runs PyTorch on as many threads as each rank.
Scores stay where they are made: one threshold is found from counts that are added up. All ranks end
with the same masks and the same weights.
"""

from fastsal.distributed.collecting import collect, save
from fastsal.distributed.pruning import prune
from fastsal.distributed.ranks import Ranks

__all__ = ["Ranks", "collect", "prune", "save"]
