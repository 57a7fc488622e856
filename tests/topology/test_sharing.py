"""Fair rates: nobody over capacity, and nobody could rise without someone slower falling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightmoe.topology.sharing import fair_rates


@st.composite
def networks(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    resources, flows = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    passes = generator.random((resources, flows)) < 0.5
    return passes, 10.0 ** generator.uniform(-2, 12, resources)


@given(networks())
def test_rates_are_max_min_fair(network: tuple[np.ndarray, np.ndarray]) -> None:
    passes, capacities = network
    rates = fair_rates(passes, capacities)
    bounded = passes.any(axis=0)
    assert np.isinf(rates[~bounded]).all()
    rates = np.where(bounded, rates, 0.0)
    used = passes @ rates
    assert (used <= capacities * (1 + 1e-6)).all()
    for flow in np.flatnonzero(bounded):
        # Some full resource holds it where no other flow is faster than this one.
        bottlenecks = [
            used[r] >= capacities[r] * (1 - 1e-6)
            and rates[flow] >= rates[passes[r]].max() * (1 - 1e-6)
            for r in np.flatnonzero(passes[:, flow])
        ]
        assert any(bottlenecks)


def test_a_long_flow_leaves_the_rest_to_the_others() -> None:
    passes = np.array([[True, True, False], [False, True, True]])
    assert fair_rates(passes, [10.0, 30.0]) == pytest.approx([5.0, 5.0, 25.0])
