// The stand-in's streams, events and recordings; see queues.cpp.
#pragma once
#include <cuda_runtime_api.h>
#include <pthread.h>

#include <deque>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "queues.h"

namespace stand_in {

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

using Guard = std::lock_guard<std::recursive_mutex>;

extern std::recursive_mutex mutex;
extern Stream default_stream;
extern std::set<Stream*> streams;
extern std::set<Capture*> captures;
extern thread_local cudaStreamCaptureMode thread_mode;
extern thread_local cudaError_t last_error;

Stream* stream_of(void* handle);

// Execute what a stream has queued, up to a count, and before that what it waits for.
void drain(Stream* stream, unsigned long long count = ~0ull);
void drain_all();

// Calls that may wait for the device, or allocate, end the recordings that forbid them.
bool is_forbidden(const char* call);

// Say what is wrong; returns the error, which is the thread's last one then.
cudaError_t fail(cudaError_t error, const char* what, const char* why);

}  // namespace stand_in

#define UNLESS_RECORDING(call) \
  if (is_forbidden(call)) return last_error = cudaErrorStreamCaptureUnsupported
