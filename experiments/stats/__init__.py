"""Numbers from finished runs, and of runs to come.

statistics  means and their intervals
decide      one comparison: the word, the smallest effect these seeds could have shown, how many would decide
arms        many comparisons: words corrected for their number, intervals that hold together, ranks
speedup     how much sooner one model has another's loss
verdict     what a comparison of runs measured
sentences   what it says, in words
scaling     forms of scaling laws, fitted
outcome     what a study found: every arm against the base
simulation  studies of known truth, to see how often verdicts hold
recovery    metrics of routing on routers of known truth
ledger      published claims, and what runs say of each
planner     what a run will take: memory, devices, time, money
streaming   what a trace will take that is made layer by layer
cluster     machines that are not here, ranks on them, transfers between ranks
traffic     the rows that an all-to-all moves
step_time   what a step takes on many GPUs
scale_out   ways of routing on more and more GPUs
published   what others measured of steps and all-to-alls, and what is predicted
branching   branch-train-mix: an arm against another, experts and domains
"""
