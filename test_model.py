"""
Every promise of this project, tried on a CPU without the internet: python -m pytest, and
python -m pytest -m slow for the long ones. A docstring says when its test fails.
"""
import contextlib
import copy
import ctypes
import gc
import gzip
import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import pickle
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DistributedSampler

import model as model_py
import sample
import train
from data import cli, download, loader, prepare, tokenizer
from data.tokenizer import CharTokenizer, GPT2Tokenizer, load_tokenizer
from model import (
    GPT2,
    AttentionHead,
    GPT2Config,
    KVCache,
    Linear,
    MultiHeadAttention,
    read_safetensors,
    rotary_tables,
    rotate,
    sample_token,
    scaled_dot_product_attention,
    write_safetensors,
)

transformers = pytest.importorskip("transformers", reason="pip install transformers")
safetensors = pytest.importorskip("safetensors.torch", reason="pip install safetensors")
load_file = safetensors.load_file
save_file = safetensors.save_file
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

HERE = pathlib.Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"
os.environ["OMP_NUM_THREADS"] = "1"                              # of the processes started here
torch.set_num_threads(1)
if (SHARED / "tiktoken_cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
needs_bpe = pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ,
                               reason="needs GPT-2's tokenizer files: set TIKTOKEN_CACHE_DIR")
SHAKESPEARE = SHARED / "data/tinyshakespeare.txt"
needs_shakespeare = pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"needs {SHAKESPEARE}")
needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


def slow(*values):
    """The parameters of a slow test."""
    return pytest.param(*values, marks=pytest.mark.slow)


# --------------------------------------------------------------------------------------------------
# Helpers: models


# All settings of the three changes to the attention, and the other two booleans by themselves and
# together with all three.
ATTENTION = ("rope", "gqa", "sliding_window")
MATRIX = [dict(zip(ATTENTION, on, strict=True))
          for on in itertools.product((False, True), repeat=3)]
MATRIX += [dict(bias=False, flash=False), dict(MATRIX[-1], bias=False, flash=False)]


def setting_id(flags):
    return "+".join(name if on else f"no-{name}" for name, on in flags.items() if on or name in (
        "bias", "flash")) or "plain"


every_flag_setting = pytest.mark.parametrize("flags", MATRIX, ids=setting_id)


def small_config(**fields):
    windowed = dict(window_size=4) if fields.get("sliding_window") else {}
    shape = dict(block_size=16, vocab_size=61, n_layer=2, n_head=6, n_embd=48)
    return GPT2Config(**shape | windowed | fields)


@torch.no_grad()
def loud(model, scale, seed=0):
    """Scale weights up and make biases differ from 0, so that a mistake in any of them shows."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.dim() > 1:
            p.mul_(scale)
        else:
            p.add_(torch.empty_like(p).normal_(0, 0.1, generator=generator))
    return model.eval()


def small_model(**fields):
    return loud(GPT2(small_config(**fields), seed=0), 12)


def tokens(*shape, vocab_size=61, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(a, b, tolerance):
    assert a.shape == b.shape
    difference = (a - b).abs().max()
    assert difference <= tolerance, f"off by {difference:.2e}"


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation puts out, forward or backward, and of
    the largest that is converted to another dtype."""
    numel = 0
    converted = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        if function is torch.ops.aten._to_copy.default:
            self.converted = max(self.converted, out.numel())
        return out


# --------------------------------------------------------------------------------------------------
# Helpers: scripts as processes

SCRIPTS = {"train": train, "sample": sample, "prepare": prepare}
LOGS = None
SAFE_PATH = ["-P"] if sys.version_info >= (3, 11) else []        # a script finds its own modules
COUNT = itertools.count()

# Importing torch takes seconds, so most processes are forked from one that has done only that.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "torch._dynamo", "torch.distributed.fsdp", "sample",
                              __name__])


@pytest.fixture(scope="session", autouse=True)
def logs(tmp_path_factory):
    global LOGS
    LOGS = str(tmp_path_factory.mktemp("logs"))


def child(script, argv, env, folder, log, before):
    for number, path in ((0, os.devnull), (1, log + ".out"), (2, log + ".err")):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    sys.stdin = open(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)     # nohup and a shell's & ignore them
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    torch.set_num_threads(1)     # after a fork torch makes its pool anew: else its threads race
    os.environ.update(env)
    os.chdir(folder)
    sys.argv = [script + ".py", *argv]
    train.MAIN_FIRST = 0.3
    if before:
        before()
    SCRIPTS[script].main()


def start(script, *argv, ranks=0, machines=1, folder=None, before=None):
    """Start `python SCRIPT.py ARGV`, or as many of it as torchrun would on so many machines
    (ranks > 0); `before` is called first in each."""
    processes = []
    port = free_port()
    for rank in range(ranks or 1):
        env = {}
        if ranks:
            local = ranks // machines
            env = dict(RANK=rank, LOCAL_RANK=rank % local, WORLD_SIZE=ranks,
                       LOCAL_WORLD_SIZE=local, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            env = {name: str(value) for name, value in env.items()}
        where = folder[rank] if isinstance(folder, list) else folder or LOGS
        log = os.path.join(LOGS, str(next(COUNT)))
        process = FORKS.Process(target=child, args=(script, [str(a) for a in argv], env, where, log,
                                                    before))
        process.log = log
        process.start()
        processes.append(process)
    return processes


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def finish(processes, timeout=60):
    """Wait -> the exit codes (negative: signals), and what all printed to stdout and to stderr."""
    deadline = time.time() + timeout
    for p in processes:
        p.join(max(0, deadline - time.time()))
    late = [p for p in processes if p.is_alive()]
    for p in late:
        p.kill()
        p.join()
    out, err = ("".join(pathlib.Path(p.log + kind).read_text() for p in processes)
                for kind in (".out", ".err"))
    assert not late, f"{len(late)} of {len(processes)} hang after {timeout} s\n{out}\n{err}"
    return SimpleNamespace(codes=[p.exitcode for p in processes], out=out, err=err)


def run(*args, code=0, timeout=60, **how):
    done = finish(start(*args, **how), timeout)
    assert set(done.codes) == {code}, (done.codes, done.out, done.err)
    return done


def here(capsys, script, *argv):
    """`python SCRIPT.py ARGV` in this process -> (exit code, stdout, stderr)."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    argv_before = sys.argv
    sys.argv = [script + ".py", *map(str, argv)]
    code = 0
    try:
        SCRIPTS[script].main()
    except SystemExit as e:
        code = e.code or 0
    finally:
        sys.argv = argv_before
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
    out, err = capsys.readouterr()
    return code, out, err


def one_line(err, *words):
    assert err.count("\n") == 1 and "Traceback" not in err, err
    for word in words:
        assert word in err, (word, err)


# --------------------------------------------------------------------------------------------------
# Helpers: data and runs

TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=2, max_iters=9,
            eval_interval=3, eval_iters=3, log_interval=1, learning_rate=2e-3, warmup_iters=2,
            device="cpu")
ALL = dict(rope=True, gqa=True, sliding_window=True, n_head=4, n_kv_head=2, window_size=8)
WORDS = ["".join(random.Random(i).choices("abcdefghij", k=i % 6 + 1)) for i in range(40)]
TEXT = "\n".join(" ".join(random.Random(i).choices(WORDS, k=8)) for i in range(200))


def flags(**changes):
    """The command line of a tiny run."""
    return [f"--{name}={value}" for name, value in {**TINY, **changes}.items()]


def read_bin(folder, split):
    return np.fromfile(os.path.join(folder, f"{split}.bin"), dtype="<u2")


def write_set(folder, *texts):
    """A data set by characters, of a text to train on and another for validation."""
    os.makedirs(folder)
    table = CharTokenizer("".join(sorted(set("".join(texts)))))
    counts = {}
    for split, text in zip(("train", "val"), texts, strict=True):
        table.encode(text).tofile(os.path.join(folder, f"{split}.bin"))
        counts[split] = len(text)
    meta = {**table.to_json(), "tokens": counts}
    pathlib.Path(folder, "meta.json").write_text(json.dumps(meta))


def hide(folder, seed=0):
    """Give a data set masks: runs of tokens, about half of all, are not to be predicted."""
    generator = np.random.default_rng(seed)
    for split in ("train", "val"):
        runs = generator.integers(1, 60, size=1000)
        mask = np.repeat(np.arange(1000) % 2, runs)[:len(read_bin(folder, split))]
        mask.astype(np.uint8).tofile(os.path.join(folder, f"{split}.mask"))


@pytest.fixture
def other_data(tmp_path):
    """A folder with a package of the same name as ours, which no script may take for it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/__init__.py").write_text("raise SystemExit('the wrong package')")
    return tmp_path


@pytest.fixture(scope="session")
def masked(data, tmp_path_factory):
    """The same data set, with masks."""
    folder = tmp_path_factory.mktemp("masked") / "set"
    shutil.copytree(data, folder)
    hide(folder)
    return str(folder)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data set of 53 training and 5 validation samples: numbers that do not divide evenly."""
    folder = str(tmp_path_factory.mktemp("data") / "set")
    write_set(folder, TEXT[:1700], TEXT[1700:1870])
    return folder


def curve(out):
    """metrics.jsonl without what depends on the machine."""
    return [{k: v for k, v in r.items() if k not in ("tokens_per_second", "memory")}
            for r in train.read_metrics(str(out))]


def contents(out):
    """The bytes of a checkpoint, short: {file: hash}."""
    names = ("config.json", "meta.json", "tokenizer.json", "tokenizer_config.json",
             "model.safetensors", train.STATE)
    return {name: hash((out / name).read_bytes()) for name in names}


def same_run(a, b):
    """Two finished runs are equal to the bit: the metrics, the exported model and the state."""
    assert curve(a) == curve(b) and contents(a) == contents(b)


def agree(a, b, tolerance=2e-5):
    """The largest relative difference of two runs' losses and gradient norms, at most tolerance."""
    a = curve(a)
    b = curve(b)
    assert [(r["step"], r.keys()) for r in a] == [(r["step"], r.keys()) for r in b]
    worst = max(abs(x[k] - y[k]) / (abs(y[k]) or 1) for x, y in zip(a, b, strict=True) for k in x)
    assert worst <= tolerance, worst
    return worst


def at_step(step, number, rank=None):
    """`before` of a process: it sends itself signal `number` while it computes `step`."""
    gradients = train.Trainer.gradients
    first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    def hooked(self):
        if first_attempt and self.state.step + 1 == step and rank in (None, os.environ.get("RANK")):
            os.kill(os.getpid(), number)
        return gradients(self)
    train.Trainer.gradients = hooked


@pytest.fixture(scope="session")
def straight(data, tmp_path_factory):
    """whole: a run with dropout, across an epoch's end. cut: the same, killed two steps after its
    first checkpoint."""
    folder = tmp_path_factory.mktemp("straight")
    how = dict(dataset=data, dropout=0.1)
    run("train", *flags(out_dir=folder / "whole", **how))
    run("train", *flags(out_dir=folder / "cut", **how), code=-9,
        before=partial(at_step, 5, signal.SIGKILL))
    return folder


def resume(straight, out, *argv, **how):
    shutil.copytree(straight / "cut", out)
    return run("train", *flags(out_dir=out), "--init_from=resume", *argv, **how)


# --------------------------------------------------------------------------------------------------
# Configuration


@pytest.mark.parametrize("wrong, words", [
    (dict(n_layer=0), "n_layer=0 1"), (dict(block_size=1.5), "block_size=1.5 whole"),
    (dict(n_head=True), "n_head=True whole"), (dict(n_embd="48"), "n_embd='48' whole"),
    (dict(vocab_size=2**40), "vocab_size=1099511627776 16,777,216"),
    (dict(dropout=math.nan), "dropout=nan"), (dict(dropout=1.0), "dropout=1.0 below 1"),
    (dict(dropout=-0.1), "dropout=-0.1 0"), (dict(bias=1), "bias=1 True or False"),
    (dict(n_embd=50), "n_embd=50 n_head=6 n_embd=48"),
    (dict(rope_theta=5.0), "rope_theta=5.0 --rope"),
    (dict(rope=True, rope_theta=1), "rope_theta=1 above 1"),
    (dict(rope=True, rope_theta=math.inf), "rope_theta=inf"),
    (dict(rope=True, n_embd=42), "7 even n_embd=48"), (dict(n_kv_head=2), "n_kv_head=2 --gqa"),
    (dict(gqa=True, n_kv_head=4), "n_head=6 n_kv_head=4 [1, 2, 3, 6]"),
    (dict(gqa=True, n_kv_head=0), "n_kv_head=0"),
    (dict(window_size=4), "window_size=4 --sliding_window"),
    (dict(sliding_window=True, window_size=0), "window_size=0"),
    (dict(sliding_window=True, window_size=17), "window_size=17 block_size=16"),
], ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_contradictions_are_refused(wrong, words):
    """Fails if a wrong value is accepted, or refused without the value, the limit and advice."""
    with pytest.raises(ValueError) as e:
        small_config(**wrong)
    for word in words.split():
        assert word in str(e.value), f"{word} is not in: {e.value}"


def test_defaults_of_the_flags():
    """Fails if a flag alone is refused, or picks a surprising number of heads or window."""
    assert GPT2Config(sliding_window=True).window_size == 256
    for heads, groups in {1: 1, 2: 1, 7: 1, 12: 4, 16: 4, 25: 5}.items():
        assert GPT2Config(n_head=heads, n_embd=8 * heads, gqa=True).n_kv_head == groups


def test_sizes_and_costs_by_hand():
    """Fails if a parameter, a FLOP or a byte of the cache is forgotten or counted twice."""
    with torch.device("meta"):
        assert GPT2(GPT2Config()).num_parameters() == 124_439_808
        medium = GPT2(GPT2Config(n_layer=24, n_head=16, n_embd=1024))
        assert medium.num_parameters() == 354_823_168
    plain = GPT2Config(block_size=8, vocab_size=10, n_layer=3, n_head=4, n_embd=16)
    variant = replace(plain, gqa=True, n_kv_head=2, sliding_window=True, window_size=4)
    # A layer: 16·16 for each of q, k, v and out, and 16·64 twice. The logits: 16·10.
    # Keys seen on average: (1 + ... + 8) / 8.
    layer = 4 * 256 + 2 * 1024
    assert plain.flops_per_token() == 2 * (3 * layer + 160) + 3 * 4 * 16 * 4.5
    # k and v are 16·8 now. Keys seen: 1, 2, 3 and then five times 4.
    layer = 2 * 256 + 2 * 128 + 2 * 1024
    assert variant.flops_per_token() == 2 * (3 * layer + 160) + 3 * 4 * 16 * 26 / 8
    assert plain.cache_bytes(8, 2) == 3 * 2 * 16 * 8 * 2
    assert variant.cache_bytes(8, 2) == 3 * 2 * 8 * 4 * 2


# --------------------------------------------------------------------------------------------------
# Attention


def by_formula(q, k, v, window=None):
    """Attention from its definition, in float64 and with a mask made one entry at a time."""
    T = q.size(-2)
    group = q.size(1) // k.size(1)
    seen = torch.tensor([[0 <= i - j < (window or T) for j in range(T)] for i in range(T)])
    q = q.double()
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.size(-1))
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v).float()


def random_qkv(T, K):
    generator = torch.Generator().manual_seed(T)
    return [torch.randn(2, heads, T, 8, generator=generator, requires_grad=True)
            for heads in (6, K, K)]


def windowed_config(window, flash):
    windowed = dict(sliding_window=True, window_size=window) if window else {}
    return small_config(flash=flash, **windowed)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("T, window", [
    (1, None), (7, None), (1, 4), (3, 4), (4, 4), (5, 4), (8, 4), (17, 4), (9, 1), (13, 5),
    (10, 9), (10, 10), (10, 16)])
def test_attention_is_the_formula(T, window, flash):
    """Fails if blocks of a window are one off, groups not neighbours, or a gradient is wrong."""
    head = AttentionHead(windowed_config(window, flash))
    for K in (6, 2, 1):
        qkv = random_qkv(T, K)
        y = head(*qkv)
        expected = by_formula(*qkv, window)
        assert_close(y, expected, 1e-5)
        g = torch.randn(2, 6, T, 8)
        ours = torch.autograd.grad(y, qkv, g)
        for a, b in zip(ours, torch.autograd.grad(expected, qkv, g), strict=True):
            assert_close(a, b, 1e-5)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 5, 9, 16])
def test_attention_after_a_prefix_is_the_formula(window, flash):
    """Fails if, after any prefix in a cache, what was seen before is out of order or one off."""
    head = AttentionHead(windowed_config(window, flash))
    qkv = [x.detach() for x in random_qkv(16, 2)]
    expected = by_formula(*qkv, window)
    for a, b in itertools.combinations(range(1, 17), 2):
        cache = KVCache(window or 16, ring=window is not None)
        y = [head(*(x[:, :, i:j] for x in qkv), cache=cache)
             for i, j in itertools.pairwise((0, a, b, 16)) if i < j]
        assert_close(torch.cat(y, dim=2), expected, 1e-5)


def test_the_written_out_formula():
    """Fails if the formula, as users may call it, lacks the scale or adds a mask that selects."""
    q, k, v = random_qkv(5, 6)
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    added = torch.zeros(5, 5).masked_fill(~seen, -math.inf)
    for mask in (seen, added):
        assert_close(scaled_dot_product_attention(q, k, v, mask), by_formula(q, k, v), 1e-5)
    unmasked = F.scaled_dot_product_attention(q, k, v)
    assert_close(scaled_dot_product_attention(q, k, v), unmasked, 1e-5)


@every_flag_setting
def test_heads_one_by_one_equal_all_at_once(flags):
    """Fails if a head depends on others: in masks, groups, the rotation or the cache."""
    config = small_config(**flags)
    head = AttentionHead(config)
    q, k, v = random_qkv(14, config.kv_heads)
    together, *alone = (KVCache(16, config.sliding_window) for _ in range(7))
    for start, end in ((0, 9), (9, 10), (10, 14)):               # the start, one token, a chunk
        x = [t[:, :, start:end] for t in (q, k, v)]
        rotary = rotary_tables(torch.arange(start, end), 8, 10000.0) if config.rope else None
        y = head(*x, rotary, together)
        for h in range(6):
            group = h // (6 // config.kv_heads)
            one = head(x[0][:, h], x[1][:, group], x[2][:, group], rotary, alone[h])
            assert_close(one, y[:, h], 1e-5)


def other_attention(variant, config):
    """The attention of transformers' Llama or Mistral with a config like ours, in its model."""
    extra = dict(attention_bias=True)
    if variant == "Mistral":
        extra = dict(sliding_window=config.window_size)
    theirs = getattr(transformers, variant + "Config")(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=6, intermediate_size=8,
        num_key_value_heads=config.kv_heads, vocab_size=61,
        rope_parameters=dict(rope_type="default", rope_theta=config.rope_theta), **extra)
    return getattr(transformers, variant + "Model")(theirs).eval()


@torch.no_grad()
@pytest.mark.parametrize("variant, fields", [
    ("Llama", dict(rope=True)), ("Llama", dict(rope=True, rope_theta=500.0, gqa=True)),
    ("Mistral", dict(rope=True, gqa=True, sliding_window=True, bias=False))],
    ids=["rope", "rope+gqa", "all three"])
def test_attention_of_other_code(variant, fields):
    """Fails if rotation, groups or window differ from those of transformers' Llama and Mistral."""
    config = small_config(**fields)
    ours = loud(MultiHeadAttention(config), 5)
    model = other_attention(variant, config)
    theirs = model.layers[0].self_attn
    for part, p in ours.c_attn.named_parameters():
        for name, rows in zip("qkv", p.split(ours.sizes), strict=True):
            getattr(getattr(theirs, name + "_proj"), part).copy_(rows)
    theirs.o_proj.load_state_dict(ours.c_proj.state_dict())
    calls = []
    theirs.register_forward_hook(
        lambda _, args, kwargs, out: calls.append((kwargs["hidden_states"], out[0])),
        with_kwargs=True)
    model(inputs_embeds=torch.randn(2, 23, 48, generator=torch.Generator().manual_seed(0)))
    x, expected = calls[0]
    y = ours(x, rotary_tables(torch.arange(23), 8, config.rope_theta))
    assert_close(y, expected, 1e-4 * expected.std())


def test_rotation_depends_on_distance_alone():
    """Fails if angles are not proportional to the position, or queries turn otherwise than keys."""
    q, k, v = (x.detach() for x in random_qkv(9, 6))
    head = AttentionHead(small_config(rope=True))

    def tables(shift):
        return rotary_tables(torch.arange(shift, shift + 9), 8, 10000.0)
    for shift in (1020, 30_000_000):                             # float32 confuses neighbours there
        assert_close(head(q, k, v, tables(0)), head(q, k, v, tables(shift)), 1e-5)
    assert (head(q, k, v, tables(0)) - head(q, k, v)).abs().max() > 0.1
    assert_close(rotate(q, *tables(1020)).norm(dim=-1), q.norm(dim=-1), 1e-5)
    assert torch.equal(rotate(q, *tables(0))[..., 0, :], q[..., 0, :])
    half = rotate(q.bfloat16(), *tables(3000))
    assert half.dtype == torch.bfloat16
    exact = rotate(q.bfloat16().float(), *tables(3000))
    assert_close(half.float(), exact.bfloat16().float(), 1e-6)


@pytest.mark.parametrize("n_layer", [1, 3])
@pytest.mark.parametrize("fields", [{}, dict(flash=False), dict(rope=True), dict(gqa=True)],
                         ids=str)
def test_window_edges(n_layer, fields):
    """Fails if a window has W - 1 or W + 1 tokens: through n layers a token is felt for n·(W - 1)
    positions, and not at the next one."""
    model = small_model(n_layer=n_layer, sliding_window=True, **fields).double()
    idx = tokens(1, 16)
    other = idx.clone()
    other[0, 2] = (other[0, 2] + 1) % 61
    changed = (model(idx)[0] != model(other)[0]).any(-1)[0].tolist()
    assert changed == [2 <= i <= 2 + n_layer * 3 for i in range(16)]


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("gqa", [False, True])
def test_a_window_builds_nothing_of_T_by_T(flash, gqa):
    """Fails if a window makes a mask or scores of T x T, which cost as much as full attention."""
    def largest(T):
        model = GPT2(GPT2Config(T, 61, 1, 2, 16, rope=True, gqa=gqa, sliding_window=True,
                                window_size=8, flash=flash))
        with Largest() as seen:
            model(tokens(1, T), tokens(1, T))[1].backward()
            with torch.no_grad():
                for prefix in (1, 20):
                    cache = model.new_cache()
                    model(tokens(1, prefix), cache=cache)
                    model(tokens(1, T), cache=cache)
        return seen.numel
    assert largest(1024) == 2 * largest(512) < 512 * 512


# --------------------------------------------------------------------------------------------------
# Model


def test_initialisation():
    """Fails if a kind of weights has a wrong spread or start, an unknown kind is initialised by a
    guess, or the seed is not used."""
    config = GPT2Config(block_size=64, vocab_size=256, n_layer=3, n_head=4, n_embd=128)
    model = GPT2(config, seed=5)
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in model.initial_weights(5))
    model.transformer["extra"] = torch.nn.ModuleDict(dict(
        scale=torch.nn.RMSNorm(8), shift=torch.nn.LayerNorm(8), matrix=torch.nn.Linear(300, 300)))
    for name, tensor in model.initial_weights(5):
        path, _, kind = name.rpartition(".")
        std = 0.02 / (math.sqrt(6) if "c_proj" in name else 1)
        if kind == "bias":
            assert (tensor == 0).all(), name
        elif isinstance(model.get_submodule(path), torch.nn.LayerNorm | torch.nn.RMSNorm):
            assert (tensor == 1).all(), name
        else:
            assert tensor.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(tensor.mean()) < 5e-4
    model.transformer.extra.gain = torch.torch.nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match=r"transformer\.extra\.gain: .* ModuleDict"):
        list(model.initial_weights(0))
    wpe = model.transformer.wpe.weight
    same, other, unseeded, again = (
        GPT2(config, seed=seed).transformer.wpe.weight for seed in (5, 6, None, None))
    assert torch.equal(wpe, same)
    assert not torch.equal(wpe, other) and not torch.equal(unseeded, again)


def test_loss_is_the_mean_over_counted_targets():
    """Fails if targets are shifted once too often, or ignored ones count in the mean."""
    model = small_model()
    idx = tokens(2, 9)
    targets = tokens(2, 9, seed=1)
    targets[0, :4] = -1
    logits, no_loss = model(idx)
    no_logits, loss = model(idx, targets)
    assert no_loss is None and no_logits is None
    counted = targets != -1
    chosen = logits.log_softmax(-1)[counted].gather(1, targets[counted][:, None])
    by_hand = -chosen.sum() / 14
    assert_close(loss, by_hand, 1e-5)
    with torch.no_grad():
        assert_close(model(idx, targets)[1], by_hand, 1e-5)


@pytest.mark.parametrize("flash", [False, True])
def test_dropout_only_in_training(flash):
    """Fails if dropout stays on in evaluation, or is missing at any of its places."""
    model = small_model(dropout=0.5, flash=flash)
    idx = tokens(1, 8)
    places = [m for m in model.modules() if isinstance(m, (AttentionHead, torch.nn.Dropout))]
    assert len(places) == 1 + 2 * 3
    for place in places:                                         # each by itself
        for other in places:
            attribute = "dropout" if isinstance(other, AttentionHead) else "p"
            setattr(other, attribute, 0.5 if other is place else 0.0)
        kept = model.eval()(idx)[0]
        dropped, again = (model.train()(idx)[0] for _ in range(2))
        assert torch.equal(kept, model.eval()(idx)[0])
        assert not torch.equal(dropped, again)


def bytes_held(cache):
    return sum(x.untyped_storage().nbytes() for layer in cache for x in (layer.k, layer.v))


@every_flag_setting
def test_a_text_may_be_read_in_chunks(flags):
    """Fails if a chunk sees its own future, misses what came before, or overwrites keys that its
    first tokens or autograd still need, or if a cache holds more than cache_bytes says."""
    model = small_model(**flags)
    weight = model.transformer.h[0].attn.c_attn.weight
    idx = tokens(2, 16)
    whole = model(idx)[0]
    expected, = torch.autograd.grad(model.hidden(idx)[..., 0].sum(), weight)
    for chunks in ((16,), (1, 15), (3, 1, 5, 7), (5, 5, 1, 1, 4), (3, 9, 4)):
        cache = model.new_cache()
        x = torch.cat([model.hidden(piece, cache) for piece in idx.split(chunks, dim=1)], dim=1)
        assert_close(model.project(x), whole, 1e-5)
        if 1 not in chunks:                                      # one token is written in place
            gradient, = torch.autograd.grad(x[..., 0].sum(), weight)
            assert_close(gradient / expected.std(), expected / expected.std(), 1e-3)
        assert model(idx[:, :0], cache=cache)[0].shape == (2, 0, 61)
        assert bytes_held(cache) == 2 * model.config.cache_bytes(16)


@torch.no_grad()
@pytest.mark.parametrize("convert", [GPT2.bfloat16, GPT2.half], ids=["bfloat16", "float16"])
def test_half_precision_attends_in_float32(convert):
    """Fails if keys and values are rounded to half precision, or converted anew for each token."""
    model = convert(small_model(gqa=True, rope=True))
    cache = model.new_cache()
    model(tokens(1, 15), cache=cache)
    with Largest() as seen:
        x = model.hidden(tokens(1, 1), cache)
    assert x.dtype.itemsize == 2 and cache[0].k.dtype == torch.float32
    assert seen.converted == 48 + 2 * 16                         # q, k and v, never the cache
    assert bytes_held(cache) == model.config.cache_bytes(16)


def test_a_full_cache_is_refused():
    """Fails if a cache is written past its end, over its beginning, or larger than asked for."""
    model = small_model()
    cache = model.new_cache(5)
    model(tokens(1, 5), cache=cache)
    assert bytes_held(cache) == model.config.cache_bytes(5)
    with pytest.raises(ValueError, match="6 tokens do not fit a key/value cache of 5"):
        model(tokens(1, 1), cache=cache)
    with pytest.raises(ValueError, match="17 tokens is longer than block_size=16"):
        model(tokens(1, 17))


@pytest.mark.parametrize("kind", [
    list, np.array, partial(np.array, dtype=np.uint16), torch.tensor,
    lambda ids: list(np.array(ids))], ids=["list", "array", "uint16", "tensor", "list of numpy's"])
def test_ids_of_one_text(kind):
    """Fails if ids as a tokenizer gives them are refused or misread."""
    model = small_model()
    idx = tokens(1, 9)
    ids = kind(idx[0].tolist())
    assert torch.equal(model(ids)[0], model(idx)[0])
    assert torch.equal(model(ids[:-1], ids[1:])[1], model(idx[:, :-1], idx[:, 1:])[1])
    assert torch.equal(model.generate(ids, 5, temperature=0),
                       model.generate(idx, 5, temperature=0))
    for text in ("text", ["text"]):
        for call in (model, partial(model.generate, max_new_tokens=3)):
            with pytest.raises(TypeError, match="token ids, not text.*load_tokenizer"):
                call(text)


@pytest.mark.parametrize("convert", [lambda m: m, GPT2.to_int8], ids=["float32", "int8"])
def test_logits_beside_the_loss(convert):
    """Fails if logits and loss cannot be had together, or differ from those alone."""
    model = convert(small_model())
    idx = tokens(3, 9)
    logits, loss = model(idx, idx, return_logits=True)
    assert torch.equal(logits, model(idx)[0]) and torch.equal(loss, model(idx, idx)[1])


@torch.no_grad()
@pytest.mark.parametrize("flags", [*MATRIX, dict(rope=True, bias=False)], ids=setting_id)
def test_inside_the_model(tmp_path, flags):
    """Fails if hidden states or attention weights are others than transformers', or, where it
    cannot say, do not turn the values into what the attention returns."""
    model = small_model(**flags)
    idx = tokens(2, 16)
    states, weights = model.inspect(idx)
    expected = []
    for block, x in zip(model.transformer.h, states, strict=False):
        attn = block.attn
        *_, v = attn.c_attn(block.ln_1(x)).split(attn.sizes, dim=-1)
        v = attn.split_heads(v).repeat_interleave(6 // model.config.kv_heads, dim=1)
        y = (weights[len(expected)] @ v).transpose(1, 2).flatten(2)
        assert_close(attn.c_proj(y), attn(block.ln_1(x), rotary_tables(
            torch.arange(16), 8, 10000.0) if flags.get("rope") else None), 1e-4)
        expected.append(None)
    mask = model_py.visible(torch.arange(16), torch.arange(16), model.config.window_size)
    assert all((w[..., ~mask] == 0).all() and w.shape == (2, 6, 16, 16) for w in weights)
    assert torch.equal(states[-1], model.hidden(idx)) and len(states) == 3 and len(weights) == 2
    assert not model.transformer.h[0]._forward_pre_hooks
    in_training = small_model(dropout=0.5, **flags).train()
    again = in_training.inspect(idx)
    assert in_training.training and all(map(torch.equal, again[1], weights))
    model.save_pretrained(tmp_path)
    if model_py.choose_architecture(model.config) == "gpt2-variant":
        return
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager").eval()
    out = theirs(idx, output_hidden_states=True, output_attentions=True)
    for ours, others in ((states, out.hidden_states), (weights, out.attentions)):
        for a, b in zip(ours, others, strict=True):
            assert_close(a, b, 1e-4)


def test_the_file_stands_alone(tmp_path):
    """Fails if `python model.py` needs any file beside it or any package but torch."""
    shutil.copy(model_py.__file__, tmp_path / "model.py")
    code = ("import model, sys\nmodel.main()\n"
            "assert not {'data', 'requests', 'tiktoken'} & sys.modules.keys()")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert "greedy continuation" in done.stdout and "124,439,808" in done.stdout


# --------------------------------------------------------------------------------------------------
# Sampling


@every_flag_setting
def test_cache_changes_no_token(flags):
    """Fails if a cache is one off, overwrites what is still seen, or turns keys twice, or a text
    past block_size is read again from another place."""
    model = small_model(**flags)
    seen = set()
    for length, how in ((1, dict(temperature=0)), (6, dict(top_k=20, top_p=0.95)), (19, {})):
        cached, uncached = (
            model.generate(tokens(2, length), 16, use_cache=use_cache, **how,
                           generator=torch.Generator().manual_seed(1))
            for use_cache in (True, False))
        assert torch.equal(cached, uncached)
        seen.update(cached[:, length:].flatten().tolist())
    assert len(seen) > 16                                        # else the test would show nothing


def test_endless_text(monkeypatch):
    """Fails if angles or places in the ring go wrong past block_size, or the cache grows."""
    model = small_model(rope=True, sliding_window=True, gqa=True)
    caches = []
    new_cache = model.new_cache
    monkeypatch.setattr(model, "new_cache",
                        lambda size: caches.append(new_cache(size)) or caches[-1])
    text, uncached = (model.generate(tokens(1, 7), 4 * 16, use_cache=use_cache,
                                     generator=torch.Generator().manual_seed(0))
                      for use_cache in (True, False))
    assert torch.equal(text, uncached)
    assert len(caches) == 1 and caches[0][0].seen == 70
    assert [layer.k.shape for layer in caches[0]] == 2 * [(1, 2, 4, 8)]
    with Largest() as seen:                                      # room for all would be 8 TB
        stream = model.stream(tokens(1, 1), 10**12)
        assert len(list(itertools.islice(stream, 200))) == 200
    largest = max(p.numel() for p in model.parameters())
    assert seen.numel <= largest


@pytest.mark.parametrize("flags", [{}, dict(rope=True), dict(sliding_window=True)], ids=setting_id)
def test_text_past_block_size_is_read_anew(flags):
    """Fails if a text is read again from elsewhere than the last half of block_size."""
    model = small_model(**flags)
    text = model.generate(tokens(1, 19), 12, temperature=0)
    for n in range(19, 31):
        start = 11 if n <= 27 else 20                            # read again at 19, 28 tokens
        assert text[0, n] == model(text[:, start:n])[0][0, -1].argmax()


@pytest.mark.parametrize("how, expected", [
    ({}, [0.15, 0.5, 0.05, 0.3]),
    (dict(temperature=0), [0, 1, 0, 0]), (dict(temperature=1e-45), [0, 1, 0, 0]),
    (dict(temperature=0.5), [0.0225 / 0.365, 0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365]),
    (dict(top_k=1), [0, 1, 0, 0]), (dict(top_k=2), [0, 0.625, 0, 0.375]),
    (dict(top_k=9), [0.15, 0.5, 0.05, 0.3]),
    (dict(top_p=0.49), [0, 1, 0, 0]), (dict(top_p=0.51), [0, 0.625, 0, 0.375]),
    (dict(top_p=0.81), [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
    (dict(top_p=1.0), [0.15, 0.5, 0.05, 0.3]),
    (dict(top_k=2, top_p=0.6), [0, 1, 0, 0])], ids=str)
def test_generate_picks_as_asked(how, expected):
    """Fails if top_p drops the token that it ends on, or the temperature works upside down."""
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().expand(20000, -1)
    ids = sample_token(logits, generator=torch.Generator().manual_seed(0), **how)
    shares = ids.bincount(minlength=4) / 20000
    assert shares.tolist() == pytest.approx(expected, abs=0.012)


def test_ties_do_not_widen_top_k():
    """Fails if more than k tokens are left because they are equally likely."""
    ids = sample_token(torch.zeros(1000, 5), top_k=2)
    assert len(ids.unique()) == 2


def test_generate_stops_each_text_by_itself():
    """Fails if a text continues after its stop token, or is stopped by its neighbour's."""
    model = small_model()
    idx = tokens(2, 3)

    def generate(**how):
        return model.generate(idx, 12, generator=torch.Generator().manual_seed(3), **how)
    free = generate()
    stop = next(t for t in free[0, 3:9].tolist() if t not in free[1, 3:])
    at = 3 + free[0, 3:].tolist().index(stop)
    expected = free.clone()
    expected[0, at:] = stop
    assert torch.equal(generate(stop_token=stop), expected)
    assert torch.equal(generate(), free)
    first = model.generate(idx[:1], 1, temperature=0)[0, 3].item()
    stream = model.stream(idx[:1], 12, temperature=0, stop_token=first)
    assert len(list(stream)) == 1                                # nothing once all have stopped


@every_flag_setting
def test_texts_of_several_lengths(flags):
    """Fails if a text in a batch is written otherwise than alone: shifted, seeing its neighbours,
    read again elsewhere, stopped by its own prompt or not at all."""
    model = small_model(**flags)
    texts = [tokens(n, seed=n) for n in (3, 11, 1, 19)]
    alone = [model.generate(text, 7, temperature=0)[0] for text in texts]
    stop = alone[1][12].item()
    for how in ({}, dict(use_cache=False), dict(stop_token=stop)):
        expected = alone
        if "stop_token" in how:
            expected = [model.generate(text, 7, temperature=0, **how)[0] for text in texts]
        together = model.generate(texts, 7, temperature=0, **how)
        assert all(map(torch.equal, together, expected)) and len(together) == 4
    (unchanged,) = model.generate([texts[0].tolist()], 0)
    assert torch.equal(unchanged, texts[0])
    for wrong in (dict(max_new_tokens=-1), dict(idx=[texts[0], []])):
        with pytest.raises(ValueError, match="must be"):
            model.generate(**dict(idx=texts, max_new_tokens=2) | wrong)


def test_generate_leaves_the_model_as_it_was():
    """Fails if evaluation mode stays on after sampling, even when the sampling is broken off."""
    model = small_model(dropout=0.5)
    for mode in (True, False):
        model.train(mode)
        first, again = (model.generate(tokens(1, 3), 5, temperature=0) for _ in range(2))
        assert torch.equal(first, again)                         # without dropout
        stream = model.stream(tokens(1, 3), 5)
        next(stream)
        assert torch.is_grad_enabled() and not model.training
        stream.close()
        assert all(m.training is mode for m in model.modules())


@pytest.mark.parametrize("wrong", [
    dict(temperature=-1), dict(temperature=math.nan), dict(temperature=math.inf), dict(top_k=0),
    dict(top_p=0), dict(top_p=1.1), dict(max_new_tokens=-1), dict(idx=tokens(1, 0)),
    dict(idx=tokens(1, 2, 3))], ids=str)
def test_generate_refuses(wrong):
    """Fails if a value out of range samples nonsense or dies in a tensor operation."""
    arguments = dict(idx=tokens(1, 3), max_new_tokens=2) | wrong
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}.* must be"):
        small_model().generate(**arguments)


# --------------------------------------------------------------------------------------------------
# Fast paths: each equals the line of torch in its docstring


@pytest.mark.parametrize("vectors, outputs, bias", [
    (1, 40, True), (32, 29, False), (2, 1, True), (33, 40, True)])
def test_products_with_few_vectors(vectors, outputs, bias):
    """Fails if a product in blocks, taken for up to 32 vectors without gradients, is not F.linear,
    also where weights are stored transposed."""
    layer = Linear(24, outputs, bias=bias)
    x = torch.randn(vectors, 1, 24)
    expected = F.linear(x, layer.weight, layer.bias)
    assert layer(x).requires_grad
    with torch.no_grad():
        assert_close(layer(x), expected, 1e-5)
        assert_close(model_py.linear(x, layer.weight.t().contiguous().t(), layer.bias), expected,
                     1e-5)
    assert all(rows % model_py.number_of_blocks(rows) == 0 for rows in range(1, 100))
    assert model_py.number_of_blocks(50257) == 29 and model_py.number_of_blocks(768) == 32


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_products_in_half_precision(monkeypatch, dtype, bias):
    """Fails if a CPU without products of this dtype computes many vectors in it, which takes
    several times as long, or if one that has them does not."""
    layer = Linear(24, 40, bias=bias).to(dtype)
    x = torch.randn(3, 5, 24).to(dtype)
    for has_products in (False, True):
        monkeypatch.setattr(model_py, "cpu_supports", lambda _, found=has_products: found)
        with Largest() as seen:
            y = layer(x)
        exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
        assert y.dtype == dtype and (seen.converted == 0) is has_products
        assert_close(y.double(), exact, 1e-2)
        assert_close(layer(x[:1]).double(), exact[:1], 1e-2)


@pytest.mark.parametrize("dtype, rows, tolerance", [
    (torch.float32, 450, 1e-4), (torch.bfloat16, 50, 2e-2)])
def test_joined_loss_is_the_plain_loss(dtype, rows, tolerance):
    """Fails if a gradient forgets ignored targets, a scaled loss, or a chunk of 16M logits."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 4, generator=generator).to(dtype).requires_grad_()
            for n in (rows, 40_000))
    targets = torch.randint(-1, 40_000, (rows,), generator=generator)
    targets[::5] = -1
    expected = F.cross_entropy(x.double() @ w.double().t(), targets, ignore_index=-1).float()
    loss = model_py.linear_cross_entropy(x, w, targets)
    assert_close(loss, expected, tolerance)
    ours = torch.autograd.grad(7 * loss, (x, w))
    for a, b in zip(ours, torch.autograd.grad(7 * expected, (x, w)), strict=True):
        assert_close(a.float(), b.float(), tolerance * b.abs().max().item())
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.autograd.grad(model_py.linear_cross_entropy(x, w, targets), x, create_graph=True)


def test_int8_is_not_saved(tmp_path):
    """Fails if a folder is overwritten by half of a model that cannot be saved."""
    config = GPT2Config(n_layer=1, n_head=2, n_embd=32, block_size=8, vocab_size=50)
    with pytest.raises(ValueError, match="int8 model cannot be saved"):
        GPT2(config).to_int8().save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_int8_is_a_rounded_weight():
    """Fails if Int8 is not F.embedding with a weight at most half a step off, or F.linear with that
    weight and x at most half a step off; if a vector's result depends on the others; or if large
    neighbours overflow the 16 bits of FBGEMM."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 72, generator=generator)
    weight[0] = 3.0
    bias = torch.randn(40, generator=generator)
    layer = model_py.Int8(weight, bias, lookup=True)
    rounded = layer(torch.arange(40))
    step = weight.abs().amax(dim=1, keepdim=True) / 63
    assert ((rounded - weight).abs() <= 0.5001 * step).all()
    x = torch.randn(2, 3, 72, generator=generator) * torch.tensor([1.0, 100.0, 0.01])[:, None]
    x[0, 0] = 2.0
    x[1, 2] = 0.0
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127
    expected = F.linear((x / scale).round().double() * scale, rounded.double(), bias.double())
    assert_close(layer(x).double() / expected.abs().amax(-1, True),
                 expected / expected.abs().amax(-1, True), 1e-5)
    assert torch.equal(layer(x)[1, 1], layer(x[1:, 1:2])[0, 0])


def test_training_in_half_precision_on_a_cpu(monkeypatch):
    """Fails if a run in bfloat16 starts on a CPU that computes it in software, 8 times slower."""
    monkeypatch.setattr(train, "cpu_supports", lambda dtype: False)
    with pytest.raises(train.UsageError, match="--dtype=bfloat16: this CPU .* leave the flag out"):
        train.train({"dtype": "bfloat16"}, torch.device("cpu"), "")


@torch.no_grad()
def test_two_int8_models():
    """Fails if a copy of model.py, as a notebook loads it, or a second model disturbs what a
    compiled int8 model multiplies by."""
    again = runpy.run_path(model_py.__file__)
    x = tokens(1, 5)
    config = again["GPT2Config"](n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=61)
    models = [small_model().to_int8(), small_model(n_head=3, n_embd=24).to_int8(),
              again["GPT2"](config, seed=0).to_int8()]
    models.append(copy.deepcopy(models[1]))
    for model in models:
        torch.compiler.reset()
        compiled = torch.compile(model.hidden, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), model.hidden(x))


def test_int8_needs_its_kernel(monkeypatch):
    """Fails if int8 on a CPU without FBGEMM, as in a Mac, is not refused in one line."""
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["qnnpack"])
    with pytest.raises(ValueError, match="int8 needs an x86 CPU: use bfloat16"):
        small_model().to_int8()


@torch.no_grad()
@every_flag_setting
def test_int8(flags):
    """Fails if a matrix stays as it was, or logits move by more than rounding does."""
    model = small_model(**flags)
    idx = tokens(2, 13)
    before = model(idx)[0]
    exact = model(idx, idx)[1]
    model.to_int8()
    after = model(idx)[0].float()
    assert all(p.dim() == 1 or "wpe" in name for name, p in model.named_parameters())
    assert 0 < ((after - before).std() / before.std()).item() < 0.08
    assert abs(model(idx, idx)[1].float() - exact) < 0.05
    assert torch.equal(model.generate(idx, 3, temperature=0)[:, :13], idx)
    with torch.enable_grad():
        assert torch.equal(model(idx)[0], after)


@torch.no_grad()
@pytest.mark.parametrize("convert", [lambda m: m, GPT2.to_int8], ids=["float32", "int8"])
@pytest.mark.parametrize("flags", [
    {}, slow(dict(rope=True, gqa=True, sliding_window=True))],
    ids=setting_id)
def test_compiled(flags, convert):
    """Fails if torch.compile needs several graphs or meets what it cannot lower, a product of
    oneDNN's. Compilers take a minute; so here is what they are given."""
    torch.compiler.reset()
    model = convert(small_model(n_layer=1, **flags))
    given = []
    compiled = torch.compile(model.hidden, dynamic=True, fullgraph=True,
                             backend=lambda graph, _: given.append(graph) or graph)
    for length in (3, 11):
        assert_close(compiled(tokens(1, length)), model.hidden(tokens(1, length)), 1e-4)
    operations = [str(node.target) for graph in given for node in graph.graph.nodes]
    assert operations and not any("mkldnn" in name for name in operations)


@pytest.mark.parametrize("flags", [slow(MATRIX[0]), MATRIX[7]], ids=setting_id)
def test_compiled_block_trains(flags):
    """Fails if a block breaks into several graphs, or its gradients change when it is compiled."""
    torch.compiler.reset()
    config = small_config(**flags)
    block = small_model(**flags).transformer.h[0]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    rotary = rotary_tables(torch.arange(9), config.head_dim, 1e4) if config.rope else None
    x = torch.randn(2, 9, config.n_embd, generator=torch.Generator().manual_seed(0))
    inputs = [x.requires_grad_(), *block.parameters()]
    y, z = (f(x, rotary) for f in (block, compiled))
    assert_close(z, y, 1e-5)
    for a, b in zip(*(torch.autograd.grad(out.square().mean(), inputs) for out in (y, z)),
                    strict=True):
        assert_close(b, a, 1e-5 * (1 + a.abs().max()))


# --------------------------------------------------------------------------------------------------
# Checkpoint format


def hf_gpt2(quiet=False, **fields):
    """transformers' GPT-2 with random weights three times as large as usual, which shows a wrong
    GELU. quiet: with a residual stream so small that a wrong epsilon shows in each LayerNorm."""
    shape = dict(n_positions=32, vocab_size=97, n_layer=2, n_head=3, n_embd=24)
    torch.manual_seed(0)
    model = loud(transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape | fields)), 3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if quiet and re.search("wte|wpe|c_proj", name):
                p.mul_(0.02)
    return model


def write_folder(folder, tensors, config):
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@torch.no_grad()
@pytest.mark.parametrize("shape", [
    dict(n_layer=2, n_head=12, n_embd=768), dict(n_layer=2, n_head=12, n_embd=768, quiet=True),
    dict(n_layer=1, n_head=16, n_embd=1024),
    slow(dict(n_layer=1, n_head=20, n_embd=1280)), slow(dict(n_layer=1, n_head=25, n_embd=1600))],
    ids=["gpt2", "gpt2-quiet", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_logits_equal_transformers(tmp_path, shape):
    """Fails if GELU, an epsilon, a layout or the heads' order is not GPT-2's, in or out."""
    theirs = hf_gpt2(**shape)
    idx = tokens(2, 32, vocab_size=97)
    theirs.save_pretrained(tmp_path / "a")
    ours = GPT2.from_pretrained(tmp_path / "a")
    expected = theirs(idx).logits
    assert_close(ours(idx)[0], expected, 1e-4 * expected.std())
    ours.save_pretrained(tmp_path / "b")
    a, b = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "b").eval()
    assert torch.equal(again(idx).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_dialects_of_the_same_checkpoint(tmp_path, dtype, prefix):
    """Fails if OpenAI's own upload (no prefix, masks as weights), a half precision file, or one
    that repeats the tied head is refused, or c_attn.bias is taken for the mask attn.bias."""
    theirs = hf_gpt2().to(dtype)
    idx = tokens(2, 32, vocab_size=97)
    tensors = {prefix + name: t for name, t in theirs.transformer.state_dict().items()}
    tensors["lm_head.weight"] = theirs.transformer.wte.weight.clone()
    for i in range(2):
        mask = torch.ones(1, 1, 32, 32, dtype=torch.uint8).tril()
        tensors[f"{prefix}h.{i}.attn.bias"] = mask
        tensors[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    config = theirs.config.to_dict()
    write_folder(tmp_path, tensors, config)
    ours = GPT2.from_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32} and not ours.training
    expected = theirs.float()(idx).logits
    assert_close(ours(idx)[0], expected, 1e-4 * expected.std())
    write_folder(tmp_path, tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1}, config)
    with pytest.raises(ValueError, match="lm_head.weight differs from the token"):
        GPT2.from_pretrained(tmp_path)
    twice = {"transformer.ln_f.bias": torch.zeros(24), "ln_f.bias": torch.zeros(24)}
    write_folder(tmp_path, tensors | twice, config)
    with pytest.raises(ValueError, match="holds 'ln_f.bias' twice"):
        GPT2.from_pretrained(tmp_path)


@every_flag_setting
def test_save_and_load(tmp_path, flags):
    """Fails if a variant is not saved whole, cannot be trained on, or writes to its own file."""
    model = small_model(dropout=0.1, **flags)
    idx = tokens(2, 16)
    model.save_pretrained(tmp_path)
    for _ in range(2):
        again = GPT2.from_pretrained(str(tmp_path))
        assert again.config == model.config and torch.equal(again(idx)[0], model(idx)[0])
        again.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    again(idx, idx)[1].backward()
    with torch.no_grad():
        for p in again.parameters():
            p -= p.grad
    assert not torch.equal(again(idx)[0], model(idx)[0])
    untouched = GPT2.from_pretrained(tmp_path)                   # the file did not change with them
    assert torch.equal(untouched(idx)[0], model(idx)[0])


@model_py.dataclass
class InventedConfig(GPT2Config):
    """A config with a change to the model that no version knows."""
    invented: bool = model_py.flag(False, "a change")


@torch.no_grad()
@pytest.mark.parametrize("field", [f for f in fields(InventedConfig) if f.type is bool],
                         ids=lambda field: field.name)
def test_others_refuse_a_model_or_agree(tmp_path, field):
    """Fails if transformers loads a model with any boolean changed and computes something else, or
    refuses one that a stock architecture computes."""
    config = InventedConfig(16, 61, 2, 6, 48, **{field.name: not field.default})
    model = loud(GPT2(config, seed=0), 12)
    model.save_pretrained(tmp_path)
    if model_py.choose_architecture(config) != "gpt2-variant":
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        expected = model(tokens(2, 16))[0]
        assert_close(theirs(tokens(2, 16)).logits, expected, 1e-4 * expected.std())
        return
    for reader in (transformers.AutoConfig, transformers.AutoModelForCausalLM):
        with pytest.raises(ValueError, match="gpt2-variant"):
            reader.from_pretrained(tmp_path)


STOCK = [flags | more for flags in MATRIX[:8] for more in ({}, dict(bias=False))
         if flags["rope"] or not flags["sliding_window"]]
STOCK += [dict(rope=True, rope_theta=500.0, gqa=True, n_kv_head=6), dict(gqa=True, n_kv_head=1),
          dict(rope=True, n_head=4, sliding_window=True, window_size=16, flash=False)]


@torch.no_grad()
@pytest.mark.parametrize("flags", STOCK, ids=setting_id)
def test_transformers_computes_the_same(tmp_path, flags):
    """Fails if a flag is lost or changed on the way to a stock architecture, or does not come back
    to the bit; or if config.json tells other tools anything that is not so."""
    model = small_model(**flags)
    model.save_pretrained(tmp_path)
    again = GPT2.from_pretrained(tmp_path)
    assert again.config == model.config
    assert_same_tensors(model.state_dict(), again.state_dict())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert theirs.config.model_type == ("starcoder2" if flags.get("rope") else "gpt2")
    assert theirs.config.max_position_embeddings == 16 and theirs.config.eos_token_id is None
    length = 40 if flags.get("rope") else 16                     # longer than the window
    idx = tokens(5, length)
    expected = model(idx)[0]
    assert_close(theirs(idx).logits, expected, 1e-5 * expected.std())
    start = idx[:, :length - 9]
    greedy = theirs.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=9,
                             do_sample=False)
    cached = model.generate(start, 9, temperature=0) if length == 16 else start
    while cached.size(1) < length:                               # ours would read the text anew
        cached = torch.cat((cached, model(cached)[0][:, -1:].argmax(-1)), dim=1)
    assert torch.equal(greedy, cached)
    theirs.save_pretrained(tmp_path)                             # by their writer, and back
    again = GPT2.from_pretrained(tmp_path)
    assert again.config == model.config
    assert_same_tensors(model.state_dict(), again.state_dict())


@pytest.mark.parametrize("flags, name", [
    (dict(gqa=True), "transformer.h.1.attn.c_attn.bias"),
    (dict(bias=False), "transformer.ln_f.bias"),
    (dict(rope=True, bias=False), "model.layers.1.self_attn.k_proj.bias")], ids=str)
def test_training_by_other_software_is_noticed(tmp_path, flags, name):
    """Fails if weights that no longer have our flags lose what was learned, without a word."""
    model = small_model(**flags)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name][-1] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="contradicts the gpt2_flags .* Delete gpt2_flags"):
        GPT2.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["gpt2_flags"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = theirs(tokens(2, 16)).logits
        assert_close(GPT2.from_pretrained(tmp_path)(tokens(2, 16))[0], expected,
                     1e-5 * expected.std())


OLD = {"n_ctx": 16, "n_positions": 16, "vocab_size": 61, "n_layer": 2, "n_head": 6, "n_embd": 48,
       "activation_function": "gelu_new", "dropout": 0.0, "bias": True, "rope": False,
       "rope_theta": 10000.0, "gqa": False, "n_kv_head": None, "sliding_window": False,
       "window_size": None, "flash": True}


@pytest.mark.parametrize("flags", [flags for flags in MATRIX if flags.keys() <= OLD.keys()],
                         ids=setting_id)
def test_checkpoints_of_older_versions(tmp_path, flags):
    """Fails if a folder in which all variants had their own model_type and our layout is refused or
    misread."""
    model = small_model(**flags)
    tensors = {name: p.t() if name.endswith(model_py.TRANSPOSED) else p
               for name, p in model.state_dict().items()}
    kind = "gpt2-variant" if model.config.beyond_gpt2 else "gpt2"
    shape = {name: value for name, value in vars(model.config).items() if name in OLD}
    write_folder(tmp_path, tensors, {**OLD, **shape, "model_type": kind})
    again = GPT2.from_pretrained(tmp_path)
    assert again.config == model.config
    assert_same_tensors(model.state_dict(), again.state_dict())


def hf_starcoder2(**fields):
    """transformers' StarCoder2 with random weights."""
    shape = dict(max_position_embeddings=32, vocab_size=97, num_hidden_layers=2, hidden_size=24,
                 num_attention_heads=6, num_key_value_heads=2, intermediate_size=96,
                 bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    config = transformers.Starcoder2Config(**shape | fields)
    return loud(transformers.Starcoder2ForCausalLM(config), 3)


def rope(theta, **more):
    return dict(rope_parameters={"rope_type": "default", "rope_theta": theta, **more})


@torch.no_grad()
@pytest.mark.parametrize("fields", [
    {}, rope(500.0), dict(sliding_window=5), dict(num_key_value_heads=6, residual_dropout=0.5),
    dict(num_key_value_heads=1, sliding_window=32, **rope(1e6))], ids=str)
@pytest.mark.parametrize("how", ["whole", "sharded", "without a prefix"])
def test_starcoder2_of_transformers(tmp_path, fields, how):
    """Fails if a StarCoder2 of transformers' making is refused or misread."""
    theirs = hf_starcoder2(**fields)
    saved = theirs.model if how == "without a prefix" else theirs
    saved.save_pretrained(tmp_path, max_shard_size="5KB" if how == "sharded" else "1GB")
    assert (tmp_path / "model.safetensors").exists() == (how != "sharded")
    ours = GPT2.from_pretrained(tmp_path)
    assert ours.config.kv_heads == theirs.config.num_key_value_heads
    idx = tokens(3, 32, vocab_size=97)
    expected = theirs(idx).logits
    assert_close(ours(idx)[0], expected, 1e-5 * expected.std())


@pytest.mark.parametrize("index", [
    "{", "[]", "{}", '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": 5}}',
    '{"weight_map": {}}', '{"weight_map": {"a": "model-1.bin"}}'])
def test_damaged_indexes_are_refused(tmp_path, index):
    """Fails if an index leads out of its folder or to a pickle, or its damage gives a traceback."""
    hf_starcoder2().save_pretrained(tmp_path, max_shard_size="5KB")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="index.json is damaged"):
        GPT2.from_pretrained(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    """Fails if one of two tensors of a name wins silently."""
    hf_starcoder2().save_pretrained(tmp_path, max_shard_size="5KB")
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    name, value = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: value + 1}, second)
    with pytest.raises(ValueError, match=f"{second} holds '{name}', which another"):
        GPT2.from_pretrained(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("bias, prefix", [(True, ""), (False, "_orig_mod.")])
def test_nanogpt_checkpoints(tmp_path, monkeypatch, bias, prefix):
    """Fails if a checkpoint of nanoGPT's is misread (but for its GELU, which a note names), or code
    in it runs."""
    shape = dict(n_layer=2, n_head=6, n_embd=48, block_size=16, vocab_size=61, bias=bias)
    source = loud(GPT2(GPT2Config(**shape), seed=0), 6)
    tensors = {**source.state_dict(), "lm_head.weight": source.transformer.wte.weight}
    source.save_pretrained(tmp_path / "exact")
    edit_config(tmp_path / "exact", activation_function="gelu")
    other = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "exact").eval()
    for i in range(2):
        tensors[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    saved = {"model": {prefix + name: t for name, t in tensors.items()}, "iter_num": 5,
             "model_args": {**shape, "dropout": 0.0}, "best_val_loss": torch.tensor(1.5),
             "config": {"out_dir": "out"}, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}
    torch.save(saved, tmp_path / "ckpt.pt")
    model = GPT2.from_pretrained(tmp_path / "ckpt.pt")
    assert model.config == source.config and "gelu: nanoGPT computes the exact" in model.changes[0]
    assert_same_tensors(model.state_dict(), source.state_dict())
    with pytest.raises(FileNotFoundError, match="name the file: .*/ckpt.pt"):
        GPT2.from_pretrained(tmp_path)
    idx = tokens(3, 16)
    theirs = other(idx).logits
    assert 1e-4 < (model(idx)[0] - theirs).abs().max() / theirs.std() < 0.1
    monkeypatch.setattr(F, "gelu", lambda x, gelu=F.gelu, approximate="": gelu(x))
    assert_close(model(idx)[0], theirs, 1e-5 * theirs.std())
    for damage in (dict(saved, model_args={"n_layer": 2}), dict(saved, model=5), [1], "text",
                   dict(saved, model_args=shape | {"rotary": True}), Malicious(f"{tmp_path}/ran")):
        torch.save(damage, tmp_path / "ckpt.pt")
        with pytest.raises(ValueError, match="ckpt.pt is damaged, or not a checkpoint of nanoGPT"):
            GPT2.from_pretrained(tmp_path / "ckpt.pt")
    for raw in (b"", b"PK", pickle.dumps(5), (tmp_path / "ckpt.pt").read_bytes()[:-99]):
        (tmp_path / "ckpt.pt").write_bytes(raw)
        with pytest.raises(ValueError, match="ckpt.pt is damaged"):
            GPT2.from_pretrained(tmp_path / "ckpt.pt")
    assert not (tmp_path / "ran").exists()


def test_unknown_changes_are_refused(tmp_path):
    """Fails if an unknown change of a variant is ignored, or a plain GPT-2 is refused for one."""
    invented = InventedConfig(16, 61, 2, 6, 48, invented=True)
    GPT2(invented).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config.json.* has the flag 'invented'"):
        GPT2.from_pretrained(tmp_path)
    GPT2(replace(invented, invented=False)).save_pretrained(tmp_path)
    edit_config(tmp_path, summary_type="mean")
    assert GPT2.from_pretrained(tmp_path).config == small_config()


SHAPES_DIFFER = "config.json asks for"
LINEAR = {"type": "linear", "rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
OTHERS = {                                   # made by: field of config.json, value, words of error
    hf_gpt2: [
        ("activation_function", "gelu", "activation_function="), ("n_inner", 25, "n_inner="),
        ("layer_norm_epsilon", 1e-6, "layer_norm_epsilon="), ("model_type", "llama", "model_type="),
        ("tie_word_embeddings", False, "tie_word_embeddings="),
        ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx="),
        ("scale_attn_weights", False, "scale_attn_weights="), ("n_layer", 3, "lacks"),
        ("add_cross_attention", True, "add_cross_attention="), ("n_layer", 1, "holds an unknown"),
        ("n_layer", 10**7, SHAPES_DIFFER), ("n_embd", 27, SHAPES_DIFFER),
        ("n_positions", 16, SHAPES_DIFFER), ("vocab_size", 96, SHAPES_DIFFER)],
    hf_starcoder2: [
        ("hidden_act", "gelu", "hidden_act="), ("use_bias", False, "use_bias="),
        ("tie_word_embeddings", False, "tie_word_embeddings="), ("norm_epsilon", 1e-6, "norm_eps"),
        ("head_dim", 6, "head_dim="), ("intermediate_size", 90, "intermediate_size="),
        ("rope_parameters", 5, "rope_parameters="), ("rope_parameters", LINEAR, "rope_parameters="),
        ("rope_scaling", LINEAR, "rope_scaling="), ("num_key_value_heads", 4, "n_kv_head=4"),
        ("model_type", "mistral", "model_type="), ("model_type", ["gpt2"], "model_type="),
        ("gpt2_flags", {"n_embd": 48}, "hidden_size="), ("gpt2_flags", ["rope"], "gpt2_flags="),
        ("gpt2_flags", {"new": 1}, "flag 'new'"), ("sliding_window", "5", "window_size='5'")],
}


@pytest.mark.parametrize("made, field, value, words", [
    (made, *row) for made, rows in OTHERS.items() for row in rows])
def test_other_models_are_refused(tmp_path, made, field, value, words):
    """Fails if a config.json is loaded that the model cannot compute or the weights do not fit, or
    the error does not name what it is."""
    made().save_pretrained(tmp_path)
    edit_config(tmp_path, **{field: value})
    with pytest.raises(ValueError, match=words):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.parametrize("overrides", [
    dict(gqa=True, n_kv_head=6), dict(sliding_window=True, window_size=16),
    dict(gqa=True, n_kv_head=6, sliding_window=True, window_size=16)], ids=setting_id)
def test_conversion_changes_nothing_that_it_need_not(tmp_path, overrides):
    """Fails if as many groups as heads, or a window of the whole context, moves even one bit."""
    plain = small_model()
    plain.save_pretrained(tmp_path)
    idx = tokens(2, 16)
    model = GPT2.from_pretrained(tmp_path, **overrides)
    assert torch.equal(model(idx)[0], plain(idx)[0]) and model.changes == []
    for use_cache in (True, False):
        ours, expected = (m.generate(idx, 9, temperature=0, use_cache=use_cache)
                          for m in (model, plain))
        assert torch.equal(ours, expected)


def test_heads_are_averaged(tmp_path):
    """Fails if groups are not neighbouring heads, a bias is not averaged, queries are, or equal
    heads do not come back exactly."""
    grouped = small_model(gqa=True)
    repeated = small_model()
    idx = tokens(2, 16)
    state = grouped.state_dict()
    for name in state:
        if "c_attn" in name:
            q, k, v = state[name].split([48, 16, 16])
            k, v = (x.unflatten(0, (2, 8)).repeat_interleave(3, dim=0).flatten(0, 1)
                    for x in (k, v))
            state[name] = torch.cat((q, k, v))
    repeated.load_state_dict(state)
    assert_close(repeated(idx)[0], grouped(idx)[0], 1e-5)
    repeated.save_pretrained(tmp_path)
    model = GPT2.from_pretrained(tmp_path, gqa=True, n_kv_head=2)
    assert model.config == grouped.config and len(model.changes) == 1
    assert "gqa: 6 key/value heads are averaged to 2" in model.changes[0]
    assert all(torch.equal(model.get_parameter(name), p) for name, p in grouped.named_parameters())
    plain = small_model()                                        # heads that differ: their mean
    plain.save_pretrained(tmp_path)
    model = GPT2.from_pretrained(tmp_path, gqa=True, n_kv_head=2)
    k = plain.transformer.h[1].attn.c_attn.bias[48:96].view(2, 3, 8)
    averaged = model.transformer.h[1].attn.c_attn.bias[48:64].view(2, 8)
    assert_close(averaged, (k[:, 0] + k[:, 1] + k[:, 2]) / 3, 1e-6)


TUNE = "fine-tune the model to recover its quality"
KEPT = "sliding_window: the weights are used as they are, with a window of {}; " + TUNE
TEXTS = "block_size: texts of up to {} tokens; the weights were trained on texts of 16"
LEFT = "sliding_window: {}; the weights were trained with a window of 4; " + TUNE


@pytest.mark.parametrize("saved, overrides, changes", [
    ({}, dict(dropout=0.25, flash=False), []),
    ({}, dict(block_size=8), ["block_size: the first 8 of 16 positions are kept"]),
    ({}, dict(rope=True), ["rope: the learned positions (wpe) are dropped; " + TUNE]),
    ({}, dict(sliding_window=True), [KEPT.format(4)]),
    (dict(sliding_window=True), dict(sliding_window=False), [LEFT.format("removed")]),
    (dict(sliding_window=True), dict(window_size=9), [LEFT.format("widened")]),
    (dict(rope=True), dict(block_size=64), [TEXTS.format(64)]),
    (dict(rope=True), dict(block_size=64, sliding_window=True, window_size=40),
     [TEXTS.format(64), KEPT.format(40)]),
    (dict(rope=True), dict(block_size=64, sliding_window=True, window_size=64),
     [TEXTS.format(64), KEPT.format(64)]),
    (dict(rope=True, sliding_window=True), dict(block_size=3), [TEXTS.format(3), KEPT.format(3)]),
], ids=str)
def test_conversions_are_told(tmp_path, saved, overrides, changes):
    """Fails if an override is lost, or changes the model without a word."""
    small_model(**saved).save_pretrained(tmp_path)
    model = GPT2.from_pretrained(tmp_path, **overrides)
    assert model.changes == changes
    assert {name: getattr(model.config, name) for name in overrides} == overrides


def test_other_conversions(tmp_path):
    """Fails if wpe is kept beside rope, positions are cut from the wrong end, or a window stays."""
    plain = small_model()
    plain.save_pretrained(tmp_path)
    idx = tokens(2, 8)
    rotary = GPT2.from_pretrained(tmp_path, rope=True, rope_theta=500.0, block_size=64)
    assert "wpe" not in rotary.transformer and rotary.config.rope_theta == 500
    assert len(rotary.generate(idx[:1], 40)[0]) == 48
    short = GPT2.from_pretrained(tmp_path, block_size=8)
    assert_close(short(idx)[0], plain(idx)[0], 1e-5)
    idx = tokens(2, 16)
    windowed = GPT2.from_pretrained(tmp_path, sliding_window=True, window_size=4)
    assert torch.equal(windowed(idx)[0], small_model(sliding_window=True)(idx)[0])
    windowed.save_pretrained(tmp_path)
    without = GPT2.from_pretrained(tmp_path, sliding_window=False)
    assert torch.equal(without(idx)[0], plain(idx)[0])
    assert GPT2.from_pretrained(tmp_path, block_size=3).config.window_size == 3


@pytest.mark.parametrize("saved, overrides, words", [
    ({}, dict(n_layer=3), "n_layer=3 contradicts.*n_layer=2"),
    ({}, dict(n_embd=60), "n_embd=60"), ({}, dict(vocab_size=7), "vocab_size=7"),
    ({}, dict(n_head=3), "n_head=3"), ({}, dict(bias=False), "bias=False"),
    ({}, dict(block_size=17), "17 exceeds the checkpoint's 16"),
    ({}, dict(n_kv_head=2), "no effect without gqa"),
    ({}, dict(window_size=2), "no effect without sliding_window"),
    (dict(gqa=True), dict(n_kv_head=3), "n_kv_head=3 does not divide the checkpoint's 2"),
    (dict(gqa=True), dict(gqa=False), "trained with gqa"),
    (dict(rope=True), dict(rope=False), "trained with rope"),
    (dict(rope=True), dict(rope_theta=5.0), "rope_theta=5.0 contradicts")], ids=str)
def test_conversions_that_contradict(tmp_path, saved, overrides, words):
    """Fails if an override that the weights cannot follow is ignored or applied all the same."""
    small_model(**saved).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        GPT2.from_pretrained(tmp_path, **overrides)


EVERY_DTYPE = {
    "float32": torch.randn(3, 5), "bfloat16": torch.randn(2, 6).bfloat16(),
    "float16": torch.randn(7).half(), "float64": torch.randn(2, 3).double(),
    "int64": torch.tensor([-2**63, 2**63 - 1]), "int32": torch.tensor([-5], dtype=torch.int32),
    "bool": torch.tensor([True, False, True]), "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0), "no rows": torch.zeros(0, 3, dtype=torch.int64)}


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for name, t in a.items():
        assert b[name].dtype == t.dtype and torch.equal(b[name], t), name


def test_safetensors_both_ways(tmp_path):
    """Fails if a tensor of any dtype or no size differs between us and the safetensors package."""
    save_file(EVERY_DTYPE, tmp_path / "theirs", metadata={"step": "7"})
    raw = (tmp_path / "theirs").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    for pad in (0, 1, 2, 3):                                     # leaves the numbers unaligned
        length = (end - 8 + pad).to_bytes(8, "little")
        (tmp_path / "padded").write_bytes(length + raw[8:end] + b" " * pad + raw[end:])
        tensors, metadata = read_safetensors(tmp_path / "padded")
        assert metadata == {"step": "7"}
        assert_same_tensors(EVERY_DTYPE, tensors)
        for t in tensors.values():                               # not every processor reads across
            assert t.data_ptr() % t.element_size() == 0
    entries = {name: (t.dtype, t.shape) for name, t in EVERY_DTYPE.items()}
    for step in ("8", "88", "888"):
        with open(tmp_path / "ours", "wb") as f:
            write_safetensors(f, entries, iter(EVERY_DTYPE.values()), {"step": step})
        tensors, metadata = read_safetensors(tmp_path / "ours")
        assert metadata["step"] == step and (tmp_path / "ours").read_bytes()[0] % 8 == 0
        assert_same_tensors(EVERY_DTYPE, tensors)
        assert_same_tensors(EVERY_DTYPE, load_file(tmp_path / "ours"))
    for name_length in range(500, 640):                          # 640 bytes: starts like a pickle
        save_file({"x" * name_length: torch.ones(2)}, tmp_path / "long")
        assert len(read_safetensors(tmp_path / "long")[0]) == 1


def edit_header(change):
    """What changes the header of a file's bytes by `change`, which may return a text for it."""
    def changed(raw):
        end = 8 + int.from_bytes(raw[:8], "little")
        entries = json.loads(raw[8:end])
        text = change(entries) or json.dumps(entries)
        return len(text).to_bytes(8, "little") + text.encode() + raw[end:]
    return changed


def edit_entry(**values):
    return edit_header(lambda entries: entries["transformer.ln_f.bias"].update(values))


def rename_entry(entries):
    entries["transformer.x"] = entries.pop("transformer.ln_f.bias")


MALFORMED = "wrong dtype, shape or data_offsets"
DEEP = '{"a":' + 10**5 * "[" + 10**5 * "]" + "}"
ZERO = dict(dtype="F32", shape=[0, 2**62, 2**62], data_offsets=[0, 0])
DAMAGED = {                                  # name: (change to a good file's bytes, words of error)
    "empty": (lambda raw: b"", "truncated: 0 bytes"),
    "seven bytes": (lambda raw: raw[:7], "truncated: 7 bytes"),
    "cut": (lambda raw: raw[:-1], "reaches beyond the end"),
    "cut header": (lambda raw: raw[:99], "header claims"),
    "longer": (lambda raw: raw + b"1234", "4 bytes that belong to no tensor"),
    "huge header": (lambda raw: (2**63).to_bytes(8, "little") + raw[8:],
                    "header claims 9,223,372,036,854,775,808"),
    "no header": (lambda raw: bytes(8) + raw[8:], "header claims 0 bytes"),
    "no JSON": (edit_header(lambda entries: "{no JSON}"), "not JSON"),
    "list": (edit_header(lambda entries: "[1, 2]"), "damaged"),
    "deep": (edit_header(lambda entries: DEEP), "not JSON"),
    "not UTF-8": (lambda raw: raw.replace(b"transformer.wte", b"transformer\xffwte"), "not JSON"),
    "metadata": (edit_header(lambda entries: entries.update(__metadata__={"step": 7})),
                 "__metadata__"),
    "unknown dtype": (edit_entry(dtype="U8"), "dtype 'U8'; known are F32, F16, BF16"),
    "no dtype": (edit_entry(dtype=[]), MALFORMED),
    "wrong dtype": (edit_entry(dtype="F16"), "192 bytes for"),
    "huge": (edit_entry(shape=[2**62, 2**62]), MALFORMED),
    "huge but empty": (edit_header(lambda entries: entries.update(x=ZERO)), MALFORMED),
    "larger": (edit_entry(shape=[2**40]), "192 bytes for"),
    "negative": (edit_entry(shape=[-48]), MALFORMED),
    "float shape": (edit_entry(shape=[48.0]), MALFORMED),
    "no shape": (edit_entry(shape=None), MALFORMED),
    "bool offset": (edit_entry(data_offsets=[False, True]), MALFORMED),
    "no entry": (edit_header(lambda entries: entries.update(x=7)), MALFORMED),
    "one offset": (edit_entry(data_offsets=[0]), MALFORMED),
    "overlap": (edit_entry(data_offsets=[0, 192]), "begins at byte"),
    "backwards": (edit_entry(data_offsets=[192, 0]), "begins at byte"),
    "far": (edit_entry(data_offsets=[2**70, 2**71]), "begins at byte"),
    "missing": (edit_header(rename_entry), "lacks ln_f.bias"),
    "pickle": (lambda raw: pickle.dumps({"a": 1}), "pickle"),
    "zip": (lambda raw: b"PK\x03\x04" + raw, "pickle"),
}


@pytest.mark.parametrize("change, words", DAMAGED.values(), ids=DAMAGED)
def test_damaged_weights_are_refused(tmp_path, change, words):
    """Fails if a damaged file is read, crashes the reader, or costs what its header claims."""
    small_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=words) as e:
        GPT2.from_pretrained(tmp_path)
    assert str(path) in str(e.value) and len(str(e.value)) < 400


def test_a_pickle_is_never_read(tmp_path):
    """Fails if code inside a checkpoint runs, or the message does not say what to do instead."""
    small_model().save_pretrained(tmp_path)
    torch.save(Malicious(str(tmp_path / "ran")), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is a pickle, which could run code"):
        GPT2.from_pretrained(tmp_path)
    os.rename(tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin")
    missing = "model.safetensors not found. pytorch_model.bin is a pickle.* convert it"
    with pytest.raises(FileNotFoundError, match=missing):
        GPT2.from_pretrained(tmp_path)
    unknown = "'gpt3' was not found: it is none of gpt2, gpt2-medium.* a folder with a checkpoint"
    with pytest.raises(FileNotFoundError, match=unknown):
        GPT2.from_pretrained("gpt3")
    assert not (tmp_path / "ran").exists()


SCALARS = [0, -1, 2**24, 2**31, 2**62, 2**63, 2**64, 10**300, 1e308, "F32", "BF16", "gpt2",
           "gpt2-variant"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 70) | st.integers() | st.floats()
    | st.text(max_size=5) | st.sampled_from(SCALARS),
    lambda inner: (st.lists(inner, max_size=4)
                   | st.dictionaries(st.text(max_size=5), inner, max_size=3)), max_leaves=6)
EDITS = st.lists(st.tuples(st.integers(0, 2**20), st.sampled_from(["set", "cut", "insert"]),
                           st.binary(min_size=1, max_size=9)), max_size=4)


def mutate(raw, edits, limit):
    """Edits in the first `limit` bytes, and cuts anywhere."""
    for at, kind, new in edits:
        at %= (len(raw) if kind == "cut" else min(limit, len(raw))) + 1
        after = {"cut": b"", "insert": new + raw[at:], "set": new + raw[at + len(new):]}
        raw = raw[:at] + after[kind]
    return raw


@pytest.mark.parametrize("examples", [80, slow(20_000)])
def test_mutated_checkpoints(tmp_path, examples):
    """Fails if some damage to the weights or config.json raises anything but ValueError."""
    tiny = GPT2Config(4, 5, 1, 2, 4, rope=True, sliding_window=True)
    GPT2(tiny, seed=0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_bytes())
    weights = (tmp_path / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8:end])
    outcomes = Counter()
    keys = st.sampled_from(["dtype", "shape", "data_offsets", None])

    def attempt(what, read, path):
        with contextlib.suppress(ValueError):
            outcomes[what] += 1
            read(path)
            outcomes[what + " read"] += 1

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from(sorted(config)), JSON, max_size=2), EDITS,
           st.lists(st.tuples(st.sampled_from(sorted(header)), keys, JSON), max_size=2), EDITS)
    def check(new_fields, config_edits, entries, edits):
        text = json.dumps(config | new_fields).encode()
        (tmp_path / "config.json").write_bytes(mutate(text, config_edits, len(text)))
        changed = json.loads(weights[8:end])
        for name, key, value in entries:
            if key and isinstance(changed[name], dict):
                changed[name][key] = value
            else:
                changed[name] = value
        text = json.dumps(changed).encode()
        raw = len(text).to_bytes(8, "little") + text + weights[end:]
        (tmp_path / "model.safetensors").write_bytes(mutate(raw, edits, 8 + len(text)))
        attempt("weights", read_safetensors, tmp_path / "model.safetensors")
        attempt("all", GPT2.from_pretrained, tmp_path)
    check()
    assert 0 < outcomes["all read"] < outcomes["weights read"] < outcomes["all"], outcomes


# --------------------------------------------------------------------------------------------------
# Progress


@pytest.mark.parametrize("terminal, seconds, percents", [
    (80, 1, [25, 50, 75, 100]), (80, 0.15, [50, 100]), (80, 0.04, []), (20, 1, [25, 50, 75, 100]),
    (False, 12, [25, 50, 75, 100]), (False, 4, [75, 100]), (False, 1, []),
])
def test_progress(monkeypatch, terminal, seconds, percents):
    """Fails if quick work prints something, a log gets many lines, a line in a terminal of 80 or 20
    columns is wrapped or not overwritten, or the rate or the time left is wrong."""
    monkeypatch.setenv("COLUMNS", str(int(terminal)))
    clock = itertools.count(step=seconds)
    monkeypatch.setattr(cli, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    progress = cli.Progress(99 * "x")
    for percent in (0, 25, 50, 75, 100, 100):
        progress.show(percent * 10**7, 10**9)
    expected = ""
    for percent in percents:
        line = f"{30 * 'x'}  {percent * 10:,}.0 of 1,000.0 MB  {250 / seconds:,.1f} MB/s"
        if percent < 100:
            line += f"  {percent:3}%  {seconds * (100 - percent) / 25:.0f} s left"
        line = line[:terminal - 1].ljust(terminal - 1) if terminal else line
        expected += line + ("\r" if terminal and percent < 100 else "\n")
    assert sys.stderr.getvalue() == expected


# --------------------------------------------------------------------------------------------------
# Downloads


class Hub:
    """The Hugging Face hub on this machine, and under another name the CDN with its large files."""

    def __init__(self, files):
        self.files = files
        self.log = []                 # (host, path, headers) of the requests
        self.failures = iter([])      # statuses of the next answers; None closes the connection
        self.headers = {}             # other headers than the hub's
        self.cut_at = None            # bytes after which the CDN closes the connection
        self.ranges = True            # whether the CDN knows Range
        self.damage = False           # whether the last byte is wrong
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                host = self.headers["Host"].split(":")[0]
                hub.log.append((host, self.path, self.headers))
                hub.answer(self, host, os.path.basename(self.path.split("?")[0]))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.cdn = f"http://localhost:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def address(self, name):
        return f"{self.url}/r/resolve/main/{name}"

    def answer(self, to, host, name):
        data = self.files.get(name)
        status = next(self.failures, 404 if data is None else 200)
        if status is None:
            return
        if status != 200:
            return self.send(to, status, {}, b"<html>no</html>")
        sha1 = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        sha256 = hashlib.sha256(data).hexdigest()
        if host == "localhost":
            self.answer_part(to, data, {"ETag": f'"{sha256[::-1]}"'})
        elif name.endswith((".safetensors", ".bin")):
            place = {"Location": f"{self.cdn}/blob/{name}?signature=x", "ETag": f'"{sha1}"',
                     "X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(data))}
            self.send(to, 302, {**place, **self.headers})
        elif "resolve-cache" in to.path:
            self.send(to, 200, {"ETag": f'W/"{sha1}"', **self.headers}, data)
        else:
            self.send(to, 307, {"Location": f"/api/resolve-cache/{name}", **self.headers})

    def answer_part(self, to, data, headers):
        asked = re.match(r"bytes=(\d+)-$", to.headers["Range"] or "")
        if not asked or not self.ranges:
            return self.send(to, 200, headers, data, self.cut_at)
        begin = int(asked[1])
        if begin >= len(data):
            return self.send(to, 416, {})
        headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        self.send(to, 206, headers, data[begin:], self.cut_at)

    def send(self, to, status, headers, body=b"", cut_at=None):
        to.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            to.send_header(name, value)
        to.end_headers()
        if self.damage:
            body = body[:-1] + b"?"
        to.wfile.write(body[:cut_at])

    def asked(self):
        """The names of the files in `log`."""
        return {os.path.basename(path.split("?")[0]) for _, path, _ in self.log}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    small_model().save_pretrained(tmp_path / "served")
    hub = Hub({name: (tmp_path / "served" / name).read_bytes() for name in MODEL_FILES})
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)     # between two attempts
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def files_under(folder):
    return {os.path.relpath(os.path.join(where, name), folder)
            for where, _, names in os.walk(folder) for name in names}


MODEL_FILES = ("config.json", "model.safetensors")
CACHE = "home/hub/models--openai-community--gpt2"
CACHED = {f"{CACHE}/snapshots/main/{name}" for name in MODEL_FILES}


def test_download_once_then_offline(hub, tmp_path, monkeypatch):
    """Fails if a model's name does not lead to its files, if they are downloaded twice or not used
    offline, or if a header chooses which file is written."""
    idx = tokens(2, 16)
    before = files_under(tmp_path)
    hub.headers = {"X-Repo-Commit": "../../../../evil",
                   "Content-Disposition": "attachment; filename=/tmp/evil"}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="config.json not found, and HF_HUB_OFFLINE"):
        GPT2.from_pretrained("gpt2")
    assert not hub.log
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert torch.equal(GPT2.from_pretrained("gpt2")(idx)[0], small_model()(idx)[0])
    assert files_under(tmp_path) == before | CACHED and hub.asked() == set(MODEL_FILES)
    hub.log.clear()
    for offline in ("", "1"):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        GPT2.from_pretrained("gpt2")
    assert not hub.log


@pytest.mark.parametrize("name, repo, sharded", [
    ("distilgpt2", "distilbert/distilgpt2", False), ("openai-community/gpt2", None, False),
    ("someone/gpt2", None, True), ("some.one/my_model-2", None, False)])
def test_any_model_of_the_hub(hub, tmp_path, monkeypatch, name, repo, sharded):
    """Fails if a name does not lead to its files, or to those of a namesake in the cache; if an
    index is not followed; or if its own tokenizer is overlooked."""
    theirs = hf_starcoder2(vocab_size=61, max_position_embeddings=16)
    theirs.save_pretrained(tmp_path / "new", max_shard_size="5KB" if sharded else "1GB")
    hub.files = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    namesake = tmp_path / "home/hub/models--gpt2/snapshots/main"
    if name == "someone/gpt2":
        small_model().save_pretrained(namesake)
    idx = tokens(2, 16)
    with torch.no_grad():
        expected = theirs(idx).logits
        assert_close(GPT2.from_pretrained(name)(idx)[0], expected, 1e-4 * expected.std())
    places = {path.rpartition("/resolve/main/")[0] for _, path, _ in hub.log if "resolve/" in path}
    assert places == {f"/{repo or name}"}
    assert load_tokenizer(name).name == "gpt2"
    hub.files["vocab.json"] = b'{"a": 0}'
    if "/" in name:
        with pytest.raises(ValueError, match="vocab.json is another tokenizer"):
            load_tokenizer(name)


def test_our_models_on_the_hub(hub, tmp_path):
    """Fails if a model of characters that was uploaded as a run left it comes without its
    tokenizer."""
    table = CharTokenizer("abc\n", 4)
    small_model(vocab_size=5).save_pretrained(tmp_path / "new", table)
    hub.files = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert GPT2.from_pretrained("some/one").config.vocab_size == 5
    assert load_tokenizer("some/one").to_json() == table.to_json()
    hub.log.clear()
    assert load_tokenizer("some/one").to_json() == table.to_json() and not hub.log


@pytest.mark.parametrize("repo", ["gpt2", "openai-community--gpt2"])
def test_the_cache_of_transformers_is_used(hub, tmp_path, repo):
    """Fails if files that transformers downloaded are downloaded again, or an old version used."""
    folder = tmp_path / "home/hub" / f"models--{repo}"
    (folder / "refs").mkdir(parents=True)
    for commit, is_old in ((40 * "a", True), (40 * "b", False)):
        small_model(sliding_window=is_old).save_pretrained(folder / "snapshots" / commit)
    (folder / "refs/main").write_text(40 * "b" + "\n")
    assert not GPT2.from_pretrained("gpt2").config.sliding_window and not hub.log


@pytest.mark.parametrize("ref", [b"", b"main", b"../../../../served", b"\xff\xfe", 41 * b"a", None])
def test_odd_caches(hub, tmp_path, ref):
    """Fails if a damaged refs/main (None: a folder) is an error, or leads out of the cache."""
    path = tmp_path / CACHE / "refs/main"
    path.parent.mkdir(parents=True)
    if ref is None:
        path.mkdir()
    else:
        path.write_bytes(ref)
    GPT2.from_pretrained("gpt2")
    assert files_under(tmp_path) >= CACHED


def test_a_cache_that_cannot_be_written(hub, tmp_path, monkeypatch):
    """Fails if a cache in an impossible place ends in anything but an OSError."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match="file"):
        GPT2.from_pretrained("gpt2")


@pytest.mark.parametrize("ranges", [True, False])
def test_cut_downloads_resume(hub, tmp_path, ranges):
    """Fails if a cut download loses what came, does not say so, starts over although the server
    knows Range, or appends the whole file where it does not."""
    data = os.urandom(1_000_000)
    hub.files["big.safetensors"] = data
    hub.ranges = ranges
    hub.cut_at = 300_000
    wanted = [None]
    for _ in range(2):
        with pytest.raises(ConnectionError) as error:
            download.download(hub.address("big.safetensors"), tmp_path / "x")
        kept = os.path.getsize(tmp_path / "x.part")
        wanted.append(f"bytes={kept}-")
        assert f"{kept:,} bytes are kept: run it again to continue" in str(error.value)
        assert not (tmp_path / "x").exists()
    assert kept > (500_000 if ranges else 200_000)
    hub.cut_at = None
    download.download(hub.address("big.safetensors"), tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == data
    assert [headers["Range"] for host, _, headers in hub.log if host == "localhost"] == wanted
    assert files_under(tmp_path) == {"x", *(f"served/{name}" for name in MODEL_FILES)}


def test_one_run_at_a_time_downloads(hub, tmp_path):
    """Fails if two runs append to one file, which destroys it."""
    path = str(tmp_path / "model.safetensors")
    with (cli.lock(path + ".part"),
          pytest.raises(cli.UserError, match="another run is writing to .*safetensors.part")):
        download.download(hub.address("model.safetensors"), path)
    download.download(hub.address("model.safetensors"), path)
    assert pathlib.Path(path).read_bytes() == hub.files["model.safetensors"]


def less_room(size, **env):
    os.environ.update(env)
    files_up_to(size)


@pytest.mark.slow
def test_a_disk_that_is_full_during_a_download(hub, tmp_path):
    """Fails if the file is not named, or if the bytes that came are downloaded again."""
    env = {name: os.environ[name] for name in ("HF_ENDPOINT", "HF_HOME")}
    done = run("sample", "--init_from=gpt2", before=partial(less_room, 100_000, **env), code=1)
    one_line(done.err, "model.safetensors.part cannot be written", "100,000 bytes are kept")
    GPT2.from_pretrained("gpt2")
    assert hub.log[-1][2]["Range"] == "bytes=100000-"
    assert files_under(tmp_path / "home") == {name.removeprefix("home/") for name in CACHED}


@pytest.mark.parametrize("failures", [[503], [None, 502, 500]])
def test_failures_that_pass_are_tried_again(hub, tmp_path, failures):
    """Fails if one overloaded server or one lost connection ends a download."""
    hub.failures = iter(failures)
    download.download(hub.address("config.json"), tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == hub.files["config.json"]


@pytest.mark.parametrize("part, refused", [
    (lambda data: b"old", True), (lambda data: bytes(len(data)), True),
    (lambda data: bytes(len(data) + 1), False), (lambda data: data, False),
], ids=["other beginning", "other file", "longer", "complete"])
def test_parts_of_another_file(hub, tmp_path, part, refused):
    """Fails if a .part of another file gets the file's name or is never removed, or a complete one
    is refused."""
    data = hub.files["model.safetensors"]
    (tmp_path / "x.part").write_bytes(part(data))
    if refused:
        with pytest.raises(ConnectionError, match="not the file that was announced.* discarded"):
            download.download(hub.address("model.safetensors"), tmp_path / "x")
        assert not (tmp_path / "x").exists()
    download.download(hub.address("model.safetensors"), tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == data


def failing(status):
    return dict(failures=itertools.repeat(status))


@pytest.mark.parametrize("name", MODEL_FILES)
@pytest.mark.parametrize("answer, outcome", [
    (failing(404), "there is no such file"), (failing(401), "set HF_TOKEN"),
    (failing(403), "check HF_TOKEN"), (failing(503), "try again later"),
    (failing(None), "copy the file to .*HTTPS_PROXY sets a proxy"),
    (dict(damage=True), "not the file that was announced"),
    (dict(headers={"Location": "/../../../evil"}), "no such file"),
    (dict(headers={"Location": "//evil/.."}), "failed"),
    (dict(headers={"Location": "file:///etc/passwd"}), "failed"),
    (dict(headers={"Location": "http://"}), "failed"),
    (dict(headers={"Location": "http://["}), None),
], ids=str)
def test_hub_errors(hub, tmp_path, monkeypatch, name, answer, outcome):
    """Fails if an error page, damaged bytes or a file of this machine are taken for the file, or if
    the message does not say what to do, or quotes the token."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    before = files_under(tmp_path)
    vars(hub).update(answer)
    with pytest.raises((ConnectionError, FileNotFoundError, ValueError)) as error:
        download.hub_file("openai-community/gpt2", name)
    message = str(error.value)
    assert "secret" not in message
    assert outcome is None or re.search(f"{name}: .*{outcome}", message)
    assert files_under(tmp_path) == before


def test_the_token_stays_with_the_hub(hub, tmp_path, monkeypatch):
    """Fails if HF_TOKEN is sent to another host, does not reach the hub, or is in an error."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    GPT2.from_pretrained("gpt2")
    assert {host for host, _, _ in hub.log} == {"127.0.0.1", "localhost"}
    for host, _, headers in hub.log:
        if host == "127.0.0.1":
            assert headers["Authorization"] == "Bearer hf_secret"
        else:
            assert "hf_secret" not in str(headers)
    for token in ("hf_se\ncret", "hf_secret\u20ac"):
        with pytest.raises((OSError, ValueError)) as e:
            download.download(hub.address("config.json"), tmp_path / "never", token=token)
        assert "hf_se" not in str(e.value)


def test_other_hashes(hub, tmp_path, capsys):
    """Fails if a hash that the caller knows is ignored, a mirror that announces none is refused or
    trusted without a word, or a size that is no number is an error."""
    good = hub.files["model.safetensors"]
    with pytest.raises(ConnectionError, match=64 * "0"):
        download.download(hub.address("config.json"), tmp_path / "x", sha256=64 * "0")
    assert not (tmp_path / "x").exists()
    download.download(f"{hub.cdn}/model.safetensors", tmp_path / "x")
    assert "x: the server announces no hash; only the size was checked" in capsys.readouterr().err
    known = hashlib.sha256(good).hexdigest()
    download.download(f"{hub.cdn}/model.safetensors", tmp_path / "y", sha256=known)
    assert capsys.readouterr().err == ""
    hub.headers = {"X-Linked-Size": "\u00b2"}
    download.download(hub.address("model.safetensors"), tmp_path / "z")
    for name in "xyz":
        assert (tmp_path / name).read_bytes() == good


# --------------------------------------------------------------------------------------------------
# Tokenizers


def test_character_table():
    """Fails if an id means another character after loading, or an unknown character is encoded."""
    t = CharTokenizer("\n abé日", 6)
    assert t.encode("b é日\n").tolist() == [3, 1, 4, 5, 0]
    assert t.decode([3, 1, 6, 5, 7]) == "b <|endoftext|>日"       # id 7: a rounded vocabulary
    assert t.byte_lengths().tolist() == [1, 1, 1, 1, 2, 3, 0]
    assert t.vocab_size == 7 and CharTokenizer("ab").vocab_size == 2
    assert tokenizer.tokenizer_from_json(t.to_json()).to_json() == t.to_json()
    for unknown in ("abz", "ab\U0010ffff", "a\ud83d"):
        with pytest.raises(ValueError, match="is not among the 6"):
            t.encode(unknown)


@needs_bpe
@needs_shakespeare
@pytest.mark.parametrize("kind", ["gpt2", "char", "char without the token"])
def test_transformers_makes_the_same_tokenizer(tmp_path, kind):
    """Fails if transformers' tokenizer gives other ids than ours for real text, or another text for
    them, or turns a character that the model does not know into something."""
    text = SHAKESPEARE.read_text()[:100_000].replace("\n\n", "\r\n<|endoftext|>\t\t")
    text += "\tx\t\ty \r\n\n  z\x00\u3000 日本 'll <|END|>'s\n"
    table = GPT2Tokenizer()
    if kind != "gpt2":
        characters = "".join(sorted(set(text)))
        table = CharTokenizer(characters, len(characters) if kind == "char" else None)
    GPT2(small_config(vocab_size=table.vocab_size)).save_pretrained(tmp_path, table)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = table.encode_prompt(text).tolist()
    assert theirs(text).input_ids == ids and len(theirs) == table.vocab_size
    assert theirs.decode(ids) == table.decode(ids) == text
    assert theirs.eos_token_id == table.end_of_text
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == table.end_of_text
    assert load_tokenizer(tmp_path).to_json() == table.to_json()
    if kind == "gpt2":
        assert theirs(text, split_special_tokens=True).input_ids == table.encode(text).tolist()
        (tmp_path / "meta.json").unlink()                        # as other tools leave it
        assert load_tokenizer(tmp_path).name == "gpt2"
        theirs.save_pretrained(tmp_path)
        assert load_tokenizer(tmp_path).name == "gpt2"
    else:
        with pytest.raises(Exception, match="UNK"):
            theirs("Ж")


def test_another_tokenizer_replaces_the_first(tmp_path):
    """Fails if a folder keeps a file of the tokenizer of the model that was in it: transformers
    would read it."""
    small_model().save_pretrained(tmp_path, CharTokenizer("abc"))
    small_model().save_pretrained(tmp_path)                      # says nothing about a tokenizer
    assert (tmp_path / "tokenizer.json").exists()
    small_model().save_pretrained(tmp_path, GPT2Tokenizer())
    assert {path.name for path in tmp_path.iterdir()} <= {
        *GPT2Tokenizer().files(), "config.json", "model.safetensors"}


def test_a_folder_that_is_not_there_has_no_tokenizer(tmp_path):
    """Fails if GPT-2's tokenizer serves a model whose folder was mistyped."""
    with pytest.raises(FileNotFoundError, match="no_such_folder was not found"):
        load_tokenizer("no_such_folder")
    assert load_tokenizer("gpt2").name == load_tokenizer(tmp_path).name == "gpt2"


def test_a_foreign_tokenizer_is_refused(tmp_path):
    """Fails if ids of another vocabulary are taken for GPT-2's, or a damaged file gives a
    traceback."""
    for name, content in (("vocab.json", '{"a": 0, "b": 1}'), ("vocab.json", '["a"]'),
                          ("tokenizer.json", '{"model": {"vocab": {"a": 0}}}'),
                          ("tokenizer.json", '{"model": {"vocab": [["a", 0.5]]}}'),
                          ("tokenizer.json", "{")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name} (is another tokenizer|cannot be read)"):
            load_tokenizer(tmp_path)
        (tmp_path / name).unlink()


def no_bpe_files():
    os.environ["TIKTOKEN_CACHE_DIR"] = "/nowhere"


@needs_bpe
@pytest.mark.parametrize("before, missing", [
    (None, set()), (no_bpe_files, {"vocab.json", "merges.txt"})])
def test_a_run_does_not_wait_for_the_tokenizer(tmp_path, before, missing):
    """Fails if a run downloads GPT-2's files, does not say that they are missing, or leaves them
    out with them at hand."""
    for split in ("train", "val"):
        random_ids(200).astype("<u2").tofile(tmp_path / f"{split}.bin")
    done = run("train", *flags(dataset=tmp_path, out_dir=tmp_path / "out", max_iters=1,
                               eval_iters=1, n_embd=4), before=before)
    files = {"meta.json", "tokenizer_config.json", "vocab.json", "merges.txt"}
    assert files & {*os.listdir(tmp_path / "out")} == files - missing
    assert ("other programs will find none in" in done.out) == bool(missing)


TOO_MANY = "".join(map(chr, range(0x20000, 0x30000)))


@pytest.mark.parametrize("meta", [
    {}, [], {"tokenizer": "bpe"}, {"tokenizer": "char"}, {"tokenizer": "char", "characters": ""},
    {"tokenizer": "char", "characters": "aba"}, {"tokenizer": "char", "characters": TOO_MANY},
    {"tokenizer": "char", "characters": "ab", "end_of_text": 5}, '{"tokenizer', "[" * 99999,
], ids=lambda meta: str(meta)[:50])
def test_damaged_tokenizers(tmp_path, meta):
    """Fails if a damaged meta.json is taken for a tokenizer, or its error does not name it."""
    (tmp_path / "meta.json").write_text(meta if isinstance(meta, str) else json.dumps(meta))
    with pytest.raises(ValueError, match="meta.json is damaged"):
        load_tokenizer(tmp_path)


@needs_bpe
@pytest.mark.parametrize("white", "\n\u3000")
def test_white_space_without_end(white):
    """Fails if a million line breaks, too many for tiktoken, end the preparation of a text."""
    text = "a" + white * 1_000_000 + "b c"
    encode = tokenizer.gpt2_bpe().encode_ordinary
    assert GPT2Tokenizer().encode(text).tolist() == encode(text[:-4]) + encode(text[-4:])


@needs_bpe
@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab'st1.é日🎉 \n\r\t\u00a0\u2028\x1c\x0b"), max_size=60),
       st.integers(1, 12))
def test_pieces_give_the_tokens_of_the_whole(text, size):
    """Fails if text is cut where GPT-2's tokenizer would not cut, so that the tokens change."""
    encode = GPT2Tokenizer().encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "PORTION", size)
        pieces = list(prepare.read_pieces(io.StringIO(text, newline="")))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in encode(piece)] == encode(text).tolist()


@pytest.mark.parametrize("ending", ["\n", "\r\n", " "])
def test_pieces_stay_small(monkeypatch, ending):
    """Fails if a text with Windows' line ends, or without any, is read into memory as a whole."""
    monkeypatch.setattr(prepare, "PORTION", 1000)
    text = io.StringIO(f"word{ending}" * 3000, newline="")
    assert max(map(len, prepare.read_pieces(text))) < 2100


def test_reading_does_not_run_ahead(monkeypatch):
    """Fails if a reader faster than the encoders brings the whole source into memory."""
    monkeypatch.setattr(prepare, "PORTION", 1)
    read = []

    def pieces():
        for i in range(100):
            read.append(i)
            yield prepare.Piece("name", "val", i == 0, "b", position=i)
    encoded = prepare.encode_in_threads(pieces(), CharTokenizer("ab"))
    for taken, (ids, position) in enumerate(encoded):
        assert position == taken and ids["val"][0].tolist() == [1]
        assert len(read) - taken <= 2 * os.cpu_count() + 1
    assert taken == 99


# --------------------------------------------------------------------------------------------------
# Preparing data


def test_preparing_needs_no_torch(other_data):
    """Fails if `prepare.py --help` or a preparation has to wait for torch to be imported, or if
    `python -P` does not find its modules."""
    command = [sys.executable, *SAFE_PATH, "-X", "importtime", prepare.__file__, "--help"]
    done = subprocess.run(command, cwd=other_data, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--val_frac" in done.stdout
    modules = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert {"data.cli", "data.download", "data.tokenizer"} <= modules and "torch" not in modules


@needs_shakespeare
@pytest.mark.parametrize("name, sizes", [
    ("shakespeare_char", (1_003_854, 111_540)),
    pytest.param("shakespeare", (301_966, 36_059), marks=needs_bpe),
])
def test_shakespeare_is_nanogpts(tmp_path, name, sizes):
    """Fails if the split or the tokens differ from nanoGPT's: losses could not be compared."""
    prepare.DATASETS[name](str(tmp_path / "s"), SHAKESPEARE)
    text = SHAKESPEARE.read_text()
    cut = int(len(text) * 0.9)
    ids = {c: i for i, c in enumerate(sorted(set(text)))}
    for split, part, size in zip(("train", "val"), (text[:cut], text[cut:]), sizes, strict=True):
        expected = [ids[c] for c in part]
        if name == "shakespeare":
            expected = tokenizer.gpt2_bpe().encode_ordinary(part)
        assert read_bin(tmp_path / "s", split).tolist() == expected and len(expected) == size


def test_stdlib_needs_no_network(tmp_path, monkeypatch):
    """Fails if the default data set cannot be made offline, has text in both splits, or has more
    than the library's own files in ASCII."""
    names = ["test/test_os.py", "site-packages/x.py", "uni.py", "json/x.py"]
    for name in names + [f"m{i}.py" for i in range(31)]:
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n" + "x = 1\n" * 20 + ("# é" if name == "uni.py" else ""))
    monkeypatch.setattr(socket, "socket", None)
    prepare.stdlib(str(tmp_path / "s"), tmp_path / "lib")
    t = load_tokenizer(tmp_path / "s")
    train_texts, val_texts = (t.decode(read_bin(tmp_path / "s", split)).split("<|endoftext|>")
                              for split in ("train", "val"))
    assert len(train_texts) + len(val_texts) == 32 and val_texts != [""]
    assert not set(train_texts) & set(val_texts) and t.characters.isascii()
    assert not any(text.startswith(("# site", "# test")) for text in train_texts + val_texts)


@pytest.mark.parametrize("kind", ["char", pytest.param("gpt2", marks=needs_bpe)])
def test_own_files(tmp_path, capsys, monkeypatch, kind):
    """Fails if a document is lost, doubled, joined to the next one or cut, or if a hidden or binary
    file is read."""
    texts = {f"{i}.txt": f"text {i} says näh.\n\n" * (i + 1) for i in range(12)}
    (tmp_path / "in/deep").mkdir(parents=True)
    for i, (name, text) in enumerate(texts.items()):
        if i % 2:
            (tmp_path / "in" / name).write_text(text)
        else:
            (tmp_path / f"in/deep/{name}.gz").write_bytes(gzip.compress(text.encode()))
    lines = [f"a line {i}" for i in range(8)]
    records = "".join(json.dumps({"body": line}) + "\n" for line in lines)
    (tmp_path / "in/x.jsonl").write_text(records)
    (tmp_path / "in/.hidden").write_text("hidden")
    (tmp_path / "in/image.png").write_bytes(b"\x89PNG\0\1\2")
    (tmp_path / "in/empty.txt").write_text("")
    monkeypatch.chdir(tmp_path)                                  # paths given decide the split
    code, out, _ = here(capsys, "prepare", "in", f"--name={tmp_path}/set", f"--tokenizer={kind}",
                        "--field=body", "--val_frac=0.3")
    assert code == 0 and "1 files that are not text" in out and "image.png" in out
    t = load_tokenizer("set")
    assert t.name == kind and t.end_of_text == t.vocab_size - 1
    got = {split: t.decode(read_bin("set", split)).split("<|endoftext|>")
           for split in ("train", "val")}
    assert sorted(got["train"] + got["val"]) == sorted([*texts.values(), *lines])
    assert len(got["val"]) > 1
    assert loader.token_counts("set") == {split: len(read_bin("set", split)) for split in got}


@pytest.mark.parametrize("texts, val", [(["a" * 9000, "b" * 100], 911),
                                        (["a" * 100, "b" * 9000], 910)])
def test_few_documents(tmp_path, monkeypatch, texts, val):
    """Fails if validation gets the larger of two files, or a hundredth, as their hashes say."""
    monkeypatch.chdir(tmp_path)
    names = ["4.txt", "5.txt"]                                   # the hash puts 5.txt in val
    for name, text in zip(names, texts, strict=True):
        pathlib.Path(name).write_text(text)
    prepare.own(str(tmp_path / "set"), names, "char")
    found = [read_bin("set", split).tolist() for split in ("train", "val")]
    assert load_tokenizer("set").decode(found[0] + found[1]) == "<|endoftext|>".join(texts)
    assert len(found[1]) == val


def test_half_a_surrogate_pair(tmp_path, capsys):
    """Fails if text that JSON can hold and UTF-8 cannot makes tokens that cannot be decoded."""
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "half \ud83d of 🎉"}))
    code, _, err = here(capsys, "prepare", tmp_path / "x.jsonl", f"--name={tmp_path}/set",
                        "--tokenizer=char", "--val_frac=1")
    assert code == 0, err
    text = load_tokenizer(tmp_path / "set").decode(read_bin(tmp_path / "set", "val"))
    assert text == "half \ufffd of 🎉"


def test_prepare_leaves_other_files_alone(tmp_path, capsys):
    """Fails if a data set replaces a folder with other files, or cannot replace an old data set."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/input.txt").write_text(TEXT)
    code, _, err = here(capsys, "prepare", tmp_path / "mine/input.txt", f"--name={tmp_path}/mine")
    assert code == 1 and (tmp_path / "mine/input.txt").read_text() == TEXT
    assert os.listdir(tmp_path) == ["mine"]
    one_line(err, "input.txt", "--name")
    for _ in range(2):
        argv = [tmp_path / "mine/input.txt", f"--name={tmp_path}/other", "--tokenizer=char"]
        assert here(capsys, "prepare", *argv)[0] == 0


def test_prepare_on_a_full_disk_or_twice_at_once(tmp_path, capsys):
    """Fails if a full disk is not named or keeps half a data set, or if two preparations of one
    data set mix their files."""
    (tmp_path / "in.txt").write_text(TEXT)
    argv = [tmp_path / "in.txt", f"--name={tmp_path}/set", "--tokenizer=char"]
    done = run("prepare", *argv, before=partial(files_up_to, 5000), code=1)
    one_line(done.err, "set.part cannot be written", "File too large")
    assert os.listdir(tmp_path) == ["in.txt"]
    (tmp_path / "set.part").mkdir()
    with cli.lock(f"{tmp_path}/set.part/.lock"):
        code, _, err = here(capsys, "prepare", *argv)
        assert code == 1
        one_line(err, "another run is writing to", "set.part: wait")
    assert here(capsys, "prepare", *argv)[0] == 0                # a dead one is no obstacle
    assert files_under(tmp_path) == {"in.txt", *(f"set/{name}" for name in (
        "train.bin", "val.bin", "meta.json"))}


def no_home():
    cache = pathlib.Path(os.environ.pop("TIKTOKEN_CACHE_DIR"))
    os.environ.update(HOME="/dev/null", TMPDIR="/dev/null")
    import tiktoken.load

    def download(url):
        return (cache / hashlib.sha1(url.encode()).hexdigest()).read_bytes()
    tiktoken.load.read_file = download


@needs_bpe
def test_a_home_that_cannot_be_written(tmp_path):
    """Fails if GPT-2's tokenizer needs a home folder to keep its files in."""
    (tmp_path / "in.txt").write_text(TEXT)
    run("prepare", tmp_path / "in.txt", f"--name={tmp_path}/set", "--val_frac=1", before=no_home)
    assert read_bin(tmp_path / "set", "val").tolist() == by_hand([TEXT])


def test_byte_order_marks(tmp_path, capsys):
    """Fails if a byte order mark becomes a token, or if UTF-16 is taken for a file without text."""
    path = tmp_path / "in.txt"
    command = ["prepare", path, f"--name={tmp_path}/set", "--tokenizer=char"]
    path.write_text(TEXT, encoding="utf-8-sig")
    assert here(capsys, *command)[0] == 0
    assert load_tokenizer(f"{tmp_path}/set").characters == "".join(sorted(set(TEXT)))
    assert sample.read_prompt(f"FILE:{path}") == TEXT
    path.write_text(TEXT, encoding="utf-16")
    code, _, err = here(capsys, *command)
    assert code == 1
    one_line(err, "in.txt cannot be read", "convert it to UTF-8")


@pytest.fixture
def texts(tmp_path):
    """A folder with each kind of file, some longer than a portion. Returns the documents."""
    words = [f"{w} it's\n\n  naïve  東京 {w * 7}\r\n" for w in range(9000)]
    long = "".join(words)
    other = "".join(words[5:3000])
    lines = ["", "first", "a<|endoftext|>b", "half \ud83d of a pair", "", "x" * 5, " "] * 40
    (tmp_path / "in").mkdir()
    records = "".join(json.dumps({"text": line, "n": 1}) + "\n" for line in lines)
    (tmp_path / "in/a.jsonl").write_text(records)
    (tmp_path / "in/b.txt").write_text(long, newline="")
    (tmp_path / "in/c.txt.gz").write_bytes(gzip.compress(other.encode()))
    (tmp_path / "in/d.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "last"}).encode()))
    return [*lines, long, other, "last"]


def by_hand(documents):
    """The tokens: the end of text stands between documents, and none before the first token."""
    ids = []
    for text in documents:
        if ids:
            ids.append(50256)
        ids += tokenizer.gpt2_bpe().encode_ordinary(text)
    return ids


@pytest.mark.parametrize("kind", ["char", pytest.param("gpt2", marks=needs_bpe)])
def test_pairs(tmp_path, capsys, kind):
    """Fails if a prompt counts in the loss, a completion or the end of text after it does not, or
    prompt and completion are not encoded each by itself."""
    made = [(f"{w} {i}? ", f"{w[::-1]}\n" * (i % 3)) for i, w in enumerate(WORDS * 5)]
    records = "".join(json.dumps({"q": q, "a": a, "n": 1}) + "\n" for q, a in made)
    (tmp_path / "x.jsonl").write_text(records)
    code, _, err = here(capsys, "prepare", tmp_path / "x.jsonl", f"--name={tmp_path}/set",
                        "--pairs=q,a", f"--tokenizer={kind}")
    assert code == 0, err
    t = load_tokenizer(tmp_path / "set")
    found = []
    for split in ("train", "val"):
        ids = read_bin(tmp_path / "set", split)
        mask = np.fromfile(tmp_path / f"set/{split}.mask", dtype=np.uint8)
        ends = np.flatnonzero(ids == t.end_of_text)
        assert len(mask) == len(ids) and mask[ends].all() and len(ends) > 5
        for i, m in zip(np.split(ids, ends), np.split(mask, ends), strict=True):
            prompt, completion = (i[m == counted] for counted in (0, 1))
            completion = completion[completion != t.end_of_text]
            assert m.tolist() == sorted(m) or m[0] == 1 and m[1:].tolist() == sorted(m[1:])
            found.append((t.decode(prompt), t.decode(completion)))
            for part, text in zip((prompt, completion), found[-1], strict=True):
                assert part.tolist() == t.encode(text).tolist()
    assert sorted(found) == sorted(made)


def test_few_pairs(tmp_path, capsys):
    """Fails if a pair is divided between training and validation, or one of them gets none."""
    command = ["prepare", tmp_path / "x.jsonl", f"--name={tmp_path}/set", "--pairs",
               "--tokenizer=char"]
    for count, kept in ((1, None), (2, 1), (3, 1), (11, 2)):
        made = [(f"{i}? " * 9 ** (i % 4), f"{WORDS[i]}\n" * i) for i in range(count)]
        records = (json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in made)
        (tmp_path / "x.jsonl").write_text("".join(records))
        code, _, err = here(capsys, *command)
        if kept is None:
            assert code == 1 and "--val_frac=0.1 of 1 pairs leaves none to train on" in err
            continue
        t = load_tokenizer(tmp_path / "set")
        train, val = (t.decode(read_bin(tmp_path / "set", split)).split("<|endoftext|>")
                      for split in ("train", "val"))
        assert sorted(train + val) == sorted(map("".join, made)) and len(val) == kept


def test_skip_bad(tmp_path, capsys):
    """Fails if one bad file stops a folder, one is left out without a word or by default, or the
    text before the bad place stays."""
    (tmp_path / "in").mkdir()
    packed = gzip.compress(random.Random(0).randbytes(999).hex().encode())
    bad = {"cut.gz": packed[:-9], "latin.txt": b"w" * 99999 + b"caf\xe9",
           "x.jsonl": b'{"text": "w"}\n{"txt": "w"}\n'}
    good = {"good.txt": b"abba" * 9, "good.jsonl": b'{"text": "dada"}'}
    for name, content in {**bad, **good}.items():
        (tmp_path / "in" / name).write_bytes(content)
    if sys.platform == "linux":
        bad["broken.txt"] = "/proc/self/mem"                     # opens, but cannot be read
        os.symlink(bad["broken.txt"], tmp_path / "in/broken.txt")
    command = ["prepare", tmp_path / "in", f"--name={tmp_path}/set", "--tokenizer=char",
               "--val_frac=1"]
    assert here(capsys, *command)[0] == 1
    code, out, _ = here(capsys, *command, "--skip_bad")
    assert code == 0 and out.count("left out: ") == len(bad)
    assert all(f"in/{name}" in out for name in bad)
    text = load_tokenizer(tmp_path / "set").decode(read_bin(tmp_path / "set", "val"))
    assert text == "dada<|endoftext|>" + "abba" * 9


@needs_bpe
def test_stopped_and_prepared(texts, tmp_path, capsys, monkeypatch):
    """Fails if a stopped preparation leaves a data set or disturbs the next, portions come back in
    another order, an end of text is lost or doubled, or a cut changes tokens."""
    command = ["prepare", tmp_path / "in", f"--name={tmp_path}/set", "--val_frac=1"]
    encode = GPT2Tokenizer.encode

    def stopped(self, text):
        if text == texts[-1]:
            raise KeyboardInterrupt
        return encode(self, text)
    with monkeypatch.context() as patch:
        patch.setattr(GPT2Tokenizer, "encode", stopped)
        assert here(capsys, *command)[0] == 130
    assert not (tmp_path / "set").exists()
    code, out, err = here(capsys, *command)
    assert code == 0 and "\r" not in out + err
    assert read_bin(tmp_path / "set", "val").tolist() == by_hand(texts)
    assert not len(read_bin(tmp_path / "set", "train"))
    assert files_under(tmp_path / "set") == {"meta.json", "train.bin", "val.bin"}
    assert sorted(os.listdir(tmp_path)) == ["in", "set"]


# --------------------------------------------------------------------------------------------------
# Reading tokens


def test_a_name_is_not_a_path(data, tmp_path, monkeypatch):
    """Fails if a folder of notes is taken for the data set of the same name, or a path is not."""
    monkeypatch.setattr(loader, "DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "set", tmp_path / "data/set", tmp_path / "other"):
        shutil.copytree(data, folder)
    places = {"set": str(tmp_path / "data/set"), "./set": "./set", "other": "other", data: data}
    assert {name: loader.find_data(name)[0] for name in places} == places


def test_splits_are_whole_words(tmp_path):
    """Fails if `val` is found within a word, so that training text is used for validation."""
    for name in ("medieval_train.bin", "naval_train_x.bin", "VAL.bin", "trainer.bin", "values.bin"):
        (tmp_path / name).write_bytes(b"12")
    _, paths = loader.find_data(str(tmp_path))
    found = {split: [os.path.basename(path) for path in paths[split]] for split in paths}
    assert found == {"train": ["medieval_train.bin", "naval_train_x.bin"], "val": ["VAL.bin"]}
    (tmp_path / "train_val.bin").write_bytes(b"12")
    with pytest.raises(ValueError, match="train_val.bin has both train and val in its name"):
        loader.find_data(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="there is no train.bin"):
        loader.find_data("no such set")


def raw(ids):
    return np.array(ids, "<u2").tobytes()


def shard(ids, magic=20240520, version=1, claimed=None):
    """A file as llm.c writes it."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if claimed is None else claimed
    return header.tobytes() + raw(ids)


def random_ids(count, seed=0, vocab_size=50257):
    return np.random.default_rng(seed).integers(0, vocab_size, count)


GOOD = list(range(50)) * 4
NAMES = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]


@pytest.mark.parametrize("name, content, words", [
    ("train.bin", b"", "empty"),
    ("train.bin", raw(GOOD)[:-1], "half written (399 bytes)"),
    ("train.bin", raw([*GOOD[:170], 777, *GOOD[171:]]), "token 777, beyond the vocabulary of 50"),
    ("train.bin", raw(GOOD[:150]), "holds 150 tokens, meta.json says 200"),
    ("train.bin", shard(GOOD)[:-2], "200 tokens has 1,424 bytes, not 1,422"),
    ("train.bin", shard(GOOD, claimed=201), "201 tokens has 1,426 bytes, not 1,424"),
    ("train.bin", shard(GOOD)[:900], "200 tokens has 1,424 bytes, not 900"),
    ("val.bin", raw(GOOD[:32]), "a sample with block_size=32 needs 33. Use --block_size=31"),
    ("train.bin", shard(GOOD, version=2), "version 2"),
    ("train.bin", shard(GOOD, magic=20240801), "magic 20240801"),
    ("train.bin", shard(GOOD)[1:], "half written"),
    (NAMES[1], shard(GOOD, magic=0), "magic 0"),
    (NAMES[1], shard(GOOD, magic=1)[:700] + b"x" + shard(GOOD)[701:], "magic 1"),
    (NAMES[1], shard(GOOD)[:900], "truncated"),
    (NAMES[1], shard(GOOD)[:8], "download it again"), (NAMES[1], b"", "download it again"),
    (NAMES[1], raw(GOOD) * 9, "download it again"),
])
def test_damaged_token_files(tmp_path, name, content, words):
    """Fails if a damaged file is trained on, or the header of a shard is taken for tokens."""
    (tmp_path / name).write_bytes(content)
    (tmp_path / "meta.json").write_text(json.dumps({"tokens": {"train": 200}}))
    expected = loader.token_counts(tmp_path).get(name.removesuffix(".bin"))
    with pytest.raises(ValueError, match=f"{name}.*{re.escape(words)}"):
        loader.TokenDataset([str(tmp_path / name)], 32, 50, expected)


def test_samples(tmp_path):
    """Fails if a sample starts at a wrong token or spans two files, or y is not one token later."""
    (tmp_path / "a.bin").write_bytes(raw(range(10)))             # 2 samples, and a token left over
    (tmp_path / "b.bin").write_bytes(shard(range(100, 113)))     # 3 samples
    data = loader.TokenDataset([str(tmp_path / "a.bin"), str(tmp_path / "b.bin")], 4, 200)
    assert len(data) == 5 and data.tokens == 23
    for i, start in enumerate((0, 4, 100, 104, 108)):
        x, y = data[i]
        assert x.tolist() == list(range(start, start + 4))
        assert y.tolist() == list(range(start + 1, start + 5))
    x, y = data.__getitems__([4, 0])
    assert x.dtype == torch.int64 and x.tolist() == [[108, 109, 110, 111], [0, 1, 2, 3]]
    assert y[0, -1] == 112


def test_masked_samples(tmp_path):
    """Fails if a mask is shifted against the tokens, hides one from the input, counts for the wrong
    file, or may be cut or change between a stop and a resume."""
    (tmp_path / "a.bin").write_bytes(raw(range(10)))
    (tmp_path / "b.bin").write_bytes(raw(range(100, 110)))
    (tmp_path / "b.mask").write_bytes(bytes([1, 0, 1, 1, 0, 0, 0, 1, 1, 1]))
    paths = [str(tmp_path / "a.bin"), str(tmp_path / "b.bin")]
    data = loader.TokenDataset(paths, 4, 200)
    x, y = data.__getitems__(range(4))
    assert x.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [100, 101, 102, 103], [104, 105, 106, 107]]
    assert y.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [-1, 102, 103, -1], [-1, -1, 107, 108]]
    x, y = train.read_spans(data, np.array([[1, 4, 6, 9], [0, 0, 1, 4]]))
    assert x.tolist() == [[104, 105, 106, 107], [0, 1, 2, 0]]
    assert y.tolist() == [[-1, -1, 107, 108], [1, 2, 3, -1]]
    before = data.fingerprint
    (tmp_path / "b.mask").write_bytes(bytes([1, 1, 1, 1, 0, 0, 0, 1, 1, 1]))
    assert loader.TokenDataset(paths, 4, 200).fingerprint != before
    (tmp_path / "b.mask").write_bytes(bytes(9))
    with pytest.raises(ValueError, match="b.mask has 9 bytes for 10 tokens"):
        loader.TokenDataset(paths, 4, 200)


def test_data_larger_than_memory_is_mapped(tmp_path):
    """Fails if token files are read into memory."""
    with open(tmp_path / "train.bin", "wb") as f:
        f.truncate(200 << 30)
    if os.stat(f.name).st_blocks:
        pytest.skip("this file system has no sparse files")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.time()
    data = loader.TokenDataset([f.name], 1024, 50)
    assert data.tokens == 100 << 30 and data[len(data) - 1][0].sum() == 0 and data.fingerprint
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    assert time.time() - began < 5


class Numbers:
    """A data set as a sampler sees it, of files with so many samples."""

    def __init__(self, *sizes):
        self.ends = np.cumsum(sizes)

    def __len__(self):
        return int(self.ends[-1])

    def line(self, count, rank=0, ranks=1, seed=3, consumed=0):
        """The first samples that a process reads."""
        sampler = loader.EndlessSampler(self, rank, ranks, seed, consumed)
        return list(itertools.islice(sampler, count))


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any),
       ranks=st.integers(1, 6), seed=st.integers(0, 5), consumed=st.integers(0, 100))
def test_sampler(sizes, ranks, seed, consumed):
    """Fails if an epoch repeats or lacks a sample, two processes read the same, a resume or another
    number of processes changes what a step reads, or a file is left before its end."""
    data = Numbers(*sizes)
    n = len(data)
    line = data.line(3 * n + 200, seed=seed)
    for epoch in (line[:n], line[n:2 * n], line[2 * n:3 * n]):
        assert sorted(epoch) == list(range(n))
        files = np.searchsorted(data.ends, epoch, side="right")
        assert len(list(itertools.groupby(files))) == np.count_nonzero(sizes)
    each = [data.line(10, rank, ranks, seed, consumed) for rank in range(ranks)]
    for i in range(10 * ranks):
        at = consumed + i
        assert each[at % ranks][i // ranks] == line[at]


@given(n=st.integers(1, 40), ranks=st.integers(1, 6), seed=st.integers(0, 5))
def test_sampler_is_torchs(n, ranks, seed):
    """Fails if the order of the samples of one file is not that of torch's DistributedSampler."""
    line = Numbers(n).line(3 * n, seed=seed)
    for epoch in range(3):
        torchs = DistributedSampler(range(n), 1, 0, seed=seed)
        torchs.set_epoch(epoch)
        assert line[epoch * n:(epoch + 1) * n] == list(torchs)
    for rank in range(ranks):                                    # torch's repeats some in the end
        torchs = list(DistributedSampler(range(n), ranks, rank, seed=seed))[:n // ranks]
        assert Numbers(n).line(n // ranks, rank, ranks, seed) == torchs


def test_order_of_shards(monkeypatch):
    """Fails if epochs or seeds are alike, shards come in one order, or all samples are shuffled at
    once, which costs memory."""
    sizes = []
    randperm = torch.randperm

    def noted(n, **how):
        sizes.append(n)
        return randperm(n, **how)
    monkeypatch.setattr(torch, "randperm", noted)
    data = Numbers(7, 0, 13, 13)
    line = data.line(99)
    firsts = {int(np.searchsorted(data.ends, line[at], side="right")) for at in (0, 33, 66)}
    assert len(firsts) > 1 and line[:33] != line[33:66] and line[:33] != data.line(33, seed=4)
    assert max(sizes) == 13


def test_a_large_file_is_shuffled_in_pieces(monkeypatch):
    """Fails if a file of many samples is shuffled at once, if its pieces come in one order or leave
    a sample out, or if a resume shuffles what lies before it."""
    monkeypatch.setattr(loader, "PIECE", 5)
    data = Numbers(23, 10)
    line = data.line(99)
    firsts = set()
    for at in (0, 33, 66):
        assert sorted(line[at:at + 33]) == list(range(33))
        firsts.add(line[at] // 5)
    assert len(firsts) > 1
    randperm = mock.Mock(wraps=torch.randperm)
    monkeypatch.setattr(torch, "randperm", randperm)
    assert data.line(1, consumed=65) == line[65:66]
    assert randperm.call_count == 2                              # of the pieces, and of the last


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4), T=st.integers(1, 9),
       stride=st.integers(1, 9), samples=st.integers(1, 50))
def test_spans(lengths, T, stride, samples):
    """Fails if the spans of an evaluation are not those of a walk through the files, or the chosen
    ones not those that predict most, evenly spaced."""
    stride = min(stride, T)
    walk = []
    for file, length in enumerate(lengths):
        first = 1
        begin = 0
        while first < length:
            end = min(begin + T + 1, length)
            walk.append([file, begin, first, end])
            first = end
            begin += stride
    data = object.__new__(loader.TokenDataset)                   # without files to open
    data.block_size = T
    data.files = [range(n) for n in lengths]
    assert data.spans(stride).tolist() == walk and data.span_counts(stride).sum() == len(walk)
    full = [row for row in walk if row[3] - row[2] >= stride]
    if full:
        at = np.linspace(0, len(full) - 1, min(len(full), samples)).astype(int)
        chosen = data.spans(stride, samples)
        assert chosen.tolist() == [full[i] for i in at]


# --------------------------------------------------------------------------------------------------
# FineWeb's shards

PAGE = b"<html>a mirror's login</html>" * 100


@pytest.fixture
def fineweb(hub, tmp_path, monkeypatch, capsys):
    """Prepares two shards -> (exit code, all that is printed, the files that were asked for)."""
    monkeypatch.setattr(prepare, "DATA", str(tmp_path))
    (tmp_path / "fineweb").mkdir()
    hub.files.update({name: shard(random_ids(4000, i)) for i, name in enumerate(NAMES)})

    def fineweb():
        hub.log.clear()
        code, out, err = here(capsys, "prepare", "fineweb", "--shards=2")
        return code, out + err, hub.asked()
    return fineweb


def test_fineweb_edu(hub, tmp_path, monkeypatch, capsys):
    """Fails if it is not read from llm.c's repository of token shards."""
    monkeypatch.setattr(prepare, "DATA", str(tmp_path))
    hub.files.update({f"edu_{name}": shard(random_ids(4000, i)) for i, name in enumerate(NAMES)})
    code, out, _ = here(capsys, "prepare", "fineweb_edu", "--shards=2")
    assert code == 0 and "8,000 tokens to train on in 2 shards, 4,000 to validate" in out
    assert hub.asked() == {f"edu_{name}" for name in NAMES}
    repo = "/datasets/karpathy/fineweb-edu-100B-gpt2-token-shards/resolve/main/"
    asked = [path for _, path, _ in hub.log if path.startswith("/datasets/")]
    assert sorted(asked) == sorted(f"{repo}edu_{name}" for name in NAMES)
    folder, paths = loader.find_data(f"{tmp_path}/fineweb_edu")
    assert [len(paths[split]) for split in ("train", "val")] == [2, 1]


@needs_bpe
def test_tinystories(hub, tmp_path, monkeypatch, capsys):
    """Fails if a story is lost, cut or joined to the next one, or is in the wrong split."""
    monkeypatch.setattr(prepare, "DATA", str(tmp_path))
    stories = [f"Once {i}.\n\nThe end <of {i}>.\n" for i in range(9)]
    text = "<|endoftext|>\n".join(["", *stories[:7], "  \n"])
    hub.files["TinyStoriesV2-GPT4-train.txt"] = text.encode()
    hub.files["TinyStoriesV2-GPT4-valid.txt"] = "<|endoftext|>\n".join(stories[7:]).encode()
    for _ in range(2):                                           # the second finds the downloads
        code, out, err = here(capsys, "prepare", "tinystories")
        assert code == 0, err
        for split, part in (("train", stories[:7]), ("val", stories[7:])):
            expected = by_hand([story.strip() for story in part])
            assert read_bin(tmp_path / "tinystories", split).tolist() == expected
    first = [path for _, path, _ in hub.log if path.startswith("/datasets/")]
    assert len(first) == 2 and first[0].startswith("/datasets/roneneldan/TinyStories/resolve/main/")


@pytest.mark.parametrize("damage", [lambda whole: whole[:5000], lambda whole: PAGE,
                                    lambda whole: whole[:2] + b"x" + whole[3:]])
def test_fineweb_downloads_what_is_missing(hub, tmp_path, fineweb, damage):
    """Fails if a shard is downloaded twice, a damaged one stays, a stopped download starts over, or
    the counts are wrong."""
    path = tmp_path / "fineweb" / NAMES[1]
    path.with_suffix(".bin.part").write_bytes(hub.files[NAMES[1]][:5000])
    for wanted, ranges in ((set(NAMES), {None, "bytes=5000-"}), (set(), set())):
        code, out, asked = fineweb()
        assert code == 0 and asked == wanted
        assert {headers["Range"] for _, _, headers in hub.log} == ranges
        assert "8,000 tokens to train on in 2 shards, 4,000 to validate" in out
    path.write_bytes(damage(path.read_bytes()))
    assert fineweb()[::2] == (0, {NAMES[1]})
    assert hub.log[0][1] == f"/datasets/kjj0/fineweb10B-gpt2/resolve/main/{NAMES[1]}"
    for name in NAMES:
        assert (tmp_path / "fineweb" / name).read_bytes() == hub.files[name]


@pytest.mark.parametrize("served, words", [(None, "404"), (PAGE, "magic")])
def test_fineweb_refuses(hub, fineweb, served, words):
    """Fails if a shard that is missing or damaged on the hub is not named, or others are lost."""
    good = hub.files[NAMES[2]]
    hub.files[NAMES[2]] = served
    code, out, _ = fineweb()
    assert code == 1 and words in out
    one_line(out.removeprefix("\n"), NAMES[2])
    hub.files[NAMES[2]] = good
    assert fineweb()[::2] == (0, {NAMES[2]})


def test_fineweb_shows_its_progress(hub, fineweb, monkeypatch):
    """Fails if hours of downloads show nothing, or a line does not say which file it is about."""
    hub.files[NAMES[2]] = shard(random_ids(300_000))
    clock = itertools.count()
    monkeypatch.setattr(cli, "time", SimpleNamespace(monotonic=lambda: 6 * next(clock)))
    lines = fineweb()[1].splitlines()
    assert len([line for line in lines if line.startswith("fineweb, file 3 of 3  0.")]) > 3
    assert any("0.6 of 0.6 MB" in line for line in lines)


# --------------------------------------------------------------------------------------------------
# Training


def test_learning_rate():
    """Fails if the schedule differs from nanoGPT's, the linear one from torch's, or is off by one
    step."""
    made = dict(learning_rate=3.0, min_lr=1.0, warmup_iters=4, lr_decay_iters=10, max_iters=20)

    def nanogpts(it):
        if it < 4:
            return 3.0 * (it + 1) / (4 + 1)
        if it > 10:
            return 1.0
        return 1.0 + 0.5 * (1.0 + math.cos(math.pi * (it - 4) / (10 - 4))) * (3.0 - 1.0)
    for it in range(20):
        assert train.learning_rate(train.Run(**made), it) == pytest.approx(nanogpts(it), rel=1e-12)
    assert train.learning_rate(train.Run(**made), 7) == pytest.approx(2.0)
    default = train.Run(learning_rate=3.0, warmup_iters=0, max_iters=50)
    assert train.learning_rate(default, 0) == 3.0
    assert train.learning_rate(default, 50) == pytest.approx(0.3)
    assert train.learning_rate(train.Run(learning_rate=3.0, decay_lr=False), 1) == 3.0
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3.0)
    torchs = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / 3, total_iters=6)
    linear = train.Run(schedule="linear", **made)
    for it in range(4, 20):
        assert train.learning_rate(linear, it) == pytest.approx(torchs.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        torchs.step()
    assert train.learning_rate(linear, 1) == nanogpts(1)


@pytest.mark.parametrize("name", ["data", "masked"])
def test_equals_a_loop_written_by_hand(name, request, tmp_path):
    """Fails if a step or an evaluation is not as documented: biases decay, or a mean, a clip, a
    rate, the order or a sample is wrong, or targets that count have unequal weights."""
    data = request.getfixturevalue(name)
    changes = dict(weight_decay=0.5, grad_clip=0.5, max_iters=10, eval_interval=5, eval_iters=100)
    run("train", *flags(dataset=data, out_dir=tmp_path / "out", **changes))
    splits = {split: loader.TokenDataset([f"{data}/{split}.bin"], 32, 50)
              for split in ("train", "val")}
    config = GPT2Config(block_size=32, vocab_size=12, n_layer=2, n_head=2, n_embd=32)
    model = GPT2(config, seed=1337)
    named = dict(model.named_parameters())
    no_decay = {name for name in named if name.endswith("bias") or "ln_" in name}
    groups = [{"params": [named[name] for name in no_decay], "weight_decay": 0.0},
              {"params": [named[name] for name in named.keys() - no_decay], "weight_decay": 0.5}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), foreach=False, fused=False)
    order = []
    for epoch in range(2):
        sampler = DistributedSampler(splits["train"], 1, 0, seed=1337)
        sampler.set_epoch(epoch)
        order += list(sampler)
    rows = []
    for step in range(11):
        if step % 5 == 0:
            rows.append([step, *(model(*split.__getitems__(range(len(split))))[1].item()
                                 for split in splits.values())])
        if step == 10:
            break
        lr = 2e-4 + 9e-4 * (1 + math.cos(math.pi * (step - 2) / 8))
        if step < 2:
            lr = 2e-3 * (step + 1) / 3
        for group in optimizer.param_groups:
            group["lr"] = lr
        samples = order[8 * step:8 * step + 8]                   # the four batches of two as one
        _, loss = model(*splits["train"].__getitems__(samples))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        rows.append([step + 1, loss.item(), lr, norm.item()])
    for record, row in zip(curve(tmp_path / "out"), rows, strict=True):
        values = [v for k, v in record.items() if k != "tokens"]
        assert values == pytest.approx(row, rel=2e-5)


def test_evaluation_changes_nothing(data, straight, tmp_path):
    """Fails if an evaluation draws random numbers, or data, that the training then misses."""
    run("train", *flags(dataset=data, dropout=0.1, out_dir=tmp_path, eval_interval=100))
    a = [r for r in curve(straight / "whole") if "loss" in r]
    b = [r for r in curve(tmp_path) if "loss" in r]
    assert len(a) == 9 and a == b


@pytest.mark.parametrize("mode, ranks", [
    ([], 0), slow([], 2), slow(["--fsdp"], 2)])
def test_texts_change_nothing(data, straight, tmp_path, mode, ranks):
    """Fails if a text draws a run's random numbers, is not the model's, is missing at the end or
    comes too often, or if a process takes no part."""
    how = [*flags(dataset=data, dropout=0.1), *mode]
    done = run("train", *how, f"--out_dir={tmp_path / 'with'}", "--sample_interval=4", ranks=ranks)
    if ranks:
        run("train", *how, f"--out_dir={tmp_path / 'whole'}", ranks=ranks)
    same_run(tmp_path / "with", (tmp_path if ranks else straight) / "whole")
    blocks = re.findall(r"--- step (\d):.*\n((?:    \| .*\n)*)", done.out)
    assert [step for step, text in blocks if text] == ["0", "6", "9"] and len(blocks) == 4
    model = GPT2.from_pretrained(tmp_path / "with")
    table = load_tokenizer(data)
    ids = model.generate(torch.tensor([table.encode("\n").tolist()]), 128, 0.8, top_k=200,
                         generator=torch.Generator().manual_seed(1337))
    text = table.decode(ids[0, 1:].tolist()).strip("\n")
    assert blocks[-1][1] == "".join(f"    | {line}\n" for line in text.split("\n"))


def test_texts_of_pairs(tmp_path, capsys):
    """Fails if a text does not begin with the first prompt to validate, or if it shows the
    end-of-text token where the model ends it."""
    (tmp_path / "x.jsonl").write_text('{"prompt": "abc\\nd? ", "completion": ""}\n' * 99)
    here(capsys, "prepare", tmp_path / "x.jsonl", f"--name={tmp_path}/set", "--pairs",
         "--tokenizer=char")
    code, out, err = here(capsys, "train", *flags(
        dataset=tmp_path / "set", out_dir=tmp_path / "out", max_iters=20, eval_interval=20,
        learning_rate=3e-2, sample_interval=20))
    assert code == 0, err
    assert out.split("--- step 20")[1].splitlines()[1:4] == ["    | abc", "    | d? ", ""]


def test_what_a_run_leaves(straight, tmp_path, capsys, monkeypatch):
    """Fails if metrics.jsonl lacks a step or has it twice, if no browser opens the picture, or if a
    comparison overwrites a run's own curve."""
    records = train.read_metrics(str(straight / "whole"))
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 10))
    assert [r["step"] for r in records if "val_loss" in r] == [0, 3, 6, 9]
    assert all(r["tokens_per_second"] > 0 for r in records if "loss" in r)
    odd = tmp_path / "a<b>&\"c'"
    shutil.copytree(straight / "whole", odd)
    with open(odd / "metrics.jsonl", "a") as f:
        f.writelines(f'{{"step": {i}, "loss": 1.5}}\n' for i in range(10, 30_000))
    own = (odd / "loss.svg").read_bytes()
    monkeypatch.chdir(tmp_path)
    code, out, _ = here(capsys, "train", f"--plot={odd},{straight / 'whole'}")
    comparison = pathlib.Path("comparison.svg")
    assert code == 0 and out.strip() == "comparison.svg" and (odd / "loss.svg").read_bytes() == own
    assert os.path.getsize(comparison) < 20_000
    assert "/a&lt;b>&amp;\"c'" in comparison.read_text()
    wrong_lines = ['{"step": 5, "loss": "1.0"}', '{"step": 5, "loss": NaN}',
                   '{"step": 5, "val_loss": [1]}', '[1]', '{"step']
    with open(odd / "metrics.jsonl", "a") as f:
        f.writelines(line + "\n" for line in wrong_lines)
    assert here(capsys, "train", f"--plot={odd}")[0] == 0
    assert "nan" not in (odd / "loss.svg").read_text()
    for path in (odd / "loss.svg", comparison):
        root = xml.etree.ElementTree.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
    (tmp_path / "metrics.jsonl").write_text('{"step')
    code, _, err = here(capsys, "train", f"--out_dir={tmp_path}", "--plot")
    assert code == 1
    one_line(err, "holds no losses to draw: train first")


def exported_step(out):
    _, metadata = read_safetensors(out / "model.safetensors")
    return int(metadata["step"])


@pytest.mark.parametrize("worse", [True, False])
def test_best_only(straight, tmp_path, worse):
    """Fails if --always_save_checkpoint=False loses the best model, or a stop later steps."""
    only = ["--always_save_checkpoint=False"]
    if worse:
        only += ["--learning_rate=1", "--min_lr=1"]
    best = 3 if worse else 9
    out = tmp_path / "cut"
    resume(straight, tmp_path / "whole", *only)
    resume(straight, out, *only, before=partial(at_step, 4, signal.SIGTERM), code=143)
    again = ["--device=cpu", f"--out_dir={out}"]
    done = run("train", *again, "--init_from=resume", before=partial(at_step, 5, signal.SIGTERM),
               code=143)
    assert f"stopped at step 5, saved in {out}. Resume with" in done.out
    assert train.Checkpoint(str(out)).state.step == 5 and exported_step(out) == 3
    done = run("train", *again, "--init_from=auto")
    same_run(out, tmp_path / "whole")
    assert f"(step {best})" in done.out
    assert train.Checkpoint(str(out)).state.step == 9 and exported_step(out) == best


def test_no_step_is_better(data, straight, tmp_path):
    """Fails if a fine-tuning run that only made the model worse loses that model, or does not say
    so, or if such a run cannot resume from its step 0."""
    def how(name):
        return flags(dataset=data, out_dir=tmp_path / name, learning_rate=1, min_lr=1,
                     init_from=straight / "whole")
    whole = tmp_path / "whole"
    done = run("train", *how("whole"))
    assert "The validation loss never improved. Try a lower" in done.out
    before = load_file(straight / "whole/model.safetensors")
    after = load_file(whole / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    run("train", *how("cut"), before=partial(at_step, 2, signal.SIGKILL), code=-9)
    done = run("train", "--init_from=resume", f"--out_dir={tmp_path}/cut", "--device=cpu")
    assert "moved" not in done.out
    same_run(tmp_path / "cut", whole)


@pytest.mark.parametrize("eval_interval, words", [
    (100, ["the loss of step 5 is not finite", "The weights were not updated"]),
    (1, ["the evaluated loss after step 4 is not finite", "Nothing was saved"])])
def test_stops_where_the_loss_is_not_finite(straight, tmp_path, eval_interval, words):
    """Fails if a run trains on after the loss is nan, or saves such weights over good ones."""
    out = tmp_path / "out"
    changes = ["--learning_rate=1e38", "--grad_clip=0", f"--eval_interval={eval_interval}"]
    err = resume(straight, out, *changes, code=1).err
    one_line(err, *words, "e+37)", "The last checkpoint is of step 3", f"--out_dir={out}",
             "--learning_rate=5e+37")
    assert contents(out) == contents(straight / "cut")
    assert all(math.isfinite(v) for r in curve(out) for v in r.values())


def test_a_rising_loss_is_told_once(tmp_path, capsys):
    """Fails if a finite spike goes unnoticed, is reported twice, or if noise counts as one."""
    run = train.Run(out_dir=str(tmp_path))
    log = train.Log(run, None, 0, False)
    trainer = SimpleNamespace(run=run, state=train.State(), saved_step=50, tokens_per_step=8,
                              device=torch.device("cpu"), peak_flops=None)
    losses = [3 + 0.1 * (-1) ** i for i in range(150)]           # mean 3, deviation 0.1
    losses[30] = 9                                               # too early to judge
    for at in (140, 145):
        losses[at] = 4.5
    losses[149] = 3.3
    for step, loss in enumerate(losses, 1):
        trainer.state.step = step
        log.step(trainer, loss, norm=1.0)
    out = capsys.readouterr().out
    assert out.count("!!!") == 1, out
    for words in ("step 141: the loss rose to 4.5000", "had 3.0", "last checkpoint is of step 50"):
        assert words in out


def test_garbage_collection(data, tmp_path, capsys):
    """Fails if Python's garbage collector searches the model at every pause of a long run."""
    gc.unfreeze()
    code, _, _ = here(capsys, "train", *flags(dataset=data, out_dir=tmp_path, max_iters=3))
    assert code == 0 and gc.get_freeze_count() > 10_000
    gc.unfreeze()


def test_trace(data, tmp_path):
    """Fails if --trace writes no trace that Chrome's viewer opens, of the whole step."""
    argv = [f"--{k}={v}" for k, v in TINY.items() if not re.match("(eval|log|max)_", k)]
    argv += [f"--dataset={data}", "--benchmark", f"--trace={tmp_path}/trace.json"]
    out = run("train", *argv).out
    assert f"The trace is in {tmp_path}/trace.json" in out
    trace = json.loads((tmp_path / "trace.json").read_text())
    names = {event["name"] for event in trace["traceEvents"]}
    assert {"aten::addmm", "LinearCrossEntropy", "LinearCrossEntropyBackward"} <= names
    assert any("AdamW" in name for name in names)


def test_ctrl_c(data, straight, tmp_path):
    """Fails if work is lost at Ctrl-C. (SIGTERM: see test_best_only.)"""
    out = tmp_path / "a folder"
    done = run("train", *flags(dataset=data, dropout=0.1, out_dir=out),
               before=partial(at_step, 5, signal.SIGINT), code=130)
    assert f"stopped at step 5, saved in {out}. Resume with" in done.out and not done.err
    assert done.out.count("stopping after this step; Ctrl-C again exits at once") == 1
    last = done.out.splitlines()[-1].strip()
    assert last == f"python train.py --init_from=resume --out_dir='{out}' --device=cpu"
    assert len(curve(out)) == 2 + 5 and train.Checkpoint(str(out)).state.step == 5
    run("train", "--init_from=resume", f"--out_dir={out}", "--device=cpu")
    same_run(out, straight / "whole")


def close_terminal(step):
    """`before` of a process: it runs in a terminal that is closed while it computes `step`."""
    import pty
    master, slave = pty.openpty()
    for stream in (1, 2):
        os.dup2(slave, stream)
    os.close(slave)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    gradients = train.Trainer.gradients

    def hooked(self):
        if self.state.step + 1 == step:
            os.close(master)
            os.kill(os.getpid(), signal.SIGHUP)
        return gradients(self)
    train.Trainer.gradients = hooked


def test_a_closed_terminal(data, straight, tmp_path):
    """Fails if steps are lost when a terminal is closed or a connection breaks."""
    run("train", *flags(dataset=data, dropout=0.1, out_dir=tmp_path),
        before=partial(close_terminal, 5), code=143)
    assert train.Checkpoint(str(tmp_path)).state.step == 5
    run("train", "--init_from=resume", f"--out_dir={tmp_path}", "--device=cpu")
    same_run(tmp_path, straight / "whole")


def test_dropout_differs_per_rank_and_repeats_per_seed(tmp_path):
    """Fails if all ranks have the same dropout mask, or if a run cannot be repeated."""
    write_set(tmp_path / "set", *["abcdefgh" * 50] * 2)          # all samples are equal

    def first_loss(name, ranks, dropout=0.5, seed=1):
        how = dict(max_iters=1, batch_size=1, gradient_accumulation_steps=ranks or 1,
                   dropout=dropout, seed=seed)
        run("train", *flags(dataset=tmp_path / "set", out_dir=tmp_path / name, **how), ranks=ranks)
        return next(r["loss"] for r in curve(tmp_path / name) if "loss" in r)
    assert first_loss("a", 0, dropout=0) == pytest.approx(first_loss("b", 2, dropout=0), rel=1e-6)
    assert first_loss("c", 2) == first_loss("d", 2) != first_loss("e", 2, seed=2)
    # Rank 0 alone has the mask of rank 0.
    assert abs(first_loss("f", 0) - first_loss("c", 2)) > 1e-3


@pytest.mark.parametrize("source, out, typed, expected", [
    ("scratch", "new", {}, dict(train.STDLIB, n_layer=4, dropout=None, batch_size=4)),
    ("scratch", "new", dict(muon=False), dict(muon=False, learning_rate=3e-3, max_iters=1400)),
    ("scratch", "new", dict(dataset="x"), dict(muon=False, learning_rate=3e-3, max_iters=1400)),
    ("scratch", "new", dict(size="gpt2-medium"), dict(n_layer=24, n_head=16, n_embd=1024,
                                                      block_size=1024, muon=False)),
    ("scratch", "new", dict(size="gpt2", dataset="fineweb", batch_size=8),
     dict(n_layer=12, max_iters=9536, learning_rate=1.8e-3, batch_size=8)),
    ("scratch", "new", dict(size="gpt2", n_layer=2, muon=True),
     dict(n_layer=2, n_head=12, n_embd=768, muon=True, learning_rate=3e-3)),
    ("scratch", "new", dict(n_layer=2, batch_size=1), dict(n_layer=2, n_head=4, batch_size=1)),
    ("scratch", "cut", {}, dict(learning_rate=1e-2, n_layer=4)),
    ("whole", "new", {}, dict(learning_rate=3e-5, max_iters=200, dropout=0.1, n_layer=None,
                              always_save_checkpoint=False, beta2=0.99)),
    ("whole", "new", dict(max_iters=9, dropout=0.2),
     dict(max_iters=9, dropout=0.2, warmup_iters=10)),
    ("resume", "cut", {}, dict(learning_rate=2e-3, max_iters=9, dropout=0.1, n_layer=2, seed=1337,
                               always_save_checkpoint=True, device="auto", beta2=0.99)),
    ("resume", "cut", dict(learning_rate=1.0, dropout=0.3, device="cpu", beta2=0.9),
     dict(learning_rate=1.0, max_iters=9, dropout=0.3, n_layer=2, device="cpu", beta2=0.9)),
    ("auto", "cut", dict(max_iters=8), dict(init_from="resume", learning_rate=2e-3, max_iters=8)),
    ("auto", "new", dict(max_iters=8), dict(init_from="scratch", learning_rate=1e-2, n_layer=4,
                                            max_iters=8))])
def test_precedence(straight, tmp_path, source, out, typed, expected):
    """Fails if a flag is not what was typed, else what the checkpoint says, else what the recipe
    says, else its default; or if a resumed run takes over what belongs to the machine."""
    out_dir = straight / out if out == "cut" else tmp_path
    init_from = straight / source if source == "whole" else source
    settled, shape, checkpoint = train.resolve(dict(out_dir=str(out_dir), init_from=str(init_from),
                                                    **typed))
    found = {**vars(settled), **shape}
    assert {name: found.get(name) for name in expected} == expected
    assert (checkpoint is not None) == (settled.init_from == "resume")


def other_optimizers(kind, step=None):
    """`before` of a process: it trains without AdamW for all, and is killed in `step`."""
    def make_optimizers(run, config, parameters, device):
        momentum = dict(lr=run.learning_rate, momentum=0.9)
        if kind == "SGD":
            return [torch.optim.SGD(parameters.values(), **momentum)]
        if kind == "Adafactor":                                  # keeps other things for matrices
            return [torch.optim.Adafactor(parameters.values(), lr=run.learning_rate)]
        matrices = [p for p in parameters.values() if p.dim() >= 2]
        others = [p for p in parameters.values() if p.dim() < 2]
        return [torch.optim.SGD(matrices, **momentum),
                torch.optim.AdamW(others, lr=run.learning_rate)]
    train.make_optimizers = make_optimizers
    if step:
        at_step(step, signal.SIGKILL)


@pytest.mark.parametrize("kind, mode, ranks", [
    ("SGD and AdamW", [], 0), slow("SGD", ["--fsdp"], 2),
    ("Adafactor", [], 0)])                                      # which torch cannot shard
def test_other_optimizers_resume(data, tmp_path, kind, mode, ranks):
    """Fails if a checkpoint holds the state of one AdamW only: a killed and resumed run with other
    optimizers then differs from the uninterrupted one."""
    how = dict(dataset=data, dropout=0.1, learning_rate=0.02)
    whole = flags(out_dir=tmp_path / "whole", **how)
    cut = flags(out_dir=tmp_path / "cut", **how)
    swapped = partial(other_optimizers, kind)
    killed = partial(other_optimizers, kind, 5)
    run("train", *whole, *mode, ranks=ranks, before=swapped)
    assert -9 in finish(start("train", *cut, *mode, ranks=ranks, before=killed)).codes
    run("train", *cut, *mode, "--init_from=resume", ranks=ranks, before=swapped)
    same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("kind, word", [("SGD", "uses SGD"), ("SGD and AdamW", "uses SGD, AdamW")])
def test_another_optimizer_is_refused(straight, tmp_path, kind, word):
    """Fails if a run resumes with optimizers that its checkpoint has no state for."""
    out = tmp_path / "out"
    done = resume(straight, out, code=1, before=partial(other_optimizers, kind))
    one_line(done.err, f"{out}/{train.STATE} holds the state of AdamW;", word)
    assert contents(out) == contents(straight / "cut")


def muon_steps(optimizer, parameters, steps=4):
    """The parameters after some steps with random gradients."""
    torch.manual_seed(1)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape) * torch.randn(p.shape[1])
        optimizer.step()
    return parameters


SHAPES = [(8, 8), (24, 8), (8, 24), (8, 8), (5, 13), (1, 7)]


@pytest.mark.parametrize("at_once", [train.Muon.AT_ONCE, 64])
def test_muon_is_torchs(monkeypatch, at_once):
    """Fails if a matrix that shares its products with others, or with some of them, gets another
    update than torch's Muon gives it. Torch's computes in bfloat16; here both have float32."""
    monkeypatch.setattr(train.Muon, "AT_ONCE", at_once)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    torch.manual_seed(0)
    initial = [torch.randn(shape) for shape in SHAPES]
    ours = [torch.nn.Parameter(p.clone()) for p in initial]
    theirs = [torch.nn.Parameter(p.clone()) for p in initial]
    muon_steps(train.Muon([{"params": ours}], lr=0.1, weight_decay=0.5), ours)
    muon_steps(torch.optim.Muon(theirs, lr=0.1, weight_decay=0.5,
                                adjust_lr_fn="match_rms_adamw"), theirs)
    for a, b, before in zip(ours, theirs, initial, strict=True):
        assert_close(a, b, 1e-6)
        assert (a - before).abs().max() > 0.01


def test_muon_by_hand():
    """Fails if the queries', keys' and values' matrices are made orthogonal as one, or if the
    update is not U f(S) V' of the momentum, for its singular value decomposition U S V'."""
    sizes = [12, 4, 4]
    weight = torch.nn.Parameter(torch.zeros(20, 12))
    optimizer = train.Muon([{"params": [weight], "parts": sizes}], lr=1.0, weight_decay=0.0)
    momentum = torch.zeros(20, 12)
    expected = torch.zeros(20, 12)
    torch.manual_seed(0)
    for _ in range(3):
        weight.grad = torch.randn(20, 12)
        momentum = 0.95 * momentum + 0.05 * weight.grad
        nesterov = 0.95 * momentum + 0.05 * weight.grad
        updates = []
        for part in nesterov.split(sizes):
            U, S, Vt = torch.linalg.svd(part.double(), full_matrices=False)
            S = S / S.square().sum().sqrt()
            for _ in range(5):
                S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
            updates.append(0.2 * math.sqrt(12) * U @ torch.diag(S) @ Vt)
        expected -= torch.cat(updates).float()
        optimizer.step()
    assert_close(weight, expected, 1e-5)


@pytest.mark.parametrize("name", ["mlp.c_fc.weight", "mlp.c_fc.bias"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_muon_with_loss_scaling(name, value):
    """Fails if a float16 step that overflows in the gradients of one optimizer changes the weights
    of the other, or if the loss scale does not fall."""
    config = GPT2Config(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=8)
    model = GPT2(config, seed=0)
    parameters = dict(model.named_parameters())
    trainer = train.Trainer(train.Run(muon=True, gradient_accumulation_steps=1), config, model, {},
                            None, torch.device("cpu"), torch.float32)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainer.batch = [torch.arange(8)[None]] * 2
    trainer.load_batch = lambda: None
    signals = SimpleNamespace(received=None)
    train.train_step(trainer, signals)
    before = {name: p.clone() for name, p in parameters.items()}
    parameters[f"transformer.h.0.{name}"].register_hook(lambda grad: torch.full_like(grad, value))
    train.train_step(trainer, signals)
    assert_same_tensors(parameters, before)
    assert trainer.scaler.get_scale() == 4.0 and trainer.state.step == 2


@pytest.mark.parametrize("how, typed, expected", [
    ({}, {}, "AdamW: --muon was not given"), ({}, dict(muon=False), "AdamW: as given"),
    (dict(muon=True), {}, "Muon for the .* rest: the default of stdlib"),
    (dict(muon=True), dict(muon=True), "Muon for .*: as given"),
    (dict(muon=True, init_from="resume"), {}, "Muon for .*: as in the checkpoint")], ids=str)
def test_the_optimizer_is_told(how, typed, expected):
    """Fails if a run tells another reason for its optimizer than the one that holds."""
    assert re.fullmatch(expected, train.describe_optimizer(train.Run(**how), typed))


def test_muon_gets_the_matrices_of_the_blocks():
    """Fails if an embedding, a bias or a LayerNorm is trained by Muon, or nothing trains one."""
    model = GPT2(GPT2Config(n_layer=2, n_head=2, n_embd=8, block_size=8, vocab_size=8))
    named = dict(model.named_parameters())
    muon, adamw = train.make_optimizers(train.Run(muon=True), model.config, named,
                                        torch.device("cpu"))
    names = {id(p): name for name, p in named.items()}
    trained = [{names[id(p)] for group in optimizer.param_groups for p in group["params"]}
               for optimizer in (muon, adamw)]
    matrices = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert trained[0] == {f"transformer.h.{i}.{m}.weight" for i in range(2) for m in matrices}
    assert trained[1] == named.keys() - trained[0]
    assert [g["weight_decay"] for g in adamw.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("size, ranks", [("gpt2", 2), ("gpt2", 8), ("gpt2-xl", 8), ("gpt2", 64)])
def test_muon_divides_its_work(monkeypatch, size, ranks):
    """Fails if one process has much more than its share of the products; 48 parameters are too few
    for 64 processes. The cost of a matrix (m, n), m <= n: 5 (4 m² n + 2 m³)."""
    monkeypatch.setattr(train, "world_size", lambda: ranks)
    with torch.device("meta"):
        model = GPT2(GPT2Config(**train.SIZES[size]))
    blocks = {p: name for name, p in model.named_parameters() if ".h." in name and p.dim() == 2}
    cost = Counter()
    for p, owner in train.share_work(list(blocks)).items():
        for matrix in p.split(model.config.n_embd if "c_attn" in blocks[p] else len(p)):
            m, n = sorted(matrix.shape)
            cost[owner] += 4 * m * m * n + 2 * m**3
    share = sum(cost.values()) / ranks
    largest = 4 * 768**2 * 3072 + 2 * 768**3
    assert max(cost.values()) <= (largest if ranks == 64 else 1.01 * share), cost


def files_of(out):
    """{name: bytes} of the files of a run, without the lock and what is in folders below."""
    return {path.name: path.read_bytes() for path in out.glob("[!.]*") if path.is_file()}


def test_earlier_runs_are_kept(data, tmp_path):
    """Fails if a run that is started where others were loses one of them, or cannot be started from
    one of them."""
    kept = []
    for seed in range(3):
        done = run("train", *flags(dataset=data, out_dir=tmp_path, max_iters=3, seed=seed))
        assert (f"/run-{seed}\n" in done.out) == (seed > 0)
        kept.append(files_of(tmp_path))
    first = tmp_path / "run-1"
    run("train", *flags(dataset=data, out_dir=tmp_path, max_iters=3), f"--init_from={first}")
    assert [files_of(tmp_path / f"run-{n}") for n in range(1, 4)] == kept
    assert len({files["model.safetensors"] for files in kept}) == 3
    assert curve(tmp_path)[0]["val_loss"] == pytest.approx(curve(first)[-1]["val_loss"], rel=1e-6)
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders == {"run-1", "run-2", "run-3"}


def test_models_of_others_are_kept(data, tmp_path):
    """Fails if a run writes its config.json over that of a model in several files, or leaves one of
    them, or a tokenizer of a run that was killed before its weights were written, beside its own.
    """
    hf_starcoder2(vocab_size=61, max_position_embeddings=32).save_pretrained(
        tmp_path, max_shard_size="5KB")
    (tmp_path / "vocab.json").write_text("{}")
    before = files_of(tmp_path)
    assert sum(name.startswith("model") for name in before) > 2
    run("train", *flags(dataset=data, out_dir=tmp_path, max_iters=3))
    assert files_of(tmp_path / "run-1") == before
    assert before.keys() & files_of(tmp_path).keys() == {"config.json"}
    for name in (train.STATE, train.PREVIOUS, "model.safetensors"):
        (tmp_path / name).unlink(missing_ok=True)
    assert train.set_aside(str(tmp_path)) == str(tmp_path / "run-2")
    assert (tmp_path / "run-2/tokenizer.json").exists() and not files_of(tmp_path)


@pytest.mark.parametrize("n", range(1, 10))
def test_interrupted_move_is_finished(straight, tmp_path, monkeypatch, n):
    """Fails if a kill at the n-th file of a run that is moved away tears this run apart, or leaves
    a half that could be resumed."""
    out = tmp_path / "out"
    shutil.copytree(straight / "whole", out)
    shutil.copytree(straight / "cut", out / "run-1")
    files = files_of(out)
    calls = itertools.count(1)
    rename = os.rename

    def killed_at_n(a, b):
        if next(calls) == n:
            raise KeyboardInterrupt
        rename(a, b)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", killed_at_n)
        train.set_aside(str(out))
    assert (out / train.STATE).exists() == (n == 1)
    assert train.set_aside(str(out)) == str(out / "run-2") and train.set_aside(str(out)) is None
    assert len(files) == 9 and files_of(out / "run-2") == files and files_of(out) == {}
    assert files_of(out / "run-1") == files_of(straight / "cut")


# --------------------------------------------------------------------------------------------------
# Distributed


@pytest.fixture(scope="session")
def alone(data, tmp_path_factory):
    """Runs of one process, dropout off: plain GPT-2, and all three flags with Muon."""
    folder = tmp_path_factory.mktemp("alone")
    for name, changes in MODELS.items():
        run("train", *flags(dataset=data, out_dir=folder / name, **changes))
    return folder


MODELS = {"plain": {}, "all": {**ALL, "muon": True}}
FSDP = ["--fsdp"]
HSDP = ["--fsdp", "--hsdp"]
both_modes = pytest.mark.parametrize("mode", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
fsdp_and_slowly_ddp = pytest.mark.parametrize("mode", [slow([]), ["--fsdp"]], ids=["ddp", "fsdp"])


@pytest.mark.parametrize("name, mode", [("plain", []), ("all", []), ("all", ["--fsdp"])])
def test_two_processes_train_as_one(data, alone, tmp_path, name, mode):
    """Fails if gradients are summed instead of averaged, if a norm is of one shard only, or if data
    or evaluation differ with the mode. (Plain GPT-2 under FSDP: see test_torchrun.)"""
    run("train", *flags(dataset=data, out_dir=tmp_path, **MODELS[name]), *mode, ranks=2)
    agree(tmp_path, alone / name)


@pytest.fixture(scope="session")
def alone_masked(masked, tmp_path_factory):
    """A run of one process on masked data."""
    out = tmp_path_factory.mktemp("alone_masked")
    run("train", *flags(dataset=masked, out_dir=out))
    return out


@fsdp_and_slowly_ddp
def test_masked_in_all_modes(masked, alone_masked, tmp_path, mode):
    """Fails if a target's weight depends on the targets that count beside it in its batch or its
    process, or if a resume or --eval_only forgets the mask."""
    how = flags(dataset=masked, out_dir=tmp_path)
    run("train", *how, *mode, ranks=2, before=partial(at_step, 5, signal.SIGKILL), code=-9)
    run("train", *how, *mode, "--init_from=resume", ranks=2)
    agree(tmp_path, alone_masked)
    out = run("train", "--eval_only", "--init_from=resume", f"--out_dir={tmp_path}",
              "--device=cpu").out
    assert f"validation loss {curve(tmp_path)[-1]['val_loss']:.4f} nats per token" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_all_modes_over_50_steps(data, tmp_path, name):
    """Fails if a difference between the modes grows."""
    how = dict(dataset=data, max_iters=50, eval_interval=1, gradient_accumulation_steps=8,
               batch_size=1, **MODELS[name])
    run("train", *flags(out_dir=tmp_path / "1", **how))
    for mode, ranks, machines in ([], 2, 1), ([], 4, 1), (FSDP, 2, 1), (FSDP, 4, 1), (HSDP, 4, 2):
        out = tmp_path / f"{ranks}{''.join(mode)}"
        run("train", *flags(out_dir=out, **how), *mode, ranks=ranks, machines=machines, timeout=300)
        print(f"{name}, {mode} on {ranks}: {agree(out, tmp_path / '1'):.1e} at 50 steps")


@pytest.mark.slow
@pytest.mark.parametrize("mode, ranks, machines", [
    ([], 0, 1), ([], 2, 1), (FSDP, 2, 1), (HSDP, 4, 2)])
def test_compiled_runs(data, tmp_path, alone, mode, ranks, machines):
    """Fails if a mode computes other losses when its blocks are compiled. Needs a C++ compiler."""
    run("train", *flags(dataset=data, out_dir=tmp_path, compile=True), *mode, ranks=ranks,
        machines=machines, timeout=300)
    print(f"{mode} on {ranks or 1}: {agree(tmp_path, alone / 'plain'):.1e} at 9 steps")


@pytest.mark.parametrize("n_layer", [1, 4])
def test_blocks_share_a_compilation(n_layer):
    """Fails if the time to compile grows with the number of layers."""
    torch._dynamo.reset()
    counter = CompileCounter()
    config = GPT2Config(n_layer=n_layer, n_head=2, n_embd=32, block_size=8, vocab_size=50)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend=counter))
        model = train.build_model(train.Run(), config, None, torch.device("cpu"), None, True)
    idx = torch.arange(8)[None]
    _, loss = model(idx, idx)
    loss.backward()
    assert counter.frame_count == 2                              # a block, and the loss


def torchrun(*argv, hook="", nproc=2, options=("--standalone",), tmp):
    """Start torchrun on train.py, in each process of which `hook` is run first."""
    script = HERE / "train.py"
    if hook:
        script = tmp / "train.py"
        script.write_text(f"import signal, sys\nsys.path.insert(0, {str(HERE)!r})\nimport train\n"
                          f"import {__name__}\n{__name__}.{hook}\ntrain.main()\n")
    command = [sys.executable, "-m", "torch.distributed.run", *options, f"--nproc_per_node={nproc}",
               script, *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            cwd=tmp)


def test_torchrun(data, alone, tmp_path):
    """Fails if the third command of train.py's docstring does not work as it is typed."""
    process = torchrun(*flags(dataset=data, out_dir=tmp_path / "out"), "--fsdp", tmp=tmp_path)
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 0 and "Warning" not in out, out
    assert "fsdp: torchrun started 2 processes" in out, out
    agree(tmp_path / "out", alone / "plain")


@pytest.mark.parametrize("first, then, ranks", [
    ([], ["--fsdp"], 2), slow(["--fsdp"], [], 2)])
def test_checkpoints_cross_modes(data, alone, tmp_path, first, then, ranks):
    """Fails if only the mode that wrote a checkpoint can read it (one process and HSDP: see the
    next), or if the other ranks do not hear of a SIGTERM to one rank."""
    how = dict(dataset=data, out_dir=tmp_path, muon=True, **ALL)
    stop = partial(at_step, 5, signal.SIGTERM, "1")
    run("train", *flags(**how), *first, ranks=2, before=stop, code=143)
    run("train", "--init_from=resume", f"--out_dir={tmp_path}", "--device=cpu", *then, ranks=ranks)
    agree(tmp_path, alone / "all")


def test_two_machines_share_copies(data, alone, tmp_path):
    """Fails if HSDP trains otherwise than one process, or if its checkpoints and those of the other
    modes are not the same."""
    hsdp = dict(ranks=4, machines=2)
    how = dict(dataset=data, out_dir=tmp_path, muon=True, **ALL)
    again = ["--init_from=resume", f"--out_dir={tmp_path}", "--device=cpu"]
    at_4 = partial(at_step, 4, signal.SIGTERM, "3")
    at_7 = partial(at_step, 7, signal.SIGTERM)
    done = run("train", *flags(**how), "--fsdp", "--hsdp", before=at_4, code=143, **hsdp)
    assert done.out.count("each machine's 2 share a copy") == 1
    assert "--fsdp=True --hsdp=True" in done.out
    run("train", *again, before=at_7, code=143)
    run("train", *again, "--fsdp", "--hsdp", **hsdp)
    agree(tmp_path, alone / "all")


def weigh(folder, when="post"):
    """Write down, after or before a step, how many numbers this process keeps for each optimizer:
    weights and gradients, and the optimizer's state."""
    def hook(optimizer, *_):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        weights = [t for p in parameters for t in (p, p.grad)]
        state = [t for p in parameters for t in optimizer.state[p].values()]
        sizes = [sum(t.to_local().numel() if hasattr(t, "to_local") else t.numel() for t in tensors)
                 for tensors in (weights, state)]
        name = type(optimizer).__name__ + os.environ["RANK"]
        pathlib.Path(folder, name).write_text(json.dumps(sizes))
    getattr(sys.modules["torch.optim.optimizer"], f"register_optimizer_step_{when}_hook")(hook)


def weighed(folder, optimizer, ranks):
    """-> (numbers kept for the weights, and for the state), each a list of all processes."""
    sizes = [json.loads((folder / f"{optimizer}{rank}").read_text()) for rank in range(ranks)]
    return zip(*sizes, strict=True)


@pytest.mark.parametrize("mode, ranks", [
    ([], 2), (["--fsdp"], 2), slow(["--fsdp"], 4)])
def test_each_process_holds_its_share(data, tmp_path, mode, ranks):
    """Fails if FSDP leaves whole weights, gradients or moments in every process, or if Muon keeps
    whole momentum, in whatever mode."""
    shape = dict(n_embd=64, block_size=32, n_layer=2, n_head=2)
    argv = flags(dataset=data, out_dir=tmp_path / "out", max_iters=1, **shape)
    run("train", *argv, *mode, "--muon", ranks=ranks, before=partial(weigh, tmp_path))
    matrices = 2 * 12 * 64 * 64
    others = GPT2.from_pretrained(tmp_path / "out").num_parameters() - matrices
    muon_weights, momentum = weighed(tmp_path, "Muon", ranks)
    adamw_weights, moments = weighed(tmp_path, "AdamW", ranks)
    assert sum(momentum) == matrices and max(momentum) <= 1.02 * matrices / ranks
    run("train", f"--out_dir={tmp_path / 'out'}", "--init_from=resume", "--max_iters=2",
        "--device=cpu", *mode, ranks=ranks, before=partial(weigh, tmp_path, "pre"))
    assert list(weighed(tmp_path, "Muon", ranks))[1] == momentum
    if mode:
        assert sum(muon_weights) == 2 * matrices and max(muon_weights) <= 2.04 * matrices / ranks
        assert sum(adamw_weights) == 2 * others and max(adamw_weights) <= 2.2 * others / ranks
        assert max(moments) <= 2.2 * others / ranks


def watch_memory(folder):
    """weigh, and write down by how much the process grows while it loads and while it saves. The
    pages of a mapped file do not count: all processes share them in the disk cache."""
    ctypes.CDLL(None).mallopt(-3, 1 << 18)                       # give back at once what is freed
    train.prepare_device = lambda device: None                   # which would keep it
    weigh(folder)
    phase = "start"
    first = {}
    peak = Counter()

    def look():
        status = pathlib.Path("/proc/self/status").read_text()
        held = int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024
        peak[phase] = max(peak[phase], held - first.setdefault(phase, held))

    def entering(name, function):
        def entered(*args):
            nonlocal phase
            phase = name
            look()
            result = function(*args)
            pathlib.Path(folder, "grown" + os.environ["RANK"]).write_text(json.dumps(peak))
            return result
        return entered
    train.resolve = entering("load", train.resolve)
    train.Trainer.start = entering("train", train.Trainer.start)
    train.save_export = entering("save", train.save_export)
    train.save_state = entering("save", train.save_state)
    watch = threading.Thread(target=lambda: [look() for _ in iter(lambda: time.sleep(0.002), 0)])
    watch.daemon = True
    watch.start()


def peak_of_a_step(folder):
    """Write down by how much this process grows from before the model is built to the peak of a
    step. The pages of mapped files (torch's own code) do not count."""
    ctypes.CDLL(None).mallopt(-3, 1 << 16)                       # give back at once what is freed
    train.prepare_device = lambda device: None                   # which would keep it

    def status(name):
        found = re.search(rf"{name}:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())
        return int(found[1]) * 1024
    build = train.build_model
    gradients = train.Trainer.gradients
    update = train.Trainer.update
    before = 0

    def built(*args):
        nonlocal before
        before = status("RssAnon")
        return build(*args)

    def begin(trainer):
        pathlib.Path("/proc/self/clear_refs").write_text("5")    # the peak counts from here
        return gradients(trainer)

    def end(trainer):
        update(trainer)
        grown = status("VmHWM") - status("RssFile") - status("RssShmem") - before
        pathlib.Path(folder, os.environ.get("RANK", "0")).write_text(str(grown))
    train.build_model = built
    train.Trainer.gradients = begin
    train.Trainer.update = end


def simulated(processes_of_a_machine, *args, **flags):
    """What a step takes, by .github/scale.py: {what: bytes}, from all layers and from two runs with
    fewer. In a process of its own."""
    with ProcessPoolExecutor(1, mp_context=FORKS) as pool:
        return pool.submit(simulate_here, processes_of_a_machine, *args, **flags).result()


def simulate_here(processes_of_a_machine, *args, **flags):
    torch.set_num_threads(1)                                     # as in `child`
    spec = importlib.util.spec_from_file_location("scale", HERE / ".github/scale.py")
    scale = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scale)
    scale.MACHINE = processes_of_a_machine
    return [scale.on_a_line(whole, *args, **flags) for whole in (True, False)]


@pytest.mark.parametrize("mode, processes", [
    slow("single", 1), slow("DDP", 8), slow("FSDP", 8), ("HSDP", 16)])
def test_simulation_by_hand(mode, processes):
    """Fails if the simulation misses a weight, a gradient, a moment or a message."""
    config = GPT2Config(n_layer=4, n_head=4, n_embd=64, block_size=16, vocab_size=512)
    whole, on_a_line = simulated(8, mode, processes, config)
    assert on_a_line == whole
    everything = 4 * GPT2(config).num_parameters()
    blocks = 4 * config.n_layer * (12 * 64**2 + 13 * 64)
    shards = 8 if mode in ("FSDP", "HSDP") else 1
    for name, times in (("weights", 1), ("gradients", 1), ("optimizer", 2)):
        assert whole[name] == pytest.approx(times * everything / shards, rel=2e-3)
    sent = {                                                     # in a step of two micro-batches
        "single": {},
        "DDP": {"allreduce": 2 * everything * 7 / 8},
        "FSDP": {"allgather_base": 2 * (2 * blocks + everything - blocks) * 7 / 8,
                 "reduce_scatter_base": 2 * everything * 7 / 8}}
    sent["HSDP"] = {**sent["FSDP"], "allreduce": 2 * everything / 8 / 2}     # once a step
    found = {name: size for name, size in whole["sent"].items() if name != "all_reduce"}  # the norm
    assert found == pytest.approx(sent[mode], rel=2e-3)


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize("mode, processes, micro_batches, how", [
    ("single", 1, 2, {}), ("DDP", 2, 2, {}), ("DDP", 4, 2, {}), ("FSDP", 2, 1, {}),
    ("FSDP", 2, 8, {}), ("FSDP", 4, 1, {}), ("FSDP", 4, 8, {}), ("HSDP", 4, 2, {}),
    ("single", 1, 2, {"muon": True}), ("DDP", 2, 2, {"muon": True}), ("FSDP", 2, 2, {"muon": True}),
    ("FSDP", 2, 2, {"grad_checkpoint": True}), ("single", 1, 2, {"grad_checkpoint": True}),
    ("HSDP", 4, 2, {"grad_checkpoint": True})])
def test_simulated_memory(data, tmp_path, mode, processes, micro_batches, how):
    """Fails if the simulated peak of a step is not within 10 % of what real processes grow by, so
    also if DDP or FSDP keep a second copy of the gradients while these accumulate."""
    shape = dict(n_layer=6, n_head=8, n_embd=512, block_size=128, vocab_size=16000)
    batch = dict(batch_size=4, gradient_accumulation_steps=micro_batches * processes)
    argv = flags(dataset=data, out_dir=tmp_path / "out", max_iters=2, eval_interval=2, eval_iters=1,
                 always_save_checkpoint=False, **shape, **batch, **how)
    machines = 2 if mode == "HSDP" else 1
    run("train", *argv, *{"FSDP": FSDP, "HSDP": HSDP}.get(mode, []), machines=machines,
        ranks=0 if mode == "single" else processes, before=partial(peak_of_a_step, tmp_path),
        timeout=300)
    whole, _ = simulated(processes // machines, mode, processes, GPT2Config(**shape),
                         **batch, **how)
    real = [int((tmp_path / str(rank)).read_text()) for rank in range(processes)]
    print(f"{mode} on {processes}, {micro_batches} micro-batches, {how}: "
          f"{max(real) / 1e6:.0f} MB, simulated {whole['peak'] / 1e6:.0f} MB")
    for grown in real:
        assert grown == pytest.approx(whole["peak"], rel=0.1)


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_no_copies_of_the_whole(data, tmp_path, ranks):
    """Fails if FSDP loads the whole model or optimizer in a process, or gathers it to save it."""
    vocab_size = load_tokenizer(data).vocab_size
    config = GPT2Config(n_layer=8, n_head=8, n_embd=512, block_size=64, vocab_size=vocab_size)
    GPT2(config, seed=0).save_pretrained(tmp_path / "weights")
    shutil.copy(f"{data}/meta.json", tmp_path / "weights")
    whole = os.path.getsize(tmp_path / "weights/model.safetensors")
    argv = dict(dataset=data, out_dir=tmp_path / "out", device="cpu", eval_iters=1, batch_size=1,
                gradient_accumulation_steps=ranks, always_save_checkpoint=True)
    for steps, source, loaded in ((1, tmp_path / "weights", 1), (2, "resume", 3)):
        run("train", "--fsdp", *(f"--{name}={value}" for name, value in argv.items()),
            f"--max_iters={steps}", f"--init_from={source}", ranks=ranks,
            before=partial(watch_memory, tmp_path))
        grown = [json.loads((tmp_path / f"grown{rank}").read_text()) for rank in range(ranks)]
        load = sum(g["load"] for g in grown) / whole
        save = sum(g["save"] for g in grown) / whole
        held = max(map(sum, zip(*weighed(tmp_path, "AdamW", ranks), strict=True))) * 4 / whole
        print(f"{ranks} processes: {load:.2f} times the weights to load, {save:.2f} to save, "
              f"{held:.2f} in a step")
        assert load < loaded + 0.2 * ranks                       # shares, and a tensor at a time
        assert save < 0.2 * ranks
        assert held < 4.4 / ranks


@pytest.mark.parametrize("ranks, argv, words", [
    (3, [], ["--gradient_accumulation_steps=4", "among 3", "use 6", "--nproc_per_node=2"]),
    (2, ["--backend=foo"], ["--backend=foo does not work on cpu: use gloo"]),
    (2, ["--device=cuda:1"], ["--device=cuda:1 serves one process"]),
    (2, ["--hsdp"], ["--hsdp has no effect without --fsdp"]),
    (2, ["--fsdp", "--hsdp"], ["--hsdp has no effect on one machine"]),
    (2, ["--init_from=resume", "--block_size=16"], ["--block_size=16 contradicts the checkpoint",
                                                    "block_size=32"])])
def test_refused_under_torchrun(data, straight, tmp_path, ranks, argv, words):
    """Fails if a global batch is silently made smaller, if each process prints a line, or if
    processes wait for others that have ended."""
    out = straight / "whole" if "--init_from=resume" in argv else tmp_path / "out"
    argv = [*flags(dataset=data, out_dir=out), *argv]
    one_line(run("train", *argv, ranks=ranks, code=2, timeout=20).err, *words)


def uneven_machines():
    os.environ["LOCAL_WORLD_SIZE"] = "1" if os.environ["RANK"] == "2" else "2"


def test_hsdp_on_uneven_machines(data, tmp_path):
    """Fails if HSDP hangs where one machine has more processes than another."""
    argv = flags(dataset=data, out_dir=tmp_path, gradient_accumulation_steps=3)
    err = run("train", *argv, *HSDP, ranks=3, before=uneven_machines, code=1, timeout=30).err
    one_line(err, "as many processes on each machine: process 2 of 3 has 1, process 0 has 2")


def test_ranks_that_see_other_things(data, tmp_path):
    """Fails if a run hangs, or trains on a mixture, where two machines have unlike data, or only
    one of them has a checkpoint."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        shutil.copytree(data, folder / "set")
    argv = flags(dataset="set", out_dir="out")
    run("train", *argv, folder=folders[0])
    err = run("train", *argv, "--init_from=auto", ranks=2, folder=folders, code=1).err
    one_line(err, "step of the checkpoint in out", "process 1 of 2 has None, process 0 has 9")
    ids = read_bin(data, "train")
    ids[::17] = 0
    ids.tofile(folders[1] / "set/train.bin")
    argv = flags(dataset="set", out_dir=tmp_path / "out")
    err = run("train", *argv, ranks=2, folder=folders, code=1).err
    one_line(err, "the data in set", "process 1 of 2 has", "process 0 has")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("failing, file, words", [
    (0, "train.bin", "train.bin is half written"), (1, "val.bin", "there is no val.bin in set")])
def test_one_rank_fails(data, tmp_path, failing, file, words):
    """Fails if the reason is not the one line that is printed where only one process fails, or if
    the other one waits for it without end."""
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        shutil.copytree(data, folder / "set")
    broken = folders[failing] / "set" / file
    if file == "train.bin":
        broken.write_bytes(broken.read_bytes()[:-1])
    else:
        broken.unlink()
    argv = flags(dataset="set", out_dir=tmp_path / "out")
    one_line(run("train", *argv, ranks=2, folder=folders, code=1, timeout=20).err, words)


def named_data(folder):
    def stdlib(where):
        with open(os.path.join(folder, "calls"), "a") as f:
            f.write("prepared\n")
        time.sleep(0.5)
        write_set(where, TEXT[:800], TEXT[800:900])
    loader.DATA = folder
    train.DATA = folder
    train.DATASETS["stdlib"] = stdlib


def test_ranks_prepare_data_once(tmp_path):
    """Fails if two processes write the same files at the same time."""
    run("train", *flags(max_iters=1, out_dir=tmp_path / "out"), ranks=2,
        before=partial(named_data, str(tmp_path)))
    assert (tmp_path / "calls").read_text() == "prepared\n"


@pytest.mark.parametrize("mode, dead", [([], 1), (["--fsdp"], 1), ([], 0)])
def test_others_end_quietly(data, tmp_path, mode, dead):
    """Fails if a process that waited for a dead one prints a traceback, which hides what that one
    said."""
    die = partial(at_step, 5, signal.SIGKILL, str(dead))
    argv = flags(dataset=data, out_dir=tmp_path)
    done = finish(start("train", *argv, *mode, ranks=2, before=die))
    assert done.codes[dead] == -9 and done.codes[1 - dead] == 1
    if dead == 1:
        one_line(done.err, "train.py: another process of this run died; stopping")
    else:
        assert not done.err


@pytest.mark.slow
@both_modes
@pytest.mark.parametrize("hook", ["at_step(5, signal.SIGKILL, '2')", "fails_at_once('2')"])
def test_a_dead_rank_ends_the_run(data, tmp_path, mode, hook):
    """Fails if the other ranks wait for a dead one without end."""
    began = time.time()
    argv = flags(dataset=data, out_dir=tmp_path / "out")
    process = torchrun(*argv, *mode, hook=hook, nproc=4, tmp=tmp_path)
    out, _ = process.communicate(timeout=120)
    assert process.returncode and re.search(r"rank\s*:\s*2 ", out), out
    print(f"{hook} {mode}: torchrun ended after {time.time() - began:.0f} s")
    assert time.time() - began < 60


def fails_at_once(rank):
    if os.environ["RANK"] == rank:
        raise RuntimeError("before the first collective")


def rendezvous():
    return ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}",
            "--local_addr=127.0.0.1")


def both_nodes_succeed(agents):
    for agent in agents:
        out, _ = agent.communicate(timeout=180)
        assert agent.returncode == 0, out


@pytest.mark.slow
@pytest.mark.parametrize("mode, nodes", [([], 1), (["--fsdp"], 1), ([], 2)])
def test_a_dead_rank_is_restarted(data, alone, tmp_path, monkeypatch, mode, nodes):
    """Fails if --max-restarts with --init_from=auto starts over, continues with other numbers, or
    finds the addresses of dead processes in the store."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", str(nodes - 1))
    where = rendezvous() if nodes == 2 else ("--standalone",)
    argv = [*flags(dataset=data, out_dir=tmp_path / "out"), "--init_from=auto", *mode]
    how = dict(options=("--max-restarts=2", *where), hook="at_step(5, signal.SIGKILL, '2')",
               nproc=4 // nodes, tmp=tmp_path)
    both_nodes_succeed([torchrun(*argv, **how) for _ in range(nodes)])
    agree(tmp_path / "out", alone / "plain")


@pytest.mark.slow
@both_modes
@pytest.mark.parametrize("static", [True, False])
def test_two_nodes(data, alone, tmp_path, mode, static):
    """Fails if ranks are taken for local ranks, which only shows with two torchrun agents: by the
    README's line (static) or by c10d."""
    argv = [*flags(dataset=data, out_dir=tmp_path / "out"), *mode]
    nodes = [rendezvous()] * 2
    if static:
        readme = (HERE / "README.md").read_text()
        line = re.search(r"`(--nnodes=2 [^`]*)`", readme)[1]
        line = line.replace("ADDRESS", "127.0.0.1").replace("29500", str(free_port()))
        nodes = [line.replace("=N", f"={node}").split() for node in range(2)]
    both_nodes_succeed([torchrun(*argv, options=options, tmp=tmp_path) for options in nodes])
    agree(tmp_path / "out", alone / "plain")


def test_training_on_shards(tmp_path):
    """Fails if ranks read shards in different orders, or if a run resumes although a shard was
    added or replaced."""
    for name, count in zip(NAMES, (100, 400, 300), strict=True):
        (tmp_path / name).write_bytes(shard(random_ids(count, vocab_size=26)))
    (tmp_path / "meta.json").write_text(
        json.dumps(CharTokenizer(string.ascii_lowercase).to_json()))
    for ranks in (0, 2):
        run("train", *flags(dataset=tmp_path, max_iters=4, out_dir=tmp_path / f"{ranks}"),
            ranks=ranks)
    agree(tmp_path / "0", tmp_path / "2")
    argv = ["--init_from=resume", f"--out_dir={tmp_path}/0", "--device=cpu", "--max_iters=5"]
    for added, words in (("fineweb_train_000003.bin", ["train data", "700 tokens", "now 800"]),
                         (NAMES[0], ["val data"])):
        (tmp_path / added).write_bytes(shard(random_ids(100, 9, vocab_size=26)))
        one_line(run("train", *argv, code=1).err, *words, f"--init_from={tmp_path}/0")
        (tmp_path / added).unlink()


# --------------------------------------------------------------------------------------------------
# Checkpoints of a run


def nothing_mapped():
    """`before` of a process: a save fails while the state that was resumed is still mapped, which
    Windows would not let it replace."""
    save_state = train.save_state

    def checked(*args):
        maps = pathlib.Path("/proc/self/maps")
        assert not maps.exists() or ".safetensors" not in maps.read_text()
        save_state(*args)
    train.save_state = checked


@pytest.mark.parametrize("mode, ranks, kills", [
    ([], 0, (5, 8)), (["--muon"], 2, [8]), (["--fsdp", "--muon"], 2, [5])])
def test_resume_to_the_bit(data, tmp_path, mode, ranks, kills):
    """Fails if a resume loses the moments, the place in the data, dropout's random numbers or the
    schedule, or repeats a step."""
    def go(out, *argv, **how):
        argv = [*flags(dataset=data, dropout=0.1, out_dir=tmp_path / out), *mode, *argv]
        run("train", *argv, ranks=ranks, **how)
    go("whole")
    for step in kills:                                           # in the first epoch, in the second
        go("cut", "--init_from=auto", before=partial(at_step, step, signal.SIGKILL), code=-9)
    go("cut", "--init_from=auto", before=nothing_mapped)
    same_run(tmp_path / "cut", tmp_path / "whole")


def test_transformers_opens_a_checkpoint(data, straight, tmp_path):
    """Fails if Hugging Face's reader refuses the folder of a run, reads another model than the one
    that was evaluated, or tokenizes or writes otherwise; or if another tool's copy loses it."""
    x, y = loader.TokenDataset([f"{data}/val.bin"], 32, 50).__getitems__(range(5))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(straight / "whole").eval()
    with torch.no_grad():
        expected = theirs(x).logits
        logits, _ = GPT2.from_pretrained(str(straight / "whole"))(x)
    assert_close(logits, expected, 1e-4 * expected.std())
    loss = F.cross_entropy(expected.flatten(0, 1), y.flatten()).item()
    assert curve(straight / "whole")[-1]["val_loss"] == pytest.approx(loss, rel=2e-5)
    run("train", *flags(dataset=data, out_dir=tmp_path, max_iters=2, **ALL))
    for out, kind in ((straight / "whole", "GPT2"), (tmp_path, "Starcoder2")):
        pipeline = transformers.pipeline("text-generation", str(out))
        assert type(pipeline.model).__name__.startswith(kind)
        text = pipeline("ab c", max_new_tokens=20, do_sample=False)[0]["generated_text"]
        assert [text] == generated(out, "ab c", 1, 20, temperature=0) and len(text) == 24


class Watched:
    """A file whose writes are watched: the one at which something happens gets only half of its
    bytes out."""

    def __init__(self, f, due):
        self.f = f
        self.due = due

    def __getattr__(self, name):
        return getattr(self.f, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.f.close()

    def write(self, content):
        def half():
            self.f.write(content[:len(content) // 2])
            self.f.flush()
        self.due("write", half)
        return self.f.write(content)


@pytest.mark.parametrize("typed, words", [
    (["--max_iters=40"], "rate is 0.00185, no longer 0.0002: max_iters=40, was 9"),
    (["--max_iters=10", "--learning_rate=4e-3", "--min_lr=3e-4"], "learning_rate=0.004, was 0.002"),
    (["--max_iters=40", "--lr_decay_iters=9"], None)], ids=str)
def test_a_jump_of_the_learning_rate_is_told(straight, capsys, monkeypatch, typed, words):
    """Fails if a resumed run jumps to another learning rate without a word, or talks of one that
    stays."""
    monkeypatch.setattr(train, "run_training", lambda *args: None)
    code, out, err = here(capsys, "train", "--init_from=resume", f"--out_dir={straight / 'whole'}",
                          "--device=cpu", *typed)
    out = " ".join(out.split())
    assert code == 0 and (words or "mode single") in out, (out, err)
    assert words or "learning rate" not in out


def test_benchmark_tells_random_weights(data, straight, capsys, monkeypatch):
    """Fails if --benchmark does not say whose weights it times."""
    monkeypatch.setattr(train, "benchmark", lambda trainer: None)
    for source, told in (("scratch", True), (straight / "whole", False)):
        code, out, _ = here(capsys, "train", f"--dataset={data}", f"--init_from={source}",
                            "--device=cpu", "--benchmark")
        assert code == 0 and ("weights   random" in out) == told


def at_disk_call(n, act, calls=None):
    """`before` of a process: at the n-th disk call of the save of step 6 it is killed ("kill") or
    stopped until it is continued ("pause"), or the disk is full ("full") or from then on read-only
    ("sealed"). calls: a file for the names of the calls."""
    names = []
    saving = []

    def due(name, first=lambda: None):
        if not saving:
            return
        names.append(name)
        if act == "sealed" and len(names) >= n:
            raise OSError(30, "Read-only file system")
        if len(names) != n:
            return
        if act == "pause":
            return os.kill(os.getpid(), signal.SIGSTOP)
        first()
        if act == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(28, "No space left on device")

    def watch(name, function):
        def watched(*args, **how):
            due(name)
            return function(*args, **how)
        setattr(os, name, watched)
    for name in ("fsync", "replace", "link"):
        watch(name, getattr(os, name))
    model_py.open = lambda *args, **how: Watched(open(*args, **how), due)
    save_export = train.save_export
    save_state = train.save_state

    def first_half(trainer, *args):
        saving.extend([1] * (trainer.state.step == 6))
        save_export(trainer, *args)

    def second_half(*args):
        save_state(*args)
        saving.clear()
        if calls:
            pathlib.Path(calls).write_text(" ".join(names))
    train.save_export = first_half
    train.save_state = second_half


@pytest.fixture(scope="session")
def disk_calls(straight, tmp_path_factory):
    """The names of the disk calls of a save."""
    folder = tmp_path_factory.mktemp("calls")
    resume(straight, folder / "out", before=partial(at_disk_call, 0, "none", folder / "calls"))
    same_run(folder / "out", straight / "whole")
    return (folder / "calls").read_text().split()


@pytest.fixture(scope="session")
def exports(straight, tmp_path_factory):
    """{bytes of model.safetensors: validation loss} of steps 3 and 6."""
    out = tmp_path_factory.mktemp("exports") / "out"
    resume(straight, out, before=partial(at_step, 8, signal.SIGKILL), code=-9)
    losses = {r["step"]: r["val_loss"] for r in curve(out) if "val_loss" in r}
    return {(folder / "model.safetensors").read_bytes(): losses[step]
            for folder, step in ((straight / "cut", 3), (out, 6))}


def moments(calls, every):
    """Numbers of disk calls: all of them, or those of a few kinds: in the middle of the export and
    of the state, and at what makes them complete."""
    if every:
        return range(len(calls))
    replaces = [i for i, name in enumerate(calls) if name == "replace"]
    assert len(replaces) == 7 and calls.count("link") == 1       # exports, previous, the state
    return [replaces[3] + 3, replaces[4] - 1, replaces[4], replaces[4] + 9, calls.index("link"),
            replaces[6]]


def look(capsys, out, exports):
    """Look at a run as sample.py, --eval_only, --benchmark and transformers do: a whole model of
    one step, and nothing written."""
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    loss = exports[(out / "model.safetensors").read_bytes()]
    how = [f"--out_dir={out}", "--device=cpu"]
    assert here(capsys, "sample", *how, "--start=a", "--max_new_tokens=3")[0] == 0
    code, shown, err = here(capsys, "train", "--eval_only", "--init_from=resume", *how)
    assert code == 0 and f"validation loss {loss:.4f} nats" in shown, err
    assert here(capsys, "train", "--benchmark", "--init_from=resume", *how)[0] == 0
    transformers.GPT2LMHeadModel.from_pretrained(out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize("act, all_moments", [
    ("kill", False), *(slow(act, True) for act in ("kill", "full", "sealed"))])
def test_no_save_loses_anything(straight, tmp_path, capsys, disk_calls, exports, act, all_moments):
    """Fails if there is a moment in a save at which a kill, or a disk that is full or read-only,
    leaves a run that cannot be resumed to the same bits, or a model of two steps."""
    numbers = list(moments(disk_calls, all_moments))
    for first in range(0, len(numbers), 8):
        outs = {i: tmp_path / str(i) for i in numbers[first:first + 8]}
        started = []
        for i, out in outs.items():
            shutil.copytree(straight / "cut", out)
            started.append(start("train", *flags(out_dir=out), "--init_from=resume",
                                 before=partial(at_disk_call, i + 1, act)))
        for i, processes in zip(outs, started, strict=True):
            done = finish(processes)
            survives = disk_calls[i] == "link" and act == "full"         # a disk without links
            expected = {"kill": -9}.get(act, 0 if survives else 1)
            assert done.codes == [expected], (i, disk_calls[i], done.err)
            if expected == 1:
                reason = "Read-only" if act == "sealed" else "No space left"
                one_line(done.err, "step 6 cannot be saved in", reason)
        for out in outs.values():
            assert (out / "model.safetensors").read_bytes() in exports
        if not all_moments and act == "kill":
            look(capsys, outs[numbers[0]], exports)
        started = [start("train", *flags(out_dir=out), "--init_from=auto") for out in outs.values()]
        for out, processes in zip(outs.values(), started, strict=True):
            done = finish(processes)
            assert done.codes == [0], (out, done.err)
            same_run(out, straight / "whole")
            assert not list(out.glob("*.part"))
            _, metadata = read_safetensors(out / train.PREVIOUS)
            assert json.loads(metadata["training_state"])["state"]["step"] == 6
            shutil.rmtree(out)
    print(f"{act}: {len(numbers)} moments in a save of {len(disk_calls)} calls")


@pytest.mark.parametrize("act, all_moments", [("pause", False), slow("pause", True)])
def test_looking_during_a_save(straight, tmp_path, capsys, disk_calls, exports, act, all_moments):
    """Fails if somebody who looks at a run in the middle of a save sees half a model, or disturbs
    the run."""
    for i in list(moments(disk_calls, all_moments))[::1 if all_moments else 3]:
        out = tmp_path / str(i)
        shutil.copytree(straight / "cut", out)
        (process,) = start("train", *flags(out_dir=out), "--init_from=resume",
                           before=partial(at_disk_call, i + 1, act))
        stat = pathlib.Path(f"/proc/{process.pid}/stat")
        deadline = time.time() + 60
        while stat.read_text().rsplit(")", 1)[1].split()[0] != "T":
            assert process.is_alive() and time.time() < deadline
            time.sleep(0.01)
        look(capsys, out, exports)
        os.kill(process.pid, signal.SIGCONT)
        assert finish([process]).codes == [0]
        same_run(out, straight / "whole")


SAVING = ["checkpoint of step 6 cannot be saved in", "File too large", "checkpoint is of step 3"]
METRICS = ["metrics.jsonl cannot be written", "checkpoint is of step 3"]


def files_up_to(size):
    if size < 2000:                              # less than what is printed, which is a file too
        sys.stdout = io.StringIO()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("size, ranks, words", [
    (50_000, 0, SAVING), (150_000, 2, SAVING), (900, 2, METRICS)])
def test_disk_full(straight, tmp_path, size, ranks, words):
    """Fails if a full disk gives a traceback, of one process or of those that wait for it, or costs
    the good checkpoint: where the export, the state or the metrics cannot grow any further."""
    out = tmp_path / "out"
    done = resume(straight, out, before=partial(files_up_to, size), code=1, ranks=ranks)
    one_line(done.err, *words)
    assert (out / train.STATE).read_bytes() == (straight / "cut" / train.STATE).read_bytes()
    assert not list(out.glob("*.part"))
    run("train", *flags(out_dir=out), "--init_from=auto")
    same_run(out, straight / "whole")


def no_room_to_draw():
    def draw(*_):
        raise OSError(28, "No space left on device")
    train.draw = draw


def test_what_is_left_on_a_full_disk(data, tmp_path):
    """Fails if a run that failed at its first save names a checkpoint that does not exist, or if a
    finished one fails for its picture."""
    out = tmp_path / "out"
    argv = flags(dataset=data, out_dir=out)
    done = run("train", *argv, before=partial(files_up_to, 50_000), code=1)
    one_line(done.err, "step 3 cannot be saved in", "There is no checkpoint of this run yet")
    done = run("train", *argv, before=no_room_to_draw)
    assert f"{out}/loss.svg was not drawn: [Errno 28] No space left" in done.out and not done.err
    assert "Sample with" in done.out


def rewrite(change):
    """What writes a training state again, with tensors and metadata changed: change(tensors, saved)
    """
    def rewritten(path):
        content, metadata = read_safetensors(path)
        content = {name: t.clone() for name, t in content.items()}
        saved = json.loads(metadata["training_state"])
        change(content, saved)
        save_file(content, path, metadata={"training_state": json.dumps(saved)})
    return rewritten


def with_tensor(name, value):
    return rewrite(lambda tensors, saved: tensors.update({name: value}))


def without_tensor(name):
    return rewrite(lambda tensors, saved: tensors.pop(name))


def with_value(part, **values):
    return rewrite(lambda tensors, saved: saved[part].update(values))


def other_model(tensors, saved):
    tensors["transformer.h.0.ln_3.weight"] = torch.ones(32)
    saved["tensors"].append("transformer.h.0.ln_3.weight")


class Malicious:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


STEP = "optimizer.0.step.transformer.wte.weight"
MOMENT = "optimizer.0.exp_avg.transformer.wte.weight"


def lose_moment(tensors, saved):
    del tensors[MOMENT]
    saved["tensors"].remove(MOMENT)


def rename_moment(tensors, saved, number="x"):
    name = MOMENT.replace("0", number)
    tensors[name] = tensors[MOMENT]
    saved["tensors"].append(name)
    lose_moment(tensors, saved)


DAMAGES = {                                  # name: (change of the file at a path, words of error)
    "short": (lambda path: path.write_bytes(path.read_bytes()[:-50]), "truncated"),
    "empty": (lambda path: path.write_bytes(b""), "truncated"),
    "pickle": (lambda path: torch.save(Malicious(str(path.parent / "ran")), path), "pickle"),
    "no metadata": (lambda path: save_file({"a": torch.ones(1)}, path), "training_state"),
    "no moment": (without_tensor(MOMENT), f"lacks '{MOMENT}'"),
    "no weight": (without_tensor("transformer.wte.weight"), "lacks 'transformer.wte.weight'"),
    "unknown": (with_tensor("optimizer.0.x.y", torch.ones(1)), "unknown 'optimizer.0.x.y'"),
    "shape": (with_tensor("transformer.ln_f.bias", torch.ones(7)), "ln_f.bias of shape (32,)"),
    "moment's shape": (with_tensor(MOMENT, torch.ones(3)), "shape (3,)"),
    "moment's dtype": (with_tensor(MOMENT, torch.ones(12, 32).long()), "torch.int64"),
    "step's shape": (with_tensor(STEP, torch.ones(4)), "shape (4,)"),
    "negative": (with_value("state", samples=-5), "impossible"),
    "nan": (with_value("state", best_val_loss=math.nan), "impossible"),
    "infinite": (with_value("state", best_val_loss=-math.inf), "impossible"),
    "text": (with_value("state", step="6"), "wrong types"),
    "no state": (rewrite(lambda tensors, saved: saved.pop("state")), "state"),
    "list": (rewrite(lambda tensors, saved: saved.update(optimizers=3)), "damaged"),
    "run": (with_value("run", batch_size=2.5), "batch_size=2.5"),
    "range": (with_value("run", batch_size=0), "batch_size=0"),
    "config": (with_value("config", n_layer=-1), "n_layer=-1"),
    "unknown field": (with_value("config", new=1), "version"),
    "unknown flag": (with_value("run", new=1), "version"),
    "other model": (rewrite(other_model), "version"),
    "layers": (with_value("config", n_layer=10**5), "fewer tensors than n_layer=100000"),
    "optimizer x": (rewrite(rename_moment), "version"),
    "moment lost": (rewrite(lose_moment), "lacks tensors of an"),
    "optimizer 9": (rewrite(partial(rename_moment, number="9")), "lacks tensors of an"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_states(straight, tmp_path, capsys, damage):
    """Fails if a damaged state is trained on, gives a traceback or runs code, or if the advice that
    comes with it does not lead back to the same run."""
    shutil.copytree(straight / "whole", out := tmp_path / "out")
    change, words = DAMAGES[damage]
    change(out / train.STATE)
    argv = [f"--out_dir={out}", "--init_from=auto", "--device=cpu", "--max_iters=20"]
    code, _, err = here(capsys, "train", *argv)
    assert code == 1 and not (out / "ran").exists()
    one_line(err, words, train.STATE)
    advice = re.search(r"The state before it is (\S+): rename it to (\S+) to resume", err)
    assert bool(advice) == (words != "version")                  # that one is a good checkpoint
    if not advice:
        return
    os.rename(advice[1], out / advice[2])
    if damage in ("short", "no moment"):                         # enough to show it
        run("train", *flags(out_dir=out), "--init_from=resume")
        same_run(out, straight / "whole")


def test_a_checkpoint_older_than_a_flag(straight, tmp_path):
    """Fails if a run cannot be resumed after a flag was added to the code, or not with its default.
    """
    def forget(tensors, saved):
        del saved["config"]["rope"], saved["config"]["window_size"], saved["run"]["schedule"]
    shutil.copytree(straight / "cut", out := tmp_path / "out")
    rewrite(forget)(out / train.STATE)
    run("train", *flags(out_dir=out), "--init_from=resume")
    same_run(out, straight / "whole")


def freeze(name):
    init = GPT2.__init__

    def frozen(self, *args, **how):
        init(self, *args, **how)
        self.get_parameter(name).requires_grad_(False)
    GPT2.__init__ = frozen


@pytest.mark.parametrize("ranks, how", [(1, dict(muon=True)), (2, dict(fsdp=True))], ids=str)
def test_frozen_parameters(data, tmp_path, ranks, how):
    """Fails if a parameter that somebody froze is trained, or such a run cannot be resumed."""
    frozen = "transformer.h.0.attn.c_attn.weight"
    argv = flags(dataset=data, **how)
    before = partial(freeze, frozen)
    for out, steps in (("whole", (6,)), ("resumed", (4, 6))):
        for end in steps:
            run("train", *argv, f"--out_dir={tmp_path / out}", "--init_from=auto",
                "--lr_decay_iters=6", "--eval_interval=2", f"--max_iters={end}", ranks=ranks,
                before=before)
    same_run(tmp_path / "resumed", tmp_path / "whole")
    weights, _ = read_safetensors(str(tmp_path / "whole" / train.STATE))
    first = dict(GPT2(GPT2.from_pretrained(tmp_path / "whole").config, seed=1337)
                 .named_parameters())
    same = {name for name, p in first.items() if torch.equal(p, weights[name])}
    assert same == {frozen}


def test_a_buffer_is_refused(monkeypatch):
    """Fails if a model may have a buffer: loaded weights and train.py would leave it undefined."""
    class Norm(torch.nn.LayerNorm):
        def __init__(self, *args, **how):
            super().__init__(*args, **how)
            self.register_buffer("mean", torch.zeros(1))
    monkeypatch.setattr(torch.nn, "LayerNorm", Norm)
    with pytest.raises(TypeError, match="do not hold the buffer transformer.h.0.ln_1.mean"):
        small_model()


def test_a_checkpoint_of_the_old_layout(data, straight, tmp_path, capsys, monkeypatch):
    """Fails if an old checkpoint is overwritten or resumed wrongly, or if the advice does not start
    a run from its weights."""
    out = tmp_path / "an old run"
    shutil.copytree(straight / "whole", out)
    os.rename(out / train.STATE, out / "training_state.pt")
    code, _, err = here(capsys, "train", f"--out_dir={out}", "--init_from=resume", "--device=cpu")
    assert code == 1
    one_line(err, "training_state.pt is of an older version")
    assert here(capsys, "train", f"--out_dir={out}", "--init_from=auto", "--device=cpu")[0] == 1
    command = re.search(r"python train\.py (.*)", err)[1].replace("NAME", data)
    run("train", *shlex.split(command), "--max_iters=1", "--device=cpu")
    assert len(curve(f"{out}-2")) == 3
    assert (out / "training_state.pt").exists()


def slow_disk():
    for name in ("fsync", "replace", "link"):
        def slowly(call, *args, **how):
            time.sleep(0.05)
            return call(*args, **how)
        setattr(os, name, partial(slowly, getattr(os, name)))


@pytest.mark.slow
def test_100_kills(data, tmp_path):
    """Fails if there is an instant at which kill -9 loses something, inside a save or outside."""
    chance = random.Random(0)
    killed = 0
    inside = 0
    for mode, ranks, kills in (([], 0, 80), ([], 2, 10), (["--fsdp"], 2, 10)):
        def go(out, mode=mode, ranks=ranks):
            argv = [*flags(dataset=data, dropout=0.1, out_dir=out), "--init_from=auto", *mode]
            return start("train", *argv, ranks=ranks, before=slow_disk)
        finish(go(tmp_path / f"first{len(mode)}{ranks}"))        # warms up the forkserver
        whole = tmp_path / f"whole{len(mode)}{ranks}"
        began = time.time()
        finish(go(whole))
        seconds = time.time() - began
        for kill in range(kills):
            out = tmp_path / f"{len(mode)}{ranks}{kill}"
            processes = go(out)
            time.sleep(chance.uniform(0.3 * seconds, 0.95 * seconds))
            killed += any(p.is_alive() for p in processes)
            for p in processes:
                p.kill()
            for p in processes:
                p.join()
            inside += bool(list(out.glob("*.part")))             # left by an unfinished save
            done = finish(go(out))
            assert set(done.codes) == {0}, done.err
            same_run(out, whole)
            shutil.rmtree(out)
    print(f"{killed} kills, {inside} of them inside a save")
    assert killed >= 60 and inside >= 15


# --------------------------------------------------------------------------------------------------
# Nothing lost, nothing misread


def slow_steps(seconds):
    """`before` of a process: each step takes that long."""
    gradients = train.Trainer.gradients

    def slowly(self):
        time.sleep(seconds)
        return gradients(self)
    train.Trainer.gradients = slowly


def wait_for(path, timeout=60):
    deadline = time.time() + timeout
    while not path.exists():
        assert time.time() < deadline
        time.sleep(0.02)


def test_one_run_a_folder(data, straight, tmp_path):
    """Fails if two runs write to one folder, if the second one disturbs the first, or if a dead run
    keeps others out."""
    out = tmp_path / "out"
    argv = flags(dataset=data, dropout=0.1, out_dir=out)
    first = start("train", *argv, before=partial(slow_steps, 0.5))
    wait_for(out / train.STATE)
    for second in ([], ["--init_from=resume"]):
        one_line(run("train", *argv, *second, code=1).err, f"another run is writing to {out}")
    for p in first:
        p.kill()
        p.join()
    run("train", *argv, "--init_from=resume")
    same_run(out, straight / "whole")
    assert not list(out.glob("run-*"))


def test_a_second_signal_ends_a_step_that_hangs(data, tmp_path):
    """Fails if a process whose step never ends cannot be stopped by SIGTERM."""
    out = tmp_path / "out"
    (process,) = start("train", *flags(dataset=data, out_dir=out), before=partial(slow_steps, 600))
    wait_for(out / "metrics.jsonl")
    for _ in range(2):
        time.sleep(2.2)
        os.kill(process.pid, signal.SIGTERM)
    assert finish([process], timeout=20).codes == [143]


@pytest.mark.parametrize("script", ["train", "sample"])
def test_ctrl_c_during_the_imports(tmp_path, script):
    """Fails if Ctrl-C in the seconds in which torch is imported gives a traceback."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run([sys.executable, HERE / f"{script}.py"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_a_data_set_on_another_disk(tmp_path, capsys):
    """Fails if data/NAME is a link and the finished tokens are lost, or the link is replaced."""
    (tmp_path / "large").mkdir()
    os.symlink(tmp_path / "large", tmp_path / "mine")
    (tmp_path / "book.txt").write_text(TEXT)
    argv = [tmp_path / "book.txt", f"--name={tmp_path}/mine", "--tokenizer=char"]
    for _ in range(2):
        assert here(capsys, "prepare", *argv)[0] == 0
    assert (tmp_path / "mine").is_symlink()
    assert sorted(os.listdir(tmp_path / "large")) == ["meta.json", "train.bin", "val.bin"]


def test_special_files_and_links(tmp_path, capsys):
    """Fails if a FIFO in a folder hangs, a linked folder is left out or a circle of links is walked
    without end."""
    folder = tmp_path / "in"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.txt").write_text(TEXT)
    os.symlink(tmp_path / "elsewhere", folder / "link")
    os.symlink(folder, tmp_path / "elsewhere/back")
    argv = [f"--name={tmp_path}/set", "--tokenizer=char"]
    code, _, err = here(capsys, "prepare", folder, *argv)
    assert code == 0, err
    ids = np.concatenate([read_bin(tmp_path / "set", split) for split in ("train", "val")])
    assert load_tokenizer(tmp_path / "set").decode(ids.tolist()) == TEXT
    code, _, err = here(capsys, "prepare", folder / "pipe", *argv)
    assert code == 1
    one_line(err, "not a file, a folder")


@needs_linux
def test_a_folder_whose_name_is_not_text(data, tmp_path):
    """Fails if a finished run ends with an error because out_dir is not UTF-8."""
    out = os.fsdecode(os.fsencode(str(tmp_path)) + b"/caf\xe9")
    try:
        os.mkdir(out)
    except OSError:
        pytest.skip("this disk has only UTF-8 names")
    run("train", *flags(dataset=data, out_dir=out, max_iters=3))
    assert os.path.exists(f"{out}/loss.svg")


# --------------------------------------------------------------------------------------------------
# Evaluation


DOCUMENTS = ["a bad dab\n\n  cab é  日本\u3000ab", "dead\u00a0beef 日", "", " fade  abc" * 9]
JUDGED_SHAPE = dict(n_layer=2, n_head=2, n_embd=32)


@pytest.fixture(scope="module")
def judged(request, tmp_path_factory):
    """A data set and a model of its characters -> (its folder, function of tokens to logits)."""
    folder = tmp_path_factory.mktemp("judged")
    lines = [json.dumps({"text": text}) + "\n" for text in DOCUMENTS]
    (folder / "x.jsonl").write_text("".join(lines))
    prepare.own(str(folder / "set"), [str(folder / "x.jsonl")], "char", val_frac=1)
    vocab_size = load_tokenizer(folder / "set").vocab_size
    if request.param == "transformers":
        torch.manual_seed(0)
        config = transformers.GPT2Config(n_positions=16, vocab_size=vocab_size, **JUDGED_SHAPE)
        model = loud(transformers.GPT2LMHeadModel(config), 4)
    else:
        model = GPT2(GPT2Config(16, vocab_size, rope=True, gqa=True, sliding_window=True,
                                window_size=5, **JUDGED_SHAPE), 0)
    model.save_pretrained(folder / "model")
    shutil.copy(folder / "set/meta.json", folder / "model")

    def logits(ids):
        if request.param == "transformers":
            return model(ids).logits[0]
        return model(ids)[0][0]
    return folder, logits


@pytest.mark.parametrize("judged, ranks, stride", [
    ("transformers", 0, None), ("transformers", 0, 1), ("transformers", 2, 5), ("all flags", 0, 5)],
    indirect=["judged"])
def test_eval_only(judged, tmp_path, ranks, stride):
    """Fails if a token is scored twice, never, or with less before it than promised, if the token
    between documents counts as text, if processes share the samples wrongly, or a file is left."""
    folder, logits = judged
    argv = [f"--init_from={folder}/model", f"--dataset={folder}/set", "--eval_only", "--device=cpu",
            "--batch_size=4", "--eval_iters=0"]
    if stride:
        argv.append(f"--eval_stride={stride}")
    if ranks:
        argv.append("--fsdp")
    done = run("train", *argv, ranks=ranks, folder=tmp_path)
    ids = torch.from_numpy(read_bin(folder / "set", "val").astype(np.int64))
    step = stride or 16
    nats = 0.0
    for t in range(1, len(ids)):                          # by the first sample that reaches token t
        begin = step * max(0, math.ceil((t - 16) / step))
        with torch.no_grad():
            nats -= logits(ids[None, begin:t])[-1].log_softmax(-1)[ids[t]].item()
    tokens = len(ids) - 1
    size = sum(len(text.encode()) for text in DOCUMENTS) - 1
    told = re.search(r"loss (\S+) nats per token, of (\S+) tokens\nperplexity (\S+) per token\n"
                     r"bits per byte (\S+), of (\S+) bytes\n$", done.out)
    right = [nats / tokens, tokens, math.exp(nats / tokens), nats / math.log(2) / size, size]
    assert [float(n.replace(",", "")) for n in told.groups()] == pytest.approx(right, rel=5e-4)
    assert float(told[1]) == pytest.approx(nats / tokens, abs=6e-5)
    assert os.listdir(tmp_path) == []


def test_eval_only_of_a_run(straight, tmp_path):
    """Fails if --eval_only trains, writes, or measures another number than the run did."""
    shutil.copytree(straight / "cut", tmp_path / "a")
    out = run("train", "--eval_only", "--init_from=resume", f"--out_dir={tmp_path / 'a'}",
              "--device=cpu").out
    measured = [r["val_loss"] for r in curve(straight / "cut") if "val_loss" in r]
    assert f"validation loss {measured[1]:.4f} " in out          # [0] is that of step 0
    for path in (straight / "cut").iterdir():
        assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes()
    assert len(os.listdir(tmp_path / "a")) == len(os.listdir(straight / "cut"))


def made_up_items(folder, count):
    """Items in the formats of HellaSwag's and LAMBADA's files, with all that their texts are known
    for: brackets, double spaces, half sentences, other letters."""
    rng = random.Random(0)

    def some(least, most):
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))
    begins = ["", "[header] ", "  ", "Émile's ", "* "]
    ends = [".", "", " [title] How to", " [step]", " [substeps]  do", "  twice", ", he said"]
    with open(folder / "hellaswag.jsonl", "w") as f:
        for i in range(count):
            record = {"ind": i, "activity_label": some(1, 3), "label": rng.randrange(4),
                      "ctx_a": rng.choice(begins) + some(2, 60) + rng.choice(ends),
                      "ctx_b": rng.choice(["", "he", "The two MEN", "émile"]),
                      "endings": [rng.choice(begins) + some(1, 9) + rng.choice(ends)
                                  for _ in range(4)]}
            f.write(json.dumps(record) + "\n")
    with open(folder / "lambada.jsonl", "w") as f:
        for _ in range(count):
            text = rng.choice(begins) + some(9, 90) + rng.choice(ends)
            last = rng.choice(["\n" + rng.choice(WORDS), " a a", "  i", " e e", " dead"])
            f.write(json.dumps({"text": text + last}) + "\n")


@pytest.fixture(scope="module")
def item_sets(tmp_path_factory):
    """Made-up items, prepared, and a model to compare -> their folder."""
    folder = tmp_path_factory.mktemp("items")
    made_up_items(folder, 300)
    for name in ("hellaswag", "lambada"):
        prepare.DATASETS[name](str(folder / name), str(folder / f"{name}.jsonl"))
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_positions=64, n_layer=2, n_head=2, n_embd=32)
    loud(transformers.GPT2LMHeadModel(config), 4).save_pretrained(folder / "model")
    return folder


def judge(capsys, monkeypatch, folder, name, *argv):
    """--eval_only on items -> (nats and exact of each ending, what is printed)."""
    scores = []
    score = train.score
    monkeypatch.setattr(train, "score", lambda *args: scores.append(score(*args)) or scores[-1])
    code, out, err = here(capsys, "train", "--eval_only", f"--init_from={folder}/model",
                          f"--dataset={folder}/{name}", "--device=cpu", *argv)
    assert code == 0, err
    return scores[0], out


@needs_bpe
@pytest.mark.parametrize("name", ["hellaswag", "lambada"])
def test_items_one_by_one(item_sets, capsys, monkeypatch, name):
    """Fails if an ending's tokens are shifted or lost, padding or the sorting by length changes a
    score, a long text loses its end, or a mean or an error is wrong."""
    (nats, exact), out = judge(capsys, monkeypatch, item_sets, name, "--eval_iters=40")
    assert "40 of 300" in out
    model = transformers.GPT2LMHeadModel.from_pretrained(item_sets / "model").eval()
    records = [json.loads(line) for line in open(item_sets / f"{name}.jsonl")]
    records = [records[int(i)] for i in np.linspace(0, 299, 40)]
    encode = tokenizer.gpt2_bpe().encode_ordinary
    right = []
    by_hand = []
    for r in records:
        if name == "lambada":
            *before, word = r["text"].split(" ")
            pairs = [(" ".join(before), " " + word)]
        else:
            text = f"{r['activity_label']}: {r['ctx_a']} {r['ctx_b'].capitalize()}"
            text, *endings = (re.sub(r"\[.*?\]", "", t.strip().replace(" [title]", ". "))
                              .replace("  ", " ") for t in (text, *r["endings"]))
            pairs = [(text, " " + ending) for ending in endings]
        for before, after in pairs:
            ids = encode(before + after)
            first = len(encode(before.rstrip()))
            x = torch.tensor([ids[-65:]])
            with torch.no_grad():
                logits = model(x[:, :-1]).logits[0, first - len(ids):].log_softmax(-1)
            y = x[0, first - len(ids):]
            by_hand.append((-logits.gather(1, y[:, None]).sum().item(), len(after) - 1,
                            bool((logits.argmax(1) == y).all())))
        losses = np.array(by_hand[-len(pairs):])
        if name == "hellaswag":
            right.append([losses[:, 0].argmin() == r["label"],
                          (losses[:, 0] / losses[:, 1]).argmin() == r["label"]])
    assert nats == pytest.approx([row[0] for row in by_hand], rel=1e-5)
    assert 0 < exact.mean() < 1 or name == "hellaswag"
    assert exact.tolist() == [row[2] for row in by_hand]
    printed = [float(n) for n in re.findall(r"(?:accuracy|perplexity|±) ([\d.]+)", out)]
    mean = np.mean(right, axis=0) if right else np.array([exact.mean(), math.exp(nats.mean())])
    if right:
        error = np.sqrt(mean * (1 - mean) / 39)
        assert printed == pytest.approx([mean[0], error[0], mean[1], error[1]], abs=6e-5)
    else:
        error = mean[1] * nats.std(ddof=1) / math.sqrt(40)
        assert printed[2:] == pytest.approx([mean[1], error], rel=1e-3)


@needs_bpe
def test_uneven_items_are_refused(tmp_path):
    """Fails if items with different numbers of endings are found to be damaged only in train.py."""
    record = {"activity_label": "a", "ctx_a": "b", "ctx_b": "", "label": 0}
    lines = (json.dumps({**record, "endings": ["x"] * count}) + "\n" for count in (4, 3))
    (tmp_path / "x.jsonl").write_text("".join(lines))
    with pytest.raises(cli.UserError, match="line 2: not an item"):
        prepare.hellaswag(str(tmp_path / "set"), str(tmp_path / "x.jsonl"))


@needs_bpe
@fsdp_and_slowly_ddp
def test_items_in_all_modes(item_sets, tmp_path, mode):
    """Fails if processes share the endings wrongly, or one is left out of a forward pass."""
    argv = ["--eval_only", f"--init_from={item_sets}/model", f"--dataset={item_sets}/hellaswag",
            "--device=cpu", "--eval_iters=21", "--batch_size=3"]
    alone, shared = (run("train", *argv, *how, ranks=ranks, folder=tmp_path).out.split("\nitems")[1]
                     for how, ranks in (([], 0), (mode, 2)))
    assert alone == shared and "length-normalised accuracy" in alone


@pytest.mark.slow
@needs_bpe
@pytest.mark.parametrize("name, task", [("hellaswag", "hellaswag"), ("lambada", "lambada_openai")])
def test_lm_evaluation_harness(item_sets, tmp_path, capsys, monkeypatch, name, task):
    """Fails if an item's losses or outcome are not those of lm-evaluation-harness."""
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(variable, "1")
    lm_eval = pytest.importorskip("lm_eval", reason="pip install lm_eval accelerate")
    from lm_eval.models.huggingface import HFLM
    tasks = pathlib.Path(lm_eval.__file__).parent / "tasks"
    shutil.copytree(tasks / name, tmp_path / name)
    path = tmp_path / name / f"{task}.yaml"
    local = json.dumps({"data_files": dict.fromkeys(("train", "validation", "test"),
                                                    str(item_sets / f"{name}.jsonl"))})
    path.write_text(re.sub("dataset_path: .*\ndataset_name: .*", "dataset_path: json\n"
                           f"dataset_kwargs: {local}", path.read_text()))
    for ours, theirs in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        digest = hashlib.sha1((tokenizer.BPE_URL + ours).encode()).hexdigest()
        shutil.copy(pathlib.Path(os.environ["TIKTOKEN_CACHE_DIR"], digest), tmp_path / theirs)
    model = transformers.GPT2LMHeadModel.from_pretrained(item_sets / "model")
    bpe = transformers.GPT2TokenizerFast.from_pretrained(tmp_path)
    done = lm_eval.simple_evaluate(HFLM(model, tokenizer=bpe, device="cpu", batch_size=8),
                                   tasks=[str(path)], log_samples=True, bootstrap_iters=100)
    samples = sorted(done["samples"][task], key=lambda sample: sample["doc_id"])
    theirs = np.array([response for sample in samples for response in sample["filtered_resps"]])
    (nats, exact), out = judge(capsys, monkeypatch, item_sets, name)
    assert nats == pytest.approx(-theirs[:, 0], rel=1e-5) and (exact == theirs[:, 1]).all()
    for metric, words in (("acc", r"\naccuracy"), ("acc_norm", "length-normalised accuracy"),
                          ("perplexity", "perplexity")):
        value = done["results"][task].get(f"{metric},none")
        if value is not None:
            printed = re.search(f"{words} (\\S+) ± (\\S+)", out)
            assert float(printed[1]) == pytest.approx(value, rel=1e-4, abs=5e-5)
            if metric != "perplexity":                           # there they resample
                error = done["results"][task][f"{metric}_stderr,none"]
                assert float(printed[2]) == pytest.approx(error, abs=5e-5)
    print(f"{task}: {len(nats)} endings, largest difference "
          f"{np.abs(nats + theirs[:, 0]).max():.1e} nats; {done['results'][task]}")


STRANGE = "naïve 日本語 🎉🏳️‍🌈 Ελλάδα!\u3000\u00a0\n"


@needs_bpe
def test_byte_lengths():
    """Fails if bits per byte divide by something else than the UTF-8 bytes of the text."""
    characters = "".join(set(STRANGE))
    for table in (GPT2Tokenizer(), CharTokenizer(characters, len(characters))):
        lengths = table.byte_lengths()
        assert lengths[table.encode(STRANGE)].sum() == len(STRANGE.encode())
        assert len(lengths) == table.vocab_size and lengths[table.end_of_text] == 0


# --------------------------------------------------------------------------------------------------
# Sampling


SPEED = r"([\d,]+) tokens in [\d.]+ s: [\d,.]+ tokens per second on cpu, float32\n"


def sampled(capsys, out, *argv):
    """The text that sample.py prints, and the number of tokens that it reports on stderr."""
    code, text, err = here(capsys, "sample", f"--out_dir={out}", "--device=cpu", *argv)
    speed = re.fullmatch(SPEED, err)
    assert code == 0 and speed and text.endswith("\n"), err
    return text[:-1], speed[1]


def generated(out, prompt, count, size, **how):
    """The same texts by GPT2.generate."""
    table = load_tokenizer(out)
    idx = torch.from_numpy(table.encode(prompt).astype(np.int64)).repeat(count, 1)
    rows = GPT2.from_pretrained(str(out)).generate(idx, size, **how)
    return [table.decode(row.tolist()) for row in rows]


@pytest.mark.parametrize("argv, words", [
    (["--gqa", "--n_kv_head=1"], "gqa: 4 key/value heads are averaged to 1; fine-tune"), ([], "")])
def test_changed_weights_are_told(straight, tmp_path, capsys, argv, words):
    """Fails if a change of the weights is not reported, or one is reported where there is none."""
    config = GPT2Config(n_layer=1, n_head=4, n_embd=32, block_size=32, vocab_size=50)
    GPT2(config).save_pretrained(tmp_path)
    shutil.copy(straight / "whole/meta.json", tmp_path)
    code, out, err = here(capsys, "sample", f"--init_from={tmp_path}", "--start=a", "--device=cpu",
                          "--max_new_tokens=2", *argv)
    assert code == 0 and "fine-tune" not in out
    *changes, speed = err.splitlines()
    assert "tokens per second" in speed
    assert len(changes) == bool(words) and words in "".join(changes)


def test_weights_that_are_not_numbers(straight, tmp_path, capsys):
    """Fails if sample.py with damaged weights gives a traceback, or writes a text."""
    shutil.copytree(straight / "whole", out := tmp_path / "out")
    model = GPT2.from_pretrained(out)
    model.transformer.ln_f.bias.data[0] = math.nan
    model.save_pretrained(out)
    code, text, err = here(capsys, "sample", f"--out_dir={out}", "--start=a", "--device=cpu")
    assert code == 1 and not text
    one_line(err, f"{out}: its logits are not finite numbers")


def test_sample_equals_generate(straight, tmp_path, capsys):
    """Fails if sample.py uses another tokenizer than the checkpoint's, loses or doubles a token, or
    ignores its seed or another flag."""
    out = tmp_path / "alone"                                     # no data set near it
    shutil.copytree(straight / "whole", out)
    text, count = sampled(capsys, out, "--start=ab c", "--max_new_tokens=60", "--temperature=0")
    assert [text] == generated(out, "ab c", 1, 60, temperature=0) and count == "60"
    how = dict(temperature=0.7, top_k=5, top_p=0.9)
    expected = generated(out, "ab c", 3, 9, generator=torch.Generator().manual_seed(7), **how)
    (tmp_path / "prompt").write_text("ab c")
    texts, count = sampled(capsys, out, f"--start=FILE:{tmp_path}/prompt", "--num_samples=3",
                           "--max_new_tokens=9", "--seed=7",
                           *(f"--{name}={value}" for name, value in how.items()))
    assert texts + "\n" == "".join(text + "\n" + "-" * 15 + "\n" for text in expected)
    assert count == "27"
    a, same, other = (sampled(capsys, out, "--start=a", "--max_new_tokens=60", f"--seed={seed}")
                      for seed in (1, 1, 2))
    assert a == same != other


@needs_bpe
def test_streams_whole_characters(capsys):
    """Fails if half a character is printed as �, or if text is held back until the end."""
    table = GPT2Tokenizer()
    ids = table.encode(STRANGE).tolist()
    pieces = []

    def stream():
        for i in ids:
            pieces.append(capsys.readouterr().out)
            yield torch.tensor([i])
    count = sample.write_one(table, table.encode("ö").tolist(), stream(), None)
    pieces.append(capsys.readouterr().out)
    assert count == len(ids) and "".join(pieces) == "ö" + STRANGE + "\n"
    assert not any("�" in piece for piece in pieces) and len([p for p in pieces if p]) > 10


@pytest.mark.parametrize("num_samples, expected", [
    (1, ("ga", "1")), (2, (f"ga\n{'-' * 15}\ngbc\n{'-' * 15}", "4"))])
def test_stop_at_eot(tmp_path, capsys, monkeypatch, num_samples, expected):
    """Fails if the end-of-text token or what follows it is printed, or if one text of a batch stops
    the others."""
    config = GPT2Config(n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=10)
    GPT2(config).save_pretrained(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps(CharTokenizer("abcdefg", 7).to_json()))
    columns = [[0, 1], [7, 2], [7, 9], [7, 7]]                   # 9: an id that the tokenizer lacks

    def stream(self, idx, *args, stop_token, **how):
        assert stop_token == 7
        return (torch.tensor(column[:len(idx)]) for column in columns)
    monkeypatch.setattr(GPT2, "stream", stream)
    assert expected == sampled(capsys, tmp_path, "--start=g", "--stop_at_eot",
                               f"--num_samples={num_samples}")


def interrupt_stream(after):
    stream = GPT2.stream

    def interrupted(*args, **how):
        for i, token in enumerate(stream(*args, **how)):
            if i == after:
                os.kill(os.getpid(), signal.SIGINT)
            yield token
    GPT2.stream = interrupted


def test_ctrl_c_while_sampling(straight):
    """Fails if Ctrl-C shows a traceback."""
    done = run("sample", f"--out_dir={straight / 'whole'}", "--start=a", "--device=cpu",
               before=partial(interrupt_stream, 9), code=130)
    assert done.err == "" and done.out.startswith("a")


def test_prompts(straight, tmp_path, monkeypatch, capsys):
    """Fails if a piped text is taken for a file's name, or if sample.py needs a standard input or
    a model that knows line breaks."""
    (tmp_path / "prompt").write_text("FILE:b")
    with open(tmp_path / "prompt") as f:
        monkeypatch.setattr(sys, "stdin", f)
        assert sample.read_prompt(None) == "FILE:b"
    monkeypatch.setattr(sys, "stdin", None)
    assert sample.read_prompt(f"FILE:{tmp_path}/prompt") == "FILE:b"
    assert sampled(capsys, straight / "whole", "--max_new_tokens=3")[0][0] == "\n"
    shutil.copytree(straight / "whole", tmp_path / "out")
    meta = (tmp_path / "out/meta.json").read_text().replace("\\n", "Q")
    (tmp_path / "out/meta.json").write_text(meta)
    assert sampled(capsys, tmp_path / "out", "--max_new_tokens=3")[0][0] == "Q"


def test_as_typed(straight, tmp_path):
    """Fails if something works only in the tests' own process: a piped prompt, a reader that leaves
    early, closed outputs, or a run from another folder."""
    script = f"{sys.executable} {HERE}/"
    sampling = f"{script}sample.py --out_dir={straight / 'whole'} --device=cpu"
    (tmp_path / "text").write_text("ab" * 99)
    preparing = f"{script}data/prepare.py {tmp_path}/text --tokenizer=char --name={tmp_path}/set"
    lines = [f"printf 'ab c' | {sampling} | head -c 9", f"{script}train.py --out_dri=x",
             f"{script}data/prepare.py", f"{script}model.py --foo",
             f"{script}train.py --help >&-", f"{preparing} >&-", f"{script}data/prepare.py 2>&-"]
    (tmp_path / "empty").mkdir()
    how = dict(cwd=tmp_path / "empty", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
               stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen(["bash", "-c", line], **how) for line in lines]
    outputs = [process.communicate(timeout=120) for process in processes]
    outs, errs = zip(*outputs, strict=True)
    assert outs[0].startswith("ab c") and len(outs[0]) == 9
    one_line(errs[1], "train.py: there is no flag --out_dri: did you mean --out_dir?")
    one_line(errs[2], "prepare.py: say what to prepare")
    one_line(errs[3], "model.py: unknown argument --foo")
    assert [errs[i] for i in (0, 4, 5, 6)] == [""] * 4 and outs[1:] == ("",) * 6
    assert [p.returncode for p in processes] == [0, 2, 2, 2, 0, 0, 2]
    tokens = [load_tokenizer(tmp_path / "set").decode(read_bin(tmp_path / "set", split).tolist())
              for split in ("train", "val")]
    assert "".join(tokens) == "ab" * 99 and os.listdir(tmp_path / "empty") == []


# --------------------------------------------------------------------------------------------------
# Command line


@pytest.fixture(scope="session")
def bad(data, straight, tmp_path_factory):
    """Files and folders, each with something wrong."""
    tmp = tmp_path_factory.mktemp("bad")
    (tmp / "empty").mkdir()
    (tmp / "moved/run-1").mkdir(parents=True)
    for name in ("nanogpt", "half", "wide", "counts", "items"):
        shutil.copytree(data, tmp / name)
    for name in ("pickle", "short", "bpe", "nometa"):
        shutil.copytree(straight / "whole", tmp / name)
    tokens = read_bin(data, "train")
    tokens[:-100].tofile(tmp / "half/train.bin")
    tokens[5] = 999
    tokens.tofile(tmp / "wide/train.bin")
    for name in ("nanogpt", "nometa"):
        (tmp / name / "meta.json").unlink()
    weights = tmp / "short/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    packed = gzip.compress(random.Random(0).randbytes(99999).hex().encode())
    contents = {
        "nanogpt/meta.pkl": b"", "ckpt.pt": b"PK",
        "pickle/model.safetensors": pickle.dumps(list(range(9))),
        "bpe/meta.json": b'{"tokenizer": "gpt2"}', "file": b"", "text": TEXT.encode(),
        "items/items.json": b'[{"label": 1, "endings": [[0, 2, 4, 3]]}]',
        "counts/meta.json": b'{"tokenizer": "gpt2", "tokens": 5}', "cut.gz": packed[:-9],
        "wrong.gz": packed[:70000] + bytes(99) + packed[70099:], "late": b"a" * 9999 + b"\xff",
        "latin.jsonl": b'{"text": "caf\xe9"}', "x.jsonl": b'{"text": "a"}\n{"txt": "b"}\n'}
    for name, content in contents.items():
        (tmp / name).write_bytes(content)
    return tmp


NANOGPT = """out_dir eval_interval log_interval eval_iters eval_only init_from device
    dataset gradient_accumulation_steps batch_size block_size n_layer n_head n_embd dropout bias
    learning_rate max_iters weight_decay beta1 beta2 grad_clip decay_lr warmup_iters min_lr
    lr_decay_iters backend dtype compile always_save_checkpoint""".split()
FLAGS = {"train": {**train.RUN, **train.SHAPE},
         "sample": {f.name: f for f in fields(sample.Sampling)}
         | {name: train.SHAPE[name] for name in sample.CHANGES},
         "prepare": {f.name: f for f in fields(prepare.Options)}}


@pytest.mark.parametrize("script", FLAGS)
def test_flags(capsys, monkeypatch, other_data, script):
    """Fails if a field has no flag, a flag has no help, the help is wider than 80 columns, a
    boolean cannot be switched off, or if `python -P` does not find the script's modules."""
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = here(capsys, script, "--help")
    assert code == 0 and not err and max(map(len, out.splitlines())) <= 80
    if script == "train":                                        # it answers before torch is there
        command = [sys.executable, *SAFE_PATH, HERE / "train.py", "--help"]
        assert out == subprocess.check_output(command, cwd=other_data, text=True)
    for name in [*FLAGS[script], *(NANOGPT if script == "train" else [])]:
        assert re.search(rf"^  --{name} .*\n?.*\w", out, re.MULTILINE), name
    for name, f in FLAGS[script].items():
        if cli.kind_of(f) is bool:
            for typed, on in ((f"--{name}", True), (f"--{name}=True", True),
                              (f"--{name}=False", False), (f"--no-{name}", False)):
                assert cli.parse_flags("", FLAGS[script], argv=[typed]) == ({name: on}, [])


# script (-: without the usual flags), exit code, arguments, words of the message
BAD = """
train    2  --n_layr=2                                             did you mean --n_layer?
train    2  --tokenizer                                            there is no flag --tokenizer (
train    2  --lr=1e-3                                              did you mean --learning_rate?
sample   2  --prompt=x                                             did you mean --start?
train    2  --n_layer=two                                          --n_layer: invalid int value: 'two'
train    2  --rope=maybe                                           neither True nor False
train    2  config/train_gpt2.py                                   config files are not run
train    2  --n_embd=30 --n_head=4                                 n_embd=30 is not divisible by n_head=4: try n_embd=32
train    2  --n_kv_head=1                                          add --gqa
train    2  --vocab_size=5                                         too small
train    2  --n_layer={digits}                                     --n_layer
train    2  --max_iters={digits}                                   --max_iters
train    2  --dropout={digits}                                     --dropout
train    2  --fsdp                                                 torchrun --standalone --nproc_per_node=2 train.py
train    2  --backend=gloo                                         --backend has no effect
train    2  --device=mps                                           use auto, cpu, cuda
train    2  --device=meta                                          use auto, cpu, cuda
train    2  --device=cuda:99                                       --device=cuda:99 was not found
train    2  --eval_stride=4                                        no effect without --eval_only
train    2  --eval_only --init_from={run}                          has no effect with --eval_only
train-   2  --eval_only --init_from={run} --benchmark              --benchmark has no effect
train-   2  --eval_only                                            add --init_from=resume
train-   2  --eval_only --init_from=auto                           add --init_from=resume
train-   2  --eval_only --init_from={run} --eval_stride=33         more than block_size=32
train-   2  --eval_only --init_from={run} --eval_stride=0          at least 1
train-   2  --benchmark --trace=no_folder/x                        --trace=no_folder/x cannot
train    2  --dtype=int8                                           float32, bfloat16
train    2  --dtype=float16                                        use bfloat16 or float32
train    2  --compile=maybe                                        auto, True, False
train    2  --learning_rate=nan                                    --learning_rate=nan
train    2  --max_iters=-1                                         --max_iters=-1
train    2  --batch_size=0                                         --batch_size=0
train    2  --beta2=1.0                                            --beta2=1.0
train    2  --seed=18446744073709551616                            --seed=18446744073709551616
train    2  --decay_lr=False                                       no effect without --decay_lr
train    1  --dataset=nowhere                                      python data/prepare.py PATH... --name=nowhere
train    1  --dataset={bad}/empty                                  no train.bin
train    1  --dataset={bad}/nanogpt                                meta.pkl, a pickle
train    1  --dataset={bad}/counts                                 counts/meta.json is damaged: its tokens
train    1  --dataset={bad}/half                                   half written
train    1  --dataset={bad}/wide                                   token 999, beyond the vocabulary
train    1  --block_size=512                                       needs 513. Use --block_size=
train    2  --dataset={bad}/items                                  only compares models: add --eval_only
train-   1  --eval_only --init_from={run} --dataset={bad}/items    items.json is damaged (it does not fit val.bin)
train    2  --sample_interval=-1                                   at least 0
train    2  --sample_interval=4 --benchmark                        has no effect with --benchmark
train    2  --init_from=gpt3                                       is not scratch, resume, auto
train    1  --init_from=resume                                     there is no checkpoint in
train    1  --init_from=gpt2                                       Without a network, copy the file to
train    1  --init_from=some/model                                 Without a network, copy the file to
train    2  --init_from=some/where/model                           a model of the hub (owner/name)
train    1  --init_from={bad}/none.pt                              none.pt
train    1  --init_from={bad}/ckpt.pt                              not a checkpoint of nanoGPT
train    2  --init_from={run} --n_head=4                           n_head=4 contradicts
train    2  --init_from=resume --out_dir={run} --n_layer=3         contradicts the checkpoint
train    2  --init_from=resume --out_dir={run} --muon              muon=True contradicts the checkpoint
train    2  --init_from=resume --out_dir={run} --size=gpt2         --size has no effect on weights that
train    2  --min_lr=1                                              --min_lr=1 is above --learning_rate
train    2  --size=gpt3                                            --size=gpt3 is not one of gpt2, gpt2-
train    2  --init_from=resume --out_dir={run} --dropout=2         dropout=2
train    1  --init_from={bad}/pickle                               could run code
train    1  --init_from={bad}/short                                truncated
train    1  --init_from={bad}/bpe                                  has 50257 tokens, the model 12. Copy the meta.json
train    1  --init_from={run} --dataset={bad}/counts               prepare one with the model's tokenizer
train    1  --out_dir={bad}/file                                   choose another
train    1  --wandb                                                --wandb cannot start: division by zero
train    2  --out_dir=                                             --out_dir is empty
train    2  --plot={bad}/empty                                     has no effect with --plot
sample   2  --strat=x                                              did you mean --start?
sample   2  --top_p=0.0                                            --top_p=0.0
sample   2  --top_k=-1                                             --top_k=-1
sample   2  --temperature=-1.0                                     --temperature=-1.0
sample   2  --max_new_tokens=0                                     --max_new_tokens=0
sample   2  --max_new_tokens={digits}                              --max_new_tokens
sample   2  --dtype=int4                                           --dtype=int4
sample   2  --device=gpu                                           --device=gpu
sample   2  --temperature=0 --top_k=5                              no effect at --temperature=0
sample   2  --benchmark                                            --start has no effect with --benchmark
sample   2  --init_from={run}                                      --out_dir has no effect with --init_from=
sample   2  --stop_at_eot                                          no end-of-text
sample   2  --block_size=99                                        the checkpoint's 32 positions
sample   2  --window_size=4                                        add --sliding_window
sample   1  --out_dir={bad}/pickle                                 could run code
sample   1  --out_dir={bad}/nometa                                 nometa/tokenizer.json is another tokenizer
sample   1  --out_dir={bad}/empty                                  no checkpoint in
sample   1  --out_dir={bad}/moved                                  moved/run-1
sample   1  --start=abZ                                            'Z' is not among the 12
sample   1  --start=FILE:{bad}/none                                none
sample   1  --start=FILE:{bad}/latin.jsonl                         latin.jsonl
sample-  2  --init_from=gpt3                                       is not resume
sample-  1  --init_from=gpt2                                       gpt2/resolve/main/config.json
prepare  2                                                         say what to prepare
prepare  2  shakespeare_chr                                        is not a data set (stdlib, shakespeare_char,
prepare  2  {bad}/text                                             --name=NAME
prepare  2  {bad}/text --name=stdlib                               choose another
prepare  2  {bad}/text --name=x --val_frac=2                       at most 1
prepare  2  {bad}/text --name=x --tokenizer=bpe                    gpt2, char
prepare  2  {bad}/text --name=x --source={bad}/text                no effect on your own files
prepare  2  stdlib --tokenizer=char                                no effect on stdlib
prepare  2  shakespeare --source={bad}/none                        was not found
prepare  2  fineweb --shards={digits}                              --shards
prepare  2  fineweb --shards=104                                   there are 103
prepare  2  hellaswag --shards=2                                   no effect on hellaswag
prepare  2  openwebtext                                            use fineweb_edu or fineweb in its place
prepare  1  hellaswag --source={bad}/x.jsonl                       x.jsonl, line 1: not an item of hellaswag
prepare  1  hellaswag --source={bad}/file                          file holds no items
prepare  2  {bad}/text --name=x --pairs                            --pairs reads .jsonl files
prepare  2  {bad}/x.jsonl --name=x --pairs=text                    must be two names
prepare  2  {bad}/x.jsonl --name=x --pairs --field=a               no effect with --pairs
prepare  1  {bad}/x.jsonl --name=x --pairs=text,b --tokenizer=char line 1: no JSON object with a text 'b'
prepare  1  {bad}/none --name=x                                    is not a file
prepare  1  {bad}/file --name=x --tokenizer=char                   no text
prepare  1  {bad}/latin.jsonl --name=x --tokenizer=char            convert it to UTF-8
prepare  2  stdlib {bad}/x.jsonl                                   stdlib is a data set of its own
prepare  1  {bad}/late --name=x --tokenizer=char                   late cannot be read
prepare  1  {bad}/cut.gz --name=x --tokenizer=char                 cut.gz cannot be read
prepare  1  {bad}/wrong.gz --name=x --tokenizer=char               wrong.gz
prepare  1  {bad}/x.jsonl --name=x --tokenizer=char                x.jsonl, line 2: no JSON object with a text 'text'
prepare  1  {bad}/text --name=file --tokenizer=char                file
prepare  1  shakespeare_char                                       (ProxyError). Without a network, copy
prepare  1  {bad}/text --name=x                                    6d1cbeee0f20b3d9449abfede4726ed8212e3aee
""".strip().splitlines()  # noqa: E501
BAD = [(row[:9].strip(), int(row[9]), row[12:66].strip(), row[67:]) for row in BAD]


@pytest.mark.parametrize("script, code, argv, words", BAD)
def test_bad_input(data, straight, tmp_path, bad, capsys, monkeypatch, script, code, argv, words):
    """Fails if bad input gives a traceback, a wrong exit code or a message without advice, or if
    anything is written."""
    def files():
        paths = [*bad.rglob("*"), *tmp_path.rglob("*")]
        return {path: path.stat().st_mtime_ns for path in paths
                if path.is_file() and path.name != ".lock"}
    before = files()
    nobody = "http://127.0.0.1:9"
    for name, value in dict(HF_ENDPOINT=nobody, HTTPS_PROXY=nobody, https_proxy=nobody,
                            HF_HOME=tmp_path / "hub", TIKTOKEN_CACHE_DIR=tmp_path / "bpe").items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(tokenizer, "gpt2_bpe", tokenizer.gpt2_bpe.__wrapped__)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **how: 1 / 0))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)     # between attempts to download
    for module in (prepare, loader, train):
        monkeypatch.setattr(module, "DATA", str(bad))
    first = {"train": flags(dataset=data, out_dir=tmp_path / "out"),
             "train-": [f"--dataset={data}", f"--out_dir={tmp_path / 'out'}", "--device=cpu"],
             "sample": [f"--out_dir={straight / 'whole'}", "--start=a"]}.get(script, [])
    argv = argv.format(bad=bad, run=straight / "whole", digits="9" * 400).split()
    script = script.rstrip("-")
    got, _, err = here(capsys, script, *first, *argv)
    one_line(err, words)
    assert got == code and err.startswith(script + ".py: ") and len(err) < 1000
    assert files() == before


def old_gpu():
    """`before` of a process: dtypes are chosen as on a GPU that only emulates bfloat16."""
    def choose(name, device, **how):
        return model_py.choose_dtype(name, torch.device("cuda"), **how)
    torch.cuda.is_bf16_supported = lambda including_emulation=True: including_emulation
    train.choose_dtype = choose
    sample.choose_dtype = choose


def test_old_gpus(data, straight):
    """Fails if a script chooses bfloat16 where the GPU emulates it, or float16 for FSDP."""
    argv = [f"--init_from={straight / 'cut'}", "--device=cpu"]
    measure = [*argv, "--eval_only", f"--dataset={data}", "--eval_iters=1"]
    out = run("train", *measure, before=old_gpu).out
    assert "torch.float16: this GPU has no bfloat16" in out
    out = run("train", *measure, "--fsdp", ranks=1, before=old_gpu).out
    assert "torch.float32: this GPU has no bfloat16, and FSDP has no loss scaling" in out
    err = run("sample", *argv, "--start=a", "--max_new_tokens=2", before=old_gpu).err
    assert err.endswith(" on cpu, float16\n")


@pytest.mark.parametrize("script", ["train", "sample"])
def test_compile(data, straight, tmp_path, capsys, monkeypatch, script):
    """Fails if --compile without a value compiles nothing, if --compile=True is ignored where it
    does not work, or if a compiler's failure shows a traceback."""
    compiled = []

    def compile(function, **how):
        compiled.append(function)
        return function
    monkeypatch.setattr(torch, "compile", compile)
    argv = {"train": flags(dataset=data, out_dir=tmp_path / "out", max_iters=1),
            "sample": [f"--out_dir={straight / 'whole'}", "--start=a", "--device=cpu",
                       "--max_new_tokens=3"]}[script]
    code, _, err = here(capsys, script, *argv, "--compile")
    modules = [type(getattr(function, "__self__", None)).__name__ for function in compiled[1:]]
    expected = {"train": ["NoneType", "TransformerBlock", "TransformerBlock"], "sample": ["GPT2"]}
    assert code == 0 and modules == expected[script], err                # [0] is a trial

    def fail(*args, **how):
        raise RuntimeError("Cannot find a working triton installation.\nmore")
    monkeypatch.setattr(torch, "compile", fail)
    why = "does not work here (RuntimeError: Cannot find a working triton installation.)"
    gpu = torch.device("cuda")
    assert model_py.choose_compile("auto", gpu) == (False, "it " + why)
    code, _, err = here(capsys, script, *argv, "--compile=True")
    one_line(err, why)
    assert code == 2


# --------------------------------------------------------------------------------------------------
# What a person sees


def little_memory():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (1 << 28)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@needs_linux
def test_out_of_memory(data, tmp_path):
    """Fails if too little memory gives a traceback, or the advice makes another run of it."""
    common = dict(dataset=data, out_dir=tmp_path / "out")
    err = run("train", *flags(**common, batch_size=2**13), before=little_memory, code=1).err
    one_line(err, "train.py: out of memory. The same result with less memory: divide --batch_size",
             "by a number, and multiply --gradient_accumulation_steps and --eval_iters by it")
    common |= dict(batch_size=6, max_iters=3)
    run("train", *flags(**common))
    less = dict(out_dir=tmp_path / "less", batch_size=6 // 2, eval_iters=TINY["eval_iters"] * 2,
                gradient_accumulation_steps=train.Run.gradient_accumulation_steps * 2)
    run("train", *flags(**common | less))
    agree(tmp_path / "out", tmp_path / "less")


@pytest.mark.parametrize("script", ["train", "sample"])
@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA: 2 GB"), RuntimeError("MPS backend out of memory"),
    RuntimeError("can't allocate memory"), MemoryError(), RuntimeError("shapes")], ids=str)
def test_only_memory_is_memory(data, straight, tmp_path, capsys, monkeypatch, script, error):
    """Fails if an error of ours is shown as one of memory, or too little memory as a traceback."""
    def hidden(*args):
        raise error
    monkeypatch.setattr(GPT2, "hidden", hidden)
    argv = {"train": flags(dataset=data, out_dir=tmp_path / "out"),
            "sample": [f"--out_dir={straight / 'whole'}", "--device=cpu", "--start=a"]}[script]
    if str(error) == "shapes":
        with pytest.raises(RuntimeError, match="shapes"):
            here(capsys, script, *argv)
        return
    code, _, err = here(capsys, script, *argv)
    advice = {"train": "divide --batch_size", "sample": "Use fewer or shorter samples"}[script]
    one_line(err, f"{script}.py: out of memory. ", advice)
    assert code == 1


def test_other_consoles(monkeypatch):
    """Fails if a script stops at a character that the console lacks."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    with pytest.raises(SystemExit):
        cli.run_main(lambda: print("a日"), "")
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"a?\n"


def test_lines_fit(data, tmp_path, capsys, monkeypatch):
    """Fails if a line is wider than 80 columns, where a live one would not overwrite itself, or if
    a log file gets carriage returns."""
    wide = flags(dataset=os.path.basename(data), gradient_accumulation_steps=9000, **ALL,
                 max_iters=0)
    out = run("train", *wide, ranks=2, folder=os.path.dirname(data)).out
    assert out.count("\n") >= 8 and "in each" in out and max(map(len, out.splitlines())) <= 80
    out = run("train", *flags(dataset=data, out_dir=tmp_path / "out", max_iters=2)).out
    lines = re.findall(r"^step \d/2  loss \S+  lr \S+  norm \S+ .* tok/s  \S+ left  .* GB$", out,
                       re.MULTILINE)
    assert len(lines) == 2 and "\r" not in out and all(line.index(" left") < 75 for line in lines)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    log = train.Log(train.Run(out_dir=str(tmp_path)), GPT2Config(), 0, False)
    log.line(f"{lines[0]}  mfu 45.1%  and more  of this  and that", stay=False)
    shown = capsys.readouterr().out
    assert len(shown) < 81 and "left" in shown and "that" not in shown


# --------------------------------------------------------------------------------------------------
# README and evidence


DOCUMENTATION = ("README.md", ".github/EVIDENCE.md")


def readme_commands():
    """(launcher, script, its arguments) of the lines in shell blocks that start a script."""
    for name in DOCUMENTATION:
        text = (HERE / name).read_text()
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
            for command in re.split(r"\n|&&", block):
                words = shlex.split(command.rpartition("|")[2], comments=True)
                scripts = [word for word in words if word.endswith(".py")]
                if scripts:
                    yield words[0], scripts[0], words[words.index(scripts[0]) + 1:]


def test_readme_commands(monkeypatch):
    """Fails if the README starts a script that does not exist, or refuses its flags."""
    parse = {"train.py": train.parse_command_line, "sample.py": sample.parse_command_line,
             "data/prepare.py": lambda: cli.parse_flags("", FLAGS["prepare"], "paths")}
    commands = list(readme_commands())
    for launcher, script, argv in commands:
        assert launcher in ("python", "torchrun") and (HERE / script).exists()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [script, *argv])
            if launcher == "torchrun":
                patch.setenv("RANK", "0")
            if script in parse and argv != ["--help"]:
                parse[script]()
    assert len(commands) >= 15 and {script for _, script, _ in commands} >= parse.keys()


def test_readme_python(straight, tmp_path, monkeypatch, capsys):
    """Fails if the README's example of the library does not run, or does something else than its
    comments say."""
    (code,) = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    shutil.copytree(straight / "whole", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    exec(code, names)
    assert capsys.readouterr().out.startswith("def ") and names["loss"] > 0
    assert names["logits"].shape == (1, 3, 12) and [len(t) for t in names["texts"]] == [104, 102]
    same = {*contents(tmp_path / "out")} - {train.STATE, "model.safetensors"}
    assert all((tmp_path / "copy" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
               for name in same)


def test_readme_links():
    """Fails if the README links to a file that does not exist."""
    for name in DOCUMENTATION:
        links = re.findall(r"\]\((?!http)([^)#]+)\)", (HERE / name).read_text())
        assert links and all((HERE / name).parent.joinpath(link).exists() for link in links)


def no_matrix_products():
    train.sgemm_flops = lambda: 1e9                              # measuring it takes seconds


@pytest.fixture
def evidence(data, tmp_path, monkeypatch):
    """.github/evidence.py with the smallest models, in a folder of its own."""
    spec = importlib.util.spec_from_file_location("evidence", HERE / ".github/evidence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    tiny = dict(n_layer=1, n_head=4, n_embd=32, vocab_size=50)
    small = flags(dataset=data, n_head=4, block_size=8, max_iters=2)

    def start_script(command, **how):
        argv = command[command.index(module.TRAIN) + 1:]
        if "--benchmark" in argv:                                # it refuses what it does not use
            argv += [f for f in small if not re.match("--(eval|log|max)_", f)]
        else:
            argv += small
        done = run("train", *argv, folder=tmp_path, before=no_matrix_products)
        return SimpleNamespace(stdout=done.out)
    for variant in ("rope", "gqa", "sliding_window"):
        del module.VARIANTS[variant]
    del module.OPTIMIZERS["AdamW"]
    for name, value in dict(
            HERE=str(tmp_path), TEXT=f"{data}/val.bin", SEEDS=(1, 2),
            GPT2Config=lambda *args, **given: GPT2Config(*args, **given | tiny),
            medians=lambda jobs, **how: {key: job() for key, job in jobs.items()},
            in_new_process=lambda function, *args: function(*args),
            subprocess=SimpleNamespace(run=start_script)).items():
        monkeypatch.setattr(module, name, value)
    return module


@needs_linux
def test_evidence(evidence, tmp_path, capsys):
    """Fails if .github/evidence.py no longer makes its tables and pictures, or of other models."""
    evidence.train_all()
    evidence.costs()
    evidence.losses()
    evidence.over_size(sizes={"tiny": {}})
    evidence.over_context(contexts=(32, 64))
    evidence.over_window(contexts=(300,))
    tables = [[[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
              for block in capsys.readouterr().out.split("\n\n")[1:]]
    assert [len(table) for table in tables] == [4, 4, 3, 4, 3]
    assert {len({len(row) for row in table}) for table in tables} == {1}
    costs, losses, _, _, window = tables
    x, y = loader.TokenDataset([evidence.TEXT], 8, 50).__getitems__(range(21))
    assert [row[3] for row in costs[2:]] == [f"{2 * width * 2} B" for width in (32, 8)]
    for optimizer, name, loss, *longer in losses[2:]:
        models = [GPT2.from_pretrained(evidence.out_dir(seed, optimizer, name)) for seed in (1, 2)]
        assert all(m.config.beyond_gpt2.keys() >= evidence.VARIANTS[name].keys() for m in models)
        with torch.no_grad():
            mean = sum(model(x, y)[1].item() for model in models) / 2
        assert loss.split()[0] == f"{mean:.3f}" and (longer == ["cannot"] * 2) == (name == "plain")
    assert all(float(cell.split()[0]) > 0 for cell in window[2][1:4])
    assert evidence.run_speed(1, []) > 0
    for picture in ("variants.svg", "context.svg"):
        xml.etree.ElementTree.parse(tmp_path / picture)
