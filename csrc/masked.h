// A rule in the same pass with a mask: what becomes of the weights that it prunes (kernels/masking.py).
#pragma once

#include "rules.h"

namespace {

// Only cast_adam looks at the mask.
template <class Rule>
FO_INLINE void apply(const Rule& rule, F& p, F g, F* s, Mask) {
  rule(p, g, s);
}
FO_INLINE void apply(const cast_adam& rule, F& p, F g, F* s, Mask keep) { rule(p, g, s, keep); }

// Its states are the rule's own, the mask, and the dense weights where these are kept. A driver decodes them,
// updates p, says which weights are kept from now on, and encodes what is `shown` of them.
template <class Rule>
struct masked {
  static constexpr int own_slots = Rule::slots, slots = own_slots + 2;
  Rule rule;
  F pruned_grad, pruned_decay, pruned_scale, kept;

  FO_INLINE void update(F& p, F g, F* s, Mask keep) const {
    F of_pruned = select(pruned_grad != F(0.0f), g, F(0.0f)) + pruned_decay * p;
    apply(rule, p, select(keep, g, of_pruned), s, keep);
  }
  FO_INLINE F shown(F p, Mask keep) const {
    return select(keep, p, select(pruned_scale != F(0.0f), pruned_scale * p, F(0.0f)));
  }
};

template <class Rule>
constexpr bool is_masked = false;
template <class Rule>
constexpr bool is_masked<masked<Rule>> = true;

// What weights of a group compete with: all NaNs are equal, and larger than every number.
FO_INLINE U rank_key(F x) { return select(x != x, U(0x7fc00000u), magnitude(x)); }

}  // namespace
