"""One rule per operation: how rows of its result are computed from rows of its inputs.

A rule takes ``(recorder, func, args, kwargs)`` of the intercepted call, with :class:`~maisi_tools.tsp.volume.Volume`
handles among the arguments, and returns the result's :class:`~maisi_tools.tsp.nodes.Node` (or a tuple of nodes), or
None when this use of the operation has no rule: then it runs on the gathered tensor.
"""

from maisi_tools.tsp.rules import attention, layout, norms, pointwise, resize, windows
from maisi_tools.tsp.rules.table import MIXED, RULES

__all__ = ["MIXED", "RULES", "attention", "layout", "norms", "pointwise", "resize", "windows"]
