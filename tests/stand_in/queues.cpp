// A stand-in for CUDA's runtime on the host's memory.
//
// Work waits in its stream's queue until somebody waits for it: a GPU may be as late as that. So a host buffer that is
// written too early, or a stream that does not wait for another, gives other numbers here. A recording accepts and
// refuses what CUDA's does. Kernels of PyTorch are not executed: operations.py has taken their place before they are
// launched.
#include <stdio.h>
#include <stdlib.h>

#include "streams.h"

namespace stand_in {

std::recursive_mutex mutex;
Stream default_stream;
std::set<Stream*> streams = {&default_stream};
std::set<Capture*> captures;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
thread_local cudaError_t last_error = cudaSuccess;

static bool has_ended = false;  // Python, and with it what computes
static void (*python_work)(unsigned long long) = nullptr;

bool only_counts() {
  static bool counts = getenv("STAND_IN_COUNTS") != nullptr;
  return counts;
}

void complain(const std::string& what, const std::string& why) {
  fprintf(stderr, "stand-in: %s: %s\n", what.c_str(), why.c_str());
}

cudaError_t fail(cudaError_t error, const char* what, const char* why) {
  complain(what, why);
  return last_error = error;
}

Stream* stream_of(void* handle) {
  return handle == nullptr || handle == cudaStreamLegacy || handle == cudaStreamPerThread
             ? &default_stream
             : static_cast<Stream*>(handle);
}

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

void drain(Stream* stream, unsigned long long count) {
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

}  // namespace stand_in

// ---- for operations.py

using namespace stand_in;

EXPORT void stand_in_set_work(void (*function)(unsigned long long)) { python_work = function; }

EXPORT void stand_in_enqueue(void* stream, const char* name, unsigned long long number) {
  enqueue(stream, name, [=] { python_work(number); });
}

EXPORT void stand_in_end() {
  drain_all();
  has_ended = true;
}
