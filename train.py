"""
Train a GPT-2 on one device, with DDP or with FSDP; the script detects which.

    python train.py                                           # Python's source
    torchrun --standalone --nproc_per_node=4 train.py         # DDP: a copy each
    torchrun --standalone --nproc_per_node=4 train.py --fsdp  # FSDP: 1/4 each
    python train.py --init_from=resume                        # resume out/
    python train.py --init_from=gpt2 --dataset=shakespeare    # fine-tune
    python train.py --help                                    # every flag

The same flags and seed give the same run on any number of processes, in any
mode, with or without interruptions (up to rounding).

A step of training, function by function: main() reads the flags and builds data,
model and optimizers. Its loop calls train_step(), which calls the model (GPT2 in
model.py), .backward() and update(). learning_rate() and Muon come next, then
evaluate(), save_checkpoint(), Log, and at the end all of torch.distributed.
"""
import contextlib
import ctypes
import importlib.util
import json
import math
import os
import re
import shlex
import signal
import sys
import textwrap
import threading
import time
import zipfile
from dataclasses import asdict, dataclass, fields
from datetime import timedelta

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)                 # no traceback from an import

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from data.flags import flag_parser, one_line, progress
from data.hub import local_path
from data.loader import EndlessSampler, TokenDataset, find_data
from data.prepare import DATASETS, LARGE, prepare
from data.tokenizer import check_tokenizer, load_tokenizer, tokenizer_from_json
from model import (
    GPT2,
    SIZES,
    SOURCES,
    GPT2Config,
    atomic_write,
    choose_device,
    choose_dtype,
    damage,
    write_pretrained,
)

# --------------------------------------------------------------------------------------------------
# Flags: these, and the fields of GPT2Config


@dataclass
class Run:
    """The flags of train.py. The comment beside a field is its help text."""
    init_from: str = "scratch"       # scratch, resume, auto (resume if out_dir has a checkpoint,
                                     # else scratch), or the weights to start from: gpt2,
                                     # gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, a model of the
                                     # hub (owner/name), a folder, or nanoGPT's ckpt.pt
    out_dir: str = "out"             # folder for checkpoint, model, metrics.jsonl and loss.svg
    dataset: str = "stdlib"          # stdlib, shakespeare_char, shakespeare, tinystories, fineweb,
                                     # fineweb_edu, a name you gave to data/prepare.py, or a folder
    size: str | None = None          # gpt2, gpt2-medium, gpt2-large or gpt2-xl: layers, heads,
                                     # width, block_size of OpenAI's; with fineweb also the recipe
    seed: int = 1337                 # random seed for weights, data order and dropout
    batch_size: int = 4              # samples of block_size tokens in a batch of one process
    gradient_accumulation_steps: int = 4     # batches per step, counted over all processes
    max_iters: int = 1150            # steps of the run
    optimizer: str = "muon"          # muon (for the matrices of the blocks, adamw for the rest) or
                                     # adamw (the default for fine-tuning)
    learning_rate: float = 1e-2      # highest learning rate
    decay_lr: bool = True            # warm up, then decay to min_lr
    schedule: str = "linear"         # shape of the decay: linear or cosine
    warmup_iters: int = 50           # steps of warm-up
    lr_decay_iters: int | None = None        # step at which min_lr is reached [max_iters]
    min_lr: float = 0.0              # lowest learning rate
    weight_decay: float = 0.1        # weight decay, on matrices only
    beta1: float = 0.9               # AdamW beta1
    beta2: float = 0.99              # AdamW beta2
    grad_clip: float = 1.0           # largest gradient norm, 0 = no limit
    grad_checkpoint: bool = False    # recompute blocks in backward: less memory, more time
    eval_interval: int = 200         # steps between evaluations, each followed by a checkpoint
    eval_iters: int = 20             # batches of each split per evaluation, over all processes; 0
                                     # = all
    sample_interval: int = 400       # steps between texts that the model writes, after an
                                     # evaluation; 0 = none
    eval_only: bool = False          # evaluate on the validation data, and exit
    eval_stride: int | None = None   # with --eval_only: tokens between samples, each scores its
                                     # last ones [block_size]
    benchmark: bool = False          # time a step and exit; writes nothing
    always_save_checkpoint: bool = True      # False: export the model only when the validation
                                     # loss is the best so far
    log_interval: int = 10           # steps between lines in the log and in metrics.jsonl
    fsdp: bool = False               # shard weights, gradients, optimizer over torchrun's processes
    backend: str | None = None       # torch.distributed backend [nccl on GPUs, else gloo]
    device: str = "auto"             # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"              # auto, float32, bfloat16, float16
    compile: bool | None = None      # torch.compile [True on CUDA, if it works there]
    tensorboard: bool = False        # also log to out_dir/tensorboard
    wandb: bool = False              # also log to Weights & Biases
    plot: str | None = None          # only draw: loss.svg of a run, or comparison.svg of out1,out2

    def __post_init__(self):
        for name in ("batch_size", "gradient_accumulation_steps", "eval_interval", "log_interval"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name}=0 must be 1 or more")
        if max(self.beta1, self.beta2) >= 1:
            raise ValueError(f"beta1={self.beta1} and beta2={self.beta2} must be below 1")
        choices = {"optimizer": ("muon", "adamw"), "schedule": ("linear", "cosine"),
                   "size": (None, *SIZES), "backend": (None, "nccl", "gloo")}
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)} is not one of {values}")


# Flags of this process, this machine and this moment: a checkpoint does not keep them.
RUNTIME = {"init_from", "out_dir", "size", "grad_checkpoint", "sample_interval", "eval_only",
           "eval_stride", "benchmark", "fsdp", "backend", "device", "dtype", "compile",
           "tensorboard", "wandb", "plot"}
RUN = {f.name for f in fields(Run)}
SHAPE = {f.name for f in fields(GPT2Config)}

# What differs from the defaults above and in GPT2Config. From scratch the model is small enough to
# learn something on a CPU in minutes.
SCRATCH = dict(block_size=128, n_layer=4, n_head=4, n_embd=128, vocab_size=None)
ADAMW = dict(learning_rate=3e-3)                 # from scratch with AdamW
# With --size, a model of 124M or more. With fineweb, 3.25 billion tokens, 524,288 a step, as in
# modded-nanogpt's fourth record (Muon and rotary positions, a loss of 3.28 with 124M).
LARGE_MODEL = dict(learning_rate=1.8e-3, beta2=0.95, sample_interval=0)
FINEWEB = dict(batch_size=32, gradient_accumulation_steps=16, max_iters=6200, warmup_iters=250,
               eval_interval=1000)
FINETUNE = dict(optimizer="adamw", learning_rate=3e-5, dropout=0.1, warmup_iters=10, max_iters=200,
                gradient_accumulation_steps=8, eval_interval=20, eval_iters=10, log_interval=1,
                sample_interval=0, always_save_checkpoint=False)

parser = flag_parser(__doc__, Run, GPT2Config, **SCRATCH)
for flag, name in ("--muon", "muon"), ("--no-muon", "adamw"):
    parser.add_argument(flag, dest="optimizer", action="store_const", const=name,
                        help=f"short for --optimizer={name}")


# --------------------------------------------------------------------------------------------------
# A run, from the command line to the last checkpoint


def main():
    typed = vars(parser.parse_args())                            # {name: value}
    if "plot" in typed:
        return plot(typed["plot"].split(","))
    run, model_flags, checkpoint = resolve(typed)
    device = start_processes(run)
    paths, tokenizer = open_data(run)
    model = make_model(run, model_flags, checkpoint, tokenizer)
    splits = open_splits(run, paths, model.config, checkpoint)
    trainer = Trainer(run, model, tokenizer, splits, device)     # makes the optimizers, too
    why = {"scratch": "the default from scratch", "resume": "as in the checkpoint"}
    why = why.get(run.init_from, "the default for fine-tuning")
    announce("optimizer", f"{run.optimizer}: {'as given' if 'optimizer' in typed else why}")
    if checkpoint:
        restore_progress(trainer, checkpoint)
    if run.eval_only:
        return evaluate_only(trainer)
    trainer.start_reading()
    if run.benchmark:
        return benchmark(trainer)

    lock = open_out_dir(trainer)                                 # held until the end
    log = Log(trainer)
    signals = StopSignals()
    while True:
        finished = trainer.step >= run.max_iters
        if finished or trainer.step % run.eval_interval == 0:
            evaluate_and_save(trainer, log, finished)
        if finished or signals.exit_code:
            break
        loss, norm = train_step(trainer, signals)
        log.step(trainer, loss, norm)
    if trainer.saved_step != trainer.step:                       # a signal between evaluations
        save_checkpoint(trainer, export=run.always_save_checkpoint)
    log.close(trainer, signals.exit_code)
    del lock
    return signals.exit_code


def train_step(trainer, signals):
    """Forward and backward passes over the batches of a step, and an update of the weights.
    Returns (mean loss, gradient norm) over all processes.

    With masked data a batch counts by its share of counted targets. At the end loss and gradient
    are divided by the share of the whole step, so that each counted target has the same weight.
    """
    run = trainer.run
    # Dropout depends on seed, step and rank alone: there is no random state to save.
    sequence = np.random.SeedSequence([run.seed, trainer.step, rank()])
    torch.manual_seed(int(sequence.generate_state(1)[0]))
    total = 0.0
    counted = 0.0                                                # share of the targets
    for i in range(trainer.micro_batches):
        x, y = trainer.batch
        # DDP exchanges gradients in the last batch only. FSDP does in each, or every process would
        # keep them whole.
        trainer.net.require_backward_grad_sync = i == trainer.micro_batches - 1
        with trainer.autocast():
            _, loss = trainer.net(x, y)
        share = (y >= 0).float().mean()                          # 1 without a mask
        loss = loss * share / trainer.micro_batches
        trainer.scaler.scale(loss).backward()
        trainer.read_batch()                                     # while a GPU is still computing
        total += loss.detach()
        counted += share
    for optimizer in trainer.optimizers:
        trainer.scaler.unscale_(optimizer)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    loss, norm, counted, stop = mean_over_processes(
        [total, whole(norm), counted / trainer.micro_batches, signals.received], trainer.device)
    counted = counted or 1.0                                     # 0: no target counts in this step
    loss = loss / counted
    norm = norm / counted
    if stop:                                                     # maybe in another process
        signals.exit_code = signals.received or 143
    finite = math.isfinite(norm)
    if not math.isfinite(loss) or not (finite or trainer.scaler.is_enabled()):
        stop_not_finite(trainer, f"step {trainer.step + 1}: the loss {loss} or the norm {norm}")
    scale = min(1.0, (run.grad_clip or math.inf) / (norm + 1e-6)) / counted
    if scale != 1:
        torch._foreach_mul_([p.grad for p in parameters], scale)
    update(trainer, finite)
    return loss, norm


def update(trainer, finite):
    """Update the weights, unless a float16 gradient is not finite, and count the step."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(trainer.run, trainer.step)
        if finite:
            trainer.scaler.step(optimizer)
        # DDP keeps gradients in its buckets; new ones would be a second copy.
        optimizer.zero_grad(set_to_none=trainer.net is trainer.model)
    trainer.scaler.update()
    trainer.step += 1
    trainer.samples += trainer.samples_per_step


def learning_rate(run, step):
    """The rate of the step that follows `step` finished ones: warm-up, then a decay to min_lr."""
    if not run.decay_lr:
        return run.learning_rate
    if step < run.warmup_iters:
        return run.learning_rate * (step + 1) / (run.warmup_iters + 1)
    end = run.lr_decay_iters or run.max_iters
    done = min(1.0, (step - run.warmup_iters) / max(1, end - run.warmup_iters))
    left = 1 - done
    if run.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * done))
    lowest = min(run.min_lr, run.learning_rate)
    return lowest + left * (run.learning_rate - lowest)


def stop_not_finite(trainer, what):
    """End a run whose loss or gradient is inf or nan."""
    sys.exit(f"train.py: {what} is not finite. {trainer.last_checkpoint()}. Resume from it, or "
             "start again, with a lower rate: "
             f"--learning_rate={trainer.run.learning_rate / 2:g}")


# --------------------------------------------------------------------------------------------------
# Before the first step: flags, data, model


def resolve(typed):
    """Resolve every flag: defaults < recipe < checkpoint < typed.

    Returns (Run, {field of GPT2Config: value}, checkpoint to resume or None).
    """
    typed = {**SIZES.get(typed.get("size"), {}), **typed}
    source = typed.get("init_from", "scratch")
    out_dir = typed.get("out_dir", Run.out_dir)
    checkpoint = None
    recipe = FINETUNE
    if source in ("resume", "auto"):
        checkpoint = load_checkpoint(out_dir)
        if source == "resume" and checkpoint is None:
            sys.exit(f"train.py: there is no {CHECKPOINT} in {out_dir}. Name its folder with "
                     "--out_dir. A folder with a model alone serves as --init_from=FOLDER")
        source = "resume" if checkpoint else "scratch"
    if source == "resume":
        defaults = {f.name: f.default for f in (*fields(Run), *fields(GPT2Config))}
        recipe = {**defaults, **checkpoint["run"], **checkpoint["config"]}
        check_contradictions(typed, recipe, out_dir)
        if typed.get("eval_only") or typed.get("benchmark"):     # these look at the exported model
            source = out_dir
            recipe = checkpoint["run"]
            checkpoint = None
    elif source == "scratch":
        recipe = dict(SCRATCH)
        if typed.get("optimizer") == "adamw":
            recipe.update(ADAMW)
        if "size" in typed:
            recipe.update(LARGE_MODEL, block_size=1024)
        if "size" in typed and typed.get("dataset") in ("fineweb", "fineweb_edu"):
            recipe.update(FINEWEB)
    settings = {**recipe, **typed, "init_from": source}
    run = from_flags(Run, {name: value for name, value in settings.items() if name in RUN})
    check_flags(run)
    return run, {name: value for name, value in settings.items() if name in SHAPE}, checkpoint


def from_flags(make, values):
    """make(**values), where a ValueError is one of the command line."""
    try:
        return make(**values)
    except ValueError as error:
        parser.error(str(error))


def check_contradictions(typed, saved, out_dir):
    """Refuse a typed flag that would make the resumed run another one."""
    fixed = {"dataset", "seed", "optimizer", *SHAPE} - {"dropout", "flash"}
    if typed.get("eval_only"):
        fixed.remove("dataset")
    for name in sorted(fixed & typed.keys()):
        if typed[name] != saved[name]:
            parser.error(f"--{name}={typed[name]} contradicts the checkpoint in {out_dir}, which "
                         f"has {name}={saved[name]}. Leave it out, or choose another --out_dir")


def check_flags(run):
    """Refuse flags that would train or measure something else than the user believes."""
    if run.eval_only and run.init_from == "scratch":
        parser.error(f"--eval_only would measure random weights: add --init_from=resume, {SOURCES}")
    if run.fsdp and not is_distributed():
        parser.error("--fsdp shards the model over several processes. Start them with torchrun "
                     "--standalone --nproc_per_node=2 train.py --fsdp")
    processes = int(os.environ["WORLD_SIZE"]) if is_distributed() else 1
    if run.gradient_accumulation_steps % processes and not run.eval_only:
        parser.error(f"--gradient_accumulation_steps={run.gradient_accumulation_steps} counts over "
                     f"all processes: choose a multiple of {processes}")


def open_data(run):
    """-> ({split: paths of token files}, tokenizer). A small data set is prepared first."""
    if run.dataset in DATASETS and run.dataset not in LARGE:
        with one_line(OSError):
            main_process_first(prepare, run.dataset)
    with one_line(OSError, ValueError):
        folder, paths = find_data(run.dataset)
        return paths, load_tokenizer(folder)


def make_model(run, flags, checkpoint, tokenizer):
    """-> GPT2 with new weights, or those of a checkpoint or of another model, on the CPU."""
    if run.init_from == "scratch":
        flags["vocab_size"] = flags["vocab_size"] or tokenizer.vocab_size
        if flags["vocab_size"] < tokenizer.vocab_size:
            parser.error(f"--vocab_size={flags['vocab_size']} is below the "
                         f"{tokenizer.vocab_size} different tokens of the data")
        torch.manual_seed(run.seed)
        return GPT2(from_flags(GPT2Config, flags))
    if checkpoint:
        model = GPT2(from_flags(GPT2Config, flags))
        model.load_state_dict(checkpoint["model"])
        trained_with = tokenizer_from_json(checkpoint["tokenizer"])
    else:
        with one_line(OSError, ValueError):
            main_process_first(local_path, run.init_from)
            source = local_path(run.init_from)
            model = GPT2.from_pretrained(source, **flags)
            trained_with = load_tokenizer(source)
            check_tokenizer(trained_with, model.config.vocab_size, source)
    if trained_with.to_json() != tokenizer.to_json():
        sys.exit(f"train.py: the model has {trained_with.name} tokens, vocabulary "
                 f"{trained_with.vocab_size}. The data set {run.dataset} has {tokenizer.name} "
                 f"tokens, vocabulary {tokenizer.vocab_size}. Choose data of the same tokens")
    return model


def open_splits(run, paths, config, checkpoint):
    """-> {split: TokenDataset}, the same as in the checkpoint and in every process."""
    stride = run.eval_stride or config.block_size
    if stride > config.block_size:
        parser.error(f"--eval_stride={stride} is above block_size={config.block_size}: tokens in "
                     "between would be left out")
    splits = {}
    with one_line(OSError, ValueError):
        if not run.eval_only:
            splits["train"] = TokenDataset(paths["train"], config.block_size, config.vocab_size)
        splits["val"] = TokenDataset(paths["val"], config.block_size, config.vocab_size, stride)
    found = {split: data.fingerprint for split, data in splits.items()}
    if checkpoint and found != checkpoint["data"]:
        sys.exit(f"train.py: the data set {run.dataset} has changed since the checkpoint in "
                 f"{run.out_dir}. It had {checkpoint['data']}, now it has {found}. Restore it, or "
                 f"start another run from these weights: --init_from={run.out_dir} --out_dir=NEW")
    seen = all_gather((checkpoint and checkpoint["step"], found))
    if any(other != seen[0] for other in seen):
        sys.exit(f"train.py: the processes see different files: (step of the checkpoint in "
                 f"{run.out_dir}, data) are {seen}. Put them on a disk that all machines share")
    return splits


@dataclass
class Trainer:
    """What a step needs, and where the run is."""
    run: Run
    model: GPT2
    tokenizer: object
    splits: dict                                 # {"train": TokenDataset, "val": TokenDataset}
    device: torch.device
    step: int = 0                                # steps finished
    samples: int = 0                             # samples consumed, by all processes together
    best_val_loss: float = math.inf
    best_step: int = -1                          # -1: none
    saved_step: int | None = None                # of the last checkpoint

    def __post_init__(self):
        run = self.run
        config = self.model.config
        self.dtype, why = from_flags(choose_dtype, {"name": run.dtype, "device": self.device})
        if self.dtype == torch.float16 and (run.fsdp or self.device.type != "cuda"):
            parser.error("float16 needs loss scaling, which works on CUDA without FSDP: use "
                         "--dtype=bfloat16 or float32")
        announce("dtype", f"{self.dtype}: {why}")
        self.model.to(self.device).train()
        self.model.grad_checkpoint = run.grad_checkpoint
        compile_blocks(self.model, run.compile)
        self.net = distribute(self.model, run.fsdp, self.dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.optimizers = make_optimizers(run, self.model)
        self.micro_batches = run.gradient_accumulation_steps // world_size()
        self.samples_per_step = run.batch_size * run.gradient_accumulation_steps
        self.tokens_per_step = self.samples_per_step * config.block_size
        for split, data in self.splits.items():
            announce(split, f"{data.tokens:,} tokens of {run.dataset}, vocabulary "
                     f"{self.tokenizer.vocab_size} ({self.tokenizer.name})")
        announce("batch", f"{run.batch_size} samples x {config.block_size} tokens x "
                 f"{run.gradient_accumulation_steps} accumulated ({self.micro_batches} in each "
                 f"process) = {self.tokens_per_step:,} tokens a step")
        shape = [f"{f.name}={getattr(config, f.name)}" for f in fields(config)
                 if getattr(config, f.name) != f.default]
        announce("model", f"{self.model.num_parameters():,} parameters: {', '.join(shape)}")
        for change in self.model.changes:
            announce("changed", change)

    def last_checkpoint(self):
        if self.saved_step is None:
            return "There is no checkpoint of this run yet"
        return f"The last checkpoint is of step {self.saved_step}"

    def autocast(self):
        """Half precision for a forward pass. FSDP has its own."""
        enabled = self.dtype != torch.float32 and not self.run.fsdp
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    def start_reading(self):
        data = self.splits["train"]
        sampler = EndlessSampler(data, rank(), world_size(), self.run.seed, self.samples)
        self.batches = iter(DataLoader(data, self.run.batch_size, sampler=sampler,
                                       pin_memory=self.device.type == "cuda"))
        self.read_batch()

    def read_batch(self):
        """Read the next batch. Only CUDA may copy it in the background: MPS would read host memory
        that is freed already."""
        background = self.device.type == "cuda"
        self.batch = [t.to(self.device, non_blocking=background) for t in next(self.batches)]


def compile_blocks(model, flag):
    """Compile the blocks, which share one compilation, and the loss. No shape is dynamic: each
    batch has the same."""
    why = "as given"
    if flag is None:
        flag = model.device.type == "cuda" and importlib.util.find_spec("triton") is not None
        why = "found a GPU and Triton" if flag else "it needs a GPU and Triton to be faster"
    announce("compile", f"{flag}: {why}")
    if flag:
        torch._dynamo.config.optimize_ddp = False    # else DDP cuts the graph of a block in two
        model.cross_entropy = torch.compile(model.cross_entropy, dynamic=False)
        for block in model.transformer.h:
            block.compile(dynamic=False)


# --------------------------------------------------------------------------------------------------
# Optimizers


def make_optimizers(run, model):
    """The optimizers of a run, each for its own parameters. The learning rate is set at each step;
    what an optimizer keeps in its `state` is saved, and its `step` takes closure=None. A parameter
    without requires_grad is frozen."""
    rest = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizers = []
    if run.optimizer == "muon":
        blocks = {name: rest.pop(name) for name, p in list(rest.items())
                  if name.startswith("transformer.h.") and p.dim() == 2}
        joined = [p for name, p in blocks.items() if "c_attn" in name]
        single = [p for name, p in blocks.items() if "c_attn" not in name]
        groups = [{"params": joined, "sizes": model.config.qkv_sizes}, {"params": single}]
        optimizers.append(Muon(groups, run.learning_rate, run.weight_decay))
    matrices = [p for p in rest.values() if p.dim() > 1]
    others = [p for p in rest.values() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": run.weight_decay},
              {"params": others, "weight_decay": 0.0}]
    optimizers.append(torch.optim.AdamW(groups, lr=run.learning_rate, betas=(run.beta1, run.beta2),
                                        fused=model.device.type in ("cpu", "cuda")))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is made orthogonal, for matrices (K. Jordan and others, 2024:
    https://kellerjordan.github.io/posts/muon). It is scaled to the usual size of AdamW's updates
    (J. Liu and others, 2025: https://arxiv.org/abs/2502.16982), so that learning rate and weight
    decay keep their meaning.

    torch.optim.Muon with adjust_lr_fn="match_rms_adamw" gives the same, one matrix at a time and in
    bfloat16 on every device. Here matrices of a shape share their products. Each process computes
    all of them; with FSDP the momentum is sharded as the gradient is.

    A group's "sizes" are the numbers of rows of the matrices that its parameters are joined of.
    """
    MOMENTUM = 0.95

    def __init__(self, groups, lr, weight_decay):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "sizes": None})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            equal = {}
            for p in group["params"]:
                if p.grad is not None:
                    equal.setdefault(p.shape, []).append(p)
            for parameters in equal.values():
                self.update(group, parameters)

    def update(self, group, parameters):
        """Update parameters of one shape."""
        for p in parameters:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momentum = [local(self.state[p]["momentum"]) for p in parameters]
        grads = [local(p.grad) for p in parameters]
        torch._foreach_lerp_(momentum, grads, 1 - self.MOMENTUM)
        directions = torch.stack(torch._foreach_lerp(grads, momentum, self.MOMENTUM))
        directions = gather_rows(directions, parameters[0])      # (n, R, C)
        updates = []
        for matrices in directions.split(group["sizes"] or directions.size(1), dim=1):
            scale = 0.2 * math.sqrt(max(matrices.shape[1:]))
            updates.append(scale * orthogonal(matrices))
        updates = own_rows(torch.cat(updates, dim=1), parameters[0])
        weights = [local(p) for p in parameters]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(weights, updates.unbind(), alpha=group["lr"])


def orthogonal(matrices):
    """Five Newton-Schulz steps: U V' of the matrices U S V', but for singular values between about
    0.7 and 1.2 in place of 1. (B, R, C) -> (B, R, C)"""
    fast = matrices.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    x = matrices.bfloat16() if fast else matrices.float()
    tall = x.size(1) > x.size(2)
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        square = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, square, x, beta=3.4445)
    return (x.mT if tall else x).to(matrices.dtype)


# --------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(trainer, data, samples):
    """-> (mean loss in nats over the targets of the samples, their number). The processes share the
    work, and each computes the same number of full batches: FSDP needs all of them in each."""
    run = trainer.run
    nats = 0.0
    targets = 0
    trainer.model.eval()
    at_once = run.batch_size * world_size()
    starts = range(0, len(samples), at_once)
    if is_main_process():
        starts = progress(starts, len(starts), "evaluation")
    for start in starts:
        x = torch.zeros(run.batch_size, data.block_size, dtype=torch.int64)
        y = torch.full_like(x, -1)
        for row, i in enumerate(samples[start:start + at_once][rank()::world_size()]):
            x[row], y[row] = data[i]
        with trainer.autocast():
            _, loss = trainer.model(x.to(trainer.device), y.to(trainer.device))
        count = int((y >= 0).sum())
        nats = nats + loss.float() * count
        targets += count
    trainer.model.train()
    nats, targets = mean_over_processes([nats, targets], trainer.device)
    return nats / max(targets, 1), targets * world_size()


def evenly_spaced(data, batches, batch_size):
    """The numbers of the samples in so many batches, evenly spaced; of all samples if 0."""
    count = min(batches * batch_size or len(data), len(data))
    return np.linspace(0, len(data) - 1, count).astype(int)


def evaluate_and_save(trainer, log, finished):
    """Evaluate, log, save and write a sample, unless this was done before a resume."""
    run = trainer.run
    if trainer.saved_step == trainer.step:
        return
    losses = {}
    for split, data in trainer.splits.items():
        samples = evenly_spaced(data, run.eval_iters, run.batch_size)
        losses[f"{split}_loss"], _ = evaluate(trainer, data, samples)
    if not all(map(math.isfinite, losses.values())):
        stop_not_finite(trainer, f"step {trainer.step}: an evaluated loss of {losses}")
    better = losses["val_loss"] < trainer.best_val_loss
    if better:
        trainer.best_val_loss = losses["val_loss"]
        trainer.best_step = trainer.step
    log.record(trainer, **losses)
    say(f"--- step {trainer.step:,}: train loss {losses['train_loss']:.4f}, validation loss "
        f"{losses['val_loss']:.4f}{' (best)' if better else ''}")
    if trainer.step > 0 or not run.always_save_checkpoint:       # else nothing was learned yet
        save_checkpoint(trainer, export=better or run.always_save_checkpoint)
    every = run.sample_interval
    if every and (finished or trainer.step % every < run.eval_interval):
        write_sample(trainer)
    log.restart_clock(trainer)


def write_sample(trainer):
    """Print a text by the model. Every process writes it, as FSDP needs all of them, and up to the
    same length: one that ends earlier would leave the others waiting."""
    tokenizer = trainer.tokenizer
    prompt = tokenizer.encode(tokenizer.default_prompt()).tolist()
    x, y = trainer.splits["val"][0]
    if y[0] < 0:                                                 # answer the first prompt
        prompt = x[:int((y >= 0).int().argmax()) + 1].tolist()
    generator = torch.Generator(trainer.device).manual_seed(trainer.run.seed)
    with trainer.autocast(), torch.compiler.set_stance("force_eager"):
        ids = trainer.model.generate(prompt, 128, 0.8, top_k=200, generator=generator)[0].tolist()
    answer = ids[len(prompt):]
    if tokenizer.end_of_text in answer:
        answer = answer[:answer.index(tokenizer.end_of_text)]
    say(textwrap.indent(tokenizer.decode(prompt + answer).strip("\n"), "    | ", bool))


def evaluate_only(trainer):
    """--eval_only: print loss, perplexity exp(loss), and bits per byte: the sum of the losses
    / ln 2 / bytes of the predicted tokens' text."""
    run = trainer.run
    data = trainer.splits["val"]
    samples = evenly_spaced(data, run.eval_iters, run.batch_size)
    say(f"samples   {len(samples):,} of {len(data):,}, {data.stride} tokens apart; --eval_iters=0 "
        f"takes all. Beyond a file's first sample a token has at least "
        f"{data.block_size - data.stride + 1} tokens of context")
    loss, targets = evaluate(trainer, data, samples)
    lengths = torch.from_numpy(trainer.tokenizer.byte_lengths())
    size = 0
    for i in samples:
        _, y = data[i]
        size += int(lengths[y[y >= 0]].sum())
    say(f"validation loss {loss:.4f} nats per token, of {targets:,.0f} tokens\n"
        f"perplexity {math.exp(min(loss, 700)):.2f} per token\n"
        f"bits per byte {loss * targets / math.log(2) / max(size, 1):.4f}, of {size:,} bytes")


def benchmark(trainer, steps=10):
    """--benchmark: time `steps` whole steps after two to warm up."""
    signals = StopSignals()
    for step in range(steps + 2):
        if step == 2:
            began = time.perf_counter()
        train_step(trainer, signals)
        if signals.exit_code:
            return signals.exit_code
    if trainer.device.type != "cpu":
        torch.accelerator.synchronize()
    seconds = (time.perf_counter() - began) / steps
    speed = 3 * trainer.model.config.flops_per_token() * trainer.tokens_per_step / seconds
    peak, whose = peak_flops(trainer.device)
    say(f"{trainer.tokens_per_step / seconds:,.0f} tokens per second, {seconds * 1e3:,.1f} ms a "
        f"step, {speed / world_size() / peak:.1%} of {whose}, "
        f"peak memory {peak_memory(trainer.device) / 1e9:.2f} GB")


# Dense FLOP/s in half precision, from the data sheets
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "T4": 65e12, "V100": 125e12}


def peak_flops(device):
    """-> (FLOP/s that the device reaches at best, whose figure it is)"""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for gpu, flops in PEAK_FLOPS.items():
            if re.search(rf"\b{gpu}(-|$| \d)", name):           # not of a "4090 Laptop GPU"
                return flops, f"the data sheet of {gpu}"
    a = torch.randn(4096, 4096, device=device)
    began = time.perf_counter()
    for _ in range(3):
        (a @ a)[0, 0].item()                                     # waits for the device
    return 3 * 2 * 4096**3 / (time.perf_counter() - began), "a float32 product of 4,096 x 4,096"


def peak_memory(device):
    """Peak memory of this process in bytes: the GPU's, or resident memory; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:                                          # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --------------------------------------------------------------------------------------------------
# Checkpoints of a run. The training state is one file, which becomes the checkpoint in one rename.
# Before it is written, the model is exported for sample.py and other tools.

CHECKPOINT = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"
PROGRESS = ("step", "samples", "best_val_loss", "best_step")


def load_checkpoint(out_dir):
    """-> the dict that save_checkpoint wrote to out_dir, None if there is none."""
    path = f"{out_dir}/{CHECKPOINT}"
    if not os.path.exists(path):
        return None
    try:
        with damage(path):
            wrong = zipfile.ZipFile(path).testzip()              # compares the checksums
            if wrong:
                raise ValueError(f"the checksum of {wrong} is wrong")
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            unknown = (saved["run"].keys() | saved["config"].keys()) - RUN - SHAPE
    except (OSError, ValueError) as error:
        advice = ""
        if os.path.exists(f"{out_dir}/{PREVIOUS}"):
            advice = f". Rename {PREVIOUS} to {CHECKPOINT} to resume from the one before it"
        sys.exit(f"train.py: {error}{advice}")
    if unknown:
        sys.exit(f"train.py: {path} has the flag {min(unknown)}, which this version of the code "
                 "does not know. Resume with the version that wrote it")
    return saved


def restore_progress(trainer, checkpoint):
    """Continue where the checkpoint was written; the model has its weights already."""
    for name in PROGRESS:
        setattr(trainer, name, checkpoint[name])
    trainer.saved_step = trainer.step
    trainer.scaler.load_state_dict(checkpoint["scaler"])
    if checkpoint["optimizers"] is None:                         # saved before the first step
        return
    import torch.distributed.checkpoint.state_dict as dcp  # takes a second
    # The settings of the optimizers are those of this run's flags.
    now = dcp.get_optimizer_state_dict(trainer.model, trainer.optimizers)
    state = {**checkpoint["optimizers"], "param_groups": now["param_groups"]}
    dcp.set_optimizer_state_dict(trainer.model, trainer.optimizers, state,
                                 options=dcp.StateDictOptions(full_state_dict=True))


def save_checkpoint(trainer, export):
    """Write the training state, and before it the model if `export`. Every process must call it;
    the main process writes, and holds the whole state in CPU memory."""
    import torch.distributed.checkpoint.state_dict as dcp  # takes a second
    run = trainer.run
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = dcp.get_model_state_dict(trainer.model, options=options)
    optimizers = None                    # torch would make a state, and count it as a step
    if all(optimizer.state for optimizer in trainer.optimizers):
        optimizers = dcp.get_optimizer_state_dict(trainer.model, trainer.optimizers,
                                                  options=options)
    if is_main_process():
        state = {"model": weights, "optimizers": optimizers, "scaler": trainer.scaler.state_dict(),
                 **{name: getattr(trainer, name) for name in PROGRESS},
                 "run": {name: value for name, value in asdict(run).items() if name not in RUNTIME},
                 "config": asdict(trainer.model.config), "tokenizer": trainer.tokenizer.to_json(),
                 "data": {split: data.fingerprint for split, data in trainer.splits.items()}}
        try:
            if export:
                write_pretrained(run.out_dir, trainer.model.config, weights, trainer.tokenizer)
            with atomic_write(f"{run.out_dir}/{CHECKPOINT}") as f:
                try:
                    torch.save(state, f)
                except RuntimeError as error:                    # so it reports a full disk
                    raise OSError(error) from error
                keep_previous(run.out_dir)
        except (OSError, ValueError) as error:
            sys.exit(f"train.py: the checkpoint of step {trainer.step} cannot be saved in "
                     f"{run.out_dir}: {error}. {trainer.last_checkpoint()}")
    trainer.saved_step = trainer.step


def keep_previous(out_dir):
    """Give the checkpoint a second name, where the disk has hard links."""
    part = f"{out_dir}/{PREVIOUS}.part"
    with contextlib.suppress(OSError):
        os.remove(part)                                          # left by a process that was killed
    with contextlib.suppress(OSError):
        os.link(f"{out_dir}/{CHECKPOINT}", part)
        os.replace(part, f"{out_dir}/{PREVIOUS}")


def open_out_dir(trainer):
    """Make out_dir and keep other runs out, as long as the file that this returns is open. A model
    or run that a new run would overwrite moves as a whole to the first free out_dir-N."""
    if not is_main_process():
        return None
    out_dir = os.path.normpath(trainer.run.out_dir)
    with one_line(OSError):
        lock = lock_folder(out_dir)
        models = [name for name in os.listdir(out_dir) if name.endswith((".safetensors", ".pt"))
                  or name in ("config.json", "meta.json", "tokenizer.json", "vocab.json")]
        if trainer.saved_step is None and models:
            number = 1
            while os.path.exists(f"{out_dir}-{number}"):
                number += 1
            os.rename(out_dir, f"{out_dir}-{number}")
            announce("moved", f"the run that was in {out_dir} to {out_dir}-{number}")
            lock = lock_folder(out_dir)
    return lock


def lock_folder(folder):
    """Take an exclusive lock on a folder, released when the process exits."""
    os.makedirs(folder, exist_ok=True)
    lock = open(f"{folder}/.lock", "w")
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(f"another run is writing to {folder}: wait until it ends, or choose another "
                      "--out_dir") from None
    except (ImportError, OSError):                               # Windows, or a disk without locks
        pass
    return lock


def resume_command():
    """The command of this run, to resume it on the same number of processes."""
    launcher = "python"
    if is_distributed():
        launcher = f"torchrun --standalone --nproc_per_node={world_size()}"
    return shlex.join([*launcher.split(), "train.py", *sys.argv[1:], "--init_from=resume"])


# --------------------------------------------------------------------------------------------------
# Log and picture


class Log:
    """metrics.jsonl, a line per step on the screen, and TensorBoard or Weights & Biases. Silent in
    all processes but the main one."""

    def __init__(self, trainer):
        run = trainer.run
        self.path = f"{run.out_dir}/metrics.jsonl"
        self.first_step = trainer.step
        self.began = time.monotonic()
        self.tensorboard = None
        self.wandb = None
        self.restart_clock(trainer)
        if not is_main_process():
            return
        with one_line(OSError, ImportError):
            resumed = trainer.saved_step is not None
            kept = [r for r in read_metrics(run.out_dir) if resumed and r["step"] <= trainer.step]
            with atomic_write(self.path) as f:                   # later records will come again
                f.writelines(json.dumps(record).encode() + b"\n" for record in kept)
            if run.tensorboard:
                from torch.utils.tensorboard import SummaryWriter
                self.tensorboard = SummaryWriter(f"{run.out_dir}/tensorboard",
                                                 purge_step=trainer.step)
            if run.wandb:
                import wandb
                self.wandb = wandb.init(project="gpt2", name=run.out_dir, config=vars(run))

    def restart_clock(self, trainer):
        """Begin to time steps: an evaluation is no training time."""
        self.since = time.monotonic()
        self.since_step = trainer.step

    def record(self, trainer, **values):
        if not is_main_process():
            return
        tokens = trainer.samples * trainer.model.config.block_size
        values = {"step": trainer.step, "tokens": tokens, **values}
        try:
            with open(self.path, "a") as f:
                f.write(json.dumps(values) + "\n")
        except OSError as error:
            sys.exit(f"train.py: {self.path} cannot be written: {error}. "
                     f"{trainer.last_checkpoint()}")
        if self.wandb:
            self.wandb.log(values, step=trainer.step)
        if self.tensorboard:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, trainer.step)

    def step(self, trainer, loss, norm):
        """Log a training step, if it is due."""
        run = trainer.run
        step = trainer.step
        if step % run.log_interval and step not in (self.first_step + 1, run.max_iters):
            return
        now = time.monotonic()
        seconds = max(now - self.since, 1e-9) / max(1, step - self.since_step)
        left = (run.max_iters - step) * (now - self.began) / (step - self.first_step)
        rate = learning_rate(run, step - 1)
        speed = trainer.tokens_per_step / seconds
        memory = peak_memory(trainer.device)
        text = (f"step {step:>{len(str(run.max_iters))}}/{run.max_iters}  loss {loss:.4f}  "
                f"lr {rate:.1e}  norm {norm:.2f}  {speed:7,.0f} tok/s  "
                f"{timedelta(seconds=int(left))} left")
        if memory:
            text += f"  {memory / 1e9:.2f} GB"
        say(text)
        self.record(trainer, loss=loss, lr=rate, grad_norm=norm,
                    tokens_per_second=round(speed, 1), memory=memory)
        self.restart_clock(trainer)

    def close(self, trainer, exit_code):
        """Draw the curves, and say how the run ended and what to do next."""
        run = trainer.run
        if not is_main_process():
            return
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()
        try:
            plot([run.out_dir])
        except (SystemExit, ValueError, TypeError, OverflowError) as error:
            say(f"loss.svg was not drawn: {error}")              # the run is good all the same
        if exit_code:
            return say(f"\nstopped at step {trainer.step}, saved in {run.out_dir}. Resume with\n"
                       f"    {resume_command()}")
        took = timedelta(seconds=int(time.monotonic() - self.began))
        say(f"\nbest validation loss {trainer.best_val_loss:.4f} (step {trainer.best_step}), {took}"
            f" of training\n"
            f"Sample with\n    python sample.py {shlex.join([f'--out_dir={run.out_dir}'])}")


def read_metrics(out_dir):
    """The records of metrics.jsonl. A truncated line is skipped."""
    records = []
    with contextlib.suppress(FileNotFoundError):
        with open(f"{out_dir}/metrics.jsonl", encoding="utf-8", errors="replace") as f:
            for line in f:
                with contextlib.suppress(ValueError, TypeError, LookupError):
                    record = json.loads(line)
                    record["step"] = int(record["step"])
                    records.append(record)
    return records


COLORS = ("#2f6fde", "#d9822b", "#2e9e5b", "#c23b5a", "#7d55c7", "#6b7280", "#0f9ba8", "#a3762a")
SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" font-size="12"
 font-family="sans-serif"><rect width="100%" height="100%" fill="#fff"/>
<path d="M64,16v340h680" stroke="#222" fill="none"/>
<svg x="64" y="16" width="680" height="340" viewBox="0 {top} {last} {span}"
 preserveAspectRatio="none">{lines}</svg>
{labels}</svg>
"""


def plot(out_dirs):
    """Draw the losses of runs over their steps: training thin, validation thick."""
    path = f"{out_dirs[0]}/loss.svg" if len(out_dirs) == 1 else "comparison.svg"
    runs = {out_dir: read_metrics(out_dir) for out_dir in out_dirs}
    last = max((r["step"] for records in runs.values() for r in records), default=0)
    shown = [r[name] for records in runs.values() for r in records for name in ("loss", "val_loss")
             if name in r and math.isfinite(r[name]) and r["step"] >= last / 20]     # no first drop
    if not shown:
        sys.exit(f"train.py: {' and '.join(out_dirs)}: metrics.jsonl holds no losses to draw")
    high = max(shown) + 0.05
    low = min(shown) - 0.05
    lines = ""
    labels = '<text x="400" y="396">step</text>'
    for tick in range(5):
        y = low + (high - low) * tick / 4
        labels += f'<text x="8" y="{360 - 85 * tick}">{y:.4g}</text>'
        labels += f'<text x="{50 + 165 * tick}" y="374">{last * tick / 4:,.0f}</text>'
    for i, (out_dir, records) in enumerate(runs.items()):
        color = COLORS[i % len(COLORS)]
        for name, width in (("loss", 1), ("val_loss", 2.5)):
            points = [f"{r['step']},{-r[name]:.5g}" for r in records if name in r]
            points = " ".join(points[::len(points) // 700 + 1])  # one for each pixel
            lines += (f'<polyline points="{points}" fill="none" stroke="{color}" '
                      f'stroke-width="{width}" vector-effect="non-scaling-stroke"/>')
        best = min((r["val_loss"] for r in records if "val_loss" in r), default=math.nan)
        label = f"{out_dir[-60:]}: training thin, validation thick, best {best:.4f}"
        label = label.replace("&", "&amp;").replace("<", "&lt;")
        labels += f'<text x="64" y="{420 + 18 * i}" fill="{color}">{label}</text>'
    svg = SVG.format(height=430 + 18 * len(runs), top=-high, last=max(last, 1), span=high - low,
                     lines=lines, labels=labels)
    with one_line(OSError), atomic_write(path) as f:
        f.write(svg.encode("utf-8", "replace"))
    say(f"The curves are in {path}")


# --------------------------------------------------------------------------------------------------
# Processes: all of torch.distributed, and signals


def is_distributed():
    """Whether torchrun started this process."""
    return "RANK" in os.environ


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process():
    return rank() == 0


def start_processes(run):
    """Connect the processes that torchrun started. Returns this process's device."""
    name = run.device
    mode = "single: not started by torchrun"
    if is_distributed():
        mode = "fsdp" if run.fsdp else "ddp"
        mode += f": torchrun started {os.environ['WORLD_SIZE']} processes"
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda":
            name = f"cuda:{os.environ['LOCAL_RANK']}"
    device, why = from_flags(choose_device, {"name": name})
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if is_distributed():
        # After a restart the store still has the addresses of the dead (pytorch issue 135712):
        # each attempt has its own prefix. Several machines may count attempts differently.
        store, own_rank, size = next(dist.rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
        dist.init_process_group(run.backend, timeout=timedelta(hours=1), store=store,
                                rank=own_rank, world_size=size)
    if device.type == "cpu":
        # glibc returns large freed blocks to the system and pays for their pages again in the next
        # step, 7 % of it. So: none by mmap (M_MMAP_MAX = -4), keep free ones (M_TRIM_THRESHOLD).
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
        if mallopt:
            mallopt(-4, 0)
            mallopt(-1, 2**31 - 1)
        if is_distributed() and os.environ.get("OMP_NUM_THREADS") == "1":        # set by torchrun
            threads = max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"]))
            torch.set_num_threads(threads)
            mode += f" of {threads} threads"
    announce("mode", mode)
    announce("device", f"{device}: {why}")
    return device


def distribute(model, fsdp, dtype):
    """Shard the model in place with FSDP, or wrap it with DDP. Returns the module to call."""
    if fsdp:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        policy = MixedPrecisionPolicy()
        if dtype == torch.bfloat16:
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        mesh = dist.init_device_mesh(model.device.type, (world_size(),))
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        # The root holds the embeddings. An evaluation has no backward pass that would reshard them.
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    elif is_distributed():
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model


def is_sharded(tensor):
    """Whether this is a DTensor, which only FSDP makes."""
    return hasattr(tensor, "full_tensor")


def whole(tensor):
    """The whole of a tensor that may be sharded. Every process must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor):
    """This process's shard of a tensor that may be sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def gather_rows(stack, p):
    """The whole of a stack (n, rows, C) of shards of parameters like p (R, C): (n, R, C)."""
    if not is_sharded(p):
        return stack
    from torch.distributed.tensor import DTensor, Shard
    shape = torch.Size((len(stack), *p.shape))
    return DTensor.from_local(stack, p.device_mesh, [Shard(1)], run_check=False, shape=shape,
                              stride=(p.numel(), p.size(1), 1)).full_tensor()


def own_rows(stack, p):
    """The inverse of gather_rows."""
    if not is_sharded(p):
        return stack
    from torch.distributed.tensor import Shard, distribute_tensor
    return distribute_tensor(stack, p.device_mesh, [Shard(1)], src_data_rank=None).to_local()


def mean_over_processes(values, device):
    """The means of a few numbers, as Python floats. Waits for the GPU."""
    tensors = [torch.as_tensor(v, dtype=torch.float32, device=device) for v in values]
    total = torch.stack(tensors).detach()
    if dist.is_initialized():
        dist.all_reduce(total)
    return (total / world_size()).tolist()


def all_gather(value):
    """[the value of every process]. Waits for all of them."""
    values = [value]
    if dist.is_initialized():
        values = [None] * world_size()
        dist.all_gather_object(values, value)
    return values


def main_process_first(work, name):
    """Call work(name) in the main process, then in the first process of each machine, which finds
    the work done if the machines share a disk. Every process waits."""
    if is_main_process():
        work(name)
    all_gather(None)
    if os.environ.get("LOCAL_RANK") == "0":
        work(name)
    all_gather(None)


def say(text):
    if is_main_process():
        print(text, flush=True)


def announce(topic, text):
    """Print a choice of the script."""
    say(f"{topic:10}{text}")


HANGUP = getattr(signal, "SIGHUP", None)         # not on Windows


class StopSignals:
    """Ctrl-C, SIGTERM and a terminal that closes let the step finish, and the run saves and ends. A
    second signal, two seconds later or more, exits at once (torchrun repeats a Ctrl-C)."""

    def __init__(self):
        self.received = 0                # exit code of a signal to this process
        self.exit_code = 0               # the same once all processes know
        self.deadline = math.inf
        for number in (signal.SIGINT, signal.SIGTERM, HANGUP):
            if number and signal.getsignal(number) != signal.SIG_IGN:        # as nohup sets it
                signal.signal(number, self.handle)
        if is_distributed():
            read, write = os.pipe()
            os.set_blocking(write, False)
            signal.set_wakeup_fd(write)          # gets the number of each signal as a byte
            threading.Thread(target=self.watch, args=[read], daemon=True).start()

    def watch(self, pipe):
        """End a process that waits for a dead one in a collective, where Python runs no handler."""
        while os.read(pipe, 1) != bytes([signal.SIGTERM]):
            pass
        time.sleep(12)
        if not self.exit_code:
            os._exit(143)

    def handle(self, number, frame):
        if time.monotonic() > self.deadline:
            os._exit(128 + number)
        if number == HANGUP:             # printing to a terminal that is gone would fail
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if is_main_process() and not self.received:              # print() may be running already
            os.write(1, b"\nstopping after this step; Ctrl-C again exits at once\n")
        self.received = 130 if number == signal.SIGINT else 143
        self.deadline = min(self.deadline, time.monotonic() + 2)


if __name__ == "__main__":
    try:
        code = main() or 0
    except RuntimeError as error:
        if "gloo/transport" not in str(error):
            raise
        sys.exit("train.py: another process of this run ended; its message says why")
    if dist.is_initialized():
        # Without Python's own shutdown: a thread of gloo that still holds a tensor would abort it
        # (pytorch PR 179291).
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
