"""The window: long where nothing changes, short after a shift, bounded always."""

from __future__ import annotations

import numpy as np
import pytest

from lightmoe.balancer.window import LoadWindow


def shares(load: np.ndarray) -> np.ndarray:
    return load / load.sum(axis=1, keepdims=True)


def test_an_empty_window_has_no_load() -> None:
    window = LoadWindow(2, 4)
    window.add(np.zeros((2, 4), dtype=int))

    assert window.num_steps == 0
    assert window.load().tolist() == np.zeros((2, 4)).tolist()


def test_the_first_step_is_the_load() -> None:
    window = LoadWindow(1, 3)
    window.add(np.array([[1, 2, 3]]))

    assert window.load() == pytest.approx(np.array([[1.0, 2.0, 3.0]]))


def test_one_half_life_forgets_half() -> None:
    window = LoadWindow(1, 2, half_lives_in_steps=(3,))
    window.add(np.array([[8, 0]]))
    for _ in range(3):
        window.add(np.array([[0, 1]]))

    assert window.load()[0, 0] == pytest.approx(4.0)


def test_steady_loads_are_averaged_far_back_and_a_shift_is_followed_at_once() -> None:
    generator = np.random.default_rng(0)
    before, after = generator.dirichlet(np.ones(16), (2, 3))
    window = LoadWindow(3, 16)
    for _ in range(300):
        window.add(np.stack([generator.multinomial(200, share) for share in before]))
    steady = np.abs(shares(window.load()) - before).sum(axis=1)
    for _ in range(12):
        window.add(np.stack([generator.multinomial(200, share) for share in after]))
    shifted = np.abs(shares(window.load()) - after).sum(axis=1)

    single = np.abs(generator.multinomial(200, before[0]) / 200 - before[0]).sum()
    assert steady.max() < single / 4
    assert shifted.max() < 0.3 < np.abs(before - after).sum(axis=1).min()


def test_what_it_gives_out_is_the_callers() -> None:
    window = LoadWindow(1, 2)
    window.add(np.array([[1, 1]]))
    window.load()[:] = 99

    assert window.load().max() == 1
