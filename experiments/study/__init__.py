"""Studies: many runs planned as one, trained by any number of workers, killed and gone on with at will.

manifest  the plan, study.json: a job for every arm and seed, called by the hash of its settings
compose   from an experiment's file and a command line to the plan
claims    who is at a job, and what became of those that failed
space     what a search is over
search    the trials of a search: asked for one after another
states    how far every job is
worker    claim a job, train it, record what failed, and on to the next
pool      workers of one machine, its cores and GPUs shared out
cluster   workers as an array of a cluster's jobs
requeued  one run as a cluster's job, put in the queue again until it is done
start     a run's folder whose weights come from elsewhere
branches  a model per domain, merged as experts: the runs of branch-train-mix and of what it is compared with
"""
