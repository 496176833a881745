#include "elementwise.h"

#include <algorithm>

#include "staging.h"

namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

constexpr int64_t kPiece = 4096;         // elements: a page or a few of each operand
constexpr int64_t kThreadShare = 32768;  // elements below which waking a thread does not pay
constexpr int64_t kStaged = 512;         // elements converted at a time: 2 KB an operand
constexpr int kInputs = Elementwise::kInputs, kOutputs = Elementwise::kOutputs;

inline const char* at(const Matrix& x, int64_t row, int64_t col) {
  return x.data ? static_cast<const char*>(x.data) + (row * x.stride + col) * size_of(x.dtype)
                : nullptr;
}
inline char* at(const MutableMatrix& x, int64_t row, int64_t col) {
  return x.data ? static_cast<char*>(x.data) + (row * x.stride + col) * size_of(x.dtype) : nullptr;
}

// Elements [col, col + count) of a row through fp32 copies on the stack.
void run_staged(const Elementwise& call, PieceKernel kernel, int64_t row, int64_t col,
                int64_t count) {
  alignas(64) float sources[kInputs + 1][kStaged] = {}, targets[kOutputs][kStaged];
  for (const int64_t end = col + count; col < end; col += kStaged) {
    const int64_t part = std::min(kStaged, end - col);
    const void* in[kInputs + 1] = {};
    void* out[kOutputs] = {};
    for (int i = 0; i < kInputs; ++i) {
      if (!call.in[i].data) continue;
      widen(at(call.in[i], row, col), call.in[i].dtype, part, sources[i]);
      in[i] = sources[i];
    }
    if (call.row_vector) {
      std::copy_n(call.row_vector + col, part, sources[kInputs]);
      in[kInputs] = sources[kInputs];
    }
    for (int i = 0; i < kOutputs; ++i) out[i] = call.out[i].data ? targets[i] : nullptr;
    kernel(in, out, (part + kLanes - 1) / kLanes);
    for (int i = 0; i < kOutputs; ++i)
      if (out[i]) narrow(targets[i], part, call.out[i].dtype, at(call.out[i], row, col));
  }
}

void run_piece(const Elementwise& call, const PieceKernels& kernels, int64_t row, int64_t col,
               int64_t count) {
  const int64_t whole = kernels.direct ? count / kLanes * kLanes : 0;
  if (whole > 0) {
    const void* in[kInputs + 1];
    void* out[kOutputs];
    for (int i = 0; i < kInputs; ++i) in[i] = at(call.in[i], row, col);
    in[kInputs] = call.row_vector ? call.row_vector + col : nullptr;
    for (int i = 0; i < kOutputs; ++i) out[i] = at(call.out[i], row, col);
    kernels.direct(in, out, whole / kLanes);
  }
  if (whole < count) run_staged(call, kernels.fp32, row, col + whole, count - whole);
}

}  // namespace

bool Elementwise::same_dtype() const {
  const DType dtype = in[0].dtype;
  return std::all_of(in, in + kInputs, [&](auto& x) { return !x.data || x.dtype == dtype; }) &&
         std::all_of(out, out + kOutputs, [&](auto& x) { return !x.data || x.dtype == dtype; });
}

// Whether all rows can be taken as one, with one tail.
bool Elementwise::flat() const {
  const auto joined = [&](auto& x) { return !x.data || x.stride == cols; };
  return rows <= 1 || (!row_vector && std::all_of(in, in + kInputs, joined) &&
                       std::all_of(out, out + kOutputs, joined));
}

void Elementwise::run(const PieceKernels& kernels, int threads) const {
  const bool one_row = flat();
  const int64_t width = one_row ? rows * cols : cols;
  const int64_t pieces = (width + kPiece - 1) / kPiece, total = (one_row ? 1 : rows) * pieces;
  const int64_t team = std::min<int64_t>({threads, total, 1 + rows * cols / kThreadShare});
#pragma omp parallel for num_threads(static_cast<int>(std::max<int64_t>(1, team))) schedule(static)
  for (int64_t piece = 0; piece < total; ++piece) {
    const int64_t col = piece % pieces * kPiece;
    run_piece(*this, kernels, piece / pieces, col, std::min(kPiece, width - col));
  }
}

}  // namespace fasttune::cpu::FASTTUNE_ISA
