#include <pybind11/pybind11.h>

#include "attention.h"

PYBIND11_MODULE(_launcher, m) { m.attr("params_size") = sizeof(fastattn::AttentionParams); }
