"""What routing did.

metrics         how even a load is: balance, dead experts, what was dropped
decisions       how decided a router is, and whether it decides alike twice
specialisation  which domains and tokens an expert takes, and with which others
placement       what a load means for devices and decode batches
trace           which experts every token took, as Parquet
replay          every step's routing on disk, to take again
"""
