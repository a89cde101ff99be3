"""Words <-> ids, and the papers' clean-up of captions."""

from pathlib import Path

import pytest
import torch

from blip.tokenizer import Tokenizer, clean_caption, write_vocabulary

WORDS = ["a", "cat", "##s", "picture", "of", "two", "dogs", ",", "'", "[", "]", "sep", "enc"]
PAD, UNK, CLS, SEP, A, CAT = 0, 1, 2, 3, 5, 6
DEC, ENC = 5 + len(WORDS), 6 + len(WORDS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("words")
    write_vocabulary(WORDS, folder)
    return Tokenizer(folder)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [  # worked out by hand from `pre_caption` of salesforce/BLIP
        ("A Man riding a WAVE", "a man riding a wave"),
        ('the "best" cat (ever)!', "the best cat ever"),
        ("price: $5.99 *new* #sale; ~50%", "price $5 99 new sale 50%"),
        ("two   dogs\n\nand\ta cat \n", "two dogs and a cat"),
        ("well-known, isn't it?", "well-known, isn't it?"),
        ("...!!", ""),
        ("", ""),
        ("photo.by.me", "photo by me"),
    ],
)
def test_a_caption_is_cleaned_as_in_blip(text: str, cleaned: str) -> None:
    assert clean_caption(text) == cleaned


def test_a_caption_is_cut_after_so_many_words() -> None:
    text = " ".join(f"w{i}." for i in range(60))
    assert clean_caption(text) == " ".join(f"w{i}" for i in range(30))
    assert clean_caption(text, max_words=2) == "w0 w1"


def test_ids_of_the_two_new_tokens_follow_the_vocabulary(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad, tokenizer.cls, tokenizer.sep) == (PAD, CLS, SEP)
    assert (tokenizer.dec, tokenizer.enc) == (DEC, ENC)
    assert len(tokenizer) == 5 + len(WORDS) + 2


def test_with_berts_number_of_words_the_ids_are_those_of_blips_checkpoints(tmp_path: Path) -> None:
    write_vocabulary([f"w{i}" for i in range(30522 - 5)], tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.dec, tokenizer.enc, len(tokenizer)) == (30522, 30523, 30524)


def test_texts_become_padded_ids(tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer(["a CATS", "two zebras, a cat"], 40)
    assert ids.tolist() == [[CLS, A, CAT, 7, SEP, PAD, PAD], [CLS, 10, UNK, 12, A, CAT, SEP]]
    assert mask.tolist() == [[1, 1, 1, 1, 1, 0, 0], [1] * 7]
    assert ids.dtype == mask.dtype == torch.int64


def test_a_text_that_is_cut_still_ends(tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer(["a cat a cat a cat", "a"], 5)
    assert ids.tolist() == [[CLS, A, CAT, A, SEP], [CLS, A, SEP, PAD, PAD]]
    assert mask.tolist() == [[1] * 5, [1, 1, 1, 0, 0]]


def test_a_text_cannot_smuggle_special_tokens(tokenizer: Tokenizer) -> None:
    """Texts are strangers' words. "[SEP]" spelt out is not an end, "[ENC]" no begin."""
    ids, _ = tokenizer(["a [SEP] cat [ENC] [PAD]"], 40)
    assert ids.tolist() == [[CLS, A, 14, 16, 15, CAT, 14, 17, 15, 14, UNK, 15, SEP]]
    assert tokenizer.prompt("a [SEP]").tolist() == [DEC, A, 14, 16, 15]


def test_a_prompt_begins_with_dec_and_does_not_end(tokenizer: Tokenizer) -> None:
    assert tokenizer.prompt("a picture of ").tolist() == [DEC, A, 8, 9]
    assert tokenizer.prompt("").tolist() == [DEC]


def test_ids_become_texts_again(tokenizer: Tokenizer) -> None:
    texts = ["a cats of two dogs", "a picture"]
    assert tokenizer.decode(tokenizer(texts, 40)[0]) == texts
    ids = torch.tensor([[DEC, A, CAT, SEP, A, A], [ENC, CLS, A, PAD, CAT, PAD]])
    assert tokenizer.decode(ids) == ["a cat", "a cat"]
    assert tokenizer.decode(torch.tensor([[SEP, A]])) == [""]


def test_a_saved_tokenizer_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again, texts = Tokenizer(tmp_path), ["a cats, [SEP] two zebras'", "of"]
    assert [x.tolist() for x in again(texts, 7)] == [x.tolist() for x in tokenizer(texts, 7)]
    assert (len(again), again.dec, again.enc) == (len(tokenizer), DEC, ENC)


def test_a_folder_without_a_vocabulary_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"holds no vocabulary; expected tokenizer\.json or vocab\.txt"
    ) as error:
        Tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_vocabulary_that_is_nowhere_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder and cannot be had"):
        Tokenizer(tmp_path / "missing")
