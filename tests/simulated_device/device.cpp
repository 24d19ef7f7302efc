// A device named "simulated" that computes on the CPU and behaves as an accelerator: its tensors have memory of their
// own, do not mix with the CPU's, and with SIMULATED_WITHOUT_DOUBLE in the environment have no float64, as MPS.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <set>
#include <string>

namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::SymIntArrayRef;

constexpr auto DEVICE = c10::DeviceType::PrivateUse1;
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);
const bool without_double = getenv("SIMULATED_WITHOUT_DOUBLE") != nullptr;

// ── one device, its memory and its random numbers ──────────────────────────────────────────────────────────────────

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return DEVICE; }
  c10::Device exchangeDevice(c10::Device) const override { return {DEVICE, 0}; }
  c10::Device getDevice() const override { return {DEVICE, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream getDefaultStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return s; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Memory final : public at::Allocator {
  at::DataPtr allocate(size_t n) override {
    void* p = n ? malloc(n) : nullptr;
    return {p, p, &free, at::Device(DEVICE, 0)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, std::size_t n) const override { memcpy(to, from, n); }
};
Memory memory;
REGISTER_ALLOCATOR(DEVICE, &memory);

struct Generator final : public at::CPUGeneratorImpl {
  Generator() : at::CPUGeneratorImpl(0) {
    device_ = c10::Device(DEVICE, 0);
    key_set_ = KEYS;
  }
};

struct Hooks final : public at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static at::Generator generator = at::make_generator<Generator>();
    return generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }
  at::Device getDeviceFromPtr(void*) const override { return {DEVICE, 0}; }
  bool isPinnedPtr(const void*) const override { return false; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t n) const override {
    at::DataPtr larger = memory.allocate(n);
    memcpy(larger.get(), storage.data(), std::min(n, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(larger));
    storage.unsafeGetStorageImpl()->set_nbytes(n);
  }
};
Hooks hooks;
[[maybe_unused]] const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

// ── operations ─────────────────────────────────────────────────────────────────────────────────────────────────────

void require_type(at::ScalarType type) {
  TORCH_CHECK_TYPE(!without_double || (type != at::kDouble && type != at::kComplexDouble), "the device has no float64");
}

Tensor on_cpu(const Tensor& t) {  // the same memory
  auto where = c10::Device(c10::kCPU);
  at::DataPtr data(const_cast<void*>(t.storage().data()), where);
  c10::Storage storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(), std::move(data), nullptr, false);
  auto cpu = c10::DispatchKeySet(c10::DispatchKey::CPU);
  auto same = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), cpu, t.dtype());
  same.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return same;
}

Tensor empty(SymIntArrayRef size, std::optional<at::ScalarType> type, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  require_type(c10::dtype_or_default(type));
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, KEYS, c10::dtype_or_default(type), format);
}

Tensor empty_strided(SymIntArrayRef size, SymIntArrayRef stride, std::optional<at::ScalarType> type,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  require_type(c10::dtype_or_default(type));
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
                                           KEYS, c10::dtype_or_default(type));
}

Tensor as_strided(const Tensor& t, SymIntArrayRef size, SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  auto first = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::cpu::as_strided(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), first);
}

Tensor view(const Tensor& t, SymIntArrayRef size) { return at::native::view(t, C10_AS_INTARRAYREF_SLOW(size)); }

Tensor reshape_alias(const Tensor& t, SymIntArrayRef size, SymIntArrayRef stride) {
  return at::native::_reshape_alias(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor unfold(const Tensor& t, int64_t axis, int64_t size, int64_t step) {
  return at::native::unfold(t, axis, size, step);
}

const Tensor& resize(const Tensor& t, SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(t, C10_AS_INTARRAYREF_SLOW(size), format);
}

Tensor& set_part(Tensor& t, at::Storage storage, c10::SymInt offset, SymIntArrayRef size, SymIntArrayRef stride) {
  t.unsafeGetTensorImpl()->set_storage_keep_dtype(storage);
  t.unsafeGetTensorImpl()->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                                 offset.expect_int());
  return t;
}

Tensor& set_storage(Tensor& t, at::Storage storage) {
  const int64_t size = storage.nbytes() / t.dtype().itemsize(), stride = 1;
  t.unsafeGetTensorImpl()->set_storage_keep_dtype(storage);
  t.unsafeGetTensorImpl()->set_sizes_and_strides(IntArrayRef(size), IntArrayRef(stride), 0);
  return t;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  if (to.is_privateuseone()) require_type(to.scalar_type());
  auto target = to.is_privateuseone() ? on_cpu(to) : to;
  target.copy_(from.is_privateuseone() ? on_cpu(from) : from);
  return to;
}

Tensor copy_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar item(const Tensor& t) { return on_cpu(t).item(); }

Tensor moved(const Tensor& t) {
  if (!t.defined()) return t;
  auto result = at::empty(t.sizes(), t.options().device(c10::Device(DEVICE, 0)), t.suggest_memory_format());
  on_cpu(result).copy_(t);
  return result;
}

void require_here(const Tensor& t) {
  TORCH_CHECK(!t.defined() || t.is_privateuseone(), "input and weight of a convolution are on different devices");
}

Tensor convolve(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, IntArrayRef stride,
                IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef more, int64_t groups) {
  std::optional<Tensor> shift;
  if (bias && bias->defined()) {
    require_here(*bias);
    shift = on_cpu(*bias);
  }
  require_here(x);
  require_here(weight);
  return moved(at::convolution(on_cpu(x), on_cpu(weight), shift, stride, padding, dilation, transposed, more, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolve_back(const Tensor& signal, const Tensor& x, const Tensor& weight,
                                                 IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                                 bool transposed, IntArrayRef more, int64_t groups,
                                                 std::array<bool, 3> wanted) {
  for (const auto& t : {signal, x, weight}) require_here(t);
  const int64_t outputs = transposed ? weight.size(1) * groups : weight.size(0);
  auto [a, b, c] = at::convolution_backward(on_cpu(signal), on_cpu(x), on_cpu(weight), IntArrayRef(outputs), stride,
                                            padding, dilation, transposed, more, groups, wanted);
  return {moved(a), moved(b), moved(c)};
}

const std::set<std::string> MIXING = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::copy_"};

void fall_back(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  bool mixed = false;
  auto look = [&](const Tensor& t) { mixed = mixed || (t.defined() && t.device().is_cpu() && t.dim() > 0); };
  for (const auto& value : torch::jit::last(*stack, schema.arguments().size())) {
    if (value.isTensor()) look(value.toTensor());
    else if (value.isList())
      for (const c10::IValue& each : value.toList())
        if (each.isTensor()) look(each.toTensor());
  }
  TORCH_CHECK(!mixed || MIXING.count(schema.name()), "Expected all tensors to be on the same device in ", schema.name());
  at::native::cpu_fallback(op, stack);
  for (const auto& value : torch::jit::last(*stack, schema.returns().size()))
    if (value.isTensor() && value.toTensor().defined() && value.toTensor().is_privateuseone())
      require_type(value.toTensor().scalar_type());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", unfold);
  m.impl("resize_", resize);
  m.impl("set_.source_Storage_storage_offset", set_part);
  m.impl("set_.source_Storage", set_storage);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_and_resize);
  m.impl("_local_scalar_dense", item);
  m.impl("convolution_overrideable", convolve);
  m.impl("convolution_backward_overrideable", convolve_back);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fall_back>()); }
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

}  // namespace
