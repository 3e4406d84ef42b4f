"""What an MoE layer computes, on plain tensors and ints."""
