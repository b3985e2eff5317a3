"""Training a pruned model back."""
