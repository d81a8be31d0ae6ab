// One value of an element in memory, and the names and counts that follow from the two catalogues.
#pragma once

#include "codecs.h"
#include "rules.h"
#include "table.h"

namespace {

constexpr int most_planes() {
  int most = 1;
#define FO_MORE(codec) most = codec::planes > most ? codec::planes : most;
  FO_CODECS(FO_MORE)
#undef FO_MORE
  return most;
}
constexpr int most_states() {
  int most = 0;
#define FO_MORE(rule) most = rule::slots > most ? rule::slots : most;
  FO_RULES(FO_MORE)
#undef FO_MORE
  return most;
}

// A codec, where its planes begin, and its look-up table if it has one.
struct Slot {
  int codec;
  char* planes[most_planes()];
  const char* lookup;
};

// Reads a slot's addresses from the table and moves `column` behind them.
FO_INLINE Slot take(int codec, const fo::Table& table, int64_t tensor, int& column) {
  Slot slot{codec, {}, nullptr};
  with_codec(codec, [&](auto c) FO_LAMBDA {
    for (int plane = 0; plane < c.planes; ++plane) slot.planes[plane] = table.plane(column++, tensor);
    if (c.lookup) slot.lookup = table.plane(column++, tensor);
  });
  return slot;
}

// In the order of their ids; lists of names end with a null.
#define FO_NAME(type) #type,
constexpr const char* rule_names[] = {FO_RULES(FO_NAME) nullptr};
constexpr const char* codec_names[] = {FO_CODECS(FO_NAME) nullptr};
#undef FO_NAME

#define FO_STATES(rule) rule::slots,
constexpr int state_counts[] = {FO_RULES(FO_STATES)};
#undef FO_STATES

inline fo::Error check_ids(int rule, const int32_t* codecs) {
  if (rule < 0 || rule >= RULE_COUNT) return fo::UNKNOWN_RULE;
  for (int i = 0; i < 2 + state_counts[rule]; ++i) {
    int end = i == 0 ? ELEMENTWISE_COUNT : i == 1 ? PLAIN_COUNT : CODEC_COUNT;
    if (codecs[i] < 0 || codecs[i] >= end) return fo::UNKNOWN_CODEC;
  }
  return fo::OK;
}

}  // namespace
