"""The engine over fake ranks: how requests end, what is refused, and what a broken rank does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from lightmoe.core import SampledToken
from lightmoe.engine import engine as engine_module
from lightmoe.engine.engine import Engine
from lightmoe.errors import QueueFullError, RankError, RequestError, ShuttingDownError
from tests.engine.fakes import (
    EOS,
    VOCAB_SIZE,
    Answer,
    FakeWorkers,
    expected_tokens,
    new_engine,
    new_request,
)

PROMPT = (1, 2, 3)
FREE = expected_tokens(PROMPT, 40)  # what the fake model says if nothing stops it
STOP = FREE[4]


@pytest.fixture
def start() -> Iterator[Callable[..., tuple[Engine, FakeWorkers]]]:
    """Starts engines, and closes them at the end."""
    engines = []

    def start(**options: int) -> tuple[Engine, FakeWorkers]:
        shape = {name: options.pop(name) for name in ("num_ranks", "num_blocks") if name in options}
        limits = {
            name: options[name]
            for name in ("max_num_seqs", "max_num_batched_tokens")
            if name in options
        }
        workers = FakeWorkers(**shape, **limits)
        engine = new_engine(workers, **options)
        engines.append((engine, workers))
        engine.start()
        return engine, workers

    yield start
    for engine, workers in engines:
        workers.resume()
        engine.close()
        assert not engine._thread.is_alive()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 20 s"
        time.sleep(0.005)


def ask(engine: Engine, request_id: str = "one", **options: object) -> Answer:
    answer = Answer()
    engine.submit(new_request(request_id, **options), answer)
    return answer


def test_the_script_of_this_file_is_what_it_needs() -> None:
    assert EOS not in FREE[:8]
    assert STOP not in FREE[:4]


def test_a_request_ends_at_max_tokens(start: Callable[..., tuple[Engine, FakeWorkers]]) -> None:
    engine, _ = start()

    answer = ask(engine, max_tokens=8).wait()

    assert answer.token_ids == FREE[:8]
    assert answer.finish_reason == "length"
    assert [output.finish_reason for output in answer.outputs[:-1]] == [None] * 7


def test_without_max_tokens_a_request_fills_the_context(
    start: Callable[..., tuple[Engine, FakeWorkers]],
) -> None:
    engine, _ = start(max_model_len=24)

    answer = ask(engine, max_tokens=None, ignore_eos=True).wait()

    assert answer.token_ids == FREE[: 24 - len(PROMPT)]
    assert answer.finish_reason == "length"


def test_stop_ids_end_a_request_after_min_tokens(
    start: Callable[..., tuple[Engine, FakeWorkers]],
) -> None:
    engine, _ = start()

    stopped = ask(engine, "a", stop_token_ids=(STOP,), max_tokens=40).wait()
    later = ask(engine, "b", stop_token_ids=(STOP,), max_tokens=40, min_tokens=9).wait()

    assert stopped.token_ids == FREE[:5]
    assert stopped.finish_reason == "stop"
    assert later.token_ids == expected_tokens(PROMPT, 40, (STOP, EOS), min_tokens=9)
    assert len(later.token_ids) >= 9
    assert STOP not in later.token_ids[:9]


def test_eos_ends_a_request_unless_it_is_ignored(
    start: Callable[..., tuple[Engine, FakeWorkers]],
) -> None:
    engine, _ = start()
    prompt = next(
        (one, 5) for one in range(VOCAB_SIZE) if EOS in expected_tokens((one, 5), 20)[:15]
    )

    ended = ask(engine, "a", prompt=prompt, max_tokens=20).wait()
    ignoring = ask(engine, "b", prompt=prompt, max_tokens=20, ignore_eos=True).wait()

    assert ended.token_ids == expected_tokens(prompt, 20, (EOS,))
    assert (ended.token_ids[-1], ended.finish_reason) == (EOS, "stop")
    assert ignoring.token_ids == expected_tokens(prompt, 20)
    assert ignoring.finish_reason == "length"


def test_requests_spread_over_the_ranks(start: Callable[..., tuple[Engine, FakeWorkers]]) -> None:
    engine, workers = start(num_ranks=3)
    workers.pause()
    answers = [ask(engine, str(one), max_tokens=3) for one in range(7)]
    workers.resume()

    assert all(answer.wait().token_ids == FREE[:3] for answer in answers)
    home: dict[int, set[int]] = {}
    for batches in workers.batches:
        for rank, batch in enumerate(batches):
            for part in batch.sequences:
                home.setdefault(part.sequence_id, set()).add(rank)
    assert all(len(ranks) == 1 for ranks in home.values())
    per_rank = [sum(rank in ranks for ranks in home.values()) for rank in range(3)]
    assert sorted(per_rank) == [2, 2, 3]


def test_one_at_a_time_still_visits_every_rank(
    start: Callable[..., tuple[Engine, FakeWorkers]],
) -> None:
    engine, workers = start(num_ranks=3)

    for one in range(6):
        ask(engine, str(one), max_tokens=1).wait()

    used = [[bool(batch.sequences) for batch in batches].index(True) for batches in workers.batches]
    assert used == [0, 1, 2, 0, 1, 2]


def test_many_requests_in_a_small_cache_answer_as_if_alone(
    start: Callable[..., tuple[Engine, FakeWorkers]],
) -> None:
    engine, workers = start(num_ranks=2, num_blocks=15, max_num_seqs=4, max_num_batched_tokens=16)
    prompts = [
        tuple((one + place) % VOCAB_SIZE for place in range(3 + 2 * one)) for one in range(14)
    ]
    answers = [
        ask(engine, str(one), prompt=prompt, max_tokens=25, ignore_eos=True)
        for one, prompt in enumerate(prompts)
    ]

    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.wait().token_ids == expected_tokens(prompt, 25)
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert stats.num_finished == 14
    assert stats.num_generated_tokens == 14 * 25
    assert stats.num_prompt_tokens == sum(len(prompt) for prompt in prompts)
    assert stats.num_steps == len(workers.batches)
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert all(rank.kv_usage == 0.0 for rank in stats.ranks)


def test_load_adds_up_what_the_ranks_report(
    start: Callable[..., tuple[Engine, FakeWorkers]],
) -> None:
    engine, workers = start(num_ranks=2)

    ask(engine, max_tokens=4).wait()

    wait_until(lambda: engine.load().num_steps == 4)
    load = engine.load()
    num_tokens = len(PROMPT) + 3
    assert load.expert_tokens.tolist() == [[num_tokens] * 4] * 2
    assert load.rank_pairs.tolist() == [[4, 4], [8, 8]]
    assert load.rank_kinds == ["home", "home"]
    assert load.placement == [
        [list(ranks) for ranks in layer] for layer in workers.placement.copies
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ()}, "the prompt is empty"),
        ({"prompt": (1, VOCAB_SIZE)}, "token id 50 is not in 0 .. 49"),
        ({"prompt": (1, -1)}, "token id -1 is not in 0 .. 49"),
        ({"stop_token_ids": (3, 2**70)}, f"token id {2**70} is not in 0 .. 49"),
        ({"prompt": (1,) * 55, "max_tokens": 6}, "55 tokens and max_tokens is 6.* context of 60"),
        (
            {"prompt": (1,) * 60, "max_tokens": None},
            "60 tokens and max_tokens is 1.* context of 60",
        ),
    ],
)
def test_a_bad_request_is_refused_with_its_numbers(
    start: Callable[..., tuple[Engine, FakeWorkers]], options: dict[str, object], message: str
) -> None:
    engine, _ = start()

    with pytest.raises(RequestError, match=message):
        ask(engine, **options)

    assert ask(engine).wait().token_ids == FREE[:8]


def test_a_prompt_that_just_fits_is_served(
    start: Callable[..., tuple[Engine, FakeWorkers]],
) -> None:
    engine, _ = start()

    answer = ask(engine, prompt=(1,) * 55, max_tokens=5, ignore_eos=True).wait()

    assert answer.token_ids == expected_tokens((1,) * 55, 5)


def test_a_full_queue_refuses_and_takes_again_later(
    start: Callable[..., tuple[Engine, FakeWorkers]],
) -> None:
    engine, workers = start(max_num_queued_reqs=3)
    workers.pause()
    answers = [ask(engine, str(one)) for one in range(3)]

    with pytest.raises(QueueFullError, match="3 requests are queued"):
        ask(engine, "one too many")

    workers.resume()
    for answer in answers:
        answer.wait()
    wait_until(lambda: engine.stats().num_finished == 3)
    assert ask(engine, "again").wait().token_ids == FREE[:8]


def test_two_requests_of_one_name_are_told_apart_by_refusing_one(
    start: Callable[..., tuple[Engine, FakeWorkers]],
) -> None:
    engine, workers = start()
    workers.pause()
    running = ask(engine, "running")
    assert workers.in_step.wait(20)
    queued = ask(engine, "queued")

    for name in ("running", "queued"):
        with pytest.raises(RequestError, match="is running already"):
            ask(engine, name)

    workers.resume()
    assert running.wait().token_ids == queued.wait().token_ids == FREE[:8]


def test_abort_of_a_running_request_frees_its_blocks(
    start: Callable[..., tuple[Engine, FakeWorkers]],
) -> None:
    engine, workers = start()
    workers.pause_before_step(4)
    neighbour = ask(engine, "neighbour", max_tokens=30, ignore_eos=True)
    doomed = ask(engine, "doomed", max_tokens=50, ignore_eos=True)
    assert workers.in_step.wait(20)

    engine.abort("doomed")
    workers.resume()

    doomed.wait()
    assert doomed.finish_reason == "abort"
    assert 0 < len(doomed.token_ids) <= 5
    assert doomed.token_ids == FREE[: len(doomed.token_ids)]
    assert neighbour.wait().token_ids == FREE[:30]
    wait_until(lambda: engine.stats().num_running == 0)
    assert engine.stats().ranks[0].kv_usage == 0.0


def test_abort_before_a_request_was_seen_and_after_it_is_over(
    start: Callable[..., tuple[Engine, FakeWorkers]],
) -> None:
    engine, workers = start()
    workers.pause()
    first = ask(engine, "first")
    assert workers.in_step.wait(20)
    unseen = ask(engine, "unseen")
    engine.abort("unseen")
    engine.abort("nobody")
    workers.resume()

    assert unseen.wait().finish_reason == "abort"
    assert unseen.token_ids == []
    assert first.wait().token_ids == FREE[:8]
    engine.abort("first")
    assert ask(engine, "next").wait().token_ids == FREE[:8]


def test_logits_that_are_not_finite_end_that_request_only(
    start: Callable[..., tuple[Engine, FakeWorkers]],
) -> None:
    engine, workers = start()
    workers.pause()
    sick, well = ask(engine, "sick"), ask(engine, "well")
    workers.spoil = lambda token: SampledToken(0, -1) if token.sequence_id == 0 else token
    workers.resume()

    sick.wait()

    assert (sick.token_ids, sick.finish_reason) == ([], "error")
    assert isinstance(sick.error, RequestError)
    assert "not finite" in str(sick.error)
    assert well.wait().token_ids == FREE[:8]


def test_draining_lets_running_requests_finish(
    start: Callable[..., tuple[Engine, FakeWorkers]],
) -> None:
    engine, workers = start()
    workers.pause()
    running = ask(engine, "running")
    draining = threading.Thread(target=engine.drain, args=(20.0,))
    draining.start()
    wait_until(lambda: engine.draining)

    with pytest.raises(ShuttingDownError):
        ask(engine, "late")

    workers.resume()
    draining.join(20.0)
    assert running.wait().token_ids == FREE[:8]
    assert engine.failure is None


def test_draining_ends_what_takes_too_long_with_an_error(
    start: Callable[..., tuple[Engine, FakeWorkers]],
) -> None:
    engine, workers = start()
    workers.pause()
    running, waiting = ask(engine, "running"), ask(engine, "waiting")
    assert workers.in_step.wait(20)

    closing = threading.Thread(target=engine.drain, args=(0.0,))
    closing.start()
    wait_until(lambda: engine._closing)
    workers.resume()

    closing.join(20.0)
    for answer in (running, waiting):
        assert answer.wait().finish_reason == "error"
        assert isinstance(answer.error, ShuttingDownError)
    assert engine.failure is None
    with pytest.raises(ShuttingDownError):
        ask(engine, "late")


@pytest.mark.parametrize(
    ("cause", "is_failure"), [(RankError("rank 1 died"), False), (ZeroDivisionError(), True)]
)
def test_ranks_that_die_while_it_drains_are_no_failure(
    start: Callable[..., tuple[Engine, FakeWorkers]], cause: Exception, is_failure: bool
) -> None:
    """The signal that asked for the end may have reached them as well."""
    engine, workers = start()
    workers.pause()
    running = ask(engine, "running")
    assert workers.in_step.wait(20)

    draining = threading.Thread(target=engine.drain, args=(20.0,))
    draining.start()
    wait_until(lambda: engine.draining)
    workers.fail_with = cause
    workers.resume()

    draining.join(20.0)
    assert running.wait().finish_reason == "error"
    assert (engine.failure is not None) is is_failure
    assert isinstance(running.error, RankError if is_failure else ShuttingDownError)


def test_close_stops_the_ranks_and_may_be_called_twice(
    start: Callable[..., tuple[Engine, FakeWorkers]],
) -> None:
    engine, workers = start()
    ask(engine).wait()

    engine.close()
    engine.close()

    assert workers.num_closed == 2
    assert engine.failure is None


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (RankError("rank 1 died"), "rank 1 died"),
        (ZeroDivisionError("division by zero"), "the engine stopped: ZeroDivisionError: division"),
    ],
)
def test_a_step_that_fails_ends_every_request_and_all_later_ones(
    start: Callable[..., tuple[Engine, FakeWorkers]], cause: Exception, message: str
) -> None:
    engine, workers = start(max_num_seqs=1)
    failures: list[Exception] = []
    engine.on_failure(failures.append)
    workers.pause()
    running = ask(engine, "running")
    assert workers.in_step.wait(20)
    waiting = ask(engine, "waiting")
    workers.fail_with = cause
    workers.resume()

    for answer in (running, waiting):
        assert answer.wait().finish_reason == "error"
        assert answer.error is engine.failure
    wait_until(lambda: bool(failures))
    assert failures == [engine.failure]
    assert isinstance(engine.failure, RankError)
    assert message in str(engine.failure)
    with pytest.raises(RankError, match=message):
        ask(engine, "late")


def test_a_rank_that_dies_while_nothing_runs_is_noticed(
    start: Callable[..., tuple[Engine, FakeWorkers]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_CHECK_SECONDS", 0.01)
    engine, workers = start()
    failures: list[Exception] = []
    engine.on_failure(failures.append)

    workers.check_fails_with = RankError("rank 2 died")

    wait_until(lambda: bool(failures))
    assert str(engine.failure) == "rank 2 died"
    with pytest.raises(RankError, match="rank 2 died"):
        ask(engine)
