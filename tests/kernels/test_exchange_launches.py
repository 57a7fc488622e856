"""How the exchange is launched, over a driver that tells (drivers.py)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.kernels.drivers import BIND, Call, call, launches, opened

LAUNCH = re.compile(r"launch (\w+) grid (\d+) block (\d+) shared (\d+)")
NUM_RANKS, NUM_EXPERTS, PER_TOKEN = 4, 16, 2
FLAGS = ([16 * (rank + 1) for rank in range(NUM_RANKS)], 0, 16, 16, 10**9, 1)
PLACES = (16, 16, NUM_EXPERTS, 2)


def chunk(tokens: int, *, rank: int = 1, per_token: int = PER_TOKEN) -> tuple:
    return ([3] * NUM_RANKS, [tokens] * NUM_RANKS, PLACES, 16, 4096, rank, per_token)


SHARE = {
    "flags": FLAGS,
    "experts": 16,
    "pair_index": 16,
    "prefixes": 16,
    "num_real": 0,
    "weights": 0,
    "hidden": 16,
    "published": 16,
    "ticket": 16,
    "load": 16,
    "choice_offset": 512,
    "prefix_offset": 1024,
    "weight_offset": 2048,
    "num_tokens": 100,
    "num_rows": 100,
    "num_experts_per_token": PER_TOKEN,
    "num_experts": NUM_EXPERTS,
    "num_chunks": 2,
    "width_bytes": 512,
    "max_ctas": 0,
    "stream": 7,
}
PULL = {
    "hidden": [16] * NUM_RANKS,
    "results": [16] * NUM_RANKS,
    "chunk": chunk(100),
    "weights": 0,
    "pair_weight": 0,
    "output_rows": 0,
    "prefixes": 16,
    "rows": 16,
    "scale_offset": 0,
    "width_bytes": 512,
    "dtype": 1,
    "as_int8": False,
    "max_ctas": 0,
    "stream": 7,
}
SUM = {
    "pairs": 16,
    "sums": [16] * NUM_RANKS,
    "chunk": chunk(100),
    "scale_offset": 0,
    "width_bytes": 512,
    "dtype": 1,
    "as_int8": False,
    "max_ctas": 0,
    "stream": 7,
}
GIVE = {
    "pairs": 16,
    "output_rows": 16,
    "num_pairs": 16,
    "most_pairs": 100,
    "width_bytes": 512,
    "max_ctas": 0,
    "stream": 7,
}
COMBINE = {
    "results": [16] * NUM_RANKS,
    "places": PLACES,
    "prefixes": 16,
    "choices": 16,
    "weights": 16,
    "output": 16,
    "scale_offset": 0,
    "first_token": 3,
    "num_tokens": 100,
    "rank": 1,
    "num_experts_per_token": PER_TOKEN,
    "width_bytes": 512,
    "together": True,
    "summed": False,
    "dtype": 1,
    "as_int8": False,
    "max_ctas": 0,
    "stream": 7,
}
COUNT = {"chunk": chunk(100), "rows_sent": 16, "results_sent": 16, "summed": True, "stream": 7}
DEFAULTS = {
    "exchange_share": SHARE,
    "exchange_meet": {"flags": FLAGS, "stream": 7},
    "exchange_pull": PULL,
    "exchange_give": GIVE,
    "exchange_sum": SUM,
    "exchange_combine": COMBINE,
    "exchange_count": COUNT,
}


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """A folder of files that pretend to be kernels for sm_75 and sm_90."""
    for architecture in ("75", "90"):
        (tmp_path / architecture).mkdir()
        (tmp_path / architecture / "exchange.cubin").write_text("image")
    return tmp_path


def wanted(name: str, **changes: object) -> Call:
    return (name, [], DEFAULTS[name] | changes)


@pytest.mark.parametrize(
    ("name", "changes", "launched"),
    [
        # A thread a vector of 16 bytes, or a pair where no hidden states are copied.
        ("exchange_share", {}, ("exchange_share", 7, 512)),
        ("exchange_share", {"hidden": 0}, ("exchange_share", 1, 512)),
        ("exchange_share", {"max_ctas": 3}, ("exchange_share", 3, 512)),
        ("exchange_share", {"weights": 16}, ("exchange_share", 7, 512)),
        # A rank without tokens: what it sorted has no address.
        (
            "exchange_share",
            {"pair_index": 0, "experts": 0, "num_tokens": 0, "num_rows": 0},
            ("exchange_share", 1, 512),
        ),
        # One CTA counts pairs that were not sorted.
        (
            "exchange_share",
            {"pair_index": 0, "prefixes": 0, "num_chunks": 1},
            ("exchange_share_counted", 1, 1024),
        ),
        ("exchange_meet", {}, ("exchange_meet", 1, 64)),
        # A warp a token of any rank; bulk copies, four a warp or more, where there are enough.
        ("exchange_pull", {}, ("exchange_pull", 25, 512)),
        ("exchange_pull", {"max_ctas": 2}, ("exchange_pull", 2, 512)),
        ("exchange_pull", {"chunk": chunk(0)}, ("exchange_pull", 1, 512)),
        ("exchange_pull", {"chunk": chunk(1024)}, ("exchange_pull_bulk", 128, 256)),
        ("exchange_pull", {"chunk": chunk(1023)}, ("exchange_pull", 68, 512)),
        (
            "exchange_pull",
            {"weights": 16, "pair_weight": 16, "chunk": chunk(1024), "max_ctas": 16},
            ("exchange_pull_bulk", 16, 256),
        ),
        ("exchange_pull", {"as_int8": True}, ("exchange_pull_int8_bf16", 25, 512)),
        (
            "exchange_pull",
            {"as_int8": True, "dtype": 0, "chunk": chunk(1024), "max_ctas": 16},
            ("exchange_pull_int8_f16", 16, 512),
        ),
        ("exchange_sum", {}, ("exchange_sum_bf16", 25, 512)),
        ("exchange_sum", {"dtype": 2, "max_ctas": 4}, ("exchange_sum_f32", 4, 512)),
        ("exchange_sum", {"dtype": 0, "as_int8": True}, ("exchange_sum_int8_f16", 25, 512)),
        # A warp a pair that there may be.
        ("exchange_give", {}, ("exchange_give", 7, 512)),
        ("exchange_give", {"most_pairs": 1 << 20, "max_ctas": 5}, ("exchange_give", 5, 512)),
        # A warp 512 bytes of a token of this rank, as long as there is room for so many.
        ("exchange_combine", {}, ("exchange_combine_bf16", 7, 512)),
        ("exchange_combine", {"width_bytes": 1040}, ("exchange_combine_bf16", 19, 512)),
        ("exchange_combine", {"dtype": 2}, ("exchange_combine_f32", 7, 512)),
        ("exchange_combine", {"num_tokens": 1023}, ("exchange_combine_bf16", 64, 512)),
        # Bulk copies where there are more tokens; a warp has one at least.
        ("exchange_combine", {"num_tokens": 1024}, ("exchange_combine_bulk_bf16", 64, 512)),
        ("exchange_combine", {"num_tokens": 9999}, ("exchange_combine_bulk_bf16", 68, 512)),
        (
            "exchange_combine",
            {"num_tokens": 9999, "max_ctas": 4, "dtype": 2},
            ("exchange_combine_bulk_f32", 4, 512),
        ),
        (
            "exchange_combine",
            {"summed": True, "as_int8": True, "max_ctas": 3},
            ("exchange_combine_int8_bf16", 3, 512),
        ),
        ("exchange_count", {}, ("exchange_count", 25, 512)),
    ],
)
def test_what_is_launched(
    host_library: Path,
    fake_driver: Path,
    kernels: Path,
    name: str,
    changes: dict,
    launched: tuple[str, int, int],
) -> None:
    lines = call(
        host_library,
        fake_driver,
        opened(kernels),
        BIND,
        wanted(name, **changes),
        FAKE_CAPABILITY=90,
    )

    (line,) = launches(lines)
    kernel, grid, threads, shared = LAUNCH.match(line).groups()
    assert (kernel, int(grid), int(threads)) == launched
    assert (int(shared) > 48 << 10) == ("bulk" in kernel)
    # None starts ahead of its turn: waiting it would hold room that a product needs.
    assert "attributes" not in line or line.partition("attributes")[2].split() == []


def test_older_cards_have_no_bulk_copies(
    host_library: Path, fake_driver: Path, kernels: Path
) -> None:
    lines = call(
        host_library,
        fake_driver,
        opened(kernels),
        BIND,
        wanted("exchange_pull", chunk=chunk(4096)),
        FAKE_CAPABILITY=75,
    )

    (line,) = launches(lines)
    assert "bulk" not in line


@pytest.mark.parametrize(
    ("name", "none"), [("exchange_combine", "num_tokens"), ("exchange_give", "most_pairs")]
)
def test_what_there_is_nothing_of_is_not_launched(
    host_library: Path, fake_driver: Path, kernels: Path, name: str, none: str
) -> None:
    lines = call(host_library, fake_driver, opened(kernels), BIND, wanted(name, **{none: 0}))

    assert launches(lines) == []
    assert lines[-1] == f"{name}: 0"


MANY = [16] * 65


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("exchange_share", {"flags": (MANY, 0, 16, 16, 1, 0)}, "rank 0 of 65 ranks"),
        ("exchange_share", {"flags": (*FLAGS[:-1], 4)}, "rank 4 of 4 ranks"),
        ("exchange_share", {"width_bytes": 24}, "rows of 24 bytes"),
        ("exchange_share", {"num_tokens": 1 << 20}, "1048576 tokens in 2 chunks"),
        ("exchange_share", {"num_experts": 513}, "513 experts"),
        ("exchange_share", {"num_experts_per_token": 17}, "17 experts per token"),
        ("exchange_share", {"prefixes": 0}, "in 2 chunks are not counted here"),
        (
            "exchange_share",
            {"prefixes": 0, "num_chunks": 1, "num_tokens": 513},
            "513 tokens of 2 experts in 1 chunks are not counted here",
        ),
        ("exchange_meet", {"flags": (MANY, 0, 16, 16, 1, 0)}, "rank 0 of 65 ranks"),
        ("exchange_pull", {"chunk": chunk(9, rank=4)}, "rank 4 of 4 ranks"),
        ("exchange_pull", {"chunk": chunk(9, per_token=0)}, "0 experts per token"),
        ("exchange_pull", {"chunk": chunk(2**30)}, "4294967296 tokens are too many"),
        ("exchange_pull", {"width_bytes": 8}, "rows of 8 bytes"),
        ("exchange_pull", {"weights": 16}, "weights and pair_weight go together"),
        ("exchange_pull", {"as_int8": True, "dtype": 2}, "dtype 2 is neither fp16 nor bf16"),
        ("exchange_pull", {"as_int8": True, "output_rows": 16}, "int8 is for sums"),
        ("exchange_give", {"width_bytes": 24}, "rows of 24 bytes"),
        ("exchange_sum", {"chunk": chunk(9, rank=-1)}, "rank -1 of 4 ranks"),
        ("exchange_sum", {"dtype": 3}, "dtype 3 is none of fp16, bf16, fp32"),
        ("exchange_sum", {"as_int8": True, "dtype": 2}, "dtype 2 is neither fp16 nor bf16"),
        ("exchange_sum", {"as_int8": True, "width_bytes": 528}, "rows of 264 elements as int8"),
        ("exchange_combine", {"rank": 64}, "rank 64 of 64 ranks"),
        ("exchange_combine", {"dtype": 3}, "dtype 3 is none of fp16, bf16, fp32"),
        ("exchange_combine", {"as_int8": True}, "int8 is for sums, not for results"),
        ("exchange_count", {"chunk": chunk(9, rank=4)}, "rank 4 of 4 ranks"),
    ],
)
def test_what_is_refused(
    host_library: Path, fake_driver: Path, kernels: Path, name: str, changes: dict, said: str
) -> None:
    lines = call(host_library, fake_driver, opened(kernels), BIND, wanted(name, **changes))

    assert launches(lines) == []
    assert lines[-1].startswith(f"{name}: 4 {name}: ")
    assert said in lines[-1]
