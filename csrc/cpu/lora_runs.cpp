#include "lora_runs.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <optional>

#include "isa.h"

namespace fasttune::cpu {
namespace {

using Buffer = std::unique_ptr<float[]>;

Buffer buffer(int64_t elements) { return Buffer(new float[std::max<int64_t>(1, elements)]); }

template <typename M>
M rows_of(const M& m, const RunOfRows& run) {
  M own = m;
  own.rows = run.end - run.first;
  const int64_t bytes = run.first * m.stride * size_of(m.dtype);
  if constexpr (std::is_same_v<M, Matrix>)
    own.data = static_cast<const char*>(m.data) + bytes;
  else
    own.data = static_cast<char*>(m.data) + bytes;
  return own;
}

// The addend of a run's rows, if there is one.
class Addend {
 public:
  Addend(const Matrix* all, const RunOfRows& run) : given_(all != nullptr) {
    if (all) own_ = rows_of(*all, run);
  }
  const Matrix* get() const { return given_ ? &own_ : nullptr; }

 private:
  bool given_;
  Matrix own_{};
};

Dropout from_row(Dropout dropout, int64_t row) {
  dropout.row_offset += static_cast<uint64_t>(row);
  return dropout;
}

// x [M, N] as fp32 with zero columns up to `columns`; its own values where they lie so already.
class Widened {
 public:
  Widened(const Matrix& x, int64_t columns, int threads) {
    if (x.dtype == DType::kFloat32 && x.cols == columns && x.stride == columns) {
      data_ = static_cast<const float*>(x.data);
      return;
    }
    own_ = buffer(x.rows * columns);
    if (x.cols != columns) std::fill_n(own_.get(), x.rows * columns, 0.0f);
    kernels().convert(x, {own_.get(), x.rows, x.cols, columns, DType::kFloat32}, threads);
    data_ = own_.get();
  }
  const float* data() const { return data_; }

 private:
  Buffer own_;
  const float* data_ = nullptr;
};

Buffer transposed(const Matrix& x, int64_t columns, int threads) {
  Buffer out = buffer(x.cols * columns);
  kernels().transpose(x, out.get(), columns, threads);
  return out;
}

// Calls body(i, threads of the call) for i < count: each on a thread of its own where there are
// enough, so that threads meet once and not in every call.
template <typename Body>
void for_each(size_t count, int threads, Body&& body) {
  const bool apart = threads > 1 && count >= 2 * static_cast<size_t>(threads);
  if (!apart) {
    for (size_t i = 0; i < count; ++i) body(i, threads);
    return;
  }
  std::atomic<bool> no_memory{false};  // nothing may be thrown out of a parallel region
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (size_t i = 0; i < count; ++i) try {
      body(i, 1);
    } catch (const std::bad_alloc&) {
      no_memory = true;
    }
  if (no_memory) throw std::bad_alloc();
}

// The sums of each branch over its runs. Of several runs each has one of its own, and these are
// added in order before they are rounded.
class Sums {
 public:
  Sums(const RunsCall& call, const std::vector<MutableMatrix>& outs)
      : call_(call), outs_(outs), runs_(outs.size()), parts_(call.runs.size()) {
    for (const RunOfRows& run : call.runs) ++runs_[run.branch];
    for (size_t i = 0; i < parts_.size(); ++i)
      if (const size_t j = call.runs[i].branch; wanted(i) && runs_[j] > 1)
        parts_[i] = buffer(outs[j].rows * outs[j].cols);
  }
  bool wanted(size_t run) const { return outs_[call_.runs[run].branch].data != nullptr; }
  // rank columns of t [rows, rank] of a run times the rows of x.
  void outer(size_t run, const Matrix& x, const float* t, int64_t rank, const Dropout& dropout,
             bool transposed, int threads) {
    const Widened wide({t, x.rows, rank, rank, DType::kFloat32}, padded_rank(rank), threads);
    kernels().lora_outer(x, wide.data(), rank, dropout, of(run), transposed, threads);
  }
  void finish() {
    for_each(outs_.size(), call_.threads, [&](size_t j, int threads) {
      if (outs_[j].data == nullptr || runs_[j] < 2) return;
      const MutableMatrix& out = outs_[j];
      float* total = nullptr;
      for (size_t i = 0; i < parts_.size(); ++i) {
        if (call_.runs[i].branch != j) continue;
        if (total == nullptr)
          total = parts_[i].get();
        else
          for (int64_t k = 0; k < out.rows * out.cols; ++k) total[k] += parts_[i][k];
      }
      kernels().convert({total, out.rows, out.cols, out.cols, DType::kFloat32}, out, threads);
    });
  }

 private:
  MutableMatrix of(size_t run) const {
    const MutableMatrix& out = outs_[call_.runs[run].branch];
    if (!parts_[run]) return out;
    return {parts_[run].get(), out.rows, out.cols, out.cols, DType::kFloat32};
  }

  const RunsCall& call_;
  const std::vector<MutableMatrix>& outs_;
  std::vector<size_t> runs_;
  std::vector<Buffer> parts_;
};

// Of a run: the panel that reduces its rows to t, the factor that expands t, and what is dropped
// before and after.
struct RunOperands {
  const float *panel, *factor;
  float* t;
  const float* bias;
  Dropout reduced, expanded;
};

// base_product with the branches of all runs; operands(i) are those of run i.
template <typename Operands>
void multiply_runs(const RunsCall& call, const Matrix& x, const RunsWeight& w, const Matrix* addend,
                   const MutableMatrix& out, Operands&& operands) {
  std::vector<Reduction> reductions;
  std::vector<Run> runs;
  reductions.reserve(call.runs.size());
  for (size_t i = 0; i < call.runs.size(); ++i) {
    const RunOfRows& run = call.runs[i];
    const RunBranch& branch = call.branches[run.branch];
    const RunOperands own = operands(i);
    reductions.push_back({own.panel, branch.scale, own.reduced, own.t});
    runs.push_back({run.first, run.end, own.t, &reductions.back(), own.factor, branch.a.rows,
                    own.bias, own.expanded});
  }
  kernels().base_product(x, w.matrix, w.transposed, runs.data(), static_cast<int64_t>(runs.size()),
                         addend, nullptr, out, call.threads);
}

}  // namespace

void runs_forward(const RunsCall& call, const Matrix& x, const RunsWeight* w, const Matrix* addend,
                  const std::vector<float*>& ts, const MutableMatrix& y) {
  const Kernels& own = kernels();
  const size_t branches = call.branches.size(), count = call.runs.size();
  std::vector<Buffer> panels(branches), factors(branches);
  for_each(branches, call.threads, [&](size_t j, int threads) {
    const RunBranch& branch = call.branches[j];
    panels[j] = transposed(branch.a, padded_rank(branch.a.rows), threads);
    factors[j] = transposed(branch.b, branch.b.rows, threads);
  });
  const auto dropout_of = [&](const RunOfRows& run) {
    return from_row(call.branches[run.branch].dropout, run.first);
  };
  if (w)
    return multiply_runs(call, x, *w, addend, y, [&](size_t i) {
      const RunOfRows& run = call.runs[i];
      return RunOperands{panels[run.branch].get(),       factors[run.branch].get(), ts[i],
                         call.branches[run.branch].bias, dropout_of(run),           Dropout{}};
    });
  for_each(count, call.threads, [&](size_t i, int threads) {
    const RunOfRows& run = call.runs[i];
    const RunBranch& branch = call.branches[run.branch];
    const Addend added(addend, run);
    own.lora_reduce(rows_of(x, run), panels[run.branch].get(), branch.a.rows, branch.scale,
                    dropout_of(run), ts[i], threads);
    own.lora_expand(ts[i], factors[run.branch].get(), branch.a.rows,
                    {added.get(), nullptr, branch.bias}, Dropout{}, rows_of(y, run), threads);
  });
}

void runs_backward(const RunsCall& call, const Matrix& dy, const Matrix* x, const RunsWeight* w,
                   const Matrix* addend, const std::vector<float*>& ts, const MutableMatrix* dx,
                   const std::vector<MutableMatrix>& das, const std::vector<MutableMatrix>& dbs) {
  const Kernels& own = kernels();
  const size_t branches = call.branches.size(), count = call.runs.size();
  const bool together = w && dx;  // d is made beside dy w
  std::vector<std::optional<Widened>> panels(branches), factors(branches);
  for_each(branches, call.threads, [&](size_t j, int threads) {
    const RunBranch& branch = call.branches[j];
    panels[j].emplace(branch.b, padded_rank(branch.b.cols), threads);
    factors[j].emplace(branch.a, branch.a.cols, threads);
  });
  Sums sums_a(call, das), sums_b(call, dbs);
  std::vector<Buffer> ds(count), words(count);
  std::vector<Dropout> dropouts(count);  // of each run, counting its own rows
  for_each(count, call.threads, [&](size_t i, int threads) {
    const RunOfRows& run = call.runs[i];
    const RunBranch& branch = call.branches[run.branch];
    const int64_t rank = branch.a.rows, rows = run.end - run.first;
    const float *panel = panels[run.branch]->data(), *factor = factors[run.branch]->data();
    Dropout& dropout = dropouts[i] = from_row(branch.dropout, run.first);
    if (dropout.threshold != 0 && dx && (w || sums_a.wanted(i))) {  // two kernels use it
      const int64_t spans = (branch.a.cols + kMaskSpan - 1) / kMaskSpan;
      words[i] = buffer(2 * rows * spans);
      auto* bits = reinterpret_cast<uint64_t*>(words[i].get());
      own.draw(dropout, rows, branch.a.cols, bits, threads);
      dropout.drawn = bits;
      dropout.drawn_stride = spans;
    }
    if (sums_b.wanted(i)) sums_b.outer(i, rows_of(dy, run), ts[i], rank, Dropout{}, false, threads);
    if (!dx && !sums_a.wanted(i)) return;
    ds[i] = buffer(rows * rank);
    if (together) return;
    own.lora_reduce(rows_of(dy, run), panel, rank, branch.scale, Dropout{}, ds[i].get(), threads);
    if (sums_a.wanted(i))
      sums_a.outer(i, rows_of(*x, run), ds[i].get(), rank, dropout, true, threads);
    if (!dx) return;
    const Addend added(addend, run);
    own.lora_expand(ds[i].get(), factor, rank, {added.get(), nullptr, nullptr}, dropout,
                    rows_of(*dx, run), threads);
  });
  if (together) {
    multiply_runs(call, dy, *w, addend, *dx, [&](size_t i) {
      const size_t j = call.runs[i].branch;
      return RunOperands{panels[j]->data(), factors[j]->data(), ds[i].get(),
                         nullptr,           Dropout{},          dropouts[i]};
    });
    for_each(count, call.threads, [&](size_t i, int threads) {
      const RunOfRows& run = call.runs[i];
      if (sums_a.wanted(i))
        sums_a.outer(i, rows_of(*x, run), ds[i].get(), call.branches[run.branch].a.rows,
                     dropouts[i], true, threads);
    });
  }
  sums_a.finish();
  sums_b.finish();
}

}  // namespace fasttune::cpu
