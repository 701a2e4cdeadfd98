"""Reproduction of the translation experiments of "Attention Is All You Need": data, training, decoding, scores."""
