"""The one training loop and all it minimises.

loop        prepare or resume a run, take its steps, evaluate, save, summarise
beforehand  what a run names is there, and may be had
step        one optimiser step: micro-batches, losses, update
state       what a step changes, to a checkpoint and back
parallelize  a model over many ranks
non_finite  where a number that is not finite first appeared
signals     an end that was asked for
refusals    an end that was not, in a sentence with the last good checkpoint
recorder    what a step leaves in the run's files, in trackers and on the screen
optimizer   AdamW, Muon beside it, and schedules
muon        orthogonalised updates of matrices and of stacks of them
average     the mean of the weights over the last steps
distill     another run's model as a teacher
objective   what a step minimises besides the text: pairs of answers, answers that are drawn, and their figures
preference  losses of a reward model and of DPO
grpo        advantages of answers in their group, and the losses that follow from them
progress    what a person sees while it runs
trackers    TensorBoard and others
"""
