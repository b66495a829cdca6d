#include "kernels/score.cu"

#include "registry.h"

EMULATE(mustafar::QueryWeightsParams, mst_query_weights)
EMULATE(mustafar::ChannelScoresParams, mst_channel_scores)
EMULATE(mustafar::ChannelScoresParams, mst_choose_channels)
EMULATE(mustafar::TokenWeightsParams, mst_token_weights)
