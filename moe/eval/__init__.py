"""A model used without training it.

evaluate  loss and bits per byte, by domain; causality
scores    the same of any text, with intervals over documents
generate  sampling and next-token probabilities
rollout   answers to many prompts at once, with their log-probabilities and experts
answers   what it answers to questions, against the right answers
program   run.c, compiled and asked
tasks     questions made by code, for the harness
harness   tasks of lm-evaluation-harness, these and its own
"""
