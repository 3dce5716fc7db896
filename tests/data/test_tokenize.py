import pickle
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models

from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError

ENGLISH = [
    "A red square stands left of two blue circles.",
    "Two dogs running, one jumping!",
    "The squares are reddish.",
]
CHINESE = ["两只狗在草地上奔跑。", "红色的正方形在蓝色的圆形左边。", "一只猫坐在桌子上。"]


@pytest.fixture(scope="module", params=["wordpiece", "bpe"])
def tokenizer(request) -> Tokenizer:
    return Tokenizer.train((ENGLISH + CHINESE) * 3, request.param, vocab_size=600)


def test_text_survives_the_round_trip(tokenizer):
    for text in ENGLISH + CHINESE:
        ids, length = tokenizer.encode([text], 100)
        assert tokenizer.decode(ids[0]) == text.lower()
        assert length.tolist() == [ids.shape[1]]


def test_rows_are_framed_and_padded_to_the_longest_of_the_batch(tokenizer):
    ids, length = tokenizer.encode([ENGLISH[0], "two dogs", ""], 50)
    assert ids.dtype == length.dtype == torch.int64
    assert ids.shape == (3, int(length.max()))
    assert length[2] == 2
    for row, n in zip(ids.tolist(), length.tolist()):
        assert row[0] == tokenizer.bos
        assert row[n - 1] == tokenizer.eos
        assert row[n:] == [tokenizer.pad] * (len(row) - n)
    alone, _ = tokenizer.encode(["two dogs"], 50)
    assert torch.equal(ids[1, : length[1]], alone[0])
    assert tokenizer.encode([], 50)[0].shape[0] == 0


def test_a_text_too_long_is_cut_and_keeps_its_end_token(tokenizer):
    ids, length = tokenizer.encode([ENGLISH[0]], 6)
    full, _ = tokenizer.encode([ENGLISH[0]], 60)
    assert length.tolist() == [6]
    assert ids[0, -1] == tokenizer.eos
    assert torch.equal(ids[0, :5], full[0, :5])
    with pytest.raises(ValueError, match="max_length 1"):
        tokenizer.encode(["two"], 1)


@pytest.mark.parametrize("max_length", [2, 3, 6, 50])
def test_lengths_are_those_of_the_rows(tokenizer, max_length):
    texts = [*ENGLISH, *CHINESE, "", "two", "x" * (64 * max_length + 5), ENGLISH[0] * 200]
    assert torch.equal(tokenizer.lengths(texts, max_length), tokenizer.encode(texts, max_length)[1])
    with pytest.raises(ValueError, match="max_length 1"):
        tokenizer.lengths(["two"], 1)


def test_of_a_hundred_thousand_characters_only_the_beginning_is_tokenised(tokenizer, monkeypatch):
    inner, tokenised = tokenizer._inner, []

    def encode(texts, **options):
        tokenised.extend(texts)
        return inner.encode_batch_fast(texts, **options)

    monkeypatch.setattr(tokenizer, "_inner", SimpleNamespace(encode_batch_fast=encode))
    texts = ["two dogs " * 12_000, "x" * 100_000, "狗" * 100_000]
    ids, _ = tokenizer.encode(texts, 50)
    assert len(tokenised) == 3 and all(len(text) <= 5_000 for text in tokenised)
    assert ids.shape[1] <= 50


def test_training_twice_gives_the_same_ids(tokenizer):
    kind = "bpe" if tokenizer.token(0) == "<s>" else "wordpiece"
    again = Tokenizer.train(iter((ENGLISH + CHINESE) * 3), kind, vocab_size=600)
    assert [again.token(i) for i in range(again.vocab_size)] == [
        tokenizer.token(i) for i in range(tokenizer.vocab_size)
    ]


def test_word_starts(tokenizer):
    assert tokenizer.starts_word.shape == (tokenizer.vocab_size,)
    assert tokenizer.starts_word.dtype == torch.bool
    assert not tokenizer.starts_word[[tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.mask]].any()
    ids, length = tokenizer.encode(["squaredog dogs", "两只狗"], 50)
    # "squaredog" is in no vocabulary: it takes several pieces, and only the first begins a word.
    pieces = ids[0, 1 : length[0] - 1]
    assert len(pieces) > 2
    assert tokenizer.starts_word[pieces].sum() == 2
    assert tokenizer.starts_word[pieces[0]]
    assert tokenizer.starts_word[ids[1, 1]]


def test_in_wordpiece_every_chinese_character_is_a_word():
    tokenizer = Tokenizer.train(CHINESE * 3, "wordpiece", vocab_size=200)
    ids, _ = tokenizer.encode(["红色的狗"], 50)
    assert [tokenizer.token(i) for i in ids[0, 1:-1].tolist()] == ["红", "色", "的", "狗"]
    assert tokenizer.starts_word[ids[0, 1:-1]].all()


def test_saved_loaded_and_pickled_are_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    for copy in (Tokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(tokenizer))):
        for a, b in zip(copy.encode(ENGLISH + CHINESE, 40), tokenizer.encode(ENGLISH + CHINESE, 40)):
            assert torch.equal(a, b)
        assert torch.equal(copy.starts_word, tokenizer.starts_word)
        assert (copy.pad, copy.bos, copy.eos, copy.mask) == (
            tokenizer.pad,
            tokenizer.bos,
            tokenizer.eos,
            tokenizer.mask,
        )


def test_a_loaded_file_that_pads_and_truncates_does_neither_here(tokenizer, tmp_path):
    raw = RawTokenizer.from_str(tokenizer._inner.to_str())
    raw.enable_truncation(4)
    raw.enable_padding(length=64)
    raw.save(str(tmp_path / "t.json"))
    ids, _ = Tokenizer.load(tmp_path / "t.json").encode(ENGLISH, 60)
    assert torch.equal(ids, tokenizer.encode(ENGLISH, 60)[0])


def test_errors_name_the_file_and_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"missing\.json.*path of a tokenizer\.json"):
        Tokenizer.load(tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match=r"bad\.json: not a tokenizer\.json"):
        Tokenizer.load(tmp_path / "bad.json")
    RawTokenizer(models.WordLevel({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2}, unk_token="[PAD]")).save(
        str(tmp_path / "nomask.json")
    )
    with pytest.raises(UserError, match=r"nomask\.json: no mask token, looked for \[MASK\].*add_special_tokens"):
        Tokenizer.load(tmp_path / "nomask.json")
    with pytest.raises(UserError, match=r"wordpiece.*bpe"):
        Tokenizer.train(ENGLISH, "unigram")  # type: ignore[arg-type]


def test_a_vocabulary_without_special_tokens_gets_them(tmp_path):
    path = tmp_path / "tokenizer.json"
    RawTokenizer(models.WordLevel({"</s>": 0, "[UNK]": 1, "red": 2}, unk_token="[UNK]")).save(str(path))
    with pytest.raises(UserError, match="no pad token"):
        Tokenizer.load(path)
    whole = Tokenizer.load(path, complete=True)
    assert set(whole.added) == {"pad", "bos", "mask"} and whole.vocab_size == 6 and len(whole.starts_word) == 6
    whole.save(path)
    again = Tokenizer.load(path, complete=True)
    assert again.added == () and (again.pad, again.bos, again.eos, again.mask) == (whole.pad, whole.bos, 0, whole.mask)


def test_numbers_without_a_token_count_and_leave_no_room_for_new_ones(tmp_path):
    path = tmp_path / "tokenizer.json"
    words = {"<s>": 0, "</s>": 1, "<pad>": 2, "[UNK]": 3, "<mask>": 9}
    RawTokenizer(models.WordLevel(words, unk_token="[UNK]")).save(str(path))
    assert Tokenizer.load(path, complete=True).vocab_size == len(Tokenizer.load(path).starts_word) == 10
    del words["<pad>"]
    RawTokenizer(models.WordLevel(words, unk_token="[UNK]")).save(str(path))
    with pytest.raises(UserError, match="pad"):
        Tokenizer.load(path, complete=True)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_a_prefix_is_read_as_if_it_were_written(kind, tmp_path):
    plain = Tokenizer.train(["query: a red box and a blue ball"] * 3, kind, vocab_size=300)
    plain.with_prefix("query: ").save(tmp_path / "tokenizer.json")
    prefixed = Tokenizer.load(tmp_path / "tokenizer.json")
    texts = ["a red box", "Ball"]
    expected = plain.encode([f"query: {text}" for text in texts], 20)
    assert all(map(torch.equal, prefixed.encode(texts, 20), expected))
    assert not torch.equal(plain.encode(texts, 20)[0], expected[0])
    assert prefixed.readings(["a red xylophone"], 20)[0].unknown == ["xylophone"]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_unknown_words_are_those_in_letters(kind):
    tokenizer = Tokenizer.train(["a red circle", "红色的圆", "two blue squares"] * 50, kind, 400)
    (reading,) = tokenizer.readings(["a red xylophone, 红色 blue xylophone"], 100)
    assert reading.unknown == ["xylophone"] and reading.cut == ""
    (reading,) = tokenizer.readings(["red blue squares circle"], 5)
    assert reading.cut == "circle" and reading.tokens == 6 and reading.unknown == []
