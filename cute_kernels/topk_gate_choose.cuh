// A token's experts: scores, groups, the K best in order, their weights. kLanes lanes share a token
// and hold kValues neighbouring experts each, so the lowest lane that has the maximum has the
// lowest index that has it.
#pragma once

#include "light_ops.h"
#include "topk_gate_lanes.cuh"
#include "topk_gate_sizes.h"

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
#pragma unroll 1
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
#pragma unroll 1
  for (int group = 0; group < args.num_groups; ++group) {
    const unsigned key = __shfl_sync(kAllLanes, own_key, group, kLanes);
    num_better += key > own_key || (key == own_key && group < lane);
  }
  const unsigned kept = lanes_ballot<kLanes>(num_better < args.num_groups_per_token);
#pragma unroll 1
  for (int group = 0; group < args.num_groups; ++group) {
    const unsigned place = lane * kValues - group * group_size;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      keys[i] = place + i < group_size && (kept >> group & 1) == 0 ? 0 : keys[i];
    }
  }
}

// A lane's neighbouring experts, best first; of equal ones the lowest first.
template <int kSize>
class LaneList {
 public:
  __device__ void sort(const unsigned *keys) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      keys_[i] = keys[i];
    }
    // Neighbours only change places where they differ, so equal ones keep their order.
#pragma unroll
    for (int round = 0; round < kSize; ++round) {
#pragma unroll
      for (int i = round % 2; i + 1 < kSize; i += 2) {
        order(i);
      }
    }
  }

  __device__ unsigned best() const { return keys_[0]; }
  __device__ int best_place() const { return places_ & 0xff; }

  __device__ void drop_best(bool really) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      keys_[i] = really ? (i + 1 < kSize ? keys_[i + 1] : 0) : keys_[i];
    }
    places_ = really ? places_ >> 8 : places_;
  }

 private:
  __device__ void order(int i) {
    const unsigned first = keys_[i], second = keys_[i + 1];
    const unsigned swapped = 0x3210 - 0x0f * (1 << 4 * i);  // __byte_perm's selector
    places_ = first < second ? __byte_perm(places_, 0, swapped) : places_;
    keys_[i] = max(first, second);
    keys_[i + 1] = min(first, second);
  }

  unsigned keys_[kSize];
  unsigned places_ = 0x03020100;  // a byte for each of the keys
};

struct Choice {
  int expert;
  unsigned key;
  unsigned best_key;  // of the token
};

// Lane k of the token gets its k-th expert; the other lanes get nothing of use. `chosen` is for
// this token alone, num_chosen of them.
template <int kLanes, int kValues>
__device__ inline Choice choose(const unsigned (&keys)[kValues], int num_chosen, int lane,
                                Chosen *chosen) {
  constexpr int kSize = kValues < 4 ? kValues : 4, kLists = kValues / kSize;
  const unsigned lower_lanes = (1u << lane) - 1;
  LaneList<kSize> lists[kLists];
#pragma unroll
  for (int i = 0; i < kLists; ++i) {
    lists[i].sort(keys + i * kSize);
  }
  for (int k = 0; k < num_chosen; ++k) {
    unsigned own_best = lists[0].best();
#pragma unroll
    for (int i = 1; i < kLists; ++i) {
      own_best = max(own_best, lists[i].best());
    }
    const unsigned best = lanes_max<kLanes>(own_best);
    const unsigned holders = lanes_ballot<kLanes>(own_best == best);
    bool is_open = own_best == best && (holders & lower_lanes) == 0;
#pragma unroll
    for (int i = 0; i < kLists; ++i) {
      const bool has_it = is_open && lists[i].best() == best;
      if (has_it) {
        chosen[k] = {best, lane * kValues + i * kSize + lists[i].best_place()};
      }
      lists[i].drop_best(has_it);
      is_open = is_open && !has_it;
    }
  }
  __syncwarp();
  const Chosen own = chosen[lane < num_chosen ? lane : 0];
  const unsigned best_key = chosen[0].key;
  __syncwarp();
  return {own.expert, own.key, best_key};
}

}  // namespace light::gate
