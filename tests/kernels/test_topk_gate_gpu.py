"""The gate's kernels against float64: choices, weights, the sort, graphs; needs `make kernels`."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lightmoe.kernels import reference
from lightmoe.kernels.sort_pairs import sort_chunks
from lightmoe.kernels.topk_gate import FUSED_TOKENS, route_tokens, sort_pairs, topk_gate
from tests.gpus import half_dtypes

pytestmark = pytest.mark.gpu
SHAPES = [(8, 2), (7, 3), (1, 1), (33, 5), (60, 4), (64, 6), (128, 8), (160, 6), (256, 8)]
MANY = [(384, 8), (512, 16)]
# One CTA, a cluster, a few that poll, a grid with a barrier; odd numbers on every side of the
# borders.
TOKENS = [0, 1, 3, 16, 17, 31, 100, 256, 257, 383, 385, 1500, 5000]
KINDS = ["random", "ties", "one expert", "not finite"]
GROUPS = [
    (160, 6, 8, 3, "softmax"),
    (8, 2, 4, 1, "softmax"),
    (60, 4, 6, 2, "softmax"),
    (256, 8, 8, 4, "sigmoid"),
    (8, 2, 4, 2, "sigmoid"),
    (512, 16, 16, 5, "sigmoid"),
]
TOKENS_PER_TILE = 16
TILES = [8, 24, 64, 192, 256]


def make_logits(num_tokens: int, num_experts: int, kind: str, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, device="cuda", generator=generator)
    if kind == "ties":
        return (2 * logits).round() / 2
    if kind == "one expert":
        logits[:, num_experts // 2] = 50.0
    if kind == "not finite":
        chance = torch.rand(logits.shape, device="cuda", generator=generator)
        logits[chance < 0.4] = float("nan")
        logits[chance < 0.1] = float("inf")
        logits[chance > 0.9] = float("-inf")
        logits[:1] = float("nan")
    return logits


def slots_of(num_experts: int) -> Tensor:
    return torch.arange(num_experts, dtype=torch.int32, device="cuda").flip(0)


def assert_sorted(experts: Tensor, num_experts: int, sort: tuple) -> None:
    """The sort of a choice is the reference's, and every tile belongs to one expert."""
    groups, pair_row, pair_index = sort
    wanted, wanted_row, wanted_index = reference.sort_pairs(
        experts.long().cpu(), num_experts, groups.slots.cpu(), groups.tokens_per_tile
    )
    assert torch.equal(pair_row.cpu(), wanted_row)
    assert torch.equal(pair_index.cpu(), wanted_index)
    assert torch.equal(groups.offsets.cpu(), wanted.offsets)
    assert torch.equal(groups.tile_offsets.cpu(), wanted.tile_offsets)
    num_tiles = len(wanted.tile_groups)
    assert len(groups.tile_groups) >= num_tiles
    assert torch.equal(groups.tile_groups[:num_tiles].cpu(), wanted.tile_groups)


def assert_chosen(logits: Tensor, experts: Tensor, weights: Tensor, **rule: object) -> None:
    """Experts as the reference's; where two sigmoids are an ulp apart, the weights decide."""
    bias = rule.pop("bias", None)
    rule |= {} if bias is None else {"bias": bias.cpu()}
    wanted, wanted_weights = reference.topk_gate(
        None, None, experts.shape[1], logits=logits.float().cpu(), **rule
    )
    same = (experts.long().cpu() == wanted).all(dim=1)
    if rule.get("scoring") == "sigmoid":
        assert same.float().mean() > 0.99 or not len(same)
    else:
        assert same.all()
    assert weights.isfinite().all()
    torch.testing.assert_close(weights.cpu()[same], wanted_weights[same], rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_experts", "num_chosen"), SHAPES + MANY)
def test_choice_and_sort_from_logits(num_experts: int, num_chosen: int, kind: str) -> None:
    for seed, num_tokens in enumerate(TOKENS):
        logits = make_logits(num_tokens, num_experts, kind, seed)
        rule = {"renormalize": bool(seed % 2), "scale": 1.5}
        num_pairs = num_tokens * num_chosen
        pair_weight = torch.full((num_pairs,), torch.nan, device="cuda")
        counts = torch.full((num_experts,), -7, dtype=torch.int32, device="cuda")

        experts, weights, *sort = route_tokens(
            None,
            None,
            num_chosen,
            logits=logits,
            slots=slots_of(num_experts),
            tokens_per_tile=TOKENS_PER_TILE,
            pair_weight=pair_weight,
            expert_counts=counts,
            **rule,
        )

        assert_chosen(logits, experts, weights, **rule)
        assert_sorted(experts, num_experts, tuple(sort))
        groups, _, pair_index = sort
        assert torch.equal(pair_weight[pair_index.flatten().long()], weights.flatten())
        assert torch.equal(counts, groups.offsets.diff())


@pytest.mark.parametrize("dtype_name", ["float32", *half_dtypes()])
def test_logits_of_any_dtype(dtype_name: str) -> None:
    dtype = getattr(torch, dtype_name)
    for num_experts in (8, 60, 129, 400):
        logits = make_logits(77, num_experts, "not finite", 1).to(dtype)
        experts, weights = topk_gate(None, None, 2, logits=logits, renormalize=False)
        assert_chosen(logits, experts, weights, renormalize=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_experts", "num_chosen", "num_groups", "num_groups_per_token", "scoring"), GROUPS
)
def test_groups(
    num_experts: int,
    num_chosen: int,
    num_groups: int,
    num_groups_per_token: int,
    scoring: str,
    kind: str,
) -> None:
    bias = torch.randn(num_experts, device="cuda") / 8 if scoring == "sigmoid" else None
    rule = {
        "renormalize": True,
        "scale": 2.5,
        "num_groups": num_groups,
        "num_groups_per_token": num_groups_per_token,
        "scoring": scoring,
        "bias": bias,
    }
    for num_tokens in (1, 50, 700):
        logits = make_logits(num_tokens, num_experts, kind, num_tokens)

        experts, weights = topk_gate(None, None, num_chosen, logits=logits, **rule)

        assert_chosen(logits, experts, weights, **rule)


@pytest.mark.parametrize("router_is_float32", [False, True])
@pytest.mark.parametrize("dtype_name", half_dtypes())
@pytest.mark.parametrize(
    ("num_experts", "width", "num_chosen"),
    [(128, 2048, 8), (8, 4096, 2), (64, 2048, 6), (256, 7168, 8), (60, 2056, 4), (7, 8, 2)],
)
def test_the_router_product_has_the_same_bits_in_any_company(
    num_experts: int, width: int, num_chosen: int, dtype_name: str, router_is_float32: bool
) -> None:
    dtype = getattr(torch, dtype_name)
    generator = torch.Generator("cuda").manual_seed(width)
    hidden = torch.randn(300, width, device="cuda", generator=generator).to(dtype)
    router = torch.randn(num_experts, width, device="cuda", generator=generator) / width**0.5
    router = router if router_is_float32 else router.to(dtype)
    exact = (hidden.double() @ router.double().t()).softmax(dim=1)

    experts, weights = topk_gate(hidden, router, num_chosen, renormalize=False)

    chosen = exact.gather(1, experts.long())
    torch.testing.assert_close(weights.double(), chosen, rtol=1e-4, atol=1e-7)
    best = exact.topk(num_chosen, dim=1).values
    torch.testing.assert_close(chosen, best, rtol=1e-4, atol=1e-7)
    for num_tokens in (0, 1, 2, 15, 33, FUSED_TOKENS, FUSED_TOKENS + 1, 299):
        part = topk_gate(hidden[:num_tokens].clone(), router, num_chosen, renormalize=False)
        assert torch.equal(part[0], experts[:num_tokens])
        assert torch.equal(part[1], weights[:num_tokens])
    for num_tokens in (1, 33, FUSED_TOKENS):
        sort = route_tokens(
            hidden[:num_tokens].clone(),
            router,
            num_chosen,
            slots=slots_of(num_experts),
            tokens_per_tile=TOKENS_PER_TILE,
            renormalize=False,
        )
        assert torch.equal(sort[0], experts[:num_tokens])
        assert_sorted(sort[0], num_experts, sort[2:])


@pytest.mark.parametrize("dtype_name", half_dtypes())
@pytest.mark.parametrize(
    ("num_experts", "width"), [(8, 4096), (64, 2048), (128, 2048), (128, 264), (300, 1032)]
)
def test_every_tile_of_the_router_product_has_the_same_bits(
    num_experts: int, width: int, dtype_name: str
) -> None:
    dtype = getattr(torch, dtype_name)
    generator = torch.Generator("cuda").manual_seed(num_experts)
    hidden = torch.randn(9001, width, device="cuda", generator=generator).to(dtype)
    router = torch.randn(num_experts, width, device="cuda", generator=generator) / width**0.5
    router = router.to(dtype)

    experts, weights = topk_gate(hidden, router, 2, renormalize=False)

    exact = (hidden.double() @ router.double().t()).softmax(dim=1)
    torch.testing.assert_close(
        weights.double(), exact.gather(1, experts.long()), rtol=1e-4, atol=1e-7
    )
    for begin, end in [(8937, 9001), (17, 82), (5000, 5300), (3, 1003), (4000, 7000)]:
        part = topk_gate(hidden[begin:end].clone(), router, 2, renormalize=False)
        assert torch.equal(part[0], experts[begin:end])
        assert torch.equal(part[1], weights[begin:end])


@pytest.mark.parametrize(("num_experts", "num_per_token"), [(8, 2), (10, 3), (64, 6), (512, 16)])
def test_sort_of_given_experts(num_experts: int, num_per_token: int) -> None:
    for num_tokens in (0, 1, 40, 333, 6000):
        experts = torch.randint(
            num_experts, (num_tokens, num_per_token), device="cuda", dtype=torch.int32
        )
        assert_sorted(
            experts,
            num_experts,
            sort_pairs(experts, num_experts, slots_of(num_experts), TOKENS_PER_TILE),
        )


@pytest.mark.parametrize("tokens_per_tile", TILES)
@pytest.mark.parametrize("kind", ["random", "one expert"])
@pytest.mark.parametrize("num_experts", [5, 128, 257])
def test_tables_of_tiles_of_any_size(num_experts: int, kind: str, tokens_per_tile: int) -> None:
    for num_tokens in (1, 25, 193, 700, 4097):
        logits = make_logits(num_tokens, num_experts, kind, num_tokens)

        experts, _, *sort = route_tokens(
            None,
            None,
            3,
            logits=logits,
            slots=slots_of(num_experts),
            tokens_per_tile=tokens_per_tile,
            renormalize=True,
        )

        assert sort[0].tokens_per_tile == tokens_per_tile
        assert_sorted(experts, num_experts, tuple(sort))
        again = sort_pairs(experts, num_experts, slots_of(num_experts), tokens_per_tile)
        assert_sorted(experts, num_experts, again)


def test_pairs_of_experts_that_do_not_exist_are_left_out() -> None:
    experts = torch.randint(-2, 12, (500, 4), device="cuda", dtype=torch.int32)

    groups, pair_row, pair_index = sort_pairs(experts, 10, slots_of(10), TOKENS_PER_TILE)

    exists = (experts >= 0) & (experts < 10)
    assert torch.equal(pair_index < 0, ~exists)
    num_pairs = int(exists.sum())
    assert int(groups.offsets[-1]) == num_pairs
    order = torch.sort(torch.where(exists, experts, 10).flatten(), stable=True).indices
    assert torch.equal(pair_row[:num_pairs].long(), order[:num_pairs] // 4)


@pytest.mark.parametrize("counts", [[5], [300, 0, 41], [1, 2500, 4096]], ids=str)
@pytest.mark.parametrize("num_experts", [5, 128, 257])
def test_chunks_are_sorted_each_by_itself(num_experts: int, counts: list[int]) -> None:
    generator = torch.Generator("cuda").manual_seed(7)
    experts = torch.randint(
        num_experts, (sum(counts), 4), device="cuda", generator=generator, dtype=torch.int32
    )
    ends = itertools.accumulate(counts)
    chunks = [slice(end - count, end) for count, end in zip(counts, ends, strict=True)]

    for _ in range(3):
        offsets, pair_index = sort_chunks(experts, num_experts, chunks)

        wanted = reference.sort_chunks(experts.long().cpu(), num_experts, chunks)
        assert torch.equal(offsets.cpu(), wanted[0])
        assert torch.equal(pair_index.cpu(), wanted[1])


@pytest.mark.parametrize("num_tokens", [5, 200, 300, 3000])
def test_graphs_follow_what_changes_and_repeat_their_bits(num_tokens: int) -> None:
    num_experts, num_chosen = 128, 8
    logits = make_logits(num_tokens, num_experts, "random", 0)
    slots = slots_of(num_experts)

    def route() -> tuple:
        return route_tokens(
            None,
            None,
            num_chosen,
            logits=logits,
            slots=slots,
            tokens_per_tile=TOKENS_PER_TILE,
            renormalize=True,
        )

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        route()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = route()
    for seed in range(4):
        for kind in KINDS:
            torch.cuda.synchronize()
            logits.copy_(make_logits(num_tokens, num_experts, kind, seed))
            expected = route()
            for output in (*captured[:2], *captured[3:]):
                output.fill_(-1)
            torch.cuda.synchronize()
            for _ in range(5):
                with torch.cuda.stream(stream):
                    graph.replay()
            torch.cuda.synchronize()
            for output, wanted in zip(captured, expected, strict=True):
                if isinstance(output, Tensor):
                    assert torch.equal(output, wanted)
            assert_sorted(captured[0], num_experts, captured[2:])


def test_launches_of_any_sizes_may_follow_each_other() -> None:
    sizes = [(200, 64, 6), (5000, 128, 8), (300, 64, 6), (30, 8, 2), (1000, 256, 8)]
    sizes += [(385, 128, 8), (0, 8, 2)]
    for repeat in range(20):
        for num_tokens, num_experts, num_chosen in sizes:
            logits = make_logits(num_tokens, num_experts, "random", repeat)
            experts, _, *sort = route_tokens(
                None,
                None,
                num_chosen,
                logits=logits,
                slots=slots_of(num_experts),
                tokens_per_tile=TOKENS_PER_TILE,
                renormalize=True,
            )
            assert_sorted(experts, num_experts, tuple(sort))
