// A stand-in for the matrix products of cuBLAS and cuBLASLt that PyTorch asks for: they are counted. They are computed
// by operations.py, which has taken their place before PyTorch gets here, unless everything is only counted.
//
// Without cuBLAS's headers, whose own includes do not come with PyTorch: handles and descriptions are pointers.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "queues.h"

using namespace stand_in;

namespace {

const int kSuccess = 0, kVersion = 130100;

struct Handle {
  void* stream = nullptr;
  int math = 0, pointers = 0;
};

struct Choice {  // of an algorithm
  uint64_t algorithm[8];
  size_t workspace;
  int status;
  float waves;
  int reserved[4];
};

Handle& of(void* handle) { return *static_cast<Handle*>(handle); }

int product(void* stream) {
  if (!only_counts()) complain("cuBLAS", "a product that is not computed");
  enqueue(stream, "product", [] {});
  return kSuccess;
}

int created(void** description) {
  *description = new char;
  return kSuccess;
}

int destroyed(void* description) {
  delete static_cast<char*>(description);
  return kSuccess;
}

}  // namespace

EXPORT int cublasCreate_v2(void** handle) {
  *handle = new Handle;
  return kSuccess;
}

EXPORT int cublasDestroy_v2(void* handle) {
  delete &of(handle);
  return kSuccess;
}

EXPORT int cublasSetStream_v2(void* handle, void* stream) {
  of(handle).stream = stream;
  return kSuccess;
}

EXPORT int cublasSetMathMode(void* handle, int math) {
  of(handle).math = math;
  return kSuccess;
}

EXPORT int cublasGetMathMode(void* handle, int* math) {
  *math = of(handle).math;
  return kSuccess;
}

EXPORT int cublasSetPointerMode_v2(void* handle, int pointers) {
  of(handle).pointers = pointers;
  return kSuccess;
}

EXPORT int cublasGetPointerMode_v2(void* handle, int* pointers) {
  *pointers = of(handle).pointers;
  return kSuccess;
}

EXPORT int cublasSetWorkspace_v2(void*, void*, size_t) { return kSuccess; }

// Of their further arguments nothing is used.
EXPORT int cublasGemmEx(void* handle, ...) { return product(of(handle).stream); }
EXPORT int cublasGemmStridedBatchedEx(void* handle, ...) { return product(of(handle).stream); }
EXPORT int cublasSgemm_v2(void* handle, ...) { return product(of(handle).stream); }
EXPORT int cublasSgemmStridedBatched(void* handle, ...) { return product(of(handle).stream); }
EXPORT int cublasSgemv_v2(void* handle, ...) { return product(of(handle).stream); }

// ---- cuBLASLt, whose descriptions nobody reads

EXPORT size_t cublasLtGetVersion() { return kVersion; }
EXPORT int cublasLtMatmulDescCreate(void** description, int, int) { return created(description); }
EXPORT int cublasLtMatmulDescDestroy(void* description) { return destroyed(description); }
EXPORT int cublasLtMatmulDescSetAttribute(void*, int, const void*, size_t) { return kSuccess; }
EXPORT int cublasLtMatrixLayoutCreate(void** description, int, uint64_t, uint64_t, int64_t) {
  return created(description);
}
EXPORT int cublasLtMatrixLayoutDestroy(void* description) { return destroyed(description); }
EXPORT int cublasLtMatrixLayoutSetAttribute(void*, int, const void*, size_t) { return kSuccess; }
EXPORT int cublasLtMatmulPreferenceCreate(void** description) { return created(description); }
EXPORT int cublasLtMatmulPreferenceDestroy(void* description) { return destroyed(description); }
EXPORT int cublasLtMatmulPreferenceSetAttribute(void*, int, const void*, size_t) { return kSuccess; }

EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, Choice* choices,
                                          int* count) {
  memset(choices, 0, sizeof *choices);
  *count = 1;
  return kSuccess;
}

EXPORT int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*,
                          void*, void*, void*, const void*, void*, size_t, void* stream) {
  return product(stream);
}
