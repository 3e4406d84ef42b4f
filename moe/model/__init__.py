"""The network and what it costs, in the order it is built.

rope         rotary positions, also stretched ones
attention    grouped-query attention, documents, KV cache
latent       multi-head latent attention
experts      the dense MLP, shared and routed experts
quantized    routed experts stored in few bits, for inference
dispatch     backends over the same expert weights
layer        the MoE layer: route, limit, dispatch, combine
depth        which tokens enter a block at all
transformer  blocks and the whole model
adapt        which of its weights are trained: parts, experts, low-rank changes
cost         parameter and FLOP counts, the dense twin
memory       what a training step asks for, walked without data
"""
