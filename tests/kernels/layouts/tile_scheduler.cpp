// cute_kernels/tile_scheduler.h for tests/kernels/test_tile_scheduler.py.
#include "tile_scheduler.h"

extern "C" void tile_work(int in_group, int num_tiles, int num_weight_blocks, int *out) {
  const light::TileWork work = light::tile_work(in_group, num_tiles, num_weight_blocks);
  out[0] = work.token_tile;
  out[1] = work.weight_block;
}
