"""A model into another form.

hf_families   transformers' model families: what each fixes, what it leaves open
hf_config     their config.json to settings and back
hf_latent     what the families with latent attention have there beside names
hf_gpt_oss    what gpt-oss has beside the other families
hf_stored     matrices that folders hold in few bits, widened as they are read
hf_tokenizer  tokenizer.json to ids equal to its own, and back
hf_weights    weights from and to transformers' folders
hf_stream     the same folders one tensor or one layer at a time, in less memory than they take
quantize      weights rounded to int8, int4 and other formats
turns         a chat template as what stands around its turns
gguf          GGUF files, which llama.cpp reads
export_c      model.bin for run.c, a program in C that continues text
upcycle       a dense checkpoint into an MoE, and back
"""
