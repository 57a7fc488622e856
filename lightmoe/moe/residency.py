"""Experts that take turns in a rank's slots, where those do not suffice for all: the rest live in
the host's memory.

What a layer needs is in its slots before it runs; what the next one may need is fetched meanwhile,
by a guess. The guess is the next layer's gate over this layer's hidden states (Eliseev and Mazur,
Fast Inference of Mixture-of-Experts Language Models with Offloading, 2023), of the tokens of all
ranks, and for the first layer what it needed in the step before. A wrong guess costs time, never an
answer.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightmoe.core import HostTierCounts
from lightmoe.moe.tables import PlacementTables
from lightmoe.telemetry.trace import span

Key = tuple[int, int]
"""(layer, expert), of the layers that have experts."""


class SlotCache:
    """Which expert is in which slot, and who has to go.

    That is an expert of the layer whose turn is furthest ahead, there the least recently used one.
    Layers run in turn, so the least recently used of all would be one of the very next layer: that
    found 0.3 % of mixtral-lite's experts in their slots, and this 35 %, on four ranks with slots
    for half of them, 16 sequences and no guess (benchmarks/bench_host_tier.py).
    """

    def __init__(self, num_slots: int, num_layers: int) -> None:
        self._slots: list[dict[int, int]] = [{} for _ in range(num_layers)]  # slots[layer][expert]
        self._free = list(reversed(range(num_slots)))
        self._used: dict[Key, int] = {}
        self._clock = 0

    def slot(self, key: Key) -> int:
        """Where an expert is; -1 where it is in no slot."""
        layer, expert = key
        return self._slots[layer].get(expert, -1)

    def use(self, keys: Iterable[Key]) -> None:
        """These are needed now."""
        self._clock += 1
        self._used.update(dict.fromkeys(keys, self._clock))

    def put(self, key: Key, running_layer: int, keep: Collection[Key]) -> tuple[bool, Key | None]:
        """Give an expert a slot: whether there was one, and who had to go. None of `keep` does."""
        assert self.slot(key) < 0, "an expert has one slot"
        layer, expert = key
        if self._free:
            self._slots[layer][expert] = self._free.pop()
            return True, None
        displaced = self._next_to_go(running_layer, keep)
        if displaced is None:
            return False, None
        self._slots[layer][expert] = self._slots[displaced[0]].pop(displaced[1])
        return True, displaced

    def put_back(self, key: Key, displaced: Key | None) -> None:
        """Undo a `put`: the slot has not been written."""
        slot = self._slots[key[0]].pop(key[1])
        if displaced is None:
            self._free.append(slot)
        else:
            self._slots[displaced[0]][displaced[1]] = slot

    def _next_to_go(self, running_layer: int, keep: Collection[Key]) -> Key | None:
        num_layers = len(self._slots)
        for turns_ago in range(num_layers):  # the running layer's next turn is the last to come
            layer = (running_layer - turns_ago) % num_layers
            keys = [(layer, expert) for expert in self._slots[layer] if (layer, expert) not in keep]
            if keys:
                return min(keys, key=lambda key: self._used.get(key, 0))
        return None


@dataclass(frozen=True, slots=True)
class _Copy:
    """An expert on its way into its slot, and whom it displaced there."""

    future: Future[None]
    displaced: Key | None


class Residency:
    """The experts of one rank: all of them in `host` [H, elements], some in `blobs` [S, elements].

    `rows` int32 [L, E] is the row in `host` of each expert, -1 for those of other ranks. There must
    be a slot for every expert of a layer that is here.
    """

    def __init__(
        self, blobs: Tensor, host: Tensor, rows: np.ndarray, tables: PlacementTables
    ) -> None:
        assert len(blobs) >= (rows >= 0).sum(axis=1).max(initial=0), "slots for one layer's experts"
        self._blobs = blobs
        self._host = host
        self._rows = rows
        self._tables = tables
        self._cache = SlotCache(len(blobs), len(rows))
        self._under_way: dict[Key, _Copy] = {}
        self._ahead: set[Key] = set()  # fetched by a guess and not needed so far
        self._needed_last: list[list[int]] = [[] for _ in rows]
        # One thread copies in the order asked for, so two never write one slot at once.
        self._thread = ThreadPoolExecutor(
            1, "lightmoe-host-tier", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._stream = torch.cuda.Stream(blobs.device) if blobs.is_cuda else None
        self._counts = HostTierCounts()
        self._num_fetched = 0  # written by the thread alone
        self._num_told = 0

    def enter(self, layer: int, everyone: Tensor, num_chosen: int) -> None:
        """Have what a layer needs in slots, then begin to fetch for the next one.

        `everyone` [N, K + P], in the host's memory: for the tokens of all ranks the `num_chosen` =
        K experts that each chose, and P of the next layer as guessed; P may be 0.
        """
        chosen, guessed = np.split(everyone.numpy(), [num_chosen], axis=1)
        following = (layer + 1) % len(self._rows)
        needed = self._needed_last[layer] = self._here(layer, chosen)
        with span("residency", layer):
            self._require(layer, needed)
        wanted = self._here(following, guessed) if guessed.size else self._needed_last[following]
        self._fetch_ahead(layer, needed, [(following, expert) for expert in wanted])

    def take_counts(self) -> HostTierCounts:
        """What was counted since the last call."""
        num_fetched, counts = self._num_fetched, self._counts
        num_new = num_fetched - self._num_told
        self._counts, self._num_told = HostTierCounts(), num_fetched
        blob_bytes = self._host.shape[1] * self._host.element_size()
        return counts + HostTierCounts(fetched_bytes=num_new * blob_bytes)

    def _here(self, layer: int, experts: np.ndarray) -> list[int]:
        """The experts of this rank among these, those with most tokens first."""
        chosen = experts[experts >= 0]  # -1 is none: a pair that was dropped
        counts = np.bincount(chosen, minlength=self._rows.shape[1])
        counts[self._rows[layer] < 0] = 0
        order = np.argsort(-counts, kind="stable")
        here: list[int] = order[: np.count_nonzero(counts)].tolist()
        return here

    def _require(self, layer: int, experts: Sequence[int]) -> None:
        keys = [(layer, expert) for expert in experts]
        self._settle()
        self._call_off(keys)
        absent = [key for key in keys if self._cache.slot(key) < 0]
        missed = [*(key for key in keys if key in self._under_way), *absent]
        in_time = self._ahead.intersection(keys).difference(missed)
        self._ahead.difference_update(keys)
        started = time.perf_counter()
        for key in absent:
            if not self._fetch(key, layer, keys):
                self._settle(wait=True)  # a copy that nobody needs has the last slot
                fetched = self._fetch(key, layer, keys)
                assert fetched, "there are slots for all experts of a layer"
        if missed:
            self._settle(wait=True)
        self._cache.use(keys)
        slots = [self._cache.slot((layer, expert)) for expert in range(self._rows.shape[1])]
        self._tables.put_slots(layer, slots)
        self._counts += HostTierCounts(
            num_hits=len(keys) - len(missed),
            num_misses=len(missed),
            num_prefetched=len(in_time),
            waited_seconds=time.perf_counter() - started if missed else 0.0,
        )

    def _fetch_ahead(self, layer: int, needed: Sequence[int], wanted: Sequence[Key]) -> None:
        """Begin to fetch what is guessed, as far as there are slots that neither layer needs."""
        keep = {*((layer, expert) for expert in needed), *wanted}
        for key in wanted:
            if self._cache.slot(key) < 0:
                if not self._fetch(key, layer, keep):
                    return
                self._ahead.add(key)

    def _fetch(self, key: Key, running_layer: int, keep: Collection[Key]) -> bool:
        """Begin to copy an expert into a slot; False where none may be had."""
        found, displaced = self._cache.put(key, running_layer, {*keep, *self._under_way})
        if not found:
            return False
        if displaced is not None:
            self._ahead.discard(displaced)
        # What is enqueued so far may still read the slot, what comes later will not.
        free = None
        if self._stream is not None:
            free = torch.cuda.current_stream(self._blobs.device).record_event()
        slot, row = self._cache.slot(key), int(self._rows[key])
        self._under_way[key] = _Copy(self._thread.submit(self._copy, slot, row, free), displaced)
        return True

    def _copy(self, slot: int, row: int, free: torch.cuda.Event | None) -> None:
        """On the thread: one expert into its slot, and at the end it is there."""
        if self._stream is None or free is None:
            self._blobs[slot].copy_(self._host[row])
        else:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(free)
                self._blobs[slot].copy_(self._host[row], non_blocking=True)
            self._stream.synchronize()
        self._num_fetched += 1

    def _settle(self, wait: bool = False) -> None:
        """Take what has arrived, with `wait` all that is under way; raises what went wrong."""
        for key, copy in list(self._under_way.items()):
            if wait or copy.future.done():
                copy.future.result()
                del self._under_way[key]

    def _call_off(self, keep: Sequence[Key]) -> None:
        """Drop guesses that were wrong and have not begun: nothing waits behind them."""
        for key, copy in list(self._under_way.items()):
            if key not in keep and copy.future.cancel():
                del self._under_way[key]
                self._ahead.discard(key)
                self._cache.put_back(key, copy.displaced)
