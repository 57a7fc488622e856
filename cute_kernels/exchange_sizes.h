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

static_assert(kBytes <= 227 * 1024, "a CTA has so much");

}  // namespace ring
}  // namespace light
