"""Every setting and every cross-field check, on the standard library alone. A file per group of settings;
what a setting means stands behind it, or above it where the line is full.

parse    a dict into dataclasses and back; bounds and choices
model    the transformer and its routed experts
router   the router, and which of its settings mean something to which
balance  what keeps the load even
data     sources, cleaning, tokenizer
train    schedule, batches, teacher, checkpoints, logs
tune     which weights are trained
objective  what a run minimises
parallel  how the ranks of a run share its work
run      all of them together: a whole run
"""
