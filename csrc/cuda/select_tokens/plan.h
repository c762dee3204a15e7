// How select_tokens runs on CUDA: how many blocks share a row, and where they exchange.
#pragma once

#include <cstdint>
#include <string>

namespace zipvl::plan {

// The kernels and the plan agree on these.
constexpr std::int64_t kSelectThreads = 512;   // a block
constexpr std::int64_t kSelectBuckets = 2048;  // of a histogram
// A copy of the budget's histogram in shared memory.
constexpr std::int64_t kSelectMassHistogramBytes = kSelectBuckets * 8;
constexpr std::int64_t kSelectTokensPerCopy = 4096;  // of a block's tokens
constexpr std::int64_t kSelectMaxClusterBlocks = 8;  // every sm_90 device takes as many
constexpr std::int64_t kSelectMaxCandidates = 1024;  // candidates that blocks list for each other
constexpr std::int64_t kSelectGathers = 2;           // exchanges of records a row
constexpr std::int64_t kSelectRecordBytes = 16;      // what a block sends in one
// Device memory of a grid's row: the barrier, three histograms in turn, two lists of candidates, and records.
constexpr std::int64_t kSelectBarrierBytes = 128;
constexpr std::int64_t kSelectHistogramBytes = kSelectBuckets * 12;
constexpr std::int64_t kSelectHistograms = 3;
constexpr std::int64_t kSelectCandidatesBytes = kSelectMaxCandidates * 4;

// The blocks that share a row, and where they exchange.
enum class SelectTeam {
  kBlock,    // one block
  kCluster,  // a thread-block cluster, in each other's shared memory: sm_90
  kGrid,     // a cooperative launch, in device memory
  kNone,     // the device is too small for the row: ATen
};

struct SelectTokensProblem {
  std::int64_t batch, tokens;
  std::int64_t num_sms;
  std::int64_t shared_bytes;  // of shared memory, the most a block may have
  bool clusters;              // the device has them
};

struct SelectTokensPlan {
  SelectTeam team;
  std::string reason;  // why the team is kNone: all else is 0 then; or empty
  std::int64_t blocks_per_row;
  std::int64_t tokens_per_block;
  std::int64_t row_groups;           // rows worked on at once
  std::int64_t row_workspace_bytes;  // of a row: the barrier, histograms and records of kGrid
  std::int64_t workspace_bytes;

  std::string describe() const;
};

SelectTokensPlan plan_select_tokens(const SelectTokensProblem& problem);

}  // namespace zipvl::plan
