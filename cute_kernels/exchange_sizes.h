// Shared memory of the exchange's bulk copies, for the kernels and for the host that launches them.
#pragma once

namespace light {
namespace ring {

constexpr int kWarps = 8;  // of a CTA
constexpr int kMostPairs = 16;
constexpr int kPullStages = 6, kPullStageBytes = 4096;
// stages, barriers, positions
constexpr int kWarpBytes = kPullStages * kPullStageBytes + 128 + 32 * kMostPairs * 4;
constexpr int kBytes = kWarps * kWarpBytes;

// Adding up takes more warps than copying.
constexpr int kCombineWarps = 16, kCombineStages = 3, kCombineStageBytes = 4096;
constexpr int kCombineWarpBytes = kCombineStages * kCombineStageBytes + 128;  // stages, barriers
constexpr int kCombineBytes = kCombineWarps * kCombineWarpBytes;

// Of each row of a token, what is copied at once: 512 bytes are 16 of every lane.
constexpr int combine_piece_bytes(int num_pairs, int width_bytes) {
  const int room = kCombineStageBytes / num_pairs;
  return width_bytes <= room ? width_bytes : room < 512 ? room / 16 * 16 : room / 512 * 512;
}

// Tokens whose rows a warp looks up at once: a lane a pair, but no warp is left without any.
constexpr int combine_tokens(int num_tokens, int num_pairs, int num_warps) {
  const int wanted = (num_tokens + num_warps - 1) / num_warps, most = 32 / num_pairs;
  return wanted < most ? wanted : most;
}

static_assert(kBytes <= 227 * 1024 && kCombineBytes <= 227 * 1024, "a CTA has so much");

}  // namespace ring
}  // namespace light
