// Questions to sixteen floats, for the two instruction sets that answer them with mask registers. Included inside their
// namespaces.
inline uint32_t lanes_at_least(const float* values, float limit) {
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(values), _mm512_set1_ps(limit), _CMP_GE_OQ);
}

inline uint32_t lanes_at_most(const float* values, float limit) {
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(values), _mm512_set1_ps(limit), _CMP_LE_OQ);
}

inline float least_of(const float* values, uint32_t lanes) {
  const __m512 none = _mm512_set1_ps(__builtin_inff());
  return _mm512_reduce_min_ps(_mm512_mask_loadu_ps(none, static_cast<__mmask16>(lanes), values));
}
