"""Many processes, one run.

launch       how ranks meet, agree and part
collectives  what they tell one another in a step: sums, a shared batch, noise that no rank changes
gradients    tensors of which every rank holds a part
mesh         the same ranks, once for what every token passes and once for routed experts
exchange     tokens to experts on other ranks and back
"""
