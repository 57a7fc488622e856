"""How the route's split is launched, over a driver that tells (drivers.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.drivers import BIND, Call, call, launches, opened


def chunk(*tables: int, route: int = 2, tokens_per_tile: int = 64, most_tiles: int = 1000) -> list:
    return [*(tables or [16] * 6), route, tokens_per_tile, most_tiles]


SPLIT = {
    "chunks": [chunk()],
    "copy_ranks": 16,
    "nearness": 0,
    "source_stride": 129,
    "num_ranks": 10,
    "num_experts": 128,
    "num_copies": 3,
    "rank": 0,
    "sweeps": 4,
    "num_levels": 0,
    "stream": 7,
}
NEAR = {"nearness": 16, "num_levels": 3}


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """A folder of files that pretend to be kernels for sm_75 and sm_90."""
    for architecture in ("75", "90"):
        (tmp_path / architecture).mkdir()
        (tmp_path / architecture / "route.cubin").write_text("image")
    return tmp_path


def split(**changes: object) -> Call:
    return ("route_split", [], SPLIT | changes)


@pytest.mark.parametrize(
    ("capability", "changes", "name", "attributes"),
    [
        (75, {}, "route_split_w32", ""),
        (90, {}, "route_split_w32", " 6"),
        (90, {"num_ranks": 32, "num_copies": 32}, "route_split_w32", " 6"),
        (90, {"num_ranks": 33}, "route_split_w64", " 6"),
        (90, {"num_ranks": 64, "num_experts": 512, "source_stride": 513}, "route_split_w64", " 6"),
        (75, {"num_experts": 512, "source_stride": 600}, "route_split_w32", ""),
        (75, NEAR, "route_split_near_w32", ""),
        (90, NEAR | {"num_ranks": 33}, "route_split_near_w64", " 6"),
        (90, {"chunks": [chunk(), chunk(route=0), chunk(most_tiles=7)]}, "route_split_w32", " 6"),
    ],
)
def test_a_cta_splits_a_chunk(
    host_library: Path,
    fake_driver: Path,
    kernels: Path,
    capability: int,
    changes: dict,
    name: str,
    attributes: str,
) -> None:
    lines = call(
        host_library,
        fake_driver,
        opened(kernels),
        BIND,
        split(**changes),
        FAKE_CAPABILITY=capability,
    )

    (line,) = launches(lines)
    grid = len((SPLIT | changes)["chunks"])
    assert line.startswith(f"launch {name} grid {grid} block 512 shared ")
    assert line.endswith(f"stream 7 attributes{attributes}")
    shared_bytes = int(line.split()[7])
    experts, ranks = (SPLIT | changes)["num_experts"], (SPLIT | changes)["num_ranks"]
    assert shared_bytes >= 4 * experts * ranks
    assert shared_bytes <= (227 << 10 if capability == 90 else 64 << 10)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_ranks": 65}, "128 experts of 3 copies on 65 ranks, at most 512 on 64"),
        ({"num_experts": 513, "source_stride": 514}, "513 experts of 3 copies"),
        ({"num_copies": 11}, "128 experts of 11 copies on 10 ranks"),
        ({"num_copies": 0}, "128 experts of 0 copies on 10 ranks"),
        ({"rank": 10}, "rank 10 of 10, rows of 129 offsets"),
        ({"source_stride": 128}, "rank 0 of 10, rows of 128 offsets of 128 experts"),
        ({"chunks": [chunk(), chunk(route=4)]}, "route 4, 4 sweeps"),
        ({"chunks": []}, "0 chunks, 1 to 8 may be given"),
        ({"chunks": [chunk()] * 9}, "9 chunks, 1 to 8 may be given"),
        ({"chunks": [chunk()] * 12}, "12 chunks, 1 to 8 may be given"),
        ({"copy_ranks": 0}, "input or output is null"),
        ({"sweeps": -1}, "route 2, -1 sweeps"),
        ({"chunks": [chunk(tokens_per_tile=0)]}, "0 tokens in each of 1000 tiles"),
        (NEAR | {"num_levels": 4}, "4 levels of nearness, at most 3, given"),
        ({"num_levels": 1}, "1 levels of nearness, at most 3, none given"),
        ({"chunks": [chunk(most_tiles=-1)]}, "64 tokens in each of -1 tiles"),
        *(
            (
                {"chunks": [chunk(*[16] * missing, 0, *[16] * (5 - missing))]},
                "input or output is null",
            )
            for missing in range(6)
        ),
        ({"num_ranks": 64, "num_experts": 512, "source_stride": 513}, "a CTA here has 65536"),
    ],
)
def test_a_split_that_is_refused(
    host_library: Path, fake_driver: Path, kernels: Path, changes: dict, said: str
) -> None:
    lines = call(host_library, fake_driver, opened(kernels), BIND, split(**changes))

    assert launches(lines) == []
    assert lines[-1].startswith("route_split: 4 route_split")
    assert said in lines[-1]
