#include "kernels/merge.cu"

#include "registry.h"

EMULATE(mustafar::CombineParams, mst_combine)
EMULATE(mustafar::MergeParams, mst_merge)
