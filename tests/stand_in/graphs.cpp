// The stand-in's recordings and graphs.
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>

#include <utility>

#include "streams.h"

using namespace stand_in;

static unsigned long long captures_so_far = 0;

static void write_names(const Graph& graph) {
  const char* path = getenv("STAND_IN_GRAPHS");
  FILE* file = path ? fopen(path, "a") : nullptr;
  if (!file) return;
  fprintf(file, "graph of %zu\n", graph.names.size());
  for (auto& name : graph.names) fprintf(file, "%s\n", name.c_str());
  fclose(file);
}

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
