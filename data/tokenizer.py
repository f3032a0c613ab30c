"""
Text to token ids and back: GPT-2's byte pairs, by tiktoken, or a table of characters.

A tokenizer is saved as meta.json beside tokens and checkpoints: {"tokenizer": "gpt2"}, or
{"tokenizer": "char", "characters": "...", "end_of_text": id or null}. Beside a checkpoint are also
the files from which transformers makes the same tokenizer.
"""
import contextlib
import functools
import hashlib
import json
import os
import re
import tempfile

import numpy as np

UNKNOWN = 65535                                                  # the id of no character
# Unicode's white space, as tiktoken's regular expression sees it
WHITE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# sha256 of GPT-2's tokens, joined by line breaks
VOCABULARY = "e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f"
BPE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"


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
            parts += [np.array([self.end_of_text], dtype=np.uint16), self.encode(part)]
        return np.concatenate(parts[1:])

    def files(self):
        """{name: bytes} of the files that belong beside a checkpoint: for us, and transformers'."""
        end_of_text = "<|endoftext|>" if self.end_of_text is not None else None
        config = {"tokenizer_class": self.transformers_class, "bos_token": end_of_text,
                  "eos_token": end_of_text, "clean_up_tokenization_spaces": False}
        contents = {"meta.json": self.to_json(), "tokenizer_config.json": config}
        return {name: json.dumps(content).encode() for name, content in contents.items()}


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
        except ValueError:                                       # too much white space for tiktoken
            # Cut where tiktoken cuts anyway: before the last of a run of white space.
            parts = re.split(f"(?<=[{WHITE}])(?=[{WHITE}][^{WHITE}])", text)
            if len(parts) == 1:
                raise
            return np.concatenate([self.encode(part) for part in parts])

    def decode_bytes(self, ids):
        """-> UTF-8. A token can be part of a character, so single tokens may not be valid UTF-8."""
        return gpt2_bpe().decode_bytes(self.known(ids))

    def byte_lengths(self):
        """The number of bytes of text for each id; the token between documents is no text."""
        bpe = gpt2_bpe()
        lengths = [len(bpe.decode_single_token_bytes(i)) for i in range(self.end_of_text)]
        return np.array([*lengths, 0])

    def default_prompt(self):
        return "\n"

    def to_json(self):
        return {"tokenizer": "gpt2"}

    def files(self):
        """The two tables are copied from tiktoken's cache, if they are in it: a run does not wait
        for a download."""
        files = super().files()
        for name, path in zip(("merges.txt", "vocab.json"), bpe_cache().values(), strict=True):
            if os.path.exists(path):
                with open(path, "rb") as f:
                    files[name] = f.read()
        return files


class CharTokenizer(Tokenizer):
    name = "char"
    transformers_class = "PreTrainedTokenizerFast"

    def __init__(self, characters, end_of_text=None):
        """characters: a text with each character once; its place is its id. end_of_text: None, or
        the first id after them."""
        if not isinstance(characters, str) or not characters:
            raise ValueError("a character tokenizer needs its table of characters")
        if len(set(characters)) != len(characters):
            raise ValueError("a character occurs twice in the table of characters")
        if end_of_text not in (None, len(characters)):
            raise ValueError(f"end_of_text={end_of_text!r} must be {len(characters)}, the first id "
                             "after the characters, or null")
        self.characters = characters
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
        texts = [*self.characters, "<|endoftext|>"]
        return "".join(texts[i] for i in self.known(ids)).encode()

    def byte_lengths(self):
        """The number of bytes of text for each id; the token between documents is no text."""
        return np.array([*(len(c.encode()) for c in self.characters), 0])

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


def tokenizer_from_json(meta):
    """The tokenizer with this to_json(). ValueError, KeyError or TypeError if it is damaged."""
    if meta["tokenizer"] == "gpt2":
        return GPT2Tokenizer()
    if meta["tokenizer"] == "char":
        return CharTokenizer(meta.get("characters"), meta.get("end_of_text"))
    raise ValueError(f"tokenizer {meta['tokenizer']!r:.50} is not known: use gpt2 or char")


def load_tokenizer(name):
    """The tokenizer of a folder, of a model of the hub (owner/name), or beside a file: that in its
    meta.json; GPT-2's where there is none. ValueError if it has another one."""
    folder = os.path.dirname(os.path.abspath(name)) if os.path.isfile(name) else name
    if not os.path.exists(folder):
        from model import is_pretrained
        if not is_pretrained(str(name)):
            raise FileNotFoundError(f"{name} was not found: name the folder of a model or of data")
    path = f"{folder}/meta.json"
    if not os.path.exists(path):
        if os.path.exists(f"{folder}/meta.pkl"):
            raise ValueError(f"{folder} has a meta.pkl, a pickle, which could run code, so it is "
                             "not read, and no meta.json. Make one from the text: python "
                             "data/prepare.py TEXT --name=NAME --tokenizer=char; then copy "
                             f"data/NAME/meta.json to {folder}")
        foreign = foreign_vocabulary(name, folder)
        if not foreign:
            return GPT2Tokenizer()
        path = path_of_file(name, folder, "meta.json")           # of a model of ours on the hub
        if not os.path.exists(path):
            raise ValueError(foreign)
    with open(path, encoding="utf-8") as f:
        try:
            return tokenizer_from_json(json.load(f))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: {error!s:.200}") from None


def check_tokenizer(tokenizer, vocab_size, name):
    """Raise ValueError if the model `name` has fewer tokens than its tokenizer."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"{name}: the tokenizer {tokenizer.name} has {tokenizer.vocab_size} "
                         f"tokens, the model {vocab_size}. Copy the meta.json of the data that it "
                         "was trained on into its folder")


def path_of_file(name, folder, file):
    """The path of a file of a folder, or of a model of the hub, if it has this file."""
    if "/" in str(name) and not os.path.exists(name):
        from data.download import hub_file
        with contextlib.suppress(FileNotFoundError):             # the model has no such file
            return hub_file(name, file)
    return f"{folder}/{file}"


def foreign_vocabulary(name, folder):
    """What is wrong if the files of transformers in a folder, or of a model of the hub, hold
    another vocabulary than GPT-2's; else None. ValueError if they cannot be read."""
    for file in ("tokenizer.json", "vocab.json"):
        path = path_of_file(name, folder, file)
        if not os.path.exists(path):
            continue
        with open(path, encoding="utf-8") as f:
            try:
                vocab = json.load(f)
                if file == "tokenizer.json":
                    vocab = vocab["model"]["vocab"]
                text = "\n".join(sorted(vocab, key=vocab.get))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f"{path} cannot be read: {error!r:.100}") from None
        if hashlib.sha256(text.encode(errors="replace")).hexdigest() == VOCABULARY:
            return None
        return (f"{path} is another tokenizer than GPT-2's, of {len(vocab):,} tokens; this project "
                "reads only GPT-2's and its own meta.json")
    return None


def code_points(text):
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)


def replace_surrogates(text):
    """Replace each half of a surrogate pair, which JSON can hold and UTF-8 cannot, with U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def bpe_cache():
    """{address: path in tiktoken's cache} of GPT-2's tables: the merges and the vocabulary."""
    if "TIKTOKEN_CACHE_DIR" not in os.environ:   # a temporary folder, which a reboot may empty
        folder = os.path.expanduser("~/.cache/tiktoken")
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError:                                          # a home that cannot be written
            folder = tempfile.gettempdir()
        os.environ["TIKTOKEN_CACHE_DIR"] = folder
    folder = os.environ["TIKTOKEN_CACHE_DIR"]
    addresses = [BPE_URL + "vocab.bpe", BPE_URL + "encoder.json"]
    return {address: os.path.join(folder, hashlib.sha1(address.encode()).hexdigest())
            for address in addresses}


@functools.cache
def gpt2_bpe():
    import requests
    import tiktoken
    cache = bpe_cache()
    try:
        return tiktoken.get_encoding("gpt2")
    except (requests.RequestException, OSError, ValueError) as error:
        files = [f"{address} as {os.path.basename(path)}" for address, path in cache.items()]
        raise ConnectionError(f"GPT-2's tokenizer files cannot be downloaded "
                              f"({type(error).__name__}). To work offline, set TIKTOKEN_CACHE_DIR "
                              "to a folder with two files: "
                              + "; ".join(files)) from None
