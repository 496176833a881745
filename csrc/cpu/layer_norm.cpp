#include "layer_norm.h"

#include <cmath>

#include "norm_rows.h"

// Floor: as rms_norm.cpp; one more sweep over the cached row for the mean.
namespace fasttune::cpu::FASTTUNE_ISA {
namespace {

struct Moments {
  float mean, rstd;
};

// Two passes: the variance is that of the deviations from the mean. (Adding up the deviations to
// correct the mean would make it worse where it is small: all values of one binade round alike when
// the same number is subtracted.)
template <typename X>
inline Moments moments(const typename X::type* row, int64_t cols, double eps) {
  const float total = sum_columns<1>(cols, [&](int64_t j, auto lanes, auto& sums) {
    sums[0] += load_lanes(X{}, row + j, lanes);
  })[0];
  const float mean = total / static_cast<float>(cols);
  const double squares = sum_columns<1>(cols, [&](int64_t j, auto lanes, auto& sums) {
    const vr d = existing(load_lanes(X{}, row + j, lanes) - all(mean), lanes);
    sums[0] += d * d;
  })[0];
  return {mean, reciprocal_root(squares / cols + eps)};
}

template <typename X, typename Y>
struct Forward {
  const Matrix& x;
  const Matrix* residual;
  const MutableMatrix* sum;
  const float* scale;
  const float* bias;
  const double eps;
  const MutableMatrix& y;
  float* mean;
  float* rstd;

  template <int Rows>
  void rows(int64_t first) const {
    using In = typename X::type;
    using Out = typename Y::type;
    const int64_t cols = x.cols;
    const In* in[Rows];
    Moments of[Rows];
    for (int i = 0; i < Rows; ++i) {
      in[i] = static_cast<const In*>(x.data) + (first + i) * x.stride;
      if (residual) {
        In* added = static_cast<In*>(sum->data) + (first + i) * sum->stride;
        add_row(X{}, in[i], *residual, first + i, added);
        in[i] = added;
      }
      of[i] = moments<X>(in[i], cols, eps);
      mean[first + i] = of[i].mean;
      rstd[first + i] = of[i].rstd;
    }
    Out* out = static_cast<Out*>(y.data) + first * y.stride;
    for_columns(cols, [&](int64_t j, auto lanes) {
      const vr w = load_lanes(Float{}, scale + j, lanes);
      const vr shift = load_lanes(Float{}, bias + j, lanes);
      for (int i = 0; i < Rows; ++i) {
        const vr d = load_lanes(X{}, in[i] + j, lanes) - all(of[i].mean);
        store_lanes(Y{}, out + i * y.stride + j, d * all(of[i].rstd) * w + shift, lanes);
      }
    });
  }
};

template <typename G, typename X>
struct Backward {
  const Matrix& dy;
  const Matrix& x;
  const float* scale;
  const float* mean;
  const float* rstd;
  const Matrix* addend;
  const MutableMatrix* dx;
  float* dweight;  // [H], added to; null: not wanted
  float* dbias;    // likewise

  using Grad = typename G::type;
  using In = typename X::type;

  // g = dy scale, n = (x - mean) rstd, dx = rstd (g - mean(g) - n mean(g n)) + addend,
  // dweight += dy n, dbias += dy
  template <int Rows>
  void rows(int64_t first) const {
    const Grad* grad[Rows];
    const In* in[Rows];
    Moments of[Rows];
    for (int i = 0; i < Rows; ++i) {
      grad[i] = static_cast<const Grad*>(dy.data) + (first + i) * dy.stride;
      in[i] = static_cast<const In*>(x.data) + (first + i) * x.stride;
      of[i] = {mean[first + i], rstd[first + i]};
    }
    if (dx) write_dx<Rows>(grad, in, of, first);
    if (dweight)
      for_columns(x.cols, [&](int64_t j, auto lanes) {
        vr sums = load_lanes(Float{}, dweight + j, lanes);
        for (int i = 0; i < Rows; ++i)
          sums += load_lanes(G{}, grad[i] + j, lanes) * normal(in[i], of[i], j, lanes);
        store_lanes(Float{}, dweight + j, sums, lanes);
      });
    if (dbias)
      for_columns(x.cols, [&](int64_t j, auto lanes) {
        vr sums = load_lanes(Float{}, dbias + j, lanes);
        for (int i = 0; i < Rows; ++i) sums += load_lanes(G{}, grad[i] + j, lanes);
        store_lanes(Float{}, dbias + j, sums, lanes);
      });
  }

  template <typename Lanes>
  static vr normal(const In* in, const Moments& of, int64_t j, Lanes lanes) {
    return (load_lanes(X{}, in + j, lanes) - all(of.mean)) * all(of.rstd);
  }

  template <int Rows>
  void write_dx(const Grad* const* grad, const In* const* in, const Moments* of,
                int64_t first) const {
    float g_mean[Rows], gn_mean[Rows];
    for (int i = 0; i < Rows; ++i) {
      // Lanes that do not exist have g = 0.
      const auto totals = sum_columns<2>(x.cols, [&](int64_t j, auto lanes, auto& sums) {
        const vr g = load_lanes(G{}, grad[i] + j, lanes) * load_lanes(Float{}, scale + j, lanes);
        sums[0] += g;
        sums[1] += g * normal(in[i], of[i], j, lanes);
      });
      g_mean[i] = totals[0] / static_cast<float>(x.cols);
      gn_mean[i] = totals[1] / static_cast<float>(x.cols);
    }
    In* out = static_cast<In*>(dx->data) + first * dx->stride;
    const auto write = [&](auto add) {
      for_columns(x.cols, [&](int64_t j, auto lanes) {
        const vr w = load_lanes(Float{}, scale + j, lanes);
        for (int i = 0; i < Rows; ++i) {
          const vr g = load_lanes(G{}, grad[i] + j, lanes) * w;
          const vr n = normal(in[i], of[i], j, lanes);
          const vr d = (g - all(g_mean[i]) - n * all(gn_mean[i])) * all(of[i].rstd);
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

inline float* partial_of(const ColumnSums& sums, int64_t chunk, int64_t cols) {
  if (!sums.out) return nullptr;
  float* partial = sums.partial + chunk * cols;
  std::fill(partial, partial + cols, 0.0f);
  return partial;
}

}  // namespace

void layer_norm_forward(const Matrix& x, const Matrix* residual, const MutableMatrix* sum,
                        const NormVector& weight, const NormVector& bias, double eps,
                        const MutableMatrix& y, float* mean, float* rstd, int threads) {
  const int64_t blocks = (x.rows + kNormRows - 1) / kNormRows;
  const float* scale = values_of(weight, x.cols, 1.0f);
  const float* shift = values_of(bias, x.cols, 0.0f);
  with_element(x.dtype, [&](auto in) {
    with_element(y.dtype, [&](auto out) {
      const Forward<decltype(in), decltype(out)> body{x,   residual, sum,  scale, shift,
                                                      eps, y,        mean, rstd};
#pragma omp parallel for num_threads(norm_team(threads, x.rows, x.cols)) schedule(static)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t begin = block * kNormRows;
        for_row_blocks(begin, std::min(begin + kNormRows, x.rows), x.cols, body);
      }
    });
  });
}

void layer_norm_backward(const Matrix& dy, const Matrix& x, const NormVector& weight,
                         const float* mean, const float* rstd, const Matrix* addend,
                         const MutableMatrix* dx, const ColumnSums& dweight,
                         const ColumnSums& dbias, int threads) {
  const int64_t chunks = dweight.chunks, size = chunks ? (x.rows + chunks - 1) / chunks : 0;
  const float* scale = values_of(weight, x.cols, 1.0f);
  with_element(dy.dtype, [&](auto gradient) {
    with_element(x.dtype, [&](auto in) {
#pragma omp parallel for num_threads(norm_team(threads, x.rows, x.cols)) schedule(static)
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        float* weights = partial_of(dweight, chunk, x.cols);
        float* biases = partial_of(dbias, chunk, x.cols);
        const Backward<decltype(gradient), decltype(in)> body{dy,     x,  scale,   mean,  rstd,
                                                              addend, dx, weights, biases};
        for_row_blocks(std::min(chunk * size, x.rows), std::min((chunk + 1) * size, x.rows), x.cols,
                       body);
      }
    });
  });
  add_partials(dweight, x.cols, threads);
  add_partials(dbias, x.cols, threads);
}

}  // namespace fasttune::cpu::FASTTUNE_ISA
