"""The exchange of one chunk of tokens behind the experts of another.

    exchange  rows 0 | rows 1 | rows 2 | ...            | results 0 | results 1 | ...
    compute            up 0       | up 1      | up 2
    beside                        | down 0    | down 1  | down 2

Where the second product writes its results to other ranks it waits for links, and the first product
of the next chunk runs beside it. Without a stream beside both follow each other.
Where results are added up on the rank's own card that takes the products' time wherever it runs:
it is put off until the last second product, which has nothing else beside it.
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

    Where there are several chunks on a GPU, `overlap` bounds the experts' multiprocessors.
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
    waits = experts.outpace(dispatcher.operations_per_byte)
    beside = (dispatcher.beside if waits else None) or compute
    cut = beside is not compute
    alone, num_chunks, last = overlap.expert_ctas, len(receipts), len(receipts) - 1
    at_once, put_off = dispatcher.exchanges_at_once, dispatcher.combines_here
    arriving: list[tuple[Tensor, torch.cuda.Event]] = []
    inners: list[Tensor] = []
    results: list[Tensor] = []  # of the experts
    output = torch.empty_like(hidden)
    parts = [output[receipt.tokens] for receipt in receipts]

    def dispatch(chunk: int) -> None:
        with span("dispatch", chunk=chunk):
            rows = dispatcher.dispatch(hidden, receipts[chunk])
        arriving.append((rows, exchange.record_event()))

    def combine(first: int, end: int) -> None:
        with span("combine", chunk=end - 1):
            dispatcher.combine_all(
                results[first:end], weights, receipts[first:end], parts[first:end]
            )

    def exchange_both(chunk: int) -> None:
        with span("exchange", chunk=chunk):
            rows, part = dispatcher.exchange(
                (hidden, receipts[chunk]), (results[chunk - 2], weights, receipts[chunk - 2])
            )
        arriving.append((rows, exchange.record_event()))
        parts[chunk - 2].copy_(part)

    follow(exchange, compute)
    with on_stream(exchange, compute):
        for chunk in range(2 if at_once else num_chunks):
            dispatch(chunk)
    added = None if shared_expert is None else shared_expert(hidden)
    up_ctas = alone
    for index, receipt in enumerate(receipts):
        if index == last or (index and not put_off):
            with on_stream(exchange, compute):
                if at_once and index < last:
                    exchange_both(index + 1)
                else:
                    combine(0 if put_off else index - 1, index)
        rows, arrived = arriving[index]
        compute.wait_event(arrived)
        with span("experts", chunk=index):
            inners.append(experts.up(rows, receipt, max_ctas=up_ctas))
        down_ctas = alone
        if cut:
            follow(beside, compute)
            if index < last:
                up_ctas, down_ctas = overlap.ctas_beside(index, num_chunks)
            elif put_off:
                down_ctas = overlap.up_ctas  # as much as an up: the sums have the others
        with on_stream(beside, compute), span("experts", chunk=index):
            given = dispatcher.output_of(receipt)
            down = experts.down(inners[index], receipt, output=given, max_ctas=down_ctas)
        results.append(down)
        if index >= last - 1 or not put_off:
            follow(exchange, beside)
    with on_stream(exchange, compute):
        combine(last, num_chunks)
    follow(compute, exchange)
    return output if added is None else output.add_(added)
