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
shards     packed, verified token files
prepare    all of these once, into a folder
loader     batches out of that folder
"""
