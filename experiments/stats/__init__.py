"""Numbers from finished runs.

statistics  means and their intervals
verdict     what a comparison says
"""
