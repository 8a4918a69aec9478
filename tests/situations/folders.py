"""Small tokenizer folders in Hugging Face's format: byte-level BPE without merges, so that an id is a byte or a special token."""

import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = ["<s>", "</s>", "<pad>", "<img>", "<tool>", *BYTES]


def backend(special=("<s>", "</s>"), begin=False, end=False):
    built = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(WORDS)}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(list(special))
    if begin or end:
        single = [*(["<s>"] if begin else []), "$A", *(["</s>"] if end else [])]
        built.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    return built


def write(folder, files, **settings):
    """A folder of tokenizer.json and further files: texts as they are, anything else as JSON."""
    folder.mkdir()
    backend(**settings).save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def theirs(folder):
    """The tokenizer that transformers makes of a folder."""
    import transformers

    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)
