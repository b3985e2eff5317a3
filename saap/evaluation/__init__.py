"""Accuracies, perplexity, size and speed of a model."""
