// The queues of the stand-in for a GPU; see queues.cpp.
#pragma once
#include <functional>
#include <string>

namespace stand_in {

using Work = std::function<void()>;

// Whether work is only counted (STAND_IN_COUNTS in the environment), not computed.
bool only_counts();

// Put work into a stream's queue, or into the graph that the stream records.
void enqueue(void* stream, const std::string& name, Work work);

// Whether memory was allocated on the device, or pinned on the host.
bool is_on_device(const void* address);
bool is_pinned(const void* address);

// One line on stderr: what a GPU would not have allowed, or what is missing here.
void complain(const std::string& what, const std::string& why);

}  // namespace stand_in

#define EXPORT extern "C" __attribute__((visibility("default")))
