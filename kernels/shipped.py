"""The launches that training makes, at the shapes that matter, from tensors that hold nothing.

`offline.py` compiles each for every architecture, the tests hold each to its budget, and the bench
prints each one's figures. A launch is made by the door's own function, so it cannot differ from
what runs.
"""

from collections.abc import Callable

from backmix.kernels.launch import Launch

SHIPPED: dict[str, Callable[[], dict[str, Launch]]] = {}
"""By door: the launches by the name of the case."""
