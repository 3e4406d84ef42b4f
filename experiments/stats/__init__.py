"""Numbers from finished runs, and of runs to come.

statistics  means and their intervals
verdict     what a comparison says
planner     what a run will take: memory, devices, time, money
"""
