// What Python's tensors, lists and dictionaries are, asked without Python's bytecode.
//
// A step of 300 tensors asks for 300 gradients, 600 addresses, 300 shapes and 900 states; from Python every
// answer takes 0.05 to 0.1 us. Neither Python's nor torch's headers are needed: their functions come as
// addresses, torch's from the table of DLPack's exchange interface. The caller holds the interpreter's lock.
#include <cstdint>

#define FO_API extern "C" __attribute__((visibility("default")))

namespace {

// DLTensor of DLPack 1.
struct Description {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t *sizes, *strides;
  uint64_t byte_offset;
};

// Functions that return an object or int, and NULL or not 0 with Python's exception set.
struct Functions {
  void* (*list_item)(void* list, intptr_t index);
  int (*set_list_item)(void* list, intptr_t index, void* stolen);
  void* (*attribute)(void* object, void* name);
  void (*release)(void* object);
  int (*next_entry)(void* dict, intptr_t* position, void** key, void** value);
  int (*describe)(void* tensor, Description* out);
  void* grad_name;
  void* none;
};

}  // namespace

// Writes of n parameters address, kind, device, sizes and strides; their gradients go into the list
// `grads`, these gradients' addresses into `grad_addresses`. With a name in `inner` that attribute of
// parameters and gradients is meant instead of themselves. Returns how many words the parameters took, -1 if
// they are more than `capacity`, a gradient is None, or with Python's exception set.
FO_API int64_t fused_optim_cpu_read_tensors(const Functions* python, void* params, int64_t n, void* inner,
                                            int64_t* words, int64_t capacity, void* grads,
                                            int64_t* grad_addresses) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    Description of;
    void* param = python->list_item(params, i);
    void* grad = param ? python->attribute(param, python->grad_name) : nullptr;
    if (grad && grad != python->none && inner) {
      void* outer = grad;
      grad = python->attribute(outer, inner);
      python->release(outer);
    }
    if (!grad || python->set_list_item(grads, i, grad) || grad == python->none) return -1;
    if (python->describe(grad, &of)) return -1;
    grad_addresses[i] = reinterpret_cast<int64_t>(of.data);

    // Whose inner tensor the parameter keeps alive.
    if (inner && (param = python->attribute(param, inner))) python->release(param);
    if (!param || python->describe(param, &of) || count + 3 + 2 * of.ndim > capacity) return -1;
    words[count++] = reinterpret_cast<int64_t>(of.data);
    words[count++] = int64_t{of.ndim} << 32 | of.code << 24 | of.bits << 16 | of.lanes;
    words[count++] = int64_t{of.device_type} << 32 | static_cast<uint32_t>(of.device_id);
    for (int32_t dim = 0; dim < of.ndim; ++dim) {
      words[count++] = of.sizes[dim];
      words[count++] = of.strides[dim];
    }
  }
  return count;
}

// Whether two lists of n entries hold the same objects.
FO_API int fused_optim_cpu_same_objects(const Functions* python, void* one, void* other, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (python->list_item(one, i) != python->list_item(other, i)) return 0;
  }
  return 1;
}

// Whether n dictionaries have these entries in this order: `entries` has keys and values, and a null after
// those of each dictionary.
FO_API int fused_optim_cpu_same_entries(const Functions* python, void* dicts, int64_t n,
                                        void* const* entries) {
  for (int64_t i = 0; i < n; ++i) {
    void *dict = python->list_item(dicts, i), *key, *value;
    for (intptr_t position = 0; python->next_entry(dict, &position, &key, &value);) {
      if (*entries++ != key || *entries++ != value) return 0;
    }
    if (*entries++) return 0;
  }
  return 1;
}
