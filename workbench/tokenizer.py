"""The tokenizer of the built-in models: an explicit vocabulary of 1024 pieces, built, not trained.

Three specials (`<pad>` 0, `<s>` 1, `</s>` 2), every word of the microworld's grammar as *one* piece
with its leading space, the 256 bytes, and the most useful merges of real docstrings. A Unigram
model whose pieces all cost about 1 then splits any text into the *fewest* pieces (Viterbi), and
every text survives the round trip.

The file is shipped (`workbench/backbones/tokenizer/`), because docstrings differ between Python
versions. It was made by `save_tokenizer(build_tokenizer(stdlib_docstrings()), TOKENIZER_FOLDER)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.errors import DataError
from workbench.microworld.grammar import GRAMMAR_WORDS, surface

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 1024
SPECIALS = ("<pad>", "<s>", "</s>")
PAD_ID, BOS_ID, EOS_ID = range(3)
TOKENIZER_FOLDER = Path(__file__).parent / "backbones" / "tokenizer"
TIE_BREAK = 1e-4  # earlier pieces cost a hair less, so that the split is unique


def _byte_letters() -> dict[int, str]:
    """The printable letter of each byte in the byte-level alphabet of GPT-2."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    hidden = [byte for byte in range(256) if byte not in letters]
    letters.update({byte: chr(256 + rank) for rank, byte in enumerate(hidden)})
    return dict(sorted(letters.items()))


def _spelled(text: str) -> str:
    letters = _byte_letters()
    return "".join(letters[byte] for byte in text.encode("utf-8"))


def _merged_pieces(texts: Iterable[str], n: int) -> list[str]:
    """The first `n` merges of a byte-pair encoding of the texts, as pieces."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    merging = Tokenizer(models.BPE())
    merging.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=256 + n,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    merging.train_from_iterator(texts, trainer)
    by_id = sorted(merging.get_vocab().items(), key=lambda pair: pair[1])
    return [piece for piece, _ in by_id if len(piece) > 1]


def build_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """The tokenizer with its last few hundred pieces merged from the given texts.

    Raises:
        DataError: the texts are too small to yield the missing pieces.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    pieces = dict.fromkeys(SPECIALS)
    pieces.update(dict.fromkeys(_spelled(surface(word)) for word in GRAMMAR_WORDS))
    pieces.update(dict.fromkeys(_byte_letters().values()))
    missing = VOCABULARY_SIZE - len(pieces)
    merged = [piece for piece in _merged_pieces(texts, 3 * missing) if piece not in pieces]
    if len(merged) < missing:
        raise DataError(
            f"the texts yield {len(merged)} merges; {missing} are needed for "
            f"{VOCABULARY_SIZE} pieces; give more text"
        )
    pieces.update(dict.fromkeys(merged[:missing]))
    scored = [
        (piece, -1.0 - TIE_BREAK * rank / VOCABULARY_SIZE) for rank, piece in enumerate(pieces)
    ]
    tokenizer = Tokenizer(models.Unigram(scored))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS_ID)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer in Hugging Face layout, so that `AutoTokenizer` loads the folder."""
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=1024,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(str(folder))


def microworld_tokenizer() -> PreTrainedTokenizerFast:
    """The shipped tokenizer; called on a text it puts `<s>` in front, as in training."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(TOKENIZER_FOLDER))


def word_ids() -> dict[str, int]:
    """Grammar word → its one token id, read off the order of the vocabulary.

    >>> ids = word_ids()
    >>> ids[GRAMMAR_WORDS[0]], len(ids) == len(GRAMMAR_WORDS)
    (3, True)
    """
    return {word: len(SPECIALS) + rank for rank, word in enumerate(GRAMMAR_WORDS)}
