// A stand-in for what Triton and Inductor call of CUDA's driver: modules, and launches of their kernels.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <string.h>

#include <map>
#include <memory>
#include <vector>

#include "queues.h"

using namespace stand_in;

namespace {

struct Module {
  std::vector<char> file;
};

struct Function {
  Module* module;
  std::string name;
  std::map<int, std::pair<size_t, size_t>> parameters;  // offset and size of each
};

using Launched = void (*)(Function* function, const unsigned* grid, unsigned threads, unsigned shared_bytes,
                          const char* parameters, size_t size);
Launched launched = nullptr;

template <class T>
T at(const char* bytes, size_t offset) {
  T value;
  memcpy(&value, bytes + offset, sizeof value);
  return value;
}

// Fills in a function's parameters, which a section of the file lists: four bytes, then those of each entry.
void read_parameters(Function& function) {
  const unsigned char kHasSize = 4, kParameter = 0x17;
  const char* file = function.module->file.data();
  auto sections = file + at<unsigned long long>(file, 0x28);
  auto size = at<unsigned short>(file, 0x3A), count = at<unsigned short>(file, 0x3C);
  auto names = file + at<unsigned long long>(sections + size * at<unsigned short>(file, 0x3E), 0x18);
  for (int index = 0; index < count; index++) {
    auto section = sections + size * index;
    if (".nv.info." + function.name != names + at<unsigned>(section, 0)) continue;
    auto entry = file + at<unsigned long long>(section, 0x18), end = entry + at<unsigned long long>(section, 0x20);
    while (entry + 4 <= end) {
      bool has_size = entry[0] == kHasSize;
      if (has_size && entry[1] == kParameter)
        function.parameters[at<unsigned short>(entry, 8)] = {at<unsigned short>(entry, 10),
                                                             at<unsigned>(entry, 12) >> 18};
      entry += 4 + (has_size ? at<unsigned short>(entry, 2) : 0);
    }
  }
}

CUresult launch(CUfunction handle, std::vector<unsigned> grid, unsigned threads, unsigned shared_bytes, CUstream stream,
                void** arguments) {
  auto function = reinterpret_cast<Function*>(handle);
  auto packed = std::make_shared<std::vector<char>>();
  for (auto& [index, place] : function->parameters) {
    packed->resize(place.first + place.second);
    memcpy(packed->data() + place.first, arguments[index], place.second);
  }
  enqueue(stream, "triton " + function->name, [=] {
    if (launched && !only_counts())
      launched(function, grid.data(), threads, shared_bytes, packed->data(), packed->size());
  });
  return CUDA_SUCCESS;
}

}  // namespace

// ---- for machine.py

EXPORT void stand_in_set_launched(Launched function) { launched = function; }
EXPORT const char* stand_in_name(Function* function) { return function->name.c_str(); }

EXPORT const char* stand_in_file(Function* function, size_t* size) {
  *size = function->module->file.size();
  return function->module->file.data();
}

// ---- the device

EXPORT CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGet(CUdevice* device, int index) { return *device = index, CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetCurrent(CUcontext* context) { return *context = CUcontext(1), CUDA_SUCCESS; }
EXPORT CUresult cuDriverGetVersion(int* version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetLimit(size_t* value, CUlimit) { return *value = 1 << 20, CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) { return cuCtxGetCurrent(context); }

EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* is_active) {
  *flags = 0;
  *is_active = 1;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  return CUresult(cudaDeviceGetAttribute(value, cudaDeviceAttr(attribute), 0));
}

EXPORT CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = cudaGetErrorString(cudaError_t(error));
  return CUDA_SUCCESS;
}

EXPORT CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr address) {
  auto pointer = reinterpret_cast<void*>(address);
  bool is_known = is_on_device(pointer) || is_pinned(pointer);
  if (!is_known || attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_INVALID_VALUE;
  *static_cast<CUdeviceptr*>(value) = address;
  return CUDA_SUCCESS;
}

// ---- modules and functions

EXPORT CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  auto file = static_cast<const char*>(image);
  size_t sections =
      at<unsigned long long>(file, 0x28) + at<unsigned short>(file, 0x3A) * at<unsigned short>(file, 0x3C);
  size_t segments =
      at<unsigned long long>(file, 0x20) + at<unsigned short>(file, 0x36) * at<unsigned short>(file, 0x38);
  *module = reinterpret_cast<CUmodule>(new Module{{file, file + std::max(sections, segments)}});
  return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, CUjit_option*, void**) {
  return cuModuleLoadData(module, image);
}

EXPORT CUresult cuModuleLoad(CUmodule* module, const char* path) {
  FILE* file = fopen(path, "rb");
  if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
  auto loaded = new Module;
  char buffer[65536];
  while (size_t size = fread(buffer, 1, sizeof buffer, file))
    loaded->file.insert(loaded->file.end(), buffer, buffer + size);
  fclose(file);
  *module = reinterpret_cast<CUmodule>(loaded);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }

EXPORT CUresult cuModuleGetFunction(CUfunction* handle, CUmodule module, const char* name) {
  auto function = new Function{reinterpret_cast<Module*>(module), name, {}};
  read_parameters(*function);
  *handle = reinterpret_cast<CUfunction>(function);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
EXPORT CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

EXPORT CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction, const CUlaunchConfig*) {
  return *count = 1, CUDA_SUCCESS;
}

EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* count, CUfunction, int, size_t) {
  return *count = 2, CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads_x,
                               unsigned threads_y, unsigned threads_z, unsigned shared_bytes, CUstream stream,
                               void** arguments, void**) {
  return launch(function, {x, y, z}, threads_x * threads_y * threads_z, shared_bytes, stream, arguments);
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* of, CUfunction function, void** arguments, void**) {
  unsigned threads = of->blockDimX * of->blockDimY * of->blockDimZ;
  std::vector<unsigned> grid = {of->gridDimX, of->gridDimY, of->gridDimZ};
  return launch(function, grid, threads, of->sharedMemBytes, of->hStream, arguments);
}

EXPORT CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads_x,
                                          unsigned threads_y, unsigned threads_z, unsigned shared_bytes,
                                          CUstream stream, void** arguments) {
  return launch(function, {x, y, z}, threads_x * threads_y * threads_z, shared_bytes, stream, arguments);
}
