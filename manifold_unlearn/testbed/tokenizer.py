"""A tokenizer with one token for each word of a world, and bytes for everything else."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
_LONGEST_WORD = 10_000
_WORD = re.compile(r" ?[A-Za-z]+|[^A-Za-z\s]")


def build_tokenizer(texts: Iterable[str]) -> Any:
    """Tokenizer whose vocabulary is the words of ``texts`` and all single bytes.

    A word is one token with the space before it and another without; a word that is not in
    ``texts`` falls into pieces, so that any text is encoded and decodes to itself. A ``<s>`` token
    is put before every text.

    Returns
    -------
    transformers.PreTrainedTokenizerFast
        Padded on the right; ``save_pretrained`` works.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = sorted({word for text in texts for word in _WORD.findall(text)})
    pieces = [split.pre_tokenize_str(word)[0][0] for word in words]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = dict.fromkeys([BOS, EOS, PAD, *alphabet, *pieces])
    made = Tokenizer(
        models.WordPiece(
            {entry: i for i, entry in enumerate(entries)},
            unk_token=PAD,
            max_input_chars_per_word=_LONGEST_WORD,
            continuing_subword_prefix="",
        )
    )
    made.pre_tokenizer = split
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, list(entries).index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
