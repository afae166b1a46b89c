"""Losses that tenants define: what their graphs may say. The arithmetic is in ``trainer``."""

from twinkle_dask.custom_losses.graphs import (
    MAX_BYTES,
    MAX_NODES,
    Node,
    checked_graph,
)
from twinkle_dask.custom_losses.program import Program, program_of

__all__ = ["MAX_BYTES", "MAX_NODES", "Node", "Program", "checked_graph", "program_of"]
