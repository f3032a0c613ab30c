"""
The promises of this project, in the order of the program. They need a CPU and no network:
python -m pytest, and python -m pytest -m slow for the long ones.
"""
import contextlib
import errno
import hashlib
import http.server
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
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace

# The suite runs on the CPU, also where there is a GPU. Only a test marked `gpu` gets it back, in
# its processes, by env=GPU.
os.environ.setdefault("TEST_GPU", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"

import huggingface_hub
import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DistributedSampler

from data import loader, prepare
from data.flags import add_flags, flag_parser, one_line, progress
from data.hub import download, hub_download, local_path
from data.loader import EndlessSampler, TokenDataset, find_data
from data.tokenizer import CharTokenizer, GPT2Tokenizer, load_tokenizer
from model import (
    GPT2,
    AttentionHead,
    GPT2Config,
    MultiHeadAttention,
    PointwiseFeedForward,
    TransformerBlock,
    linear,
    linear_cross_entropy,
    rotary_tables,
    rotate,
    scaled_dot_product_attention,
)

transformers = pytest.importorskip("transformers", reason="pip install transformers")
safetensors = pytest.importorskip("safetensors.torch", reason="pip install safetensors")
load_file = safetensors.load_file
save_file = safetensors.save_file
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)

GPU = {"CUDA_VISIBLE_DEVICES": os.environ["TEST_GPU"]}
HERE = pathlib.Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"
SHAKESPEARE = SHARED / "data/tinyshakespeare.txt"
if (SHARED / "tiktoken_cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
needs_bpe = pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ,
                               reason="needs GPT-2's tokenizer files: set TIKTOKEN_CACHE_DIR")
needs_shakespeare = pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"needs {SHAKESPEARE}")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
needs_gpu = pytest.mark.skipif(not os.path.exists("/dev/nvidiactl"), reason="needs a GPU")


def slow(*values):
    """The parameters of a slow test."""
    return pytest.param(*values, marks=pytest.mark.slow)


# --------------------------------------------------------------------------------------------------
# Runs: tiny.train(dropout=0.1, kill_at=5).resume().losses

TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=2, max_iters=9,
            eval_interval=3, eval_iters=3, log_interval=1, learning_rate=2e-3, warmup_iters=2,
            gradient_accumulation_steps=4, optimizer="adamw", sample_interval=0)
ALL = dict(rope=True, gqa=True, sliding_window=True, n_head=4, n_kv_head=2, window_size=8)
WORDS = ["".join(random.Random(i).choices("abcdefghij", k=i % 6 + 1)) for i in range(40)]
TEXT = "\n".join(" ".join(random.Random(i).choices(WORDS, k=8)) for i in range(200))

# Importing torch takes seconds. So a script's process is a fork of one that has only imported what
# the scripts import.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "sample", __name__])
COUNT = itertools.count()


def run_script(script, argv, env, where, log, before):
    """The process of `python SCRIPT ARGV`. It calls `before` first, which may inject a fault."""
    for number, end in ((0, ".in"), (1, ".out"), (2, ".err")):
        os.dup2(os.open(log + end, os.O_RDWR | os.O_CREAT), number)
    sys.stdin = open(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)     # a shell's & ignores it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)                 # and nohup this
    torch.set_num_threads(1)
    os.environ.update(env)
    os.chdir(where)
    sys.argv = [script, *argv]
    if before:
        before()
    runpy.run_path(f"{HERE}/{script}.py", run_name="__main__")


class Run:
    """A script in one process or in several, and the folder `out` that it writes."""

    def __init__(self, tiny, out=None):
        self.tiny = tiny
        self.out = out
        self.processes = []
        self.logs = []

    def launch(self, script, argv, env, where, before, stdin):
        log = f"{self.tiny.folder}/.log{next(COUNT)}"
        pathlib.Path(log + ".in").write_text(stdin)
        args = script, argv, env, str(where), log, before
        process = FORKS.Process(target=run_script, args=args)
        process.start()
        self.processes.append(process)
        self.logs.append(log)

    def end(self, code=0, timeout=60):
        """Wait until all processes have ended, with this exit code (negative: a signal; None: any).
        If one fails, the others get SIGTERM, as from torchrun."""
        deadline = time.time() + timeout
        while None in self.codes and time.time() < deadline:
            failed = set(self.codes) - {None, 0, code}
            for process in self.processes:
                process.join(0.02)
                if failed:
                    process.terminate()
        late = [process for process in self.processes if process.is_alive()]
        self.kill()
        assert not late, f"{len(late)} processes hang\n{self.stdout}\n{self.stderr}"
        assert code is None or set(self.codes) == {code}, (self.codes, self.stdout, self.stderr)
        return self

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()

    def printed(self, end):
        return "".join(pathlib.Path(log + end).read_text() for log in self.logs)

    @property
    def codes(self):
        return [process.exitcode for process in self.processes]

    @property
    def stdout(self):
        return self.printed(".out")

    @property
    def stderr(self):
        return self.printed(".err")

    def resume(self, *argv, **how):
        """Continue the run in the same folder, with the flags that it had."""
        how = dict(device="cpu", init_from="resume") | how
        return self.tiny.run("train", *argv, out_dir=self.out, **how)

    def copy(self, tiny, name="copy"):
        """The same run in the folder of another fixture."""
        shutil.copytree(self.out, tiny.folder / name)
        return Run(tiny, tiny.folder / name)

    @property
    def metrics(self):
        """metrics.jsonl without what depends on the machine."""
        lines = (self.out / "metrics.jsonl").read_text().splitlines()
        return [without(json.loads(line), "tokens_per_second", "memory") for line in lines]

    @property
    def losses(self):
        return [r["loss"] for r in self.metrics if "loss" in r]

    @property
    def val_losses(self):
        return [r["val_loss"] for r in self.metrics if "val_loss" in r]

    @property
    def checkpoint(self):
        return torch.load(self.out / "checkpoint.pt", weights_only=True)

    @property
    def result(self):
        """All that a run leaves, for comparisons to the bit. Two runs may differ in --out_dir."""
        files = {name: (self.out / name).read_bytes() for name in (
            "config.json", "meta.json", "tokenizer.json", "model.safetensors")}
        return self.metrics, files, as_bytes(without(self.checkpoint, "run"))


class Tiny:
    """A folder of its own, a data set of 1,700 characters to train on, and 170 for validation: both
    are no multiple of anything."""

    def __init__(self, folder, data):
        self.folder = folder
        self.data = data

    def start(self, script, *argv, kill_at=None, signal_at=None, rank=None, before=None,
              out_dir=None, ranks=0, env=None, stdin="", where=None, **flags):
        """Start a script with these flags, in as many processes as torchrun would start (ranks).
        kill_at, signal_at: a process (rank: only this one) gets SIGKILL, or the signal of a pair
        (step, signal), in this step of its own."""
        if out_dir:
            flags["out_dir"] = out_dir
        argv = [f"--{name}={value}" for name, value in flags.items()] + [str(a) for a in argv]
        if kill_at:
            signal_at = kill_at, signal.SIGKILL
        if signal_at:
            before = partial(send_signal, *signal_at, rank)
        run = Run(self, out_dir)
        port = str(free_port())
        for i in range(ranks or 1):
            folder = where[i] if isinstance(where, list) else where or self.folder
            names = dict(RANK=i, LOCAL_RANK=i, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks,
                         MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            names = {name: str(value) for name, value in names.items() if ranks}
            run.launch(script, argv, names | (env or {}), folder, before, stdin)
        return run

    def run(self, script, *argv, code=0, timeout=60, **how):
        """Run a script to its end, with this exit code."""
        if how.get("kill_at") and how.get("rank") is None:
            code = -9
        return self.start(script, *argv, **how).end(code, timeout)

    def training(self, out="out", **how):
        return dict(dataset=self.data, device="cpu", out_dir=self.folder / out) | TINY | how

    def train(self, *argv, **how):
        """Train a tiny model in folder `out`, to its end."""
        return self.run("train", *argv, **self.training(**how))

    def start_training(self, *argv, **how):
        return self.start("train", *argv, **self.training(**how))

    def sample(self, *argv, **how):
        return self.run("sample", *argv, device="cpu", **how)

    def refuses(self, script, *argv, code=1, **how):
        """-> the one line that a mistake gets (code 2: argparse's, below its line of usage)."""
        done = self.run(script, *argv, code=code, **how)
        *usage, line = done.stderr.splitlines()
        assert "Traceback" not in done.stderr, done.stderr
        assert not usage or code == 2 and usage[0].startswith("usage:"), done.stderr
        return line


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def without(record, *names):
    return {name: value for name, value in record.items() if name not in names}


def as_bytes(value):
    """Nested lists, dicts and tensors, comparable by == to the bit."""
    if isinstance(value, dict):
        return {name: as_bytes(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_bytes(v) for v in value]
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.cpu().contiguous().view(-1).numpy().tobytes()
    return value


def assert_agree(run, other, tolerance=2e-5):
    """The losses and gradient norms of two runs differ by a rounding at most."""
    a = run.metrics
    b = other.metrics
    assert [r.keys() for r in a] == [r.keys() for r in b]
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, rel=tolerance)


def write_set(folder, *texts):
    """A data set by characters, of a text to train on and another for validation."""
    os.makedirs(folder)
    table = CharTokenizer("".join(sorted(set("".join(texts)))))
    counts = {}
    for split, text in zip(("train", "val"), texts, strict=True):
        table.encode(text).tofile(f"{folder}/{split}.bin")
        counts[split] = len(text)
    meta = {**table.to_json(), "tokens": counts}
    pathlib.Path(folder, "meta.json").write_text(json.dumps(meta))


def read_bin(folder, split):
    return np.fromfile(f"{folder}/{split}.bin", dtype="<u2")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "set"
    write_set(folder, TEXT[:1700], TEXT[1700:1870])
    return folder


@pytest.fixture(scope="session")
def masked_data(data, tmp_path_factory):
    """The same data set, with masks: runs of tokens, about half of all, are not predicted."""
    folder = tmp_path_factory.mktemp("masked") / "set"
    shutil.copytree(data, folder)
    runs = np.random.default_rng(0).integers(1, 60, size=1000)
    mask = np.repeat(np.arange(1000) % 2, runs).astype(np.uint8)
    for split in ("train", "val"):
        mask[:len(read_bin(folder, split))].tofile(folder / f"{split}.mask")
    return folder


@pytest.fixture
def tiny(tmp_path, data):
    return Tiny(tmp_path, data)


@pytest.fixture(scope="session")
def whole(tmp_path_factory, data):
    """A run with dropout, from the first epoch into the second. It is shared: do not change it."""
    return Tiny(tmp_path_factory.mktemp("whole"), data).train(dropout=0.1)


@pytest.fixture(scope="session")
def first_cut(tmp_path_factory, data):
    return Tiny(tmp_path_factory.mktemp("cut"), data).train(dropout=0.1, kill_at=5)


@pytest.fixture
def cut(first_cut, tiny):
    """The same run, killed in its fifth step. Its checkpoint is of step 3."""
    return first_cut.copy(tiny)


# --------------------------------------------------------------------------------------------------
# Faults: what a process calls before its script (before=...)


def each_step(act):
    """Call act(n) in the n-th step of this process, before the weights change."""
    counts = {}

    def hook(optimizer, *_):
        counts[optimizer] = counts.get(optimizer, 0) + 1
        if optimizer is next(iter(counts)):
            act(counts[optimizer])
    register_optimizer_step_pre_hook(hook)


def send_signal(step, number, rank=None):
    """In `step` this process sends itself a signal."""
    if rank is None or os.environ["RANK"] == str(rank):
        each_step(lambda n: n == step and os.kill(os.getpid(), number))


def slow_steps(seconds):
    each_step(lambda n: time.sleep(seconds))


def limit_files(size, number=signal.SIG_IGN):
    """No file grows beyond `size`, as on a full disk. With SIG_DFL the write kills the process."""
    signal.signal(signal.SIGXFSZ, number)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# --------------------------------------------------------------------------------------------------
# References, written for the tests


def samples_by_hand(folder, split, T=32, whole=False):
    """All samples of a split, side by side: tokens and targets, -1 where a mask says so. whole:
    also the rest at the end, with targets of -1 behind it."""
    ids = torch.from_numpy(read_bin(folder, split).astype(np.int64))
    targets = ids.clone()
    if (folder / f"{split}.mask").exists():
        mask = np.fromfile(folder / f"{split}.mask", dtype=np.uint8)
        targets[torch.from_numpy(mask) == 0] = -1
    if whole:
        ids = F.pad(ids, (0, T))
        targets = F.pad(targets, (0, T), value=-1)
    end = (len(ids) - 1) // T * T
    return ids[:end].view(-1, T), targets[1:end + 1].view(-1, T)


def learning_rate_by_hand(step, peak=2e-3, least=2e-4, warmup=2, end=10):
    """nanoGPT's schedule; `step` counts from 0."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if step > end:
        return least
    cosine = math.cos(math.pi * (step - warmup) / (end - warmup))
    return least + (peak - least) * (1 + cosine) / 2


def linear_by_hand(step, peak=2e-3, least=2e-4, warmup=2, end=10):
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak + (least - peak) * min(step - warmup, end - warmup) / (end - warmup)


def orthogonal_by_hand(matrix):
    """U f(S) V' of a matrix U S V': Muon's polynomial, five times, on the singular values."""
    U, S, Vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    S = S / S.norm()
    for _ in range(5):
        S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
    return (U * S @ Vt).float()


class MuonByHand(torch.optim.Optimizer):
    """Nesterov's momentum of 0.95, made orthogonal, as large as AdamW's updates. A matrix that is
    three times as wide as it is long is that of queries, keys and values."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["momentum"] = 0.95 * state.get("momentum", 0) + 0.05 * p.grad
                direction = 0.05 * p.grad + 0.95 * state["momentum"]
                rows = p.size(1) if p.size(0) == 3 * p.size(1) else p.size(0)
                updates = [0.2 * math.sqrt(max(part.shape)) * orthogonal_by_hand(part)
                           for part in direction.split(rows)]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * torch.cat(updates))


def optimizers_by_hand(model, optimizer, weight_decay):
    blocks = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    matrices = [model.transformer.wte.weight, model.transformer.wpe.weight]
    if optimizer == "adamw":
        matrices += blocks
    adamw = torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay},
                               {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.99))
    if optimizer == "adamw":
        return [adamw]
    return [adamw, MuonByHand(blocks, dict(lr=0, weight_decay=weight_decay))]


def train_by_hand(folder, optimizer, steps=10, weight_decay=0.5, grad_clip=0.5):
    """The steps of a tiny run, by torch alone -> the values of metrics.jsonl."""
    x, y = samples_by_hand(folder, "train")
    torch.manual_seed(1337)
    model = GPT2(GPT2Config(block_size=32, vocab_size=12, n_layer=2, n_head=2, n_embd=32))
    optimizers = optimizers_by_hand(model, optimizer, weight_decay)
    order = []
    for epoch in range(2):
        sampler = DistributedSampler(x, 1, 0, seed=1337)
        sampler.set_epoch(epoch)
        order += list(sampler)
    rows = []
    for step in range(steps + 1):
        if step % 5 == 0:
            losses = [model(*samples_by_hand(folder, split, whole=split == "val"))[1].item()
                      for split in ("train", "val")]
            rows.append([step, *losses])
        if step == steps:
            return rows
        chosen = order[8 * step:8 * step + 8]                    # the four batches of two as one
        _, loss = model(x[chosen], y[chosen])
        model.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        rate = learning_rate_by_hand(step, end=steps)
        for each in optimizers:
            for group in each.param_groups:
                group["lr"] = rate
            each.step()
        rows.append([step + 1, loss.item(), rate, norm.item()])


# --------------------------------------------------------------------------------------------------
# References and helpers: models (T1)


ATTENTION_FLAGS = ("rope", "gqa", "sliding_window")
ALL_THREE = dict.fromkeys(ATTENTION_FLAGS, True)
COMBINATIONS = [dict.fromkeys(on, True) for n in range(4)
                for on in itertools.combinations(ATTENTION_FLAGS, n)]
COMBINATIONS += [dict(bias=False, flash=False), dict(ALL_THREE, bias=False, flash=False)]


def flag_names(flags):
    return "+".join(f"{name}={value}" for name, value in flags.items()) or "plain"


all_combinations = pytest.mark.parametrize("flags", COMBINATIONS, ids=flag_names)


def small_config(**fields):
    shape = dict(block_size=16, vocab_size=61, n_layer=2, n_head=6, n_embd=48)
    if fields.get("sliding_window"):
        shape["window_size"] = 4
    return GPT2Config(**shape | fields)


@torch.no_grad()
def enlarge(model, scale):
    """Multiply the matrices by `scale` and draw the vectors at random: mistakes then show."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.dim() > 1:
            p.mul_(scale)
        else:
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def small_model(**fields):
    torch.manual_seed(0)
    return enlarge(GPT2(small_config(**fields)), 12)


def tokens(*shape, vocab_size=61, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(a, b, tolerance):
    assert a.shape == b.shape
    difference = (a - b).abs().max()
    assert difference <= tolerance, f"off by {difference:.2e}"


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert b[name].dtype == tensor.dtype, name
        assert torch.equal(b[name], tensor), name


class Watch(TorchDispatchMode):
    """Records the name of each operation that torch runs, and the shape of each result."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.calls.append((function.__name__, tuple(x.shape)))
        return out

    def largest(self):
        return max(math.prod(shape) for _, shape in self.calls)


def by_formula(q, k, v, window=None):
    """Attention from its definition, in float64, with a mask that is made one entry at a time."""
    T = q.size(-2)
    group = q.size(1) // k.size(1)
    seen = torch.tensor([[0 <= i - j < (window or T) for j in range(T)] for i in range(T)])
    k = k.double().repeat_interleave(group, dim=1)
    v = v.double().repeat_interleave(group, dim=1)
    scores = torch.einsum("bhid,bhjd->bhij", q.double(), k) / math.sqrt(q.size(-1))
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v).float()


@torch.no_grad()
def transformers_gpt2(**fields):
    """transformers' GPT-2 with random weights. They are large, which shows a wrong GELU, but the
    residual stream is small, which shows a wrong epsilon of a norm."""
    shape = dict(n_positions=32, vocab_size=97, n_layer=2, n_head=3, n_embd=24)
    torch.manual_seed(0)
    config = transformers.GPT2Config(**shape | fields)
    model = enlarge(transformers.GPT2LMHeadModel(config), 3)
    for name, p in model.named_parameters():
        if re.search("wte|wpe|c_proj", name):
            p.mul_(0.02)
    return model


class Malicious:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


# --------------------------------------------------------------------------------------------------
# Small helpers of single chapters (add yours here)


def run_python(folder, *argv, code=0, before=""):
    """Run `python ARGV` in a folder, after some commands of bash. -> all that it prints"""
    command = shlex.join([sys.executable, *map(str, argv)])
    done = subprocess.run(["bash", "-c", f"{before} exec {command}"], cwd=folder, text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=60)
    assert done.returncode == code, done.stdout
    return done.stdout


def write(folder, files):
    """Write files: {path below the folder: text or bytes}."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def contents(folder):
    """The files below a folder: {path: bytes}."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in pathlib.Path(folder).rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------------
# Configuration


@pytest.mark.parametrize("wrong, words", [
    (dict(n_layer=0), "n_layer=0"), (dict(vocab_size=2**40), "vocab_size=1099511627776"),
    (dict(n_embd=50), "n_embd=50.*n_head=6"), (dict(n_head=2.0), "n_head=2.0"),
    (dict(dropout=1.0), "dropout=1.0"), (dict(dropout=math.nan), "dropout=nan"),
    (dict(bias="False"), "bias='False'"),
    (dict(rope_theta=5.0), "rope_theta=5.0.*rope"), (dict(rope=True, rope_theta=0), "rope_theta=0"),
    (dict(rope=True, n_embd=42), "even"), (dict(n_kv_head=2), "n_kv_head=2.*gqa"),
    (dict(gqa=True, n_kv_head=4), "n_head=6.*n_kv_head=4"),
    (dict(window_size=4), "window_size=4.*sliding_window"),
    (dict(sliding_window=True, window_size=0), "window_size=0"),
    (dict(sliding_window=True, window_size=17), "window_size=17.*block_size=16"),
])
def test_an_impossible_configuration_is_refused_with_its_value(wrong, words):
    with pytest.raises(ValueError, match=words):
        small_config(**wrong)


def test_a_flag_alone_chooses_its_size():
    assert GPT2Config(sliding_window=True).window_size == 256
    for heads, groups in {1: 1, 7: 1, 12: 4, 25: 5}.items():
        assert GPT2Config(n_head=heads, n_embd=8 * heads, gqa=True).kv_heads == groups


def test_parameters_are_counted_as_in_gpt2():
    with torch.device("meta"):
        model = GPT2(GPT2Config())
    assert model.num_parameters() == 124_439_808


def test_flops_are_counted_as_by_hand():
    plain = GPT2Config(block_size=8, vocab_size=10, n_layer=3, n_head=4, n_embd=16)
    # A layer: 16·16 for each of q, k, v and out, and 16·64 twice. The logits: 16·10.
    # Keys seen on average: (1 + ... + 8) / 8.
    layer = 4 * 256 + 2 * 1024
    assert plain.flops_per_token() == 2 * (3 * layer + 160) + 3 * 4 * 16 * 4.5
    variant = replace(plain, gqa=True, n_kv_head=2, sliding_window=True, window_size=4)
    # k and v are 16·8 now. Keys seen: 1, 2, 3 and then five times 4.
    layer = 2 * 256 + 2 * 128 + 2 * 1024
    assert variant.flops_per_token() == 2 * (3 * layer + 160) + 3 * 4 * 16 * 26 / 8


# --------------------------------------------------------------------------------------------------
# Attention


def random_qkv(T, kv_heads=6):
    generator = torch.Generator().manual_seed(T)
    return [torch.randn(2, heads, T, 8, generator=generator, requires_grad=True)
            for heads in (6, kv_heads, kv_heads)]


with_and_without_flash = pytest.mark.parametrize("flash", [True, False])


def config_with_window(window, **fields):
    return small_config(sliding_window=window is not None, window_size=window, **fields)


def assert_same_gradients(y, expected, inputs, tolerance):
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    ours = torch.autograd.grad(y, inputs, upstream)
    theirs = torch.autograd.grad(expected, inputs, upstream)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a.float(), b.float(), tolerance * (1 + b.abs().max()))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_the_attention_function_is_torchs_with_both_kinds_of_mask(dropout_p):
    qkv = random_qkv(5)
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    for mask in (None, seen, torch.randn(5, 5)):
        torch.manual_seed(1)
        y = scaled_dot_product_attention(*qkv, mask, dropout_p)
        torch.manual_seed(1)
        assert_close(y, F.scaled_dot_product_attention(*qkv, mask, dropout_p), 1e-5)


@with_and_without_flash
@pytest.mark.parametrize("T, window", [
    (1, None), (7, None), (1, 4), (3, 4), (4, 4), (5, 4), (8, 4), (17, 4), (9, 1), (13, 5),
    (10, 9), (10, 10), (10, 16)])
def test_attention_and_its_gradients_are_the_formula(T, window, flash):
    head = AttentionHead(config_with_window(window, flash=flash))
    for kv_heads in (6, 2, 1):
        qkv = random_qkv(T, kv_heads)
        y = head(*qkv)
        expected = by_formula(*qkv, window)
        assert_close(y, expected, 1e-5)
        assert_same_gradients(y, expected, qkv, 1e-5)


@torch.no_grad()
@with_and_without_flash
@pytest.mark.parametrize("window", [None, 1, 2, 4, 5, 9, 16])
def test_attention_with_a_cache_is_the_formula_wherever_the_text_is_cut(window, flash):
    model = GPT2(config_with_window(window, flash=flash, gqa=True, n_kv_head=2))
    head = model.transformer.h[0].attn.head
    qkv = random_qkv(16, 2)
    expected = by_formula(*qkv, window)
    for a, b in itertools.combinations(range(16), 2):
        lengths = [part for part in (a, b - a, 16 - b) if part]
        pieces = zip(*(x.split(lengths, dim=2) for x in qkv), strict=True)
        cache = model.new_cache()[0]
        y = [head(*piece, cache=cache) for piece in pieces]
        assert_close(torch.cat(y, dim=2), expected, 1e-5)


@torch.no_grad()
@all_combinations
def test_one_head_alone_computes_what_all_heads_compute_together(flags):
    model = GPT2(small_config(n_layer=7, **flags))
    head = AttentionHead(model.config)
    assert not list(head.parameters())
    group = 6 // model.config.kv_heads
    qkv = random_qkv(14, model.config.kv_heads)
    together, *alone = model.new_cache()                         # seven empty caches
    for positions in torch.arange(14).split([9, 1, 4]):          # the start, one token, several
        rotary = None
        if model.config.rope:
            rotary = rotary_tables(positions, 8, 10000.0)
        q, k, v = (x[:, :, positions] for x in qkv)
        y = head(q, k, v, rotary, together)
        for h in range(6):
            one = head(q[:, h], k[:, h // group], v[:, h // group], rotary, alone[h])
            assert_close(one, y[:, h], 1e-5)


@pytest.mark.parametrize("shift", [1020, 30_000_000])            # float32 confuses neighbours there
def test_rotary_attention_depends_on_distances_alone(shift):
    q, k, v = random_qkv(9)
    head = AttentionHead(small_config(rope=True))
    y = head(q, k, v, rotary_tables(torch.arange(9), 8, 10000.0))
    shifted = head(q, k, v, rotary_tables(torch.arange(shift, shift + 9), 8, 10000.0))
    assert_close(shifted, y, 1e-5)
    assert (y - head(q, k, v)).abs().max() > 0.1


def test_rotation_is_computed_in_float32():
    q = random_qkv(9)[0].bfloat16()
    tables = rotary_tables(torch.arange(3000, 3009), 8, 10000.0)
    rotated = rotate(q, *tables)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, rotate(q.float(), *tables).bfloat16())


@torch.no_grad()
@pytest.mark.parametrize("flags", [{}, dict(flash=False), dict(gqa=True)], ids=flag_names)
def test_a_token_is_felt_for_window_size_tokens_in_each_layer(flags):
    """Through n layers a token reaches n·(W - 1) tokens further, and not one more."""
    model = small_model(n_layer=3, sliding_window=True, **flags).double()
    idx = tokens(1, 16)
    other = idx.clone()
    other[0, 2] = 5
    changed = (model(idx)[0] != model(other)[0]).any(dim=-1)[0]
    assert changed.tolist() == [2 <= i <= 2 + 3 * 3 for i in range(16)]


@with_and_without_flash
def test_a_window_makes_no_tensor_that_grows_with_the_square_of_the_text(flash):
    T = 1024
    model = GPT2(GPT2Config(block_size=T, vocab_size=61, n_layer=1, n_head=2, n_embd=16, gqa=True,
                            sliding_window=True, window_size=8, flash=flash))
    with Watch() as watch:
        _, loss = model(tokens(1, T), tokens(1, T))
        loss.backward()
    assert watch.largest() < T * T / 8


# --------------------------------------------------------------------------------------------------
# Model


def test_initial_weights_have_gpt2s_spread():
    torch.manual_seed(5)
    model = GPT2(GPT2Config(block_size=64, vocab_size=256, n_layer=3, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "ln_" in name:
            assert (p == 1).all(), name
        else:
            spread = 0.02 / math.sqrt(6) if "c_proj" in name else 0.02
            assert p.std().item() == pytest.approx(spread, rel=0.03), name
            assert p.mean().abs() < 5e-4, name


def test_parameters_have_transformers_names():
    theirs = dict(transformers_gpt2().named_parameters())
    model = GPT2(small_config())
    assert dict(model.named_parameters()).keys() == theirs.keys()


def test_a_block_is_made_of_the_classes_that_users_know():
    block = GPT2(small_config()).transformer.h[0]
    assert type(block) is TransformerBlock
    assert type(block.attn) is MultiHeadAttention
    assert type(block.attn.head) is AttentionHead
    assert type(block.mlp) is PointwiseFeedForward


def test_loss_is_the_mean_over_the_counted_targets():
    model = small_model()
    idx = tokens(2, 9)
    targets = tokens(2, 9, seed=1)
    targets[0, :4] = -1
    logits, no_loss = model(idx)
    no_logits, loss = model(idx, targets)
    assert no_loss is None and no_logits is None
    expected = F.cross_entropy(logits[targets >= 0], targets[targets >= 0])
    assert_close(loss, expected, 1e-5)
    with torch.no_grad():
        assert_close(model(idx, targets)[1], expected, 1e-5)


@with_and_without_flash
def test_training_drops_embeddings_attention_and_both_outputs_of_each_block(flash):
    model = small_model(dropout=0.5, flash=flash, n_layer=2)
    with Watch() as watch:
        model.train()(tokens(1, 8))
    drawn = [shape for name, shape in watch.calls if name.startswith("bernoulli")]
    stream = (1, 8, 48)
    block = [(1, 6, 8, 8), stream, stream]
    assert drawn == [stream, *block, *block]


def test_gradient_checkpointing_computes_each_block_twice_and_the_same_gradients():
    model = small_model(n_layer=3).train()
    idx = tokens(2, 9)
    _, expected = model(idx, idx)
    model.grad_checkpoint = True
    with Watch() as watch:
        _, loss = model(idx, idx)
        assert_same_gradients(loss, expected, list(model.parameters()), 1e-6)
    assert [name for name, _ in watch.calls].count("gelu.default") == 6


@torch.no_grad()
@all_combinations
def test_a_text_read_in_pieces_gives_the_logits_of_the_whole(flags):
    model = small_model(**flags)
    idx = tokens(2, 16)
    whole, _ = model(idx)
    for lengths in ((16,), (1, 15), (3, 1, 5, 7), (5, 5, 1, 1, 4), (3, 9, 4)):
        cache = model.new_cache()
        logits = [model(piece, cache=cache)[0] for piece in idx.split(lengths, dim=1)]
        assert_close(torch.cat(logits, dim=1), whole, 1e-5)


@torch.no_grad()
def test_a_full_cache_is_refused():
    model = small_model(rope=True)
    cache = model.new_cache()
    model(tokens(1, 16), cache=cache)
    with pytest.raises(ValueError, match="17 tokens do not fit a key/value cache of 16"):
        model(tokens(1, 1), cache=cache)


def test_a_text_longer_than_the_positions_is_refused():
    with pytest.raises(ValueError, match="17 tokens is longer than block_size=16"):
        small_model()(tokens(1, 17))


@pytest.mark.parametrize("kind", [list, np.array, np.uint16], ids=str)
def test_the_ids_of_one_text_may_be_a_list_or_an_array(kind):
    model = small_model()
    idx = tokens(1, 9)
    ids = kind(idx[0].tolist())
    assert torch.equal(model(ids, ids)[1], model(idx, idx)[1])
    assert model.generate(ids, 3, temperature=0).shape == (1, 12)


def test_the_file_stands_alone_with_torch(tmp_path):
    shutil.copy(HERE / "model.py", tmp_path)
    code = ("import runpy, sys\nrunpy.run_path('model.py', run_name='__main__')\n"
            "assert not {'data', 'requests', 'tiktoken'} & sys.modules.keys()")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "greedy continuation" in done.stdout


# --------------------------------------------------------------------------------------------------
# Text from the model


@all_combinations
def test_a_cache_changes_no_token(flags):
    model = small_model(**flags)
    for length, how in ((1, dict(temperature=0)), (6, dict(top_k=20, top_p=0.95)), (19, {})):
        texts = []
        for use_cache in (True, False):
            how["generator"] = torch.Generator().manual_seed(1)
            texts.append(model.generate(tokens(2, length), 16, use_cache=use_cache, **how))
        cached, uncached = texts
        assert torch.equal(cached, uncached)
        assert cached.shape == (2, length + 16) and len(cached.unique()) > 2


def test_rope_and_a_window_write_without_limit():
    model = enlarge(small_model(n_layer=6, **ALL_THREE), 3)      # far tokens are felt, too
    text = model.generate(tokens(9, 30), 4 * 16, temperature=0)
    whole = model(text)[0][:, 29:-1].argmax(dim=-1)              # nothing was forgotten on the way
    assert torch.equal(text[:, 30:], whole)


def test_endless_text_takes_constant_memory():
    model = small_model(rope=True, sliding_window=True)
    with Watch() as watch:
        stream = model.stream(tokens(1, 1), 10**12)              # room for all would be 8 TB
        assert len(list(itertools.islice(stream, 200))) == 200
    assert watch.largest() <= max(p.numel() for p in model.parameters())


@pytest.mark.parametrize("flags", [{}, dict(rope=True), dict(sliding_window=True)], ids=flag_names)
def test_text_past_block_size_continues_from_the_last_half(flags):
    model = small_model(**flags)
    text = model.generate(tokens(1, 19), 12, temperature=0)
    for n in range(19, 31):
        start = 11 if n <= 27 else 20                            # read again at 19 and 28 tokens
        assert text[0, n] == model(text[:, start:n])[0][0, -1].argmax()


@torch.no_grad()
def model_of_logits(logits):
    """A model with these logits for the next token of any text."""
    model = small_model(vocab_size=len(logits))
    model.transformer.ln_f.weight.zero_()
    model.transformer.ln_f.bias.zero_()
    model.transformer.ln_f.bias[0] = 1
    model.transformer.wte.weight[:, 0] = torch.tensor(logits)
    return model


@pytest.mark.parametrize("how, expected", [
    ({}, [0.15, 0.5, 0.05, 0.3]),
    (dict(temperature=0), [0, 1, 0, 0]), (dict(temperature=1e-45), [0, 1, 0, 0]),
    (dict(temperature=2), [0.2071, 0.3781, 0.1196, 0.2929]),     # as the square roots
    (dict(top_k=2), [0, 0.625, 0, 0.375]), (dict(top_k=9), [0.15, 0.5, 0.05, 0.3]),
    (dict(top_p=0.49), [0, 1, 0, 0]), (dict(top_p=0.51), [0, 0.625, 0, 0.375]),
    (dict(top_p=0.81), [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
    (dict(top_k=2, top_p=0.6), [0, 1, 0, 0])], ids=str)
def test_tokens_are_drawn_from_the_distribution_asked_for(how, expected):
    model = model_of_logits([math.log(p) for p in (0.15, 0.5, 0.05, 0.3)])
    idx = torch.zeros(20_000, 1, dtype=torch.long)
    drawn = model.generate(idx, 1, generator=torch.Generator().manual_seed(0), **how)[:, 1]
    shares = drawn.bincount(minlength=4) / 20_000
    assert shares.tolist() == pytest.approx(expected, abs=0.012)


def test_top_k_keeps_k_tokens_even_of_equal_ones():
    model = model_of_logits([0.0] * 5)
    idx = torch.zeros(500, 1, dtype=torch.long)
    assert len(model.generate(idx, 1, top_k=2)[:, 1].unique()) == 2


def test_each_text_stops_by_itself():
    model = small_model()
    idx = tokens(2, 3)
    free = model.generate(idx, 12, generator=torch.Generator().manual_seed(3))
    stop = next(token for token in free[0, 3:9].tolist() if token not in free[1, 3:])
    at = free[0, 3:].tolist().index(stop)
    expected = free.clone()
    expected[0, 3 + at:] = stop
    stopped = model.generate(idx, 12, generator=torch.Generator().manual_seed(3), stop_token=stop)
    assert torch.equal(stopped, expected)


def test_a_stream_ends_when_all_texts_have_stopped():
    model = small_model()
    first = model.generate(tokens(1, 3), 1, temperature=0)[0, 3].item()
    stream = model.stream(tokens(1, 3), 12, temperature=0, stop_token=first)
    assert [token.tolist() for token in stream] == [[first]]


@pytest.mark.parametrize("training", [True, False])
def test_sampling_drops_nothing_and_leaves_the_model_as_it_was(training):
    model = small_model(dropout=0.5).train(training)
    texts = []
    for other in (model, small_model()):
        generator = torch.Generator().manual_seed(0)
        texts.append(other.generate(tokens(1, 3), 20, generator=generator))
    assert torch.equal(*texts)
    stream = model.stream(tokens(1, 3), 5)
    next(stream)
    assert torch.is_grad_enabled()
    stream.close()                                               # broken off
    assert all(module.training is training for module in model.modules())


@pytest.mark.parametrize("wrong", [
    dict(temperature=-1), dict(temperature=math.nan), dict(top_p=0), dict(top_p=1.1),
    dict(max_new_tokens=-1), dict(idx=tokens(1, 0))], ids=str)
def test_sampling_out_of_range_is_refused(wrong):
    arguments = dict(idx=tokens(1, 3), max_new_tokens=2) | wrong
    with pytest.raises(ValueError):
        small_model().generate(**arguments)


# --------------------------------------------------------------------------------------------------
# Fast paths


@torch.no_grad()
@pytest.mark.parametrize("vectors", [1, 2, 32, 33])
@pytest.mark.parametrize("outputs", [1, 29, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_of_few_vectors_is_torchs(vectors, outputs, bias):
    layer = torch.nn.Linear(24, outputs, bias=bias)
    x = torch.randn(vectors, 1, 24)
    assert_close(linear(x, layer.weight, layer.bias), layer(x), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_off_by_rounding_alone(dtype):
    exact, _ = small_model(rope=True, gqa=True)(tokens(2, 16))
    logits, _ = small_model(rope=True, gqa=True).to(dtype)(tokens(2, 16))
    assert logits.dtype == dtype
    assert (logits - exact).std() < 4 * torch.finfo(dtype).eps * exact.std()


@pytest.mark.parametrize("dtype, rows, tolerance", [
    (torch.float32, 450, 1e-4), (torch.bfloat16, 50, 2e-2)])
def test_the_loss_in_chunks_is_torchs_loss_with_its_gradients(dtype, rows, tolerance):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(40_000, 4, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(40_000, (rows,), generator=generator)
    targets[::5] = -1
    logits = x.double() @ weight.double().t()
    expected = F.cross_entropy(logits, targets, ignore_index=-1).float()
    loss = linear_cross_entropy(x, weight, targets)
    assert_close(loss, expected, tolerance)
    assert_same_gradients(1000 * loss, 1000 * expected, [x, weight], tolerance)


def test_the_loss_never_holds_all_logits():
    x = torch.randn(3000, 8, requires_grad=True)
    weight = torch.randn(20_000, 8, requires_grad=True)
    with Watch() as watch:
        linear_cross_entropy(x, weight, tokens(3000)).backward()
    assert watch.largest() < 3000 * 20_000 / 2


@torch.no_grad()
@pytest.mark.parametrize("flags", [{}, slow(ALL_THREE)], ids=flag_names)
def test_the_model_compiles_to_one_graph_for_texts_of_several_lengths(flags):
    torch.compiler.reset()
    model = small_model(n_layer=1, **flags)
    counter = CompileCounter()
    compiled = torch.compile(model.hidden, dynamic=True, fullgraph=True, backend=counter)
    for length in (9, 11, 14):
        idx = tokens(1, length)
        assert_close(compiled(idx), model.hidden(idx), 1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("flags", [ALL_THREE, slow({})], ids=flag_names)
def test_a_compiled_block_has_the_same_gradients(flags):
    torch.compiler.reset()
    block = small_model(**flags).transformer.h[0]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    rotary = rotary_tables(torch.arange(9), 8, 10000.0)
    x = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = block(x, rotary)
    z = compiled(x, rotary)
    assert_close(z, y, 1e-5)
    assert_same_gradients(z, y, [x, *block.parameters()], 1e-5)


# --------------------------------------------------------------------------------------------------
# Checkpoints


def write_folder(folder, tensors, config):
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def saved_model(folder, **flags):
    model = small_model(**flags)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def assert_same_logits(ours, theirs, idx):
    expected = theirs(idx).logits
    assert_close(ours(idx)[0], expected, 1e-4 * expected.std())


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("shape", [
    dict(n_head=12, n_embd=768), dict(n_layer=1, n_head=16, n_embd=1024),
    slow(dict(n_layer=1, n_head=20, n_embd=1280)), slow(dict(n_layer=1, n_head=25, n_embd=1600))],
    ids=str)
def test_logits_are_transformers(tmp_path, shape):
    theirs = transformers_gpt2(**shape)
    theirs.save_pretrained(tmp_path)
    assert_same_logits(GPT2.from_pretrained(tmp_path), theirs, tokens(2, 32))


def test_a_gpt2_of_transformers_is_saved_to_the_same_file(tmp_path):
    transformers_gpt2().save_pretrained(tmp_path / "theirs")
    GPT2.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    assert_same_tensors(load_file(tmp_path / "ours/model.safetensors"),
                        load_file(tmp_path / "theirs/model.safetensors"))


def test_weights_in_several_files_are_read(tmp_path):
    theirs = transformers_gpt2()
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    assert len(list(tmp_path.glob("shards/*.safetensors"))) > 2
    assert_same_tensors(GPT2.from_pretrained(tmp_path / "shards").state_dict(),
                        GPT2.from_pretrained(tmp_path / "whole").state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_files_of_all_ages_are_read(tmp_path, dtype, prefix):
    """OpenAI's own upload has no prefix, and the masks among its weights."""
    theirs = transformers_gpt2().to(dtype)
    tensors = {prefix + name: t for name, t in theirs.transformer.state_dict().items()}
    tensors["lm_head.weight"] = theirs.transformer.wte.weight.clone()
    for i in range(2):
        tensors[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.uint8).tril()
        tensors[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    write_folder(tmp_path, tensors, theirs.config.to_dict())
    ours = GPT2.from_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert_same_logits(ours, theirs.float(), tokens(2, 32))


@pytest.mark.parametrize("name, tensor, words", [
    ("lm_head.weight", torch.ones(97, 24), "lm_head.weight"),
    ("ln_f.bias", torch.zeros(24), "with and without"),
    ("transformer.ln_f.bias", torch.zeros(24, dtype=torch.int32), "ln_f.bias.*I32"),
    ("transformer.h.0.ln_1.weight", torch.ones(23), "h.0.ln_1.weight.*23"),
    ("transformer.h.2.ln_1.weight", torch.ones(24), "h.2.ln_1.weight")])
def test_a_tensor_that_gpt2_has_not_is_refused_by_name(tmp_path, name, tensor, words):
    theirs = transformers_gpt2()
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    write_folder(tmp_path, tensors | {name: tensor}, theirs.config.to_dict())
    with pytest.raises(ValueError, match=words):
        GPT2.from_pretrained(tmp_path)


@all_combinations
def test_a_saved_model_comes_back_exactly(tmp_path, flags):
    model = saved_model(tmp_path, dropout=0.1, **flags)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    again = GPT2.from_pretrained(str(tmp_path))
    assert again.config == model.config and again.changes == [] and not again.training
    assert_same_tensors(again.state_dict(), model.state_dict())
    assert all(p.is_contiguous() for p in again.parameters())


def test_training_leaves_the_file_that_was_opened_alone(tmp_path):
    model = saved_model(tmp_path)
    opened = GPT2.from_pretrained(tmp_path)
    opened(tokens(2, 9), tokens(2, 9))[1].backward()
    torch.optim.SGD(opened.parameters(), lr=1.0).step()
    assert_same_tensors(GPT2.from_pretrained(tmp_path).state_dict(), model.state_dict())


STOCK = [flags for flags in COMBINATIONS if "rope" in flags or "sliding_window" not in flags]
STOCK += [dict(rope=True, bias=False), dict(gqa=True, bias=False), dict(gqa=True, n_kv_head=1),
          dict(rope=True, rope_theta=500.0, gqa=True, n_kv_head=6),
          dict(rope=True, n_head=4, sliding_window=True, window_size=16)]


@pytest.mark.parametrize("flags", STOCK, ids=flag_names)
def test_transformers_computes_what_the_saved_model_computes(tmp_path, flags):
    model = saved_model(tmp_path, **flags)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert theirs.config.model_type == ("starcoder2" if "rope" in flags else "gpt2")
    assert theirs.config.max_position_embeddings == 16 and theirs.config.eos_token_id is None
    assert_same_logits(model, theirs, tokens(5, 40 if "rope" in flags else 16))
    start = tokens(5, 7)
    greedy = theirs.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=9,
                             do_sample=False)
    assert torch.equal(greedy, model.generate(start, 9, temperature=0))


@pytest.mark.parametrize("flags", STOCK, ids=flag_names)
def test_a_model_that_transformers_saved_again_comes_back_exactly(tmp_path, flags):
    model = saved_model(tmp_path, **flags)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path)
    again = GPT2.from_pretrained(tmp_path)
    assert again.config == model.config
    assert_same_tensors(again.state_dict(), model.state_dict())


@dataclass
class InventedConfig(GPT2Config):
    """A config with a change to the model that no version knows."""
    invented: bool = False


def save_invented(folder):
    GPT2(InventedConfig(**vars(small_config()), invented=True)).save_pretrained(folder)


def test_transformers_refuses_a_model_that_it_would_compute_otherwise(tmp_path):
    saved_model(tmp_path / "window", sliding_window=True)
    saved_model(tmp_path / "both", sliding_window=True, gqa=True)
    save_invented(tmp_path / "invented")
    for folder in tmp_path.iterdir():
        for reader in (transformers.AutoConfig, transformers.AutoModelForCausalLM):
            with pytest.raises(ValueError, match="gpt2-variant"):
                reader.from_pretrained(folder)


def test_a_flag_of_a_later_version_is_refused(tmp_path):
    save_invented(tmp_path)
    with pytest.raises(ValueError, match="config.json.*invented"):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.parametrize("flags, name", [
    (dict(gqa=True), "transformer.h.1.attn.c_attn.bias"),
    (dict(bias=False), "transformer.ln_f.bias"),
    (dict(rope=True, bias=False), "model.layers.1.self_attn.k_proj.bias")])
def test_training_by_other_software_is_noticed(tmp_path, flags, name):
    saved_model(tmp_path, **flags)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name][-1] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="gpt2_flags"):
        GPT2.from_pretrained(tmp_path)


def test_without_gpt2_flags_a_model_is_read_as_what_transformers_sees(tmp_path):
    saved_model(tmp_path, gqa=True, bias=False)
    edit_config(tmp_path, gpt2_flags={})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    again = GPT2.from_pretrained(tmp_path)
    assert again.config == small_config()
    assert_same_logits(again, theirs, tokens(2, 16))


@pytest.mark.parametrize("field, value", [
    ("activation_function", "gelu"), ("n_inner", 25), ("layer_norm_epsilon", 1e-6),
    ("model_type", "llama"), ("model_type", ["gpt2"]), ("model_type", "starcoder2"),
    ("tie_word_embeddings", False), ("scale_attn_weights", False), ("add_cross_attention", True),
    ("scale_attn_by_inverse_layer_idx", True), ("n_layer", 3), ("n_layer", 1), ("n_layer", 10**7),
    ("n_embd", 27), ("n_positions", 16), ("vocab_size", 96), ("gpt2_flags", ["rope"])])
def test_a_config_that_does_not_describe_this_gpt2_is_refused(tmp_path, field, value):
    transformers_gpt2().save_pretrained(tmp_path)
    edit_config(tmp_path, **{field: value})
    with pytest.raises(ValueError, match=f"{tmp_path}.*is damaged, or another model"):
        GPT2.from_pretrained(tmp_path)


def test_another_tokenizers_folder_is_refused_and_left_alone(tmp_path):
    first = CharTokenizer("abc")
    small_model().save_pretrained(tmp_path, first)
    small_model().save_pretrained(tmp_path, CharTokenizer("abc"))
    small_model().save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"{tmp_path}.*tokenizer"):
        small_model(rope=True).save_pretrained(tmp_path, CharTokenizer("abd"))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert load_tokenizer(tmp_path).decode([2]) == "c"


# --------------------------------------------------------------------------------------------------
# nanoGPT's ckpt.pt


def nanogpt_checkpoint(bias=True, prefix=""):
    """What nanoGPT saves, and the model of which it is."""
    shape = dict(n_layer=2, n_head=6, n_embd=48, block_size=16, vocab_size=61, bias=bias)
    model = GPT2(GPT2Config(**shape))
    tensors = model.state_dict() | {"lm_head.weight": model.transformer.wte.weight}
    for i in range(2):
        tensors[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    saved = {"model": {prefix + name: tensor for name, tensor in tensors.items()},
             "model_args": shape | {"dropout": 0}, "best_val_loss": torch.tensor(1.5)}
    return saved, model


@pytest.mark.parametrize("bias, prefix", [(True, ""), (False, "_orig_mod.")])
def test_nanogpts_checkpoint_is_read_with_a_note_on_its_gelu(tmp_path, bias, prefix):
    saved, expected = nanogpt_checkpoint(bias, prefix)
    torch.save(saved, tmp_path / "ckpt.pt")
    model = GPT2.from_pretrained(tmp_path / "ckpt.pt")
    assert model.config == expected.config
    assert_same_tensors(model.state_dict(), expected.state_dict())
    assert len(model.changes) == 1 and "gelu" in model.changes[0].lower()


@pytest.mark.parametrize("wrong", [
    dict(model_args={"n_layer": 2}), dict(model_args={"rotary": True}), dict(model={})], ids=str)
def test_a_checkpoint_that_nanogpt_would_not_save_is_refused(tmp_path, wrong):
    saved, _ = nanogpt_checkpoint()
    torch.save(saved | wrong, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="ckpt.pt is damaged"):
        GPT2.from_pretrained(tmp_path / "ckpt.pt")


def test_a_damaged_checkpoint_of_nanogpt_is_refused(tmp_path):
    path = tmp_path / "ckpt.pt"
    torch.save(nanogpt_checkpoint()[0], path)
    for raw in (b"", b"PK", pickle.dumps(5, 2), path.read_bytes()[:-99]):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match="ckpt.pt is damaged"):
            GPT2.from_pretrained(path)


def test_code_in_a_pickle_never_runs(tmp_path):
    for name in ("ckpt.pt", "model.safetensors"):
        torch.save(Malicious(str(tmp_path / "ran")), tmp_path / name)
    saved_model(tmp_path / "model")
    shutil.copy(tmp_path / "model/config.json", tmp_path)
    with pytest.raises(ValueError, match="ckpt.pt is damaged"):
        GPT2.from_pretrained(tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="it is a pickle, which could run code"):
        GPT2.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_folder_of_nanogpt_gets_advice(tmp_path):
    (tmp_path / "ckpt.pt").touch()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/ckpt.pt"):
        GPT2.from_pretrained(tmp_path)


# --------------------------------------------------------------------------------------------------
# OpenAI's weights take the flags


@torch.no_grad()
@pytest.mark.parametrize("overrides", [
    dict(gqa=True, n_kv_head=6), dict(sliding_window=True, window_size=16)], ids=str)
def test_flags_that_change_nothing_keep_every_bit(tmp_path, overrides):
    plain = saved_model(tmp_path)
    model = GPT2.from_pretrained(tmp_path, **overrides)
    assert torch.equal(model(tokens(2, 16))[0], plain(tokens(2, 16))[0])
    assert model.changes == []


@torch.no_grad()
def test_gqa_takes_the_mean_of_neighbouring_heads(tmp_path):
    plain = saved_model(tmp_path)
    model = GPT2.from_pretrained(tmp_path, gqa=True, n_kv_head=2)
    for name in ("transformer.h.1.attn.c_attn.weight", "transformer.h.1.attn.c_attn.bias"):
        q, kv = plain.get_parameter(name).split([48, 96])
        means = kv.unflatten(0, (4, 3, 8)).mean(dim=1)           # two groups of keys, two of values
        expected = torch.cat((q, means.flatten(0, 1)))
        assert_close(model.get_parameter(name), expected, 1e-6)


def test_gqa_gives_equal_heads_back_exactly(tmp_path):
    grouped = saved_model(tmp_path, gqa=True, n_kv_head=2)       # as a GPT-2, with repeated heads
    edit_config(tmp_path, gpt2_flags={})
    model = GPT2.from_pretrained(tmp_path, gqa=True, n_kv_head=2)
    assert_same_tensors(model.state_dict(), grouped.state_dict())


def test_rope_drops_the_learned_positions(tmp_path):
    saved_model(tmp_path)
    model = GPT2.from_pretrained(tmp_path, rope=True, rope_theta=500.0, block_size=64)
    assert "wpe" not in model.transformer
    assert model.generate(tokens(1, 8), 40).shape == (1, 48)


@torch.no_grad()
def test_a_shorter_block_size_keeps_the_first_positions(tmp_path):
    plain = saved_model(tmp_path)
    model = GPT2.from_pretrained(tmp_path, block_size=8)
    assert_close(model(tokens(2, 8))[0], plain(tokens(2, 8))[0], 1e-5)


@torch.no_grad()
def test_a_window_is_put_on_and_taken_off_the_same_weights(tmp_path):
    plain = saved_model(tmp_path)
    idx = tokens(2, 16)
    windowed = GPT2.from_pretrained(tmp_path, sliding_window=True, window_size=4)
    assert torch.equal(windowed(idx)[0], small_model(sliding_window=True)(idx)[0])
    windowed.save_pretrained(tmp_path)
    without_window = GPT2.from_pretrained(tmp_path, sliding_window=False)
    assert torch.equal(without_window(idx)[0], plain(idx)[0])


WINDOW = dict(sliding_window=True)


@pytest.mark.parametrize("saved, overrides, changes", [
    ({}, dict(dropout=0.25, flash=False), []),
    ({}, dict(block_size=8), ["block_size.* 8 of 16"]),
    ({}, dict(rope=True), ["rope.*wpe.*fine-tune"]),
    ({}, dict(gqa=True, n_kv_head=2), ["gqa: 6 .* 2.*fine-tune"]),
    ({}, WINDOW, ["sliding_window.* 4;.*fine-tune"]),
    (WINDOW, dict(sliding_window=False), ["sliding_window.* 4, now 16;.*fine-tune"]),
    (WINDOW, dict(window_size=9), ["sliding_window.* 4, now 9;.*fine-tune"]),
    (dict(rope=True), dict(block_size=64), ["block_size.* 64 .* 16"]),
    (dict(rope=True), dict(block_size=64, **WINDOW), ["block_size.* 64 .* 16", "sliding_window"]),
    (WINDOW, dict(block_size=3), ["block_size.* 3 of 16"])], ids=str)
def test_each_change_is_told_in_a_line(tmp_path, saved, overrides, changes):
    saved_model(tmp_path, **saved)
    model = GPT2.from_pretrained(tmp_path, **overrides)
    assert {name: getattr(model.config, name) for name in overrides} == overrides
    assert len(model.changes) == len(changes)
    for line, pattern in zip(model.changes, changes, strict=True):
        assert re.match(pattern, line), line


@pytest.mark.parametrize("saved, overrides, words", [
    ({}, dict(n_layer=3), "n_layer=3.*n_layer=2"), ({}, dict(vocab_size=7), "vocab_size=7"),
    ({}, dict(n_head=3), "n_head=3"), ({}, dict(bias=False), "bias=False"),
    ({}, dict(block_size=17), "17.*16"), ({}, dict(n_kv_head=2), "gqa"),
    ({}, dict(window_size=2), "sliding_window"),
    (dict(gqa=True), dict(n_kv_head=3), "n_kv_head=3"), (dict(gqa=True), dict(gqa=False), "gqa"),
    (dict(rope=True), dict(rope=False), "rope"),
    (dict(rope=True), dict(rope_theta=5.0), "rope_theta=5.0")])
def test_what_the_weights_cannot_follow_is_refused(tmp_path, saved, overrides, words):
    saved_model(tmp_path, **saved)
    with pytest.raises(ValueError, match=words):
        GPT2.from_pretrained(tmp_path, **overrides)


# --------------------------------------------------------------------------------------------------
# Damaged files


def split_weights(folder):
    """-> the header of the file with the weights, as a dict, and the numbers after it, as bytes."""
    raw = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def join_weights(folder, text, numbers):
    raw = len(text).to_bytes(8, "little") + text + numbers
    (folder / "model.safetensors").write_bytes(raw)
    return raw


def assert_weights_are_refused(folder):
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        GPT2.from_pretrained(folder)


@pytest.mark.parametrize("wrong", [
    dict(dtype=[]), dict(dtype="F16"), dict(shape=[2**62, 2**62]), dict(shape=[2**40]),
    dict(shape=[-48]), dict(shape=[48.0]), dict(shape=None), dict(data_offsets=[False, True]),
    dict(data_offsets=[0]), dict(data_offsets=[0, 192]), dict(data_offsets=[192, 0]),
    dict(data_offsets=[2**70, 2**71])], ids=str)
def test_a_wrong_entry_in_a_files_header_is_refused(tmp_path, wrong):
    saved_model(tmp_path)
    header, numbers = split_weights(tmp_path)
    header["transformer.h.0.ln_1.bias"] |= wrong
    join_weights(tmp_path, json.dumps(header).encode(), numbers)
    assert_weights_are_refused(tmp_path)


@pytest.mark.parametrize("text", [
    b"", b"{no JSON}", b"[1, 2]", b'{"x": 7}', b'{"\xff": 7}', b'{"__metadata__": 7}',
    b'{"a":' + 10**5 * b"[" + 10**5 * b"]" + b"}"], ids=range(7))
def test_a_damaged_header_is_refused(tmp_path, text):
    saved_model(tmp_path)
    join_weights(tmp_path, text, split_weights(tmp_path)[1])
    assert_weights_are_refused(tmp_path)


def test_a_file_that_is_cut_or_longer_is_refused(tmp_path):
    saved_model(tmp_path)
    path = tmp_path / "model.safetensors"
    raw = path.read_bytes()
    claim = (2**63).to_bytes(8, "little")
    for damaged in (b"", raw[:7], raw[:99], raw[:-1], raw + b"1234", claim + raw[8:]):
        path.write_bytes(damaged)
        assert_weights_are_refused(tmp_path)


@pytest.mark.parametrize("index", [
    "{", "[]", "{}", '{"weight_map": {"a": "../model.safetensors"}}', '{"weight_map": {"a": 5}}',
    '{"weight_map": {}}'])
def test_an_index_that_is_damaged_or_leads_elsewhere_is_refused(tmp_path, index):
    transformers_gpt2().save_pretrained(tmp_path)
    folder = tmp_path / "shards"
    transformers_gpt2().save_pretrained(folder, max_shard_size="5KB")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises((ValueError, OSError), match=str(folder)):
        GPT2.from_pretrained(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    transformers_gpt2().save_pretrained(tmp_path, max_shard_size="5KB")
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    name, value = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: value + 1}, second)
    with pytest.raises(ValueError, match=name):
        GPT2.from_pretrained(tmp_path)


NUMBERS = [0, -1, 2**24, 2**31, 2**62, 2**63, 2**64, 10**300, 1e308, "F32", "BF16", "gpt2-variant"]
SCALARS = (st.none() | st.booleans() | st.integers(-5, 70) | st.floats() | st.text(max_size=5)
           | st.sampled_from(NUMBERS))
VALUES = SCALARS | st.lists(SCALARS, max_size=4) | st.dictionaries(st.text(max_size=5), SCALARS)


@pytest.mark.parametrize("examples", [80, slow(5_000)])
def test_any_damage_is_a_value_error(tmp_path, examples):
    config = GPT2Config(4, 5, 1, 2, 4, rope=True, sliding_window=True)
    GPT2(config).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    header, numbers = split_weights(tmp_path)
    entry = st.fixed_dictionaries({}, optional=dict(dtype=VALUES, shape=VALUES,
                                                    data_offsets=VALUES))
    read = []

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from(sorted(config)), VALUES, max_size=1),
           st.dictionaries(st.sampled_from(sorted(config["gpt2_flags"])), VALUES, max_size=1),
           st.sampled_from(sorted(header)), entry, st.integers(0, 3000), st.binary(max_size=9))
    def check(changes, flags, name, entry, at, new):
        flags = config["gpt2_flags"] | flags
        edit_config(tmp_path, **config | {"gpt2_flags": flags} | changes)
        text = json.dumps(header | {name: header[name] | entry}).encode()
        raw = join_weights(tmp_path, text, numbers)
        (tmp_path / "model.safetensors").write_bytes(raw[:at] + new + raw[at + len(new):])
        with contextlib.suppress(ValueError):
            GPT2.from_pretrained(tmp_path)
            read.append(name)
    check()
    assert 0 < len(read) < examples


# --------------------------------------------------------------------------------------------------
# Flags


@dataclass
class Example:
    """The flags of a script."""
    size: int = 12              # number of blocks, all
                                # 100 % of them
    rate: float | None = None   # learning rate
    fast: bool = True           # work quickly
    name: str = field(default="x", metadata={"bare": "y"})   # name of the run


def typed(*argv):
    return vars(flag_parser("What it does.", Example).parse_args(argv))


def test_a_flag_is_a_field_and_its_help_is_the_comment_beside_it():
    words = " ".join(flag_parser("What it does.", Example).format_help().split())
    assert "What it does." in words
    assert "--size int number of blocks, all 100 % of them [12] --rate" in words
    assert "--rate float learning rate --fast" in words


def test_a_flag_whose_default_a_checkpoint_decides_shows_none():
    parser = flag_parser("What it does.")
    add_flags(parser, Example, only={"size"})
    words = parser.format_help()
    assert "--size" in words and "[12]" not in words and "--rate" not in words


def test_only_the_flags_that_were_typed_are_returned():
    assert typed() == {}
    assert typed("--size=3", "--rate=1e-3", "--name") == {"size": 3, "rate": 1e-3, "name": "y"}
    assert typed("--fast") == typed("--fast=True") == {"fast": True}
    assert typed("--no-fast") == typed("--fast=False") == {"fast": False}


@pytest.mark.parametrize("argument", (
    "--size=two --size=-1 --rate=nan --rate=inf --rate=-1 --fast=maybe --name= --siz=3 "
    "config/train_gpt2.py").split())
def test_a_wrong_flag_is_refused_by_its_name(capsys, argument):
    with pytest.raises(SystemExit, match="2"):
        typed(argument)
    usage, error = capsys.readouterr().err.splitlines()
    assert "error: " in error and argument.split("=")[0] in error


def test_an_expected_error_ends_the_script_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["somewhere/train.py"])
    with pytest.raises(SystemExit, match="^train.py: no room$"), one_line(OSError):
        raise OSError("no room")
    with pytest.raises(ValueError, match="a bug"), one_line(OSError):
        raise ValueError("a bug")


@pytest.mark.parametrize("command", ["data/prepare.py stdlib", "train.py --dataset=stdlib"])
def test_a_bug_in_a_data_set_shows_its_traceback(tmp_path, command):
    for name in ("data", "model.py", "train.py"):
        subprocess.run(["cp", "-r", HERE / name, tmp_path], check=True)
    bug = "def stdlib(*_):\n    a, b = (1, 2, 3)\n\n\ndef unused("
    source = (HERE / "data/prepare.py").read_text()
    write(tmp_path, {"data/prepare.py": source.replace("def stdlib(", bug)})
    printed = run_python(tmp_path, *command.split(), code=1)
    assert "Traceback" in printed and "a, b = (1, 2, 3)" in printed


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stderr, seconds, items", [
    (Terminal, 0.3, 4), (io.StringIO, 1, 31), (io.StringIO, 0.01, 101)])
def test_long_work_shows_its_progress(monkeypatch, stderr, seconds, items):
    """Once a second in a terminal, and every 30 seconds in a log file: after so many items."""
    clock = SimpleNamespace(now=0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(sys, "stderr", stderr())
    for i in progress(range(1, 101), 100, "evaluation"):
        clock.now = i * seconds
    shown = sys.stderr.getvalue()
    found = re.findall(r"evaluation +(\d+) ?% +(\d+) s left", shown)
    expected = [(str(i), f"{(100 - i) * seconds:.0f}") for i in range(items, 101, items)]
    assert i == 100 and found == expected
    assert shown.count("\n") == len(found) * (stderr is io.StringIO)


# --------------------------------------------------------------------------------------------------
# The hub

PAGE = b"<html>Please log in</html>"
MODEL = {"config.json": b'{"model_type": "gpt2"}',
         "model.safetensors": safetensors.save({"x": torch.zeros(40, 80)})}
COMMIT = 40 * "a"
TABLE = CharTokenizer("abc", 3)


class HubHandler(http.server.BaseHTTPRequestHandler):
    """The Hugging Face hub at 127.0.0.1, and at localhost another host with its large files."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        server.asked.append(self)
        server.before()
        name = name_asked(self)
        body = server.files.get(name, PAGE)
        status = next(server.failures, 200 if name in server.files else 404)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{name}"'}
        if status == 429:
            headers["Retry-After"] = "7"
        if status is None:                                       # the connection is lost
            return
        if status == 200 and "/resolve/" in self.path:
            status = 302
            headers["Location"] = f"/api/resolve-cache/{name}"
            if name.endswith((".safetensors", ".bin")):
                headers["Location"] = f"http://localhost:{server.server_port}/{name}?key=x"
                headers["X-Linked-Etag"] = f'"{hashlib.sha256(body).hexdigest()}"'
                headers["X-Linked-Size"] = str(len(body))
            body = b""
        headers |= server.headers
        if server.portal is not None:
            status, headers, body = 200, {}, server.portal
        self.send_response(status)
        for header in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(*header)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET


@pytest.fixture
def server(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.url = f"{server.address}/some/one/resolve/main"
    server.files = dict(MODEL)
    server.asked = []                 # the requests
    server.before = int               # is called before each answer
    server.failures = iter(())        # statuses of the next answers, None for a lost connection
    server.headers = {}               # in place of the hub's
    server.portal = None              # what a login page answers to everything
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    server.slept = []
    monkeypatch.setattr(time, "sleep", server.slept.append)      # between two attempts
    yield server
    server.shutdown()
    server.server_close()


def name_asked(request):
    return re.sub(r".*/|\?.*", "", request.path)


def newly_asked(server):
    """The files that were asked for since the last call."""
    names = set(map(name_asked, server.asked))
    server.asked.clear()
    return names


@pytest.mark.parametrize("name, repo", [
    ("gpt2", "openai-community/gpt2"), ("distilgpt2", "distilbert/distilgpt2"),
    ("some.one/my_model-2", "some.one/my_model-2")])
def test_a_model_is_downloaded_once_and_then_used_offline(server, monkeypatch, name, repo):
    server.files["vocab.json"] = b"{}"
    folder = local_path(name)
    assert server.asked[0].path.startswith(f"/{repo}/resolve/main/")
    assert contents(folder).items() >= MODEL.items()
    server.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert local_path(name) == folder and not server.asked


def test_what_transformers_downloaded_is_used_in_place(server, tmp_path):
    server.files["vocab.json"] = b"{}"
    for server.headers["X-Repo-Commit"] in (40 * "b", COMMIT):
        for name in server.files:
            path = huggingface_hub.hf_hub_download(
                "some/one", name, cache_dir=f"{tmp_path}/home/hub", endpoint=server.address)
    server.asked.clear()
    assert local_path("some/one") == os.path.dirname(path)
    assert COMMIT in path and not server.asked


def test_a_folder_or_file_needs_no_hub(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"some/one/x": b"", "gpt2": b""})
    assert [local_path("some/one"), local_path("gpt2")] == ["some/one", "gpt2"]
    assert not server.asked


@pytest.mark.parametrize("name", ["gpt3", "no/such/folder", "../gpt2", "a/..", "/nowhere", ""])
def test_another_name_is_not_found(server, name):
    with pytest.raises(FileNotFoundError, match=f"'{name}' was not found.*gpt2.*owner/name"):
        local_path(name)
    assert not server.asked


def test_the_files_of_a_sharded_model_are_those_of_its_index(server):
    names = {"model-1-of-2.safetensors", "model-2-of-2.safetensors"}
    server.files |= dict.fromkeys(names, server.files.pop("model.safetensors"))
    index = {"weight_map": dict(enumerate([*names, *names]))}
    server.files["model.safetensors.index.json"] = json.dumps(index).encode()
    folder = local_path("gpt2")
    assert names < newly_asked(server)
    os.remove(f"{folder}/{max(names)}")                          # as an interruption leaves it
    local_path("gpt2")
    assert newly_asked(server) == {max(names)} and names < contents(folder).keys()


def test_an_index_leads_to_no_other_folder(server, tmp_path):
    index = json.dumps({"weight_map": {"x": "../../evil.safetensors"}}).encode()
    server.files = {"config.json": b"{}", "model.safetensors.index.json": index,
                    "evil.safetensors": MODEL["model.safetensors"]}
    folder = local_path("gpt2")
    assert contents(folder) == server.files and len(contents(tmp_path)) == 3


@pytest.mark.parametrize("index", [b"{}", b"[]", b'{"weight_map": {"x": 5}}'])
def test_a_damaged_index_is_refused(server, index):
    server.files = {"config.json": b"{}", "model.safetensors.index.json": index}
    with pytest.raises(OSError, match="model.safetensors.index.json is damaged"):
        local_path("gpt2")


def test_a_model_comes_with_its_tokenizer(server, monkeypatch):
    """Offline, a missing tokenizer is an error. It is never replaced by GPT-2's."""
    local_path("gpt2")
    local_path("some/one")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    local_path("gpt2")
    with pytest.raises(OSError, match="HF_HUB_OFFLINE.*copy meta.json"):
        local_path("some/one")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    server.files |= TABLE.files()
    assert load_tokenizer(local_path("some/one")).to_json() == TABLE.to_json()
    server.files = {**MODEL, "vocab.json": b'{"a": 0}'}
    with pytest.raises(ValueError, match="vocab.json is another tokenizer than GPT-2's"):
        load_tokenizer(local_path("another/one"))


@pytest.mark.parametrize("ref", ["", "main", "../../../../evil", 41 * "a", "\xff"])
def test_nothing_chooses_another_place_for_a_file(server, tmp_path, ref):
    server.headers = {"X-Repo-Commit": "../../../../evil",
                      "Content-Disposition": "attachment; filename=/tmp/evil"}
    cache = tmp_path / "home/hub/models--openai-community--gpt2"
    write(cache, {"refs/main": ref.encode("latin-1"), "snapshots/x": b""})
    write(tmp_path / "evil", MODEL)
    assert local_path("gpt2") == f"{cache}/snapshots/main"
    assert contents(cache / "snapshots/main") == MODEL and len(contents(tmp_path)) == 6


@pytest.mark.parametrize("failures", [[503], [429, 429], [None, 502, 500]])
def test_a_failure_that_passes_is_tried_again(server, tmp_path, failures):
    server.failures = iter(failures)
    download(f"{server.url}/config.json", tmp_path / "x")
    assert contents(tmp_path) == {"x": MODEL["config.json"]}
    assert (7 in server.slept) == (429 in failures)


ANSWERS = [("failures", itertools.repeat(status), words) for status, words in [
    (404, "no such file"), (401, "set HF_TOKEN"), (403, "check HF_TOKEN"),
    (503, "try again later"), (None, "HTTPS_PROXY")]]
ANSWERS += [("headers", headers, "") for headers in [
    {"Location": "/../../evil"}, {"Location": "//evil/.."}, {"Location": "file:///etc/passwd"},
    {"Content-Length": "99999"}]]
ANSWERS += [("portal", page, "") for page in (
    PAGE, b"", b"\x09\0\0\0\0\0\0\0" + PAGE, MODEL["model.safetensors"][:-9])]


@pytest.mark.parametrize("name", MODEL)
@pytest.mark.parametrize("field, answer, words", ANSWERS, ids=str)
def test_nothing_but_the_file_is_kept(server, tmp_path, monkeypatch, name, field, answer, words):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    setattr(server, field, answer)
    with pytest.raises((ConnectionError, FileNotFoundError), match=f"{name}.*{words}") as error:
        hub_download("some/one", name, str(tmp_path / name))
    assert "secret" not in str(error.value) and not contents(tmp_path)


@pytest.mark.parametrize("name", [*MODEL, "vocab.json"])
def test_a_login_page_in_the_cache_is_replaced(server, name):
    server.files["vocab.json"] = b"{}"
    folder = pathlib.Path(local_path("some/one"))
    write(folder, {name: PAGE})
    local_path("some/one")
    assert contents(folder) == server.files


def test_the_token_stays_with_the_hub(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    local_path("gpt2")
    sent = {r.headers["Host"].split(":")[0]: r.headers["Authorization"] for r in server.asked}
    assert sent == {"127.0.0.1": "Bearer hf_secret", "localhost": None}
    with pytest.raises(ConnectionError) as error:
        download(f"{server.url}/config.json", tmp_path / "x", token="hf_se\ncret")
    assert "hf_se" not in str(error.value)


def test_a_hash_is_checked_where_it_is_known(server, tmp_path):
    server.headers = {"X-Linked-Etag": 64 * "0"}
    with pytest.raises(ConnectionError, match="model.safetensors"):
        download(f"{server.url}/model.safetensors", tmp_path / "x")
    server.portal = PAGE                                         # a server that announces nothing
    with pytest.raises(ConnectionError, match="/x"):
        download(f"{server.url}/x", tmp_path / "x", sha256=64 * "0")
    assert not contents(tmp_path)
    download(f"{server.url}/x", tmp_path / "x", sha256=hashlib.sha256(PAGE).hexdigest())
    assert contents(tmp_path) == {"x": PAGE}


DOWNLOAD = "import sys; from data.hub import download; download(*sys.argv[1:])"


def test_two_processes_may_download_the_same_file(server, tmp_path):
    server.before = threading.Barrier(2, timeout=30).wait
    command = [sys.executable, "-c", DOWNLOAD, f"{server.url}/config.json", tmp_path / "x"]
    processes = [subprocess.Popen(command, cwd=HERE) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert contents(tmp_path) == {"x": MODEL["config.json"]}


def test_a_full_disk_keeps_no_part_of_a_download(server, tmp_path):
    printed = run_python(HERE, "-c", DOWNLOAD, f"{server.url}/model.safetensors", tmp_path / "x",
                         code=1, before="ulimit -f 8;")
    assert "File too large" in printed and not contents(tmp_path)


# --------------------------------------------------------------------------------------------------
# Tokenizers

STRANGE = "naïve 日本語 🎉🏳️‍🌈 Ελλάδα!\u3000\u00a0\n"


def test_a_character_is_its_place_in_the_table():
    table = CharTokenizer("\n abé日", 6)
    assert table.encode("b é日\n").tolist() == [3, 1, 4, 5, 0]
    assert table.decode([3, 1, 6, 5, 7]) == "b <|endoftext|>日"   # id 7: a rounded vocabulary
    assert table.encode_prompt("a<|endoftext|>b").tolist() == [2, 6, 3]
    for unknown in ("abz", "ab\U0010ffff", "a\ud83d"):
        with pytest.raises(ValueError, match="is not among the 6"):
            table.encode(unknown)


@needs_bpe
@needs_shakespeare
@pytest.mark.parametrize("kind", ["gpt2", "char", "char without the token"])
def test_transformers_makes_the_same_tokenizer_from_its_files(tmp_path, kind):
    text = SHAKESPEARE.read_text()[:100_000].replace("\n\n", "\r\n<|endoftext|>\t\t")
    text += STRANGE + "\tx\t\ty \r\n\n  z\x00 'll <|END|>'s\n"
    table = GPT2Tokenizer()
    if kind != "gpt2":
        characters = "".join(sorted(set(text)))
        table = CharTokenizer(characters, len(characters) if kind == "char" else None)
    write(tmp_path, {**MODEL, **table.files()})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = table.encode_prompt(text).tolist()
    assert theirs(text).input_ids == ids and theirs.decode(ids) == table.decode(ids) == text
    assert len(theirs) == table.vocab_size and theirs.eos_token_id == table.end_of_text
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


OTHER_TOKENIZERS = r"""
vocab.json    |of 2 tokens      |{"a": 0, "b": 1}
tokenizer.json|another tokenizer|{"model": {"vocab": {"a": 0}}}
vocab.json    |damaged          |["a"]
tokenizer.json|damaged          |{
tokenizer.json|damaged          |{"model": {"vocab": [["a", 0.5]]}}
meta.pkl      |prepare.py       |
meta.json     |damaged          |{}
meta.json     |damaged          |[]
meta.json     |damaged          |{"tokenizer
meta.json     |damaged          |{"tokenizer": "bpe"}
meta.json     |damaged          |{"tokenizer": "char"}
meta.json     |damaged          |{"tokenizer": "char", "characters": "", "end_of_text": 0}
meta.json     |damaged          |{"tokenizer": "char", "characters": "aba", "end_of_text": 3}
meta.json     |damaged          |{"tokenizer": "char", "characters": "ab", "end_of_text": 5}
""".strip().splitlines()


@pytest.mark.parametrize("row", OTHER_TOKENIZERS)
def test_another_or_a_damaged_tokenizer_is_refused(tmp_path, row):
    name, words, content = map(str.strip, row.split("|"))
    write(tmp_path, {name: content})
    with pytest.raises(ValueError, match=f"{name}.*{words}"):
        load_tokenizer(tmp_path)



@needs_bpe
def test_byte_lengths_are_those_of_the_text():
    characters = "".join(set(STRANGE))
    for table in (GPT2Tokenizer(), CharTokenizer(characters, len(characters))):
        lengths = table.byte_lengths()
        assert lengths[table.encode(STRANGE)].sum() == len(STRANGE.encode())
        assert len(lengths) == table.vocab_size and lengths[table.end_of_text] == 0


def test_files_of_gpt2s_tokenizer_are_left_out_where_they_are_not_at_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert GPT2Tokenizer().files().keys() == {"meta.json", "tokenizer_config.json"}


# --------------------------------------------------------------------------------------------------
# Preparing data

EACH_TOKENIZER = pytest.mark.parametrize("kind", ["char", pytest.param("gpt2", marks=needs_bpe)])


def prepared(tiny, *argv, **how):
    """Prepare files, as the data set `set` of a folder of the test. -> all that is printed"""
    how = dict(name="set", tokenizer="char", before=partial(begin, tiny.folder)) | how
    done = tiny.run("data/prepare", *argv, **how)
    return done.stdout + done.stderr


def begin(folder, bytes_of_a_file=None, more_memory=None):
    """The process has a folder of its own for data sets, and limits."""
    sys.modules["data"].DATA = f"{folder}/data"
    if bytes_of_a_file:
        limit_files(bytes_of_a_file)
    if more_memory:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + more_memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def assert_holds(folder, train, val):
    """A data set holds these documents."""
    table = load_tokenizer(folder)
    tokens = {}
    for split, documents in (("train", train), ("val", val)):
        ids = table.encode_prompt("<|endoftext|>".join(documents)).tolist()
        assert read_bin(folder, split).tolist() == ids
        tokens[split] = len(ids)
    assert json.loads((folder / "meta.json").read_bytes())["tokens"] == tokens


def every_tenth(documents):
    """-> those to train on, and those for validation"""
    return [d for i, d in enumerate(documents) if i % 10 != 9], documents[9::10]


@needs_shakespeare
@pytest.mark.parametrize("name", ["shakespeare_char", pytest.param("shakespeare", marks=needs_bpe)])
def test_shakespeare_has_nanogpts_tokens(tmp_path, name):
    prepare.DATASETS[name](f"{tmp_path}/set", source=str(SHAKESPEARE))
    text = SHAKESPEARE.read_text()
    end = int(len(text) * 0.9)
    encode = partial(map, "".join(sorted(set(text))).index)
    if name == "shakespeare":
        encode = tiktoken.get_encoding("gpt2").encode_ordinary
    assert read_bin(tmp_path / "set", "train").tolist() == list(encode(text[:end]))
    assert read_bin(tmp_path / "set", "val").tolist() == list(encode(text[end:]))


def test_stdlib_is_the_ascii_source_of_the_library(tmp_path):
    names = [f"m{i:02}.py" for i in range(30)]
    others = ["test/x.py", "site-packages/x.py", "notes.txt", "é.py"]
    write(tmp_path / "lib", {name: f"# {name}\n" for name in [*names, *others]})
    prepare.DATASETS["stdlib"](f"{tmp_path}/set", source=f"{tmp_path}/lib")
    assert_holds(tmp_path / "set", *every_tenth([f"# {name}\n" for name in names]))


@EACH_TOKENIZER
def test_every_tenth_document_is_for_validation(tiny, kind):
    """A document is a file, or a line of a .jsonl file. Hidden files and devices are left out."""
    lines = [*(f"a line {i}" for i in range(30)), "", "half \ud83d of a pair"]
    write(tiny.folder / "in/deep", {
        "a.jsonl": "\n".join(json.dumps({"body": line}) for line in lines), ".hidden": "hidden",
        "b.txt": STRANGE.encode("utf-8-sig"), "c.txt": STRANGE, "d.txt": ""})
    os.mkfifo(tiny.folder / "in/pipe")
    prepared(tiny, "in", field="body", tokenizer=kind)
    documents = [*lines[:-1], "half \ufffd of a pair", STRANGE, STRANGE]
    assert_holds(tiny.folder / "data/set", *every_tenth(documents))
    assert load_tokenizer(tiny.folder / "data/set").name == kind


def test_with_few_documents_the_last_part_of_the_text_is_for_validation(tiny):
    a = "a" * 450
    b = "b" * 549
    write(tiny.folder, {"a.txt": a, "b.txt": b})
    made = tiny.folder / "data/set"
    prepared(tiny, "a.txt", "b.txt")
    assert_holds(made, [a, b[:449]], [b[449:]])
    prepared(tiny, "b.txt", val_frac=0.5)
    assert_holds(made, [b[:275]], [b[275:]])
    prepared(tiny, "a.txt", "b.txt", val_frac=1)
    assert_holds(made, [], [a, b])


@needs_bpe
def test_the_prompt_of_a_pair_is_masked(tiny):
    pairs = [[f"question {i}? ", f"answer {i}\n" * (i % 3)] for i in range(40)]
    write(tiny.folder, {"x.jsonl": "\n".join(json.dumps({"q": q, "a": a}) for q, a in pairs)})
    prepared(tiny, "x.jsonl", pairs="q,a", tokenizer="gpt2")
    made = tiny.folder / "data/set"
    encode = GPT2Tokenizer().encode_prompt
    for split, part in zip(("train", "val"), every_tenth(pairs), strict=True):
        marked = [(i, counts) for q, a in part
                  for text, counts in (("<|endoftext|>", 1), (q, 0), (a, 1)) for i in encode(text)]
        ids, mask = map(list, zip(*marked[1:], strict=True))
        assert read_bin(made, split).tolist() == ids
        assert list((made / f"{split}.mask").read_bytes()) == mask


def test_files_that_are_no_text_are_left_out_and_listed(tiny):
    bad = {"in/latin.txt": b"w" * 999_999 + b"\xe9", "in/x.png": b"PN\0"}
    write(tiny.folder, {**bad, "in/good.txt": "abba", "in/z.txt": "dada"})
    printed = prepared(tiny, "in", val_frac=1)
    assert "2 files" in printed and all(name in printed for name in bad)
    assert_holds(tiny.folder / "data/set", [], ["abba", "dada"])


@needs_bpe
def test_a_large_text_has_the_tokens_that_it_has_in_one_piece(tiny):
    words = "a|'s|st|1.|é|日|🎉| |  |\n|\r\n|\t|\u00a0|\u2028".split("|")
    text = "".join(random.Random(0).choices(words, k=600_000))
    write(tiny.folder, {"in.txt": text})
    prepared(tiny, "in.txt", val_frac=1, tokenizer="gpt2")
    expected = tiktoken.get_encoding("gpt2").encode_ordinary(text)
    assert read_bin(tiny.folder / "data/set", "val").tolist() == expected


@needs_linux
def test_a_text_may_be_larger_than_memory(tiny):
    write(tiny.folder, {"in.txt": "some words\r\n" * 3_000_000})
    prepared(tiny, "in.txt", before=partial(begin, tiny.folder, more_memory=25_000_000))


def test_a_data_set_is_replaced_as_a_whole(tiny):
    """A full disk or a kill leaves the old one."""
    write(tiny.folder, {"old.txt": "old" * 10, "new.txt": "new " * 2_000_000})
    made = tiny.folder / "data/set"
    prepared(tiny, "old.txt")
    full = partial(begin, tiny.folder, bytes_of_a_file=99_999)
    assert "File too large" in prepared(tiny, "new.txt", before=full, code=1)
    assert os.listdir(made.parent) == ["set"]
    run = tiny.start("data/prepare", "new.txt", name="set", tokenizer="char",
                     before=partial(begin, tiny.folder))
    while run.processes[0].is_alive() and not list(made.parent.glob("set?*/*.bin")):
        pass
    run.kill()
    assert_holds(made, ["old" * 9], ["old"])
    prepared(tiny, "new.txt")
    assert len(read_bin(made, "val")) == 800_000
    assert contents(made).keys() == {"train.bin", "val.bin", "meta.json"}
    assert not list(made.parent.glob("*.old*"))


def test_a_link_to_another_disk_and_other_files_are_kept(tiny):
    made = tiny.folder / "data/set"
    write(tiny.folder, {"in.txt": TEXT, "disk/val.bin": "", "data/x": ""})
    os.symlink(tiny.folder / "disk", made)
    prepared(tiny, "in.txt")
    assert made.is_symlink() and len(read_bin(tiny.folder / "disk", "val")) > 99
    write(made, {"notes": "mine"})
    assert "notes" in prepared(tiny, "in.txt", code=1)
    assert "notes" in os.listdir(made)


NAMES = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]


def raw(ids):
    return np.array(ids, "<u2").tobytes()


def shard(ids, *header):
    """A file as llm.c writes it. header: magic, version, number of tokens."""
    numbers = np.zeros(256, "<i4")
    numbers[:3] = header or (20240520, 1, len(ids))
    return numbers.tobytes() + raw(ids)


@pytest.mark.parametrize("name, repo, prefix", [
    ("fineweb", "kjj0/fineweb10B-gpt2", ""),
    ("fineweb_edu", "karpathy/fineweb-edu-100B-gpt2-token-shards", "edu_")])
def test_fineweb_is_llm_cs_shards_each_downloaded_once(server, tmp_path, name, repo, prefix):
    names = [prefix + name for name in NAMES]
    server.files = {file: shard(range(i, 4000)) for i, file in enumerate(names)}
    write(tmp_path, {names[1]: PAGE})
    last = server.files.pop(names[2])
    with pytest.raises(FileNotFoundError, match=names[2]):
        prepare.DATASETS[name](str(tmp_path), shards=2)
    assert server.asked[0].path == f"/datasets/{repo}/resolve/main/{names[0]}"
    server.asked.clear()
    server.files[names[2]] = last
    for asked in ({names[2]}, set()):
        prepare.DATASETS[name](str(tmp_path), shards=2)
        assert newly_asked(server) == asked
    assert contents(tmp_path) == server.files


@needs_bpe
def test_tinystories_are_documents(server, tmp_path):
    stories = [f"Once {i}.\n\nThe end <of {i}>." for i in range(19)]
    for name, part in (("train", ["", *stories[:15], ""]), ("valid", stories[15:])):
        text = "\n<|endoftext|>\n".join(part)
        server.files[f"TinyStoriesV2-GPT4-{name}.txt"] = text.encode()
    prepare.DATASETS["tinystories"](f"{tmp_path}/set", source=str(tmp_path))
    assert server.asked[0].path.startswith("/datasets/roneneldan/TinyStories/resolve/main/")
    assert_holds(tmp_path / "set", stories[:15], stories[15:])


# --------------------------------------------------------------------------------------------------
# Token files and samples


def test_a_name_is_a_folder_in_data_and_a_path_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.loader.DATA", f"{tmp_path}/data")
    write(tmp_path, {f"{folder}/{split}.bin": b"" for split in ("train", "val")
                     for folder in ("set", "data/set", "other")})
    found = [find_data(name)[0] for name in ("set", "./set", "other")]
    assert found == [f"{tmp_path}/data/set", "./set", "other"]
    with pytest.raises(FileNotFoundError, match="no set.*no train.bin.*: set"):
        find_data("no set")


def test_the_split_of_a_file_is_a_word_of_its_name(tmp_path):
    names = ["medieval_train.bin", "naval_train_x.bin", "VAL.bin", "trainer.bin", "values.bin"]
    write(tmp_path, dict.fromkeys(names, b""))
    train, train_x, val, *_ = [f"{tmp_path}/{name}" for name in names]
    assert find_data(str(tmp_path))[1] == {"train": [train, train_x], "val": [val]}
    write(tmp_path, {"train_val.bin": b""})
    with pytest.raises(ValueError, match="train_val.bin has both train and val in its name"):
        find_data(str(tmp_path))


def make_dataset(folder, *contents, T=4, **how):
    """A data set of files with these bytes."""
    names = [f"{i}.bin" for i in range(len(contents))]
    write(folder, dict(zip(names, contents, strict=True)))
    return TokenDataset([f"{folder}/{name}" for name in names], T, 200, **how)


def as_lists(dataset):
    """All samples: [(x, y), ...]"""
    return [tuple(side.tolist() for side in dataset[i]) for i in range(len(dataset))]


def test_samples_lie_side_by_side_in_each_file(tmp_path):
    dataset = make_dataset(tmp_path, raw(range(8)), shard(range(100, 106)), T=3)
    assert as_lists(dataset) == [
        ([0, 1, 2], [1, 2, 3]), ([3, 4, 5], [4, 5, 6]), ([100, 101, 102], [101, 102, 103])]
    assert dataset.tokens == 14 and dataset[0][0].dtype == torch.int64


def test_a_mask_hides_targets_and_no_input(tmp_path):
    files = [raw(range(5)), raw(range(100, 108))]
    plain = make_dataset(tmp_path, *files, stride=2)
    write(tmp_path, {"1.mask": bytes([1, 0, 1, 1, 0, 0, 1, 1])})
    masked = make_dataset(tmp_path, *files, stride=2)
    assert masked.masked and not plain.masked and masked.fingerprint != plain.fingerprint
    assert [x for x, _ in as_lists(masked)] == [x for x, _ in as_lists(plain)]
    assert [y for _, y in as_lists(masked)] == [
        [1, 2, 3, 4], [-1, 102, 103, -1], [-1, -1, -1, 106], [-1, -1, 107, -1]]
    write(tmp_path, {"1.mask": bytes(7)})
    with pytest.raises(ValueError, match="1.mask"):
        make_dataset(tmp_path, *files)


@settings(max_examples=100, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3).filter(lambda n: max(n) > 1),
       T=st.integers(1, 9), stride=st.integers(1, 9))
def test_an_evaluation_predicts_each_token_once(tmp_path, lengths, T, stride):
    stride = min(stride, T)
    texts = [range(1 + 50 * i, 1 + 50 * i + length) for i, length in enumerate(lengths)]
    samples = as_lists(make_dataset(tmp_path, *map(raw, texts), T=T, stride=stride))
    assert [i for _, y in samples for i in y if i > 0] == [i for text in texts for i in text[1:]]
    for x, y in samples:
        place, start = divmod(x[0] - 1, 50)
        known = texts[place][start:-1][:T]
        assert start % stride == 0 and max(y) > 0
        assert x == [*known] + (T - len(known)) * [0]
        assert all(target in (-1, token + 1) for token, target in zip(x, y, strict=True))


GOOD = list(range(50)) * 4


@pytest.mark.parametrize("name, content, words", [
    ("train.bin", b"", "empty"), ("train.bin", raw(GOOD)[:-1], "half written"),
    ("train.bin", raw([*GOOD[:-1], 777]), "token 777, beyond the vocabulary of 50"),
    ("val.bin", raw(GOOD[:32]), "block_size=199 needs 200: use --block_size=31"),
    ("train.bin", shard(GOOD)[:-2], "download"),
    ("train.bin", shard(GOOD, 20240520, 2, 200), "download"), (NAMES[1], b"", "download"),
    ("train.bin", shard(GOOD, 20240801, 1, 200), "download"), (NAMES[1], raw(GOOD), "download")])
def test_a_damaged_token_file_is_refused(tmp_path, name, content, words):
    write(tmp_path, {name: content})
    with pytest.raises(ValueError, match=f"{name}.*{words}"):
        TokenDataset([f"{tmp_path}/{name}"], 199, 50)


def test_data_larger_than_memory_is_mapped(tmp_path):
    with open(tmp_path / "train.bin", "wb") as f:
        f.truncate(200 << 30)                                    # a sparse file
    dataset = TokenDataset([f.name], 1024, 50)
    assert dataset.tokens == 100 << 30 and dataset[len(dataset) - 1][0].sum() == 0
    assert dataset.fingerprint


@given(n=st.integers(1, 40), ranks=st.integers(1, 6), seed=st.integers(0, 5),
       consumed=st.integers(0, 100))
def test_processes_share_one_endless_sequence_of_torchs_epochs(n, ranks, seed, consumed):
    sequence = []
    for epoch in range(160 // n + 1):
        torchs = DistributedSampler(range(n), 1, 0, seed=seed)
        torchs.set_epoch(epoch)
        sequence += torchs
    for rank in range(ranks):
        found = itertools.islice(EndlessSampler(range(n), rank, ranks, seed, consumed), 9)
        first = consumed + (rank - consumed) % ranks             # place p belongs to rank p % ranks
        assert list(found) == sequence[first::ranks][:9]


# --------------------------------------------------------------------------------------------------
# sample.py

SPEED = r"([\d,]+) tokens in [\d.]+ s: [\d,.]+ tokens per second on cpu, float32\n"


def write_model_that_says(folder, table, ids):
    """Its position embeddings alone decide: after token i of the text comes ids[i]."""
    model = GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=128, block_size=len(ids) + 2,
                            vocab_size=table.vocab_size + 3))
    with torch.no_grad():
        for p in model.transformer.h.parameters():
            p.zero_()
        embeddings = model.transformer.wte.weight.normal_()
        model.transformer.wpe.weight[:len(ids)] = 99 * embeddings[ids]
    model.save_pretrained(folder, table)


def sampled(tiny, *argv, **how):
    """-> what sample.py writes, and the number of tokens that it reports"""
    done = tiny.sample(*argv, **how)
    speed = re.fullmatch(SPEED, done.stderr)
    assert speed and done.stdout.endswith("\n"), done.stderr
    return done.stdout[:-1], speed[1]


def test_sample_writes_what_generate_returns(tiny, whole):
    model = GPT2.from_pretrained(str(whole.out))
    table = load_tokenizer(whole.out)
    prompt = torch.tensor(table.encode("ab c").tolist())[None]
    expected = table.decode(model.generate(prompt, 60, temperature=0)[0].tolist())
    argv = ["--start=ab c", "--max_new_tokens=60", "--temperature=0", f"--out_dir={whole.out}"]
    assert sampled(tiny, *argv) == sampled(tiny, *argv, "--no-use_cache") == (expected, "60")
    how = dict(temperature=0.7, top_k=5, top_p=0.9)
    generator = torch.Generator().manual_seed(7)
    rows = model.generate(prompt.repeat(3, 1), 9, generator=generator, **how).tolist()
    write(tiny.folder, {"prompt": "ab c"})
    text, count = sampled(tiny, "--start=FILE:prompt", num_samples=3, seed=7, max_new_tokens=9,
                          init_from=whole.out, **how)
    assert text + "\n" == "".join(table.decode(row) + f"\n{'-' * 15}\n" for row in rows)
    assert count == "27"


def test_a_prompt_is_typed_or_piped_or_a_line_break(tiny, whole):
    how = dict(out_dir=whole.out, max_new_tokens=3)
    assert sampled(tiny, stdin="abba\n", **how)[0].startswith("abba\n")
    assert sampled(tiny, "--start=abba", stdin="b", **how)[0].startswith("abba")
    assert sampled(tiny, **how)[0].startswith("\n")
    write_model_that_says(tiny.folder / "out", TABLE, [2, 1])
    assert sampled(tiny, max_new_tokens=2, temperature=0)[0] == "acb"    # knows no line break


@needs_bpe
def test_a_character_of_several_tokens_is_written_whole(tiny):
    table = GPT2Tokenizer()
    ids = table.encode(STRANGE).tolist()
    write_model_that_says(tiny.folder / "out", table, ids)
    text, count = sampled(tiny, "--start=a", max_new_tokens=len(ids), temperature=0)
    assert text == "a" + STRANGE and int(count) == len(ids)


def test_a_text_ends_with_its_document(tiny):
    """Ids beyond the tokenizer, which a rounded vocabulary has, are no text."""
    write_model_that_says(tiny.folder / "out", TABLE, [1, 4, 0, 3, 2])
    how = dict(max_new_tokens=5, temperature=0)
    assert sampled(tiny, "--start=c", **how)[0] == "cba<|endoftext|>c"
    assert sampled(tiny, "--start=c<|endoftext|>", **how)[0] == "c<|endoftext|>a<|endoftext|>cc"
    assert sampled(tiny, "--start=c", "--stop_at_eot", **how)[0] == "cba"
    text, _ = sampled(tiny, "--start=c", "--stop_at_eot", "--num_samples=2", **how)
    assert text + "\n" == 2 * f"cba\n{'-' * 15}\n"


def test_sample_tells_what_flags_change_in_the_weights(tiny, whole):
    done = tiny.sample("--gqa", "--n_kv_head=1", "--max_new_tokens=2", out_dir=whole.out)
    assert "gqa: 2 key/value heads are averaged to 1; fine-tune" in done.stderr
    assert "gqa" not in done.stdout


def test_sample_runs_in_any_folder_and_ends_quietly(tmp_path):
    """The reader of a pipe leaves early, the console lacks a character, Ctrl-C is typed, and the
    folder holds another package `data`."""
    write_model_that_says(tmp_path / "out", CharTokenizer("ab é日"), 1500 * [4])
    write(tmp_path, {"data/__init__.py": "raise SystemExit('the wrong package')"})
    command = f"{sys.executable} {HERE}/sample.py --temperature=0 --max_new_tokens=1500"
    pipe = f"printf ab | PYTHONIOENCODING=ascii {command} | head -c 9"
    done = subprocess.run(["bash", "-c", pipe], cwd=tmp_path, capture_output=True, timeout=60)
    assert (done.stdout, done.stderr) == (b"ab???????", b"")
    process = subprocess.Popen([*command.split(), "--start=a"], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(9)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == b"" and process.returncode == -signal.SIGINT


def test_ctrl_c_during_the_imports_ends_quietly(tmp_path):
    write(tmp_path, {"torch.py": "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"})
    before = f"export PYTHONPATH={tmp_path};"
    assert run_python(HERE, "sample.py", before=before, code=-signal.SIGINT) == ""
# --------------------------------------------------------------------------------------------------
# Training: a step


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["data", "masked_data"])
def test_a_run_is_the_loop_written_by_hand(tiny, request, kind, optimizer):
    """Order of the data, loss, clipping, rate, weight decay, update and evaluation."""
    folder = request.getfixturevalue(kind)
    run = tiny.train(dataset=folder, optimizer=optimizer, weight_decay=0.5, grad_clip=0.5,
                     schedule="cosine", min_lr=2e-4, max_iters=10, eval_interval=5, eval_iters=0)
    for record, row in zip(run.metrics, train_by_hand(folder, optimizer), strict=True):
        assert list(without(record, "tokens").values()) == pytest.approx(row, rel=2e-5)


@pytest.mark.parametrize("how, rate", [
    (dict(schedule="cosine"), learning_rate_by_hand), (dict(schedule="linear"), linear_by_hand)])
def test_the_rate_rises_and_falls_as_nanogpts(tiny, how, rate):
    run = tiny.train(n_layer=1, n_embd=8, block_size=8, batch_size=1, eval_interval=100,
                     min_lr=2e-4, lr_decay_iters=10, max_iters=14, **how)
    found = [record["lr"] for record in run.metrics if "lr" in record]
    assert found == pytest.approx([rate(step) for step in range(14)])


def test_without_decay_the_rate_stays(tiny):
    run = tiny.train(decay_lr=False, max_iters=5)
    assert [record["lr"] for record in run.metrics if "lr" in record] == [2e-3] * 5


def test_smaller_batches_of_the_same_sum_give_the_same_losses(tiny):
    large = tiny.train(batch_size=6, max_iters=3)
    small = tiny.train(batch_size=3, gradient_accumulation_steps=8, eval_iters=6, max_iters=3,
                       out="small")
    assert_agree(small, large)


def test_checkpointed_gradients_give_the_same_losses(tiny, whole):
    run = tiny.train("--grad_checkpoint", dropout=0.1)
    assert_agree(run, whole)


def test_bfloat16_trains_float32_weights(tiny, whole):
    run = tiny.train(dropout=0.1, dtype="bfloat16")
    assert run.losses != whole.losses
    assert run.losses == pytest.approx(whole.losses, rel=0.01)
    assert {p.dtype for p in load_file(run.out / "model.safetensors").values()} == {torch.float32}


@pytest.mark.slow
def test_a_compiled_run_has_the_same_losses(tiny, alone):
    """Needs a C++ compiler."""
    run = tiny.train(compile=True, timeout=300)
    assert_agree(run, alone["plain"])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_gpu_trains_as_the_cpu_does(tiny, alone, dtype):
    env = GPU | {"NVIDIA_TF32_OVERRIDE": "0"}
    run = tiny.train(device="cuda", dtype=dtype, env=env, timeout=300)
    tolerance = 1e-4 if dtype == "float32" else 0.01
    assert run.losses == pytest.approx(alone["plain"].losses, rel=tolerance)


def test_dropout_differs_between_processes(tiny):
    write_set(tiny.folder / "set", "abcdefgh" * 50, "abcdefgh" * 50)     # all samples are equal
    how = dict(dataset=tiny.folder / "set", max_iters=1, batch_size=1, dropout=0.5)
    one = tiny.train(gradient_accumulation_steps=1, out="one", **how)
    two = tiny.train(gradient_accumulation_steps=2, ranks=2, **how)
    assert two.losses != pytest.approx(one.losses, rel=1e-5)     # process 0 has the mask of `one`


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoint(tiny, cut):
    before = cut.result
    line = tiny.refuses("train", out_dir=cut.out, init_from="resume", device="cpu",
                        learning_rate=1e18, grad_clip=0, eval_interval=100)
    assert "not finite" in line and "step 5" in line and "step 3" in line
    assert cut.result[1:] == before[1:]
    assert all(math.isfinite(loss) for loss in cut.losses)


def test_an_evaluation_that_is_not_finite_is_not_saved(tiny, cut):
    before = cut.result
    line = tiny.refuses("train", out_dir=cut.out, init_from="resume", device="cpu",
                        learning_rate=1e18, grad_clip=0, eval_interval=1)
    assert "not finite" in line and "step 4" in line and "step 3" in line
    assert cut.result[1:] == before[1:]


# --------------------------------------------------------------------------------------------------
# Training: flags and what a run says


@pytest.mark.parametrize("how, expected", [
    ({}, dict(n_layer=4, optimizer="muon")),
    (dict(optimizer="adamw", n_layer=1), dict(n_layer=1, n_head=4, optimizer="adamw")),
    (dict(size="gpt2", n_layer=1, n_embd=96), dict(n_layer=1, n_head=12, n_embd=96))], ids=str)
def test_a_typed_flag_comes_before_a_recipe(tiny, how, expected):
    done = tiny.run("train", dataset=tiny.data, out_dir=tiny.folder / "out", device="cpu",
                    max_iters=0, block_size=32, eval_iters=1, sample_interval=0, **how)
    found = done.checkpoint["run"] | done.checkpoint["config"]
    assert {name: found[name] for name in expected} == expected


def test_a_resumed_run_has_the_flags_of_its_checkpoint(tiny, cut):
    cut.resume(learning_rate=0.5, max_iters=4)
    run = cut.checkpoint["run"]
    assert (run["learning_rate"], run["max_iters"]) == (0.5, 4)
    assert (run["batch_size"], run["seed"], cut.checkpoint["config"]["dropout"]) == (2, 1337, 0.1)


def test_fine_tuning_has_gentle_defaults(tiny, whole):
    done = tiny.run("train", init_from=whole.out, dataset=tiny.data, out_dir=tiny.folder / "out",
                    device="cpu", max_iters=0)
    run = done.checkpoint["run"]
    assert run["optimizer"] == "adamw" and run["learning_rate"] < 1e-4
    assert not run["always_save_checkpoint"] and done.checkpoint["config"]["dropout"] == 0.1


def test_auto_resumes_a_run_or_starts_one(tiny, whole):
    started = tiny.train(dropout=0.1, init_from="auto", kill_at=5)
    assert started.checkpoint["step"] == 3
    tiny.train(dropout=0.1, init_from="auto")
    assert started.result == whole.result


def test_each_choice_is_printed_with_its_reason(tiny):
    done = tiny.run("train", dataset=tiny.data, out_dir=tiny.folder / "out", block_size=16,
                    n_layer=1, max_iters=0)
    words = " ".join(done.stdout.split())
    for choice in ("device cpu: ", "float32: ", "compile False: ", "mode single: ",
                   "optimizer muon", "train 1,700 tokens", "val 170 tokens", "vocabulary 12 (char)",
                   "batch 4 samples x 16 tokens x 4 accumulated", "model "):
        assert choice in words


NANOGPT_FLAGS = """out_dir eval_interval log_interval eval_iters eval_only init_from device dataset
    gradient_accumulation_steps batch_size block_size n_layer n_head n_embd dropout bias
    learning_rate max_iters weight_decay beta1 beta2 grad_clip decay_lr warmup_iters min_lr
    lr_decay_iters backend dtype compile always_save_checkpoint""".split()


def test_all_flags_of_nanogpt_exist(tiny):
    text = tiny.run("train", "--help").stdout
    missing = [name for name in NANOGPT_FLAGS if f"  --{name}" not in text]
    assert not missing


def test_a_small_named_data_set_is_prepared_first(tiny):
    before = partial(replace_stdlib, str(tiny.folder), write_stdlib)
    run = tiny.train(dataset="stdlib", max_iters=1, before=before)
    assert (tiny.folder / "stdlib/meta.json").exists() and run.losses


def replace_stdlib(folder, function):
    """data/ is another folder, and stdlib a small data set."""
    prepare.DATA = loader.DATA = folder
    prepare.DATASETS["stdlib"] = function


def write_stdlib(folder):
    with open(f"{folder}.calls", "a") as f:
        f.write("prepared\n")
    write_set(folder, TEXT[:800], TEXT[800:900])


# --------------------------------------------------------------------------------------------------
# Training: log, picture, texts


def test_an_evaluation_changes_nothing(tiny, whole):
    run = tiny.train(dropout=0.1, eval_interval=100)
    assert run.losses == whole.losses


def test_a_text_is_what_the_model_writes_and_changes_nothing(tiny, whole):
    run = tiny.train(dropout=0.1, sample_interval=4)
    assert run.result == whole.result
    blocks = re.findall(r"--- step (\d):.*\n((?:    \| .*\n)*)", run.stdout)
    assert [step for step, text in blocks if text] == ["0", "6", "9"] and len(blocks) == 4
    model = GPT2.from_pretrained(run.out)
    table = load_tokenizer(run.out)
    ids = model.generate(torch.tensor([table.encode("\n").tolist()]), 128, 0.8, top_k=200,
                         generator=torch.Generator().manual_seed(1337))
    text = table.decode(ids[0, 1:].tolist()).strip("\n")
    assert blocks[-1][1] == "".join(f"    | {line}\n" for line in text.split("\n"))


def test_a_text_of_masked_data_answers_the_first_prompt(tiny, masked_data):
    """A prompt is what the mask hides at the beginning."""
    folder = tiny.folder / "set"
    shutil.copytree(masked_data, folder)
    mask = np.fromfile(folder / "val.mask", np.uint8)
    mask[:9] = np.arange(9) > 7
    mask.tofile(folder / "val.mask")
    prompt = load_tokenizer(folder).decode(read_bin(folder, "val")[:8].tolist())
    run = tiny.train(dataset=folder, n_layer=1, max_iters=0, sample_interval=1)
    text = run.stdout.split("(best)\n    | ")[1].replace("\n    | ", "\n")
    assert text.startswith(prompt.lstrip("\n"))


def test_the_log_has_the_first_step_the_last_and_each_interval(tiny):
    run = tiny.train(log_interval=4)
    assert [r["step"] for r in run.metrics if "loss" in r] == [1, 4, 8, 9]
    assert [r["step"] for r in run.metrics if "val_loss" in r] == [0, 3, 6, 9]
    first = json.loads((run.out / "metrics.jsonl").read_text().splitlines()[1])
    assert first.keys() == {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second",
                            "memory"}
    assert first["tokens_per_second"] > 0 and first["memory"] > 10e6


def test_the_log_counts_the_tokens_that_were_seen(cut):
    cut.resume(batch_size=4, max_iters=5)
    assert [r["tokens"] for r in cut.metrics if "loss" in r] == [256, 512, 768, 1280, 1792]


def test_a_browser_opens_the_picture_of_a_long_run(tiny, whole):
    odd = tiny.folder / "a<b>&\"c'"
    shutil.copytree(whole.out, odd)
    with open(odd / "metrics.jsonl", "a") as f:
        f.writelines(f'{{"step": {i}, "tokens": {i}, "loss": 1.5}}\n' for i in range(10, 30_000))
        f.write('{"step": 5, "lo')                               # a kill in the middle of a line
    own = (odd / "loss.svg").read_bytes()
    tiny.run("train", plot=f"{odd},{whole.out}")
    both = tiny.folder / "comparison.svg"
    assert (odd / "loss.svg").read_bytes() == own
    tiny.run("train", plot=odd)
    assert (odd / "loss.svg").read_bytes() != own
    for path in (both, odd / "loss.svg"):
        root = xml.etree.ElementTree.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert len(root.findall(".//{*}polyline")) >= 1


class FakeWandb:
    """A package wandb that writes down what it gets."""

    def __init__(self, path):
        self.path = path
        sys.modules["wandb"] = self

    def init(self, config, **how):
        json.dumps(config)
        return self

    def log(self, values, step):
        with open(self.path, "a") as f:
            f.write(json.dumps(values) + "\n")

    def finish(self):
        self.log({"step": "finished"}, None)


def test_wandb_gets_the_records_of_the_log(tiny):
    path = tiny.folder / "wandb"
    run = tiny.train(wandb=True, before=partial(FakeWandb, path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [*(r["step"] for r in run.metrics), "finished"]
    assert [line["loss"] for line in lines if "loss" in line] == run.losses


def test_tensorboard_gets_the_records_of_the_log(tiny):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = tiny.train(tensorboard=True)
    events = EventAccumulator(str(run.out / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(run.losses)


# --------------------------------------------------------------------------------------------------
# Training: the checkpoint


def test_a_killed_run_resumes_to_the_bit(tiny, whole):
    """Killed before the first checkpoint, then in the first epoch, and again in the second."""
    for kill in (dict(kill_at=2), dict(kill_at=5), dict(kill_at=4), {}):
        run = tiny.train(dropout=0.1, init_from="auto", **kill)
    assert run.result == whole.result


def test_a_killed_run_with_muon_resumes_to_the_bit(tiny):
    straight = tiny.train(dropout=0.1, optimizer="muon", out="straight")
    run = tiny.train(dropout=0.1, optimizer="muon", kill_at=8)
    run.resume()
    assert run.result == straight.result


def test_the_checkpoint_before_the_last_is_kept(tiny, whole):
    run = whole.copy(tiny)
    before = torch.load(run.out / "checkpoint.previous.pt", weights_only=True)
    assert (before["step"], run.checkpoint["step"]) == (6, 9)
    shutil.copy(run.out / "checkpoint.previous.pt", run.out / "checkpoint.pt")
    run.resume()
    assert run.result == whole.result


def validation_loss(run):
    """Of the exported model, on all validation data."""
    with torch.no_grad():
        samples = samples_by_hand(run.tiny.data, "val", whole=True)
        return GPT2.from_pretrained(run.out)(*samples)[1].item()


def test_only_the_best_model_is_exported_and_the_last_step_resumed(tiny, cut):
    how = dict(always_save_checkpoint=False, learning_rate=1, min_lr=1)
    straight = cut.copy(tiny, "straight")
    straight.resume(**how)
    cut.resume(signal_at=(5, signal.SIGTERM), code=143, **how)
    assert cut.checkpoint["step"] > 6 and cut.checkpoint["best_step"] == 3
    assert validation_loss(cut) == pytest.approx(min(cut.val_losses), rel=2e-5)
    cut.resume()
    assert cut.val_losses[-1] > min(cut.val_losses) + 0.1
    assert cut.result == straight.result


def test_fine_tuning_that_improves_nothing_keeps_the_model(tiny, whole):
    run = tiny.train(init_from=whole.out, learning_rate=1, min_lr=1, always_save_checkpoint=False)
    assert_same_tensors(load_file(run.out / "model.safetensors"),
                        load_file(whole.out / "model.safetensors"))


def test_data_that_has_changed_since_the_checkpoint_is_refused(tiny):
    folder = tiny.folder / "set"
    shutil.copytree(tiny.data, folder)
    run = tiny.train(dataset=folder, max_iters=3)
    read_bin(folder, "val")[::-1].tofile(folder / "val.bin")
    line = tiny.refuses("train", out_dir=run.out, init_from="resume", max_iters=5)
    assert "changed" in line and str(folder) in line and f"--init_from={run.out}" in line


def test_a_finished_run_is_not_trained_further(tiny, whole):
    run = whole.copy(tiny)
    before = run.result
    assert "finished" in run.resume().stdout
    assert run.result == before


def test_a_new_run_moves_an_old_one_aside_as_a_whole(tiny):
    kept = []
    for seed in range(3):
        run = tiny.train(max_iters=3, seed=seed)
        (run.out / "notes.txt").write_text(f"notes {seed}")
        kept.append(files_of(run.out))
    assert [files_of(tiny.folder / name) for name in ("out-1", "out-2", "out")] == kept
    assert "out-2" in run.stdout
    again = tiny.train(init_from=tiny.folder / "out-1", max_iters=1)
    assert again.val_losses[0] == pytest.approx(json.loads(
        kept[0]["metrics.jsonl"].splitlines()[-1])["val_loss"], rel=1e-6)


def files_of(folder):
    """{name: content} of all files but the lock."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


def test_a_new_run_moves_the_models_of_others_aside(tiny):
    config = transformers.LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                                      intermediate_size=8, vocab_size=61)
    transformers.LlamaForCausalLM(config).save_pretrained(tiny.folder / "out", max_shard_size="2KB")
    before = files_of(tiny.folder / "out")
    assert len(before) > 3
    run = tiny.train(max_iters=3)
    assert files_of(tiny.folder / "out-1") == before
    assert not before.keys() & files_of(run.out).keys() - {"config.json"}


def test_transformers_opens_the_folder_of_a_run(tiny, whole):
    x, y = samples_by_hand(tiny.data, "val")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(whole.out).eval()
    with torch.no_grad():
        logits = theirs(x).logits
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)
    assert whole.val_losses[-1] == pytest.approx(loss.item(), rel=2e-5)


@pytest.mark.parametrize("how, kind", [({}, "GPT2"), (ALL, "Starcoder2")], ids=["plain", "all"])
def test_the_pipeline_of_transformers_writes_the_same_text(tiny, how, kind):
    run = tiny.train(max_iters=2, **how)
    pipeline = transformers.pipeline("text-generation", str(run.out))
    assert type(pipeline.model).__name__.startswith(kind)
    theirs = pipeline("ab c", max_new_tokens=20, do_sample=False)[0]["generated_text"]
    ours = tiny.sample(out_dir=run.out, start="ab c", max_new_tokens=20, temperature=0).stdout
    assert ours.strip("\n") == theirs.strip("\n") and len(theirs) == 24


def test_a_folder_may_have_a_name_that_is_not_text(tiny):
    out = os.fsdecode(os.fsencode(tiny.folder) + b"/caf\xe9")
    try:
        os.mkdir(out)
    except OSError:
        pytest.skip("this disk has only UTF-8 names")
    tiny.train(out=out, max_iters=3)
    assert os.path.exists(f"{out}/loss.svg")


def test_a_checkpoint_before_the_first_step_changes_no_loss(tiny):
    """torch makes a state for an optimizer that has none, and counts it as a step."""
    straight = tiny.train(out="straight", optimizer="adamw")
    early = tiny.train(out="early", optimizer="adamw", always_save_checkpoint=False)
    cut = tiny.train(out="cut", optimizer="adamw", always_save_checkpoint=False, kill_at=1)
    assert early.losses == straight.losses
    assert cut.resume().losses == straight.losses


# --------------------------------------------------------------------------------------------------
# Training: signals, and one run a folder


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_run_and_prints_how_to_resume(tiny, whole, number, code):
    run = tiny.train(dropout=0.1, out="a folder", signal_at=(5, number), code=code)
    step = run.checkpoint["step"]
    assert step in (5, 6) and not run.stderr
    assert f"stopped at step {step}, saved in {run.out}. Resume with" in run.stdout
    python, script, *argv = shlex.split(run.stdout.splitlines()[-1])
    assert (python, script) == ("python", "train.py")
    tiny.run("train", *argv)
    assert run.result == whole.result


def close_terminal(step):
    """The process runs in a terminal that is closed in this step."""
    master, slave = os.openpty()
    for stream in (1, 2):
        os.dup2(slave, stream)
    os.close(slave)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    each_step(partial(close_at, step, master))


def close_at(step, master, n):
    if n == step:
        os.close(master)
        os.kill(os.getpid(), signal.SIGHUP)


def test_a_closed_terminal_saves_the_run(tiny, whole):
    run = tiny.train(dropout=0.1, before=partial(close_terminal, 5), code=143)
    assert run.checkpoint["step"] in (5, 6)
    run.resume()
    assert run.result == whole.result


def wait_for(path, timeout=60):
    deadline = time.time() + timeout
    while not path.exists():
        assert time.time() < deadline
        time.sleep(0.02)


def test_a_second_signal_ends_a_step_that_hangs(tiny):
    run = tiny.start_training(before=partial(slow_steps, 600))
    wait_for(run.out / "metrics.jsonl")
    os.kill(run.processes[0].pid, signal.SIGTERM)
    time.sleep(2.2)
    os.kill(run.processes[0].pid, signal.SIGTERM)
    run.end(code=143, timeout=20)


@pytest.mark.parametrize("script", ["train", "sample"])
def test_ctrl_c_during_the_imports_is_silent(tmp_path, script):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run([sys.executable, HERE / f"{script}.py"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_one_run_writes_to_a_folder(tiny, whole):
    first = tiny.start_training(dropout=0.1, before=partial(slow_steps, 0.3))
    wait_for(first.out / "checkpoint.pt")
    for source in ("scratch", "resume"):
        line = tiny.refuses("train", dataset=tiny.data, out_dir=first.out, device="cpu",
                            init_from=source)
        assert "another run" in line and str(first.out) in line
    first.kill()
    assert first.resume().result == whole.result
    assert not (tiny.folder / "out-1").exists()


# --------------------------------------------------------------------------------------------------
# Evaluation, benchmark


DOCUMENTS = ["a bad dab\n\n  cab é  日本\u3000ab", "dead\u00a0beef 日", " fade  abc" * 9]


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    """A data set of documents in several alphabets, with end-of-text tokens between them."""
    folder = tmp_path_factory.mktemp("documents") / "set"
    folder.mkdir()
    characters = sorted(set("".join(DOCUMENTS)))
    table = CharTokenizer("".join(characters), end_of_text=len(characters))
    ids = [np.append(table.encode(text), np.uint16(table.end_of_text)) for text in DOCUMENTS]
    np.concatenate(ids).astype(np.uint16).tofile(folder / "val.bin")
    (folder / "train.bin").touch()
    (folder / "meta.json").write_text(json.dumps(table.to_json()))
    return folder


def make_judge(folder, documents, **how):
    """A model of these documents, in a folder."""
    table = load_tokenizer(documents)
    shape = dict(block_size=16, vocab_size=table.vocab_size, n_layer=2, n_head=2, n_embd=32)
    torch.manual_seed(0)
    model = GPT2(GPT2Config(**shape | how)).eval()
    model.save_pretrained(folder, table)
    return model


@torch.no_grad()
def loss_by_hand(model, ids, stride, block_size=16):
    """The sum of the losses: each token by the first sample that reaches it."""
    nats = 0.0
    for t in range(1, len(ids)):
        begin = stride * max(0, math.ceil((t - block_size) / stride))
        logits, _ = model(ids[None, begin:t])
        nats -= logits[0, -1].log_softmax(-1)[ids[t]].item()
    return nats


@pytest.mark.parametrize("shape, how, stride", [
    ({}, {}, 16), ({}, dict(eval_stride=1), 1), (ALL, dict(eval_stride=5), 5),
    ({}, dict(eval_stride=5, ranks=2), 5), (ALL, dict(eval_stride=5, ranks=2, fsdp=True), 5)],
    ids=str)
def test_an_evaluation_scores_each_token_once(tiny, documents, shape, how, stride):
    """Loss, perplexity and bits per byte, by hand. It writes nothing."""
    judge = make_judge(tiny.folder / "judge", documents, **shape)
    (tiny.folder / "empty").mkdir()
    done = tiny.run("train", "--eval_only", init_from=tiny.folder / "judge", dataset=documents,
                    device="cpu", batch_size=4, eval_iters=0, where=tiny.folder / "empty", **how)
    ids = torch.from_numpy(read_bin(documents, "val").astype(np.int64))
    nats = loss_by_hand(judge, ids, stride)
    tokens = len(ids) - 1
    size = sum(len(text.encode()) for text in DOCUMENTS) - 1     # the first is not predicted
    told = re.search(r"loss (\S+) nats per token, of (\S+) tokens\nperplexity (\S+) per token\n"
                     r"bits per byte (\S+), of (\S+) bytes\n$", done.stdout)
    right = [nats / tokens, tokens, math.exp(nats / tokens), nats / math.log(2) / size, size]
    assert [float(n.replace(",", "")) for n in told.groups()] == pytest.approx(right, rel=5e-4)
    assert not list((tiny.folder / "empty").iterdir())


def test_an_evaluation_of_a_run_measures_what_the_run_did(tiny, cut):
    before = files_of(cut.out)
    done = tiny.run("train", "--eval_only", "--init_from=resume", out_dir=cut.out, device="cpu",
                    dataset=tiny.data)
    assert f"validation loss {cut.val_losses[1]:.4f} " in done.stdout
    assert files_of(cut.out) == before


def test_a_benchmark_tells_speed_and_memory_and_writes_nothing(tiny, whole):
    done = tiny.run("train", "--benchmark", dataset=tiny.data, device="cpu", block_size=32,
                    init_from=whole.out, where=tiny.folder)
    for words in ("tokens per second", "ms a step", "GB"):
        assert words in done.stdout
    assert not [path for path in tiny.folder.iterdir() if not path.name.startswith(".log")]


# --------------------------------------------------------------------------------------------------
# Distributed: one loss curve, whatever shares the work

MODELS = {"plain": {}, "all": dict(ALL, optimizer="muon", max_iters=6)}
both_modes = pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])


@pytest.fixture(scope="session")
def alone(tmp_path_factory, data):
    """Runs of one process, without dropout: plain GPT-2, and all three flags with Muon."""
    tiny = Tiny(tmp_path_factory.mktemp("alone"), data)
    return {name: tiny.train(out=name, **how) for name, how in MODELS.items()}


@pytest.fixture(scope="session", params=[False, True], ids=["ddp", "fsdp"])
def pair(request, tmp_path_factory, data):
    """A run of two processes, with all three flags and Muon -> (it, its mode)."""
    tiny = Tiny(tmp_path_factory.mktemp("pair"), data)
    how = dict(ranks=2, fsdp=request.param, **MODELS["all"])
    return tiny.train(before=partial(count_numbers, tiny.folder), **how), how


def test_two_processes_train_as_one(pair, alone):
    run, _ = pair
    assert_agree(run, alone["all"])


def test_two_processes_train_plain_gpt2_as_one(tiny, alone):
    assert_agree(tiny.train(ranks=2), alone["plain"])


def test_a_killed_run_of_two_processes_resumes_to_the_bit(tiny, pair):
    straight, how = pair
    run = tiny.train(kill_at=5, **how)
    run.resume(ranks=2, fsdp=how["fsdp"])
    assert run.result == straight.result


@pytest.mark.parametrize("fsdp", [False, slow(True)], ids=["ddp", "fsdp"])
def test_two_processes_train_on_masked_data_as_one(tiny, masked_data, fsdp):
    """Each target has the same weight, however few count beside it in its batch or process."""
    one = tiny.train(dataset=masked_data, out="one")
    assert_agree(tiny.train(dataset=masked_data, ranks=2, fsdp=fsdp), one)


@pytest.mark.parametrize("fsdp", [slow(False), True], ids=["ddp", "fsdp"])
def test_two_processes_write_the_text_of_one(tiny, fsdp):
    how = dict(n_layer=1, max_iters=0, sample_interval=1)
    one = tiny.train(out="one", **how)
    two = tiny.train(ranks=2, fsdp=fsdp, **how)
    texts = re.findall(r"^    \| .*$", one.stdout, re.MULTILINE)
    assert texts and texts == re.findall(r"^    \| .*$", two.stdout, re.MULTILINE)


@pytest.mark.parametrize("first, then", [
    (dict(ranks=2, fsdp=True), {}), (dict(ranks=2), dict(ranks=2, fsdp=True)),
    slow(dict(ranks=2, fsdp=True), dict(ranks=2)), slow({}, dict(ranks=2, fsdp=True)),
    slow(dict(ranks=4, fsdp=True), dict(ranks=2, fsdp=True))], ids=str)
def test_a_checkpoint_crosses_modes(tiny, alone, first, then):
    """A SIGTERM to one process stops all of them."""
    run = tiny.train(signal_at=(5, signal.SIGTERM), rank=1 if first else None, code=143,
                     **MODELS["all"], **first)
    run.resume(**then)
    assert_agree(run, alone["all"])


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_all_modes_agree_over_50_steps(tiny, name):
    how = MODELS[name] | dict(max_iters=50, eval_interval=1, gradient_accumulation_steps=8,
                              batch_size=1, timeout=300)
    one = tiny.train(out="one", **how)
    for ranks, fsdp in itertools.product((2, 4), (False, True)):
        run = tiny.train(out=f"{ranks}{fsdp}", ranks=ranks, fsdp=fsdp, **how)
        assert_agree(run, one)


@pytest.mark.slow
@both_modes
def test_compiled_processes_train_as_one(tiny, alone, fsdp):
    """Needs a C++ compiler."""
    run = tiny.train(ranks=2, fsdp=fsdp, compile=True, timeout=300)
    assert_agree(run, alone["plain"])


def count_numbers(folder):
    """Write down after a step how many numbers this process keeps, by optimizer and kind."""
    register_optimizer_step_post_hook(partial(write_counts, folder))


def write_counts(folder, optimizer, *_):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = {"weights": parameters, "gradients": [p.grad for p in parameters],
            "state": [t for p in parameters for t in optimizer.state[p].values()]}
    counts = {name: sum(map(local_numel, tensors)) for name, tensors in kept.items()}
    path = folder / f"{type(optimizer).__name__}{os.environ['RANK']}"
    path.write_text(json.dumps(counts))


def local_numel(tensor):
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    return torch.as_tensor(tensor).numel()


def test_each_process_of_fsdp_keeps_its_share(pair):
    run, how = pair
    everything = GPT2.from_pretrained(run.out).num_parameters()
    for rank in range(2):
        counts = [json.loads((run.tiny.folder / f"{name}{rank}").read_text())
                  for name in ("Muon", "AdamW")]
        for kind, most in (("weights", 1), ("gradients", 1), ("state", 2)):
            kept = sum(count[kind] for count in counts)
            assert kept <= 1.05 * most * everything / (2 if how["fsdp"] else 1), (kind, rank)


def test_processes_prepare_the_data_once(tiny):
    before = partial(replace_stdlib, str(tiny.folder), write_stdlib)
    tiny.train(dataset="stdlib", max_iters=1, ranks=2, before=before)
    assert (tiny.folder / "stdlib.calls").read_text() == "prepared\n"


def test_shards_are_read_in_one_order(tiny):
    (tiny.folder / "shards").mkdir()
    for seed, (split, count) in enumerate((("train", 400), ("train", 300), ("val", 100))):
        ids = np.random.default_rng(seed).integers(0, 26, count)
        (tiny.folder / f"shards/fineweb_{split}_00000{seed}.bin").write_bytes(shard(ids))
    meta = CharTokenizer(string.ascii_lowercase).to_json()
    (tiny.folder / "shards/meta.json").write_text(json.dumps(meta))
    one = tiny.train(dataset=tiny.folder / "shards", out="one", max_iters=4)
    assert_agree(tiny.train(dataset=tiny.folder / "shards", ranks=2, max_iters=4), one)


@pytest.fixture
def two_machines(tiny):
    """Two working folders, each with the same data in `set`."""
    folders = [tiny.folder / "a", tiny.folder / "b"]
    for folder in folders:
        shutil.copytree(tiny.data, folder / "set")
    return folders


def refused_by_two(tiny, machines, **how):
    """-> what the processes print that refuse the run, each a line at most."""
    how = dict(dataset="set", out_dir=tiny.folder / "out") | how
    run = tiny.start("train", device="cpu", block_size=32, ranks=2, where=machines, **how)
    run.end(code=None, timeout=30)
    assert 0 not in run.codes and "Traceback" not in run.stderr
    return run.stderr


def test_machines_with_unlike_data_are_refused(tiny, two_machines):
    ids = read_bin(two_machines[1] / "set", "train")
    ids[::17] = 0
    ids.tofile(two_machines[1] / "set/train.bin")
    assert "different" in refused_by_two(tiny, two_machines)
    assert not (tiny.folder / "out").exists()


def test_machines_of_which_one_has_a_checkpoint_are_refused(tiny, two_machines):
    tiny.train(dataset="set", out_dir="out", where=two_machines[0])
    err = refused_by_two(tiny, two_machines, out_dir="out", init_from="auto")
    assert "all machines share" in err


def test_one_process_that_fails_says_why(tiny, two_machines):
    (two_machines[1] / "set/val.bin").unlink()
    assert "val.bin" in refused_by_two(tiny, two_machines)


@pytest.mark.parametrize("dead, fsdp", [(1, False), slow(1, True), (0, False)])
def test_the_others_end_when_a_process_dies(tiny, dead, fsdp):
    run = tiny.start_training(ranks=2, fsdp=fsdp, kill_at=5, rank=dead).end(code=None)
    assert run.codes[dead] == -9 and run.codes[1 - dead] > 0
    assert "Traceback" not in run.stderr


# --------------------------------------------------------------------------------------------------
# Distributed: torchrun itself


def torchrun(tiny, *argv, options=("--standalone",), nproc=2, **how):
    argv = [*argv, *(f"--{name}={value}" for name, value in tiny.training(**how).items())]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, f"--nproc_per_node={nproc}",
         HERE / "train.py", *argv],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tiny.folder)


def succeed(agents, timeout=180):
    for agent in agents:
        out, _ = agent.communicate(timeout=timeout)
        assert agent.returncode == 0, out
    return out


def test_torchrun_starts_what_readme_says(tiny, alone):
    out = succeed([torchrun(tiny, "--fsdp")])
    assert "Warning" not in out and "fsdp: torchrun started 2 processes" in out
    assert_agree(Run(tiny, tiny.folder / "out"), alone["plain"])


def kill_rank(rank, agent):
    """Kill the process of this rank among those that torchrun started."""
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == agent.pid and f"RANK={rank}".encode() in environment:
            os.kill(int(folder.name), signal.SIGKILL)


@needs_linux
@pytest.mark.slow
@both_modes
def test_a_dead_process_ends_the_run(tiny, fsdp):
    agent = torchrun(tiny, nproc=4, fsdp=fsdp, max_iters=10**6)
    wait_for(tiny.folder / "out/checkpoint.pt")
    kill_rank(2, agent)
    out, _ = agent.communicate(timeout=60)
    assert agent.returncode and re.search(r"rank\s*:\s*2 ", out), out


@needs_linux
@pytest.mark.slow
@both_modes
def test_torchrun_restarts_a_dead_process(tiny, fsdp):
    options = ("--standalone", "--max-restarts=2")
    how = dict(max_iters=300, eval_interval=50)
    agent = torchrun(tiny, "--init_from=auto", options=options, nproc=4, fsdp=fsdp, **how)
    wait_for(tiny.folder / "out/checkpoint.pt")
    kill_rank(2, agent)
    succeed([agent])
    assert_agree(Run(tiny, tiny.folder / "out"), tiny.train(out="one", **how), 1e-3)


@pytest.mark.slow
@both_modes
@pytest.mark.parametrize("how", [
    "--rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:PORT --local_addr=127.0.0.1",
    "--node_rank=NODE --master_addr=127.0.0.1 --master_port=PORT"], ids=["c10d", "static"])
def test_two_machines_train_as_one(tiny, alone, fsdp, how):
    """With two agents of torchrun."""
    line = "--nnodes=2 " + how.replace("PORT", str(free_port()))
    agents = [torchrun(tiny, options=line.replace("NODE", str(node)).split(), fsdp=fsdp)
              for node in range(2)]
    succeed(agents)
    assert_agree(Run(tiny, tiny.folder / "out"), alone["plain"])


# --------------------------------------------------------------------------------------------------
# Refusals: each mistake gets one line, which names the value or the file


@pytest.fixture(scope="session")
def bad(data, whole, tmp_path_factory):
    """Files and folders, each with something wrong."""
    tmp = tmp_path_factory.mktemp("bad")
    (tmp / "empty").mkdir()
    for name in ("nanogpt", "half", "wide", "other"):
        shutil.copytree(data, tmp / name)
    for name in ("pickle", "short", "bpe"):
        shutil.copytree(whole.out, tmp / name)
    ids = read_bin(data, "train")
    (tmp / "half/train.bin").write_bytes(ids.tobytes()[:-1])
    ids[5] = 999
    ids.tofile(tmp / "wide/train.bin")
    (tmp / "nanogpt/meta.json").unlink()
    (tmp / "nanogpt/meta.pkl").write_bytes(b"")
    table = CharTokenizer(string.ascii_lowercase)
    (tmp / "other/meta.json").write_text(json.dumps(table.to_json()))
    (tmp / "pickle/model.safetensors").write_bytes(pickle.dumps(list(range(9))))
    weights = tmp / "short/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    (tmp / "bpe/meta.json").write_text('{"tokenizer": "gpt2"}')
    (tmp / "ckpt.pt").write_bytes(b"PK")
    (tmp / "file").write_bytes(b"")
    write(tmp, {"text": TEXT, "latin.jsonl": b'{"text": "caf\xe9"}', "moved-1/x": "",
                "moved-2/x": "", "x.jsonl": '{"text": "a"}\n{"txt": "b"}\n'})
    return tmp


# script, exit code, arguments | words of the message. {run}: a finished run, {new}: a free name.
# train and its data set, model and folder where no argument says otherwise.
REFUSED = """
train 2 --n_layr=2                                            | --n_layr
train 2 --n_layer=two                                         | --n_layer 'two'
train 2 --rope=maybe                                          | --rope maybe
train 2 config/train_gpt2.py                                  | config/train_gpt2.py
train 2 --n_embd=30 --n_head=4                                | n_embd=30 n_head=4
train 2 --n_kv_head=1                                         | n_kv_head gqa
train 2 --window_size=4                                       | window_size sliding_window
train 2 --rope_theta=5                                        | rope_theta rope
train 2 --vocab_size=5                                        | vocab_size=5
train 2 --n_layer={digits}                                    | --n_layer
train 2 --dropout={digits}                                    | --dropout
train 2 --learning_rate=nan                                   | --learning_rate nan
train 2 --max_iters=-1                                        | --max_iters -1
train 2 --batch_size=0                                        | batch_size
train 2 --beta2=1.0                                           | beta2
train 2 --out_dir=                                            | --out_dir
train 2 --size=gpt3                                           | gpt3 gpt2-medium
train 2 --dtype=int8                                          | int8 bfloat16
train 2 --dtype=float16                                       | float16
train 2 --device=meta                                         | meta cuda
train 2 --device=cuda:99                                      | cuda:99
train 2 --compile=maybe                                       | --compile maybe
train 2 --optimizer=sgd                                       | sgd muon
train 2 --schedule=step                                       | step cosine
train 2 --fsdp                                                | --fsdp torchrun
train 2 --plot                                                | --plot
train 2 --eval_only                                           | --eval_only --init_from
train 2 --eval_only --init_from={run} --eval_stride=33        | eval_stride=33 32
train 2 --init_from=resume --out_dir={run} --n_layer=3        | n_layer=3 n_layer=2
train 2 --init_from=resume --out_dir={run} --seed=3           | seed=3 seed=1337
train 1 --init_from={run} --n_head=4                          | n_head=4
train 1 --init_from=gpt3                                      | 'gpt3' gpt2-xl
train 1 --init_from=some/where/model                          | some/where/model owner/name
train 1 --init_from=gpt2                                      | gpt2
train 1 --init_from=some/model                                | some/model
train 1 --init_from=resume                                    | no checkpoint --out_dir
train 1 --init_from={bad}/none.pt                             | none.pt
train 1 --init_from={bad}/ckpt.pt                             | ckpt.pt
train 1 --init_from={bad}/pickle                              | model.safetensors
train 1 --init_from={bad}/short                               | model.safetensors
train 1 --init_from={bad}/bpe                                 | 50257 12
train 1 --init_from={run} --dataset={bad}/other               | other 12 26
train 1 --dataset=nowhere                                     | nowhere prepare.py
train 1 --dataset={bad}/empty                                 | empty train.bin
train 1 --dataset={bad}/nanogpt                               | meta.pkl
train 1 --dataset={bad}/half                                  | train.bin
train 1 --dataset={bad}/wide                                  | 999 vocabulary
train 1 --block_size=2000                                     | train.bin 2,001
train 1 --out_dir={bad}/file                                  | {bad}/file
train 1 --plot={bad}/empty                                    | metrics.jsonl
sample 2 --strat=x                                            | --strat
sample 2 --top_p=0.0                                          | top_p=0
sample 2 --temperature=-1.0                                   | --temperature -1.0
sample 2 --max_new_tokens=0                                   | max_new_tokens=0
sample 2 --num_samples=0                                      | num_samples=0
sample 2 --dtype=int8                                         | int8 bfloat16
sample 2 --device=gpu                                         | gpu cuda
sample 2 --out_dir={run} --start=a --stop_at_eot              | end-of-text
sample 1 --out_dir={run} --start=a --block_size=99            | 99 32
sample 1 --out_dir={run} --start=a --window_size=4            | window_size sliding_window
sample 1 --out_dir={run} --start=abZ                          | 'Z' 12
sample 1 --out_dir={run} --start=FILE:{bad}/none              | {bad}/none
sample 1 --out_dir={run} --start=FILE:{bad}/latin.jsonl       | UTF-8
sample 1 --out_dir={bad}/empty                                | no checkpoint --init_from=gpt2
sample 1 --out_dir={bad}/moved                                | no checkpoint moved-1 moved-2
sample 1 --out_dir={bad}/pickle                               | model.safetensors
sample 1 --out_dir={bad}/bpe                                  | bpe 50257 12
sample 1 --init_from=gpt3                                     | 'gpt3' gpt2-xl owner/name
sample 1 --init_from=gpt2                                     | gpt2/resolve/main HTTPS_PROXY
data/prepare 2                                                | required what
data/prepare 2 shakespeare_chr                                | shakespeare_chr tinystories
data/prepare 2 stdlib {bad}/text                              | 'stdlib'
data/prepare 2 stdlib --tokenizer=char                        | --tokenizer stdlib
data/prepare 2 {bad}/text                                     | --name=
data/prepare 2 {bad}/text --name=stdlib                       | --name=stdlib
data/prepare 2 {bad}/text --name=../x                         | --name=../x
data/prepare 2 {bad}/text --name=..                           | --name=..
data/prepare 2 {bad}/text --name=x --val_frac=2               | val_frac=2
data/prepare 2 {bad}/text --name=x --tokenizer=bpe            | bpe gpt2 char
data/prepare 2 {bad}/x.jsonl --name=x --pairs=text            | --pairs=text PROMPT,COMPLETION
data/prepare 1 {bad}/text --name=x --pairs                    | --pairs .jsonl
data/prepare 1 {bad}/x.jsonl --name=x --tokenizer=char        | {bad}/x.jsonl line 2 text --field
data/prepare 1 {bad}/x.jsonl --name=x --tokenizer=char --pairs=text,b | x.jsonl line 1 b --pairs
data/prepare 1 {bad}/latin.jsonl --name=x --tokenizer=char    | no text
data/prepare 1 {bad}/file --name=x --tokenizer=char           | no text
data/prepare 1 {bad}/text --name=x                            | TIKTOKEN_CACHE_DIR 6d1cbeee0f20
data/prepare 1 shakespeare_char --source={bad}/none           | {bad}/none
data/prepare 1 fineweb --shards=104                           | --shards=104 103
data/prepare 1 fineweb --shards=0                             | --shards=0
""".strip().splitlines()


@pytest.mark.parametrize("row", REFUSED)
def test_a_mistake_gets_one_line(tiny, whole, bad, row):
    names = dict(bad=bad, run=whole.out, digits="9" * 400)
    command, words = row.format(**names).split("|")
    script, code, *argv = command.split()
    how = {}
    if script == "train":
        how = dict(dataset=tiny.data, device="cpu", out_dir=tiny.folder / "out")
    nobody = "http://127.0.0.1:9"
    env = dict(HF_ENDPOINT=nobody, HTTPS_PROXY=nobody, https_proxy=nobody,
               HF_HOME=f"{tiny.folder}/hub", TIKTOKEN_CACHE_DIR=f"{tiny.folder}/bpe")
    before = times_of_files(bad)
    line = tiny.refuses(script, *argv, code=int(code), env=env, before=do_not_sleep, **how)
    for word in words.split():
        assert word in line
    assert len(line) < 1000 and times_of_files(bad) == before
    assert not (tiny.folder / "out").exists()


def times_of_files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def do_not_sleep():
    """Attempts to download follow each other at once."""
    time.sleep = int


@pytest.mark.parametrize("ranks, argv, words", [
    (3, [], ["gradient_accumulation_steps=4", "3"]), (2, ["--backend=foo"], ["foo", "gloo"]),
    (2, ["--device=cuda:1"], ["cuda:1"])], ids=str)
def test_a_mistake_under_torchrun_gets_one_line_from_each_process(tiny, ranks, argv, words):
    run = tiny.start_training(*argv, ranks=ranks).end(code=None, timeout=20)
    assert 0 not in run.codes
    for line in run.stderr.splitlines():
        assert line.startswith(("usage", "train.py: "))
    assert all(word in run.stderr for word in words)


# --------------------------------------------------------------------------------------------------
# Torture: kills, a full disk and a read-only one, at every disk call of a run

DISK_CALLS = ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def at_disk_calls(folder, act):
    """Call act(n) before this process changes something in `folder` for the n-th time."""
    count = itertools.count(1)

    def hook(event, args):
        reads = event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if event in DISK_CALLS and not reads and str(args[0]).startswith(f"{folder}/"):
            act(next(count))
    sys.addaudithook(hook)


def snapshots(folder, n):
    """What a kill would leave here."""
    shutil.copytree(folder, f"{folder}.{n}")


def disk_fails(number, error, n):
    """The disk is full (ENOSPC) at one call, or read-only from it on."""
    if n == number or error == errno.EROFS and n >= number:
        raise OSError(error, os.strerror(error))


@pytest.fixture
def moments(cut):
    """A run, and what it left behind at each of its disk calls after a resume: as a kill would."""
    folder = cut.out
    cut.resume(before=partial(at_disk_calls, folder, partial(snapshots, folder)))
    count = len(list(folder.parent.glob("copy.*")))
    return [Run(cut.tiny, folder.with_name(f"copy.{n}")) for n in range(1, count + 1)]


@pytest.mark.parametrize("every", [10, slow(1)])
def test_a_kill_at_any_disk_call_loses_nothing(moments, whole, every):
    assert len(moments) > 20
    for moment in moments[::every]:
        moment.resume(init_from="auto")
        assert moment.result == whole.result, moment.out
        assert not list(moment.out.glob("*.part"))


def test_a_reader_sees_a_whole_model_at_any_moment(moments, cut, whole):
    """Weights of one step with the validation loss of this step, also by transformers."""
    found = set()
    for moment in moments:
        loss = validation_loss(moment)
        (step,) = [step for step, known in zip((0, 3, 6, 9), whole.val_losses, strict=True)
                   if loss == pytest.approx(known, rel=2e-5)]
        theirs = transformers.GPT2LMHeadModel.from_pretrained(moment.out)
        ours = GPT2.from_pretrained(moment.out)
        assert torch.equal(theirs.transformer.wte.weight, ours.transformer.wte.weight)
        found.add(step)
    assert found == {3, 6, 9}


def test_readers_of_a_run_change_nothing(tiny, moments):
    moment = moments[len(moments) // 2]
    before = files_of(moment.out)
    tiny.sample(out_dir=moment.out, start="a", max_new_tokens=3)
    moment.resume("--eval_only", dataset=tiny.data)
    assert files_of(moment.out) == before


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
@pytest.mark.parametrize("every", [45, slow(1)])
def test_a_disk_that_fails_at_any_call_loses_nothing(tiny, first_cut, moments, whole, error, every):
    for number in range(1, len(moments), every):
        run = first_cut.copy(tiny, str(number))
        fails = partial(disk_fails, number, error)
        done = run.resume(code=None, before=partial(at_disk_calls, run.out, fails))
        if done.codes != [0]:                                    # without loss.svg it ends well
            assert done.codes == [1] and os.strerror(error) in done.stderr, done.stderr
            assert done.stderr.count("\n") == 1
            last = re.findall(r"is of step (\d+)", done.stderr)
            assert set(last) <= {str(run.checkpoint["step"])}, done.stderr
        run.resume(init_from="auto")
        assert run.result == whole.result


@pytest.mark.parametrize("size, ranks", [(900, 0), (50_000, 0), (150_000, 2)])
def test_a_disk_that_is_full_in_the_middle_of_a_file_loses_nothing(cut, whole, size, ranks):
    """metrics.jsonl, the model, or the checkpoint."""
    before = cut.checkpoint
    done = cut.resume(before=partial(limit_files, size), ranks=ranks, code=1)
    assert "step 3" in done.stderr and "Traceback" not in done.stderr
    assert as_bytes(cut.checkpoint) == as_bytes(before) and not list(cut.out.glob("*.part"))
    cut.resume()
    assert cut.result == whole.result


@pytest.mark.parametrize("size", [slow(900), slow(50_000), 150_000])
def test_a_kill_in_the_middle_of_a_file_loses_nothing(cut, whole, size):
    cut.resume(before=partial(limit_files, size, signal.SIG_DFL), code=-signal.SIGXFSZ)
    cut.resume()
    assert cut.result == whole.result


def test_a_kill_during_the_move_of_an_old_run_loses_nothing(tiny, cut):
    folder = tiny.folder / "runs"
    folder.mkdir()
    cut.out.rename(folder / "out")
    before = files_of(folder / "out")
    tiny.train(out_dir=folder / "out", max_iters=2,
               before=partial(at_disk_calls, folder, partial(snapshots, folder)))
    states = [files_of(state) for state in tiny.folder.glob("runs.*")]
    places = [[name for name in ("out", "out-1") if has_all(state, name, before)]
              for state in states]
    assert [("out",), ("out-1",)] == sorted({tuple(place) for place in places})


def has_all(state, name, files):
    return all(state.get(f"{name}/{path}") == content for path, content in files.items())


def damage(path, how):
    content = path.read_bytes()
    changed = {"empty": b"", "short": content[:-50], "text": b"x" * 5000,
               "a bit": content[:3000] + bytes([content[3000] ^ 1]) + content[3001:]}
    path.write_bytes(changed[how])


@pytest.mark.parametrize("how", ["empty", "short", "text", "a bit", "code", "list"])
def test_a_damaged_checkpoint_is_one_line_with_the_one_before_it(cut, how):
    path = cut.out / "checkpoint.pt"
    shutil.copy(path, cut.out / "checkpoint.previous.pt")
    values = {"code": Malicious(str(cut.out / "ran")), "list": [1]}
    if how in values:
        torch.save(values[how], path)
    else:
        damage(path, how)
    line = cut.tiny.refuses("train", out_dir=cut.out, init_from="resume", device="cpu")
    assert str(path) in line and "checkpoint.previous.pt" in line
    assert not (cut.out / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kills, how", [
    (60, {}), (10, dict(ranks=2)), (10, dict(ranks=2, fsdp=True))], ids=str)
def test_random_kills_lose_nothing(tiny, kills, how):
    chance = random.Random(0)
    how = dict(dropout=0.1, init_from="auto", **how)
    straight = tiny.train(out="straight", **how)
    began = time.time()
    tiny.train(out="again", **how)
    seconds = time.time() - began
    for n in range(kills):
        run = tiny.start_training(out=str(n), **how)
        time.sleep(chance.uniform(0.2, 1) * seconds)
        run.kill()
        tiny.train(out=str(n), **how)
        assert run.result == straight.result
        shutil.rmtree(run.out)


# --------------------------------------------------------------------------------------------------
# Torture: other programs open what a run leaves


@pytest.fixture
def client_run(tiny):
    """A model of GPT-2's tokens, with random weights: a trained one repeats a word. Its validation
    text is some whole samples."""
    table = GPT2Tokenizer()
    folder = tiny.folder / "set"
    folder.mkdir()
    ids = table.encode(TEXT)
    ids[2000:].tofile(folder / "train.bin")
    np.append(np.uint16(table.end_of_text), ids[:320]).tofile(folder / "val.bin")
    (folder / "meta.json").write_text(json.dumps(table.to_json()))
    return tiny, table, ids[:320]


CLIENTS = [{}, dict(bias=False), dict(gqa=True), dict(rope=True), ALL]


@needs_bpe
@pytest.mark.slow
@pytest.mark.parametrize("how", CLIENTS, ids=str)
def test_lm_evaluation_harness_measures_what_eval_only_does(client_run, how):
    lm_eval = pytest.importorskip("lm_eval", reason='pip install "lm_eval[hf]"')
    tiny, table, ids = client_run
    run = tiny.train(dataset=tiny.folder / "set", max_iters=2, eval_iters=0, **how)
    text = table.decode(ids.tolist())
    (tiny.folder / "val.jsonl").write_text(json.dumps({"text": text}))
    task = {"task": "val", "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(tiny.folder / "val.jsonl")}},
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}]}
    results = lm_eval.simple_evaluate("hf", f"pretrained={run.out},dtype=float32", tasks=[task],
                                      device="cpu", bootstrap_iters=0)
    bits = results["results"]["val"]["bits_per_byte,none"]
    expected = run.val_losses[-1] * len(ids) / math.log(2) / len(text.encode())
    assert bits == pytest.approx(expected, rel=1e-4)


@needs_bpe
@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, dict(bias=False), dict(gqa=True)], ids=str)
def test_ctranslate2_writes_the_same_tokens(tmp_path, how):
    ctranslate2 = pytest.importorskip("ctranslate2", reason="pip install ctranslate2")
    table = GPT2Tokenizer()
    model = small_model(vocab_size=table.vocab_size, block_size=128, **how)
    model.save_pretrained(tmp_path / "model", table)
    converter = ctranslate2.converters.TransformersConverter(str(tmp_path / "model"))
    converter.convert(str(tmp_path / "converted"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    prompt = tokenizer.convert_ids_to_tokens(tokenizer.encode("The"))
    generator = ctranslate2.Generator(str(tmp_path / "converted"))
    (result,) = generator.generate_batch([prompt], sampling_topk=1, max_length=100)
    ours = model.generate(table.encode("The"), 100, temperature=0)
    assert tokenizer.decode(result.sequences_ids[0]) == table.decode(ours[0].tolist())
