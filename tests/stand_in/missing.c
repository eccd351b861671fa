// Functions of CUDA's driver that PyTorch's libraries look for when they are loaded, and nobody calls here.
#define MISSING(name) \
  int name(void) { return 801; }  // CUDA_ERROR_NOT_SUPPORTED
MISSING(cuLinkAddData_v2)
MISSING(cuLinkComplete)
MISSING(cuLinkCreate_v2)
MISSING(cuTensorMapEncodeTiled)
