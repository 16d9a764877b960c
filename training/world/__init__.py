"""A miniature world whose captions can be checked from the pixels, and the models trained on it.

Small enough that a pair of CPU cores trains every part of the pipeline on it: the VAE, the text
encoder, the teacher and the causal student. Its tracker measures what the captions promise.
"""
