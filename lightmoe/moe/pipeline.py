"""The exchange of one chunk of tokens behind the experts of another.

    exchange  dispatch 0 | dispatch 1 |  combine 0, dispatch 2 |  combine 1, dispatch 3 | ...
    compute     (shared) | experts 0  |  experts 1             |  experts 2             | ...

The calls are those of a layer without overlap, so `num_chunks` never changes a bit of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightmoe.moe.dispatch import Dispatcher, Receipt
from lightmoe.moe.experts import Experts
from lightmoe.telemetry.trace import span

SharedExpert = Callable[[Tensor], Tensor]


def run_layer(
    dispatcher: Dispatcher,
    experts: Experts,
    hidden: Tensor,
    weights: Tensor,
    receipts: Sequence[Receipt],
    shared_expert: SharedExpert | None,
    expert_ctas: int | None,
) -> Tensor:
    """Everything after the route: [T, D] -> [T, D].

    Where there are several chunks on a GPU, `expert_ctas` bounds the experts' multiprocessors: the
    exchange has the others.
    """
    if len(receipts) > 1 and dispatcher.stream is not None:
        return _overlapped(
            dispatcher, experts, hidden, weights, receipts, shared_expert, expert_ctas
        )
    parts = []
    for chunk, receipt in enumerate(receipts):
        with span("dispatch", chunk=chunk):
            rows = dispatcher.dispatch(hidden, receipt)  # [R, D]
        with span("experts", chunk=chunk):
            pairs = experts(rows, receipt, output=dispatcher.output_of(receipt))  # [P, D]
        with span("combine", chunk=chunk):
            parts.append(dispatcher.combine(pairs, weights, receipt))
    output = parts[0] if len(parts) == 1 else torch.cat(parts)
    if shared_expert is not None:
        output += shared_expert(hidden)
    return output


def _overlapped(
    dispatcher: Dispatcher,
    experts: Experts,
    hidden: Tensor,
    weights: Tensor,
    receipts: Sequence[Receipt],
    shared_expert: SharedExpert | None,
    expert_ctas: int | None,
) -> Tensor:
    """On two streams. They are joined before this returns, so what it frees is in nobody's use."""
    compute, exchange = torch.cuda.current_stream(hidden.device), dispatcher.stream
    assert exchange is not None
    parts: list[Tensor] = []
    done, pairs = compute.record_event(), hidden  # of the chunk before
    exchange.wait_stream(compute)
    with torch.cuda.stream(exchange), span("dispatch", chunk=0):
        arriving, arrived = dispatcher.dispatch(hidden, receipts[0]), exchange.record_event()
    added = None if shared_expert is None else shared_expert(hidden)
    for index, receipt in enumerate(receipts):
        rows = arriving
        compute.wait_event(arrived)
        with torch.cuda.stream(exchange):
            if index == 0:
                with span("dispatch", chunk=1):
                    arriving = dispatcher.dispatch(hidden, receipts[1])
            else:
                exchange.wait_event(done)
                last = (pairs, weights, receipts[index - 1])
                if index + 1 < len(receipts):
                    with span("exchange", chunk=index + 1):
                        arriving, part = dispatcher.exchange((hidden, receipts[index + 1]), last)
                else:
                    with span("combine", chunk=index - 1):
                        part = dispatcher.combine(*last)
                parts.append(part)
            arrived = exchange.record_event()
        rows.record_stream(compute)
        output = dispatcher.output_of(receipt)
        with span("experts", chunk=index):
            pairs = experts(rows, receipt, output=output, max_ctas=expert_ctas)
        pairs.record_stream(exchange)
        done = compute.record_event()
    with torch.cuda.stream(exchange), span("combine", chunk=len(receipts) - 1):
        exchange.wait_event(done)
        parts.append(dispatcher.combine(pairs, weights, receipts[-1]))
    compute.wait_stream(exchange)
    for part in parts:
        part.record_stream(compute)
    result = torch.cat(parts)
    return result if added is None else result.add_(added)
