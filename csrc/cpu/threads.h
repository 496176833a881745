// Which thread of a parallel region runs; 0 in builds without OpenMP.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fasttune::cpu {

inline int64_t thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace fasttune::cpu
