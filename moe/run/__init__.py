"""What a run leaves on disk, and the machine it ran on.

lock          which process trains a run: one at a time
folder        config, tokenizer, logs: what lies where, and whether it is the same run
trust         whose code a stored run may have imported
jsonl         lines appended, files replaced in one move
summary       what a run says of itself in numbers: a metrics line, and the summary at its end
checkpoint    atomic, verified snapshots
manifest      what files a checkpoint has, under checksums
shards        tensors in files by rank
sharded       checkpoints that many ranks write together, and saving aside
streamed      safetensors files, one tensor in memory at a time
command_line  what to type, quoted
load          a run's model, read back
source        what a run takes of the settings of the one whose weights it starts from
machine       device, memory, versions
precision     bf16 or fp32, whichever this machine multiplies faster
terminal      outputs that do not fail, and text that a terminal shows as it is
"""
