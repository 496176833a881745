#include "rms_norm.h"

#include <cmath>

#include "norm_rows.h"

// Floor: forward reads x and writes y, backward reads dy and x and writes dx, once each from
// memory; about 4 operations an element forward and 10 backward, so memory binds. The second sweep
// over a row finds it in the first- or second-level cache (64 KB at 16384 fp32 features). The add
// form also reads the residual and writes the sum.
namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

template <typename X, typename Y>
struct Forward {
  const Matrix& x;
  const Matrix* residual;
  const MutableMatrix* sum;
  const float* scale;
  const double eps;
  const bool round_first;
  const MutableMatrix& y;
  float* rstd;

  template <int Rows>
  void rows(int64_t first) const {
    using In = typename X::type;
    using Out = typename Y::type;
    const int64_t cols = x.cols;
    const In* in[Rows];
    float factor[Rows];
    for (int i = 0; i < Rows; ++i) {
      in[i] = static_cast<const In*>(x.data) + (first + i) * x.stride;
      if (residual) {
        In* added = static_cast<In*>(sum->data) + (first + i) * sum->stride;
        add_row(X{}, in[i], *residual, first + i, added);
        in[i] = added;
      }
      const float squares = sum_columns<1>(cols, [&](int64_t j, auto lanes, auto& sums) {
        const vr v = load_lanes(X{}, in[i] + j, lanes);
        sums[0] += v * v;
      })[0];
      factor[i] = reciprocal_root(static_cast<double>(squares) / cols + eps);
      rstd[first + i] = factor[i];
    }
    Out* out = static_cast<Out*>(y.data) + first * y.stride;
    if (round_first)
      scale_rows<Rows>(in, factor, out, [](vr n) { return rounded(X{}, n); });
    else
      scale_rows<Rows>(in, factor, out, [](vr n) { return n; });
  }

  template <int Rows, typename Round>
  void scale_rows(const typename X::type* const* in, const float* factor, typename Y::type* out,
                  Round round) const {
    for_columns(x.cols, [&](int64_t j, auto lanes) {
      const vr w = load_lanes(Float{}, scale + j, lanes);
      for (int i = 0; i < Rows; ++i) {
        const vr n = round(load_lanes(X{}, in[i] + j, lanes) * all(factor[i]));
        store_lanes(Y{}, out + i * y.stride + j, n * w, lanes);
      }
    });
  }
};

template <typename G, typename X>
struct Backward {
  const Matrix& dy;
  const Matrix& x;
  const float* scale;
  const float* rstd;
  const Matrix* addend;
  const MutableMatrix* dx;
  float* dweight;  // [H], added to; null: not wanted

  using Grad = typename G::type;
  using In = typename X::type;

  // g = dy scale, n = x rstd, dx = rstd (g - n mean(g n)) + addend, dweight += dy n
  template <int Rows>
  void rows(int64_t first) const {
    const Grad* grad[Rows];
    const In* in[Rows];
    for (int i = 0; i < Rows; ++i) {
      grad[i] = static_cast<const Grad*>(dy.data) + (first + i) * dy.stride;
      in[i] = static_cast<const In*>(x.data) + (first + i) * x.stride;
    }
    if (dx) write_dx<Rows>(grad, in, rstd + first, first);
    if (!dweight) return;
    for_columns(x.cols, [&](int64_t j, auto lanes) {
      vr sums = load_lanes(Float{}, dweight + j, lanes);
      for (int i = 0; i < Rows; ++i) {
        const vr n = load_lanes(X{}, in[i] + j, lanes) * all(rstd[first + i]);
        sums += load_lanes(G{}, grad[i] + j, lanes) * n;
      }
      store_lanes(Float{}, dweight + j, sums, lanes);
    });
  }

  template <int Rows>
  void write_dx(const Grad* const* grad, const In* const* in, const float* r, int64_t first) const {
    float mean[Rows];
    for (int i = 0; i < Rows; ++i)
      mean[i] = sum_columns<1>(x.cols,
                               [&](int64_t j, auto lanes, auto& sums) {
                                 const vr g = load_lanes(G{}, grad[i] + j, lanes) *
                                              load_lanes(Float{}, scale + j, lanes);
                                 sums[0] += g * (load_lanes(X{}, in[i] + j, lanes) * all(r[i]));
                               })[0] /
                static_cast<float>(x.cols);
    In* out = static_cast<In*>(dx->data) + first * dx->stride;
    const auto write = [&](auto add) {
      for_columns(x.cols, [&](int64_t j, auto lanes) {
        const vr w = load_lanes(Float{}, scale + j, lanes);
        for (int i = 0; i < Rows; ++i) {
          const vr g = load_lanes(G{}, grad[i] + j, lanes) * w;
          const vr n = load_lanes(X{}, in[i] + j, lanes) * all(r[i]);
          const vr d = (g - n * all(mean[i])) * all(r[i]);
          store_lanes(X{}, out + i * dx->stride + j, add(d, i, j, lanes), lanes);
        }
      });
    };
    if (!addend) return write([](vr d, int, int64_t, auto) { return d; });
    const In* more = static_cast<const In*>(addend->data) + first * addend->stride;
    write([&](vr d, int i, int64_t j, auto lanes) {
      return d + load_lanes(X{}, more + i * addend->stride + j, lanes);
    });
  }
};

}  // namespace

void rms_norm_forward(const Matrix& x, const Matrix* residual, const MutableMatrix* sum,
                      const NormVector& weight, double eps, bool round_first,
                      const MutableMatrix& y, float* rstd, int threads) {
  const int64_t blocks = (x.rows + kNormRows - 1) / kNormRows;
  const float* scale = values_of(weight, x.cols, 1.0f);
  with_element(x.dtype, [&](auto in) {
    with_element(y.dtype, [&](auto out) {
      const Forward<decltype(in), decltype(out)> body{x,   residual,    sum, scale,
                                                      eps, round_first, y,   rstd};
#pragma omp parallel for num_threads(norm_team(threads, x.rows, x.cols)) schedule(static)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t begin = block * kNormRows;
        for_row_blocks(begin, std::min(begin + kNormRows, x.rows), x.cols, body);
      }
    });
  });
}

void rms_norm_backward(const Matrix& dy, const Matrix& x, const NormVector& weight,
                       const float* rstd, const Matrix* addend, const MutableMatrix* dx,
                       const ColumnSums& dweight, int threads) {
  const int64_t chunks = dweight.chunks, size = chunks ? (x.rows + chunks - 1) / chunks : 0;
  const float* scale = values_of(weight, x.cols, 1.0f);
  with_element(dy.dtype, [&](auto gradient) {
    with_element(x.dtype, [&](auto in) {
#pragma omp parallel for num_threads(norm_team(threads, x.rows, x.cols)) schedule(static)
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        float* sums = dweight.out ? dweight.partial + chunk * x.cols : nullptr;
        if (sums) std::fill(sums, sums + x.cols, 0.0f);
        const Backward<decltype(gradient), decltype(in)> body{dy, x, scale, rstd, addend, dx, sums};
        for_row_blocks(std::min(chunk * size, x.rows), std::min((chunk + 1) * size, x.rows), x.cols,
                       body);
      }
    });
  });
  add_partials(dweight, x.cols, threads);
}

}  // namespace fasttune::cpu::FASTTUNE_ISA
