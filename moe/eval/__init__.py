"""A model used without training it.

evaluate  loss and bits per byte, by domain; causality
generate  sampling and next-token probabilities
"""
