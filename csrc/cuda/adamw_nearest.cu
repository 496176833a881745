#include "cuda/adamw_step.cuh"

template void fasttune::cuda::launch_adamw_with<fasttune::Rounding::kNearest>(const AdamWStep& args,
                                                                              Stream stream);
