// What an optimizer does to p, g and its states s. A rule is one struct and one word in FO_RULES' lists.
//
// The members are the row's scalars in the catalogue's order (kernels/rules.py); `slots` counts the states.
// Every operation rounds once, in the order written.
#pragma once

#include "pack.h"

namespace {

struct adam {
  static constexpr int slots = 2;
  F l2, w1, b2, w2, c2, eps, step_size, decay;

  FO_INLINE void operator()(F& p, F g, F* s) const {
    F &m = s[0], &v = s[1];
    moments(p, g, m, v);
    finish(p, m, v);
  }
  FO_INLINE void moments(F p, F g, F& m, F& v) const {
    g = g + l2 * p;
    m = m + w1 * (g - m);
    v = b2 * v + (w2 * g) * g;
  }
  FO_INLINE void finish(F& p, F m, F v) const {
    F d = root(v) * c2 + normal(eps);
    p = p - (step_size * ratio(m, d) + decay * p);
  }
};

struct adam_amsgrad : adam {
  static constexpr int slots = 3;

  FO_INLINE void operator()(F& p, F g, F* s) const {
    F &m = s[0], &v = s[1], &vmax = s[2];
    moments(p, g, m, v);
    vmax = maximum(vmax, v);
    finish(p, m, vmax);
  }
};

struct lion {
  static constexpr int slots = 1;
  F b1, w1, b2, w2, lr, decay;

  FO_INLINE void operator()(F& p, F g, F* s) const {
    F& m = s[0];
    F u = sign(b1 * m + w1 * g);
    m = b2 * m + w2 * g;
    p = p - (lr * u + decay * p);
  }
};

struct sgd {
  static constexpr int slots = 0;
  F l2, lr, decay;

  FO_INLINE void operator()(F& p, F g, F*) const {
    g = g + l2 * p;
    p = p - (lr * g + decay * p);
  }
};

struct sgd_momentum {
  static constexpr int slots = 1;
  F l2, mu, w, ng, nb, lr;

  FO_INLINE void operator()(F& p, F g, F* s) const {
    F& b = s[0];
    g = g + l2 * p;
    b = mu * b + w * g;
    F u = ng * g + nb * b;
    p = p - lr * u;
  }
};

// It looks at the mask, and so exists in its masked form only.
struct cast_adam {
  static constexpr int slots = 2;
  F w1, b2, w2, c1, c2, eps, step_size, kept_part, l1;

  FO_INLINE void operator()(F& p, F g, F* s, Mask keep) const {
    F &m = s[0], &v = s[1];
    m = m + w1 * (g - m);
    F mixed = select(keep, m, kept_part * m + l1 * sign(p));
    F x = c1 * mixed;
    v = b2 * v + (w2 * x) * x;
    p = p - step_size * ratio(mixed, root(v) * c2 + normal(eps));
  }
};

}  // namespace

#define FO_DENSE_RULES(RULE) RULE(adam) RULE(adam_amsgrad) RULE(lion) RULE(sgd) RULE(sgd_momentum)
#define FO_RULES(RULE) FO_DENSE_RULES(RULE) RULE(cast_adam)

namespace {

#define FO_ID(rule) id_##rule,
enum RuleId { FO_RULES(FO_ID) RULE_COUNT };
#undef FO_ID

template <class Rule>
constexpr int scalar_count = sizeof(Rule) / sizeof(F);

// A rule whose members are a row's scalars.
template <class Rule>
FO_INLINE Rule with_scalars(const float* k) {
  F members[scalar_count<Rule>];
  for (int i = 0; i < scalar_count<Rule>; ++i) members[i] = F(k[i]);
  Rule rule;
  memcpy(&rule, members, sizeof rule);
  return rule;
}

}  // namespace
