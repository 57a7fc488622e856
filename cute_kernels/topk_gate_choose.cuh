// A token's experts: scores, groups, the K best in order, their weights. kLanes lanes share a token
// and hold kValues neighbouring experts each, so the lowest lane that has the maximum has the
// lowest index that has it.
#pragma once

#include "light_ops.h"
#include "topk_gate_lanes.cuh"

namespace light::gate {

__device__ inline float sigmoid(float logit) { return 1.0f / (1.0f + expf(-logit)); }

// What the choice goes by: a logit (softmax keeps their order), or the sigmoid score with its bias.
// 0 is no candidate (any more).
template <int kValues>
__device__ inline void make_keys(const light_topk_gate_args &args, const float (&logits)[kValues],
                                 int lane, unsigned (&keys)[kValues]) {
  const int first = lane * kValues, num_experts = args.sort.num_experts;
  if (args.sigmoid) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const bool is_biased = args.bias != nullptr && first + i < num_experts;
      const float bias = is_biased ? args.bias[first + i] : 0.0f;
      const float score = sigmoid(without_nan(logits[i])) + bias;
      keys[i] = first + i < num_experts ? ordered_key(without_nan(score)) : 0;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      keys[i] = first + i < num_experts ? ordered_key(without_nan(logits[i])) : 0;
    }
  }
}

// exp(value - maximum); equal values differ by nothing, also where they are infinite.
__device__ inline float relative_exp(float value, float maximum) {
  return value == maximum ? 1.0f : expf(value - maximum);
}

// Sum of relative_exp over all experts of the token: softmax's denominator.
template <int kLanes, int kValues>
__device__ inline float softmax_sum(const unsigned (&keys)[kValues]) {
  unsigned own_best = keys[0];
#pragma unroll
  for (int i = 1; i < kValues; ++i) {
    own_best = max(own_best, keys[i]);
  }
  const float maximum = from_ordered_key(lanes_max<kLanes>(own_best));
  float own_sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    own_sum += keys[i] == 0 ? 0.0f : relative_exp(from_ordered_key(keys[i]), maximum);
  }
  return lanes_sum<kLanes>(own_sum);
}

// Drop the experts of all but the best groups. A group is as good as its best expert with softmax
// (DeepSeek-V2), as the sum of its best two with sigmoid (DeepSeek-V3).
template <int kLanes, int kValues>
__device__ inline void keep_best_groups(const light_topk_gate_args &args, int lane,
                                        unsigned (&keys)[kValues]) {
  const unsigned group_size = args.sort.num_experts / args.num_groups;
  unsigned own_key = 0;  // of the group that this lane stands for
  for (int group = 0; group < args.num_groups; ++group) {
    const unsigned place = lane * kValues - group * group_size;  // of the first; wraps below 0
    unsigned best = 0, second = 0;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const unsigned key = place + i < group_size ? keys[i] : 0;
      second = max(second, min(best, key));
      best = max(best, key);
    }
    unsigned key = lanes_max<kLanes>(best);
    if (args.sigmoid) {
      const int leader = __ffs(lanes_ballot<kLanes>(best == key)) - 1;
      const unsigned next = lanes_max<kLanes>(lane == leader ? second : best);
      key = ordered_key(without_nan(from_ordered_key(key) + from_ordered_key(next)));
    }
    own_key = lane == group ? key : own_key;
  }
  int num_better = 0;
  for (int group = 0; group < args.num_groups; ++group) {
    const unsigned key = __shfl_sync(kAllLanes, own_key, group, kLanes);
    num_better += key > own_key || (key == own_key && group < lane);
  }
  const unsigned kept = lanes_ballot<kLanes>(num_better < args.num_groups_per_token);
  for (int group = 0; group < args.num_groups; ++group) {
    const unsigned place = lane * kValues - group * group_size;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      keys[i] = place + i < group_size && (kept >> group & 1) == 0 ? 0 : keys[i];
    }
  }
}

struct Choice {
  int expert;
  unsigned key;
  unsigned best_key;  // of the token
};

// Lane k of the token gets its k-th expert; the other lanes get nothing of use.
template <int kLanes, int kValues>
__device__ inline Choice choose(unsigned (&keys)[kValues], int num_chosen, int lane) {
  const unsigned lower_lanes = (1u << lane) - 1;
  Choice own{};
  for (int k = 0; k < num_chosen; ++k) {
    unsigned own_best = keys[0];
#pragma unroll
    for (int i = 1; i < kValues; ++i) {
      own_best = max(own_best, keys[i]);
    }
    const unsigned best = lanes_max<kLanes>(own_best);
    const unsigned holders = lanes_ballot<kLanes>(own_best == best);
    const bool is_leader = own_best == best && (holders & lower_lanes) == 0;
    int place = kValues - 1;
#pragma unroll
    for (int i = kValues - 2; i >= 0; --i) {
      place = keys[i] == best ? i : place;
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      keys[i] = is_leader && place == i ? 0 : keys[i];
    }
    const int leader = __ffs(holders) - 1;
    const int expert = __shfl_sync(kAllLanes, lane * kValues + place, leader, kLanes);
    own.best_key = k == 0 ? best : own.best_key;
    own.key = lane == k ? best : own.key;
    own.expert = lane == k ? expert : own.expert;
  }
  return own;
}

}  // namespace light::gate
