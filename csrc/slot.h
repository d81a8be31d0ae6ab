// One value of an element in memory, and the names and counts that follow from the two catalogues.
#pragma once

#include "codecs.h"
#include "masked.h"
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

// In the order of their ids; lists of names end with a null.
#define FO_NAME(type) #type,
constexpr const char* rule_names[] = {FO_RULES(FO_NAME) nullptr};
constexpr const char* codec_names[] = {FO_CODECS(FO_NAME) nullptr};
#undef FO_NAME

#define FO_STATES(rule) rule::slots,
constexpr int state_counts[] = {FO_RULES(FO_STATES)};
#undef FO_STATES

// Where the codec of a mask stands.
inline int mask_of(const fo::Work& work) { return 2 + state_counts[work.rule]; }
inline bool is_masked_work(const fo::Work& work) { return work.n_codecs > mask_of(work); }

inline fo::Error check(const fo::Work& work) {
  if (work.rule < 0 || work.rule >= RULE_COUNT) return fo::UNKNOWN_RULE;
  int mask = mask_of(work), fewest = mask + (work.rule == id_cast_adam);
  if (work.n_codecs < fewest || work.n_codecs > mask + 2) return fo::UNKNOWN_RULE;
  bool power_of_two = (work.group & (work.group - 1)) == 0;
  if (work.group < 0 || work.group == 1 || work.group > 16 || !power_of_two) return fo::UNKNOWN_GROUP;
  for (int i = 0; i < work.n_codecs; ++i) {
    int begin = i == mask ? id_mask : 0, end = i == mask ? CODEC_COUNT : id_mask;
    if (i == 0 || i > mask) end = ELEMENTWISE_COUNT;
    if (i == 1) end = PLAIN_COUNT;
    if (work.codecs[i] < begin || work.codecs[i] >= end) return fo::UNKNOWN_CODEC;
  }
  return fo::OK;
}

}  // namespace
