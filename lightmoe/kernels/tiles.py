"""Which tile a matrix product runs with: a pure function of its shape and the architecture.

No tuning files. The tiles that are compiled are listed here, best first; the first that nothing
speaks against is taken, and `rejections` says what spoke against the others. Nothing but the
standard library is imported: the build reads the lists too.

Words: a tile computes `weight_rows` rows of a weight (gate and up rows both count) for `tokens`
pairs of one group; P pairs, G groups.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, replace

MULTIPROCESSORS = {75: 68, 80: 108, 86: 84, 89: 128, 90: 132}
SHARED_BYTES = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
CHUNK_BYTES = 16
MOST_SPLITS = 8
START_STAGES = 6
# Of quantised tiles: a warp with fewer rows spends more of its instructions on tokens and copies.
WIDTH_EFFICIENCY = {64: 0.75, 128: 0.92, 256: 1.0}
FEWEST_SPLIT_STAGES = 12  # of a part of the depth; fewer, and filling the pipeline costs more
MOST_STAGES = 12  # of warpgroup tiles
PAIRS_TO_COMPUTE = 192  # of a group: about here reading its 16-bit weights stops being the bound
FEATURES_TO_PERMUTE = 2048
FEW_TOKENS = 64  # of one matrix: more are more work than reading it
STAGES_ALONE = 9  # of a CTA that has a multiprocessor to itself
_QUEUE_TILES = 16
_SWIZZLE_BYTES = 1024  # at whose multiples the stages of warpgroup tiles begin
_RING_BYTES = 2 * MOST_STAGES * 8 + 16 * CHUNK_BYTES  # barriers, and the ring of units
_RESERVED_BYTES = 1024  # of an SM's shared memory, for each CTA
_SMALLEST_GROUP = 32
_SCALE_SPAN = 128  # elements of depth that share an e4m3 scale


@dataclass(frozen=True, slots=True)
class Tile:
    """light_tile of light_ops.h; `ctas_per_sm` is how many of its CTAs one SM is to hold.

    `row_bits` are those of an element of the rows: 8 in e4m3.
    """

    weight_rows: int
    tokens: int
    depth: int
    stages: int
    warps_weight: int
    warps_tokens: int
    half_accumulate: int = 0
    limit: int = 0
    depth_parts: int = 1
    ctas_per_sm: int = 1
    row_bits: int = 16

    @property
    def threads(self) -> int:
        """Threads of a CTA: where warpgroups multiply, one more of them copies."""
        warps = self.warps_weight * self.warps_tokens * self.depth_parts
        return 32 * warps + (128 if self.limit else 0)

    @property
    def fields(self) -> tuple[int, ...]:
        """The fields of light_tile in their order."""
        return astuple(self)[:9]

    @property
    def name(self) -> str:
        """The tile's part of a kernel's name."""
        if self.limit:
            warpgroups = f"{self.warps_weight // 4}x{self.depth_parts}"
            return f"w{self.weight_rows}_n{self.limit}_d{self.depth}_{warpgroups}_wgmma"
        warps = f"{self.warps_weight}x{self.warps_tokens}"
        suffix = "_acc16" if self.half_accumulate else ""
        return f"w{self.weight_rows}_t{self.tokens}_d{self.depth}_s{self.stages}_{warps}{suffix}"

    def stage_bytes(self, num_bits: int) -> int:
        """Shared memory of a pipeline stage, with the most scales and zeros there can be."""
        weights = self.weight_rows * self.depth * num_bits // 8
        scales = 0 if num_bits == 16 else 2 * self.weight_rows * (self.depth // _SMALLEST_GROUP) * 2
        if self.row_bits == 8:
            scales = 2 * (self.depth // _SCALE_SPAN) * (2 + self.tokens) * 4
        total = weights + scales + self.tokens * self.depth * self.row_bits // 8
        return total + -total % _SWIZZLE_BYTES if self.limit else total

    def shared_bytes(self, num_bits: int) -> int:
        """Of a CTA: cute_kernels/tile_memory.h and hopper_launch.h have the same formulas."""
        queue = 2 * _QUEUE_TILES * CHUNK_BYTES + 2 * self.tokens * 4
        return self.stages * self.stage_bytes(num_bits) + (_RING_BYTES if self.limit else queue)


@dataclass(frozen=True, slots=True)
class Product:
    """What a product's tile depends on."""

    architecture: int
    num_pairs: int
    num_groups: int
    num_features: int
    depth: int
    swiglu: bool
    half: bool
    deterministic: bool = True
    num_bits: int = 16
    tokens_per_tile: int | None = None
    row_bits: int = 16

    @property
    def weight_rows(self) -> int:
        """Rows of a group's weight."""
        return self.num_features * (2 if self.swiglu else 1)

    @property
    def occupied_groups(self) -> float:
        """Groups that have pairs, as expected where each pair chooses among all alike."""
        if self.num_groups == 1:
            return 1.0
        return self.num_groups * -math.expm1(self.num_pairs * math.log1p(-1 / self.num_groups))

    @property
    def pairs_per_group(self) -> float:
        """Pairs of an occupied group, as expected."""
        return self.num_pairs / max(self.occupied_groups, 1.0)

    def num_outputs(self, tile: Tile) -> float:
        """Output tiles, as expected where a group's pairs are about Poisson distributed."""
        mean = self.pairs_per_group
        if mean > tile.tokens:
            token_tiles = mean / tile.tokens + 0.5
        else:  # one, and a second one where the group has more than a tile holds
            token_tiles = 1 + 0.5 * math.erfc((tile.tokens - mean) / math.sqrt(2 * mean))
        weight_blocks = math.ceil(self.weight_rows / tile.weight_rows)
        return self.occupied_groups * token_tiles * weight_blocks


Tiles = tuple[Tile, ...]

_TURING: dict[int, Tiles] = {  # 64 KiB of shared memory, and no cp.async: two stages
    16: (
        Tile(256, 128, 32, 2, 4, 2),
        Tile(128, 64, 32, 2, 2, 2, half_accumulate=1, ctas_per_sm=2),
        Tile(128, 64, 32, 2, 2, 2, ctas_per_sm=2),
        Tile(64, 32, 64, 2, 4, 1, ctas_per_sm=2),
        Tile(64, 16, 64, 2, 4, 1, ctas_per_sm=3),
        Tile(64, 8, 64, 2, 4, 1, ctas_per_sm=3),
    ),
    8: (
        Tile(128, 64, 64, 2, 4, 1, half_accumulate=1),
        Tile(128, 64, 64, 2, 4, 1),
        Tile(128, 32, 64, 2, 4, 1, ctas_per_sm=2),
        Tile(128, 16, 64, 2, 4, 1, ctas_per_sm=2),
        Tile(64, 16, 64, 2, 4, 1, ctas_per_sm=4),
        Tile(128, 8, 64, 2, 4, 1, ctas_per_sm=3),
        Tile(64, 8, 64, 2, 4, 1, ctas_per_sm=4),
    ),
    4: (
        Tile(128, 64, 64, 2, 4, 1, half_accumulate=1, ctas_per_sm=2),
        Tile(128, 64, 64, 2, 4, 1, ctas_per_sm=2),
        Tile(128, 32, 64, 2, 4, 1, ctas_per_sm=3),
        Tile(128, 16, 64, 2, 4, 1, ctas_per_sm=3),
        Tile(64, 16, 64, 2, 4, 1, ctas_per_sm=4),
        Tile(128, 8, 64, 2, 4, 1, ctas_per_sm=4),
        Tile(64, 8, 64, 2, 4, 1, ctas_per_sm=4),
    ),
}
_SMALL_ASYNC: dict[int, Tiles] = {  # 100 KiB: sm_86 and sm_89
    16: (
        Tile(256, 128, 32, 4, 4, 2),
        Tile(128, 64, 32, 3, 2, 2, ctas_per_sm=2),
        Tile(64, 32, 64, 4, 4, 1, ctas_per_sm=2),
        Tile(64, 16, 64, 4, 4, 1, ctas_per_sm=2),
        Tile(64, 8, 64, 4, 4, 1, ctas_per_sm=2),
    ),
    8: (
        Tile(256, 128, 64, 2, 8, 1),
        Tile(128, 64, 64, 2, 4, 1, ctas_per_sm=2),
        Tile(128, 32, 64, 3, 4, 1, ctas_per_sm=2),
        Tile(128, 16, 64, 3, 4, 1, ctas_per_sm=2),
        Tile(64, 16, 64, 5, 4, 1, ctas_per_sm=2),
        Tile(128, 8, 64, 4, 4, 1, ctas_per_sm=2),
        Tile(64, 8, 64, 5, 4, 1, ctas_per_sm=3),
    ),
    4: (
        Tile(256, 128, 64, 3, 8, 1),
        Tile(128, 64, 64, 3, 4, 1, ctas_per_sm=2),
        Tile(128, 32, 64, 4, 4, 1, ctas_per_sm=2),
        Tile(128, 16, 64, 5, 4, 1, ctas_per_sm=2),
        Tile(64, 16, 64, 5, 4, 1, ctas_per_sm=3),
        Tile(256, 8, 64, 4, 4, 1, ctas_per_sm=2),
        Tile(128, 8, 64, 5, 4, 1, ctas_per_sm=3),
        Tile(64, 8, 64, 6, 4, 1, ctas_per_sm=3),
    ),
}
_LARGE_ASYNC: dict[int, Tiles] = {  # 164 KiB: sm_80
    16: (
        Tile(256, 128, 64, 3, 4, 2),
        Tile(128, 64, 64, 3, 2, 2, ctas_per_sm=2),
        Tile(64, 32, 64, 5, 4, 1, ctas_per_sm=2),
        Tile(64, 16, 64, 6, 4, 1, ctas_per_sm=2),
        Tile(64, 8, 64, 6, 4, 1, ctas_per_sm=2),
    ),
    8: (
        Tile(256, 128, 64, 3, 8, 1),
        Tile(128, 64, 64, 4, 4, 1, ctas_per_sm=2),
        Tile(256, 32, 64, 3, 4, 1, ctas_per_sm=2),
        Tile(128, 32, 64, 5, 4, 1, ctas_per_sm=2),
        Tile(128, 16, 64, 5, 4, 1, ctas_per_sm=2),
        Tile(64, 16, 64, 6, 4, 1, ctas_per_sm=3),
        Tile(256, 8, 64, 3, 4, 1, ctas_per_sm=2),
        Tile(128, 8, 64, 5, 4, 1, ctas_per_sm=3),
        Tile(64, 8, 64, 6, 4, 1, ctas_per_sm=4),
    ),
    4: (
        Tile(256, 128, 64, 3, 8, 1),
        Tile(256, 64, 64, 3, 4, 1, ctas_per_sm=2),
        Tile(128, 64, 64, 4, 4, 1, ctas_per_sm=2),
        Tile(256, 32, 64, 4, 4, 1, ctas_per_sm=2),
        Tile(128, 32, 64, 5, 4, 1, ctas_per_sm=3),
        Tile(256, 16, 64, 4, 4, 1, ctas_per_sm=2),
        Tile(128, 16, 64, 6, 4, 1, ctas_per_sm=3),
        Tile(64, 16, 64, 6, 4, 1, ctas_per_sm=4),
        Tile(256, 8, 64, 4, 4, 1, ctas_per_sm=3),
        Tile(128, 8, 64, 6, 4, 1, ctas_per_sm=4),
        Tile(64, 8, 64, 6, 4, 1, ctas_per_sm=4),
    ),
}


def _on_warpgroups(
    num_bits: int,
    weight_rows: int,
    limit: int,
    *,
    depth: int = 64,
    row_groups: int = 2,
    depth_parts: int = 1,
    ctas_per_sm: int = 1,
    row_bits: int = 16,
) -> Tile:
    """A tile of Hopper's warpgroups, with as many stages as there is room for."""
    one = Tile(
        weight_rows,
        limit,
        depth,
        stages=1,
        warps_weight=4 * row_groups,
        warps_tokens=1,
        limit=limit,
        depth_parts=depth_parts,
        ctas_per_sm=ctas_per_sm,
        row_bits=row_bits,
    )
    room = (SHARED_BYTES[90] + _RESERVED_BYTES) // ctas_per_sm - _RESERVED_BYTES - _RING_BYTES
    return replace(one, stages=min(room // one.stage_bytes(num_bits), MOST_STAGES))


_HOPPER: dict[int, Tiles] = {  # wgmma
    16: (
        _on_warpgroups(16, 256, 176),
        _on_warpgroups(16, 128, 16, ctas_per_sm=2),
        _on_warpgroups(16, 64, 16, depth=128, row_groups=1, ctas_per_sm=2),
    ),
    8: (
        _on_warpgroups(8, 256, 128),
        _on_warpgroups(8, 128, 64, ctas_per_sm=2),
        _on_warpgroups(8, 128, 16, depth=128, ctas_per_sm=2),
        _on_warpgroups(8, 64, 16, depth=256, row_groups=1, depth_parts=4),
    ),
    4: (
        _on_warpgroups(4, 256, 128),
        _on_warpgroups(4, 128, 64, depth=128, ctas_per_sm=2),
        _on_warpgroups(4, 128, 16, depth=128, ctas_per_sm=2),
        _on_warpgroups(4, 64, 16, depth=256, row_groups=1, depth_parts=4),
    ),
}
_HOPPER_FP8: Tiles = (
    _on_warpgroups(8, 256, 128, depth=128, row_bits=8),
    _on_warpgroups(8, 128, 16, depth=128, ctas_per_sm=2, row_bits=8),
    _on_warpgroups(8, 64, 16, depth=256, row_groups=1, ctas_per_sm=2, row_bits=8),
)


def candidates(architecture: int, num_bits: int, row_bits: int = 16) -> Tiles:
    """The compiled tiles of an architecture (75 is sm_75), best first; `num_bits` of a weight.

    Rows of 8 bits (e4m3) are for Hopper alone: elsewhere there are none. ValueError for an
    architecture that has no tiles at all.
    """
    if architecture not in SHARED_BYTES:
        supported = ", ".join(f"sm_{number}" for number in SHARED_BYTES)
        raise ValueError(f"no kernels for sm_{architecture}; there are some for {supported}")
    if row_bits == 8:
        return _HOPPER_FP8 if architecture >= 90 else ()
    if architecture < 80:
        return _TURING[num_bits]
    if architecture >= 90:
        return _HOPPER[num_bits]
    small = SHARED_BYTES[architecture] < 128 << 10
    return (_SMALL_ASYNC if small else _LARGE_ASYNC)[num_bits]


def tokens_wanted(product: Product) -> float:
    """Tokens of a tile that hold an occupied group's pairs.

    While reading the weights bounds the time, a second tile for the same weights is what costs, so
    nearly every group should fit one: some standard deviations over the mean (the number of pairs
    is nearly Poisson distributed). Quantised weights stop being the bound earlier: then padding
    costs, and the mean is enough; but on warpgroups padding is small.
    """
    mean = product.pairs_per_group
    if product.num_bits == 16 or product.architecture >= 90:
        return mean + 1.9 * math.sqrt(mean)
    return mean + 1.5 * math.sqrt(mean) if mean <= 32 else mean


def rejection(tile: Tile, product: Product) -> str | None:
    """What speaks against `tile`, None if nothing does."""
    if product.tokens_per_tile not in (None, tile.tokens):
        return f"the pairs were sorted into tiles of {product.tokens_per_tile}, not {tile.tokens}"
    if tile.limit:
        return _warpgroup_rejection(tile, product)
    if tile.half_accumulate and (product.deterministic or not product.half):
        return "fp16 sums: only for fp16, and where the answer may depend on the tile"
    others = candidates(product.architecture, product.num_bits, product.row_bits)
    if product.tokens_per_tile is None:
        wanted = tokens_wanted(product)
        enough = min(
            (other.tokens for other in others if other.tokens >= wanted),
            default=max(other.tokens for other in others),
        )
        if tile.tokens != enough:
            return f"{wanted:.1f} tokens are expected in a tile: {enough} fit, {tile.tokens} do not"
    narrower = [o for o in others if o.tokens == tile.tokens and o.weight_rows < tile.weight_rows]
    if tile.tokens < 128:
        own = _efficiency(product, tile, choose_depth_splits(product, tile))
        for other in narrower:
            best = _efficiency(product, other, choose_depth_splits(product, other))
            if best > own:
                return f"multiprocessors {own:.0%} busy, with {other.weight_rows} rows {best:.0%}"
    return None


def _warpgroup_rejection(tile: Tile, product: Product) -> str | None:
    """What speaks against a tile of warpgroups.

    Their mma is as wide as a tile's tokens, so a tile that is too large costs little. Of tiles
    alike, one of 64 rows where those of more rows leave most multiprocessors without work: half of
    them read as fast as all, and a depth in parts unpacks codes faster.
    """
    others = candidates(product.architecture, product.num_bits, product.row_bits)
    narrow = _is_narrow(product)
    if product.tokens_per_tile is None:
        wanted = tokens_wanted(product)
        sizes = {other.tokens for other in others if not narrow or other.weight_rows == 64}
        tokens = min((size for size in sizes if size >= wanted), default=max(sizes))
        if tile.tokens != tokens:
            return f"{wanted:.1f} tokens are expected in a tile: for those, one of {tokens}"
    alike = [
        other
        for other in others
        if other.tokens == tile.tokens and not (other.depth_parts > 1 and product.deterministic)
    ]
    if tile not in alike:
        return "the order of the sums would depend on the number of pairs"
    widest = max(alike, key=lambda other: other.weight_rows)
    chosen = alike[-1] if narrow or _is_idle(product, widest) else widest
    outputs = product.num_outputs(widest)
    return None if tile == chosen else f"{outputs:.0f} tiles of {widest.weight_rows} rows"


def _is_narrow(product: Product) -> bool:
    """Whether all tiles are to have 64 rows: one matrix of 16 bits, for few tokens.

    Such a matrix often has so few tiles of more rows that most multiprocessors would be without
    work. Narrow ones read it faster, though several tiles of tokens read the same rows.
    """
    if product.num_bits != 16 or product.num_groups != 1 or product.num_pairs > FEW_TOKENS:
        return False
    tiles = candidates(product.architecture, product.num_bits)
    return _is_idle(product, max(tiles, key=lambda tile: tile.tokens))


def _is_idle(product: Product, tile: Tile) -> bool:
    """Whether the tile leaves most multiprocessors without work."""
    return product.num_outputs(tile) <= MULTIPROCESSORS[product.architecture] / 2


def choose_stages(product: Product, tile: Tile) -> int:
    """Stages of a tile's pipeline: more where each CTA has a multiprocessor to itself.

    Half the multiprocessors read as fast as all if twice as many bytes are on their way to each.
    """
    if not tile.limit or tile.ctas_per_sm == 1 or not _is_narrow(product):
        return tile.stages
    alone = product.num_outputs(tile) <= MULTIPROCESSORS[product.architecture]
    return STAGES_ALONE if alone else tile.stages


def rejections(product: Product) -> list[tuple[Tile, str | None]]:
    """Every compiled tile in order of preference, with what speaks against it."""
    tiles = candidates(product.architecture, product.num_bits, product.row_bits)
    return [(tile, rejection(tile, product)) for tile in tiles]


def choose_tile(product: Product) -> Tile:
    """The first tile that nothing speaks against; ValueError where tokens_per_tile fits none."""
    for tile, reason in rejections(product):
        if reason is None:
            return tile
    raise ValueError(f"no tile has {product.tokens_per_tile} tokens on sm_{product.architecture}")


def permutes_rows(product: Product, tile: Tile) -> bool:
    """Whether gathered rows are better permuted first, by a kernel of their own.

    Where the tensor cores are the bound, rows that threads gather keep the shared memory busy: on
    an H100 a product ran 11 % slower than with rows that lie together. Permuting costs about 1.2 ps
    a byte, the gather about 0.8 fs for each product of the depth and the features.
    """
    busy = product.pairs_per_group >= PAIRS_TO_COMPUTE
    wide = product.num_bits == 16 and product.num_features >= FEATURES_TO_PERMUTE
    return bool(tile.limit) and busy and wide


def choose_depth_splits(product: Product, tile: Tile) -> int:
    """CTAs that share the depth of an output tile: as many as keep the multiprocessors busiest."""
    if tile.tokens > 64 or tile.limit:
        return 1
    counts = range(1, _most_splits(product, tile) + 1)
    splits = max(counts, key=lambda count: _efficiency(product, tile, count))
    stages = math.ceil(product.depth / tile.depth)
    return math.ceil(stages / math.ceil(stages / splits))  # no part is empty


def _efficiency(product: Product, tile: Tile, splits: int) -> float:
    """How much of the turns that the resident CTAs take is work.

    From two turns on CTAs even out among themselves, so that an unfilled last one costs half.
    Filling a pipeline takes about START_STAGES stages, parts that are added up 7 % and 2 % each.
    """
    resident = tile.ctas_per_sm * MULTIPROCESSORS[product.architecture]
    turns = product.num_outputs(tile) * splits / resident
    filled = turns / math.ceil(turns)
    if turns > 2:
        filled = (filled + 1) / 2
    stages = math.ceil(product.depth / tile.depth) / splits
    width = 1.0 if product.num_bits == 16 else WIDTH_EFFICIENCY[tile.weight_rows]
    joined = 1.0 if splits == 1 else 0.95 - 0.02 * splits
    return width * filled * joined * stages / (stages + START_STAGES)


def _most_splits(product: Product, tile: Tile) -> int:
    """Parts that the depth may be cut into.

    1 where deterministic: the order of the sums would depend on the number of pairs.
    """
    if product.deterministic:
        return 1
    return max(1, min(math.ceil(product.depth / tile.depth) // FEWEST_SPLIT_STAGES, MOST_SPLITS))
