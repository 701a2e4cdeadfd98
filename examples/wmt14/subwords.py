"""From raw sentences to ids and back: normalisation of the text, and one BPE vocabulary shared by both languages.

The paper encodes with "byte-pair encoding" (en-de, about 37,000 ids) and "word pieces" (en-fr, 32,000) of its authors'
own making, on text whose words were split at the borders of letters and other characters. Here both are the BPE of
sentencepiece on raw text: a word carries the space before it, nothing is lost in decoding but runs of spaces, and
training sees a bounded sample. The vocabularies are therefore of the paper's kind and size, but not its own.

Moses tokenisation, for recipes that ask for it, is that of sacremoses, without its XML escapes.
"""

from __future__ import annotations

import io
import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import sentencepiece
from sacremoses import MosesDetokenizer, MosesPunctNormalizer, MosesTokenizer

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
MODEL_FILE, PREPARATION_FILE = "subwords.model", "preparation.json"

_SEPARATORS = "\t\n\v\f\r\x1c\x1d\x1e\x1f\x85\u2028\u2029"
_CONTROLS: dict[int, str | None] = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0), 0x200B, 0x2060, 0xFEFF])
_CONTROLS |= {ord(separator): " " for separator in _SEPARATORS}


@dataclass(frozen=True)
class TextForm:
    """The form in which sentences of one language are written for the model.

    Args:
        language: "en", "de", ...; matters to Moses only.
        lowercase: write everything in lower case.
        moses: normalise punctuation and tokenise by the rules of Moses.
        is_tokenised: the given sentences are Moses-tokenised and escaped already; undo that first.
    """

    language: str
    lowercase: bool = False
    moses: bool = False
    is_tokenised: bool = False

    def normalize(self, text: str) -> str:
        """The sentence in Unicode NFC, without control characters, words separated by single spaces."""
        text = " ".join(unicodedata.normalize("NFC", text.translate(_CONTROLS)).split())
        if self.is_tokenised:
            text = _moses(MosesDetokenizer, self.language).detokenize(text.split())
        if self.lowercase:
            text = text.lower()
        if self.moses:
            text = _moses(MosesPunctNormalizer, self.language).normalize(text)
            text = _moses(MosesTokenizer, self.language).tokenize(text, return_str=True, escape=False)
        return text

    def restore(self, text: str) -> str:
        """The sentence as a reader expects it, without the spaces of Moses. The case stays as it is."""
        if not self.moses:
            return text
        return _moses(MosesDetokenizer, self.language).detokenize(text.split(), unescape=False)


@lru_cache
def _moses(tool: type, language: str) -> Any:
    """One of sacremoses' tools, built once per process because that takes long."""
    return tool(language)


def train_subwords(sentences: Iterable[str], vocab_size: int, character_coverage: float) -> bytes:
    """A sentencepiece BPE model of normalised sentences; the same bytes for the same sentences.

    Args:
        sentences: of both languages.
        vocab_size: ids, padding, end of sentence and unknown included.
        character_coverage: share of the text's characters that get an id of their own; the rarest ones do not.

    Raises:
        ValueError: a vocabulary that these sentences cannot fill, or smaller than their characters.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            character_coverage=character_coverage, normalization_rule_name="identity", max_sentence_length=2**20,
            pad_id=PAD_ID, eos_id=EOS_ID, unk_id=UNK_ID, bos_id=-1, num_threads=1, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise ValueError(f"vocab_size: {vocab_size} does not fit the text ({error})") from None
    return model.getvalue()


class Subwords:
    """The vocabulary of a data folder and how its text is written.

    Args:
        model: what `train_subwords` returned.
        source, target: how the sentences of each side are written.
    """

    def __init__(self, model: bytes, source: TextForm, target: TextForm) -> None:
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.forms = {"source": source, "target": target}
        self.pad_id, self.eos_id = PAD_ID, EOS_ID

    @classmethod
    def load(cls, folder: str | Path) -> Subwords:
        """The vocabulary of a folder that `prepare` wrote.

        Raises:
            FileNotFoundError: the folder holds no `subwords.model` and `preparation.json`.
        """
        try:
            model = Path(folder, MODEL_FILE).read_bytes()
            preparation = json.loads(Path(folder, PREPARATION_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"folder: {folder} was not written by prepare: no {error.filename}") from None
        lowercase, moses = preparation["lowercase"], preparation["moses"]
        sides = [TextForm(preparation[f"{side}_language"], lowercase, moses) for side in ("source", "target")]
        return cls(model, *sides)

    @property
    def vocab_size(self) -> int:
        """Number of ids, the special ones included."""
        return self.processor.get_piece_size()

    def encode(self, texts: Sequence[str], side: str = "source") -> list[list[int]]:
        """The ids of raw sentences, each ended by `eos_id`.

        Args:
            texts: as a person writes them.
            side: "source" or "target", whose language they are in.
        """
        normalize = self.forms[side].normalize
        return self.processor.encode([normalize(text) for text in texts], add_eos=True)

    def decode(self, ids: Sequence[Sequence[int]], side: str = "target", restore: bool = True) -> list[str]:
        """The sentences of ids; padding and ends of sentence are left out.

        Args:
            ids: of every sentence.
            side: "source" or "target", whose language they are in.
            restore: undo Moses tokenisation, if the data folder has it; False leaves the tokens apart, as scores on
                tokenised text want them.
        """
        texts = [self.processor.decode([int(id) for id in sentence]).strip() for sentence in ids]
        return [self.forms[side].restore(text) for text in texts] if restore else texts
