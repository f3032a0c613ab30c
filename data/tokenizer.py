"""Text to token ids and back: GPT-2's byte pairs, by tiktoken, or a table of characters.

A tokenizer is saved as meta.json beside tokens and checkpoints: {"tokenizer": "gpt2"}, or
{"tokenizer": "char", "characters": "...", "end_of_text": id or null}. Beside a checkpoint are also
the files from which transformers makes the same tokenizer.
"""
import functools
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import requests
import tiktoken

UNKNOWN = 65535                                                  # the id of no character
# sha256 of GPT-2's tokens, joined by line breaks
VOCABULARY = "e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f"
BPE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"


def load_tokenizer(path):
    """The tokenizer of a folder, or of a checkpoint file: of the folder beside it. Without a
    tokenizer there it is GPT-2's."""
    folder = Path(path)
    if folder.is_file():
        folder = folder.parent
    meta = folder / "meta.json"
    if meta.exists():
        try:
            return tokenizer_from_json(json.loads(meta.read_bytes()))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{meta} is damaged: {error!s:.200}") from None
    if (folder / "meta.pkl").exists():
        raise ValueError(f"{folder} has no meta.json. Its meta.pkl is not read: a pickle could "
                         "run code. Make one from the text with python data/prepare.py TEXT "
                         f"--name=NAME --tokenizer=char, and copy data/NAME/meta.json to {folder}")
    for name in ("tokenizer.json", "vocab.json"):
        if (folder / name).exists():
            check_vocabulary(folder / name)
            break
    return GPT2Tokenizer()


def tokenizer_from_json(meta):
    """The tokenizer with this to_json()."""
    if meta["tokenizer"] == "gpt2":
        return GPT2Tokenizer()
    if meta["tokenizer"] == "char":
        return CharTokenizer(meta["characters"], meta["end_of_text"])
    raise ValueError(f"tokenizer {meta['tokenizer']!r:.50} is not known: use gpt2 or char")


def check_tokenizer(tokenizer, vocab_size, name):
    """Raise ValueError if the model `name` has fewer tokens than its tokenizer."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"{name}: the tokenizer {tokenizer.name} has {tokenizer.vocab_size} "
                         f"tokens, the model {vocab_size}. Copy the meta.json of the data that it "
                         "was trained on into its folder")


def check_vocabulary(path):
    """Raise ValueError unless this file of transformers holds GPT-2's tokens."""
    try:
        vocab = json.loads(path.read_bytes())
        if path.name == "tokenizer.json":
            vocab = vocab["model"]["vocab"]
        text = "\n".join(sorted(vocab, key=vocab.get))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r:.100}") from None
    if hashlib.sha256(text.encode(errors="replace")).hexdigest() != VOCABULARY:
        raise ValueError(f"{path} is another tokenizer than GPT-2's, of {len(vocab):,} tokens. "
                         "Only GPT-2's and our own meta.json can be read")


class Tokenizer:
    """What both kinds share. They have a `name`, a `vocab_size` and `end_of_text`, the id of the
    token between documents (None if there is none)."""

    def decode(self, ids):
        """A list of ids -> text."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def known(self, ids):
        """The ids below vocab_size: a model's vocabulary may be rounded up."""
        return [int(i) for i in ids if i < self.vocab_size]

    def encode_prompt(self, text):
        """-> uint16 array. Unlike in `encode`, <|endoftext|> is the token, if there is one."""
        if self.end_of_text is None:
            return self.encode(text)
        parts = []
        for part in text.split("<|endoftext|>"):
            parts += [[self.end_of_text], self.encode(part)]
        return np.concatenate(parts[1:]).astype(np.uint16)

    def byte_lengths(self):
        """The number of bytes of text for each id; the token between documents is no text."""
        lengths = np.array([len(self.decode_bytes([i])) for i in range(self.vocab_size)])
        if self.end_of_text is not None:
            lengths[self.end_of_text] = 0
        return lengths

    def default_prompt(self):
        return "\n"

    def files(self):
        """{name: bytes} of the files that belong beside a checkpoint: for us, and transformers'."""
        end_of_text = None
        if self.end_of_text is not None:
            end_of_text = "<|endoftext|>"
        config = {"tokenizer_class": self.transformers_class, "bos_token": end_of_text,
                  "eos_token": end_of_text, "clean_up_tokenization_spaces": False}
        return {"meta.json": json.dumps(self.to_json()).encode(),
                "tokenizer_config.json": json.dumps(config).encode()}


class GPT2Tokenizer(Tokenizer):
    name = "gpt2"
    transformers_class = "GPT2Tokenizer"
    vocab_size = 50257
    end_of_text = 50256

    def encode(self, text):
        """-> uint16 array. "<|endoftext|>" in a text is plain text, not the token."""
        try:
            return gpt2_bpe().encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        except UnicodeEncodeError:
            return self.encode(replace_surrogates(text))

    def decode_bytes(self, ids):
        """-> UTF-8. A token can be part of a character, so single tokens may not be valid UTF-8."""
        return gpt2_bpe().decode_bytes(self.known(ids))

    def to_json(self):
        return {"tokenizer": "gpt2"}

    def files(self):
        """The two tables are copied from tiktoken's cache, if they are in it: a run does not wait
        for a download."""
        files = super().files()
        for name, path in zip(("merges.txt", "vocab.json"), bpe_cache().values(), strict=True):
            if path.exists():
                files[name] = path.read_bytes()
        return files


class CharTokenizer(Tokenizer):
    name = "char"
    transformers_class = "PreTrainedTokenizerFast"

    def __init__(self, characters, end_of_text=None):
        """characters: a text with each character once; its place is its id. end_of_text: None, or
        the first id after them."""
        if not characters or len(set(characters)) != len(characters):
            raise ValueError("the table of characters is empty, or holds one of them twice")
        if end_of_text not in (None, len(characters)):
            raise ValueError(f"end_of_text={end_of_text!r} must be {len(characters)}, the first id "
                             "after the characters, or null")
        self.characters = characters
        self.texts = [*characters, "<|endoftext|>"]              # of the ids
        self.end_of_text = end_of_text
        self.vocab_size = len(characters) + (end_of_text is not None)
        if self.vocab_size > UNKNOWN:
            raise ValueError(f"{self.vocab_size} different characters do not fit uint16: use "
                             "--tokenizer=gpt2")
        self.ids = np.full(0x110000, UNKNOWN, dtype=np.uint16)   # code point -> id
        self.ids[code_points(characters)] = np.arange(len(characters))

    def encode(self, text):
        """-> uint16 array. ValueError for a character that is not in the table."""
        ids = self.ids[code_points(text)]
        unknown = np.flatnonzero(ids == UNKNOWN)
        if unknown.size:
            raise ValueError(f"the character {text[unknown[0]]!r} is not among the "
                             f"{len(self.characters)} that the model was trained on: "
                             f"{''.join(sorted(self.characters))[:120]!r}")
        return ids

    def decode_bytes(self, ids):
        """-> UTF-8"""
        return "".join(self.texts[i] for i in self.known(ids)).encode()

    def default_prompt(self):
        return "\n" if "\n" in self.characters else self.characters[0]

    def to_json(self):
        return {"tokenizer": "char", "characters": self.characters, "end_of_text": self.end_of_text}

    def files(self):
        special = []
        if self.end_of_text is not None:
            special = [{"id": self.end_of_text, "content": "<|endoftext|>", "special": True,
                        "single_word": False, "lstrip": False, "rstrip": False,
                        "normalized": False}]
        each = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated",
                "invert": False}
        vocab = {character: i for i, character in enumerate(self.characters)}
        # Without the unknown token [UNK] a character that is not in the table is an error.
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
        saved = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
                 "normalizer": None, "pre_tokenizer": each, "post_processor": None,
                 "decoder": {"type": "Fuse"}, "model": model}
        return {**super().files(), "tokenizer.json": json.dumps(saved).encode()}


def code_points(text):
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)


def replace_surrogates(text):
    """Replace each half of a surrogate pair, which JSON can hold and UTF-8 cannot, with U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@functools.cache
def gpt2_bpe():
    """tiktoken's object, from files that it downloads once."""
    cache = bpe_cache()
    try:
        return tiktoken.get_encoding("gpt2")
    except (requests.RequestException, OSError, ValueError) as error:
        files = " and ".join(f"{url} as {path.name}" for url, path in cache.items())
        raise ConnectionError(
            f"GPT-2's tokenizer files cannot be downloaded ({type(error).__name__}). To work "
            f"offline, set TIKTOKEN_CACHE_DIR to a folder with two files: {files}") from None


def bpe_cache():
    """{address: path in tiktoken's cache} of GPT-2's tables: the merges and the vocabulary."""
    # tiktoken's own place is a temporary folder, which a reboot may empty.
    default = os.path.expanduser("~/.cache/tiktoken")
    folder = os.environ.setdefault("TIKTOKEN_CACHE_DIR", default)
    urls = [BPE_URL + "vocab.bpe", BPE_URL + "encoder.json"]
    return {url: Path(folder, hashlib.sha1(url.encode()).hexdigest()) for url in urls}
