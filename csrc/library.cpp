// Registers the operators under the CPU dispatch key; kvb/ops.py defines their schemas.
#include <Python.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(kvb, CPU, m) {
  m.impl("count", TORCH_BOX(&kvb::count));
}

// Importing kvb._C runs the registration above; the module itself is empty.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&definition);
}
