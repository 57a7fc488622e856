"""The exchange of one chunk of tokens behind the experts of another.

    exchange  rows 0 | rows 1 | rows 2 | ...            | results 0 | results 1 | ...
    compute            up 0       | up 1      | up 2
    beside                        | down 0    | down 1  | down 2

Where the second product writes its results to other ranks it waits for links, and the first product
of the next chunk runs beside it. Without a stream beside both follow each other.
Where results are added up on the rank's own card that takes the products' time wherever it runs:
it is put off until the last second product, which waits for links and has nothing beside it.
The calls are those of a layer without overlap, so `num_chunks` never changes a bit of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightmoe.kernels.streams import follow, on_stream
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
    """On three streams, joined before this returns, so what it frees is in nobody's use.

    Until then it frees nothing: what one stream reads of another's lives as long. Later uses of the
    others begin behind this one, so memory that they get again is read by nobody any more.
    """
    compute, exchange = torch.cuda.current_stream(hidden.device), dispatcher.stream
    assert exchange is not None
    beside = dispatcher.beside or compute
    alone, cut = overlap.expert_ctas, dispatcher.beside is not None
    at_once, last = dispatcher.exchanges_at_once, len(receipts) - 1
    put_off, waits = dispatcher.combines_here, experts.waits_for_links
    arriving: list[tuple[Tensor, torch.cuda.Event]] = []
    parts: list[Tensor] = []
    inners: list[Tensor] = []
    results: list[Tensor] = []  # of the experts

    def dispatch(chunk: int) -> None:
        with span("dispatch", chunk=chunk):
            rows = dispatcher.dispatch(hidden, receipts[chunk])
        arriving.append((rows, exchange.record_event()))

    def combine(chunk: int) -> None:
        with span("combine", chunk=chunk):
            parts.append(dispatcher.combine(results[chunk], weights, receipts[chunk]))

    def exchange_both(chunk: int) -> None:
        with span("exchange", chunk=chunk):
            rows, part = dispatcher.exchange(
                (hidden, receipts[chunk]), (results[chunk - 2], weights, receipts[chunk - 2])
            )
        arriving.append((rows, exchange.record_event()))
        parts.append(part)

    follow(exchange, compute)
    with on_stream(exchange, compute):
        for chunk in range(2 if at_once else len(receipts)):
            dispatch(chunk)
    added = None if shared_expert is None else shared_expert(hidden)
    for index, receipt in enumerate(receipts):
        with on_stream(exchange, compute):
            if at_once and 0 < index < last:
                exchange_both(index + 1)
            elif not put_off and index:
                combine(index - 1)
            elif put_off and index == last:
                for chunk in range(last):
                    combine(chunk)
        rows, arrived = arriving[index]
        compute.wait_event(arrived)
        with span("experts", chunk=index):
            up_ctas = overlap.up_ctas if cut and index else alone
            inners.append(experts.up(rows, receipt, max_ctas=up_ctas))
        if cut:
            follow(beside, compute)
        with on_stream(beside, compute), span("experts", chunk=index):
            down_ctas = overlap.down_ctas if cut and index < last else alone
            if put_off and waits and index == last:
                down_ctas = overlap.up_ctas  # the sums have the others
            output = dispatcher.output_of(receipt)
            down = experts.down(inners[index], receipt, output=output, max_ctas=down_ctas)
        results.append(down)
        follow(exchange, beside)
    with on_stream(exchange, compute):
        combine(last)
    follow(compute, exchange)
    result = torch.cat(parts)
    return result if added is None else result.add_(added)
