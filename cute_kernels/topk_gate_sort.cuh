// The permutation of a choice: pairs sorted by expert, then token, then k, in one launch of
// `num_ctas` resident CTAs. Each CTA owns neighbouring tokens, each of its warps some of them:
//
//   count     every warp marks its tokens per expert, a bit each; where that takes too many bits,
//             or a token may have an expert twice, it counts its pairs in its own row of counts
//   exchange  the CTA's counts are the bits, or the sums over the warps; all CTAs see all counts
//   place     a pair's position = expert's offset + pairs of CTAs before + of warps before + rank
//
// The first warps stand for the experts in the exchange; they have no tokens where others suffice.
// Counts are integers and ranks follow the pairs' order, so the result is the same in every run.
#pragma once

#include "topk_gate_cluster.cuh"
#include "topk_gate_pairs.cuh"

namespace light::gate {

constexpr unsigned kPresent = 0x8000;  // beside a count of at most 2^15 - 1
constexpr int kRowsAtOnce = 8;         // CTAs whose counts a thread waits for together

class Sorter {
 public:
  // distinct: no token has an expert twice.
  __device__ Sorter(const light_pair_sort &sort, int cta, int num_ctas, bool distinct,
                    char *shared)
      : sort_(sort),
        memory_(*reinterpret_cast<SortMemory *>(shared)),
        num_columns_(num_columns(sort.num_experts)),
        histogram_(reinterpret_cast<uint2 *>(shared + sizeof(SortMemory))),
        cluster_counts_(histogram_ + blockDim.x / 32 * num_columns_),
        own_counts_(reinterpret_cast<unsigned short *>(histogram_ +
                                                       threadIdx.x / 32 * num_columns_)),
        marks_(reinterpret_cast<unsigned *>(histogram_)),
        exchange_(*static_cast<Exchange *>(sort.workspace)),
        cta_(cta),
        num_ctas_(num_ctas),
        in_cluster_(num_ctas > 1 && cluster_ctas() == num_ctas),
        // 32 tokens take as much room as two warps.
        by_marks_(distinct && (sort.tokens_per_cta + 31) / 32 * 2 <= blockDim.x / 32) {}

  // Room for the experts of the tokens that a warp holds at once.
  __device__ Chosen *chosen() { return memory_.chosen[threadIdx.x / 32]; }

  // Before the first count; touches nothing of the kernel before.
  __device__ void clear() {
    tile_reciprocal_ = tile_reciprocal(sort_.tokens_per_tile);
    for (int i = threadIdx.x; i < blockDim.x / 32 * num_columns_; i += blockDim.x) {
      histogram_[i] = uint2{};
    }
    if (in_cluster_) {
      if (threadIdx.x == 0) {
        expect_bytes(&memory_.arrivals, num_ctas_ * num_columns_ * sizeof(uint2));
      }
      cluster_arrive();
      cluster_wait();  // for the others to expect what this one stores
    } else if (threadIdx.x < num_columns_ * kColumnExperts) {
      memory_.before[threadIdx.x] = memory_.total[threadIdx.x] = 0;
    }
    __syncthreads();
  }

  // What exchange() needs: it comes while the warps count.
  __device__ void load_round() {
    if (num_ctas_ > 1 && !in_cluster_ && threadIdx.x == 0) {
      round_ = __ldcg(&exchange_.round);
      const unsigned first = __ldcg(&exchange_.marked[0]), second = __ldcg(&exchange_.marked[1]);
      to_wipe_ = round_ % 2 ? first : second;
    }
  }

  // Count one pair of each lane whose expert is not negative. Lanes are in the order of the pairs.
  __device__ void count(Pair pair) {
    if (by_marks_) {
      if (pair.expert >= 0) {
        const int token = pair.token - cta_ * sort_.tokens_per_cta;
        atomicOr(marks_of(token / 32) + pair.expert, 1u << token % 32);
      }
    } else {
      count_rank(pair.expert);
    }
  }

  // Every warp calls this once, after its last count.
  __device__ void counted() {
    __syncwarp();
    if (!is_exchanging()) {
      asm volatile("bar.arrive %0, %1;" ::"n"(kCountedBarrier), "r"(blockDim.x) : "memory");
    }
  }

  // After every warp counted its pairs: exchange counts, then place the pairs: those of `tokens`,
  // whose `experts` [T, K] and `weights` are in memory, then `last`, one for each lane in order.
  __device__ void place(TokenRange tokens, const int *experts, const float *weights, Pair last) {
    const int end = tokens.end * sort_.num_experts_per_token;
    const int index = tokens.begin * sort_.num_experts_per_token + threadIdx.x % 32;
    Pair pair;
    if (tokens.begin < tokens.end) {  // the first pairs are on their way during the exchange
      __syncwarp();
      pair = load_pair(index, end, experts, weights);
    }
    Column column;
    exchange(column);
    scan(column);
#pragma unroll 1
    for (int next = index + 32; next < end + 32 + threadIdx.x % 32; next += 32) {
      place_pair(pair);
      pair = load_pair(next, end, experts, weights);
    }
    place_pair(last);
    if (cta_ == 0 && threadIdx.x < num_columns_) {
      write_offsets(column);
    }
    write_tiles();
    wipe_marks();
  }

 private:
  static constexpr int kCountedBarrier = 8;  // the router's teams have the first ones

  __device__ bool is_exchanging() const {
    return threadIdx.x / 32 < exchanging_warps(sort_.num_experts);
  }

  __device__ unsigned *marks_of(int word) const {
    return marks_ + word * num_columns_ * kColumnExperts;
  }

  // The rank of each lane's pair among the warp's pairs of that expert.
  __device__ int count_rank(int expert) {
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

  // Pairs of the same expert in the tokens of this CTA that come before.
  __device__ int marks_before(Pair pair) const {
    const int token = pair.token - cta_ * sort_.tokens_per_cta;
    int rank = __popc(marks_of(token / 32)[pair.expert] & ((1u << token % 32) - 1));
#pragma unroll 1
    for (int word = 0; word < token / 32; ++word) {
      rank += __popc(marks_of(word)[pair.expert]);
    }
    return rank;
  }

  __device__ Pair load_pair(int index, int end, const int *experts, const float *weights) {
    if (index >= end) {
      return Pair{};
    }
    return {index, index / sort_.num_experts_per_token, experts[index],
            sort_.pair_weight == nullptr ? 0.0f : weights[index]};
  }

  __device__ void wipe_marks() {
    if (num_ctas_ == 1 || in_cluster_) {
      return;
    }
    const int num_rows = memory_.to_wipe & 0xffff;
    const int num_vectors = ((memory_.to_wipe >> 16) + 7) / 8;
    for (int row = cta_ * (blockDim.x / 32) + threadIdx.x / 32; row < num_rows;
         row += num_ctas_ * (blockDim.x / 32)) {
      uint4 *marks = reinterpret_cast<uint4 *>(exchange_.counts[(memory_.round + 1) % 2][row]);
#pragma unroll 1
      for (int i = threadIdx.x % 32; i < num_vectors; i += 32) {
        marks[i] = uint4{};
      }
    }
  }

  __device__ void place_pair(Pair pair) {
    const bool exists = pair.expert >= 0 && pair.expert < sort_.num_experts;
    int rank = 0;
    if (!by_marks_) {
      rank = count_rank(exists ? pair.expert : -1);
    } else if (exists) {
      rank = marks_before(pair);
    }
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

  // Thread c stands for column c.
  __device__ void exchange(Column &column) {
    const bool has_column = threadIdx.x < num_columns_;
    uint2 sum{};
    if (is_exchanging()) {
      if (threadIdx.x == 0) {
        memory_.round = round_;
        memory_.to_wipe = to_wipe_;
      }
      asm volatile("bar.sync %0, %1;" ::"n"(kCountedBarrier), "r"(blockDim.x) : "memory");
      if (has_column) {
        sum = by_marks_ ? sum_marks() : sum_warps(histogram_ + threadIdx.x, num_columns_);
      }
    }
    if (num_ctas_ == 1) {
      add_counts(sum, column.total);
    } else if (!in_cluster_) {
      exchange_in_workspace(sum, column);
    } else if (has_column) {
      exchange_in_cluster(sum, column);
    }
  }

  // Every CTA gets every CTA's counts; it stays until it has them, so nobody stores into one that
  // is gone.
  __device__ void exchange_in_cluster(uint2 sum, Column &column) {
#pragma unroll
    for (int rank = 0; rank < kMaxClusterCtas; ++rank) {
      if (rank < num_ctas_) {
        store_counted_in(rank, cluster_counts_ + cta_ * num_columns_ + threadIdx.x, sum,
                         &memory_.arrivals);
      }
    }
    wait_for_bytes(&memory_.arrivals);
    uint2 before{}, total{};  // of fewer than 2^16 pairs
#pragma unroll
    for (int cta = 0; cta < kMaxClusterCtas; ++cta) {
      if (cta < num_ctas_) {
        const uint2 counts = cluster_counts_[cta * num_columns_ + threadIdx.x];
        total.x += counts.x;
        total.y += counts.y;
        before.x += cta < cta_ ? counts.x : 0;
        before.y += cta < cta_ ? counts.y : 0;
      }
    }
    add_counts(total, column.total);
    add_counts(before, column.before);
  }

  __device__ void exchange_in_workspace(uint2 sum, Column &column) {
    if (threadIdx.x < num_columns_) {
      constexpr unsigned kBothPresent = kPresent << 16 | kPresent;
      store_relaxed(&exchange_.counts[memory_.round % 2][cta_][threadIdx.x * kColumnExperts],
                    {sum.x | kBothPresent, sum.y | kBothPresent});
    }
    if (num_ctas_ > kPollingCtas) {
      wait_for_all_ctas(&exchange_.sort_counter, num_ctas_);
    } else {
      __syncthreads();
    }
    sum_counts();
    __syncthreads();
    if (cta_ == 0 && threadIdx.x == 0) {  // every CTA has read these before its counts came
      exchange_.marked[memory_.round % 2] = sort_.num_experts << 16 | num_ctas_;
      exchange_.round = memory_.round + 1;
    }
    if (threadIdx.x < num_columns_) {
#pragma unroll
      for (int i = 0; i < kColumnExperts; ++i) {
        column.before[i] = memory_.before[threadIdx.x * kColumnExperts + i];
        column.total[i] = memory_.total[threadIdx.x * kColumnExperts + i];
      }
    }
  }

  __device__ uint2 sum_marks() const {
    uint2 sum{};
#pragma unroll 1
    for (int word = 0; word * 32 < sort_.tokens_per_cta; ++word) {
      const uint4 marks = reinterpret_cast<const uint4 *>(marks_of(word))[threadIdx.x];
      sum.x += __popc(marks.x) | __popc(marks.y) << 16;
      sum.y += __popc(marks.z) | __popc(marks.w) << 16;
    }
    return sum;
  }

  // A thread has two experts, and the counts of every `num_groups`-th CTA.
  __device__ void sum_counts() {
    const int shift = 32 - __clz((sort_.num_experts - 1) / 2);  // 2^shift pairs of experts
    const int num_groups = blockDim.x >> shift, group = threadIdx.x >> shift;
    const int expert = (threadIdx.x - (group << shift)) * 2;
    if (group >= num_groups || expert >= sort_.num_experts) {
      return;
    }
    int before[2] = {}, total[2] = {};
#pragma unroll 1
    for (int first = group; first < num_ctas_; first += num_groups * kRowsAtOnce) {
      unsigned counts[kRowsAtOnce] = {};
      wait_for_counts(first, num_groups, expert, counts);
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
      atomicAdd(&memory_.before[expert + i], before[i]);
      atomicAdd(&memory_.total[expert + i], total[i]);
    }
  }

  __device__ void wait_for_counts(int first, int step, int expert,
                                  unsigned (&counts)[kRowsAtOnce]) {
    constexpr unsigned kBothPresent = kPresent << 16 | kPresent;
    bool is_missing;
    do {
      is_missing = false;
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const int row = first + i * step;
        if (row < num_ctas_ && (counts[i] & kBothPresent) != kBothPresent) {
          counts[i] = load_relaxed(&exchange_.counts[memory_.round % 2][row][expert]);
        }
      }
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        is_missing |= first + i * step < num_ctas_ && (counts[i] & kBothPresent) != kBothPresent;
      }
    } while (is_missing);
  }

  // Offsets of pairs and tiles, of column c by thread c; then all threads know where pairs go.
  __device__ void scan(Column &column) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int tiles[kColumnExperts], pairs_of_column = 0, tiles_of_column = 0;
#pragma unroll
    for (int i = 0; i < kColumnExperts; ++i) {
      tiles[i] = num_tiles(column.total[i], sort_.tokens_per_tile, tile_reciprocal_);
      pairs_of_column += column.total[i];
      tiles_of_column += tiles[i];
    }
    if (warp * 32 < num_columns_) {
      column.pair_end = inclusive_scan(pairs_of_column, lane);
      column.tile_end = inclusive_scan(tiles_of_column, lane);
    }
    if (num_columns_ > 32) {
      add_warps_before(column);
    }
    if (threadIdx.x < num_columns_) {
      int pair = column.pair_end - pairs_of_column, tile = column.tile_end - tiles_of_column;
#pragma unroll
      for (int i = 0; i < kColumnExperts; ++i) {
        memory_.position[threadIdx.x * kColumnExperts + i] = pair + column.before[i];
        pair += column.total[i];
        tile += tiles[i];
        memory_.tile_ends[threadIdx.x * kColumnExperts + i] = tile;
      }
    }
    __syncthreads();
  }

  __device__ void add_warps_before(Column &column) {
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 31 && warp < kMaxColumns / 32) {
      memory_.warp_pairs[warp] = column.pair_end;
      memory_.warp_tiles[warp] = column.tile_end;
    }
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kMaxColumns / 32; ++w) {
      column.pair_end += w < warp ? memory_.warp_pairs[w] : 0;
      column.tile_end += w < warp ? memory_.warp_tiles[w] : 0;
    }
  }

  __device__ void write_offsets(const Column &column) {
    int pair_end = column.pair_end;
#pragma unroll
    for (int i = kColumnExperts - 1; i >= 0; --i) {
      const int expert = threadIdx.x * kColumnExperts + i;
      if (expert < sort_.num_experts) {
        if (sort_.counts != nullptr) {
          sort_.counts[expert] = column.total[i];
        }
        sort_.offsets[expert + 1] = pair_end;
        sort_.tile_offsets[expert + 1] = memory_.tile_ends[expert];
      }
      pair_end -= column.total[i];
    }
    if (threadIdx.x == 0) {
      sort_.offsets[0] = 0;
      sort_.tile_offsets[0] = 0;
    }
  }

  // A tile's expert is the first one whose tiles end after it. The last threads begin: where there
  // is little to do, they have no pairs to place.
  __device__ void write_tiles() {
    const int num_tiles = memory_.tile_ends[sort_.num_experts - 1];
#pragma unroll 1
    for (int tile = cta_ * blockDim.x + blockDim.x - 1 - threadIdx.x; tile < num_tiles;
         tile += num_ctas_ * blockDim.x) {
      int low = 0, high = sort_.num_experts - 1;
#pragma unroll 1
      while (low < high) {
        const int middle = (low + high) / 2;
        if (memory_.tile_ends[middle] > tile) {
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
  int num_columns_;
  uint2 *histogram_, *cluster_counts_;  // rows of num_columns: by warp, by CTA
  unsigned short *own_counts_;
  unsigned *marks_;  // in the histogram's place: rows of experts, by 32 tokens
  Exchange &exchange_;
  int cta_, num_ctas_;
  bool in_cluster_, by_marks_;
  unsigned tile_reciprocal_ = 0, round_ = 0, to_wipe_ = 0;
};

}  // namespace light::gate
