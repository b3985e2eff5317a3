"""The stages of a run: what each takes, what is in its key, what it does, what it publishes and how that is read."""
