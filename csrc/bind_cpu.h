// The parts of the extension module fasttune._cpu that have files of their own.
#pragma once

#include <pybind11/pybind11.h>

namespace fasttune::cpu {

void bind_bottleneck(pybind11::module_& m);
void bind_lora_runs(pybind11::module_& m);

}  // namespace fasttune::cpu
