"""The one exception of the graph folder."""

from __future__ import annotations


class GraphError(ValueError):
    """A graph that a pass cannot transform, or that breaks its contract; the message says why and names the node."""
