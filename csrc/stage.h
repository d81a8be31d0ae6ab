// Elements that are no full vector in memory: the end of a tensor, and strided tensors.
#pragma once

#include "slot.h"

namespace {

// Reads a slot's addresses from the table and moves `column` behind them.
inline Slot take(int codec, const fo::Table& table, int64_t tensor, int& column) {
  Slot slot{codec, {}, nullptr};
  with_codec(codec, [&](auto c) FO_LAMBDA {
    for (int plane = 0; plane < c.planes; ++plane) slot.planes[plane] = table.plane(column++, tensor);
    if (c.lookup) slot.lookup = table.plane(column++, tensor);
  });
  return slot;
}

// Offsets of consecutive elements of a strided parameter and its gradient.
class Odometer {
 public:
  Odometer(fo::Layout layout, int64_t element) : layout_(layout), dims_(layout.dims()) {
    for (int dim = dims_ - 1; dim >= 0; --dim) {
      coordinates_[dim] = element % layout.size(dim);
      element /= layout.size(dim);
      param_ += coordinates_[dim] * layout.param_strides()[dim];
      grad_ += coordinates_[dim] * layout.grad_strides()[dim];
    }
  }

  int64_t param() const { return param_; }
  int64_t grad() const { return grad_; }

  void advance() {
    for (int dim = dims_ - 1; dim >= 0; --dim) {
      param_ += layout_.param_strides()[dim];
      grad_ += layout_.grad_strides()[dim];
      if (++coordinates_[dim] < layout_.size(dim)) return;
      coordinates_[dim] = 0;
      param_ -= layout_.size(dim) * layout_.param_strides()[dim];
      grad_ -= layout_.size(dim) * layout_.grad_strides()[dim];
    }
  }

 private:
  fo::Layout layout_;
  int dims_;
  int64_t coordinates_[fo::MAX_DIMS];
  int64_t param_ = 0, grad_ = 0;
};

FO_INLINE void copy_entry(char* to, const char* from, int bytes) {
  if (bytes == 4) {
    memcpy(to, from, 4);
  } else {
    memcpy(to, from, 2);
  }
}

// A copy of up to LANES neighbouring elements of a slot; lanes without an element hold zeros.
class Stage {
 public:
  Slot fetch(const Slot& home, int64_t first, int count) {
    Slot lanes = home;
    each_plane(home, first, count, [&](int plane, int64_t offset, int bytes) {
      lanes.planes[plane] = lanes_[plane];
      memcpy(lanes_[plane], home.planes[plane] + offset, bytes);
    });
    return lanes;
  }

  void put_back(const Slot& home, int64_t first, int count) const {
    each_plane(home, first, count, [&](int plane, int64_t offset, int bytes) {
      memcpy(home.planes[plane] + offset, lanes_[plane], bytes);
    });
  }

 private:
  template <class Visit>
  static void each_plane(const Slot& home, int64_t first, int count, Visit visit) {
    with_codec(home.codec, [&](auto codec) {
      for (int plane = 0; plane < (codec.block == 1 ? codec.planes : 1); ++plane) {
        int bits = codec.bits(plane);
        visit(plane, first * bits / 8, (count * bits + 7) / 8);
      }
    });
  }

  alignas(64) char lanes_[most_planes()][LANES * 4] = {};
};

}  // namespace
