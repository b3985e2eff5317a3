"""The commands of `saap`, by what they work on."""
