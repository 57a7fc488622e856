"""Many ranks over NCCL on one GPU: rows arrive, layers keep their bits, nobody waits for ever."""

from __future__ import annotations

import pytest

from tests.gpu_ranks import run_ranks

pytestmark = pytest.mark.gpu

TASKS = "tests.moe.nccl_tasks"


def test_rows_of_every_dtype_arrive_in_rank_order() -> None:
    assert run_ranks(4, f"{TASKS}:exchanges") == [[]] * 4


@pytest.mark.parametrize("num_ranks", [4, 10])
def test_layers_have_the_bits_of_one_rank_that_holds_everything(num_ranks: int) -> None:
    answers = run_ranks(num_ranks, f"{TASKS}:layers")

    for answer in answers:
        assert answer.get("wrong") == [], answer
        assert answer["cases"] == 14


@pytest.mark.parametrize("task", ["one_dies", "one_dies_and_a_kernel_is_new"])
def test_a_rank_that_dies_is_named_by_all_others(task: str) -> None:
    answers = run_ranks(3, f"{TASKS}:{task}", timeout_seconds=5.0, patience_seconds=45.0)

    assert answers[1] == {"died": True}
    for answer in (answers[0], answers[2]):
        assert isinstance(answer, str), answer
        assert "rank 1 has come to" in answer


def test_a_rank_that_stalls_is_named_by_all_others() -> None:
    answers = run_ranks(3, f"{TASKS}:one_stalls", timeout_seconds=5.0, patience_seconds=45.0)

    for answer in answers[:2]:
        assert isinstance(answer, str), answer
        assert "did not end within 5 s; rank 2 has come to" in answer
    assert "hangs" not in str(answers[2])
