// The stand-in's memory, which begins with NaNs, and copies of it.
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <map>
#include <memory>
#include <vector>

#include "streams.h"

using namespace stand_in;

namespace {

const size_t kPage = 2 << 20;

std::map<char*, size_t> device_memory, pinned_memory;  // sizes by address
size_t allocated = 0;

bool contains(std::map<char*, size_t>& ranges, const void* address) {
  Guard guard(mutex);
  auto next = ranges.upper_bound(const_cast<char*>(static_cast<const char*>(address)));
  if (next == ranges.begin()) return false;
  --next;
  return address < next->first + next->second;
}

cudaError_t copy(void* target, const void* source, size_t size, void* handle) {
  Stream* stream = stream_of(handle);
  bool from_host = !is_on_device(source), to_host = !is_on_device(target);
  bool is_pageable = (from_host && !is_pinned(source)) || (to_host && !is_pinned(target));
  if (is_pageable && stream->capture) {
    stream->capture->is_invalid = true;
    return fail(cudaErrorStreamCaptureUnsupported, "cudaMemcpyAsync", "of pageable memory in a recording");
  }
  if (is_pageable && from_host) {  // CUDA has read it when the call returns
    auto start = static_cast<const char*>(source);
    auto kept = std::make_shared<std::vector<char>>(start, start + size);
    enqueue(handle, "memcpy", [=] { memcpy(target, kept->data(), size); });
    return cudaSuccess;
  }
  enqueue(handle, "memcpy", [=] { memmove(target, source, size); });
  if (is_pageable) drain(stream);
  return cudaSuccess;
}

}  // namespace

namespace stand_in {

bool is_on_device(const void* address) { return contains(device_memory, address); }
bool is_pinned(const void* address) { return contains(pinned_memory, address); }

}  // namespace stand_in

// For machine.py: addresses and sizes of the device's memory; returns how many there are.
EXPORT int stand_in_memory(unsigned long long* starts, unsigned long long* sizes, int room) {
  Guard guard(mutex);
  int count = 0;
  for (auto& [start, size] : device_memory) {
    if (count < room) starts[count] = reinterpret_cast<unsigned long long>(start), sizes[count] = size;
    count++;
  }
  return count;
}

EXPORT cudaError_t cudaMalloc(void** address, size_t size) {
  UNLESS_RECORDING("cudaMalloc");
  Guard guard(mutex);
  if (allocated + size > 79ull << 30) return last_error = cudaErrorMemoryAllocation;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* found = mmap(nullptr, size + kPage, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (found == MAP_FAILED) return last_error = cudaErrorMemoryAllocation;
  char* start = reinterpret_cast<char*>((reinterpret_cast<size_t>(found) + kPage - 1) / kPage * kPage);
  if (!only_counts()) memset(start, 0xff, size);
  device_memory[start] = size;
  allocated += size;
  *address = start;
  return cudaSuccess;
}

EXPORT cudaError_t cudaFree(void* address) {
  if (!address) return cudaSuccess;
  UNLESS_RECORDING("cudaFree");
  drain_all();
  Guard guard(mutex);
  auto found = device_memory.find(static_cast<char*>(address));
  if (found == device_memory.end()) return fail(cudaErrorInvalidValue, "cudaFree", "of what was not allocated");
  allocated -= found->second;
  munmap(found->first, found->second);
  device_memory.erase(found);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = 80ull << 30;
  *free = (79ull << 30) - allocated;
  return cudaSuccess;
}

EXPORT cudaError_t cudaHostAlloc(void** address, size_t size, unsigned) {
  UNLESS_RECORDING("cudaHostAlloc");
  if (posix_memalign(address, 4096, size ? size : 1)) return last_error = cudaErrorMemoryAllocation;
  Guard guard(mutex);
  pinned_memory[static_cast<char*>(*address)] = size;
  return cudaSuccess;
}

EXPORT cudaError_t cudaFreeHost(void* address) {
  UNLESS_RECORDING("cudaFreeHost");
  drain_all();
  Guard guard(mutex);
  pinned_memory.erase(static_cast<char*>(address));
  free(address);
  return cudaSuccess;
}

EXPORT cudaError_t cudaHostRegister(void* address, size_t size, unsigned) {
  Guard guard(mutex);
  pinned_memory[static_cast<char*>(address)] = size;
  return cudaSuccess;
}

EXPORT cudaError_t cudaHostUnregister(void* address) {
  Guard guard(mutex);
  pinned_memory.erase(static_cast<char*>(address));
  return cudaSuccess;
}

EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* of, const void* address) {
  memset(of, 0, sizeof *of);
  of->devicePointer = of->hostPointer = const_cast<void*>(address);
  of->type = is_on_device(address) ? cudaMemoryTypeDevice
             : is_pinned(address)  ? cudaMemoryTypeHost
                                   : cudaMemoryTypeUnregistered;
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t size, cudaMemcpyKind, cudaStream_t stream) {
  return copy(target, source, size, stream);
}

EXPORT cudaError_t cudaMemcpyPeerAsync(void* target, int, const void* source, int, size_t size, cudaStream_t stream) {
  return copy(target, source, size, stream);
}

EXPORT cudaError_t cudaMemcpy(void* target, const void* source, size_t size, cudaMemcpyKind) {
  UNLESS_RECORDING("cudaMemcpy");
  drain(&default_stream);
  memmove(target, source, size);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpy2DAsync(void* target, size_t target_pitch, const void* source, size_t source_pitch,
                                     size_t width, size_t height, cudaMemcpyKind, cudaStream_t stream) {
  for (size_t row = 0; row < height; row++) {
    auto from = static_cast<const char*>(source) + row * source_pitch;
    auto error = copy(static_cast<char*>(target) + row * target_pitch, from, width, stream);
    if (error) return error;
  }
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemsetAsync(void* target, int value, size_t size, cudaStream_t stream) {
  enqueue(stream, "memset", [=] { memset(target, value, size); });
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemset(void* target, int value, size_t size) {
  UNLESS_RECORDING("cudaMemset");
  return cudaMemsetAsync(target, value, size, nullptr);
}

EXPORT cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  *address = const_cast<void*>(symbol);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }

#define MISSING(name, ...) \
  EXPORT cudaError_t name(__VA_ARGS__) { return fail(cudaErrorNotSupported, #name, "the stand-in has none"); }
MISSING(cudaMallocAsync, void**, size_t, cudaStream_t)
MISSING(cudaFreeAsync, void*, cudaStream_t)
MISSING(cudaDeviceGetDefaultMemPool, cudaMemPool_t*, int)
MISSING(cudaMemPoolGetAttribute, cudaMemPool_t, cudaMemPoolAttr, void*)
MISSING(cudaMemPoolSetAttribute, cudaMemPool_t, cudaMemPoolAttr, void*)
MISSING(cudaMemPoolSetAccess, cudaMemPool_t, const cudaMemAccessDesc*, size_t)
MISSING(cudaMemPoolTrimTo, cudaMemPool_t, size_t)
MISSING(cudaIpcCloseMemHandle, void*)
MISSING(cudaIpcGetEventHandle, cudaIpcEventHandle_t*, cudaEvent_t)
MISSING(cudaIpcGetMemHandle, cudaIpcMemHandle_t*, void*)
MISSING(cudaIpcOpenEventHandle, cudaEvent_t*, cudaIpcEventHandle_t)
MISSING(cudaIpcOpenMemHandle, void**, cudaIpcMemHandle_t, unsigned)
