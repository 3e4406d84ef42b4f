"""Who goes where. A router decides rows, (token, expert, weight), and nothing else.

contract       what a router is given, and what it decides
linear         logits that most routers start from
token_choice   a token decides alone: top K, threshold, top-p, ReLU, hash
sinkhorn       the batch decides: balanced scores
assignment     the batch decides: BASE's even assignment
expert_choice  the batch decides: every expert takes its best tokens
soft           slots that are mixtures of tokens
build          which class a name means
policies       capacity, rounding, forced and recorded routing
balance        losses and the bias that keep loads even
"""
