"""Switchyard: Mixture-of-Experts language models.

Letters, everywhere (a tensor whose layout matters carries them: `x_TD`, `expert_TK`, `w_up_EFD`):
B batch · S sequence · T = B·S tokens · D model width · H heads · E experts · K choices per token ·
F expert hidden width · N routed rows (T·K when nothing is dropped and every token takes K) · C capacity per expert ·
V vocabulary · L layers.

Where things are, in the order data flows:
config      every setting and every cross-field check   routing_config  those of experts, router and balance
errors      input that a person can correct
corpus      text sources -> documents with a domain        blend       the default corpus, in five domains
clean       the counted cleaning pipeline                  tokenizer   byte, char, BPE trained here, pretrained
shards      packed, verified token files                   data        corpora -> shards -> batches
attention   grouped-query attention, positions, KV cache   routing     what a router is given and decides
token_choice  routers whose tokens decide alone            batch_choice  routers whose tokens compete
router      which router a name means                      capacity    limits on an expert's rows, forced routing
balance     losses and the bias that keep loads even       experts     expert weights, dense and shared MLPs
replay      every step's routing on disk, to take again
dispatch    backends over the same weights                 layer       the MoE layer: route, dispatch, balance
depth       which tokens enter a block at all              model       the transformer
presets     parameter and FLOP counts, the dense twin
families    transformers' model families, config.json      hf          weights to and from transformers' folders
upcycle     a dense checkpoint into an MoE, and back       distill     another run's model as a teacher
optim       AdamW and schedules                            metrics     what to say about routing
checkpoint  atomic, verified snapshots                     evaluate    loss and bits per byte, by domain
generate    sampling                                       train       the one training loop
machine     device, precision, memory, versions            run         a run's folder
progress    what a person sees while it runs               trackers    TensorBoard and others
"""
