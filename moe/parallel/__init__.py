"""Many processes, one run.

collectives  sums over the ranks
"""
