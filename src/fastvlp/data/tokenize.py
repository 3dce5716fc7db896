"""Converts text to ids and back, with any tokenizer.json, or with a WordPiece or byte-level BPE tokenizer that is trained on
the run's own texts."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from fastvlp.errors import UserError
from fastvlp.files import read_plain, write_whole

_ROLES = {
    "pad": ("[PAD]", "<pad>", "<|pad|>"),
    "bos": ("[CLS]", "<s>", "<bos>", "<|startoftext|>"),
    "eos": ("[SEP]", "</s>", "<eos>", "<|endoftext|>"),
    "mask": ("[MASK]", "<mask>", "<|mask|>"),
}
_WORDPIECE_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_BPE_SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]

# A token of more characters than this is never cut short by `encode`; longer texts are cut before they are tokenised.
_CHARS_PER_TOKEN = 64

_HAN = "\u2e80-\u2fdf\u3000-\u303f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef"
_SPACE_BETWEEN_HAN = re.compile(f"(?<=[{_HAN}]) +(?=[{_HAN}])")


class Reading(NamedTuple):
    """The way in which the tokenizer reads a text.

    Attributes:
        tokens: Number of tokens before it is cut, including <s> and </s>.
        cut: The end of the text that is not read; empty if the whole text is read.
        unknown: Unknown words in the part that is read, each once. These become the token for unknown words, or pieces with
            fewer than two bytes each.
    """

    tokens: int
    cut: str
    unknown: list[str]


class Tokenizer:
    """A `tokenizers.Tokenizer` with the four special tokens that the objectives need. Picklable, for loader workers.

    Attributes:
        pad, bos, eos, mask: ids of the special tokens.
        vocab_size: size of the vocabulary, V, including added tokens.
        added: the roles (pad, bos, eos or mask) for which the vocabulary had no token, so that one was added.
        starts_word: whether each token begins a word, bool [V]; False for continuation pieces and for pad, bos, eos and mask.
            A Chinese character is a word. A byte-level vocabulary without a leading space does not mark the first word of a
            text, so the token after <s> always begins a word.
    """

    def __init__(self, inner: tokenizers.Tokenizer, source: str = "tokenizer", *, complete: bool = False):
        """`complete` adds a token at the end of the vocabulary for each role that it lacks; CLIP's lacks padding and mask."""
        inner.no_padding()
        inner.no_truncation()
        self._inner = inner
        self.added: tuple[str, ...] = ()
        if complete:
            known = inner.get_vocab(with_added_tokens=True)
            self.added = tuple(role for role, names in _ROLES.items() if not any(name in known for name in names))
            if self.added and len(known) <= max(known.values()):
                # A new token would get the id of an existing one.
                raise UserError(
                    f"{source}: some ids have no token, so that no tokens can be added; it lacks {self.added}"
                )
            inner.add_special_tokens([_ROLES[role][-1] for role in self.added])
        # In some vocabularies, some ids have no token.
        vocabulary = inner.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values(), default=0)
        if self.vocab_size > 4 * len(vocabulary) + 100_000:
            raise UserError(
                f"{source}: {len(vocabulary)} tokens have ids up to {self.vocab_size - 1}, and a model has a row for each id; "
                f"number the tokens from 0"
            )
        self.pad = _special(inner, "pad", source)
        self.bos = _special(inner, "bos", source)
        self.eos = _special(inner, "eos", source)
        self.mask = _special(inner, "mask", source)
        self._unknown = _unknown(inner)
        self.starts_word = _starts_word(inner)
        self.starts_word[[self.pad, self.bos, self.eos, self.mask]] = False

    @classmethod
    def load(cls, path: str | Path, *, complete: bool = False) -> Tokenizer:
        """Reads a tokenizer.json.

        Args:
            complete: add the special tokens that a vocabulary lacks; CLIP's lacks padding and the mask.

        Raises UserError if the file is missing, is not a tokenizer.json, or lacks a special token.
        """
        path = Path(path)
        try:
            text = read_plain(path).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path}: cannot read a tokenizer here ({error}); give the path of a tokenizer.json"
            ) from error
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path}: not a tokenizer.json of the `tokenizers` library ({error})") from error
        return cls(inner, str(path), complete=complete)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        kind: Literal["wordpiece", "bpe"] = "wordpiece",
        vocab_size: int = 8192,
        lowercase: bool = True,
    ) -> Tokenizer:
        """Trains a tokenizer of at most `vocab_size` tokens. Chinese needs no segmentation: for WordPiece each character is a
        word (as in BERT), and BPE works on bytes."""
        train = {"wordpiece": _train_wordpiece, "bpe": _train_bpe}.get(kind)
        if train is None:
            raise UserError(f"tokenizer kind {kind!r}: choose wordpiece or bpe")
        return cls(train(texts, vocab_size, lowercase), f"trained {kind}")

    def save(self, path: str | Path) -> None:
        write_whole(Path(path), self._inner.to_str(pretty=True).encode())

    def copy(self) -> tokenizers.Tokenizer:
        """Returns a copy of the underlying tokenizer."""
        return tokenizers.Tokenizer.from_str(self._inner.to_str())

    def with_prefix(self, prefix: str) -> Tokenizer:
        """Returns a tokenizer that puts `prefix` before every text, such as "query: " for e5 (arXiv 2212.03533). The prefix is
        saved in tokenizer.json, so every program that reads this file adds it too."""
        inner = tokenizers.Tokenizer.from_str(self._inner.to_str())
        own = [] if inner.normalizer is None else [inner.normalizer]
        inner.normalizer = normalizers.Sequence([normalizers.Prepend(prefix), *own])
        prefixed = Tokenizer(inner, "tokenizer")
        prefixed.added = self.added
        return prefixed

    @property
    def fingerprint(self) -> str:
        """Returns a hash of everything that decides the ids of a text."""
        return hashlib.sha256(self._inner.to_str().encode()).hexdigest()

    def encode(self, texts: list[str], max_length: int) -> tuple[Tensor, Tensor]:
        """Returns ids int64 [B L], `<s> words </s>` padded on the right to the longest, and length int64 [B].

        A text of more than `max_length` tokens is cut at its end, and keeps its </s>.
        """
        encodings, words = self._cut(texts, max_length)
        rows = [[self.bos, *encoding.ids[:kept], self.eos] for encoding, kept in zip(encodings, words)]
        length_B = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        longest = max(map(len, rows), default=2)
        padded = [row + [self.pad] * (longest - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64).reshape(len(rows), longest), length_B

    def lengths(self, texts: Sequence[str], max_length: int) -> Tensor:
        """Returns the length int64 [B] that `encode` would return for each text, without its ids."""
        return torch.tensor(self._cut(texts, max_length)[1], dtype=torch.int64) + 2

    def _cut(self, texts: Sequence[str], max_length: int) -> tuple[list[Any], list[int]]:
        """Returns the encoding of each text, and the number of tokens for which there is room beside <s> and </s>."""
        if max_length < 2:
            raise ValueError(f"max_length {max_length} leaves no room for <s> and </s>")
        # It would be a waste to tokenise 100,000 characters if only 50 tokens are kept.
        cut = [text[: max_length * _CHARS_PER_TOKEN] for text in texts]
        encodings = self._inner.encode_batch_fast(cut, add_special_tokens=False)
        return encodings, [min(len(encoding), max_length - 2) for encoding in encodings]

    def readings(self, texts: Sequence[str], max_length: int) -> list[Reading]:
        """Returns for each text which part `encode` reads, and which of its words are unknown."""
        encodings = self._inner.encode_batch([*texts], add_special_tokens=False)
        return [self._reading(text, encoding, max_length - 2) for text, encoding in zip(texts, encodings)]

    def _reading(self, text: str, encoding: Any, room: int) -> Reading:
        pieces: dict[int, list[int]] = {}
        for place, word in enumerate(encoding.word_ids[:room]):
            pieces.setdefault(-1 - place if word is None else word, []).append(place)
        unknown = []
        for places in pieces.values():
            begin, end = encoding.offsets[places[0]][0], encoding.offsets[places[-1]][1]
            word = text[begin:end].strip()
            split = len(word.encode()) < 2 * len(places) and len(places) > 1
            if not _is_punctuation(word) and (split or self._unknown in [encoding.ids[place] for place in places]):
                unknown.append(word)
        cut = text[encoding.offsets[room][0] :].strip() if len(encoding.ids) > room else ""
        return Reading(len(encoding.ids) + 2, cut, list(dict.fromkeys(unknown)))

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """Returns the text of ids, without special tokens and without the spaces that WordPiece puts between Chinese
        characters."""
        text = self._inner.decode([int(i) for i in ids], skip_special_tokens=True)
        return _SPACE_BETWEEN_HAN.sub("", text).strip()

    def token(self, i: int) -> str:
        return self._inner.id_to_token(i) or ""


def with_new_ends(words: Tokenizer) -> Tokenizer:
    """Returns the tokenizer with <bos> and <eos> in the roles of <s> and </s>, as FLM's released code writes captions. If it
    lacks them, they are added at its end. The old tokens keep their ids under other names."""
    spec = json.loads(words._inner.to_str())
    bos, eos = words.token(words.bos), words.token(words.eos)
    names = {bos: f"[unused {bos}]", eos: f"[unused {eos}]", "<bos>": bos, "<eos>": eos}
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    vocab = spec["model"]["vocab"]
    spec["model"]["vocab"] = {names.get(token, token): i for token, i in vocab.items()}
    # The post-processor puts the old tokens around a text.
    spec["post_processor"] = None
    inner = tokenizers.Tokenizer.from_str(json.dumps(spec))
    inner.add_special_tokens([bos, eos])
    return Tokenizer(inner, "tokenizer")


def _special(inner: tokenizers.Tokenizer, role: str, source: str) -> int:
    for name in _ROLES[role]:
        if (token := inner.token_to_id(name)) is not None:
            return token
    raise UserError(
        f"{source}: no {role} token, looked for {', '.join(_ROLES[role])}; "
        f"add one to the vocabulary with tokenizers.Tokenizer.add_special_tokens and save it again"
    )


def _is_punctuation(word: str) -> bool:
    return all(unicodedata.category(letter)[0] in "PZ" for letter in word)


def _unknown(inner: tokenizers.Tokenizer) -> int | None:
    """Returns the token for words that cannot be split into known pieces; None for a byte-level vocabulary, which can split all
    words."""
    model = json.loads(inner.to_str())["model"]
    name = model.get("unk_token")
    return inner.token_to_id(name) if name else model.get("unk_id")


def _starts_word(inner: tokenizers.Tokenizer) -> Tensor:
    size = 1 + max(inner.get_vocab(with_added_tokens=True).values())
    tokens = [inner.id_to_token(i) or "" for i in range(size)]
    spec = json.loads(inner.to_str())
    model = spec["model"]
    if model.get("type") == "WordPiece":
        prefix = model["continuing_subword_prefix"]
        return torch.tensor([not token.startswith(prefix) for token in tokens])
    if '"ByteLevel"' in json.dumps([spec["pre_tokenizer"], spec["decoder"]]):
        # In the byte alphabet \u0120 is the space; bytes 0xE4 to 0xE9 stand for themselves there, and begin the UTF-8 of a
        # Chinese character.
        return torch.tensor([token[:1] == "\u0120" or "\xe4" <= token[:1] <= "\xe9" for token in tokens])
    if model.get("type") == "Unigram" or '"Metaspace"' in json.dumps(spec["pre_tokenizer"]):
        han = re.compile(f"\u2581|[{_HAN}]")
        return torch.tensor([han.match(token) is not None for token in tokens])
    return torch.ones(len(tokens), dtype=torch.bool)


def _train_wordpiece(texts: Iterable[str], vocab_size: int, lowercase: bool) -> tokenizers.Tokenizer:
    normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=lowercase, lowercase=lowercase
    )
    splitter = pre_tokenizers.BertPreTokenizer()
    words = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    # The trainer numbers continuation letters in the order of a randomly seeded hash map, and the numbers decide ties between
    # merges: the same corpus would give another vocabulary each time. Listed first, they have fixed numbers.
    letters = sorted({f"##{letter}" for word in words for letter in word[1:]})
    learner = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*_WORDPIECE_SPECIALS, *letters],
        min_frequency=2,
        show_progress=False,
    )
    learner.train_from_iterator((" ".join([word] * words[word]) for word in sorted(words)), trainer)

    inner = tokenizers.Tokenizer(models.WordPiece(learner.get_vocab(), unk_token="[UNK]"))
    inner.normalizer = normalizer
    inner.pre_tokenizer = splitter
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    inner.add_special_tokens(_WORDPIECE_SPECIALS)
    return inner


def _train_bpe(texts: Iterable[str], vocab_size: int, lowercase: bool) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.normalizer = normalizers.Sequence([normalizers.NFC(), *([normalizers.Lowercase()] if lowercase else [])])
    # The space in front marks the first word of a text like every other word.
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_BPE_SPECIALS,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return inner
