"""Tables of architectures, one family a file: the config entries and tensors of Hugging Face checkpoints."""
