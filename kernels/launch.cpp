// CUDA ops without Python: the second time an op is called with arguments of some layout, its launcher in Python is
// watched (launch.py); from then on, what it did is done again from here, with the tensors at hand.
//
//   plan        memory to allocate (what the op returns, and what its kernels need meanwhile), kernels to launch
//   key         all that a plan may depend on: of each tensor its shape, strides, dtype, device and alignment, and
//               whether it is an earlier argument again; every other argument as it is
//   parameter   a number, of the plan or an argument; or the address of an argument or allocation; or TMA's view of one
//
// Knows torch and CUDA's driver; of Triton the order of a compiled kernel's parameters: those of its signature (a
// tensor descriptor as its map, its shape, its strides), then two addresses of scratch memory, unused here.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/SmallVector.h>
#include <cuda.h>
#include <dlfcn.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace {

using at::Tensor;
using torch::jit::Stack;
using Key = std::vector<int64_t>;

constexpr size_t kMaxEntries = 4096;  // of one op; more, of a program whose shapes never repeat, are forgotten together
constexpr int64_t kAlignment = 16;    // what Triton specialises kernels for
constexpr int64_t kMaxRank = 5;       // of TMA

// The driver's functions that are needed; torch itself has loaded the driver.
template <typename Function>
Function* driver_function(const char* name) {
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY);
  void* function = driver == nullptr ? nullptr : dlsym(driver, name);
  TORCH_CHECK(function != nullptr, "the CUDA driver has no ", name);
  return reinterpret_cast<Function*>(function);
}

void check(CUresult result, const char* what) {
  TORCH_CHECK(result == CUDA_SUCCESS, what, " failed with CUDA error ", static_cast<int>(result));
}

// TMA's view of a tensor, outermost dimension last, as the driver wants it.
struct TensorMap {
  CUtensorMapDataType type;
  CUtensorMapSwizzle swizzle;
  cuuint32_t rank;
  cuuint64_t shape[kMaxRank];
  cuuint64_t strides[kMaxRank];  // in bytes, from the second dimension on
  cuuint32_t block[kMaxRank];
};

CUtensorMap encode(const TensorMap& map, char* address) {
  static const auto encode_tiled = driver_function<decltype(cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  static constexpr cuuint32_t kElementStrides[kMaxRank] = {1, 1, 1, 1, 1};
  CUtensorMap encoded;
  check(encode_tiled(&encoded, map.type, map.rank, address, map.shape, map.strides, map.block, kElementStrides,
                     CU_TENSOR_MAP_INTERLEAVE_NONE, map.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
        "cuTensorMapEncodeTiled");
  return encoded;
}

enum class Kind : int64_t { kNumber, kAddress, kTensorMap, kArgument };

struct Parameter {
  Kind kind;
  int64_t number;  // kNumber: its bits
  int64_t slot;    // the argument with this index (kArgument: a number), or allocation slot - number of arguments
  int64_t offset;  // in bytes, from the tensor's first element
  TensorMap map;
};

struct Launch {
  CUfunction function;
  unsigned int grid[3];
  unsigned int threads;
  unsigned int shared_bytes;
  bool programmatic;  // may begin before the launch before it has ended
  std::vector<Parameter> parameters;
};

struct Allocation {
  std::vector<int64_t> sizes, strides;
  at::TensorOptions options;
  bool zeroed;
};

struct Plan {
  std::vector<Allocation> allocations;
  std::vector<int64_t> outputs;  // indices of allocations
  std::vector<Launch> launches;
};

void launch(const Launch& launch, at::ArrayRef<char*> addresses, CUstream stream) {
  static const auto launch_kernel = driver_function<decltype(cuLaunchKernelEx)>("cuLaunchKernelEx");
  const size_t count = launch.parameters.size();
  c10::SmallVector<void*, 64> pointers(count + 2);
  c10::SmallVector<char*, 64> values(count + 2, nullptr);  // the last two: no scratch memory
  c10::SmallVector<CUtensorMap, 10> maps;
  maps.reserve(count);  // so that they stay where they are
  for (size_t i = 0; i < count; ++i) {
    const Parameter& parameter = launch.parameters[i];
    if (parameter.kind == Kind::kNumber) {
      pointers[i] = const_cast<int64_t*>(&parameter.number);
      continue;
    }
    values[i] = addresses[parameter.slot] + parameter.offset;  // kArgument: the number itself
    pointers[i] = &values[i];
    if (parameter.kind == Kind::kTensorMap) {
      maps.push_back(encode(parameter.map, values[i]));
      pointers[i] = &maps.back();
    }
  }
  pointers[count] = &values[count];
  pointers[count + 1] = &values[count + 1];

  CUlaunchAttribute attribute{};
  attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  attribute.value.programmaticStreamSerializationAllowed = 1;
  CUlaunchConfig config{};
  config.gridDimX = launch.grid[0], config.gridDimY = launch.grid[1], config.gridDimZ = launch.grid[2];
  config.blockDimX = launch.threads, config.blockDimY = 1, config.blockDimZ = 1;
  config.sharedMemBytes = launch.shared_bytes;
  config.hStream = stream;
  config.attrs = &attribute;
  config.numAttrs = launch.programmatic ? 1 : 0;
  check(launch_kernel(&config, launch.function, pointers.data(), nullptr), "cuLaunchKernelEx");
}

// Takes the op's arguments off the stack and puts its results there.
void replay(const Plan& plan, size_t num_arguments, Stack& stack) {
  const c10::IValue* arguments = &stack[stack.size() - num_arguments];
  c10::SmallVector<char*, 32> addresses(num_arguments, nullptr);
  c10::Device device = c10::kCPU;
  for (size_t i = 0; i < num_arguments; ++i) {
    if (arguments[i].isInt()) addresses[i] = reinterpret_cast<char*>(arguments[i].toInt());
    if (!arguments[i].isTensor()) continue;
    const Tensor& x = arguments[i].toTensor();
    addresses[i] = static_cast<char*>(x.data_ptr());
    device = x.device();
  }
  const c10::DeviceGuard guard(device);
  c10::SmallVector<Tensor, 12> allocated;
  for (const Allocation& wanted : plan.allocations) {
    allocated.push_back(at::empty_strided(wanted.sizes, wanted.strides, wanted.options.device(device)));
    if (wanted.zeroed) allocated.back().zero_();
    addresses.push_back(static_cast<char*>(allocated.back().data_ptr()));
  }
  const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  for (const Launch& one : plan.launches) launch(one, addresses, static_cast<CUstream>(stream.native_handle()));
  torch::jit::drop(stack, num_arguments);
  for (const int64_t i : plan.outputs) stack.emplace_back(std::move(allocated[i]));
}

// What the launcher that was watched last on this thread did; none if that cannot be done again.
thread_local std::unique_ptr<Plan> recorded;

// Reads the numbers that launch.py's Recording.launch wrote, in the same order.
std::vector<Launch> read_launches(at::IntArrayRef numbers) {
  const int64_t* next = numbers.begin();
  std::vector<Launch> launches(*next++);
  for (Launch& launch : launches) {
    launch.function = reinterpret_cast<CUfunction>(*next++);
    for (unsigned int& size : launch.grid) size = *next++;
    launch.threads = *next++;
    launch.shared_bytes = *next++;
    launch.programmatic = *next++ != 0;
    launch.parameters.resize(*next++);
    for (Parameter& parameter : launch.parameters) {
      parameter = Parameter{};
      parameter.kind = static_cast<Kind>(*next++);
      if (parameter.kind == Kind::kNumber) {
        parameter.number = *next++;
        continue;
      }
      parameter.slot = *next++;
      if (parameter.kind == Kind::kArgument) continue;
      parameter.offset = *next++;
      if (parameter.kind == Kind::kAddress) continue;
      TensorMap& map = parameter.map;
      map.type = static_cast<CUtensorMapDataType>(*next++);
      map.swizzle = static_cast<CUtensorMapSwizzle>(*next++);
      const int64_t element_bytes = *next++;
      map.rank = *next++;
      for (int64_t i = map.rank - 1; i >= 0; --i) map.block[i] = *next++;
      for (int64_t i = map.rank - 1; i >= 0; --i) map.shape[i] = *next++;
      for (int64_t i = map.rank - 1; i >= 0; --i) {
        const int64_t stride = *next++;
        if (i > 0) map.strides[i - 1] = element_bytes * stride;
      }
    }
  }
  TORCH_CHECK(next == numbers.end(), "launches: ", numbers.size(), " numbers are not a list of launches");
  return launches;
}

// kernels::record_plan. `allocations` says how each looked.
void record_plan(at::TensorList allocations, at::IntArrayRef zeroed, at::IntArrayRef outputs,
                 at::IntArrayRef launches) {
  auto plan = std::make_unique<Plan>();
  for (const Tensor& x : allocations) {
    plan->allocations.push_back({x.sizes().vec(), x.strides().vec(), x.options(), false});
  }
  for (const int64_t i : zeroed) plan->allocations[i].zeroed = true;
  plan->outputs = outputs.vec();
  plan->launches = read_launches(launches);
  recorded = std::move(plan);
}

void append(Key& key, at::ArrayRef<c10::IValue> arguments, size_t index) {
  const c10::IValue& argument = arguments[index];
  if (argument.isTensor()) {
    const Tensor& x = argument.toTensor();
    key.push_back(x.dim());
    key.insert(key.end(), x.sizes().begin(), x.sizes().end());
    key.insert(key.end(), x.strides().begin(), x.strides().end());
    key.push_back(static_cast<int64_t>(x.scalar_type()) << 32 | x.get_device() << 8 |
                  static_cast<int64_t>(reinterpret_cast<uintptr_t>(x.data_ptr()) % kAlignment));
    size_t first = 0;
    while (!arguments[first].isTensor() || !arguments[first].toTensor().is_same(x)) ++first;
    key.push_back(first);
  } else if (argument.isNone()) {
    key.push_back(-1);
  } else if (argument.isDouble()) {
    int64_t bits;
    const double value = argument.toDouble();
    std::memcpy(&bits, &value, sizeof bits);
    key.push_back(bits);
  } else if (argument.isBool()) {
    key.push_back(argument.toBool());
  } else {
    key.push_back(argument.toInt());
  }
}

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 14695981039346656037u;  // FNV-1a
    for (const int64_t part : key) hash = (hash ^ static_cast<uint64_t>(part)) * 1099511628211u;
    return hash;
  }
};

// An op's kernel for CUDA. `in_python` takes the op's arguments, and whether it is to be watched.
class Replayed : public c10::OperatorKernel {
 public:
  Replayed(c10::OperatorHandle in_python, at::IntArrayRef free) : in_python_(std::move(in_python)), free_(free.vec()) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
    const size_t num_arguments = op.schema().arguments().size();
    Key key;
    key.reserve(64);
    const at::ArrayRef<c10::IValue> arguments(stack->data() + stack->size() - num_arguments, num_arguments);
    for (size_t i = 0; i < num_arguments; ++i) {
      const bool is_free = std::find(free_.begin(), free_.end(), static_cast<int64_t>(i)) != free_.end();
      if (is_free)
        key.push_back(arguments[i].toInt() >> 31);  // 0 if it is an int32 to Triton
      else
        append(key, arguments, i);
    }
    Entry entry;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (const auto found = entries_.find(key); found != entries_.end()) entry = found->second;
    }
    if (entry.plan != nullptr) return replay(*entry.plan, num_arguments, *stack);
    // A kernel is compiled at its first launch; what happens once need not be kept.
    const bool watch = entry.calls++ == 1;
    recorded = nullptr;
    stack->emplace_back(watch);
    in_python_.callBoxed(stack);
    if (watch) entry.plan = std::move(recorded);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (entries_.size() >= kMaxEntries) entries_.clear();
    entries_.insert_or_assign(std::move(key), std::move(entry));
  }

 private:
  struct Entry {
    int64_t calls = 0;
    std::shared_ptr<const Plan> plan;  // none if Python has to do it
  };
  c10::OperatorHandle in_python_;
  std::vector<int64_t> free_;  // indices of arguments whose value is no part of a key
  std::mutex mutex_;
  std::unordered_map<Key, Entry, Hash> entries_;
};

// kernels::replay: the op gets its CUDA kernel from here; what it does at first is in the op `in_python`. The numbers
// `free` among its arguments go to kernels as they are.
void replay_op(const std::string& name, const std::string& in_python, at::IntArrayRef free) {
  static std::vector<torch::Library> kept;  // a Library unregisters its kernels when it is destroyed
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(("kernels::" + in_python).c_str(), "");
  auto kernel = std::make_unique<Replayed>(handle, free);
  kept.emplace_back(torch::Library::IMPL, "kernels", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  kept.back().impl(name.c_str(), torch::CppFunction::makeFromBoxedFunctor(std::move(kernel)));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(kernels, library) {
  library.def("record_plan(Tensor[] allocations, int[] zeroed, int[] outputs, int[] launches) -> ()", &record_plan);
  library.def("replay(str name, str in_python, int[] free) -> ()", &replay_op);
}
