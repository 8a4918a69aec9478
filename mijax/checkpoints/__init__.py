"""Checkpoint files (Hugging Face folders, GGUF) read into mijax's models and tokenizers, and written from them."""
