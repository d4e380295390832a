"""Invariant: any prompt becomes ids below the encoder's vocabulary, ending in its end token; nothing is downloaded."""

from __future__ import annotations

from typing import Any

CHARACTERS = " abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'-()"


def toy_tokenizer(config: Any, longest: int) -> Any:
    """A tokenizer of one token per character for a text encoder with `config`, padded to at most `longest` tokens.

    Start (where the encoder has one), end and padding ids are the encoder's own; all other text is lower-cased.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    config = getattr(config, "text_config", config)  # of a model that also sees
    start, end = getattr(config, "bos_token_id", None), config.eos_token_id
    pad = config.pad_token_id if config.pad_token_id is not None else end
    special = {"<end>": end}
    if start is not None:
        special["<start>"] = start
    if pad != end:
        special["<pad>"] = pad
    free = (number for number in range(config.vocab_size) if number not in special.values())
    words = {word: next(free) for word in ("<unknown>", *CHARACTERS)}

    tokenizer = Tokenizer(models.WordLevel({**special, **words}, unk_token="<unknown>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    template = "<start> $A <end>" if start is not None else "$A <end>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(word, number) for word, number in special.items() if word != "<pad>"]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=longest,
        unk_token="<unknown>",
        eos_token="<end>",
        bos_token="<start>" if start is not None else None,
        pad_token="<pad>" if "<pad>" in special else "<end>",
    )
