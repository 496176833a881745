// The launchers of the LoRA products for ctypes: branches as columns of addresses and numbers.
#include "cuda/lora.cuh"

using namespace fasttune;

extern "C" void lora_down(const void* x, float* t, float* partial, int64_t rows, int64_t cols,
                          int64_t x_stride, int64_t cols_per_split, int64_t splits,
                          int64_t row_offset, int64_t dtype, int64_t count, int64_t transposed,
                          const int64_t* addresses, const int64_t* numbers, const float* scales) {
  cuda::LoraDown args{x,
                      t,
                      partial,
                      rows,
                      cols,
                      x_stride,
                      cols_per_split,
                      splits,
                      static_cast<uint64_t>(row_offset),
                      static_cast<int>(count),
                      transposed != 0,
                      {},
                      DType(dtype)};
  for (int64_t j = 0; j < count; ++j) {
    const int64_t *at = addresses + 3 * j, *of = numbers + 3 * j;
    args.branches[j] = {reinterpret_cast<const void*>(at[0]),
                        reinterpret_cast<const float*>(at[1]),
                        reinterpret_cast<const int64_t*>(at[2]),
                        scales[j],
                        static_cast<int>(of[0]),
                        static_cast<uint32_t>(of[1]),
                        static_cast<uint32_t>(of[2])};
  }
  cuda::launch_lora_down(args, nullptr);
}

extern "C" void lora_up(const float* t, const void* b, const float* bias, void* y, int64_t rows,
                        int64_t cols, int64_t rank, int64_t y_stride, int64_t dtype) {
  cuda::launch_lora_up({t, b, bias, y, rows, cols, rank, y_stride, DType(dtype)}, nullptr);
}

namespace {

template <typename Args>
void read_branches(Args& args, const int64_t* addresses, const int64_t* numbers) {
  for (int j = 0; j < args.count; ++j) {
    const int64_t *at = addresses + 3 * j, *of = numbers + 3 * j;
    args.branches[j] = {reinterpret_cast<const float*>(at[0]),
                        reinterpret_cast<const void*>(at[1]),
                        reinterpret_cast<const int64_t*>(at[2]),
                        static_cast<int>(of[0]),
                        static_cast<uint32_t>(of[1]),
                        static_cast<uint32_t>(of[2])};
  }
}

}  // namespace

extern "C" void lora_input_gradient(void* dx, int64_t rows, int64_t cols, int64_t dx_stride,
                                    int64_t row_offset, int64_t dtype, int64_t count,
                                    const int64_t* addresses, const int64_t* numbers) {
  cuda::LoraInputGradient args{
      dx, rows,        cols, dx_stride, static_cast<uint64_t>(row_offset), static_cast<int>(count),
      {}, DType(dtype)};
  read_branches(args, addresses, numbers);
  cuda::launch_lora_input_gradient(args, nullptr);
}

extern "C" void lora_weight_gradient(const void* x, float* out, float* partial, int64_t rows,
                                     int64_t cols, int64_t x_stride, int64_t rows_per_split,
                                     int64_t splits, int64_t row_offset, int64_t dtype,
                                     int64_t count, int64_t transposed, const int64_t* addresses,
                                     const int64_t* numbers) {
  cuda::LoraWeightGradient args{x,
                                out,
                                partial,
                                rows,
                                cols,
                                x_stride,
                                rows_per_split,
                                splits,
                                static_cast<uint64_t>(row_offset),
                                static_cast<int>(count),
                                transposed != 0,
                                {},
                                DType(dtype)};
  read_branches(args, addresses, numbers);
  cuda::launch_lora_weight_gradient(args, nullptr);
}
