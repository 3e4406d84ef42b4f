"""Benchmarks and checks on a device.

kernels        each kernel against the same work by hand, and its floor
layer          the whole layer against its peers
routing        gate, plan and combine on a CPU
train_step     whole training steps, MoE against dense
tune           tile sizes, measured
peers          other libraries' layers over the same weights
roofline       FLOP per byte against TF/s, drawn
kernel_checks  each kernel against the reference on a device
layer_checks   the layer against the reference on a device
cases          rows, one for each case, that a killed run goes on with
timing         time, memory and ceilings of a device
facts          what every row carries: device, versions, commit, code
shapes         sizes, floors and targets
evidence       what the rows of all stages come to
"""
