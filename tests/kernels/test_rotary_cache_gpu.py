"""rotary_cache on a GPU: the reference's bits, and its norms near float64; needs `make kernels`."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lightmoe.kernels import reference, rotary_cache
from lightmoe.layers.basic import Rotary
from tests.kernels.pairs import Road

pytestmark = pytest.mark.gpu

EPSILON = 1e-6
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
NUM_POSITIONS = 4096
# (tokens, query heads, KV heads, width)
SHAPES = [
    (1, 32, 8, 128),
    (7, 32, 4, 128),
    (64, 32, 8, 128),
    (333, 32, 8, 128),
    (5, 3, 1, 8),
    (9, 5, 2, 40),
    (3, 4, 1, 80),
    (11, 8, 2, 64),
    (3, 2, 1, 256),
    (5, 2, 2, 320),
]


@dataclass
class Case:
    """A fused product, its positions' tables, where it goes, and weights of norms."""

    product: Tensor
    positions: Tensor
    cache_rows: Tensor
    norms: tuple[Tensor, Tensor]
    num_kv_heads: int
    width: int

    @classmethod
    def random(cls, shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0) -> Case:
        num_tokens, num_heads, num_kv_heads, width = shape
        generator = torch.Generator("cuda").manual_seed(seed)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, device="cuda", generator=generator)

        def below(limit: int) -> Tensor:
            return torch.randperm(limit, device="cuda", generator=generator)[:num_tokens]

        columns = (num_heads + 2 * num_kv_heads) * width
        return cls(
            normal(num_tokens, columns).to(dtype),
            below(NUM_POSITIONS),
            below(num_tokens // 16 * 16 + 32),
            tuple((1 + normal(width) / 8).to(dtype) for _ in range(2)),
            num_kv_heads,
            width,
        )

    def rows(self, part: slice) -> Case:
        """Some of the tokens."""
        some = (self.product, self.positions, self.cache_rows)
        return Case(
            *(tensor[part].clone() for tensor in some), self.norms, self.num_kv_heads, self.width
        )

    def tables(self) -> tuple[Tensor, Tensor]:
        rotary = Rotary(self.width, 10000.0, NUM_POSITIONS, torch.device("cuda"))
        return rotary.tables(self.positions, self.product.dtype)

    def pages(self, num_rows: int) -> Tensor:
        """Pages that hold NaN."""
        shape = (num_rows // 16, 16, self.num_kv_heads, self.width)
        return torch.full(shape, float("nan"), dtype=self.product.dtype, device="cuda")

    def run(self, norms: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, width], all pages' keys and values [rows, KV heads, width]."""
        num_rows = int(self.cache_rows.max()) // 16 * 16 + 32
        keys, values = self.pages(num_rows), self.pages(num_rows)
        poisoned = torch.full_like(self.product, float("nan"))
        del poisoned
        weights = (self.norms, EPSILON) if norms else ()
        query = rotary_cache(self.product, self.tables(), self.cache_rows, keys, values, *weights)
        return query, keys.flatten(0, 1), values.flatten(0, 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_heads_are_turned_with_the_bits_of_the_reference(
    road: Road, shape: tuple[int, int, int, int]
) -> None:
    case = Case.random(shape, road.dtype)

    query, keys, values = case.run()

    wanted_keys, wanted_values = (pages.view(-1, 16, *pages.shape[1:]) for pages in (keys, values))
    wanted_keys = torch.full_like(wanted_keys, float("nan"))
    wanted_values = torch.full_like(wanted_values, float("nan"))
    wanted = reference.rotary_cache(
        case.product, case.tables(), case.cache_rows, wanted_keys, wanted_values
    )
    assert torch.equal(query, wanted)
    assert torch.equal(keys[case.cache_rows], wanted_keys.flatten(0, 1)[case.cache_rows])
    assert torch.equal(values[case.cache_rows], wanted_values.flatten(0, 1)[case.cache_rows])
    for pages in (keys, values):  # rows of nobody are left
        untouched = torch.ones(len(pages), dtype=torch.bool, device="cuda")
        untouched[case.cache_rows] = False
        assert pages[untouched].isnan().all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_heads_are_normed_before_they_turn(road: Road, shape: tuple[int, int, int, int]) -> None:
    case = Case.random(shape, road.dtype)
    _, num_heads, num_kv_heads, width = shape

    query, keys, values = case.run(norms=True)

    heads = case.product.unflatten(1, (-1, width))
    parts = heads[:, :-num_kv_heads].double().split([num_heads, num_kv_heads], dim=1)
    normed = torch.cat(
        [
            reference.rms_norm(part, weight.double(), EPSILON)
            for part, weight in zip(parts, case.norms, strict=True)
        ],
        dim=1,
    )
    cos, sin = (table.double() for table in case.tables())
    wanted = reference.rotate(normed, (cos, sin))
    # Heads, products and their sum were rounded; what is subnormal in fp16 to steps.
    room = 2.02 * reference.rotate(normed.abs(), (cos.abs(), sin.abs())) + 1.01 * wanted.abs()
    found = torch.cat([query, keys[case.cache_rows]], dim=1).double()
    assert ((found - wanted).abs() <= ROUNDING[road.dtype] * room + 2.0**-22).all()
    assert torch.equal(values[case.cache_rows], heads[:, -num_kv_heads:])


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("shape", [(333, 32, 8, 128), (333, 3, 1, 40)], ids=str)
def test_a_token_has_the_same_bits_in_any_company(
    road: Road, shape: tuple[int, int, int, int], norms: bool
) -> None:
    case = Case.random(shape, road.dtype)
    query, *cache = case.run(norms)

    for part in (slice(0, 1), slice(6, 7), slice(7, 40), slice(200, 333)):
        some = case.rows(part)
        alone, *alone_cache = some.run(norms)
        assert torch.equal(alone, query[part])
        for pages, wanted in zip(alone_cache, cache, strict=True):
            assert torch.equal(pages[some.cache_rows], wanted[some.cache_rows])


def test_no_tokens(road: Road) -> None:
    case = Case.random((3, 4, 2, 64), road.dtype)
    keys, values = case.pages(32), case.pages(32)
    none = case.rows(slice(0, 0))

    query = rotary_cache(none.product, none.tables(), none.cache_rows, keys, values)

    assert query.shape == (0, 4, 64)
    assert keys.isnan().all()


@pytest.mark.parametrize("norms", [False, True])
def test_a_graph_replays_with_other_tokens(road: Road, norms: bool) -> None:
    shape = (7, 32, 8, 128)
    case = Case.random(shape, road.dtype)
    keys, values, tables = case.pages(64), case.pages(64), case.tables()
    weights = (case.norms, EPSILON) if norms else ()

    def enqueue() -> Tensor:
        return rotary_cache(case.product, tables, case.cache_rows, keys, values, *weights)

    enqueue()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        query = enqueue()

    for seed in (3, 4):
        other = Case.random(shape, road.dtype, seed)
        other.norms = case.norms
        case.product.copy_(other.product)
        case.cache_rows.copy_(other.cache_rows)
        for table, new in zip(tables, other.tables(), strict=True):
            table.copy_(new)
        for tensor in (query, keys, values):
            tensor.fill_(float("nan"))
        graph.replay()
        wanted, *cache = other.run(norms)
        assert torch.equal(query, wanted)
        for pages, filled in zip((keys, values), cache, strict=True):
            rows = pages.flatten(0, 1)
            assert torch.equal(rows[other.cache_rows], filled[other.cache_rows])
            assert int(rows.isnan().all(dim=-1).all(dim=-1).sum()) == 64 - 7
