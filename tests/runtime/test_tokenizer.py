import pytest
from bpe import TEXT, bpe_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from minicache_trt.errors import UserError
from minicache_trt.runtime.detokenizer import Detokenizer, TokenDecoder
from minicache_trt.runtime.tokenizer import load_tokenizer

texts = st.text(st.sampled_from("ab st.op é猫🐱👩‍🚀\n"), max_size=25)


def stream(token_ids, prompt_ids=(), stop=()):
    """All deltas, and the detokenizer after the last."""
    detokenizer = Detokenizer(TokenDecoder(bpe_tokenizer()), list(prompt_ids), tuple(stop))
    deltas = []
    for token in token_ids:
        detokenizer.append(token)
        deltas.append(detokenizer.take())
        if detokenizer.stop_match is not None:
            break
    detokenizer.close()
    deltas.append(detokenizer.take())
    return deltas, detokenizer


def decode(token_ids):
    return bpe_tokenizer().decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@settings(max_examples=150, deadline=None)
@given(texts, texts)
def test_deltas_add_up_to_the_text(prompt, text):
    tokenizer = bpe_tokenizer()
    deltas, detokenizer = stream(tokenizer.encode(text), tokenizer.encode(prompt))
    assert "".join(deltas) == text == detokenizer.text
    assert not any("\ufffd" in delta for delta in deltas)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 299), max_size=15), st.integers(0, 8))
def test_random_tokens_decode_as_a_whole(token_ids, prompt_len):
    """Random tokens are mostly not UTF-8: what is emitted must still be the decoded whole."""
    prompt, output = token_ids[:prompt_len], token_ids[prompt_len:]
    if decode(prompt).endswith("\ufffd"):
        prompt = []
    deltas, detokenizer = stream(output, prompt)
    assert "".join(deltas) == detokenizer.text == decode(output)


def test_a_character_is_held_until_it_is_complete():
    token_ids = bpe_tokenizer().encode("👩‍🚀!")
    assert len(token_ids) > 6
    deltas, _ = stream(token_ids)
    assert [delta for delta in deltas if delta] == ["👩", "\u200d", "🚀", "!"]
    deltas, _ = stream(token_ids[:2])
    assert deltas == ["", "", "\ufffd"], "the output may end inside a character"


@settings(max_examples=200, deadline=None)
@given(texts, st.lists(st.text(st.sampled_from("ab stop猫"), min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings_cut_the_text_wherever_tokens_end(text, stops):
    deltas, detokenizer = stream(bpe_tokenizer().encode(text), stop=stops)
    found = [text.find(stop) for stop in stops if stop in text]
    joined = "".join(deltas)
    assert joined == detokenizer.text
    if not found:
        assert joined == text and detokenizer.stop_match is None
    else:
        assert detokenizer.stop_match in stops
        assert text.startswith(joined + detokenizer.stop_match)
        # Tokens may reveal a later, shorter stop string before an earlier, longer one is complete.
        assert len(joined) >= min(found)
        assert not any(stop in joined for stop in stops)


def test_possible_beginnings_of_a_stop_string_are_held_back():
    tokenizer = bpe_tokenizer()
    token_ids = [i for part in ("the ", "st", "o", "x") for i in tokenizer.encode(part)]
    deltas, _ = stream(token_ids, stop=["stop"])
    assert not any(delta.endswith(("s", "st", "sto")) for delta in deltas)
    assert "".join(deltas) == "the stox"


def test_special_tokens_do_not_show():
    eos = bpe_tokenizer().eos_token_id
    assert "".join(stream([*bpe_tokenizer().encode("the"), eos])[0]) == "the"


def test_load_tokenizer(tmp_path):
    assert load_tokenizer(tmp_path) is None
    bpe_tokenizer().save_pretrained(tmp_path / "good")
    tokenizer = load_tokenizer(tmp_path / "good")
    assert [tokenizer.encode(text) for text in TEXT] == [bpe_tokenizer().encode(text) for text in TEXT]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer: cannot load the tokenizer in"):
        load_tokenizer(tmp_path)


class Shouting(PreTrainedTokenizerFast):
    """Changes what the library behind it says."""

    def _decode(self, *arguments, **options):
        return super()._decode(*arguments, **options).upper()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 299), max_size=15))
def test_the_short_way_to_the_library_changes_nothing(token_ids):
    tokenizer = bpe_tokenizer()
    assert TokenDecoder(tokenizer)(token_ids) == decode(token_ids)
    shouting = Shouting(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    assert TokenDecoder(shouting)(token_ids) == decode(token_ids).upper()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 299), max_size=8), st.integers(0, 299))
def test_a_piece_is_what_a_token_adds(before, token):
    """To any text of whole characters; tokens that end inside one have no piece, nor have special ones."""
    decoder = TokenDecoder(bpe_tokenizer())
    piece = decoder.piece(token)
    if piece is None:
        assert decode([token]) == "" or decode([token]).endswith("\ufffd")
    elif not decode(before).endswith("\ufffd"):
        assert decode([*before, token]) == decode(before) + piece == decode(before) + (decoder.piece(token) or "")


def test_pieces_are_for_byte_level_tokenizers_only():
    """A sentencepiece tokenizer loses the space before the first word of what it decodes."""
    tokenizer = Tokenizer(models.BPE({"\u2581a": 0, "b": 1}, []))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    decoder = TokenDecoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert decoder([0, 0]) == "a a" and decoder.piece(0) is None
    detokenizer = Detokenizer(decoder, [], ())
    for token in (0, 1, 0):
        detokenizer.append(token)
    assert detokenizer.text == "ab a"
