"""
Trains a GPT-2. One device, DDP or FSDP: the script sees by itself which.

    python train.py                                           # Python's source
    torchrun --standalone --nproc_per_node=4 train.py         # DDP: all in each
    torchrun --standalone --nproc_per_node=4 train.py --fsdp  # FSDP: 1/4 each
    python train.py --init_from=resume                        # goes on in out
    python train.py --init_from=gpt2 --dataset=shakespeare    # fine-tunes
    python train.py --help                                    # every flag

What is computed at a step is a function of the flags, the seed and the step
alone. Neither the number of processes, nor the mode, nor a stop in between
changes it (beyond the order in which floating point numbers are added).
"""
import codecs
import ctypes
import glob
import json
import math
import os
import shlex
import shutil
import signal
import sys
import textwrap
import time
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from data.prepare import DATA, DATASETS, Tokenizer, command_line, guarded, open_tokens, out_of_memory, refuse
from model import GPT2, SIZES, GPT2Config, Progress, convert, flag, read_pretrained, read_safetensors, write_safetensors

# ---------------------------------------------------------------------------------------------------------------------
# The flags. GPT2Config's are added to them.


@dataclass
class Run:
    """runtime: belongs to the machine and the moment, so a resumed run does not take it over from the checkpoint."""
    init_from: str = flag("scratch", "scratch, resume, auto (resume if out_dir has a checkpoint, else scratch), "
                          f"{', '.join(SIZES)}, or a folder with a checkpoint", runtime=True)
    out_dir: str = flag("out", "folder for checkpoint, metrics.jsonl and loss.svg", runtime=True)
    dataset: str = flag("stdlib", f"{', '.join(DATASETS)}, a name you gave to data/prepare.py, or a folder with token files")
    seed: int = flag(1337, "of initial weights, data order and dropout")
    batch_size: int = flag(4, "texts of block_size tokens that one process computes at a time")
    gradient_accumulation_steps: int = flag(4, "such batches in a step, over all processes together")
    max_iters: int = flag(1400, "steps")
    learning_rate: float = flag(3e-3, "highest learning rate")
    decay_lr: bool = flag(True, "warm up, then decay along a cosine")
    warmup_iters: int = flag(50, "steps of warm-up")
    lr_decay_iters: int = flag(None, "step at which min_lr is reached [max_iters]")
    min_lr: float = flag(None, "lowest learning rate [learning_rate / 10]")
    weight_decay: float = flag(0.1, "AdamW's, on matrices only")
    beta1: float = flag(0.9, "AdamW's")
    beta2: float = flag(0.99, "AdamW's")
    grad_clip: float = flag(1.0, "largest gradient norm, 0 = unlimited")
    grad_checkpoint: bool = flag(False, "recompute blocks in the backward pass: less memory, more time", runtime=True)
    eval_interval: int = flag(200, "steps between evaluations, each followed by a checkpoint")
    eval_iters: int = flag(20, "batches of training and of validation data in an evaluation, all processes together")
    eval_only: bool = flag(False, "measure the validation data, all of it or --eval_iters batches, and stop", runtime=True)
    eval_stride: int = flag(None, "with --eval_only: tokens that a window scores, given all before [block_size]", runtime=True)
    benchmark: bool = flag(False, "time some steps, part by part, and stop; writes nothing", runtime=True)
    always_save_checkpoint: bool = flag(True, "False: save only when the validation loss is the best so far")
    log_interval: int = flag(10, "steps between lines in the log and in metrics.jsonl")
    fsdp: bool = flag(False, "shard weights, gradients and optimizer over the processes of torchrun", runtime=True)
    backend: str = flag(None, "of torch.distributed [nccl on GPUs, else gloo]", runtime=True)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps", runtime=True)
    dtype: str = flag("auto", "auto, float32, bfloat16, float16", runtime=True)
    compile: str = flag("auto", "torch.compile: auto, True, False", runtime=True)
    tensorboard: bool = flag(False, "log to out_dir/tensorboard too", runtime=True)
    wandb: bool = flag(False, "log to Weights & Biases too", runtime=True)
    plot: str = flag(None, "only draw: out_dir's loss.svg, or --plot=out1,out2 over each other in ./comparison.svg", runtime=True)


# Without --init_from the model is small enough to learn something on a CPU in minutes. From trained weights the steps
# are few and gentle, and the best model is kept.
SMALL = dict(block_size=128, n_layer=4, n_head=4, n_embd=128)
FINETUNE = dict(dropout=0.1, learning_rate=3e-5, warmup_iters=10, max_iters=200, batch_size=4, gradient_accumulation_steps=8,
                eval_interval=20, eval_iters=10, log_interval=1, always_save_checkpoint=False)
SHAPE = {f.name: f for f in fields(GPT2Config)}
RUN = {f.name: f for f in fields(Run)}


def options():
    def kind(f):
        return next(t for t in (bool, int, float, str) if t.__name__ in str(f.type).replace("<class '", ""))
    shown = {f.name: f.default for f in (*RUN.values(), *SHAPE.values())} | SMALL | dict(vocab_size=None, plot="")
    return {name: (kind(f), shown[name], f.metadata["help"]) for name, f in {**RUN, **SHAPE}.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The processes that share the work


class Agreed(ValueError):
    """An error that every process knows of, so that one of them tells it."""


class Team:
    """This process among those that torchrun started, or alone. All that needs torch.distributed is in this section."""

    def __init__(self):
        self.distributed = "RANK" in os.environ
        self.rank, self.size, self.local_rank, self.local_size = (
            int(os.environ.get(name, default)) for name, default in
            (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
        self.chief = self.rank == 0

    def join(self, device, backend):
        """Small messages travel over gloo, tensors over `backend`; a wait may last as long as a download."""
        if self.distributed:
            known = ("nccl", "gloo") if device.type == "cuda" else ("gloo",)
            if (backend := backend or known[0]) not in known:
                refuse(f"--backend={backend} does not serve {device.type}: use {' or '.join(known)}")
            backend = f"cpu:gloo,cuda:{backend}" if device.type == "cuda" else backend
            # A restart by torchrun finds the store as the dead processes left it, with their addresses (pytorch's issue
            # 135712), so each attempt writes under its own number; with several machines their counts may differ.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if self.local_size == self.size else ""
            store = dist.PrefixStore(attempt, next(dist.rendezvous("env://"))[0])
            dist.init_process_group(backend, timeout=timedelta(minutes=10), store=store, rank=self.rank, world_size=self.size)
            self.patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))
            dist.barrier(self.patient)                                     # who leaves early must not cut others' handshakes

    def say(self, *words):
        if self.chief:
            print(*words, flush=True)

    def tell(self, **topics):
        """A topic a line, wrapped where 80 columns end."""
        for name, text in topics.items():
            self.say(textwrap.fill(f"{name:10}{text}", 80, subsequent_indent=" " * 10, break_long_words=False,
                                   break_on_hyphens=False))

    def agree(self, work):
        """work()'s result; if it fails in any process, all of them stop."""
        result = error = None
        try:
            result = work()
        except (ValueError, OSError) as e:
            error = str(e) or type(e).__name__
        if self.distributed:
            errors = [None] * self.size
            dist.all_gather_object(errors, error, group=self.patient)
            told = [(rank, e) for rank, e in enumerate(errors) if e]
            error = told and told[0][1] + ("" if len(told) == self.size else f" (process {told[0][0]} of {self.size})")
        if error:
            raise Agreed(error)
        return result

    def one_first(self, work):
        """Process 0 works, then the first of every other machine (which finds all done if they share a disk)."""
        self.agree(lambda: self.chief and work())
        self.agree(lambda: self.local_rank == 0 and work())

    def same(self, what, value):
        """ValueError unless `value` is that of process 0."""
        if self.distributed:
            values = [None] * self.size
            dist.all_gather_object(values, value, group=self.patient)
            odd = [rank for rank, v in enumerate(values) if v != values[0]]
            if odd:
                raise Agreed(f"{what}: process {odd[0]} of {self.size} has {values[odd[0]]}, process 0 has {values[0]}")

    def total(self, values, device):
        """The sum over all processes of a few numbers, as Python floats; the one point where a step waits for the GPU."""
        values = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=device).detach() for v in values])
        if self.distributed:
            dist.all_reduce(values)
        return values.tolist()

    def prepare(self, model, device, fsdp, bf16, compiled):
        """A model without weights (on the meta device) -> the same, sharded or not, with room for them."""
        if fsdp:
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
            mesh = dist.init_device_mesh(device.type, (self.size,))
            half = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else {}
            policy = MixedPrecisionPolicy(**half)
            for block in model.transformer.h:
                if compiled:
                    block.compile()                                        # in place: parameter names stay as they are
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)                # the root holds the embeddings
        elif compiled:
            model.compile()
        return model.to_empty(device=device)

    def wrap(self, model, fsdp):
        if fsdp or not self.distributed:
            return model
        return torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

    @staticmethod
    def set_sync(net, last):
        """Gradients are exchanged only in the last batch of a step. To be called before its forward pass."""
        if isinstance(net, torch.nn.parallel.DistributedDataParallel):
            net.require_backward_grad_sync = last
        elif hasattr(net, "set_requires_gradient_sync"):
            net.set_requires_gradient_sync(last)

    def leave(self):
        if dist.is_initialized():
            dist.destroy_process_group()


def gathered(t):
    """The whole of a tensor that may be sharded. Every process must call it."""
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach()


@torch.no_grad()
def fill(tensor, whole):
    """Copies `whole`, or this process's shard of it, into `tensor`."""
    if isinstance(tensor, DTensor):
        whole = distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor, whole = tensor.to_local(), whole.to_local()
    tensor.copy_(whole)


# ---------------------------------------------------------------------------------------------------------------------
# Data


class Tokens(Dataset):
    """Token files cut into windows of block_size tokens. Item i: x and y, (T,) int64, y being x one token later.
    Reads raw uint16 (nanoGPT's) and llm.c's shards; the files are mapped, so they may be larger than memory."""

    def __init__(self, paths, block_size, vocab_size, expected=None):
        self.T, self.V, self.paths = block_size, vocab_size, paths
        self.files = [open_tokens(path) for path in paths]
        self.tokens = sum(map(len, self.files))
        if expected is not None and self.tokens != expected:
            raise ValueError(f"{paths[0]} holds {self.tokens:,} tokens, meta.json says {expected:,}: it is half written, "
                             "prepare it anew")
        self.ends = np.cumsum([max(0, len(f) - 1) // block_size for f in self.files])
        if not len(self):
            raise ValueError(f"{paths[0]} holds {self.tokens:,} tokens, fewer than one window of block_size={block_size} and one "
                             f"more: use a smaller --block_size or more text")
        for i in {0, len(self) - 1}:
            self[i]

    def fingerprint(self):
        """Tells two data sets apart without reading them whole: tokens, and a checksum of some of each file and its size."""
        crc = 0
        for f in self.files:
            crc = zlib.crc32(np.append(f[::max(1, len(f) // 20)], len(f)), crc)
        return f"{self.tokens:,} tokens (checksum {crc:08x})"

    def __len__(self):
        return int(self.ends[-1])

    def read(self, file, start, end):
        ids = self.files[file][start:end]
        if ids.max() >= self.V:
            raise ValueError(f"{self.paths[file]} holds token {ids.max()}, beyond the vocabulary of {self.V}: "
                             "it was made with another tokenizer")
        return ids

    def spans(self, stride):
        """Rows (file, begin, first, end): windows tokens[begin:end], `stride` apart, to predict the tokens from `first`
        on, which the window before did not reach. Of each file, all tokens but the first, once."""
        rows = []
        for file, tokens in enumerate(self.files):
            ends = np.minimum(np.arange(self.T + 1, max(self.T + 2, len(tokens) + stride), stride), len(tokens))
            begins, firsts = stride * np.arange(len(ends)), np.append(1, ends[:-1])
            rows.append(np.stack([np.full_like(ends, file), begins, firsts, ends]))
        rows = np.concatenate(rows, axis=1).T
        return rows[rows[:, 2] < rows[:, 3]]

    def __getitem__(self, i):
        x, y = self.__getitems__([i])
        return x[0], y[0]

    def __getitems__(self, indices):
        windows = np.empty((len(indices), self.T + 1), dtype=np.int64)
        for row, i in zip(windows, indices, strict=True):
            file = int(np.searchsorted(self.ends, i, side="right"))
            start = (i - (int(self.ends[file - 1]) if file else 0)) * self.T
            row[:] = self.read(file, start, start + self.T + 1)
        windows = torch.from_numpy(windows)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


class Order(DistributedSampler):
    """torch's DistributedSampler, begun at any point and without an end: the epochs' permutations follow each other as
    one line of windows, of which process r of R takes every R-th. So a step reads the same windows whatever R is, each
    window comes once an epoch, and the place in the line is one number: windows consumed, by all processes together.
    Of several files the order is shuffled, and the windows within each: reads stay local, and memory small."""

    def __init__(self, dataset, team, seed, consumed):
        super().__init__(dataset, team.size, team.rank, shuffle=True, seed=seed)
        self.consumed, self.bounds = consumed, [0, *map(int, getattr(dataset, "ends", [len(dataset)]))]

    def __iter__(self):
        consumed, n, files = self.consumed, len(self.dataset), len(self.bounds) - 1
        while True:
            self.set_epoch(consumed // n)
            generator, start = torch.Generator().manual_seed(self.seed + self.epoch), self.epoch * n
            for file in torch.randperm(files, generator=generator).tolist() if files > 1 else [0]:
                low, high = self.bounds[file:file + 2]
                order = low + torch.randperm(high - low, generator=generator)
                first = max(consumed - start, 0)
                for i in order[first + (self.rank - start - first) % self.num_replicas::self.num_replicas]:
                    yield int(i)
                start += high - low
            consumed = start


def find_data(name):
    """-> (folder, {"train": [paths], "val": [paths]}) of a data set that has been prepared."""
    folder = os.path.join(DATA, name)                                      # a bare name means what was prepared under it
    if os.path.isdir(name) and (os.path.dirname(name) or not glob.glob(os.path.join(glob.escape(folder), "*.bin"))):
        folder = name
    found = {split: sorted(glob.glob(os.path.join(glob.escape(folder), f"*{split}*.bin"))) for split in ("train", "val")}
    for split, paths in found.items():
        if not paths:
            raise FileNotFoundError(f"data set {name!r}: there is no {split}.bin in {folder}: run python data/prepare.py "
                                    + (name if name in DATASETS else f"PATH... --name={name}"))
    return folder, found


def token_counts(folder):
    """What meta.json says of the token files, {} if nothing."""
    try:
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
            counts = json.load(f).get("tokens", {})
    except FileNotFoundError:
        return {}
    if not isinstance(counts, dict) or not all(type(n) is int for n in counts.values()):
        raise ValueError(f"{f.name} is damaged: its tokens are no numbers, a split each: prepare the data anew")
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints. The files of a step are written to .saving, which then becomes .saved in one rename: from there on the
# checkpoint is complete, and moving its files into out_dir can be repeated after whatever interrupts it.

FILES = ("config.json", "meta.json", "model.safetensors", "training_state.pt")


def settle(out_dir):
    """Finishes an interrupted save: a complete one is moved into place, an incomplete one removed. The checkpoint that
    was there goes to out_dir/previous."""
    shutil.rmtree(os.path.join(out_dir, ".saving"), ignore_errors=True)
    saved, previous = os.path.join(out_dir, ".saved"), os.path.join(out_dir, "previous")
    if not os.path.isdir(saved):
        return
    os.makedirs(previous, exist_ok=True)
    for name in FILES:
        new, here, old = (os.path.join(folder, name) for folder in (saved, out_dir, previous))
        if os.path.exists(new):
            if os.path.exists(here):
                if os.path.exists(old):
                    os.remove(old)
                try:
                    os.link(here, old)                                     # so that the file never misses in out_dir
                except OSError:
                    os.replace(here, old)
            os.replace(new, here)
    shutil.rmtree(os.path.join(out_dir, "stopped"), ignore_errors=True)    # it was of an earlier step
    os.rmdir(saved)


def set_aside(out_dir):
    """Moves the run that a new one would write over to out_dir/previous_run -> that folder, None if there is no run.
    The training state goes first, so that half of a checkpoint is never resumed; the weights last, so that what a kill
    interrupted goes on next time."""
    settle(out_dir)
    if not os.path.exists(os.path.join(out_dir, "model.safetensors")):
        return None
    kept = os.path.join(out_dir, "previous_run")
    if os.path.exists(os.path.join(out_dir, "training_state.pt")):         # nothing has been moved yet
        shutil.rmtree(kept, ignore_errors=True)
    os.makedirs(kept, exist_ok=True)
    for name in ("training_state.pt", "stopped", "config.json", "meta.json", "metrics.jsonl", "loss.svg", "previous",
                 "model.safetensors"):
        if os.path.exists(os.path.join(out_dir, name)):
            shutil.rmtree(os.path.join(kept, name), ignore_errors=True)    # a folder cannot be written over
            os.replace(os.path.join(out_dir, name), os.path.join(kept, name))
    return kept


def save(team, out_dir, config, parameters, optimizer, tokenizer, state):
    """Writes the checkpoint of state["step"]. Every process must call it; process 0 writes, a tensor at a time."""
    folder = os.path.join(out_dir, ".saving")
    tensors = (gathered(p).cpu() for p in parameters.values())

    def write(name, text):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
            f.write(json.dumps(text, indent=2))
            f.flush()
            os.fsync(f.fileno())

    def write_weights():
        os.makedirs(out_dir, exist_ok=True)
        settle(out_dir)
        os.makedirs(folder)
        write("config.json", config.to_json())
        write("meta.json", tokenizer.to_json())
        write_safetensors(os.path.join(folder, "model.safetensors"), parameters, tensors, {"step": str(state["step"])})

    def write_state():
        with open(os.path.join(folder, "training_state.pt"), "wb") as f:
            torch.save({**state, "optimizer": moments}, f)
            f.flush()
            os.fsync(f.fileno())
        os.rename(folder, os.path.join(out_dir, ".saved"))
        settle(out_dir)

    def attempt(work):
        try:
            work()
        except (OSError, RuntimeError) as e:                               # torch.save buries the disk's error in its own
            shutil.rmtree(folder, ignore_errors=True)
            reason = isinstance(e, RuntimeError) and e.__context__ or e
            raise OSError(f"the checkpoint of step {state['step']} cannot be saved in {out_dir}: {reason}; "
                          "the one before it is untouched") from None
        finally:
            for _ in tensors:                                              # the other processes are gathering too
                pass
    team.agree(lambda: attempt(write_weights if team.chief else lambda: None))
    moments = {}
    for name, p in parameters.items():
        whole = {key: gathered(v).cpu() for key, v in optimizer.state[p].items()}
        if team.chief:
            moments[name] = whole
    team.agree(lambda: attempt(write_state if team.chief else lambda: None))


def latest(run):
    """The folder that a run goes on from. With --always_save_checkpoint=False out_dir holds the best checkpoint, and what
    an interruption cut short lies in out_dir/stopped; who only looks at the model looks at the best."""
    stopped = os.path.join(run.out_dir, "stopped")
    ahead = os.path.exists(os.path.join(stopped, "training_state.pt")) and not (run.eval_only or run.benchmark)
    return stopped if ahead else run.out_dir


def load_state(out_dir):
    """training_state.pt, mapped; ValueError if it is damaged or of another step than the weights beside it."""
    path, previous = os.path.join(out_dir, "training_state.pt"), os.path.join(out_dir, "previous")
    cure = (f"; the checkpoint before it is in {previous}: copy its files to {out_dir} to go on from there"
            if os.path.exists(os.path.join(previous, "training_state.pt")) else "")
    try:
        _, metadata = read_safetensors(os.path.join(out_dir, "model.safetensors"))
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        step = state["step"]
        assert {"windows", "best_val_loss", "evaluated", "scaler", "run", "optimizer"} <= state.keys()
    except OSError as e:
        raise FileNotFoundError(f"{e}{cure}") from None
    except Exception as e:                                                 # whatever a damaged archive makes torch raise
        reason = str(e) if isinstance(e, ValueError) else f"{path} is damaged ({type(e).__name__})"
        raise ValueError(reason + cure) from None
    if metadata.get("step") != str(step):
        raise ValueError(f"{out_dir}: the weights are of step {metadata.get('step')}, training_state.pt is of step {step}{cure}")
    return state


def restore(optimizer, parameters, saved):
    """The optimizer's moments, or this process's shards of them."""
    for name, p in parameters.items():
        state = saved.get(name)
        if state == {}:                                                    # float16's first steps may all have overflowed
            continue
        if not state or any(getattr(state.get(key), "shape", None) != shape for key, shape in
                            (("step", ()), ("exp_avg", p.shape), ("exp_avg_sq", p.shape))):
            raise ValueError(f"training_state.pt has no optimizer state that fits {name}")
        optimizer.state[p] = {"step": state["step"].clone().to(p.device if optimizer.defaults["fused"] else "cpu")}
        for key in ("exp_avg", "exp_avg_sq"):
            optimizer.state[p][key] = torch.zeros_like(p)
            fill(optimizer.state[p][key], state[key])


# ---------------------------------------------------------------------------------------------------------------------
# What a person sees


class Log:
    """metrics.jsonl, one aligned line a step on the screen, and TensorBoard or Weights & Biases if asked for."""

    def __init__(self, run, config, step):
        """step: of the checkpoint that the run goes on from, or None."""
        self.run, self.path = run, os.path.join(run.out_dir, "metrics.jsonl")
        self.live, self.width = sys.stdout.isatty(), 0
        self.sinks = []
        if run.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(os.path.join(run.out_dir, "tensorboard"), purge_step=step or 0)
            self.sinks.append(lambda r: [writer.add_scalar(k, v, r["step"]) for k, v in r.items() if k != "step"])
        if run.wandb:
            import wandb
            try:
                wandb.init(project="gpt2", name=run.out_dir, config={**asdict(run), **asdict(config)})
            except Exception as e:                                         # of its own kinds
                raise ValueError(f"--wandb cannot begin: {e}") from None
            self.sinks.append(lambda r: wandb.log(r, step=r["step"]))
        kept = [json.dumps(record) for record in read_metrics(run.out_dir) if record["step"] <= step] if step is not None else []
        try:
            os.makedirs(run.out_dir, exist_ok=True)
            with open(self.path + ".part", "w") as f:                      # what came after the checkpoint comes again
                f.writelines(line + "\n" for line in kept)
            os.replace(self.path + ".part", self.path)
            self.file = open(self.path, "ab", buffering=0)                 # nothing is left to be flushed later
        except OSError as e:
            raise OSError(f"--out_dir={run.out_dir} cannot be written ({e}): choose another") from None

    def record(self, **values):
        line = (json.dumps(values) + "\n").encode()
        try:
            while line:
                line = line[self.file.write(line):]
        except OSError as e:
            raise OSError(f"{self.path} cannot be written: {e}; the last checkpoint is untouched") from None
        for sink in self.sinks:
            sink(values)

    def line(self, text, stay=True):
        """In a terminal the line renews itself until one stays; a log file gets only those that stay."""
        if self.live:
            while len(text) >= shutil.get_terminal_size().columns and "  " in text:  # leave out the last fields
                text = text.rpartition("  ")[0].rstrip()
            print("\r" + text.ljust(self.width), end="\n" if stay else "", flush=True)
            self.width = 0 if stay else len(text)
        elif stay:
            print(text, flush=True)


def read_metrics(out_dir):
    """The records of metrics.jsonl; a line cut short by a crash, or not of numbers, is passed over."""
    records, path = [], os.path.join(out_dir, "metrics.jsonl")
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as f:
            for line in f:
                try:
                    record = json.loads(line)
                    if isinstance(record["step"], int) and all(type(v) in (int, float) for v in record.values()):
                        records.append(record)
                except (ValueError, TypeError, KeyError, RecursionError):
                    pass
    return records


def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def memory(device):
    """Peak memory of this process in bytes: the GPU's, or resident memory; 0 where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_flops(device, dtype):
    """What the device could do, in FLOP/s (dense, from the maker's data sheet), or None."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    peaks = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
             "4090": 165e12, "3090": 71e12, "A10": 125e12, "T4": 65e12, "V100": 125e12}
    return next((flops for part, flops in peaks.items() if part in name), None)


def plot(out_dirs, path, over="step"):
    """Loss curves over steps or tokens: training thin, validation with dots."""
    curves = []
    for out_dir in out_dirs:
        records = read_metrics(out_dir)
        train, val = ([(r[over], r[name]) for r in records if math.isfinite(r.get(name, math.inf))]
                      for name in ("loss", "val_loss"))
        if not train and not val:
            raise ValueError(f"{os.path.join(out_dir, 'metrics.jsonl')} holds no losses to draw: train first")
        n = math.ceil(len(train) / 640)                                    # of more points than pixels, the means
        train = [tuple(np.mean(train[i:i + n], axis=0)) for i in range(0, len(train), n or 1)]
        name = os.path.normpath(out_dir)
        name = "…" + name[-60:] if len(name) > 60 else name
        curves.append((name + (f", best validation {min(y for _, y in val):.4f}" if val else ""), train, val))
    points = [p for _, train, val in curves for p in train + val]
    x1 = max(x for x, _ in points)
    low = min(y for _, y in points)
    high = max(y for x, y in points if x >= x1 / 20 or x1 < 1000)          # a long run's first drop is cut off
    room = 0.05 * (high - low or 1)
    draw(path, curves, f"{over}{'s' * (over == 'step')} (thin: training, dots: validation)", "loss (nats per token)",
         low - room, high + room)


def draw(path, curves, x_axis, y_axis, low, high):
    """An SVG that any browser opens, light or dark. Of each curve, (name, points, points to mark with dots), a line in the
    legend; points are (x, y), y from `low` to `high`."""
    colors = ["#2f6fde", "#d9822b", "#2e9e5b", "#c23b5a", "#7d55c7", "#6b7280", "#0f9ba8", "#a3762a"]
    x1 = max(max(x for _, thin, marked in curves for x, _ in thin + marked), 1)
    X, Y, W, H = 64, 16, 672, 340                                          # the plot's place in the picture

    def at(x, y):
        return f"{X + W * x / x1:.1f},{Y + H * (high - y) / (high - low):.1f}"

    def ticks(lo, hi, least=0):
        size = 10 ** math.floor(math.log10(hi - lo))
        size = max(least, next(size * m for m in (0.1, 0.2, 0.25, 0.5, 1, 2) if (hi - lo) / (size * m) <= 7))
        return [k * size for k in range(math.ceil(lo / size), math.floor(hi / size) + 1)]
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {Y + H + 72 + 18 * len(curves)}" '
           'font-family="system-ui, sans-serif" font-size="12">',
           "<style>svg{background:#fff} text{fill:#222} .grid{stroke:#ddd} .axis{stroke:#222} @media (prefers-color-scheme:dark)"
           "{svg{background:#14161a} text{fill:#ddd} .grid{stroke:#333} .axis{stroke:#ddd}}</style>"]
    for y in ticks(low, high):
        px, py = at(0, y).split(",")
        svg.append(f'<path class="grid" d="M{px},{py}h{W}"/>'
                   f'<text x="{X - 8}" y="{float(py) + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in ticks(0, x1, 1):
        px = at(x, low).split(",")[0]
        svg.append(f'<path class="grid" d="M{px},{Y}v{H}"/><text x="{px}" y="{Y + H + 18}" text-anchor="middle">{x:,.10g}</text>')
    svg.append(f'<path class="axis" fill="none" d="M{X},{Y}v{H}h{W}"/>'
               f'<text x="{X + W / 2}" y="{Y + H + 40}" text-anchor="middle">'
               f'{x_axis}</text><text transform="translate(16 {Y + H / 2}) rotate(-90)" text-anchor="middle">{y_axis}</text>'
               f'<clipPath id="plot"><path d="M{X},{Y}h{W + 4}v{H + 4}h{-W - 4}"/></clipPath>')
    for i, (name, thin, marked) in enumerate(curves):
        color = colors[i % len(colors)]
        line = f'<polyline fill="none" stroke="{color}" stroke-width="{{}}" stroke-opacity="{{}}" points="{{}}"/>'
        svg += ['<g clip-path="url(#plot)">', line.format(1, 0.55, " ".join(at(*p) for p in thin)),
                line.format(2, 1, " ".join(at(*p) for p in marked))]
        dot = f'<circle cx="{{}}" cy="{{}}" r="3" fill="{color}"/>'
        svg += [*(dot.format(*at(*p).split(",")) for p in marked if len(marked) <= 100), "</g>"]
        y = Y + H + 64 + 18 * i
        name = name.replace("&", "&amp;").replace("<", "&lt;")
        svg.append(f'<path stroke="{color}" stroke-width="2" d="M{X},{y}h24"/>{dot.format(X + 12, y)}'
                   f'<text x="{X + 32}" y="{y + 4}">{name}</text>')
    with open(path + ".part", "w", encoding="utf-8") as f:
        f.write("\n".join(svg + ["</svg>\n"]))
    os.replace(path + ".part", path)


# ---------------------------------------------------------------------------------------------------------------------
# Choices made by the script, each told with its reason


def choose_device(name, team):
    why = "as asked"
    if name == "auto":
        name, why = (("cuda", "a GPU is there") if torch.cuda.is_available() else
                     ("mps", "Apple's GPU is there") if torch.backends.mps.is_available() and not team.distributed else
                     ("cpu", f"no {'CUDA ' * team.distributed}GPU is there"))
    device = torch.device(name)
    if device.index is not None and team.distributed:
        refuse(f"--device={name} names one GPU, but every process of torchrun takes its own: use --device=cuda")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if team.local_size > count or (device.index or 0) >= count:
            refuse(f"{team.local_size} processes on this machine, --device={name}, but {count} GPUs: "
                   f"use --nproc_per_node={max(count, 1)}, or --device=cpu")
        device = torch.device("cuda", team.local_rank if team.distributed else device.index or 0)
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32"
        why += f": {torch.cuda.get_device_name(device)}"
    elif device.type == "mps" and (team.distributed or not torch.backends.mps.is_available()):
        refuse("--device=mps serves one process, on a machine with an Apple GPU: use --device=cpu")  # gloo knows no mps
    elif device.type == "cpu":
        why += f", {torch.get_num_threads()} threads"
        keep_freed_memory()
    return device, why


def keep_freed_memory():
    """glibc gives large freed blocks back to the system, which the next step then pays for, page by page: 7 % of a step
    of GPT-2 124M. So none by mmap (M_MMAP_MAX = -4), and keep what is free (M_TRIM_THRESHOLD = -1)."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None:
        mallopt(-4, 0), mallopt(-1, 2**31 - 1)


def choose_dtype(run, device):
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if run.dtype != "auto" and run.dtype not in known:
        refuse(f"--dtype={run.dtype} is not known: use auto, {', '.join(known)}")
    if run.dtype != "auto":
        name, why = run.dtype, "as asked"
    elif device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name, why = ("float32" if run.fsdp else "float16"), "this GPU has no bfloat16" + ", and FSDP no loss scaling" * run.fsdp
    else:
        name, why = ("bfloat16", "the GPU has it") if device.type == "cuda" else ("float32", f"exact, on {device.type}")
    if name == "float16" and (run.fsdp or device.type != "cuda"):
        refuse(f"--dtype=float16 needs loss scaling, which {'FSDP lacks' if run.fsdp else 'is for CUDA alone'}: "
               "use bfloat16 or float32")
    return known[name], why


def choose_compile(run, device):
    asked = run.compile.lower() in ("true", "1")
    if run.compile.lower() in ("false", "0"):
        return False, "as asked"
    if not asked and run.compile != "auto":
        refuse(f"--compile={run.compile} must be auto, True or False")
    if not asked and device.type != "cuda":
        return False, f"it does not pay on {device.type}"
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
        return True, "as asked" if asked else "it works here"
    except Exception as e:                                                 # no Triton, no compiler: many things, many names
        why = f"{type(e).__name__}: {e}".split("\n")[0][:100]
        if asked:
            refuse(f"--compile=True does not work here ({why}): leave it out")
        return False, f"it does not work here ({why})"


def learning_rate(run, step):
    """Of the step that follows `step` finished ones: warm-up, then a cosine down to min_lr."""
    if not run.decay_lr:
        return run.learning_rate
    if step < run.warmup_iters:
        return run.learning_rate * (step + 1) / (run.warmup_iters + 1)
    lowest, end = run.learning_rate / 10 if run.min_lr is None else run.min_lr, run.lr_decay_iters or run.max_iters
    done = min(1.0, (step - run.warmup_iters) / max(1, end - run.warmup_iters))
    return lowest + 0.5 * (1 + math.cos(math.pi * done)) * (run.learning_rate - lowest)


def check(run, given, team):
    """Refuses values out of range and flags without effect."""
    for name in ("batch_size", "gradient_accumulation_steps", "eval_interval", "eval_iters", "eval_stride",
                 "log_interval", "lr_decay_iters"):
        if getattr(run, name) is not None and getattr(run, name) < 1:
            refuse(f"--{name}={getattr(run, name)} must be 1 or more")
    for name in ("max_iters", "warmup_iters", "learning_rate", "min_lr", "weight_decay", "grad_clip", "seed"):
        if getattr(run, name) is not None and not 0 <= getattr(run, name) < math.inf:
            refuse(f"--{name}={getattr(run, name)} must be 0 or more")
    if run.seed >= 2**63:
        refuse(f"--seed={run.seed} must be below 2^63")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(run, name) < 1:
            refuse(f"--{name}={getattr(run, name)} must be at least 0 and below 1")
    if not run.decay_lr:
        for name in given.keys() & {"warmup_iters", "lr_decay_iters", "min_lr"}:
            refuse(f"--{name} has no effect without --decay_lr")
    if run.benchmark and run.eval_only:
        refuse("--benchmark times training steps, --eval_only makes none: leave one out")
    if run.eval_stride and not run.eval_only:
        refuse("--eval_stride has no effect without --eval_only")
    G, R = run.gradient_accumulation_steps, team.size
    if G % R:
        near = " or ".join(str(g) for g in sorted({G // R * R, -(-G // R) * R} - {0}))
        refuse(f"--gradient_accumulation_steps={G} counts over all processes and does not divide among {R}: use {near}, "
               f"or --nproc_per_node={max(r for r in range(1, R) if G % r == 0)}")
    for package in ("tensorboard", "wandb"):
        if getattr(run, package):
            try:
                __import__(package)
            except ImportError:
                refuse(f"--{package} needs a package that is not there: pip install {package}")


# ---------------------------------------------------------------------------------------------------------------------
# Training


def choose_run(given, team):
    """-> (Run, saved state or None). Defaults are those of the checkpoint, of fine-tuning, or Run's own."""
    given = {k: v for k, v in given.items() if k in RUN}
    run, state = Run(**given), None
    if run.init_from in ("resume", "auto"):
        looking = run.eval_only or run.benchmark                           # perhaps at a run that is saving right now
        folders = [] if looking or not team.chief else [run.out_dir, os.path.join(run.out_dir, "stopped")]
        team.agree(lambda: [settle(folder) for folder in folders])
        there = os.path.exists(os.path.join(run.out_dir, "training_state.pt"))
        team.same(f"is there a checkpoint in {run.out_dir}, which all machines must share", there)
        if run.init_from == "resume" and not there:
            raise Agreed(f"there is no checkpoint in {run.out_dir} to resume: name its folder with --out_dir, or leave out "
                         "--init_from to start from scratch")
        given["init_from"] = "resume" if there else "scratch"
    elif run.init_from != "scratch" and run.init_from not in SIZES and not os.path.isdir(run.init_from):
        refuse(f"--init_from={run.init_from} is neither scratch, resume, auto, one of {', '.join(SIZES)}, nor a folder")
    if given.get("init_from") == "resume":
        state = team.agree(lambda: load_state(latest(run)))
        team.same(f"the step of the checkpoint in {run.out_dir}, which all machines must share", state["step"])
        saved = {k: v for k, v in state["run"].items() if k in RUN}
        for name in ("dataset", "seed"):
            if given.get(name, saved[name]) != saved[name]:
                refuse(f"--{name}={given[name]} contradicts the checkpoint in {run.out_dir}, which has {saved[name]}: leave it "
                       f"out, or begin another run from these weights with --init_from={run.out_dir} --out_dir=...")
        given = {**saved, **given}
    elif run.init_from not in ("scratch", "auto"):
        given = {**{k: v for k, v in FINETUNE.items() if k in RUN}, **given}
    return Run(**given), state


def choose_model(run, given, team, tokenizer):
    """-> (config, weights or None for new ones)."""
    shape = {k: v for k, v in given.items() if k in SHAPE}
    source = latest(run) if run.init_from == "resume" else run.init_from
    if source == "scratch":
        if shape.setdefault("vocab_size", tokenizer.vocab_size) < tokenizer.vocab_size:
            refuse(f"--vocab_size={shape['vocab_size']} is too small for the data's {tokenizer.vocab_size}")
        try:
            return GPT2Config(**{**SMALL, **shape}), None
        except ValueError as e:
            refuse(str(e))
    if source in SIZES:
        team.one_first(lambda: read_pretrained(source))
    config, weights, _ = team.agree(lambda: read_pretrained(source))
    if run.init_from == "resume":
        for name, value in shape.items():
            if name not in ("dropout", "flash") and value != getattr(config, name):
                refuse(f"--{name}={value} contradicts the checkpoint in {source}, which has {name}={getattr(config, name)}: "
                       "leave it out, or start anew with another --out_dir")
    try:
        if run.init_from == "resume":
            config, notes = replace(config, **shape), []
        else:
            config, weights, notes = convert(config, weights, {"dropout": FINETUNE["dropout"], **shape})
    except ValueError as e:
        refuse(str(e))
    for note in notes:
        team.tell(changed=note)
    reads = team.agree(lambda: Tokenizer.load(source) if os.path.isdir(source) else Tokenizer("gpt2"))
    if reads.to_json() != tokenizer.to_json():
        raise Agreed(f"{source} reads {reads.name} tokens with a vocabulary of {reads.vocab_size}, the data set {run.dataset} is "
                     f"made of {tokenizer.name} tokens with {tokenizer.vocab_size}: choose or prepare one with its tokenizer")
    return config, weights


def shared(team, items, batch_size):
    """This process's share of the items, in batches. Every process gets as many, the last of them perhaps empty: under
    FSDP all take part in every forward pass."""
    mine = items[team.rank::team.size]
    return [mine[first:first + batch_size] for first in range(0, -(-len(items) // team.size), batch_size)]


def evaluate(team, model, splits, run, device, context):
    """Mean loss over eval_iters batches of each split: fixed windows, evenly spaced, shared among the processes. Draws
    nothing at random."""
    model.eval()
    losses = {}
    for split, data in splits.items():
        windows = np.linspace(0, len(data) - 1, min(len(data), run.eval_iters * run.batch_size)).astype(int)
        total, count = 0.0, 0
        for batch in shared(team, windows, run.batch_size):
            x, y = data.__getitems__(batch if len(batch) else windows[:1])
            with torch.no_grad(), context:
                _, loss = model(x.to(device), y.to(device))
            total, count = total + loss.float() * len(batch), count + len(batch)
        total, count = team.total([total, count], device)
        losses[split] = total / count
    model.train()
    if run.fsdp:
        model.reshard()                                                    # a forward pass alone leaves the root gathered
    return losses


def measure(team, model, data, tokenizer, spans, batch_size, device, context):
    """--eval_only. From the sum of -ln p over the tokens that the spans score, each given those before it there:

        loss = sum / tokens                     perplexity per token = exp(sum / tokens)
        bits per byte = sum / ln 2 / bytes      perplexity per word = exp(sum / words)

    Bytes and words (separated by white space) are those of the scored tokens' text. The token between documents is
    scored too, but is no text."""
    model.eval()
    nats, done, progress = 0.0, 0, Progress("evaluation", "windows", 1)
    progress.show(0, len(spans))
    for batch in shared(team, spans, batch_size):
        rows = batch if len(batch) else spans[:1]
        x, y = torch.zeros(len(rows), data.T, dtype=torch.int64), torch.full((len(rows), data.T), -1)
        for i, (file, begin, first, end) in enumerate(rows):               # a causal model does not see the padding
            ids = torch.from_numpy(data.read(file, begin, end).astype(np.int64))
            x[i, :len(ids) - 1], y[i, first - begin - 1:len(ids) - 1] = ids[:-1], ids[first - begin:]
        with torch.no_grad(), context:
            _, loss = model(x.to(device), y.to(device))
        nats, done = nats + float(loss) * int((batch[:, 3] - batch[:, 2]).sum()), done + len(batch) * team.size
        if team.chief:
            progress.show(min(done, len(spans)), len(spans))
    nats, = team.total([nats], device)
    if team.chief:
        tokens, (size, words) = int((spans[:, 3] - spans[:, 2]).sum()), text_size(data, tokenizer, spans)
        per_token, per_word = (math.exp(min(nats / max(n, 1), 700)) for n in (tokens, words))
        print(f"validation loss {nats / tokens:.4f} nats per token, of {tokens:,} tokens\n"
              f"perplexity {per_token:.2f} per token, {per_word:.2f} per word, of {words:,} words\n"
              f"bits per byte {nats / math.log(2) / max(size, 1):.4f}, of {size:,} bytes")


def text_size(data, tokenizer, spans):
    """-> (bytes, words) of the text of the scored tokens, decoded a window at a time."""
    size = words = 0
    inside, reached, decoder = False, None, codecs.getincrementaldecoder("utf-8")("replace")
    for file, _, first, end in spans.tolist():
        if reached != (file, first):                                       # not where the last window ended
            inside = decoder.reset()
        reached, ids = (file, end), data.files[file][first:end]
        for i, part in enumerate(np.split(ids, np.flatnonzero(ids == tokenizer.end_of_text))):
            if i:                                                          # it begins with the token between documents
                inside, part = decoder.reset(), part[1:]
            text = tokenizer.decode_bytes(part.tolist())
            size, text = size + len(text), decoder.decode(text)
            words += len(text.split()) - bool(inside and text and not text[0].isspace())
            inside = not text[-1].isspace() if text else inside
    return size, words


def benchmark(team, device, dtype, gradients, update, tokens, flops, steps=10):
    """Times steps after two to warm up, part by part, and prints medians. Writes nothing."""
    sync = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    peak = peak_flops(device, dtype)
    of = "the device's peak"
    if device.type == "cpu":                                               # the best of a few large matrix products
        a, times = torch.randn(2048, 2048), []
        for _ in range(5):
            began = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - began)
        peak, of = 2 * 2048**3 / min(times), "this CPU's sgemm"
    rows = []
    for _ in range(steps + 2):
        parts, last = {}, time.perf_counter()

        def mark(part, parts=parts):
            nonlocal last
            sync()
            now = time.perf_counter()
            parts[part], last = parts.get(part, 0.0) + now - last, now
        loss, norm = gradients(mark)
        update()
        mark("optimizer")
        rows.append(parts)
    medians = {part: float(np.median([row[part] for row in rows[2:]])) for part in rows[0]}
    seconds = float(np.median([sum(row.values()) for row in rows[2:]]))
    done = tokens / seconds * flops / team.size
    team.say(f"\n{tokens / seconds:,.0f} tokens per second, {seconds * 1e3:,.1f} ms a step, median of {steps}"
             + (f"; {done / 1e9:,.1f} GFLOP/s a process, {done / peak:.1%} of {of}, {peak / 1e9:,.0f}" if peak else "")
             + f"; peak memory {memory(device) / 1e9:.2f} GB")
    for part, value in medians.items():
        team.say(f"  {part:10}{value * 1e3:10.2f} ms{value / seconds:8.1%}")


def train(team, given):
    device, why_device = choose_device(given.get("device", "auto"), team)
    team.join(device, given.get("backend"))
    run, state = choose_run(given, team)
    check(run, given, team)
    try:
        return fit(team, given, run, state, device, why_device)
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        raise MemoryError(f"out of memory on {device}: {cure(run, given, team)}") from None


def cure(run, given, team):
    """What to lower when memory is short: the batch, by its smallest factor, so that the result stays what it was."""
    training = not run.eval_only
    if part := next((n for n in range(2, run.batch_size + 1) if run.batch_size % n == 0), None):
        return (f"the same in smaller parts is --batch_size={run.batch_size // part}"
                + f" --gradient_accumulation_steps={run.gradient_accumulation_steps * part}" * training
                + f" --eval_iters={run.eval_iters * part}" * (training or "eval_iters" in given))
    ways = ["--grad_checkpoint"] * (training and not run.grad_checkpoint)
    ways += ["--fsdp"] * (team.distributed and not run.fsdp)
    return "batch_size is 1 already: " + (f"the same with less memory is {' or '.join(ways)}" if ways else
                                          "try --fsdp on more GPUs, a smaller model or a smaller --block_size")


def fit(team, given, run, state, device, why_device):
    dtype, why_dtype = choose_dtype(run, device)
    compiled, why_compile = choose_compile(run, device)
    mode = "fsdp" if run.fsdp else "ddp" if team.distributed else "single"
    why_mode = f"torchrun started {team.size} processes" if team.distributed else "not started by torchrun"

    # data
    def prepare():
        if not os.path.exists(os.path.join(DATA, run.dataset, "meta.json")):
            DATASETS[run.dataset](os.path.join(DATA, run.dataset))
    if run.dataset in DATASETS and run.dataset != "fineweb":               # 20 GB come only when asked for
        team.one_first(prepare)
    folder, paths = team.agree(lambda: find_data(run.dataset))
    tokenizer, counts = team.agree(lambda: (Tokenizer.load(folder), token_counts(folder)))
    config, weights = choose_model(run, given, team, tokenizer)
    if run.eval_only:
        del paths["train"]                                                 # it may be empty
    splits = team.agree(lambda: {split: Tokens(paths[split], config.block_size, config.vocab_size, counts.get(split))
                                 for split in paths})
    content = {split: data.fingerprint() for split, data in splits.items()}
    team.same(f"the data in {folder} must be the same everywhere", content)
    if state and not run.eval_only and (was := state.get("data", content)) != content:
        split = next(split for split in content if was.get(split) != content[split])
        raise Agreed(f"the {split} data in {folder} has changed since the checkpoint in {run.out_dir}: it had "
                     f"{was.get(split)}, now {content[split]}: put back what was there, or begin another run from these "
                     f"weights with --init_from={run.out_dir} --out_dir=...")
    T, micro_batches = config.block_size, run.gradient_accumulation_steps // team.size
    windows_per_step = run.batch_size * run.gradient_accumulation_steps

    # model
    with torch.device("meta"):                                             # shapes only: the weights come shard by shard
        model = GPT2(config)
    model.grad_checkpoint = run.grad_checkpoint
    model = team.prepare(model, device, run.fsdp, dtype == torch.bfloat16, compiled)
    parameters = dict(model.named_parameters())
    for name, whole in model.initial_weights(run.seed) if weights is None else weights.items():
        fill(parameters[name], whole)
    net = team.wrap(model, run.fsdp)                                       # what the training step calls
    context = nullcontext() if run.fsdp or dtype == torch.float32 else torch.autocast(device.type, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # optimizer: made after sharding, or it would hold on to the unsharded weights
    groups = [{"params": [p for p in parameters.values() if p.dim() >= 2], "weight_decay": run.weight_decay},
              {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=run.learning_rate, betas=(run.beta1, run.beta2),
                                  fused=device.type in ("cpu", "cuda"))
    step, consumed, best, best_step, evaluated, saved_step = 0, 0, math.inf, None, None, None
    if state:
        step, consumed, best, evaluated = (state[k] for k in ("step", "windows", "best_val_loss", "evaluated"))
        saved_step, best_step = step, state.get("best_step", step)
        team.agree(lambda: restore(optimizer, parameters, state["optimizer"]))
        if state["scaler"]:                                                # empty if that run was not in float16
            scaler.load_state_dict(state["scaler"])
        state.clear()                                                      # train() holds on to it
    whole = weights = None                                                 # the mapped files may go: Windows locks them

    sizes = [f"{splits[split].tokens:,} {what}" for split, what in (("train", "training"), ("val", "validation"))
             if split in splits]
    team.tell(device=f"{device}: {why_device}", mode=f"{mode}: {why_mode}",
              dtype=f"{str(dtype).removeprefix('torch.')}: {why_dtype}", compile=f"{compiled}: {why_compile}",
              data=f"{run.dataset}: {' and '.join(sizes)} tokens, vocabulary {tokenizer.vocab_size} ({tokenizer.name})")
    if "train" in splits:
        team.tell(batch=f"{run.batch_size} texts x {T} tokens x {run.gradient_accumulation_steps} accumulated = "
                  f"{windows_per_step * T:,} tokens a step"
                  + f", {micro_batches} of the {run.gradient_accumulation_steps} in each process" * (team.size > 1)
                  + f"; an epoch is {len(splits['train']) / windows_per_step:,.1f} steps")
    changes = [name for name in ("rope", "gqa", "sliding_window") if getattr(config, name)]
    team.tell(model=f"{model.num_parameters():,} parameters, {config.n_layer} layers, {', '.join(changes) or 'plain GPT-2'}")

    if run.eval_only:
        stride = run.eval_stride or T
        if stride > T:
            refuse(f"--eval_stride={stride} is more than block_size={T}: tokens in between would be left out")
        spans = splits["val"].spans(stride)
        if "eval_iters" in given:                                          # side by side they are those of `evaluate`
            spans = spans[spans[:, 3] - spans[:, 2] >= stride]
            spans = spans[np.linspace(0, len(spans) - 1, min(len(spans), run.eval_iters * run.batch_size)).astype(int)]
        team.tell(windows=f"{len(spans):,} of {T} tokens, {stride} apart: beyond the first, a token is predicted from "
                          f"{T - stride + 1} or more")
        return measure(team, model, splits["val"], tokenizer, spans, run.batch_size, device, context)

    def losses_now():
        losses = evaluate(team, model, splits, run, device, context)
        return {"train_loss": losses["train"], "val_loss": losses["val"]}
    if step >= run.max_iters and not run.benchmark:
        return team.say(f"the run in {run.out_dir} is at step {step} of {run.max_iters}: raise --max_iters to go on")

    order = Order(splits["train"], team, run.seed, consumed)
    loader = iter(DataLoader(splits["train"], run.batch_size, sampler=order, collate_fn=lambda batch: batch,
                             pin_memory=device.type == "cuda"))

    def next_batch():
        return [t.to(device, non_blocking=device.type == "cuda") for t in next(loader)]  # MPS may read what is gone
    batch = next_batch()

    def gradients(mark=lambda part: None):
        """Forward and backward passes of the next step -> its mean loss and gradient norm, of this process. `mark` is
        told what has just been done. The random numbers (dropout's) are a function of seed, step and process, so there
        is no random state to save."""
        nonlocal batch
        torch.manual_seed(int(np.random.SeedSequence([run.seed, step, team.rank]).generate_state(1)[0]))
        loss_sum = 0.0
        for i in range(micro_batches):
            team.set_sync(net, last=i == micro_batches - 1)
            with context:
                _, loss = net(*batch)
            mark("forward")
            batch = next_batch()                                           # while a GPU is at work
            mark("data")
            scaler.scale(loss / micro_batches).backward()
            loss_sum = loss_sum + loss.detach()
            mark("backward")
        scaler.unscale_(optimizer)
        norm = gathered(torch.nn.utils.clip_grad_norm_(parameters.values(), run.grad_clip or math.inf))
        return loss_sum / micro_batches, norm

    def update():
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run, step)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    if run.benchmark:
        return benchmark(team, device, dtype, gradients, update, windows_per_step * T, 3 * config.flops_per_token())

    quoted = f'"{run.out_dir}"' if os.name == "nt" else shlex.quote(run.out_dir)
    where = f" --out_dir={quoted}" if run.out_dir != Run.out_dir else ""
    again = (f"torchrun --standalone --nproc_per_node={team.size}" if team.distributed else "python") \
        + " train.py" + " --fsdp" * run.fsdp + " --init_from=resume" + where
    if saved_step is None and (kept := team.agree(lambda: set_aside(run.out_dir) if team.chief else None)):
        team.say(f"kept      the run that was in {run.out_dir} was moved to {kept}")
    log = team.agree(lambda: Log(run, config, saved_step) if team.chief else None)

    def record(**values):
        team.agree(lambda: log.record(step=step, tokens=consumed * T, **values) if team.chief else None)

    def checkpoint(folder):
        save(team, folder, config, parameters, optimizer, tokenizer, {
            "step": step, "windows": consumed, "data": content, "best_val_loss": best, "best_step": best_step,
            "evaluated": evaluated, "scaler": scaler.state_dict(),
            "run": {k: v for k, v in asdict(run).items() if not RUN[k].metadata.get("runtime")}})
        return step

    def not_finite(what, unharmed):
        return Agreed(f"the {what} is not finite, at learning rate {lr:.3g}: stopped, {unharmed}. "
                      + (f"The last checkpoint, of step {saved_step}, is in {latest(run)}: go on with a lower rate, "
                         f"{again} --learning_rate={run.learning_rate / 2:g}" if saved_step is not None else
                         "There is no checkpoint yet: start again with a lower --learning_rate"))

    signals, lr = catch_signals(), learning_rate(run, max(step - 1, 0))
    peak, flops = peak_flops(device, dtype), 3 * config.flops_per_token()
    began = last_logged = time.time()
    first_step = logged_step = step
    while True:
        if (step % run.eval_interval == 0 or step == run.max_iters) and evaluated != step:
            paused, losses = time.time(), losses_now()
            evaluated, better = step, losses["val_loss"] < best
            if better:
                best, best_step = losses["val_loss"], step
            if not all(map(math.isfinite, losses.values())):
                raise not_finite(f"evaluated loss after step {step}", "nothing was saved")
            record(**losses)
            if team.chief:
                log.line(f"--- step {step:,}: train loss {losses['train_loss']:.4f}, validation loss {losses['val_loss']:.4f}"
                         + (" (best)" if better else ""))
            if step > first_step if run.always_save_checkpoint else better:
                saved_step = checkpoint(run.out_dir)
            last_logged += time.time() - paused                            # neither counts as training time
        if step == run.max_iters or signals.stopped:
            break

        loss, norm = gradients()
        share, lr = 1 / team.size, learning_rate(run, step)
        loss, norm, interrupted, terminated = team.total(
            [loss * share, norm * share, signals.interrupted, signals.terminated], device)
        if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
            raise not_finite(f"{'gradient' if math.isfinite(loss) else 'loss'} of step {step + 1}",
                             "the weights were not touched")
        update()
        step, consumed = step + 1, consumed + windows_per_step
        signals.stopped = (130 if interrupted else 143) if interrupted or terminated else 0

        now, due = time.time(), step % run.log_interval == 0 or step in (first_step + 1, run.max_iters)
        speed, mem = (step - logged_step) * windows_per_step * T / max(now - last_logged, 1e-9), memory(device)
        mfu = speed * flops / (peak * team.size) if peak else None
        if due:
            record(loss=loss, lr=lr, grad_norm=norm, tokens_per_second=round(speed, 1), memory=mem,
                   **({"mfu": mfu} if mfu else {}))
            last_logged, logged_step = time.time(), step
        if team.chief:
            left = (run.max_iters - step) * (now - began) / (step - first_step)
            log.line(f"step {step:>{len(str(run.max_iters))}}/{run.max_iters}  loss {loss:.4f}  lr {lr:.1e}  "
                     f"norm {norm:.2f}  {speed:7,.0f} tok/s  {clock(left)} left" + (f"  mfu {mfu:.1%}" if mfu else "")
                     + (f"  {mem / 1e9:.2f} GB" if mem else ""), stay=due)

    if signals.stopped:
        beside = not run.always_save_checkpoint and saved_step != step
        folder = os.path.join(run.out_dir, "stopped") if beside else run.out_dir
        if saved_step != step:
            checkpoint(folder)
        team.say(f"\nstopped at step {step}, saved in {folder}"
                 + f"; the best checkpoint, of step {best_step}, stays in {run.out_dir}" * beside + f". Go on with\n    {again}")
    team.agree(lambda: plot([run.out_dir], os.path.join(run.out_dir, "loss.svg")) if team.chief else None)
    if not signals.stopped:
        if best_step == 0 and not run.always_save_checkpoint:
            team.say(f"\nno step made the validation loss lower: the checkpoint in {run.out_dir} is the model that the run began "
                     "with. Try a lower --learning_rate")
        team.say(f"\nbest validation loss {best:.4f} (step {best_step}), {clock(time.time() - began)} of training\n"
                 f"The curves are in {os.path.join(run.out_dir, 'loss.svg')}\nSample with\n    python sample.py{where}")
    return signals.stopped


class catch_signals:
    """Ctrl-C and SIGTERM let the step finish. A second Ctrl-C, two seconds later or more, stops at once."""

    def __init__(self):
        self.interrupted = self.terminated = self.stopped = self.when = 0
        signal.signal(signal.SIGINT, self.on_interrupt)
        signal.signal(signal.SIGTERM, self.on_terminate)

    def on_interrupt(self, *_):
        if self.interrupted and time.time() - self.when > 2:               # torchrun passes a Ctrl-C on a second time
            os._exit(130)
        self.interrupted, self.when = 1, time.time()

    def on_terminate(self, *_):
        self.terminated = 1


def main():
    given, _ = command_line(__doc__, options())
    team = Team()
    if "plot" in given:
        out_dirs = [d for d in given.pop("plot").split(",") if d] or [given.pop("out_dir", Run.out_dir)]
        if given:
            refuse(f"--{min(given)} has no effect with --plot={','.join(out_dirs)}, which only draws")
        path = "comparison.svg" if len(out_dirs) > 1 else os.path.join(out_dirs[0], "loss.svg")
        plot(out_dirs, path)
        return print(path)
    for name, cure in (("fsdp", "--fsdp shares one model among several processes: start them with torchrun --standalone "
                        "--nproc_per_node=2 train.py --fsdp"), ("backend", "--backend has no effect on one process")):
        if given.get(name) and not team.distributed:
            refuse(cure)
    try:
        code = train(team, given)
    except Agreed:                                                         # known to all, told by one
        team.leave()
        if team.chief:
            raise
        code = 1
    except RuntimeError as e:
        if "by peer" not in str(e) and "Broken pipe" not in str(e):        # so gloo says that a process is gone
            raise
        sys.exit("train.py: another process of this run has ended, so it cannot go on" if team.chief else 1)
    team.leave()
    sys.exit(code)


if __name__ == "__main__":
    guarded(main)
