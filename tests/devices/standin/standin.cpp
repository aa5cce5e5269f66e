// A second device inside PyTorch, for tests: `standin:0` and `standin:1`.
//
// Its memory is the host's and its kernels are the CPU's, so values are real. All else is as on an
// accelerator: tensors of two devices do not mix, each device has a random generator of its own, new
// memory holds garbage, and reading a value waits for the device. Kernels, copies and waits are
// counted. It can refuse float64 and single operators, as MPS does.
//
// It is synchronous: races between streams, and errors that come late, do not show.

#include <ATen/EmptyTensor.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include "kernels.h"

namespace {

// ---- what a backend writes itself: memory, views and copies

const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);
using Dtype = std::optional<at::ScalarType>;
using MaybeDevice = std::optional<Device>;

at::ScalarType checked(Dtype dtype) {
  check_dtype(c10::dtype_or_default(dtype));
  return c10::dtype_or_default(dtype);
}

Tensor empty(at::IntArrayRef size, Dtype dtype, std::optional<at::Layout>, MaybeDevice device, std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  c10::OptionalDeviceGuard on(device);
  return at::detail::empty_generic(size, &memory, kKeys, checked(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, Dtype dtype, std::optional<at::Layout>,
                     MaybeDevice device, std::optional<bool>) {
  c10::OptionalDeviceGuard on(device);
  return at::detail::empty_strided_generic(size, stride, &memory, kKeys, checked(dtype));
}

Tensor copied(const Tensor& from, const Tensor& to, bool non_blocking) {
  if (is_here(from) && is_here(to)) n_kernels++;
  else if (is_here(to)) n_to_device++;
  else n_from_device++;
  if (!is_here(to) && !non_blocking) n_waits++;
  on_host(to).copy_(on_host(from));
  return to;
}

// CUDA's product of half-precision matrices with float32 sums, which the CPU does not have.
Tensor wide_product(const Tensor& a, const Tensor& b, at::ScalarType dtype) {
  check_devices("aten::mm.dtype", {a, b});
  count("aten::mm");
  const Tensor product = at::mm(on_host(a).to(dtype), on_host(b).to(dtype));
  Tensor result = at::empty_strided(product.sizes(), product.strides(), a.options().dtype(dtype));
  on_host(result).copy_(product);
  return result;
}

Tensor copied_and_resized(const Tensor& from, const Tensor& to) {
  if (from.sizes() != to.sizes()) at::native::resize_(to, from.sizes());
  return copied(from, to, false);
}

at::Scalar value(const Tensor& t) {
  n_waits++;
  n_from_device++;
  return at::_local_scalar_dense(on_host(t));
}

Tensor as_strided(const Tensor& t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           offset ? std::optional(offset->expect_int()) : std::nullopt);
}

Tensor reshape_alias(const Tensor& t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor view(const Tensor& t, c10::SymIntArrayRef size) { return at::native::view(t, C10_AS_INTARRAYREF_SLOW(size)); }

const Tensor& resize(const Tensor& t, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard on(t.device());
  return at::native::resize_(t, C10_AS_INTARRAYREF_SLOW(size), format);
}

Tensor& set_storage(Tensor& t, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(t, std::move(storage), offset.expect_int(), C10_AS_INTARRAYREF_SLOW(size),
                                      C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_whole_storage(Tensor& t, at::Storage storage) { return at::native::set_(t, std::move(storage)); }

Tensor& set_tensor(Tensor& t, const Tensor& source) { return at::native::set_tensor_(t, source); }

// ---- what Python asks

c10::Dict<std::string, int64_t> counts() {
  c10::Dict<std::string, int64_t> all;
  all.insert("kernels", n_kernels);
  all.insert("waits", n_waits);
  all.insert("to_device", n_to_device);
  all.insert("from_device", n_from_device);
  return all;
}

c10::Dict<std::string, int64_t> kernels() {
  std::lock_guard<std::mutex> lock(guarded);
  return kernels_by_name.copy();
}

void reset_counts() {
  n_kernels = n_waits = n_to_device = n_from_device = 0;
  std::lock_guard<std::mutex> lock(guarded);
  kernels_by_name = c10::Dict<std::string, int64_t>();
}

int64_t bytes_of(int64_t device, bool most) {
  std::lock_guard<std::mutex> lock(guarded);
  return held_bytes.at(device)[most];
}

void refuse(std::vector<std::string> operators, bool float64) {
  std::lock_guard<std::mutex> lock(guarded);
  refused = {operators.begin(), operators.end()};
  has_float64 = !float64;
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copied);
  m.impl("mm.dtype", &wide_product);
  m.impl("_copy_from_and_resize", &copied_and_resized);
  m.impl("_local_scalar_dense", &value);
  m.impl("as_strided", &as_strided);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("view", &view);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
}

TORCH_LIBRARY(standin, m) {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("current_device", [] { return int64_t(current); });
  m.def("set_device", [](int64_t d) { Guard().setDevice({kStandin, DeviceIndex(d)}); });
  m.def("synchronize", [] { n_waits++; });
  m.def("rng_state", [](int64_t d) { return generator_of(d).get_state(); });
  m.def("set_rng_state", [](Tensor state, int64_t d) { generator_of(d).set_state(state); });
  m.def("manual_seed", [](int64_t seed, int64_t d) { generator_of(d).set_current_seed(seed); });
  m.def("counts", &counts);
  m.def("kernels", &kernels);
  m.def("reset_counts", &reset_counts);
  m.def("bytes_of", &bytes_of);
  m.def("reset_peak", [](int64_t d) { std::lock_guard<std::mutex> lock(guarded); held_bytes.at(d)[1] = held_bytes.at(d)[0]; });
  m.def("refuse", &refuse);
}
