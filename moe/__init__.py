"""Switchyard: Mixture-of-Experts language models.

Letters, everywhere (a tensor whose layout matters carries them: `x_TD`, `expert_TK`, `w_up_EFD`):
B batch · S sequence · T = B·S tokens · D model width · H heads · E experts · K choices per token ·
F expert hidden width · N routed rows (T·K when nothing is dropped and every token takes K) · C capacity per expert ·
V vocabulary · L layers.

The rooms, top to bottom; each imports only from those above it. A room's docstring maps its files.
errors    input that a person can correct
config    every setting and every cross-field check
data      text -> documents -> tokens -> batches
parallel  many processes, one run
routing   who goes where
model     the network, its backends, what it costs
run       what a run leaves on disk, and the machine it ran on
convert   a model into another form
analysis  what routing did
eval      a model used without training it
train     the one training loop and all it minimises
"""
