"""Measures a machine with cards and describes it: `lightmoe topology probe`.

What the driver says gives the shape of the tree; copies give the figures, of each card and pair
alone and of all at once per switch and per socket, because ten x16 cards share fewer lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import permutations

from lightmoe.errors import MachineError
from lightmoe.topology.describe import Groups, Measured, cliques, describe
from lightmoe.topology.hardware import HOST, Card, Copy, Hardware, Nearness
from lightmoe.topology.tree import Topology

BUDGET_SECONDS = 12.0
"""For all copies together; starting the cards and their matrix products come on top."""

_MAX_COPY_SECONDS = 0.2
_MIN_COPY_SECONDS = 0.02
_UNDER_ONE_SWITCH: tuple[Nearness, ...] = ("board", "switch", "switches")
# Cards of which nobody tells where they are count as one socket's.
_UNDER_ONE_SOCKET: tuple[Nearness, ...] = (*_UNDER_ONE_SWITCH, "host bridge", "socket", "unknown")
_MOST_HANGS = 2  # each costs the time of its limit, and a new start

Say = Callable[[str], None]


def probe(hardware: Hardware, name: str, say: Say) -> Topology:
    """Measure every card, pair, switch and socket. MachineError where there is no card."""
    cards = hardware.cards()
    if not cards:
        raise MachineError("no GPU found to measure; see `lightmoe doctor`")
    switches = _groups(hardware, len(cards), _UNDER_ONE_SWITCH)
    sockets = _sockets(hardware, cards)
    say(f"{len(cards)} cards, {len(sockets)} sockets, switches: {_in_words(switches)}")
    working = _working_pairs(hardware, len(cards), say)
    measured = _measure(hardware, cards, switches, sockets, working, say)
    return describe(hardware, name, cards, switches, sockets, working, measured)


def _groups(hardware: Hardware, num_cards: int, near: Sequence[Nearness]) -> Groups:
    """Cards that are so near each other, each in exactly one group."""
    groups: Groups = []
    for card in range(num_cards):
        for index, group in enumerate(groups):
            if hardware.nearness(group[0], card) in near:
                groups[index] = (*group, card)
                break
        else:
            groups.append((card,))
    return groups


def _sockets(hardware: Hardware, cards: Sequence[Card]) -> Groups:
    """Cards by socket: by NUMA node where all tell theirs, else by what NVML says."""
    nodes = [card.numa_node for card in cards]
    if min(nodes) >= 0:
        return [
            tuple(card for card, own in enumerate(nodes) if own == node)
            for node in sorted(set(nodes))
        ]
    return _groups(hardware, len(cards), _UNDER_ONE_SOCKET)


def _working_pairs(hardware: Hardware, num_cards: int, say: Say) -> set[tuple[int, int]]:
    """The pairs whose peer-to-peer copies arrive right. Where some hang, no more are tried."""
    working, num_hangs = set(), 0
    for source, target in permutations(range(num_cards), 2):
        if num_hangs == _MOST_HANGS:
            say("no further pair is tried; none of them is taken to work")
            return set()
        result = hardware.test_p2p(source, target)
        num_hangs += result == "hangs"
        if result == "works":
            working.add((source, target))
        elif result != "not offered":
            say(f"peer-to-peer from card {source} to {target} is offered and fails: {result}")
    return working


def _measure(
    hardware: Hardware,
    cards: Sequence[Card],
    switches: Groups,
    sockets: Groups,
    working: set[tuple[int, int]],
    say: Say,
) -> Measured:
    everybody = range(len(cards))
    shared = _shared(switches, sockets, len(cards))
    num_measurements = 2 * len(cards) + 2 * len(shared) + len(working) + 2
    seconds = max(_MIN_COPY_SECONDS, min(_MAX_COPY_SECONDS, BUDGET_SECONDS / num_measurements))

    def rates(copies: Iterable[Copy]) -> list[float]:
        return hardware.copy_rates(list(copies), seconds)

    measured = Measured()
    for card in everybody:
        measured.uploads += rates([Copy(card, HOST)])
        measured.downloads += rates([Copy(HOST, card)])
        both = (hardware.latency_seconds(copy) for copy in (Copy(card, HOST), Copy(HOST, card)))
        measured.host_latencies.append(max(both))
    say("host copies, one card alone: " + _range(measured.uploads + measured.downloads))
    for group in shared:
        up = sum(rates(Copy(card, HOST) for card in group))
        down = sum(rates(Copy(HOST, card) for card in group))
        measured.together[group] = (up, down)
        say(f"cards {_in_words([group])} at once: {_range([up])} up, {_range([down])} down")
    for pair in sorted(working):
        measured.pairs[pair] = rates([Copy(*pair)])[0]
    for pair in _one_per_way(cards, switches, sockets, working):
        measured.peer_latencies[pair] = hardware.latency_seconds(Copy(*pair))
    if measured.pairs:
        say("pairs alone: " + _range(measured.pairs.values()))
    for group in cliques(working, len(cards)):
        copies = [Copy(*pair) for pair in permutations(group, 2)]
        sent = dict.fromkeys(group, 0.0)
        for copy, rate in zip(copies, rates(copies), strict=True):
            sent[copy.source] += rate
        measured.all_pairs[group] = min(sent.values())
        say(f"all pairs of cards {_in_words([group])} at once, a card: {_range(sent.values())}")
    return measured


def _shared(switches: Groups, sockets: Groups, num_cards: int) -> Groups:
    """The groups of more than one card that meet somewhere, each once; and all cards."""
    wanted = [*switches, *sockets, tuple(range(num_cards))]
    return [group for group in dict.fromkeys(wanted) if len(group) > 1]


def _one_per_way(
    cards: Sequence[Card], switches: Groups, sockets: Groups, working: set[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The first working pair of each kind: linked or not, same switch, same socket, other."""
    found: dict[tuple[bool, int | None, int | None], tuple[int, int]] = {}
    for pair in sorted(working):
        linked = bool(cards[pair[0]].nvlinks and cards[pair[1]].nvlinks)
        way = (linked, _same(switches, pair), _same(sockets, pair))
        found.setdefault(way, pair)
    return list(found.values())


def _same(groups: Groups, pair: tuple[int, int]) -> int | None:
    """The group that both are in."""
    return next((i for i, group in enumerate(groups) if set(pair) <= set(group)), None)


def _in_words(groups: Groups) -> str:
    return "; ".join(", ".join(map(str, group)) for group in groups)


def _range(rates: Iterable[float]) -> str:
    values = [rate / 1e9 for rate in rates]
    low, high = min(values), max(values)
    return f"{low:.1f} GB/s" if low == high else f"{low:.1f}-{high:.1f} GB/s"
