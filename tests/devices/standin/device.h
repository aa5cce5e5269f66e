// The memory, devices, streams and generators of the stand-in, and what it counts.

#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;

constexpr auto kStandin = c10::DeviceType::PrivateUse1;
constexpr DeviceIndex kDevices = 2;
constexpr char kGarbage = 0x7f;  // large in every floating type, and no valid index

thread_local DeviceIndex current = 0;

// What is counted. `kernels` are by operator as well.
std::atomic<int64_t> n_kernels{0}, n_waits{0}, n_to_device{0}, n_from_device{0};
std::mutex guarded;  // of the three below
c10::Dict<std::string, int64_t> kernels_by_name;
std::set<std::string> refused;
std::array<std::array<int64_t, 2>, kDevices> held_bytes{};  // now, and at most
std::atomic<bool> has_float64{true};

bool is_here(const Tensor& t) { return t.defined() && t.device().type() == kStandin; }

void count(const std::string& name) {
  n_kernels++;
  std::lock_guard<std::mutex> lock(guarded);
  kernels_by_name.insert_or_assign(name, kernels_by_name.contains(name) ? kernels_by_name.at(name) + 1 : 1);
}

// ---- memory

struct Block {
  DeviceIndex device;
  int64_t size;
};
constexpr size_t kHeader = 64;

void count_bytes(DeviceIndex device, int64_t size) {
  std::lock_guard<std::mutex> lock(guarded);
  auto& [now, most] = held_bytes[device];
  now += size;
  most = std::max(most, now);
}

void release(void* data) {
  auto* block = reinterpret_cast<Block*>(static_cast<char*>(data) - kHeader);
  count_bytes(block->device, -block->size);
  std::free(block);
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    if (n == 0) return {nullptr, nullptr, &release_nothing, {kStandin, current}};
    const size_t whole = kHeader + (n + 63) / 64 * 64;
    auto* block = static_cast<Block*>(std::aligned_alloc(64, whole));
    TORCH_CHECK(block != nullptr, "the stand-in is out of memory: ", n, " bytes");
    *block = {current, static_cast<int64_t>(n)};
    char* data = reinterpret_cast<char*>(block) + kHeader;
    std::memset(data, kGarbage, n);
    count_bytes(current, n);
    return {data, data, &release, {kStandin, current}};
  }
  static void release_nothing(void*) {}
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t n) const override { std::memcpy(to, from, n); }
};
Memory memory;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &memory);

// The same memory as a CPU tensor.
Tensor on_host(const Tensor& t) {
  if (!is_here(t)) return t;
  auto storage = t.storage();
  auto* data = static_cast<char*>(storage.mutable_data());
  if (data != nullptr) data += t.storage_offset() * t.element_size();
  auto options = t.options().device(c10::kCPU);
  return at::from_blob(data, t.sizes(), t.strides(), [storage](void*) {}, options);
}

// ---- devices, streams and generators

struct Guard final : c10::impl::DeviceGuardImplInterface {
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return kStandin; }
  Device getDevice() const override { return {kStandin, current}; }
  void uncheckedSetDevice(Device d) const noexcept override {
    if (d.index() >= 0) current = d.index();
  }
  void setDevice(Device d) const override {
    TORCH_CHECK(d.index() < kDevices, "invalid device ordinal: there are ", int(kDevices));
    uncheckedSetDevice(d);
  }
  Device exchangeDevice(Device d) const override {
    const Device before = getDevice();
    setDevice(d);
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  c10::Stream getStream(Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream getDefaultStream(Device d) const override { return getStream(d); }
  c10::Stream getStreamFromGlobalPool(Device d, bool) const override { return getStream(d); }
  c10::Stream getNewStream(Device d, int) const override { return getStream(d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return getStream(s.device()); }
  void record(void** event, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {
    *event = const_cast<Guard*>(this);  // any address: events are over at once
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { n_waits++; }
  void synchronizeEvent(void*) const override { n_waits++; }
  void synchronizeDevice(const DeviceIndex) const override { n_waits++; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// A generator of the device, which draws by a CPU generator of its own.
struct Generator final : c10::GeneratorImpl {
  at::Generator drawn_by = at::detail::createCPUGenerator();
  explicit Generator(DeviceIndex i)
      : GeneratorImpl({kStandin, i}, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}
  void set_current_seed(uint64_t seed) override { drawn_by.set_current_seed(seed); }
  uint64_t current_seed() const override { return drawn_by.current_seed(); }
  uint64_t seed() override { return drawn_by.seed(); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  void set_state(const c10::TensorImpl& state) override { drawn_by.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return drawn_by.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override {
    auto* other = new Generator(device_.index());
    other->drawn_by = drawn_by.clone();
    return other;
  }
};

at::Generator& generator_of(DeviceIndex i) {
  static std::array<at::Generator, kDevices> all{at::make_generator<Generator>(0), at::make_generator<Generator>(1)};
  return all.at(i < 0 ? current : i);
}

at::Generator host_generator(const at::Generator& g) {
  return static_cast<Generator*>(g.unsafeGetGeneratorImpl())->drawn_by;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  void setCurrentDevice(DeviceIndex d) const override { current = d; }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex exchangeDevice(DeviceIndex d) const override { return std::exchange(current, d); }
  DeviceIndex maybeExchangeDevice(DeviceIndex d) const override { return std::exchange(current, d < 0 ? current : d); }
  const at::Generator& getDefaultGenerator(DeviceIndex i) const override { return generator_of(i); }
  at::Generator getNewGenerator(DeviceIndex i) const override {
    return at::make_generator<Generator>(i < 0 ? current : i);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
  Device getDeviceFromPtr(void*) const override { return {kStandin, current}; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    c10::DeviceGuard on(storage.device());
    auto grown = memory.allocate(size);
    std::memcpy(grown.get(), storage.data(), std::min(size, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(grown));
    storage.unsafeGetStorageImpl()->set_nbytes(size);
  }
};

}  // namespace
