"""How streams of bytes share what they pass: max-min fairness, as flows over links settle to.

Progressive filling (Bertsekas and Gallager, Data Networks, 6.5.2): all rates rise together until
something is full; who passes it stays at that rate, the others rise on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def fair_rates(passes: np.ndarray, capacities: Sequence[float] | np.ndarray) -> np.ndarray:
    """Rates [flows] of flows that pass resources: passes bool [resources, flows], capacities.

    A flow that passes nothing is unbounded: its rate is infinite.
    """
    left = np.asarray(capacities, dtype=np.float64).copy()
    rates = np.where(passes.any(axis=0), 0.0, np.inf)
    rising = np.isfinite(rates)
    while rising.any():
        sharers = (passes & rising).sum(axis=1)
        used = sharers > 0
        steps = np.full(len(left), np.inf)
        steps[used] = left[used] / sharers[used]
        step = steps.min()
        rates[rising] += step
        left -= step * sharers
        full = used & (steps <= step * (1 + 1e-9))
        rising &= ~passes[full].any(axis=0)
    return rates
