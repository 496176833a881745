// Transposes blocks of 16 x 16 floats, or of anything else of four bytes.
#pragma once

#include "simd.h"

namespace fasttune::cpu::FASTTUNE_ISA {

// out[j, i] = in[i, j] of 16 x 16 floats.
inline void transpose_16(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
#if defined(__AVX512F__)
  __m512 r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(in + i * in_stride);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int half = 0; half < 2; ++half) {
      const __m512d low = _mm512_castps_pd(t[i + half]), high = _mm512_castps_pd(t[i + 2 + half]);
      r[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      r[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // r[4 g + k] holds, in its 128-bit part p, column 4 p + k of rows 4 g ... 4 g + 3.
  for (int k = 0; k < 4; ++k) {
    const __m512 even_low = _mm512_shuffle_f32x4(r[k], r[4 + k], 0x88);
    const __m512 odd_low = _mm512_shuffle_f32x4(r[k], r[4 + k], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(r[8 + k], r[12 + k], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(r[8 + k], r[12 + k], 0xdd);
    _mm512_storeu_ps(out + k * out_stride, _mm512_shuffle_f32x4(even_low, even_high, 0x88));
    _mm512_storeu_ps(out + (4 + k) * out_stride, _mm512_shuffle_f32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_ps(out + (8 + k) * out_stride, _mm512_shuffle_f32x4(even_low, even_high, 0xdd));
    _mm512_storeu_ps(out + (12 + k) * out_stride, _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd));
  }
#else
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) out[j * out_stride + i] = in[i * in_stride + j];
#endif
}

}  // namespace fasttune::cpu::FASTTUNE_ISA
