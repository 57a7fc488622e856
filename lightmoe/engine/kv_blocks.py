"""Which KV blocks of one rank are free, and who has the others."""

from __future__ import annotations


class KVBlocks:
    """A pool of numbered blocks of `block_size` positions each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that nobody has."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks in use."""
        return 1.0 - self.num_free / self.num_blocks

    def extend(self, table: list[int], num_positions: int) -> bool:
        """Grow a table to hold that many positions; False, and nothing taken, if it cannot."""
        missing = max(0, -(-num_positions // self.block_size) - len(table))
        if missing > self.num_free:
            return False
        if missing:
            table.extend(self._free.pop() for _ in range(missing))
        return True

    def release(self, table: list[int]) -> None:
        """Give a table's blocks back."""
        self._free.extend(reversed(table))
        table.clear()
