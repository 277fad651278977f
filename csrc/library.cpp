// Registers the operators under the CPU dispatch key; kvb/ops defines their schemas.
#include <Python.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_FRAGMENT(kvb, m) {
  m.def("cpu_capability() -> str");
  m.def("cpu_packed_nbytes(int K, int D, bool float64) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(kvb, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&kvb::cpu_capability));
  m.impl("cpu_packed_nbytes", TORCH_BOX(&kvb::cpu_packed_nbytes));
}

STABLE_TORCH_LIBRARY_IMPL(kvb, CPU, m) {
  m.impl("pack_keys", TORCH_BOX(&kvb::pack_keys));
  m.impl("packed_matches", TORCH_BOX(&kvb::packed_matches));
  m.impl("nearest", TORCH_BOX(&kvb::nearest));
  m.impl("lookup", TORCH_BOX(&kvb::lookup_positions));
  m.impl("gather", TORCH_BOX(&kvb::gather));
  m.impl("gather_backward", TORCH_BOX(&kvb::gather_backward));
  m.impl("gather_backward_rows", TORCH_BOX(&kvb::gather_backward_rows));
  m.impl("sgd_step_", TORCH_BOX(&kvb::sgd_step_));
  m.impl("rows_to_places", TORCH_BOX(&kvb::rows_to_places));
  m.impl("places_to_rows", TORCH_BOX(&kvb::places_to_rows));
  m.impl("clip_rows_", TORCH_BOX(&kvb::clip_rows_));
  m.impl("move_rows_", TORCH_BOX(&kvb::move_rows_));
  m.impl("tally_", TORCH_BOX(&kvb::tally_));
  m.impl("update_keys_", TORCH_BOX(&kvb::update_keys_));
  m.impl("product_nearest", TORCH_BOX(&kvb::product_nearest));
  m.impl("gather_weighted", TORCH_BOX(&kvb::gather_weighted));
  m.impl("gather_dot", TORCH_BOX(&kvb::gather_dot));
  m.impl("scatter_weighted_rows", TORCH_BOX(&kvb::scatter_weighted_rows));
  m.impl("accumulate", TORCH_BOX(&kvb::accumulate));
  m.impl("count", TORCH_BOX(&kvb::count));
}

// Importing kvb._C runs the registrations above; the module itself is empty.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&definition);
}
