// Every operator: refused where an accelerator would refuse it, else run by the CPU on the same memory.

#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/resize_native.h>

#include "device.h"

namespace {

using c10::IValue;
using torch::jit::Stack;

// ---- what an accelerator refuses

void check_dtype(c10::ScalarType dtype) {
  TORCH_CHECK_TYPE(has_float64 || dtype != at::kDouble,
                   "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
                   "Please use float32 instead.");
}

bool named(const std::string& name, std::initializer_list<const char*> parts) {
  return std::any_of(parts.begin(), parts.end(), [&](const char* p) { return name.find(p) != std::string::npos; });
}

// Tensors of one device alone, but for numbers on the CPU and CPU indices of a device tensor.
void check_devices(const std::string& name, at::ArrayRef<IValue> arguments) {
  const bool takes_numbers = !named(name, {"mm", "mv", "dot", "cat", "stack"});
  const bool indexes = named(name, {"::index", "index_put"});
  std::vector<Device> found;
  auto see = [&](const Tensor& t, bool is_index) {
    if (!t.defined()) return;
    if (t.device().is_cpu() && (is_index || (takes_numbers && t.dim() == 0))) return;
    if (std::find(found.begin(), found.end(), t.device()) == found.end()) found.push_back(t.device());
  };
  for (const IValue& a : arguments) {
    if (a.isTensor()) see(a.toTensor(), false);
    else if (a.isList())
      for (const IValue& v : a.toListRef())
        if (v.isTensor()) see(v.toTensor(), indexes);
    if (a.isGenerator())
      TORCH_CHECK(a.toGenerator().device().type() == kStandin, "Expected a 'standin' device type for generator but found '",
                  a.toGenerator().device().type(), "'");
  }
  TORCH_CHECK(found.size() < 2, "Expected all tensors to be on the same device, but found at least two devices, ",
              found.empty() ? "" : found[0].str(), " and ", found.size() < 2 ? "" : found[1].str(),
              "! (in ", name, ")");
}

// Operators whose result's shape depends on values: they wait. So does an index on the CPU, which is
// copied; a mask is a `nonzero` first.
bool waits(const std::string& name, at::ArrayRef<IValue> arguments) {
  if (named(name, {"::nonzero", "::equal", "::bincount", "::masked_select", "::repeat_interleave.Tensor", "unique"}))
    return true;
  if (!named(name, {"::index", "index_put"})) return false;
  for (const IValue& a : arguments)
    if (a.isList())
      for (const IValue& v : a.toListRef())
        if (v.isTensor() && v.toTensor().defined() && v.toTensor().device().is_cpu()) return true;
  return false;
}

// ---- kernels: the CPU's, on the same memory

struct Call {
  const c10::FunctionSchema& schema;
  std::vector<IValue> given;
  Device device{kStandin, current};

  bool is_written(size_t i) const {
    const auto* alias = schema.arguments()[i].alias_info();
    return alias != nullptr && alias->isWrite();
  }

  // Where results go: the device of the first tensor, or the one that is asked for.
  void find_device() {
    for (bool tensors : {true, false})
      for (const IValue& v : given) {
        if (tensors && v.isTensor() && is_here(v.toTensor())) return void(device = v.toTensor().device());
        if (tensors && v.isList())
          for (const IValue& t : v.toListRef())
            if (t.isTensor() && is_here(t.toTensor())) return void(device = t.toTensor().device());
        if (!tensors && v.isDevice() && v.toDevice().has_index()) return void(device = v.toDevice());
      }
  }

  IValue argument(size_t i) const {
    const IValue& v = given[i];
    if (v.isTensor()) {
      const Tensor& t = v.toTensor();
      // `out=`, which the operator gives its size.
      if (is_here(t) && t.numel() == 0 && is_written(i) && schema.arguments()[i].kwarg_only()) return at::empty({0}, t.options().device(c10::kCPU));
      return t.defined() ? IValue(on_host(t)) : v;
    }
    if (v.isTensorList()) {
      auto tensors = v.toTensorVector();
      for (Tensor& t : tensors) t = on_host(t);
      return c10::List<Tensor>(tensors);
    }
    if (v.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> tensors;
      for (const auto& t : v.toOptionalTensorVector()) tensors.push_back(t ? std::optional(on_host(*t)) : t);
      return tensors;
    }
    if (v.isDevice()) return Device(c10::kCPU);
    if (v.isGenerator()) return host_generator(v.toGenerator());
    const bool draws = v.isNone() && schema.arguments()[i].type()->str().find("Generator") != std::string::npos;
    return draws ? IValue(host_generator(generator_of(device.index()))) : v;
  }

  Tensor fresh(const Tensor& t) const {
    if (!t.defined() || is_here(t)) return t;
    check_dtype(t.scalar_type());
    const Tensor dense = t.is_non_overlapping_and_dense() ? t : t.contiguous();
    Tensor result = at::empty_strided(dense.sizes(), dense.strides(), dense.options().device(device));
    on_host(result).copy_(dense);
    return result;
  }

  // The argument that a result is, or is a view of; -1 for a result with memory of its own.
  int64_t source(size_t r) const {
    const auto* alias = schema.returns()[r].alias_info();
    for (size_t i = 0; alias != nullptr && i < given.size(); i++) {
      const auto* other = schema.arguments()[i].alias_info();
      if (other != nullptr && other->beforeSets() == alias->beforeSets()) return i;
    }
    return -1;
  }

  IValue result(size_t r, const IValue& v) const {
    if (v.isTensorList()) {
      auto tensors = v.toTensorVector();
      for (Tensor& t : tensors) t = fresh(t);
      return c10::List<Tensor>(tensors);
    }
    if (!v.isTensor()) return v;
    const int64_t i = source(r);
    if (i < 0 || !given[i].isTensor()) return fresh(v.toTensor());
    const Tensor &old = given[i].toTensor(), &got = v.toTensor();
    if (!is_written(i)) {
      const auto bytes = static_cast<char*>(got.data_ptr()) - static_cast<char*>(old.storage().mutable_data());
      return at::native::as_strided_tensorimpl(old, got.sizes(), got.strides(), bytes / got.element_size());
    }
    if (old.sizes() != got.sizes()) {
      c10::DeviceGuard on(old.device());
      at::native::resize_(old, got.sizes());
      on_host(old).copy_(got);
    }
    return old;
  }
};

void run_on_host(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const std::string name = c10::toString(op.operator_name());
  const auto arguments = torch::jit::last(*stack, schema.arguments().size());
  check_devices(name, arguments);
  {
    std::lock_guard<std::mutex> lock(guarded);
    TORCH_CHECK_NOT_IMPLEMENTED(!refused.count(op.operator_name().name), "The operator '", name,
                                "' is not currently implemented for the MPS device.");
  }
  count(op.operator_name().name);
  if (waits(name, arguments)) n_waits++;
  Call call{schema, arguments.vec()};
  call.find_device();
  for (size_t i = 0, first = stack->size() - call.given.size(); i < call.given.size(); i++)
    (*stack)[first + i] = call.argument(i);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (size_t r = 0, n = schema.returns().size(), first = stack->size() - n; r < n; r++)
    (*stack)[first + r] = call.result(r, (*stack)[first + r]);
}

}  // namespace
