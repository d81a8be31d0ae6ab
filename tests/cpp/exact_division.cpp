// Counts the codecs' quotients and roots that differ from IEEE ones, over every normalised value there is.
#include <cstdio>

#include "pack.h"

namespace {

int differences(F a, F b) {
  float x[LANES], y[LANES];
  store(x, a), store(y, b);
  int count = 0;
  for (int lane = 0; lane < LANES; ++lane) count += memcmp(x + lane, y + lane, sizeof(float)) != 0;
  return count;
}

}  // namespace

int main() {
  long wrong_quotients = 0, wrong_roots = 0, wrong_values = 0;
  // From 2^-40, below which every code is that of zero, to what rounding makes of the largest value.
  for (uint32_t first = 0x2b800000u; first <= 0x3f810000u; first += LANES) {
    uint32_t bits[LANES];
    for (int lane = 0; lane < LANES; ++lane) bits[lane] = first + lane;
    F n = load<float>(bits), a = F(254.0f) * n, b = F(1.0f) + n;
    wrong_quotients += differences(small_quotient(a, b), a / b);
    wrong_roots += differences(small_root(n), sqrt(n));
  }
  for (int q = 0; q < 128; ++q) {
    F a(static_cast<float>(q)), b(static_cast<float>(254 - q)), minus(static_cast<float>(-q));
    wrong_values +=
        differences(small_quotient(a, b), a / b) + differences(small_quotient(minus, b), minus / b);
  }
  printf("%ld %ld %ld\n", wrong_quotients, wrong_roots, wrong_values);
}
