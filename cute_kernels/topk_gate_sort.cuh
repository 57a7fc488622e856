// The permutation of a choice: pairs sorted by expert, then token, then k, in one launch of
// `num_ctas` resident CTAs. Each CTA owns neighbouring tokens, each of its warps some of them:
//
//   count     every warp counts its pairs per expert, in its own row of `histogram`
//   exchange  a column sum over the warps is the CTA's count; all CTAs see all counts
//   place     a pair's position = expert's offset + pairs of CTAs before + of warps before + rank
//
// Counts are integers and ranks follow the pairs' order, so the result is the same in every run.
#pragma once

#include "light_ops.h"
#include "topk_gate_lanes.cuh"
#include "topk_gate_sizes.h"

namespace light::gate {

constexpr unsigned kPresent = 0x8000;  // beside a count of at most 2^15 - 1
constexpr int kRowsAtOnce = 8;         // CTAs whose counts a thread waits for together

// Tokens [begin, end) of a warp.
struct TokenRange {
  int begin, end;

  __device__ static TokenRange of_warp(const light_pair_sort &sort, int cta) {
    const int begin = cta * sort.tokens_per_cta;
    const int end = min(begin + sort.tokens_per_cta, sort.num_tokens);
    const int warp = threadIdx.x / 32;
    return {min(begin + warp * sort.tokens_per_warp, end),
            min(begin + (warp + 1) * sort.tokens_per_warp, end)};
  }
};

struct Pair {
  int index = -1;  // in [T, K]; negative: none
  int token = 0, expert = -1;
  float weight = 0.0f;
};

class Sorter {
 public:
  __device__ Sorter(const light_pair_sort &sort, int cta, int num_ctas, char *shared)
      : sort_(sort),
        memory_(*reinterpret_cast<SortMemory *>(shared)),
        histogram_(reinterpret_cast<unsigned short *>(shared + sizeof(SortMemory))),
        own_counts_(histogram_ + threadIdx.x / 32 * sort.num_experts),
        exchange_(*static_cast<Exchange *>(sort.workspace)),
        cta_(cta),
        num_ctas_(num_ctas) {}

  // Before the first count; touches nothing of the kernel before.
  __device__ void clear() {
    for (int i = threadIdx.x; i < blockDim.x / 32 * sort_.num_experts; i += blockDim.x) {
      histogram_[i] = 0;
    }
    if (threadIdx.x < sort_.num_experts) {
      memory_.before[threadIdx.x] = memory_.total[threadIdx.x] = 0;
    }
    __syncthreads();
  }

  // What exchange() needs: it comes while the warps count.
  __device__ void load_round() {
    if (num_ctas_ > 1 && threadIdx.x == 0) {
      round_ = __ldcg(&exchange_.round);
      const unsigned first = __ldcg(&exchange_.marked[0]), second = __ldcg(&exchange_.marked[1]);
      to_wipe_ = round_ % 2 ? first : second;
    }
  }

  // Count one pair of each lane whose expert is not negative; returns its rank among the warp's
  // pairs of that expert. Lanes are in the order of the pairs.
  __device__ int count(int expert) {
    const unsigned peers = __match_any_sync(kAllLanes, expert);
    const int rank = __popc(peers & ((1u << threadIdx.x % 32) - 1));
    const int before = expert >= 0 ? own_counts_[expert] : 0;
    __syncwarp();
    if (expert >= 0 && rank == 0) {
      own_counts_[expert] = before + __popc(peers);
    }
    __syncwarp();
    return before + rank;
  }

  // The same for the experts of one token, which differ.
  __device__ void count_distinct(int expert) {
    if (expert >= 0) {
      own_counts_[expert] += 1;
    }
  }

  // After every warp counted its pairs: exchange counts, then place the pairs: those of `tokens`,
  // whose `experts` [T, K] and `weights` are in memory, then `last`, one for each lane in order.
  __device__ void place(TokenRange tokens, const int *experts, const float *weights, Pair last) {
    const int k = sort_.num_experts_per_token, end = tokens.end * k;
    const int lane = threadIdx.x % 32;
    __syncwarp();
    // The first pairs are on their way while the CTAs exchange their counts.
    Pair pair = load_pair(tokens.begin * k + lane, end, experts, weights);
    exchange();
    scan();
    write_tiles();
    for (int next = tokens.begin * k + 32; next < end + 32; next += 32) {
      place_pair(pair);
      pair = load_pair(next + lane, end, experts, weights);
    }
    if (__any_sync(kAllLanes, last.index >= 0)) {
      place_pair(last);
    }
    wipe_marks();
  }

 private:
  __device__ Pair load_pair(int index, int end, const int *experts, const float *weights) {
    if (index >= end) {
      return Pair{};
    }
    return {index, index / sort_.num_experts_per_token, experts[index],
            sort_.pair_weight == nullptr ? 0.0f : weights[index]};
  }

  __device__ void wipe_marks() {
    const int num_rows = num_ctas_ > 1 ? memory_.to_wipe & 0xffff : 0;
    const int num_vectors = ((memory_.to_wipe >> 16) + 7) / 8;
    for (int row = cta_ * (blockDim.x / 32) + threadIdx.x / 32; row < num_rows;
         row += num_ctas_ * (blockDim.x / 32)) {
      uint4 *marks = reinterpret_cast<uint4 *>(exchange_.counts[(memory_.round + 1) % 2][row]);
      for (int i = threadIdx.x % 32; i < num_vectors; i += 32) {
        marks[i] = uint4{};
      }
    }
  }

  __device__ void place_pair(Pair pair) {
    const bool exists = pair.expert >= 0 && pair.expert < sort_.num_experts;
    const int rank = count(exists ? pair.expert : -1);
    if (pair.index < 0) {
      return;
    }
    const int position = exists ? memory_.position[pair.expert] + rank : -1;
    sort_.pair_index[pair.index] = position;
    if (exists) {
      sort_.pair_row[position] = pair.token;
      if (sort_.pair_weight != nullptr) {
        sort_.pair_weight[position] = pair.weight;
      }
    }
  }

  // Counts of the warps before, in place; before[] and total[] over the CTAs.
  __device__ void exchange() {
    if (threadIdx.x == 0) {
      memory_.round = round_;
      memory_.to_wipe = to_wipe_;
    }
    __syncthreads();
    const int expert = threadIdx.x, num_warps = blockDim.x / 32;
    if (expert < sort_.num_experts) {
      const int sum = sum_warps(histogram_ + expert, num_warps);
      if (num_ctas_ == 1) {  // scan() reads only what the same thread wrote
        memory_.total[expert] = sum;
      } else {
        store_relaxed(&exchange_.counts[memory_.round % 2][cta_][expert], sum | kPresent);
      }
    }
    if (num_ctas_ > 1) {
      if (num_ctas_ > kPollingCtas) {
        wait_for_all_ctas(&exchange_.sort_counter, num_ctas_);
      }
      sum_counts();
      __syncthreads();
      if (cta_ == 0 && threadIdx.x == 0) {  // every CTA has read these before its counts came
        exchange_.marked[memory_.round % 2] = sort_.num_experts << 16 | num_ctas_;
        exchange_.round = memory_.round + 1;
      }
    }
  }

  // Replaces an expert's counts by what the warps before have; returns what all have. Eight
  // loads are under way at once.
  __device__ int sum_warps(unsigned short *column, int num_warps) {
    int sum = 0;
    for (int first = 0; first < num_warps; first += 8) {
      int counts[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        counts[i] = first + i < num_warps ? column[(first + i) * sort_.num_experts] : 0;
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (first + i < num_warps) {
          column[(first + i) * sort_.num_experts] = sum;
        }
        sum += counts[i];
      }
    }
    return sum;
  }

  // A thread has two experts, and the counts of every `num_groups`-th CTA.
  __device__ void sum_counts() {
    const int shift = 32 - __clz((sort_.num_experts - 1) / 2);  // 2^shift columns
    const int num_groups = blockDim.x >> shift, group = threadIdx.x >> shift;
    const int expert = (threadIdx.x - (group << shift)) * 2;
    if (group >= num_groups || expert >= sort_.num_experts) {
      return;
    }
    const bool is_pair = expert + 1 < sort_.num_experts;
    const unsigned marks = is_pair ? kPresent << 16 | kPresent : kPresent;
    int before[2] = {}, total[2] = {};
    for (int first = group; first < num_ctas_; first += num_groups * kRowsAtOnce) {
      unsigned counts[kRowsAtOnce] = {};
      wait_for_counts(first, num_groups, expert, marks, counts);
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const int low = counts[i] & 0x7fff, high = counts[i] >> 16 & 0x7fff;
        const bool is_before = first + i * num_groups < cta_;
        total[0] += low;
        total[1] += high;
        before[0] += is_before ? low : 0;
        before[1] += is_before ? high : 0;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (expert + i < sort_.num_experts) {
        atomicAdd(&memory_.before[expert + i], before[i]);
        atomicAdd(&memory_.total[expert + i], total[i]);
      }
    }
  }

  __device__ void wait_for_counts(int first, int step, int expert, unsigned marks,
                                  unsigned (&counts)[kRowsAtOnce]) {
    bool is_missing;
    do {
      is_missing = false;
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const int row = first + i * step;
        if (row < num_ctas_ && (counts[i] & marks) != marks) {
          counts[i] = load_relaxed(&exchange_.counts[memory_.round % 2][row][expert]);
        }
      }
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        is_missing |= first + i * step < num_ctas_ && (counts[i] & marks) != marks;
      }
    } while (is_missing);
  }

  // Offsets of pairs and tiles: thread e stands for expert e.
  __device__ void scan() {
    const int expert = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const bool exists = expert < sort_.num_experts;
    const int pairs = exists ? memory_.total[expert] : 0;
    const int tiles = (pairs + sort_.tokens_per_tile - 1) >> (__ffs(sort_.tokens_per_tile) - 1);
    int pair_end = inclusive_scan(pairs, lane), tile_end = inclusive_scan(tiles, lane);
    if (lane == 31 && warp < kMaxExperts / 32) {
      memory_.warp_pairs[warp] = pair_end;
      memory_.warp_tiles[warp] = tile_end;
    }
    __syncthreads();
    if (exists) {
      for (int w = 0; w < warp; ++w) {
        pair_end += memory_.warp_pairs[w];
        tile_end += memory_.warp_tiles[w];
      }
      memory_.position[expert] = pair_end - pairs + memory_.before[expert];
      memory_.tile_offsets[expert + 1] = tile_end;
      if (expert == 0) {
        memory_.tile_offsets[0] = 0;
      }
      if (cta_ == 0) {
        write_offsets(expert, pairs, pair_end, tile_end);
      }
    }
    __syncthreads();
  }

  __device__ void write_offsets(int expert, int pairs, int pair_end, int tile_end) {
    if (sort_.counts != nullptr) {
      sort_.counts[expert] = pairs;
    }
    sort_.offsets[expert + 1] = pair_end;
    sort_.tile_offsets[expert + 1] = tile_end;
    if (expert == 0) {
      sort_.offsets[0] = 0;
      sort_.tile_offsets[0] = 0;
    }
  }

  // A tile's expert is the first one whose tiles end after it. The last threads begin: where there
  // is little to do, they have no pairs to place.
  __device__ void write_tiles() {
    const int num_tiles = memory_.tile_offsets[sort_.num_experts];
    for (int tile = cta_ * blockDim.x + blockDim.x - 1 - threadIdx.x; tile < num_tiles;
         tile += num_ctas_ * blockDim.x) {
      int low = 0, high = sort_.num_experts - 1;
      while (low < high) {
        const int middle = (low + high) / 2;
        if (memory_.tile_offsets[middle + 1] > tile) {
          high = middle;
        } else {
          low = middle + 1;
        }
      }
      sort_.tile_groups[tile] = low;
    }
  }

  const light_pair_sort &sort_;
  SortMemory &memory_;
  unsigned short *histogram_, *own_counts_;
  Exchange &exchange_;
  int cta_, num_ctas_;
  unsigned round_ = 0, to_wipe_ = 0;
};

}  // namespace light::gate
