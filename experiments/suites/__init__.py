"""Benchmarks and checks on a device.

What is measured; `experiments.bench` runs one, `experiments.gpu_evidence` all but routing, on a GPU
kernels        gate, plan and combine against the same work by hand, and against their floors in bytes
layer          the experts of one layer against peers and a balanced bmm, forward and backward
routing        gate, plan and combine of every backend, as a share of the layer, on any machine
host           what a call of the Triton experts costs the host, forward and backward
memory         what a training step takes, planned and measured
watching       what log.doctor costs a training step
page           how soon the inspector's page answers, in a browser
alignment      small models aligned on a verifiable task, one of them with a reward that can be hacked
diversity      small models fine-tuned on questions of more and more kinds, and asked others
generation     how many tokens a second run.c says, against torch
faults         small models trained with a known fault, and what the doctor says of them
equalities     training on several ranks against one process
ranks          steps of two processes against one with two threads
survival       what a worker's end does to a run of two ranks
families       transformers' models against what is read of their folders
tracing        what a trace takes in memory, long ones and of folders larger than it
train_step     whole training steps: our MoE on every backend, its dense twin, transformers' models
tune           candidate tiles for kernels/tuning.jsonl, timed
tile_model     the same, ranked by a model of their clocks where there is no GPU

What is checked, in stage correctness of `experiments.gpu_evidence`
kernel_checks  each kernel against the reference
layer_checks   the layer against the reference; reruns, graphs, compile, far addresses, sanitizers

What they stand on
peers          the experts of this and other libraries, from one set of weights
shapes         sizes, floors and targets
timing         time, memory and ceilings of a device
facts          what every row carries: device, driver, versions, commit, code, command
local_ranks    processes on this machine that have met, and call what they are told to
cases          rows, one for each case, that a killed run goes on with

What becomes of the rows
alarm_table    which alarms tell of which faults
roofline       FLOP per byte against TF/s, drawn
evidence       what the rows of all stages come to
"""
