"""Checkpoints for programs that are not transformers: `gguf` for llama.cpp, `uniform` for stock classes."""
