"""Token files to samples, in an order that any number of processes can share."""
import functools
import glob
import os
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler

from data import DATA

SHARD_MAGIC = 20240520                                           # of llm.c's files of GPT-2 tokens


def find_data(name):
    """-> (folder, {"train": [paths], "val": [paths]}) of a data set. `name` is a folder in data/,
    or the path of any folder. The token files have train or val in their names."""
    folder = os.path.join(DATA, name)
    if os.path.isdir(name) and (os.path.dirname(name) or not token_files(folder)):
        folder = name
    paths = {"train": [], "val": []}
    for path in token_files(folder):
        splits = paths.keys() & re.findall("[a-z]+", os.path.basename(path).lower())
        if len(splits) > 1:
            raise ValueError(f"{path} has both train and val in its name: rename it to one of them")
        for split in splits:
            paths[split].append(path)
    for split, found in paths.items():
        if not found:
            ready = sorted(other for other in os.listdir(DATA)
                           if token_files(f"{DATA}/{other}") and not other.endswith(".part"))
            raise FileNotFoundError(
                f"data set {name!r}: {folder} has no {split}.bin. Prepared are: "
                f"{', '.join(ready) or 'none'}. Prepare one with python data/prepare.py")
    return folder, paths


def token_files(folder):
    return sorted(glob.glob(os.path.join(glob.escape(folder), "*.bin")))


class TokenDataset(Dataset):
    """Token files cut into samples of block_size tokens. Sample i is (x, y), each (T,) int64; y is
    x one token later, or -1 where the model is not to predict. The files are mapped, so they may be
    larger than memory.

    For training (stride=None) the samples lie side by side. For evaluation they begin `stride`
    tokens apart, and each token except the first of each file is predicted once.
    """

    def __init__(self, paths, block_size, vocab_size, stride=None):
        self.paths = paths
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.stride = stride or block_size
        self.files = [open_tokens(path) for path in paths]
        self.masks = [open_mask(path) for path in paths]
        self.masked = any(mask is not None for mask in self.masks)
        self.tokens = sum(map(len, self.files))
        targets = np.array([len(file) - 1 for file in self.files])
        counts = targets // block_size
        if stride:                                               # a first sample, and those beyond
            counts = (targets > 0) + np.ceil(np.maximum(0, targets - block_size) / stride)
        self.ends = np.cumsum(counts).astype(int)                # file f ends before sample ends[f]
        if len(self) == 0:
            raise ValueError(f"{paths[0]} holds {self.tokens:,} tokens. A sample with block_size="
                             f"{block_size} needs {block_size + 1:,}: use --block_size="
                             f"{max(1, *targets)} or less, or more text")
        for path, file in zip(paths, self.files, strict=True):   # a first look: all would take long
            self.check(path, file[:block_size])
            self.check(path, file[-block_size:])

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, i):
        T = self.block_size
        f = int(np.searchsorted(self.ends, i, side="right"))
        before = int(self.ends[f - 1]) if f else 0
        start = (i - before) * self.stride
        tokens = self.files[f][start:start + T + 1].astype(np.int64)
        self.check(self.paths[f], tokens)
        x = np.zeros(T, dtype=np.int64)
        y = np.full(T, -1)
        x[:len(tokens) - 1] = tokens[:-1]
        y[:len(tokens) - 1] = tokens[1:]
        if self.masks[f] is not None:
            mask = self.masks[f][start + 1:start + T + 1]
            y[:len(mask)][mask == 0] = -1
        if start:
            y[:T - self.stride] = -1                             # the sample before predicts these
        return torch.from_numpy(x), torch.from_numpy(y)

    def check(self, path, tokens):
        """Raise ValueError for a token beyond the vocabulary."""
        if tokens.max() >= self.vocab_size:
            raise ValueError(f"{path} holds token {tokens.max()}, beyond the vocabulary of "
                             f"{self.vocab_size}: it was made with another tokenizer")

    @functools.cached_property
    def fingerprint(self):
        """A text that differs between data sets, from the sizes and a sample of the tokens."""
        checksum = 0
        for file in [*self.files, *(mask for mask in self.masks if mask is not None)]:
            some = file[::max(1, len(file) // 20)]
            checksum = zlib.crc32(np.append(some, len(file)), checksum)
        return f"{self.tokens:,} tokens (checksum {checksum:08x})"


def open_tokens(path):
    """The tokens of a file, mapped: raw uint16, as in nanoGPT, or one of llm.c's shards: 256 int32
    (magic, version, number of tokens, zeros), then uint16."""
    size = os.path.getsize(path)
    header = np.fromfile(path, dtype="<i4", count=256)
    looks_like_shard = len(header) == 256 and header[:3].all() and not header[3:].any()
    if looks_like_shard or SHARD_MAGIC in header[:1] or re.search(r"_\d{6}\.bin$", path):
        if header[:3].tolist() != [SHARD_MAGIC, 1, size // 2 - 512] or size % 2:
            raise ValueError(f"{path} ({size:,} bytes) is no complete shard of GPT-2's tokens: "
                             "download it again")
        return np.memmap(path, dtype="<u2", mode="r", offset=1024)
    if size == 0:
        raise ValueError(f"{path} is empty: prepare the data again, with another --val_frac")
    if size % 2:
        raise ValueError(f"{path} is half written ({size:,} bytes): prepare the data again")
    return np.memmap(path, dtype="<u2", mode="r")


def open_mask(path):
    """Which tokens of a file the model is to predict, one byte each, mapped; None if all."""
    mask = Path(path).with_suffix(".mask")
    if not mask.exists():
        return None
    if mask.stat().st_size != os.path.getsize(path) // 2:
        raise ValueError(f"{mask} does not have a byte for each token: prepare the data again")
    return np.memmap(mask, dtype=np.uint8, mode="r")


class EndlessSampler(DistributedSampler):
    """torch's DistributedSampler without an end, which can start anywhere.

    The shuffled epochs form one endless sequence of samples, of which process r of R reads every
    R-th. So the samples of a step do not depend on R, and the position is one number: the samples
    consumed, by all processes together.
    """

    def __init__(self, dataset, rank, world_size, seed, consumed=0):
        super().__init__(dataset, world_size, rank, shuffle=True, seed=seed)
        self.consumed = consumed

    def __iter__(self):
        position = self.consumed
        while True:
            epoch, done = divmod(position, len(self.dataset))
            self.set_epoch(epoch)
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(len(self.dataset), generator=generator).numpy()
            # Position p of the sequence belongs to process p % R.
            first = done + (self.rank - position) % self.num_replicas
            yield from map(int, order[first::self.num_replicas])
            position += len(order) - done
