"""Orders and arrivals through the step channel, and what is refused there."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightmoe.core import (
    ROUTES,
    Arrivals,
    Batch,
    HostTierCounts,
    Orders,
    Piece,
    SlotChange,
    StepResult,
)
from lightmoe.errors import RankError
from lightmoe.worker.channel import pack_batch, pack_result, unpack_batch, unpack_result
from lightmoe.worker.order_frames import arrivals_of, host_tier_of, orders_of

INDEX = st.integers(0, 2**32)
CHANGES = st.builds(SlotChange, INDEX, INDEX, INDEX, st.integers(-1, 2**20), st.booleans())
PIECES = st.builds(
    lambda begin, size, source, rest, last: Piece(
        *rest[:3], source, rest[3], *rest[4:], begin, begin + size, last
    ),
    INDEX,
    st.integers(1, 2**30),
    st.integers(-1, 100),
    st.tuples(*[INDEX] * 6),
    st.booleans(),
)
ORDERS = st.builds(
    Orders,
    INDEX,
    st.lists(CHANGES, max_size=5).map(tuple),
    st.lists(PIECES, max_size=5).map(tuple),
    st.sampled_from([None, *ROUTES]),
)


@given(orders=st.none() | ORDERS)
def test_orders_come_back(orders: Orders | None) -> None:
    batch = Batch(7, (1, 0), (), orders)
    assert unpack_batch(pack_batch(batch)) == batch


@given(
    arrivals=st.none()
    | st.builds(
        Arrivals,
        st.lists(INDEX, max_size=4).map(tuple),
        st.floats(0, 10),
        st.none() | st.text(max_size=20),
    ),
    num_tokens=st.none() | st.integers(0, 3),
    host_tier=st.none() | st.builds(HostTierCounts, *[INDEX] * 4, st.floats(0, 10)),
)
def test_results_come_back(
    arrivals: Arrivals | None, num_tokens: int | None, host_tier: HostTierCounts | None
) -> None:
    routing = None
    if num_tokens is not None:
        routing = np.arange(num_tokens * 4, dtype=np.uint16).reshape(num_tokens, 2, 2) + 65000
    counts = np.zeros((2, 3), dtype=np.int32)
    result = StepResult(1, 2, (), counts, counts[:, 0], 0.5, arrivals, routing, host_tier=host_tier)

    found = unpack_result(pack_result(result))

    assert found.arrivals == arrivals
    assert found.host_tier == host_tier
    if routing is None:
        assert found.routing is None
    else:
        assert found.routing is not None
        assert found.routing.dtype == np.uint16
        assert np.array_equal(found.routing, routing)


CHANGE = (0, 1, 2, 3, True)
PIECE = (0, 0, 1, 2, 3, 4, 5, 0, 10, True)


def through_msgpack(value: object) -> object:
    return msgpack.unpackb(msgpack.packb(value), use_list=False)


def test_the_examples_are_orders() -> None:
    assert orders_of(through_msgpack((1, [CHANGE], [PIECE], "even"))) == Orders(
        1, (SlotChange(*CHANGE),), (Piece(*PIECE),), "even"
    )


@pytest.mark.parametrize(
    "fields",
    [
        1,
        (),
        (1, [], []),
        (-1, [], [], None),
        (True, [], [], None),
        (1.0, [], [], None),
        (1 << 60, [], [], None),
        (1, 7, [], None),
        (1, [], [], "lp"),
        (1, [], [], ["even"]),
        (1, [CHANGE[:4]], [], None),
        (1, [(0, 1, -2, 3, True)], [], None),
        (1, [(0, 1, 2, -2, True)], [], None),
        (1, [(0, 1, 2, 3, 1)], [], None),
        (1, [], [PIECE[:9]], None),
        (1, [], [(*PIECE[:3], -2, *PIECE[4:])], None),
        (1, [], [(*PIECE[:6], -1, *PIECE[7:])], None),
        (1, [], [(*PIECE[:7], 10, 10, True)], None),
        (1, [], [(*PIECE[:9], "yes")], None),
        (1, [CHANGE] * ((1 << 20) + 1), [], None),
        (1, [], [PIECE] * ((1 << 12) + 1), None),
    ],
)
def test_what_cannot_be_orders_is_refused(fields: object) -> None:
    with pytest.raises(RankError, match="a step frame says .*, which nobody here sends"):
        orders_of(through_msgpack(fields))


@pytest.mark.parametrize(
    "fields", [1, ([], 0.0), ([-1], 0.0, None), ([], -1.0, None), ([], 0, None), ([], 0.0, 3)]
)
def test_what_cannot_be_arrivals_is_refused(fields: object) -> None:
    with pytest.raises(RankError, match="which nobody here sends"):
        arrivals_of(through_msgpack(fields))


@pytest.mark.parametrize(
    "fields",
    [
        1,
        [90, 10, 40, 3 << 30],
        [90, 10, 40, 3 << 30, 0.5, 0],
        [-1, 10, 40, 3 << 30, 0.5],
        [90, True, 40, 3 << 30, 0.5],
        [90, 10, "40", 3 << 30, 0.5],
        [90, 10, 40, 1 << 63, 0.5],
        [90, 10, 40, 3 << 30, 1],
        [90, 10, 40, 3 << 30, -0.5],
        [90, 10, 40, 3 << 30, float("nan")],
        [90, 10, 40, 3 << 30, None],
    ],
)
def test_what_no_host_tier_can_have_counted_is_refused(fields: object) -> None:
    assert host_tier_of(through_msgpack([90, 10, 40, 3 << 30, 0.5])) == HostTierCounts(
        90, 10, 40, 3 << 30, 0.5
    )
    with pytest.raises(RankError, match="which nobody here sends"):
        host_tier_of(through_msgpack(fields))
