"""The exchange of one chunk of tokens behind the experts of another.

    exchange  rows 0 | rows 1 | rows 2 | ...            | results 0 | results 1 | ...
    compute            up 0       | up 1        | up 2
    beside                        | down 0 (up) | down 1 (up) | down 2

Where the second product writes its results to other ranks it waits for links, and the first product
of the next chunk runs beside it, each on a part of the multiprocessors. The second's part helps the
first to its end (up). Without a stream beside both follow each other.
Where results are added up on the rank's own card that takes the products' time wherever it runs:
it is put off until the last second product, which has nothing else beside it. Till then the first's
part helps the second, too; results that leave at once would wait for the first product then.
The calls are those of a layer without overlap, so `num_chunks` never changes a bit of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightmoe.kernels.helpers import Helper, Helpers
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
    num_chunks, last = len(receipts), len(receipts) - 1
    at_once, put_off = dispatcher.exchanges_at_once, dispatcher.combines_here
    up_ctas, down_ctas = _shares(overlap, num_chunks, cut=cut, put_off=put_off)
    helpers = Helpers(hidden.device, 2 * last) if cut else None
    of_down: Helper | None = None
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

    def up(chunk: int) -> Helper | None:
        rows, arrived = arriving[chunk]
        compute.wait_event(arrived)
        helper = helpers.of(down_ctas[chunk - 1], compute) if helpers and chunk else None
        with span("experts", chunk=chunk):
            inner = experts.up(rows, receipts[chunk], max_ctas=up_ctas[chunk], helper=helper)
        inners.append(inner)
        return helper

    def down(chunk: int) -> Helper | None:
        helped = put_off and chunk < last
        helper = helpers.of(up_ctas[chunk + 1], beside) if helpers and helped else None
        with on_stream(beside, compute), span("experts", chunk=chunk):
            receipt, inner = receipts[chunk], inners[chunk]
            given = dispatcher.output_of(receipt)
            result = experts.down(
                inner, receipt, output=given, max_ctas=down_ctas[chunk], helper=helper
            )
        results.append(result)
        return helper

    def help_out(helper: Helper | None, chunk: int, stream: torch.cuda.Stream) -> None:
        if helper is not None:
            with on_stream(stream, compute), span("experts", chunk=chunk):
                helper.launch(stream)

    follow(exchange, compute)
    with on_stream(exchange, compute):
        for chunk in range(2 if at_once else num_chunks):
            dispatch(chunk)
    added = None if shared_expert is None else shared_expert(hidden)
    for chunk in range(num_chunks):
        with on_stream(exchange, compute):
            if at_once and 0 < chunk < last:
                exchange_both(chunk + 1)
            elif not put_off and chunk:
                combine(chunk - 1, chunk)
            elif put_off and chunk == last and not cut:
                combine(0, last)
        of_up = up(chunk)
        if cut:
            help_out(of_up, chunk, beside)  # behind the second product of the chunk before
            follow(beside, compute)
            help_out(of_down, chunk - 1, compute)
        if cut and put_off and chunk == last:
            follow(exchange, compute)  # where the second products had their help
            with on_stream(exchange, compute):
                combine(0, last)
        of_down = down(chunk)
        follow(exchange, beside)
    with on_stream(exchange, compute):
        combine(last, num_chunks)
    follow(compute, exchange)
    return output if added is None else output.add_(added)


def _shares(
    overlap: Overlap, num_chunks: int, *, cut: bool, put_off: bool
) -> tuple[list[int | None], list[int | None]]:
    """Multiprocessors of each chunk's first product, and of its second."""
    up_ctas, down_ctas = [overlap.expert_ctas] * num_chunks, [overlap.expert_ctas] * num_chunks
    if cut:
        for chunk in range(num_chunks - 1):
            up_ctas[chunk + 1], down_ctas[chunk] = overlap.ctas_beside(chunk, num_chunks)
        if put_off:
            down_ctas[-1] = overlap.up_ctas  # as much as an up: the sums have the others
    return up_ctas, down_ctas
