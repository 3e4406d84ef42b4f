"""What routing did.

metrics  balance, dead experts, what was dropped
replay   every step's routing on disk, to take again
"""
