// Shared memory of the exchange's bulk copies, for the kernels and for the host that launches them.
#pragma once

namespace light {
namespace ring {

constexpr int kWarps = 8;  // of a CTA
constexpr int kMostPairs = 16;
constexpr int kPullStages = 6, kPullStageBytes = 4096;
constexpr int kCombineStages = 3, kCombineStageBytes = 8192;
constexpr int kWarpBytes = 24576 + 128 + 32 * kMostPairs * 4;  // stages, barriers, positions
constexpr int kBytes = kWarps * kWarpBytes;

static_assert(kPullStages * kPullStageBytes <= 24576, "the pulled rows fit");
static_assert(kCombineStages * kCombineStageBytes <= 24576, "the summed rows fit");
static_assert(kBytes <= 227 * 1024, "a CTA has so much");

}  // namespace ring
}  // namespace light
