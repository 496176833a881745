// LoRA's products where runs of rows have branches of their own, as a few calls of the kernels.
#pragma once

#include <cstddef>
#include <vector>

#include "kernels.h"

namespace fasttune::cpu {

// A [R, K], B [N, R] and what surrounds them. Dropout counts the rows of the batch.
struct RunBranch {
  Matrix a, b;
  const float* bias;  // [N] or null
  float scale;
  Dropout dropout;
};

struct RunOfRows {
  int64_t first, end;
  std::size_t branch;
};

// The branches of a batch of rows, and which rows have which: runs are disjoint and ascend.
struct RunsCall {
  std::vector<RunBranch> branches;
  std::vector<RunOfRows> runs;
  int threads;
};

// A weight that base_product takes: [K, N] or, if transposed, [N, K].
struct RunsWeight {
  Matrix matrix;
  bool transposed;
};

// Of each run's rows, t [rows, R] fp32 = scale (x * keep) A^T and y = addend + bias + t B^T, plus x
// w if there is a weight.
void runs_forward(const RunsCall& call, const Matrix& x, const RunsWeight* w, const Matrix* addend,
                  const std::vector<float*>& ts, const MutableMatrix& y);

// With d = scale dy B: of each run's rows dx = addend + keep * (d A), plus dy w; of each branch,
// over all of its runs, dA [R, K] = d^T (x * keep) and dB [N, R] = dy^T t. What has no data is not
// wanted; x and ts may then be null.
void runs_backward(const RunsCall& call, const Matrix& dy, const Matrix* x, const RunsWeight* w,
                   const Matrix* addend, const std::vector<float*>& ts, const MutableMatrix* dx,
                   const std::vector<MutableMatrix>& das, const std::vector<MutableMatrix>& dbs);

}  // namespace fasttune::cpu
