#include "kernels/median.cu"

#include "registry.h"

EMULATE(mustafar::MedianParams, mst_median)
