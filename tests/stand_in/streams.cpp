// The stand-in's streams and events.
#include "streams.h"

#include <cuda_runtime_api.h>
#include <time.h>

using namespace stand_in;

static double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1e3 + time.tv_nsec / 1e6;
}

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
