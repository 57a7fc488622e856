"""rotary_cache and add_norm without a GPU: their code on the host, the reference, and refusals."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightmoe.errors import UsageError
from lightmoe.kernels import add_norm, reference, rotary_cache
from lightmoe.kernels.add_norm import add_norm as native_add_norm
from lightmoe.kernels.rotary_cache import rotary_cache as native_rotary_cache
from lightmoe.layers.basic import Rotary
from tests.kernels.route_cases import compile_host

HERE = Path(__file__).parent
BF16 = torch.bfloat16
EPSILON = 1e-5
ROUNDING = 1.01 * 2.0**-8  # of bfloat16, to the nearest; float32's are in the 1 %
# (tokens, query heads, KV heads, width); 48 and 40 do not fill their lanes, 320 is more than a warp
HEADS = [(1, 1, 1, 8), (3, 4, 2, 128), (5, 3, 1, 48), (7, 2, 1, 40), (2, 2, 1, 320), (1, 5, 1, 64)]


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class RotaryCacheArgs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("heads", "query_weight", "key_weight", "cos")),
        *((name, ctypes.c_void_p) for name in ("sin", "cache_rows", "query", "keys", "values")),
        ("table_stride", ctypes.c_longlong),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("num_tokens", "num_heads", "num_kv_heads", "width")),
        ("lanes_per_head", ctypes.c_int),
    ]


class AddNormArgs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("hidden", "addend", "weight", "sum", "normed")),
        ("epsilon", ctypes.c_float),
        ("num_rows", ctypes.c_int),
        ("width", ctypes.c_int),
    ]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("emulated") / "layer_rows.so"
    source = HERE / "emulator/layer_rows.cpp"
    kernels = ctypes.CDLL(str(compile_host(source, library, f"-I{HERE / 'emulator/cuda'}")))
    kernels.run_rotary_cache.restype = kernels.run_add_norm.restype = ctypes.c_bool
    return kernels


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class Case:
    """A fused product, where its heads go, and the tables of its positions."""

    def __init__(self, num_tokens: int, num_heads: int, num_kv_heads: int, width: int) -> None:
        self.sizes = (num_tokens, num_heads, num_kv_heads, width)
        self.product = rows(num_tokens, (num_heads + 2 * num_kv_heads) * width)
        positions = torch.arange(num_tokens) * 13 + 5
        self.tables = Rotary(width, 10000.0, 200, torch.device("cpu")).tables(positions, BF16)
        self.cache_rows = torch.randperm(16, generator=torch.Generator().manual_seed(1))[
            :num_tokens
        ]
        self.norms = (1 + rows(width, seed=2) / 4, 1 + rows(width, seed=3) / 4)

    def pages(self) -> Tensor:
        return torch.full((4, 4, *self.sizes[2:]), float("nan"), dtype=BF16)

    def emulate(self, kernels: ctypes.CDLL, norms: bool) -> tuple[Tensor, Tensor, Tensor]:
        num_tokens, num_heads, num_kv_heads, width = self.sizes
        query = torch.full((num_tokens, num_heads, width), float("nan"), dtype=BF16)
        keys, values = self.pages(), self.pages()
        lanes = min(32, 1 << (width // 8 - 1).bit_length())
        weights = self.norms if norms else (None, None)
        tensors = (self.product, *weights, *self.tables, self.cache_rows, query, keys, values)
        arguments = RotaryCacheArgs(
            *map(address, tensors), self.tables[0].stride(0), EPSILON, *self.sizes, lanes
        )
        num_ctas = -(-num_tokens * (num_heads + 2 * num_kv_heads) * lanes // 128)
        assert kernels.run_rotary_cache(ctypes.byref(arguments), num_ctas, 128)
        return query, keys, values


@pytest.mark.parametrize("sizes", HEADS, ids=str)
def test_heads_are_turned_and_cached_with_the_bits_of_the_reference(
    emulated: ctypes.CDLL, sizes: tuple[int, int, int, int]
) -> None:
    case = Case(*sizes)
    keys, values = case.pages(), case.pages()

    found = case.emulate(emulated, norms=False)

    query = rotary_cache(case.product, case.tables, case.cache_rows, keys, values)
    for mine, wanted in zip(found, (query, keys, values), strict=True):
        assert torch.equal(mine.nan_to_num(9.0), wanted.nan_to_num(9.0))  # NaN: nobody's rows
    assert int(found[1].isnan().all(dim=-1).sum()) == (16 - sizes[0]) * sizes[2]


@pytest.mark.parametrize("sizes", HEADS, ids=str)
def test_heads_are_normed_before_they_turn(
    emulated: ctypes.CDLL, sizes: tuple[int, int, int, int]
) -> None:
    case = Case(*sizes)
    _, num_heads, num_kv_heads, width = sizes

    query, keys, values = case.emulate(emulated, norms=True)

    heads = case.product.unflatten(1, (-1, width))
    turned, value = heads[:, :-num_kv_heads].double(), heads[:, -num_kv_heads:]
    parts = turned.split([num_heads, num_kv_heads], dim=1)
    normed = torch.cat(
        [
            reference.rms_norm(part, weight.double(), EPSILON)
            for part, weight in zip(parts, case.norms, strict=True)
        ],
        dim=1,
    )
    cos, sin = (table.double() for table in case.tables)
    wanted = reference.rotate(normed, (cos, sin))
    # Heads, products and their sum were rounded.
    room = 2 * ROUNDING * reference.rotate(normed.abs(), (cos.abs(), sin.abs()))
    room += ROUNDING * wanted.abs()
    rows_of_keys, rows_of_values = (
        pages.flatten(0, 1)[case.cache_rows] for pages in (keys, values)
    )
    found = torch.cat([query, rows_of_keys], dim=1).double()
    assert ((found - wanted).abs() <= room).all()
    assert torch.equal(rows_of_values, value)


@pytest.mark.parametrize("width", [8, 40, 256, 2056, 4096, 8192, 8200, 20000])
def test_a_sum_and_its_norm_are_rounded_once(emulated: ctypes.CDLL, width: int) -> None:
    hidden, addend, weight = 3 * rows(3, width), rows(3, width, seed=1), rows(width, seed=2)
    total, normed = (torch.full((3, width), float("nan"), dtype=BF16) for _ in range(2))
    num_threads = min(1024, -(-width // 256) * 32)

    arguments = AddNormArgs(
        *map(address, (hidden, addend, weight, total, normed)), EPSILON, 3, width
    )
    assert emulated.run_add_norm(ctypes.byref(arguments), 3, num_threads)

    assert torch.equal(total, hidden + addend)
    exact = reference.rms_norm(total.double(), weight.double(), EPSILON)
    assert ((normed.double() - exact).abs() <= ROUNDING * exact.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_the_reference_adds_then_norms(dtype: torch.dtype) -> None:
    hidden, addend, weight = (rows(5, 24, seed=s, dtype=dtype) for s in range(3))

    total, normed = add_norm(hidden, addend, weight[0], EPSILON)

    assert torch.equal(total, hidden + addend)
    exact = total.double() * weight[0].double()
    exact /= (total.double().square().mean(dim=1, keepdim=True) + EPSILON).sqrt()
    torch.testing.assert_close(normed.double(), exact, rtol=1e-2 if dtype == BF16 else 1e-5, atol=0)


def test_the_reference_puts_turned_keys_and_values_into_their_pages() -> None:
    product, pages = rows(3, 4 * 8, dtype=torch.float32), torch.zeros(2, 4, 1, 8)
    keys, values, cache_rows = pages.clone(), pages.clone(), torch.tensor([6, 1, 2])
    tables = Rotary(8, 100.0, 9, torch.device("cpu")).tables(torch.tensor([0, 3, 8]), torch.float32)

    query = rotary_cache(product, tables, cache_rows, keys, values)

    heads = product.view(3, 4, 8)
    turned = reference.rotate(heads, tables)
    assert torch.equal(query, turned[:, :2])
    assert torch.equal(query[0], heads[0, :2])  # position 0
    assert torch.equal(keys.flatten(0, 1)[cache_rows], turned[:, 2:3])
    assert torch.equal(values.flatten(0, 1)[cache_rows], heads[:, 3:])
    others = [0, 3, 4, 5, 7]
    assert not keys.flatten(0, 1)[others].any()
    assert not values.flatten(0, 1)[others].any()


def half(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def refusal(call: Callable[..., object], arguments: dict[str, object]) -> str:
    with pytest.raises(UsageError) as raised:
        call(**arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


ADD_NORM = {"hidden": half(5, 16), "addend": half(5, 16), "weight": half(16), "epsilon": EPSILON}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden": half(5, 16, dtype=torch.float32)}, "hidden is torch.float32; it needs float16"),
        ({"hidden": half(16)}, "hidden has 1 dimensions [16]; it needs 2"),
        ({"hidden": half(5, 12)}, "hidden has size 12 in dimension 1 of [5, 12]; it needs a mult"),
        ({"hidden": half(16, 5 * 8).t()[:, :8]}, "addend has size"),
        ({"hidden": half(16, 5).t()}, "hidden has strides [1, 5] for [5, 16]"),
        ({"addend": half(4, 16)}, "addend has size 4 in dimension 0 of [4, 16]; it needs 5"),
        ({"addend": half(5, 16, dtype=torch.float16)}, "addend is torch.float16; it needs"),
        ({"addend": half(5, 24)[:, :16]}, "addend has strides [24, 1] for [5, 16]"),
        ({"weight": half(8)}, "weight has size 8 in dimension 0 of [8]; it needs 16"),
        ({"weight": half(17)[1:]}, "weight begins at an address that is no multiple of 16"),
        ({}, "hidden is on cpu; it needs a CUDA device"),
    ],
)
def test_add_norm_names_what_does_not_fit(changes: dict[str, object], said: str) -> None:
    text = refusal(native_add_norm, ADD_NORM | changes)
    assert text.startswith("add_norm: ")
    assert said in text


TABLES = half(5, 2, 16)
ROTARY_CACHE = {
    "product": half(5, 8 * 16),
    "rotary": TABLES.split(1, dim=1),
    "cache_rows": torch.zeros(5, dtype=torch.int64),
    "keys": half(6, 16, 2, 16),
    "values": half(6, 16, 2, 16),
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"product": half(5, 128, dtype=torch.float32)}, "product is torch.float32; it needs"),
        ({"product": half(5, 8, 16)}, "product has 3 dimensions [5, 8, 16]; it needs 2"),
        ({"product": half(5, 256)[:, :128]}, "product has strides [256, 1] for [5, 128]"),
        ({"product": half(5, 4 * 16)}, "product has 64 columns; it needs heads of width 16, more"),
        ({"product": half(5, 8 * 16 + 8)}, "product has 136 columns; it needs heads of width 16"),
        ({"keys": half(6, 16, 32)}, "keys has 3 dimensions [6, 16, 32]; it needs 4"),
        ({"values": half(6, 16, 1, 16)}, "values has size 1 in dimension 2"),
        ({"keys": half(6, 16, 2, 16, dtype=torch.float16)}, "keys is torch.float16; it needs"),
        (
            {"keys": half(6, 16, 2, 12), "values": half(6, 16, 2, 12)},
            "keys has size 12 in dimension 3 of [6, 16, 2, 12]; it needs a multiple of 8",
        ),
        ({"values": half(6, 32, 2, 16)[:, :16]}, "values has gaps between its pages"),
        ({"rotary": (half(5, 16), half(5, 16))}, "cos has 2 dimensions [5, 16]; it needs 3"),
        ({"rotary": (TABLES[:, :1], half(4, 1, 16))}, "sin has size 4 in dimension 0"),
        (
            {"rotary": (TABLES[:, :1], half(5, 1, 16))},
            "cos and sin have tokens [32, 16] elements apart; it needs the same multiple of 8",
        ),
        ({"cache_rows": torch.zeros(4, dtype=torch.int64)}, "cache_rows has size 4 in dimension 0"),
        ({"cache_rows": torch.zeros(5, dtype=torch.int32)}, "cache_rows is torch.int32; it needs"),
        ({"cache_rows": torch.zeros(10, dtype=torch.int64)[::2]}, "cache_rows has gaps"),
        ({"norms": (half(8), half(16))}, "query_weight has size 8 in dimension 0 of [8]"),
        ({"norms": (half(16), half(16, dtype=torch.float32))}, "key_weight is torch.float32"),
        ({}, "product is on cpu; it needs a CUDA device"),
    ],
)
def test_rotary_cache_names_what_does_not_fit(changes: dict[str, object], said: str) -> None:
    text = refusal(native_rotary_cache, ROTARY_CACHE | changes)
    assert text.startswith("rotary_cache: ")
    assert said in text
