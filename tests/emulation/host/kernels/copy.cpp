#include "kernels/copy.cu"

#include "registry.h"

EMULATE(mustafar::CopyParams, mst_copy)
EMULATE(mustafar::CopyParams, mst_widen)
