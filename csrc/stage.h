// Elements that are no full vector in memory: the end of a tensor, and strided tensors.
#pragma once

#include "slot.h"

namespace {

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

  // Writes the offsets of the next `count` elements.
  void take(int count, int64_t* param, int64_t* grad) {
    for (int lane = 0; lane < count; ++lane) {
      param[lane] = param_;
      grad[lane] = grad_;
      advance();
    }
  }

 private:
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

  fo::Layout layout_;
  int dims_;
  int64_t coordinates_[fo::MAX_DIMS];
  int64_t param_ = 0, grad_ = 0;
};

// Which elements of a slot are meant: `count` from `first` on, or, if given, those at `offsets`.
struct Elements {
  int count;
  int64_t first;
  const int64_t* offsets = nullptr;
};

template <class T>
void gather(char* lanes, const char* plane, const Elements& which) {
  for (int lane = 0; lane < which.count; ++lane) {
    memcpy(lanes + lane * sizeof(T), plane + which.offsets[lane] * static_cast<int64_t>(sizeof(T)),
           sizeof(T));
  }
}
template <class T>
void scatter(char* plane, const char* lanes, const Elements& which) {
  for (int lane = 0; lane < which.count; ++lane) {
    memcpy(plane + which.offsets[lane] * static_cast<int64_t>(sizeof(T)), lanes + lane * sizeof(T),
           sizeof(T));
  }
}

// A copy of up to LANES elements of a slot, side by side; lanes without an element hold zeros.
class Stage {
 public:
  Slot fetch(const Slot& home, const Elements& which) {
    Slot lanes{home.codec, {}};
    each_plane(home, [&](int plane, int bytes) {
      lanes.planes[plane] = lanes_[plane];
      if (!which.offsets) {
        memcpy(lanes_[plane], home.planes[plane] + which.first * bytes, which.count * bytes);
      } else if (bytes == 4) {
        gather<uint32_t>(lanes_[plane], home.planes[plane], which);
      } else {
        gather<uint16_t>(lanes_[plane], home.planes[plane], which);
      }
    });
    return lanes;
  }

  void put_back(const Slot& home, const Elements& which) const {
    each_plane(home, [&](int plane, int bytes) {
      if (!which.offsets) {
        memcpy(home.planes[plane] + which.first * bytes, lanes_[plane], which.count * bytes);
      } else if (bytes == 4) {
        scatter<uint32_t>(home.planes[plane], lanes_[plane], which);
      } else {
        scatter<uint16_t>(home.planes[plane], lanes_[plane], which);
      }
    });
  }

 private:
  template <class Visit>
  static void each_plane(const Slot& home, Visit visit) {
    with_codec(home.codec, [&](auto codec) {
      for (int plane = 0; plane < codec.planes; ++plane) visit(plane, codec.bytes(plane));
    });
  }

  alignas(64) char lanes_[most_planes()][LANES * 4] = {};
};

}  // namespace
