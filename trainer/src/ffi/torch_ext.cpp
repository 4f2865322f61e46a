// What tch lacks, each function over at::Tensor pointers as tch holds them. No exception leaves this file: a
// function returns nullptr, or a message that the caller frees with ditharos_free.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/autograd.h>

#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <exception>
#include <vector>

namespace {

template <typename Body>
char* guarded(Body body) {
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    return strdup(error.what());
  } catch (...) {
    return strdup("unknown C++ exception");
  }
}

std::vector<at::Tensor> list(at::Tensor* const* tensors, size_t count) {
  std::vector<at::Tensor> result;
  result.reserve(count);
  for (size_t i = 0; i < count; i++) {
    result.push_back(tensors[i] ? *tensors[i] : at::Tensor());
  }
  return result;
}

}  // namespace

extern "C" {

void ditharos_free(char* message) { free(message); }

// Gradients of outputs (weighted by grad_outputs; undefined ones mean 1) with respect to inputs. grads receives a new
// tensor, or nullptr where an input does not take part.
char* ditharos_grad(at::Tensor* const* outputs, at::Tensor* const* grad_outputs, size_t n_outputs,
                    at::Tensor* const* inputs, size_t n_inputs, at::Tensor** grads) {
  return guarded([&] {
    auto result = torch::autograd::grad(list(outputs, n_outputs), list(inputs, n_inputs), list(grad_outputs, n_outputs),
                                        /*retain_graph=*/false, /*create_graph=*/false, /*allow_unused=*/true);
    for (size_t i = 0; i < n_inputs; i++) {
      grads[i] = result[i].defined() ? new at::Tensor(std::move(result[i])) : nullptr;
    }
  });
}

char* ditharos_fused_adamw(at::Tensor* const* params, at::Tensor* const* grads, at::Tensor* const* exp_avgs,
                           at::Tensor* const* exp_avg_sqs, size_t count, at::Tensor* step, double lr, double beta1,
                           double beta2, double eps, double weight_decay) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_fused_adamw_(list(params, count), list(grads, count), list(exp_avgs, count), list(exp_avg_sqs, count),
                      /*max_exp_avg_sqs=*/{}, std::vector<at::Tensor>(count, *step), lr, beta1, beta2, weight_decay,
                      eps, /*amsgrad=*/false, /*maximize=*/false);
  });
}

char* ditharos_foreach_lerp(at::Tensor* const* self, at::Tensor* const* end, size_t count, double weight) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_foreach_lerp_(list(self, count), list(end, count), weight);
  });
}

// A new float32 vector in host memory, page-locked where asked for, with every page touched.
char* ditharos_snapshot_memory(int64_t numel, bool is_pinned, at::Tensor** memory) {
  return guarded([&] {
    auto options = at::TensorOptions().dtype(at::kFloat).pinned_memory(is_pinned);
    *memory = new at::Tensor(at::empty({numel}, options).zero_());
  });
}

// Does not wait for a device when target is page-locked.
char* ditharos_copy(at::Tensor* target, const at::Tensor* source) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    target->copy_(*source, /*non_blocking=*/true);
  });
}

// New memory, with undefined values, for all tensors of this one's storage, which has none.
char* ditharos_allocate_storage(at::Tensor* tensor) {
  return guarded([&] {
    auto* storage = tensor->storage().unsafeGetStorageImpl();
    TORCH_CHECK(storage->nbytes() == 0 && storage->allocator() && tensor->storage_offset() == 0,
                "the storage has memory, or none can be allocated for it");
    storage->set_data_ptr_noswap(storage->allocator()->allocate(tensor->nbytes()));
    storage->set_nbytes(tensor->nbytes());
  });
}

// Takes the memory of all tensors of this one's storage away.
char* ditharos_free_storage(at::Tensor* tensor) {
  return guarded([&] {
    auto* storage = tensor->storage().unsafeGetStorageImpl();
    storage->set_data_ptr_noswap(at::DataPtr(nullptr, storage->device()));
    storage->set_nbytes(0);
  });
}

// Deterministic kernels or an error where there is none; no benchmark-chosen convolutions; TF32 only where asked for.
char* ditharos_set_deterministic(bool tf32) {
  return guarded([&] {
    auto& context = at::globalContext();
    context.setDeterministicAlgorithms(true, /*warn_only=*/false);
    context.setDeterministicFillUninitializedMemory(false);
    context.setBenchmarkCuDNN(false);
    context.setDeterministicCuDNN(true);
    context.setAllowTF32CuBLAS(tf32);
    context.setAllowTF32CuDNN(tf32);
  });
}

// The name of the CPU kernels that libtorch chose; the caller frees it with ditharos_free.
char* ditharos_cpu_capability() { return strdup(at::get_cpu_capability().c_str()); }

// The linker drops libtorch_cuda because nothing names its symbols; where a driver is present it is mapped here.
// Returns nullptr when mapped, else why not.
char* ditharos_load_cuda() {
  if (!dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL)) {
    return strdup("no CUDA driver (libcuda.so.1) on this machine");
  }
  if (!dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL)) {
    return strdup(dlerror());
  }
  return nullptr;
}

// The cudaStream_t that this thread's work on a GPU goes to. Through the generic interface, which needs no headers of CUDA.
char* ditharos_current_stream(int device, void** stream) {
  return guarded([&] {
    c10::Device cuda(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device));
    *stream = c10::impl::VirtualGuardImpl(cuda.type()).getStream(cuda).native_handle();
  });
}
}
