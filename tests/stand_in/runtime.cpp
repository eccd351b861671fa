// A stand-in for CUDA's runtime on the host's memory.
//
// Work waits in its stream's queue until somebody waits for it: a GPU may be as late as that. So a host buffer that is
// written too early, or a stream that does not wait for another, gives other numbers here. A recording accepts and
// refuses what CUDA's does. Kernels of PyTorch are not executed: operations.py has taken their place before they are
// launched.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <unordered_map>
#include <vector>

#include "queues.h"

using namespace stand_in;

namespace {

struct Graph {
  std::vector<Work> work;
  std::vector<std::string> names;
};

struct Stream;

struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  pthread_t thread;
  Stream* origin;
  Graph* graph;
  bool is_invalid = false;
  std::set<Stream*> streams;
};

struct Item {
  Work work;
  Stream* other = nullptr;  // or: until this stream has done so much
  unsigned long long count = 0;
};

struct Stream {
  std::deque<Item> queue;
  unsigned long long queued = 0, done = 0;
  Capture* capture = nullptr;
  unsigned long long captured = 0;  // since it joined the capture
  bool has_joined_again = true;     // the origin waits for all of it
  int priority = 0;
};

struct Event {
  Stream* stream = nullptr;
  unsigned long long count = 0;  // what the stream had queued
  Capture* capture = nullptr;
  unsigned long long capture_id = 0, captured = 0;
  double milliseconds = 0;
};

const size_t kPage = 2 << 20;

std::recursive_mutex mutex;
Stream default_stream;
std::set<Stream*> streams = {&default_stream};
std::set<Capture*> captures;
unsigned long long captures_so_far = 0;
std::map<char*, size_t> device_memory, pinned_memory;  // sizes by address
size_t allocated = 0;
bool has_ended = false;  // Python, and with it what computes
std::unordered_map<const void*, std::string> kernel_names;
std::set<std::string> kernels_not_executed;
void (*python_work)(unsigned long long) = nullptr;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
thread_local cudaError_t last_error = cudaSuccess;

using Guard = std::lock_guard<std::recursive_mutex>;

cudaError_t fail(cudaError_t error, const char* what, const char* why) {
  complain(what, why);
  return last_error = error;
}

Stream* stream_of(void* handle) {
  return handle == nullptr || handle == cudaStreamLegacy || handle == cudaStreamPerThread
             ? &default_stream
             : static_cast<Stream*>(handle);
}

bool contains(std::map<char*, size_t>& ranges, const void* address) {
  Guard guard(mutex);
  auto next = ranges.upper_bound(const_cast<char*>(static_cast<const char*>(address)));
  if (next == ranges.begin()) return false;
  --next;
  return address < next->first + next->second;
}

// Execute what a stream has queued, up to a count, and before that what it waits for.
void drain(Stream* stream, unsigned long long count = ~0ull) {
  while (true) {
    Item item;
    {
      Guard guard(mutex);
      if (has_ended || stream->done >= count || stream->queue.empty()) return;
      item = stream->queue.front();
      stream->queue.pop_front();
      stream->done++;
    }
    item.other ? drain(item.other, item.count) : item.work();
  }
}

void drain_all() {
  std::vector<Stream*> all;
  {
    Guard guard(mutex);
    all.assign(streams.begin(), streams.end());
  }
  for (auto stream : all) drain(stream);
}

// Calls that may wait for the device, or allocate, end the recordings that forbid them.
bool is_forbidden(const char* call) {
  Guard guard(mutex);
  for (auto capture : captures) {
    bool is_elsewhere = !pthread_equal(capture->thread, pthread_self());
    if (capture->mode == cudaStreamCaptureModeRelaxed || thread_mode == cudaStreamCaptureModeRelaxed) continue;
    if (capture->mode == cudaStreamCaptureModeThreadLocal && is_elsewhere) continue;
    capture->is_invalid = true;
    complain(call, "while a stream is recorded");
    return true;
  }
  return false;
}

#define UNLESS_RECORDING(call) \
  if (is_forbidden(call)) return last_error = cudaErrorStreamCaptureUnsupported

double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1e3 + time.tv_nsec / 1e6;
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

cudaError_t launch(const void* function, void* stream) {
  auto found = kernel_names.find(function);
  std::string name = found == kernel_names.end() ? "unknown" : found->second;
  Guard guard(mutex);
  if (!only_counts() && kernels_not_executed.insert(name).second) complain(name, "a kernel that is not executed");
  enqueue(stream, name, [] {});
  return cudaSuccess;
}

void write_names(const Graph& graph) {
  const char* path = getenv("STAND_IN_GRAPHS");
  FILE* file = path ? fopen(path, "a") : nullptr;
  if (!file) return;
  fprintf(file, "graph of %zu\n", graph.names.size());
  for (auto& name : graph.names) fprintf(file, "%s\n", name.c_str());
  fclose(file);
}

}  // namespace

namespace stand_in {

bool only_counts() {
  static bool counts = getenv("STAND_IN_COUNTS") != nullptr;
  return counts;
}

void complain(const std::string& what, const std::string& why) {
  fprintf(stderr, "stand-in: %s: %s\n", what.c_str(), why.c_str());
}

bool is_on_device(const void* address) { return contains(device_memory, address); }
bool is_pinned(const void* address) { return contains(pinned_memory, address); }

void enqueue(void* handle, const std::string& name, Work work) {
  Stream* stream = stream_of(handle);
  Guard guard(mutex);
  if (Capture* capture = stream->capture) {
    capture->graph->work.push_back(work);
    capture->graph->names.push_back(name);
    stream->captured++;
    stream->has_joined_again = false;
    return;
  }
  stream->queue.push_back({work});
  stream->queued++;
}

}  // namespace stand_in

// ---- for operations.py

EXPORT void stand_in_set_work(void (*function)(unsigned long long)) { python_work = function; }

EXPORT void stand_in_enqueue(void* stream, const char* name, unsigned long long number) {
  enqueue(stream, name, [=] { python_work(number); });
}

EXPORT void stand_in_end() {
  drain_all();
  has_ended = true;
}

// Addresses and sizes of the device's memory; returns how many there are.
EXPORT int stand_in_memory(unsigned long long* starts, unsigned long long* sizes, int room) {
  Guard guard(mutex);
  int count = 0;
  for (auto& [start, size] : device_memory) {
    if (count < room) starts[count] = reinterpret_cast<unsigned long long>(start), sizes[count] = size;
    count++;
  }
  return count;
}

// ---- the device: an H100's properties

EXPORT cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
EXPORT cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
EXPORT cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
EXPORT cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
EXPORT cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
EXPORT cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
EXPORT cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
EXPORT cudaError_t cudaProfilerStart() { return cudaSuccess; }
EXPORT cudaError_t cudaProfilerStop() { return cudaSuccess; }

EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* of, int) {
  memset(of, 0, sizeof *of);
  strcpy(of->name, "stand-in for an H100");
  of->totalGlobalMem = 80ull << 30;
  of->major = 9;
  of->multiProcessorCount = 132;
  of->warpSize = 32;
  of->regsPerBlock = of->regsPerMultiprocessor = 65536;
  of->sharedMemPerBlock = 49152;
  of->sharedMemPerBlockOptin = 232448;
  of->sharedMemPerMultiprocessor = 233472;
  of->reservedSharedMemPerBlock = 1024;
  of->maxThreadsPerBlock = of->maxThreadsDim[0] = of->maxThreadsDim[1] = 1024;
  of->maxThreadsDim[2] = 64;
  of->maxThreadsPerMultiProcessor = 2048;
  of->maxBlocksPerMultiProcessor = 32;
  of->maxGridSize[0] = 2147483647;
  of->maxGridSize[1] = of->maxGridSize[2] = 65535;
  of->l2CacheSize = 50 << 20;
  of->memoryBusWidth = 5120;
  of->textureAlignment = 512;
  of->concurrentKernels = of->unifiedAddressing = of->canMapHostMemory = of->streamPrioritiesSupported = 1;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  static const std::map<int, int> values = {
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrMaxSharedMemoryPerBlock, 49152},
      {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMaxRegistersPerBlock, 65536},
      {cudaDevAttrClockRate, 1980000},
      {cudaDevAttrMultiProcessorCount, 132},
      {cudaDevAttrMemoryClockRate, 2619000},
      {cudaDevAttrGlobalMemoryBusWidth, 5120},
      {cudaDevAttrL2CacheSize, 50 << 20},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
      {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 233472},
      {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448},
      {cudaDevAttrMaxBlocksPerMultiprocessor, 32},
  };
  auto found = values.find(attribute);
  *value = found == values.end() ? 0 : found->second;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int) {
  snprintf(text, size, "0000:01:00.0");
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceSynchronize() {
  UNLESS_RECORDING("cudaDeviceSynchronize");
  drain_all();
  return cudaSuccess;
}

EXPORT const char* cudaGetErrorName(cudaError_t error) { return error ? "cudaErrorOfTheStandIn" : "cudaSuccess"; }

EXPORT const char* cudaGetErrorString(cudaError_t error) {
  static const std::map<int, const char*> texts = {
      {cudaSuccess, "no error"},
      {cudaErrorMemoryAllocation, "out of memory"},
      {cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"},
      {cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture"},
      {cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work"},
      {cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another stream"},
  };
  auto found = texts.find(error);
  return found == texts.end() ? "an error of the stand-in" : found->second;
}

EXPORT cudaError_t cudaGetLastError() {
  auto error = last_error;
  last_error = cudaSuccess;
  return error;
}

EXPORT cudaError_t cudaPeekAtLastError() { return last_error; }

// ---- memory, which begins with NaNs

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

// ---- streams and events

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned, int priority) {
  Guard guard(mutex);
  auto stream = new Stream;
  stream->priority = priority;
  streams.insert(stream);
  *handle = reinterpret_cast<cudaStream_t>(stream);
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamCreate(cudaStream_t* handle) { return cudaStreamCreateWithPriority(handle, 0, 0); }

EXPORT cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  drain(stream_of(stream));
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = stream_of(stream)->priority;
  return cudaSuccess;
}

static cudaError_t wait_for(cudaStream_t handle, const char* call) {
  Stream* stream = stream_of(handle);
  if (stream->capture) {
    stream->capture->is_invalid = true;
    return fail(cudaErrorStreamCaptureUnsupported, call, "of a stream that is recorded");
  }
  UNLESS_RECORDING(call);
  drain(stream);
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return wait_for(stream, "cudaStreamSynchronize"); }
EXPORT cudaError_t cudaStreamQuery(cudaStream_t stream) { return wait_for(stream, "cudaStreamQuery"); }

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }  // it may still be in a queue

EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream_handle, unsigned flags) {
  auto event = reinterpret_cast<Event*>(handle);
  Stream* stream = stream_of(stream_handle);
  Guard guard(mutex);
  event->stream = stream;
  if (stream->capture && !(flags & cudaEventRecordExternal)) {
    event->capture = stream->capture;
    event->capture_id = stream->capture->id;
    event->captured = stream->captured;
    return cudaSuccess;
  }
  enqueue(stream_handle, "event", [=] { event->milliseconds = now(); });
  event->capture = nullptr;
  event->capture_id = 0;
  event->count = stream->queued;
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}

static cudaError_t wait_for(cudaEvent_t handle, const char* call) {
  auto event = reinterpret_cast<Event*>(handle);
  if (event->capture_id) return fail(cudaErrorCapturedEvent, call, "of an event that was recorded into a graph");
  UNLESS_RECORDING(call);
  if (event->stream) drain(event->stream, event->count);
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) { return wait_for(event, "cudaEventSynchronize"); }
EXPORT cudaError_t cudaEventQuery(cudaEvent_t event) { return wait_for(event, "cudaEventQuery"); }

EXPORT cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  auto elapsed = reinterpret_cast<Event*>(end)->milliseconds - reinterpret_cast<Event*>(start)->milliseconds;
  *milliseconds = elapsed > 0 ? elapsed : 1e-3;
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  auto event = reinterpret_cast<Event*>(event_handle);
  Stream* stream = stream_of(handle);
  Guard guard(mutex);
  if (!event->stream) return cudaSuccess;
  if (event->capture_id) {  // the stream joins the recording
    if (!captures.count(event->capture) || event->capture->id != event->capture_id)
      return fail(cudaErrorCapturedEvent, "cudaStreamWaitEvent", "event of a recording that has ended");
    if (stream->capture && stream->capture != event->capture)
      return fail(cudaErrorStreamCaptureMerge, "cudaStreamWaitEvent", "two recordings would be one");
    if (stream == &default_stream)
      return fail(cudaErrorStreamCaptureImplicit, "cudaStreamWaitEvent", "the default stream cannot be recorded");
    if (!stream->capture) {
      stream->capture = event->capture;
      stream->capture->streams.insert(stream);
      stream->has_joined_again = false;
      stream->captured = 0;
    }
    if (event->stream != stream && event->stream->captured == event->captured) event->stream->has_joined_again = true;
    return cudaSuccess;
  }
  if (event->stream == stream) return cudaSuccess;
  if (stream->capture) {
    stream->capture->is_invalid = true;
    return fail(cudaErrorStreamCaptureIsolation, "cudaStreamWaitEvent", "a recording waits for work outside of it");
  }
  stream->queue.push_back({nullptr, event->stream, event->count});
  stream->queued++;
  return cudaSuccess;
}

EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  enqueue(stream, "host function", [=] { function(data); });
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned) {
  enqueue(stream, "callback", [=] { function(stream, cudaSuccess, data); });
  return cudaSuccess;
}

// ---- recordings and graphs

EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Stream* stream = stream_of(handle);
  if (stream == &default_stream)
    return fail(cudaErrorStreamCaptureUnsupported, "cudaStreamBeginCapture", "the default stream cannot be recorded");
  Guard guard(mutex);
  stream->capture = new Capture{++captures_so_far, mode, pthread_self(), stream, new Graph};
  stream->capture->streams.insert(stream);
  stream->captured = 0;
  stream->has_joined_again = true;
  captures.insert(stream->capture);
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  Stream* stream = stream_of(handle);
  Guard guard(mutex);
  Capture* capture = stream->capture;
  *graph = nullptr;
  if (!capture) return fail(cudaErrorIllegalState, "cudaStreamEndCapture", "nothing is recorded");
  if (capture->origin != stream)
    return fail(cudaErrorStreamCaptureUnmatched, "cudaStreamEndCapture", "of a stream that only joined");
  bool has_unjoined = false;
  for (auto other : capture->streams) {
    has_unjoined |= other != stream && !other->has_joined_again;
    other->capture = nullptr;
  }
  captures.erase(capture);
  if (capture->is_invalid) return last_error = cudaErrorStreamCaptureInvalidated;
  if (has_unjoined) return fail(cudaErrorStreamCaptureUnjoined, "cudaStreamEndCapture", "a stream did not join again");
  write_names(*capture->graph);
  *graph = reinterpret_cast<cudaGraph_t>(capture->graph);
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  Guard guard(mutex);
  Capture* capture = stream_of(stream)->capture;
  *status = !capture              ? cudaStreamCaptureStatusNone
            : capture->is_invalid ? cudaStreamCaptureStatusInvalidated
                                  : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                            unsigned long long* id, cudaGraph_t* graph,
                                            const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges,
                                            size_t* count) {
  cudaStreamIsCapturing(stream, status);
  Capture* capture = stream_of(stream)->capture;
  if (capture && id) *id = capture->id;
  if (capture && graph) *graph = reinterpret_cast<cudaGraph_t>(capture->graph);
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = reinterpret_cast<Graph*>(graph)->work.size();
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* count) {
  *count = 0;
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  UNLESS_RECORDING("cudaGraphLaunch");
  auto graph = reinterpret_cast<Graph*>(executable);
  enqueue(stream, "graph", [=] {
    for (auto& work : graph->work) work();
  });
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  drain_all();
  delete reinterpret_cast<Graph*>(executable);
  return cudaSuccess;
}

EXPORT cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char*, unsigned) { return cudaSuccess; }

// ---- PyTorch's kernels: their names, and launches

EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}

EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT char __cudaInitModule(void**) { return 1; }
EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

EXPORT void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*,
                                   dim3*, int*) {
  Guard guard(mutex);
  kernel_names[function] = name;
}

EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

struct LaunchShape {
  dim3 grid, block;
  size_t shared;
  void* stream;
};

static thread_local std::vector<LaunchShape> shapes;

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  shapes.push_back({grid, block, shared, stream});
  return 0;
}

EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  auto shape = shapes.back();
  shapes.pop_back();
  *grid = shape.grid;
  *block = shape.block;
  *shared = shape.shared;
  *static_cast<void**>(stream) = shape.stream;
  return cudaSuccess;
}

EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return launch(kernel, stream);
}

EXPORT cudaError_t cudaLaunchKernel(const void* function, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return launch(function, stream);
}

EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
  return launch(function, config->stream);
}

EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* of, const void*) {
  memset(of, 0, sizeof *of);
  of->maxThreadsPerBlock = 1024;
  of->numRegs = 32;
  of->binaryVersion = of->ptxVersion = 90;
  return cudaSuccess;
}

EXPORT cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t,
                                                                          unsigned) {
  *blocks = 2;
  return cudaSuccess;
}

EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  *function = dlsym(RTLD_DEFAULT, symbol);
  if (!*function) *function = dlsym(RTLD_DEFAULT, (std::string(symbol) + "_v2").c_str());
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
