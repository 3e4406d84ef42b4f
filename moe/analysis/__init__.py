"""What routing did.

doctor          alarms while a run trains
metrics         how even a load is: balance, dead experts, what was dropped
decisions       how decided a router is, and whether it decides alike twice
specialisation  which domains and tokens an expert takes, and with which others
significance    which of that is more than chance, and which expert has earned a name
caveats         what each metric cannot tell, and whether it is drawn
planted         text and routers of known truth, to try metrics on
placement       what a load means for devices and decode batches
trace           which experts every token took, as Parquet
tracing         a run over a text, traced
evidence        how far a page may believe what its experts take
probing         what a run's model itself has to be asked
inspection      all that a page says of a trace
findings        whether anything is wrong with it, in words
history         what a run's own files say of its routing over training
effects         what routing otherwise costs, in all and by domain
interventions   experts masked, dropped, swapped, forced
redundancy      whether experts do the same
stability       what a router says a layer earlier, and at other checkpoints
rerouting       what of routing another model of the same shape does otherwise, as after fine-tuning
heat_map        loads as colours
windows         the text that is traced, of a corpus, a file or token ids
by_layer        a trace that is made with one layer in memory at a time
records         what serving engines and Megatron recorded, as a trace
replay          every step's routing on disk, to take again
"""
