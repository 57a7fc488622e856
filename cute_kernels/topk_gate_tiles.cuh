// The router product of many tokens on the tensor cores: logits [T, E], in the order of
// topk_gate_mma.cuh. A tile is some experts x some tokens; both come to shared memory in stages of
// 64 of depth. On Hopper the two CTAs of a cluster take a half of the depth each and finish half of
// the tile's experts each; elsewhere a CTA takes one half after the other.
#pragma once

#include "topk_gate_cluster.cuh"
#include "topk_gate_mma.cuh"

namespace light::gate {

#if __CUDA_ARCH__ >= 900
constexpr bool kPairedCtas = true;
#else
constexpr bool kPairedCtas = false;
#endif

constexpr int kStageVectors = kStageDepth / 8;  // of a row
constexpr int kRowBytes = 2 * kStageDepth;
constexpr int kCopiedAtOnce = kTileThreads / kStageVectors;
constexpr int kStagesPerSlice = kSliceDepth / kStageDepth;
constexpr int kCopiedStages = kAsyncCopies ? kTileStages : kTileStagesTuring;

// A lane's part of experts g and g + 8 of 16.
struct ExpertPart {
  uint4 low, high;
};

template <class Mma, int kExperts, int kTokens>
class RouterTiles {
 public:
  static constexpr int kExpertWarps = kExperts == kMmaExperts ? 1 : 2;
  static constexpr int kTokenWarps = kTileThreads / 32 / kExpertWarps;
  static constexpr int kExpertMmas = kExperts / kExpertWarps / kMmaExperts;
  static constexpr int kTokenMmas = kTokens / kTokenWarps / kMmaTokens;
  using Sums = float[kExpertMmas][kTokenMmas][4];

  __device__ RouterTiles(const light_router_logits_args &args, char *shared)
      : args_(args),
        shared_(shared_address(shared)),
        exchange_(shared + kCopiedStages * kStageBytes),
        copied_row_(threadIdx.x / kStageVectors),
        warp_expert_(threadIdx.x / 32 % kExpertWarps * (kExperts / kExpertWarps)),
        warp_token_(threadIdx.x / 32 / kExpertWarps * (kTokens / kTokenWarps)),
        zero_(static_cast<unsigned>(args.num_tokens) >> 31) {}

  __device__ void write_all() {
    const int expert_tiles = (args_.num_experts + kExperts - 1) / kExperts;
    const int num_tiles = (args_.num_tokens + kTokens - 1) / kTokens * expert_tiles;
    constexpr int kCtas = kPairedCtas ? 2 : 1;
    for (int tile = blockIdx.x / kCtas; tile < num_tiles; tile += gridDim.x / kCtas) {
      expert_ = tile % expert_tiles * kExperts;
      token_ = tile / expert_tiles * kTokens;
      Sums totals;
      if constexpr (kPairedCtas) {
        cluster_arrive();  // the exchange's memory is free
        add_half(blockIdx.x % 2, totals);
        finish_paired(blockIdx.x % 2, totals);
      } else {
        Sums first;
        add_half(0, first);
        add_half(1, totals);
        finish(first, totals);
      }
    }
  }

 private:
  static constexpr int kStageBytes = (kExperts + kTokens) * kRowBytes;
  static constexpr int kExpertCopies = (kExperts + kCopiedAtOnce - 1) / kCopiedAtOnce;
  static constexpr int kTokenCopies = kTokens / kCopiedAtOnce;

  // Where 16 bytes of a row are. Two rows' halves change places so that the eight lanes that read
  // at once, four neighbours of two rows, read from all banks.
  static __device__ unsigned place_of(int row, int vector) {
    return row * kRowBytes + (vector ^ row % 2 * (kStageVectors / 2)) * 16;
  }

  template <int kCopies, class Copy>
  __device__ void for_copied_rows(const void *base, int first, int num_rows, int stage,
                                  Copy copy) const {
    const int depth = stage * kStageDepth + threadIdx.x % kStageVectors * 8;
    const unsigned short *rows = static_cast<const unsigned short *>(base);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = copied_row_ + i * kCopiedAtOnce;
      const bool exists = first + row < num_rows && depth < args_.width;
      copy(i, row, exists ? rows + (long long)(first + row) * args_.width + depth : rows, exists);
    }
  }

  template <class Copy>
  __device__ void for_expert_rows(int stage, Copy copy) const {
    for_copied_rows<kExpertCopies>(
        args_.router_weight, expert_, args_.num_experts, stage,
        [&](int i, int row, const void *source, bool exists) {
          if (kExperts % kCopiedAtOnce == 0 || row < kExperts) {
            copy(i, row, source, exists);
          }
        });
  }

  template <class Copy>
  __device__ void for_token_rows(int stage, Copy copy) const {
    for_copied_rows<kTokenCopies>(args_.hidden, token_, args_.num_tokens, stage,
                                  [&](int i, int row, const void *source, bool exists) {
                                    copy(i, kExperts + row, source, exists);
                                  });
  }

  __device__ unsigned target(int stage, int row) const {
    return shared_ + stage % kCopiedStages * kStageBytes +
           place_of(row, threadIdx.x % kStageVectors);
  }

  __device__ void copy_experts(int stage) const {
    for_expert_rows(stage, [&](int, int row, const void *source, bool exists) {
      copy_async_16(target(stage, row), source, exists ? 16 : 0);
    });
  }
  __device__ void copy_tokens(int stage) const {
    for_token_rows(stage, [&](int, int row, const void *source, bool exists) {
      copy_async_16(target(stage, row), source, exists ? 16 : 0);
    });
  }

  // Turing: a stage on its way through registers.
  struct Fetched {
    uint4 experts[kExpertCopies], tokens[kTokenCopies];
  };
  __device__ void fetch(int stage, Fetched &fetched) const {
    for_expert_rows(stage, [&](int i, int, const void *source, bool exists) {
      fetched.experts[i] = load_global_16(source, exists);
    });
    for_token_rows(stage, [&](int i, int, const void *source, bool exists) {
      fetched.tokens[i] = load_global_16(source, exists);
    });
  }
  __device__ void store(int stage, const Fetched &fetched) const {
    for_expert_rows(stage, [&](int i, int row, const void *, bool) {
      store_shared_16(target(stage, row), fetched.experts[i]);
    });
    for_token_rows(stage, [&](int i, int row, const void *, bool) {
      store_shared_16(target(stage, row), fetched.tokens[i]);
    });
  }

  __device__ void wait_for_previous() {
    if (!waited_) {
      wait_for_previous_kernel();
      waited_ = true;
    }
  }

  // Slices are whole: where the depth ends before, the rest of the last one is zeros.
  __device__ void add_half(int half, Sums &totals) {
    const int num_slices = slices_of(args_.width), first_slices = first_slices_of(num_slices);
    const int begin = half == 0 ? 0 : first_slices * kStagesPerSlice;
    const int end = (half == 0 ? first_slices : num_slices) * kStagesPerSlice;
    clear(totals);
    __syncthreads();  // for those who still read the stages before
    if constexpr (kAsyncCopies) {
      add_copied(begin, end, totals);
    } else {
      add_fetched(begin, end, totals);
    }
  }

  __device__ void add_copied(int begin, int end, Sums &totals) {
    constexpr int kAhead = kCopiedStages - 1;
    for (int i = 0; i < kAhead && begin + i < end; ++i) {
      copy_experts(begin + i);  // older than the kernel before this one
    }
    wait_for_previous();
    for (int i = 0; i < kAhead; ++i) {
      if (begin + i < end) {
        copy_tokens(begin + i);
      }
      commit_copies();
    }
    Sums sums;
#pragma unroll 1
    for (int stage = begin; stage < end; ++stage) {
      wait_copies<kAhead - 1>();
      __syncthreads();
      if (stage + kAhead < end) {
        copy_experts(stage + kAhead);
        copy_tokens(stage + kAhead);
      }
      commit_copies();
      add_stage(stage, sums, totals);
    }
  }

  __device__ void add_fetched(int begin, int end, Sums &totals) {
    wait_for_previous();
    Fetched fetched;
    if (begin < end) {
      fetch(begin, fetched);
      store(begin, fetched);
    }
    Sums sums;
#pragma unroll 1
    for (int stage = begin; stage < end; ++stage) {
      if (stage + 1 < end) {
        fetch(stage + 1, fetched);
      }
      __syncthreads();
      add_stage(stage, sums, totals);
      if (stage + 1 < end) {
        store(stage + 1, fetched);
      }
    }
  }

  static __device__ void clear(Sums &sums) {
#pragma unroll
    for (int i = 0; i < kExpertMmas; ++i) {
#pragma unroll
      for (int j = 0; j < kTokenMmas; ++j) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          sums[i][j][part] = 0.0f;
        }
      }
    }
  }

  // first + sums, into sums.
  static __device__ void add(const Sums &first, Sums &sums) {
#pragma unroll
    for (int i = 0; i < kExpertMmas; ++i) {
#pragma unroll
      for (int j = 0; j < kTokenMmas; ++j) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          sums[i][j][part] = first[i][j][part] + sums[i][j][part];
        }
      }
    }
  }

  __device__ void add_stage(int stage, Sums &sums, Sums &totals) const {
    if (stage % kStagesPerSlice == 0) {
      clear(sums);
    }
#pragma unroll
    for (int block = 0; block < kStageDepth / kBlockDepth; ++block) {
      multiply_block(stage, block, sums);
    }
    if (stage % kStagesPerSlice == kStagesPerSlice - 1) {
      add(sums, totals);
    }
  }

  __device__ void multiply_block(int stage, int block, Sums &sums) const {
    const int lane = threadIdx.x % 32, row = lane / 4;  // every first row of 8 is even
    const unsigned lane_place =
        shared_ + stage % kCopiedStages * kStageBytes + place_of(row, block * 4 + lane % 4);
    const unsigned expert_place = lane_place + warp_expert_ * kRowBytes;
    const unsigned token_place = lane_place + (kExperts + warp_token_) * kRowBytes;
    ExpertPart experts[kExpertMmas];
    uint4 tokens[kTokenMmas];
#pragma unroll
    for (int i = 0; i < kExpertMmas; ++i) {
      experts[i].low = load_shared_16(expert_place + i * kMmaExperts * kRowBytes);
      experts[i].high = load_shared_16(expert_place + (i * kMmaExperts + 8) * kRowBytes);
    }
#pragma unroll
    for (int j = 0; j < kTokenMmas; ++j) {
      tokens[j] = load_shared_16(token_place + j * kMmaTokens * kRowBytes);
    }
    multiply_all<0>(experts, tokens, sums);
    multiply_all<1>(experts, tokens, sums);
  }

  // An mma wants its four registers of experts side by side. As results of an operation they are
  // put there once; plain moves the compiler repeats for every mma.
  template <int kHalf>
  __device__ void multiply_all(const ExpertPart (&experts)[kExpertMmas],
                               const uint4 (&tokens)[kTokenMmas], Sums &sums) const {
#pragma unroll
    for (int i = 0; i < kExpertMmas; ++i) {
      const uint4 &low = experts[i].low, &high = experts[i].high;
      const Operand operand = {first_of<kHalf>(low) ^ zero_, first_of<kHalf>(high) ^ zero_,
                               second_of<kHalf>(low) ^ zero_, second_of<kHalf>(high) ^ zero_};
#pragma unroll
      for (int j = 0; j < kTokenMmas; ++j) {
        multiply_half<Mma, kHalf>(sums[i][j], operand, tokens[j]);
      }
    }
  }

  // Logits of expert g + 8 * high of each mma, tokens 2t and 2t + 1.
  __device__ void store_logits(int i, int j, int high, float first, float second) const {
    const int lane = threadIdx.x % 32;
    const int expert = expert_ + warp_expert_ + i * kMmaExperts + high * 8 + lane / 4;
    const int token = token_ + warp_token_ + j * kMmaTokens + lane % 4 * 2;
    if (expert < args_.num_experts) {
      float *logit = args_.logits + (long long)token * args_.num_experts + expert;
      if (token < args_.num_tokens) {
        logit[0] = first;
      }
      if (token + 1 < args_.num_tokens) {
        logit[args_.num_experts] = second;
      }
    }
  }

  __device__ void finish(const Sums &first, Sums &sums) const {
    add(first, sums);
#pragma unroll
    for (int i = 0; i < kExpertMmas; ++i) {
#pragma unroll
      for (int j = 0; j < kTokenMmas; ++j) {
        store_logits(i, j, 0, sums[i][j][0], sums[i][j][1]);
        store_logits(i, j, 1, sums[i][j][2], sums[i][j][3]);
      }
    }
  }

  // CTA 0 finishes the lower eight experts of each mma, CTA 1 the upper: they give each other the
  // sums of the rest. The same bits whichever half comes first in the addition.
  __device__ void finish_paired(int rank, const Sums &sums) const {
    float2 *given = reinterpret_cast<float2 *>(exchange_) +
                    threadIdx.x / 32 * kExpertMmas * kTokenMmas * 32 + threadIdx.x % 32;
    const unsigned target = address_in(1 - rank, given);
    cluster_wait();
#pragma unroll
    for (int i = 0; i < kExpertMmas; ++i) {
#pragma unroll
      for (int j = 0; j < kTokenMmas; ++j) {
        const float(&four)[4] = sums[i][j];
        store_in_cluster(target + (i * kTokenMmas + j) * 32 * sizeof(float2),
                         rank == 0 ? four[2] : four[0], rank == 0 ? four[3] : four[1]);
      }
    }
    cluster_arrive();
    cluster_wait();
#pragma unroll
    for (int i = 0; i < kExpertMmas; ++i) {
#pragma unroll
      for (int j = 0; j < kTokenMmas; ++j) {
        const float(&four)[4] = sums[i][j];
        const float2 other = given[(i * kTokenMmas + j) * 32];
        store_logits(i, j, rank, (rank == 0 ? four[0] : four[2]) + other.x,
                     (rank == 0 ? four[1] : four[3]) + other.y);
      }
    }
  }

  const light_router_logits_args &args_;
  unsigned shared_;
  char *exchange_;
  int copied_row_, warp_expert_, warp_token_;
  unsigned zero_;               // which the compiler does not know
  int expert_ = 0, token_ = 0;  // first of the tile
  bool waited_ = false;
};

}  // namespace light::gate
