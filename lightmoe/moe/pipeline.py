"""The exchange of one chunk of tokens behind the experts of another.

    exchange  rows 0 | rows 1 | rows 2 | ...  | results 0 | results 1 | ...
    compute            up 0       | up 1      | up 2      | ...
    beside                        | down 0    | down 1    | ...

Where the second product writes its results to other ranks it waits for links, and the first product
of the next chunk runs beside it. Without a stream beside both follow each other.
The calls are those of a layer without overlap, so `num_chunks` never changes a bit of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightmoe.kernels.streams import on_stream
from lightmoe.moe.dispatch import Dispatcher, Receipt
from lightmoe.moe.experts import Experts
from lightmoe.moe.overlap_model import Overlap
from lightmoe.telemetry.trace import span

SharedExpert = Callable[[Tensor], Tensor]


def run_layer(
    dispatcher: Dispatcher,
    experts: Experts,
    hidden: Tensor,
    weights: Tensor,
    receipts: Sequence[Receipt],
    shared_expert: SharedExpert | None,
    overlap: Overlap,
) -> Tensor:
    """Everything after the route: [T, D] -> [T, D].

    Where there are several chunks on a GPU, `overlap` bounds the experts' multiprocessors: the
    exchange has the others.
    """
    if len(receipts) > 1 and dispatcher.stream is not None:
        return _overlapped(dispatcher, experts, hidden, weights, receipts, shared_expert, overlap)
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
    overlap: Overlap,
) -> Tensor:
    """On three streams, joined before this returns, so what it frees is in nobody's use."""
    compute, exchange = torch.cuda.current_stream(hidden.device), dispatcher.stream
    assert exchange is not None
    beside = dispatcher.beside or compute
    alone, cut = overlap.expert_ctas, dispatcher.beside is not None
    at_once, last = dispatcher.exchanges_at_once, len(receipts) - 1
    arriving: list[tuple[Tensor, torch.cuda.Event]] = []
    parts: list[Tensor] = []
    done, pairs = compute.record_event(), hidden  # of the chunk before

    def dispatch(chunk: int) -> None:
        with span("dispatch", chunk=chunk):
            rows = dispatcher.dispatch(hidden, receipts[chunk])
        arriving.append((rows, exchange.record_event()))

    def combine(chunk: int) -> None:
        exchange.wait_event(done)
        with span("combine", chunk=chunk):
            parts.append(dispatcher.combine(pairs, weights, receipts[chunk]))

    def exchange_both(chunk: int) -> None:
        exchange.wait_event(done)
        with span("exchange", chunk=chunk):
            rows, part = dispatcher.exchange(
                (hidden, receipts[chunk]), (pairs, weights, receipts[chunk - 2])
            )
        arriving.append((rows, exchange.record_event()))
        parts.append(part)

    exchange.wait_stream(compute)
    with on_stream(exchange, compute):
        for chunk in range(2 if at_once else len(receipts)):
            dispatch(chunk)
    added = None if shared_expert is None else shared_expert(hidden)
    for index, receipt in enumerate(receipts):
        if index:
            with on_stream(exchange, compute):
                if at_once and index < last:
                    exchange_both(index + 1)
                else:
                    combine(index - 1)
        rows, arrived = arriving[index]
        compute.wait_event(arrived)
        rows.record_stream(compute)
        with span("experts", chunk=index):
            up_ctas = overlap.up_ctas if cut and index else alone
            inner = experts.up(rows, receipt, max_ctas=up_ctas)
        if cut:
            beside.wait_stream(compute)
        with on_stream(beside, compute), span("experts", chunk=index):
            down_ctas = overlap.down_ctas if cut and index < last else alone
            output = dispatcher.output_of(receipt)
            pairs = experts.down(inner, receipt, output=output, max_ctas=down_ctas)
            done = beside.record_event()
        inner.record_stream(beside)
        pairs.record_stream(exchange)
    with on_stream(exchange, compute):
        combine(last)
    compute.wait_stream(exchange)
    for part in parts:
        part.record_stream(compute)
    result = torch.cat(parts)
    return result if added is None else result.add_(added)
