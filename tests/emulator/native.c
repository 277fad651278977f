// What NumPy cannot do, or not fast enough: fused multiply-add, the products of tensor cores, and who touched what.
#include <math.h>
#include <stdint.h>
#include <string.h>

// --- fused multiply-add; `on` may be NULL -----------------------------------------------------------------------------

void fma_float(const float *a, const float *b, const float *c, float *out, const uint8_t *on, long n) {
  for (long i = 0; i < n; i++)
    if (!on || on[i]) out[i] = fmaf(a[i], b[i], c[i]);
}

void fma_double(const double *a, const double *b, const double *c, double *out, const uint8_t *on, long n) {
  for (long i = 0; i < n; i++)
    if (!on || on[i]) out[i] = fma(a[i], b[i], c[i]);
}

// --- tensor cores ---------------------------------------------------------------------------------------------------
// Products are summed `group` at a time, together with the sum so far: all are aligned to the largest exponent, cut off
// `fraction` bits below it, added exactly, and the sum is rounded towards zero to float32.

#define ZERO -10000

static double power(int exponent) {  // 2^exponent of a normal double
  uint64_t bits = (uint64_t)(exponent + 1023) << 52;
  double value;
  memcpy(&value, &bits, 8);
  return value;
}

static int exponent_of(float x, int least) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (!(bits << 1)) return ZERO;
  int e = (int)(bits >> 23 & 255) - 127;
  return e < least ? least : e;
}

static float towards_zero(double x) {
  float y = (float)x;
  return fabs((double)y) > fabs(x) ? nextafterf(y, 0.0f) : y;
}

static float sum_group(const float *a, const float *b, const int16_t *ea, const int16_t *eb, int n, float sum,
                       int fraction) {
  int most = exponent_of(sum, -126);
  double plain = sum;
  for (int k = 0; k < n; k++) {
    int e = ea[k] + eb[k];
    most = e > most ? e : most;
    plain += (double)a[k] * b[k];
  }
  if (!isfinite(plain)) return (float)plain;
  if (most < -1000) return 0.0f;
  double scale = power(fraction - most), total = trunc(sum * scale);
  for (int k = 0; k < n; k++) total += trunc((double)a[k] * b[k] * scale);
  return towards_zero(total * power(most - fraction));
}

// out[i] = c[i] + a[i] b[i]^T for `batch` matrices a [M, K], b [N, K], c and out [M, N], of float16 or bfloat16 values.
void tensor_core(const float *a, const float *b, const float *c, float *out, long batch, long M, long N, long K, long group,
                 long fraction, long least) {
  int16_t ea[64 * 16], eb[256 * 16];
  for (long i = 0; i < batch; i++, a += M * K, b += N * K, c += M * N, out += M * N) {
    for (long k = 0; k < M * K; k++) ea[k] = exponent_of(a[k], least);
    for (long k = 0; k < N * K; k++) eb[k] = exponent_of(b[k], least);
    for (long m = 0; m < M; m++)
      for (long n = 0; n < N; n++) {
        float sum = c[m * N + n];
        for (long k = 0; k < K; k += group)
          sum = sum_group(a + m * K + k, b + n * K + k, ea + m * K + k, eb + n * K + k, group, sum, fraction);
        out[m * N + n] = sum;
      }
  }
}

// --- shared memory --------------------------------------------------------------------------------------------------

typedef struct {
  int32_t clock;             // the barrier of the program after which `readers` and `writers` did what they did
  uint32_t readers, writers; // warps
  int32_t warp_clock;        // the same for lanes of one warp, between barriers of that warp
  uint32_t lane_readers, lane_writers;
  int32_t copies;            // asynchronous copies that still write here
  int16_t products;          // asynchronous products that still read here
  uint8_t written, unfenced; // ever; and by the generic proxy since the last proxy fence
} Granule;

enum { READ_AFTER_WRITE = 1, WRITE_AFTER_READ = 2, WRITE_AFTER_WRITE = 4, IN_WARP = 8, COPY = 32, PRODUCT = 64, UNWRITTEN = 128 };

enum { CHECK = 1, TOUCH = 2 };

static long wrong_with(const Granule *g, int32_t clock, int32_t warp_clock, int warp, int lane, long writes, int changes) {
  uint32_t others = ~(1u << warp), other_lanes = ~(1u << lane);
  int now = g->clock == clock, warp_now = g->warp_clock == warp_clock;
  long wrong = g->copies ? COPY : 0;
  if (writes) {
    if (g->products) wrong |= PRODUCT;
    if (now && g->readers & others) wrong |= WRITE_AFTER_READ;
    if (now && changes && g->writers & others) wrong |= WRITE_AFTER_WRITE;
    if (warp_now && g->lane_readers & other_lanes) wrong |= IN_WARP | WRITE_AFTER_READ;
    if (warp_now && changes && g->lane_writers & other_lanes) wrong |= IN_WARP | WRITE_AFTER_WRITE;
  } else {
    if (!g->written) wrong |= UNWRITTEN;
    if (now && g->writers & others) wrong |= READ_AFTER_WRITE;
    if (warp_now && g->lane_writers & other_lanes) wrong |= IN_WARP | READ_AFTER_WRITE;
  }
  return wrong;
}

static void touch(Granule *g, int32_t clock, int32_t warp_clock, int warp, int lane, long writes) {
  if (g->clock != clock) {
    g->clock = clock;
    g->readers = g->writers = 0;
  }
  if (g->warp_clock != warp_clock) {
    g->warp_clock = warp_clock;
    g->lane_readers = g->lane_writers = 0;
  }
  if (writes) {
    g->writers |= 1u << warp;
    g->lane_writers |= 1u << lane;
    g->written = g->unfenced = 1;
  } else {
    g->readers |= 1u << warp;
    g->lane_readers |= 1u << lane;
  }
}

// `count` accesses by the lanes `index`, of `width` granules of which the first is place[i]: what is wrong with them, as
// bits, and then they are remembered. `changes` says, for writes, which of them change what is there.
long shared_access(Granule *all, const int32_t *clock, const int32_t *warp_clock, const uint8_t *warp, const uint8_t *lane,
                   const int64_t *index, const int64_t *place, const uint8_t *changes, long count, long width, long writes,
                   long steps) {
  long found = 0;
  for (long i = 0; steps & CHECK && i < count; i++)
    for (long j = 0, l = index[i]; j < width; j++)
      found |= wrong_with(all + place[i] + j, clock[l], warp_clock[l], warp[l], lane[l], writes, changes && changes[i]);
  for (long i = 0; steps & TOUCH && i < count; i++)
    for (long j = 0, l = index[i]; j < width; j++)
      touch(all + place[i] + j, clock[l], warp_clock[l], warp[l], lane[l], writes);
  return found;
}

// From addresses to places in the bytes of all programs and their granules; the first access of `size` bytes that is
// misaligned or outside of `limit` bytes, or -1.
long shared_place(const uint32_t *address, const int64_t *index, const int64_t *first, long count, long base, long limit,
                  long size, long granule, int64_t *element, int64_t *place) {
  for (long i = 0; i < count; i++) {
    long offset = (long)address[i] - base;
    if (offset < 0 || offset + size > limit || offset % size) return i;
    element[i] = (offset + first[index[i]]) / size;
    place[i] = (offset + first[index[i]]) / granule;
  }
  return -1;
}
