"""Tensor splitting parallelism (TSP): run a network on a volume larger than memory, exactly.

The network is called once with handles instead of tensors (:mod:`~maisi_tools.tsp.volume`), which records a graph of
operations (:mod:`~maisi_tools.tsp.nodes`), each with a rule that tells which rows of its input a range of its output
rows needs (:mod:`~maisi_tools.tsp.rules`). A plan (:mod:`~maisi_tools.tsp.plan`) then says what is kept and where, and
the executor (:mod:`~maisi_tools.tsp.execute`) computes it slab by slab.

:class:`TSPInferer` is the form MONAI calls; :func:`~maisi_tools.tsp.run.run_in_slabs` needs torch alone.
"""

from maisi_tools.tsp.errors import MemoryLimitError, TSPError
from maisi_tools.tsp.heap import ask_for_huge_pages

__all__ = ["MemoryLimitError", "TSPError"]

ask_for_huge_pages()
