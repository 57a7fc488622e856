// cute_kernels/tile_memory.h for tests/kernels/test_tiles.py.
#include "tile_memory.h"

extern "C" int shared_bytes(const light_tile *tile, int num_bits) {
  return light::tile_shared_bytes(*tile, num_bits);
}
