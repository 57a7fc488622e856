"""The implementations that the layer bench compares, one module each.

An implementation is a function `make(problem) -> call`: it may prepare and keep whatever it wants
of one Problem (problem.py) before it returns. `call()` then computes the layer from
`problem.hidden` and `problem.logits` and returns the output [T, D]: `problem.output`, written in
full, or a tensor of its own. It runs inside a CUDA graph, so it may not synchronise. What the
implementation cannot do it says by raising Unsupported. A text `call.tile`, where there is one,
goes into the row.
"""


class Unsupported(Exception):  # noqa: N818
    """The implementation has no such dtype, or its package is absent; the row is left out."""
