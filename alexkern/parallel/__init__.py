"""One run in several processes: a network's columns, replicas that share a batch, or both."""

from alexkern.parallel.exchange import Borders, gathered, to_first
from alexkern.parallel.mesh import Axis, Mesh, make_mesh, portion
from alexkern.parallel.replicas import replicated

__all__ = [
    "Axis",
    "Borders",
    "Mesh",
    "gathered",
    "make_mesh",
    "portion",
    "replicated",
    "to_first",
]
