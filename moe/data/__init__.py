"""Text to batches.

owner      whose a half-written file is
sources    documents with a domain, from files or a hub
files      which there are, their text and lines, within bounds
unreadable what cannot be read, counted
blend      the default corpus, in five domains
clean      the counted cleaning pipeline
tokenizer  byte, char, BPE trained here, pretrained
chat       conversations as text, by a template
instructions  questions with answers, made of the corpora and of small tasks
learning   what a person sees of a tokenizer that is trained
answers    prompts with answers, as lines of JSON
shards     packed, verified token files
prepare    all of these once, into a folder
loader     batches out of that folder
answer_loader  batches of prompts and of preferred pairs
tasks      tasks whose answers can be verified, their rewards, and a scripted judge
"""
