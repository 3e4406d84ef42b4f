"""What an MoE layer computes, on plain tensors and ints.

form          what an expert computes: its activation, the order of its rows, where its weights multiply
fp8           rows and matrices rounded to 8 bits, in plain torch: the format, and what is multiplied
reference     every op in plain torch, any dtype up to float64: the definition of correct
grouped       the experts on ordinary matmuls: dispatch=torch
fused         the experts on the Triton kernels below, as one autograd function: dispatch=triton
  gate          logits to the chosen experts, and what the balancing losses read
  plan          routed rows sorted by expert, and a schedule of tiles
  ragged_mm     each expert's rows times its matrix, gather and activation fused in
  epilogue      what becomes of such a product before it is stored: biases, activations, their derivatives
  bits          numbers of 4 and 8 bits in registers, and rows and matrices rounded to fp8
  hopper        two of ragged_mm's products with warps that load beside warps that multiply, on sm_90: off until proven
  ragged_wgrad  gradients of weights and biases
  combine       a token's rows, summed
quantized     experts whose weights are stored in int8, mxfp4 or fp8, for inference, on any of the three
operands      what all of them ask of their operands, in a sentence each
tuning        tile shapes per GPU (tuning.jsonl), and whether the kernels can run here
aot           every kernel compiled for GPUs that are not here: registers, spills, shared memory, instructions (aot.txt)
aot_cases     the layers and routers that it compiles
machine_code  what the assemblers made of one, and of a matmul's loop
"""
