"""Tensor splitting parallelism (TSP): run a network on a volume larger than memory, exactly.

The network is called once with handles instead of tensors (:mod:`~maisi_tools.tsp.volume`), which records a graph of
operations (:mod:`~maisi_tools.tsp.nodes`), each with a rule that tells which rows of its input a range of its output
rows needs (:mod:`~maisi_tools.tsp.rules`). A plan (:mod:`~maisi_tools.tsp.plan`) then says what is kept and where, and
the executor (:mod:`~maisi_tools.tsp.execute`) computes it slab by slab.

:class:`TSPInferer` is the form MONAI calls; :func:`~maisi_tools.tsp.run.run_in_slabs` needs torch alone.
"""

import os

from maisi_tools.tsp.errors import MemoryLimitError, TSPError

__all__ = ["MemoryLimitError", "TSPError"]

# Has torch ask for pages of 2 MiB, which makes a block's first use faster. Torch looks when it allocates its first CPU
# tensor, so this stands here, before torch is imported; a user's own setting stays.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
