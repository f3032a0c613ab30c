"""
Train a GPT-2 on one device, with DDP or with FSDP; the script detects which.

    python train.py                                           # Python's source
    torchrun --standalone --nproc_per_node=4 train.py         # DDP: a copy each
    torchrun --standalone --nproc_per_node=4 train.py --fsdp  # FSDP: 1/4 each
    python train.py --init_from=resume                        # resume out/
    python train.py --init_from=gpt2 --dataset=shakespeare    # fine-tune
    python train.py --help                                    # every flag

The defaults that --help shows are those of `python train.py`. With another
data set they are --learning_rate=0.003 --schedule=cosine --max_iters=1400
--no-muon; fine-tuning has its own, FINETUNE in this file.

What a step computes is a function of the flags, the seed and the step alone.
Neither the number of processes, nor the mode, nor a stop in between changes it
(except for the order in which floating point numbers are added).
"""
import collections
import contextlib
import ctypes
import functools
import gc
import json
import math
import os
import shlex
import shutil
import signal
import sys
import textwrap
import time
from dataclasses import asdict, astuple, dataclass, fields
from datetime import timedelta

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)                 # no traceback from an import
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))   # python -P leaves it out
from data import DATA
from data.cli import (
    Progress,
    UsageError,
    UserError,
    check_limits,
    flag,
    flags_in_source,
    lock,
    parse_flags,
    print_error,
    refuse,
    run_main,
    usage_errors,
)
from data.prepare import DATASETS, LARGE

# --------------------------------------------------------------------------------------------------
# Flags: these, and the fields of GPT2Config


@dataclass
class Run:
    """The flags of train.py. A field marked `runtime` belongs to the machine and the moment: it is
    never taken from a checkpoint."""
    init_from: str = flag(
        "scratch", "scratch, resume, auto (resume if out_dir has a checkpoint, else scratch), "
        "gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, a model of the hub (owner/name), a "
        "folder with a checkpoint, or a ckpt.pt of nanoGPT", runtime=True)
    out_dir: str = flag("out", "folder for checkpoint, metrics.jsonl and loss.svg", runtime=True)
    dataset: str = flag("stdlib", f"{', '.join(DATASETS)}, a name you gave to data/prepare.py, or "
                        "a folder with token files")
    size: str = flag(None, "layers, heads and width of OpenAI's gpt2, gpt2-medium, gpt2-large or "
                     "gpt2-xl, and block_size 1,024; with fineweb also batch, rate and steps",
                     runtime=True,
                     choices=("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"))
    seed: int = flag(1337, "random seed for weights, data order and dropout", at_least=0)
    batch_size: int = flag(4, "samples of block_size tokens in a batch of one process", at_least=1)
    gradient_accumulation_steps: int = flag(
        4, "batches per step, counted over all processes", at_least=1)
    max_iters: int = flag(1400, "steps of the run", at_least=0)
    learning_rate: float = flag(3e-3, "highest learning rate", at_least=0)
    decay_lr: bool = flag(True, "warm up, then decay to min_lr")
    schedule: str = flag("cosine", "of the decay: cosine, linear", choices=("cosine", "linear"))
    warmup_iters: int = flag(50, "steps of warm-up", at_least=0)
    lr_decay_iters: int = flag(None, "step at which min_lr is reached [max_iters]", at_least=1)
    min_lr: float = flag(None, "lowest learning rate; with --dataset, --size or --no-muon "
                         "learning_rate / 10", at_least=0)
    muon: bool = flag(False, "Muon in place of AdamW for the matrices of the blocks")
    weight_decay: float = flag(0.1, "weight decay, on matrices only", at_least=0)
    beta1: float = flag(0.9, "AdamW beta1", at_least=0, below=1)
    beta2: float = flag(0.99, "AdamW beta2", at_least=0, below=1)
    grad_clip: float = flag(1.0, "largest gradient norm, 0 = no limit", at_least=0)
    grad_checkpoint: bool = flag(
        False, "recompute blocks in the backward pass: less memory, more time", runtime=True)
    eval_interval: int = flag(200, "steps between evaluations, each followed by a checkpoint",
                              at_least=1)
    eval_iters: int = flag(20, "batches of each split per evaluation, over all processes; 0 = all. "
                           "Of hellaswag and lambada: items, all by default", at_least=0)
    sample_interval: int = flag(
        0, "steps between texts that the model writes, after an evaluation; 0 = none",
        runtime=True, at_least=0)
    eval_only: bool = flag(False, "evaluate on the validation data, and exit", runtime=True)
    eval_stride: int = flag(
        None, "with --eval_only: tokens between samples, each scores its last ones [block_size]",
        runtime=True, at_least=1)
    benchmark: bool = flag(False, "time the parts of a step and exit; writes nothing", runtime=True)
    trace: str = flag(None, "with --benchmark: write a profiler trace of a step to this file, for "
                      "chrome://tracing or Perfetto", runtime=True)
    always_save_checkpoint: bool = flag(
        True, "False: export the model only when the validation loss is the best so far")
    log_interval: int = flag(10, "steps between lines in the log and in metrics.jsonl", at_least=1)
    fsdp: bool = flag(
        False, "shard weights, gradients and optimizer over torchrun's processes", runtime=True)
    hsdp: bool = flag(False, "with --fsdp: shard within each machine, copy across machines",
                      runtime=True)
    backend: str = flag(None, "torch.distributed backend [nccl on GPUs, else gloo]", runtime=True)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps", runtime=True)
    dtype: str = flag("auto", "auto, float32, bfloat16, float16", runtime=True,
                      choices=("auto", "float32", "bfloat16", "float16"))
    compile: str = flag("auto", "torch.compile: auto, True, False", runtime=True, if_bare="True",
                        choices=("auto", "True", "False"))
    tensorboard: bool = flag(False, "also log to out_dir/tensorboard", runtime=True)
    wandb: bool = flag(False, "also log to Weights & Biases", runtime=True)
    plot: str = flag(None, "only draw: loss.svg of out_dir, or of out1,out2 in ./comparison.svg",
                     runtime=True, if_bare="")


RUN = {f.name: f for f in fields(Run)}
# Recipes: what a run from scratch or from trained weights changes in the defaults. From scratch the
# model is small enough to learn something on a CPU in minutes; fine-tuning is short and gentle.
SCRATCH = dict(block_size=128, n_layer=4, n_head=4, n_embd=128, vocab_size=None)
# The run of `python train.py`: Muon, for as long as AdamW would take for its 1,400 steps.
STDLIB = dict(muon=True, learning_rate=1e-2, schedule="linear", min_lr=0.0, max_iters=1150,
              sample_interval=400)
DEFAULTS = {**SCRATCH, **STDLIB}                                 # what --help shows
# GPT-2 on 5 billion tokens, 524,288 a step: with --size and --dataset=fineweb or fineweb_edu. After
# modded-nanogpt's second record (AdamW, rotary positions, this rate): a loss of 3.28 with 124M.
FINEWEB = dict(batch_size=16, gradient_accumulation_steps=32, max_iters=9536, learning_rate=1.8e-3,
               warmup_iters=250, min_lr=0.0, beta2=0.95)
FINETUNE = dict(dropout=0.1, learning_rate=3e-5, warmup_iters=10, max_iters=200,
                gradient_accumulation_steps=8, eval_interval=20, eval_iters=10, log_interval=1,
                always_save_checkpoint=False)
# The flags that `learning_rate` reads
SCHEDULE = ("learning_rate", "decay_lr", "schedule", "warmup_iters", "lr_decay_iters", "max_iters",
            "min_lr")
# The flags that have an effect on --eval_only
EVALUATION = {"init_from", "out_dir", "dataset", "batch_size", "eval_iters", "eval_only",
              "eval_stride", "fsdp", "hsdp", "backend", "device", "dtype", "compile"}
OUT_OF_MEMORY = ("The same result with less memory: divide --batch_size by a number, and multiply "
                 "--gradient_accumulation_steps and --eval_iters by it. Or add --grad_checkpoint, "
                 "or --fsdp under torchrun")

if __name__ == "__main__" and "--help" in sys.argv:              # before torch: it takes seconds
    model_file = os.path.join(os.path.dirname(os.path.abspath(__file__)), "model.py")
    SHAPE = flags_in_source(model_file, "GPT2Config")
    run_main(lambda: parse_flags(__doc__, {**RUN, **SHAPE}, defaults=DEFAULTS), OUT_OF_MEMORY)

# Else torch's C++ logs stack traces where a process ends while others still talk to it.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader

from data.loader import (
    ITEMS,
    EndlessSampler,
    TokenDataset,
    find_data,
    read_items,
    token_counts,
)
from data.tokenizer import check_tokenizer, load_tokenizer, tokenizer_from_json
from model import (
    CONVERTIBLE,
    GPT2,
    SIZES,
    SOURCES,
    TOKENIZER_FILES,
    GPT2Config,
    atomic_write,
    choose_compile,
    choose_device,
    choose_dtype,
    convert,
    cpu_supports,
    is_pretrained,
    read_pretrained,
    read_safetensors,
    write_pretrained,
    write_safetensors,
)

SHAPE = {f.name: f for f in fields(GPT2Config)}


def parse_command_line():
    """-> {name: value} of the flags that were typed. Raises UsageError for those without effect."""
    typed, _ = parse_flags(__doc__, {**RUN, **SHAPE}, defaults=DEFAULTS)
    if "plot" in typed:
        refuse(typed, typed.keys() - {"plot", "out_dir"}, "has no effect with --plot")
    if not typed.get("decay_lr", True):
        refuse(typed, ("schedule", "warmup_iters", "lr_decay_iters", "min_lr"),
               "has no effect without --decay_lr")
    if typed.get("eval_only"):
        refuse(typed, {*RUN, "dropout"} - EVALUATION, "has no effect with --eval_only")
    else:
        refuse(typed, ["eval_stride"], "has no effect without --eval_only")
    if typed.get("benchmark"):
        refuse(typed, ("eval_interval", "eval_iters", "sample_interval", "log_interval",
                       "always_save_checkpoint", "max_iters", "tensorboard", "wandb"),
               "has no effect with --benchmark")
    else:
        refuse(typed, ["trace"], "has no effect without --benchmark")
    trace = typed.get("trace")
    if trace and (os.path.isdir(trace) or not os.path.isdir(os.path.dirname(trace) or ".")):
        raise UsageError(f"--trace={trace} cannot be written: name a file in a folder that exists")
    if not is_distributed():
        refuse(typed, ["backend"], "has no effect on one process")
    if typed.get("fsdp") and not is_distributed():
        raise UsageError("--fsdp shares one model among several processes: start them with "
                         "torchrun --standalone --nproc_per_node=2 train.py --fsdp")
    if typed.get("hsdp"):
        check_machines(typed)
    for package in ("tensorboard", "wandb"):
        if typed.get(package):
            try:
                __import__(package)
            except ImportError:
                raise UsageError(f"--{package} needs a package: pip install {package}") from None
    return typed


def check_machines(typed):
    """Raise UsageError if --hsdp has no effect."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not typed.get("fsdp"):
        raise UsageError("--hsdp has no effect without --fsdp")
    if processes == world_size():
        raise UsageError("--hsdp has no effect on one machine: leave it out")


def resolve(typed):
    """Resolve every flag: defaults < recipe < checkpoint < typed.

    Returns (Run, {field of GPT2Config: value}, the Checkpoint to resume from or None).
    """
    asked = Run(**{name: value for name, value in typed.items() if name in RUN})
    source = asked.init_from
    checkpoint = None
    if source in ("resume", "auto"):
        checkpoint = find_checkpoint(asked.out_dir, must_exist=source == "resume")
        source = "resume" if checkpoint else "scratch"
    elif source != "scratch" and not is_pretrained(source):
        raise UsageError(f"--init_from={source} is not scratch, resume, auto, {SOURCES}")
    if asked.size and source != "scratch":
        raise UsageError("--size has no effect on weights that have a size: leave it out")
    saved = {}
    recipe = FINETUNE
    if source == "scratch":
        recipe = scratch_recipe(asked.size, asked.dataset, typed.get("muon", True))
        if asked.eval_only:
            raise UsageError("--eval_only would measure random weights: add --init_from=resume, "
                             f"{SOURCES}")
    elif source == "resume":
        recipe = {}
        saved = checkpoint.settings
        check_contradictions(typed, saved, asked.out_dir)
    settings = {**recipe, **saved, **typed, "init_from": source}
    run = Run(**{name: value for name, value in settings.items() if name in RUN})
    shape = {name: value for name, value in settings.items() if name in SHAPE}
    if run.decay_lr and run.min_lr is not None and run.min_lr > run.learning_rate:
        raise UsageError(f"--min_lr={run.min_lr:g} is above --learning_rate={run.learning_rate:g}: "
                         "the learning rate falls to min_lr")
    if not run.eval_only:
        check_accumulation(run)
    return run, shape, checkpoint


def scratch_recipe(size, dataset, muon):
    """The recipe of a run from scratch. muon: False if it must do without."""
    if size:
        recipe = {**SCRATCH, **SIZES[size], "block_size": 1024}
        if dataset in ("fineweb", "fineweb_edu"):
            recipe.update(FINEWEB)
        return recipe
    if dataset == Run.dataset and muon:
        return {**SCRATCH, **STDLIB}
    return SCRATCH


def check_contradictions(typed, saved, out_dir):
    """Raise UsageError for a typed flag that would make the resumed run another one."""
    for name in ("dataset", "seed", "muon", *SHAPE):
        changeable = name in ("dropout", "flash") or name == "dataset" and typed.get("eval_only")
        if name in typed and typed[name] != saved[name] and not changeable:
            other = "another run from scratch with --out_dir=..."
            if name in CONVERTIBLE or name in RUN:
                other = f"another run from these weights with --init_from={out_dir} --out_dir=..."
            raise UsageError(f"--{name}={typed[name]} contradicts the checkpoint in {out_dir}, "
                             f"which has {name}={saved[name]}: leave it out, or start {other}")


def check_accumulation(run):
    steps = run.gradient_accumulation_steps
    ranks = world_size()
    if steps % ranks:
        fewer = max(n for n in range(1, ranks) if steps % n == 0)
        raise UsageError(f"--gradient_accumulation_steps={steps} counts over all processes and "
                         f"does not divide among {ranks}: use {steps + -steps % ranks}, or "
                         f"--nproc_per_node={fewer}")


# --------------------------------------------------------------------------------------------------
# Processes: all of torch.distributed


store = None                                     # set by `open_store`


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main():
    return rank() == 0


def is_distributed():
    """Whether torchrun started this process."""
    return "RANK" in os.environ


def choose_process_device(name):
    """-> (this process's device, why)"""
    if not is_distributed():
        return choose_device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cuda", "cpu"):
        raise UsageError(f"--device={name} serves one process: under torchrun use cuda or cpu")
    if name == "cuda":
        gpus = torch.cuda.device_count()
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= gpus:
            raise UsageError(f"process {local_rank} of this machine found {gpus} GPUs: use "
                             f"--nproc_per_node={max(gpus, 1)}, or --device=cpu")
        torch.cuda.set_device(local_rank)
        name = f"cuda:{local_rank}"
    return choose_device(name)


def open_store():
    """Open the key-value store that all processes share; `report` uses it from now on."""
    if not is_distributed():
        return
    # After a restart by torchrun the store still has the addresses of the dead processes (pytorch
    # issue 135712): each attempt uses its own prefix. Several machines may count differently.
    attempt = ""
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    global store
    store = dist.PrefixStore(attempt, next(dist.rendezvous("env://"))[0])


def join(device, backend):
    """Connect the processes: small messages over gloo, tensors over `backend`."""
    if not is_distributed():
        return
    known = ("nccl", "gloo") if device.type == "cuda" else ("gloo",)
    backend = backend or known[0]
    if backend not in known:
        raise UsageError(f"--backend={backend} does not work on {device.type}: use "
                         f"{' or '.join(known)}")
    if device.type == "cuda":
        backend = f"cpu:gloo,cuda:{backend}"
    dist.init_process_group(backend, timeout=timedelta(hours=1), store=store, rank=rank(),
                            world_size=world_size())
    gather(None)                        # an exit now would break connections that others still open


def gather(value):
    """[the value of every process]. Waits for all of them."""
    values = [value]
    if dist.is_initialized():
        values = [None] * world_size()
        dist.all_gather_object(values, value)
    return values


def main_first(work, name):
    """Call work(name) in the main process, then in the first process of each machine, which finds
    the work done if the machines share a disk. Every process waits."""
    if is_main():
        work(name)
    gather(None)
    if os.environ.get("LOCAL_RANK") == "0":
        work(name)
    gather(None)


def check_same(what, value):
    """Raise UserError if `value` differs between the processes."""
    values = gather(value)
    for other_rank, other in enumerate(values):
        if other != values[0]:
            raise UserError(f"{what}: process {other_rank} of {len(values)} has {other}, process 0 "
                            f"has {values[0]}")


def sum_over_processes(values, device):
    """The sums of a few numbers, as Python floats. Waits for the GPU."""
    tensors = [torch.as_tensor(v, dtype=torch.float32, device=device) for v in values]
    total = torch.stack(tensors).detach()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


@functools.cache
def device_mesh(device_type, hsdp=False):
    """All processes in a row; with hsdp one row for each machine."""
    if not hsdp:
        return dist.init_device_mesh(device_type, (world_size(),))
    processes = int(os.environ["LOCAL_WORLD_SIZE"])
    return dist.init_device_mesh(device_type, (world_size() // processes, processes),
                                 mesh_dim_names=("machine", "process"))


def shard(model, run, device, dtype):
    """Shard a model made on the meta device if the run uses FSDP, then allocate its weights."""
    if run.fsdp:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        policy = MixedPrecisionPolicy()
        if dtype == torch.bfloat16:
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        mesh = device_mesh(device.type, run.hsdp)
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)          # the root holds the embeddings
    return model.to_empty(device=device)


def wrap(model, fsdp):
    """The module whose forward pass a training step calls."""
    if fsdp or not is_distributed():
        return model
    return torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def set_sync(net, last):
    """Let DDP, and HSDP between machines, exchange gradients only in the last batch of a step. To
    be called before the forward pass. Within its mesh FSDP exchanges them in every batch: else each
    process would keep them whole."""
    if isinstance(net, torch.nn.parallel.DistributedDataParallel):
        net.require_backward_grad_sync = last
    elif hasattr(net, "set_requires_all_reduce"):
        net.set_requires_all_reduce(last)


MAIN_FIRST = 2                                   # seconds that the others wait in `report`


def report(message):
    """Print an error unless another process has printed one. The main process goes first: if it
    fails too, torchrun ends the others while they wait."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    first = is_main()
    if not first:
        time.sleep(MAIN_FIRST)
    if store is not None:
        with contextlib.suppress(RuntimeError, OSError):         # it ended with process 0
            restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
            first = store.add(f"errors {restarts}", 1) == 1
    if first:
        print_error(message)


def say(*words):
    if is_main():
        print(*words, flush=True)


def announce(topic, text):
    """Print a topic, wrapped at 80 columns."""
    say(textwrap.fill(f"{topic:10}{text}", 80, subsequent_indent=" " * 10, break_long_words=False,
                      break_on_hyphens=False))


def lost_connection(error):
    """Whether this is how gloo reports that another process has ended."""
    return "by peer" in str(error) or "Broken pipe" in str(error)


def gathered(tensor):
    """The whole of a tensor that may be sharded. Every process must call it."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.detach()


@torch.no_grad()
def fill(tensor, whole):
    """Copy `whole`, or this process's shard of it, into `tensor`."""
    tensor.copy_(own_part(whole, tensor))


def own_part(whole, tensor):
    """`whole`, or this process's shard of it if `tensor` is sharded."""
    if not hasattr(tensor, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements,
                             src_data_rank=None)


def own_rows(tensor):
    """This process's rows of a tensor that every process has, as a DTensor."""
    if not is_distributed() or hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import Shard, distribute_tensor
    mesh = device_mesh(tensor.device.type)
    return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)


def broadcast(tensor, source):
    """Replace a tensor by that of the process `source`. Every process must call it."""
    if dist.is_initialized():
        dist.broadcast(tensor, source)


# --------------------------------------------------------------------------------------------------
# Checkpoints of a run. The training state is one file, which becomes the checkpoint in one rename.
# Before it is written, the model is exported for sample.py and other tools.

STATE = "training_state.safetensors"
PREVIOUS = "training_state.previous.safetensors"


@dataclass
class State:
    """Where a run is."""
    step: int = 0                                # steps finished
    samples: int = 0                             # samples consumed, by all processes together
    best_val_loss: float = math.inf
    best_step: int = -1                          # -1: none
    evaluated_step: int = -1                     # of the last evaluation

    def __post_init__(self):
        if [type(value) for value in astuple(self)] != [int, int, float, int, int]:
            raise ValueError(f"{self} has values of wrong types")
        if self.step < 0 or self.samples < 0 or not self.best_val_loss > -math.inf:
            raise ValueError(f"{self} is impossible")


class Checkpoint:
    """A training state, read from out_dir."""

    def __init__(self, out_dir):
        self.path = f"{out_dir}/{STATE}"
        self.out_dir = out_dir
        try:
            self.tensors, metadata = read_safetensors(self.path)
            saved = json.loads(metadata["training_state"])
            names = set(saved["tensors"])
            for name in sorted(names ^ self.tensors.keys()):
                word = "lacks" if name in names else "holds an unknown"
                raise ValueError(f"it {word} {name!r}")
            self.state = State(**saved["state"])
            self.tokenizer = tokenizer_from_json(saved["tokenizer"])
            self.data = dict(saved["data"])
            self.scaler = dict(saved["scaler"])
            self.optimizers = list(map(str, saved["optimizers"]))
            run = dict(saved["run"])
            shape = dict(saved["config"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(self.damaged(error)) from None
        self.check_version(run, shape)
        try:
            for name, value in run.items():
                check_saved_flag(name, value)
            config = GPT2Config(**shape)
            defaults = {name: f.default for name, f in RUN.items() if "runtime" not in f.metadata}
            self.settings = {**defaults, **run, **asdict(config)}
            if config.n_layer > len(self.tensors):               # or it takes hours to build them
                raise ValueError(f"it has fewer tensors than n_layer={config.n_layer}")
            with torch.device("meta"):
                parameters = dict(GPT2(config).named_parameters())
            for name, p in parameters.items():
                if name not in self.tensors or self.tensors[name].shape != p.shape:
                    raise ValueError(f"it has no {name} of shape {tuple(p.shape)}")
        except (UserError, ValueError, TypeError) as error:
            raise UserError(self.damaged(error)) from None
        self.weights = {name: self.tensors.pop(name) for name in parameters}
        for name in self.tensors:                                # optimizer.NUMBER.KEY.PARAMETER
            if name.split(".", 3)[-1] not in parameters or not name.split(".")[1].isdecimal():
                raise UserError(f"{self.path} was written by another version of the code: it holds "
                                f"{name!r:.80}")

    def damaged(self, error):
        """The text of an error in the file, with safe advice."""
        text = f"{error}" if self.path in str(error) else f"{self.path} is damaged ({error!r:.200})"
        previous = f"{self.out_dir}/{PREVIOUS}"
        if os.path.exists(previous) and not os.path.samefile(previous, self.path):
            text += (f". The state before it is {previous}: rename it to {STATE} to resume from "
                     "there")
        return text

    def check_version(self, run, shape):
        """Raise UserError for a saved flag that this version of the code does not have. A flag that
        is newer than the file has its default."""
        for name in sorted((run.keys() - RUN.keys()) | (shape.keys() - SHAPE.keys())):
            raise UserError(f"{self.path} was written by another version of the code: it has "
                            f"{name!r:.80}. Resume with that version, or start another run from "
                            f"its weights with --init_from={self.out_dir} --out_dir=...")

    def restore(self, optimizers, parameters):
        """Load the state of the optimizers, or this process's shards of it."""
        names = [type(optimizer).__name__ for optimizer in optimizers]
        if names != self.optimizers:
            raise UserError(f"{self.path} holds the state of {', '.join(self.optimizers)}; this "
                            f"run uses {', '.join(names)}")
        state = {}
        for name, value in self.tensors.items():
            _, i, key, parameter = name.split(".", 3)
            p = parameters[parameter]
            if not fits(value, p):
                raise UserError(self.damaged(ValueError(
                    f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}")))
            value = placed(value, p)
            if int(i) < len(optimizers) and isinstance(optimizers[int(i)], Muon):
                value = own_rows(value).clone()                  # the rest may be freed
            state.setdefault((int(i), p), {})[key] = value
        for i, optimizer in enumerate(optimizers):
            # load_state_dict numbers the parameters in the order of the groups.
            ordered = [p for group in optimizer.param_groups for p in group["params"]]
            numbered = {n: state.pop((i, p), {}) for n, p in enumerate(ordered)}
            # It keeps the same for all vectors, and for all matrices.
            for dim in (1, 2):
                kept = {frozenset(numbered[n]) for n, p in enumerate(ordered) if p.dim() == dim}
                if len(kept) > 1:
                    raise UserError(self.damaged(ValueError("it lacks tensors of an optimizer")))
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": numbered, "param_groups": groups})
        if state:
            raise UserError(f"{self.path} divides the parameters among the optimizers in another "
                            "way than this run")


def find_checkpoint(out_dir, must_exist):
    """-> the Checkpoint in out_dir, the same in every process; None if there is none."""
    checkpoint = None
    if os.path.exists(f"{out_dir}/{STATE}"):
        checkpoint = Checkpoint(out_dir)
    elif must_exist or os.path.exists(f"{out_dir}/training_state.pt"):
        raise UserError(f"there is no checkpoint in {out_dir} to resume"
                        + advice_on_old_layout(out_dir))
    check_same(f"step of the checkpoint in {out_dir} (put it on a disk that all machines share)",
               checkpoint and checkpoint.state.step)
    return checkpoint


def check_saved_flag(name, value):
    """Raise an error unless `value` is one that the flag `name` of a run can have."""
    default = RUN[name].default
    if value is None and default is None:
        return
    if default is not None and type(value) is not type(default):
        raise TypeError(f"{name}={value!r:.50} is not of type {type(default).__name__}")
    check_limits(name, value, RUN[name].metadata)


def fits(value, p):
    """Whether an optimizer can keep this tensor for the parameter p: a number, or numbers for all
    of it, for its rows or for its columns."""
    if value.dim() == 0:
        return True
    sizes = zip(value.shape, p.shape, strict=False)
    return (value.is_floating_point() and value.dim() == p.dim()
            and all(kept in (1, size) for kept, size in sizes))


def placed(value, p):
    """A copy of an optimizer's tensor: sharded as the parameter p if it has its shape."""
    if value.shape != p.shape:
        return value.clone()
    tensor = torch.zeros_like(p)
    fill(tensor, value)
    return tensor


def save_checkpoint(trainer, tokenizer, export):
    """Write the training state, and before it the model if `export`. Every process must call it."""
    run = trainer.run
    step = trainer.state.step
    try:
        if export:
            save_export(trainer, tokenizer)
        save_state(trainer, tokenizer)
    except OSError as error:
        raise UserError(f"the checkpoint of step {step} cannot be saved in {run.out_dir}: {error}. "
                        f"{last_checkpoint(trainer)}") from None
    trainer.saved_step = step


def save_state(trainer, tokenizer):
    """Write the training state. Every process must call it; the main process writes, and holds one
    whole tensor at a time."""
    run = trainer.run
    tensors = dict(trainer.parameters)
    for i, optimizer in enumerate(trainer.optimizers):
        for name, p in trainer.parameters.items():
            for key, value in sorted(optimizer.state.get(p, {}).items()):
                if not isinstance(value, torch.Tensor):
                    raise TypeError(f"the optimizer keeps {key}={value!r} for {name}; only tensors "
                                    "can be saved")
                tensors[f"optimizer.{i}.{key}.{name}"] = value
    whole = map(gathered, tensors.values())                      # lazy: one of them at a time
    if not is_main():
        return exhaust(whole)
    settings = {name: value for name, value in asdict(run).items()
                if "runtime" not in RUN[name].metadata}
    fingerprints = {split: data.fingerprint for split, data in trainer.splits.items()}
    saved = {"state": asdict(trainer.state), "run": settings, "config": asdict(trainer.config),
             "tokenizer": tokenizer.to_json(), "data": fingerprints, "tensors": list(tensors),
             "optimizers": [type(optimizer).__name__ for optimizer in trainer.optimizers],
             "scaler": trainer.scaler.state_dict()}
    path = f"{run.out_dir}/{STATE}"
    entries = {name: (t.dtype, t.shape) for name, t in tensors.items()}
    with atomic_write(path) as f:
        write_safetensors(f, entries, whole, {"training_state": json.dumps(saved)})
        keep_previous(path, f"{run.out_dir}/{PREVIOUS}")


def keep_previous(path, previous):
    """Give the file at `path` a second name, `previous`, where the disk has hard links."""
    part = f"{previous}.part"
    with contextlib.suppress(FileNotFoundError):
        os.remove(part)                                          # left by a process that was killed
    with contextlib.suppress(OSError):
        if not os.path.exists(previous) or not os.path.samefile(path, previous):
            os.link(path, part)
            os.replace(part, previous)


def save_export(trainer, tokenizer):
    """Write the model for sample.py and other tools. Every process must call it."""
    whole = map(gathered, trainer.parameters.values())
    if not is_main():
        return exhaust(whole)
    write_pretrained(trainer.run.out_dir, trainer.config, whole, tokenizer,
                     {"step": str(trainer.state.step)})


def exhaust(tensors):
    """Take part in gathering tensors that the main process writes."""
    for _ in tensors:
        pass


def set_aside(out_dir):
    """Move the run or model that a new run would overwrite into the first free out_dir/run-N.
    Returns that folder, None if there is none. The state goes first, so that half of a run is never
    resumed, and the weights last: as long as they are here, the next call finishes an interrupted
    move."""
    weights = [name for name in sorted(os.listdir(out_dir)) if name.startswith("model")
               and name.endswith((".safetensors", ".safetensors.index.json"))]
    names = [STATE, PREVIOUS, "training_state.pt", "config.json", "generation_config.json",
             "metrics.jsonl", "loss.svg", "tensorboard", *sorted(TOKENIZER_FILES), *weights]
    here = [name for name in names if os.path.exists(f"{out_dir}/{name}")]
    if not weights and STATE not in here and "config.json" not in here:
        return None
    number = 1
    while any(os.path.exists(f"{out_dir}/run-{number}/{name}") for name in here):
        number += 1
    folder = f"{out_dir}/run-{number}"
    os.makedirs(folder, exist_ok=True)
    for name in here:
        os.rename(f"{out_dir}/{name}", f"{folder}/{name}")
    return folder


def advice_on_old_layout(out_dir):
    if os.path.exists(f"{out_dir}/training_state.pt"):
        return (". Its training_state.pt is of an older version and cannot be resumed. Start a run "
                f"from its weights: python train.py --init_from={shlex.quote(out_dir)} "
                f"--out_dir={shlex.quote(out_dir + '-2')} --dataset=NAME")
    return ": name its folder with --out_dir, or leave out --init_from to start from scratch"


# --------------------------------------------------------------------------------------------------
# Log and picture


class Log:
    """metrics.jsonl, a line per step on the screen, and TensorBoard or Weights & Biases. Silent in
    all processes but the main one."""

    def __init__(self, run, config, step, resumed):
        self.first_step = step
        self.since_step = step                   # of the last record, and its time
        self.since = self.began = time.monotonic()
        self.path = f"{run.out_dir}/metrics.jsonl"
        self.width = 0
        self.recent = collections.deque(maxlen=100)              # losses
        self.spiked = False
        self.tensorboard = None
        self.wandb = None
        if not is_main():
            return
        if run.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.tensorboard = SummaryWriter(f"{run.out_dir}/tensorboard", purge_step=step)
        if run.wandb:
            self.wandb = start_wandb(run, config)
        kept = [r for r in read_metrics(run.out_dir) if resumed and r["step"] <= step]
        with atomic_write(self.path) as f:                       # later records will come again
            f.writelines(json.dumps(record).encode() + b"\n" for record in kept)

    def record(self, trainer, **values):
        if not is_main():
            return
        step = trainer.state.step
        values = {"step": step, "tokens": step * trainer.tokens_per_step, **values}
        try:
            with open(self.path, "a") as f:
                f.write(json.dumps(values) + "\n")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error}. "
                            f"{last_checkpoint(trainer)}") from None
        if self.wandb:
            self.wandb.log(values, step=step)
        if self.tensorboard:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)

    def close(self):
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()

    def step(self, trainer, loss, norm):
        """Log a training step."""
        run = trainer.run
        step = trainer.state.step
        now = time.monotonic()
        seconds = max(now - self.since, 1e-9) / (step - self.since_step)
        speed = trainer.tokens_per_step / seconds
        memory = peak_memory(trainer.device)
        rate = learning_rate(run, step - 1)
        values = {"loss": loss, "lr": rate, "grad_norm": norm, "tokens_per_second": round(speed, 1),
                  "memory": memory}
        left = (run.max_iters - step) * (now - self.began) / (step - self.first_step)
        left = timedelta(seconds=int(left))
        text = (f"step {step:>{len(str(run.max_iters))}}/{run.max_iters}  loss {loss:.4f}  "
                f"lr {rate:.1e}  norm {norm:.2f}  {speed:7,.0f} tok/s  {left} left")
        if trainer.peak_flops:
            values["mfu"] = trainer.flops_per_step / seconds / world_size() / trainer.peak_flops
            text += f"  mfu {values['mfu']:.1%}"
        if memory:
            text += f"  {memory / 1e9:.2f} GB"
        due = step % run.log_interval == 0 or step in (self.first_step + 1, run.max_iters)
        if due:
            self.record(trainer, **values)
            self.since = time.monotonic()
            self.since_step = step
        self.line(text, stay=due)
        self.report_spike(trainer, loss)

    def report_spike(self, trainer, loss):
        """Tell, once in a run, that a loss is far above the 100 before it."""
        if len(self.recent) == self.recent.maxlen and not self.spiked:
            mean = np.mean(self.recent)
            deviation = np.std(self.recent, ddof=1)
            if loss > mean + 10 * deviation:
                self.spiked = True
                self.line(f"!!! step {trainer.state.step:,}: the loss rose to {loss:.4f}; the 100 "
                          f"steps before it had {mean:.4f} ± {deviation:.4f}. If it does not fall "
                          "again, stop and resume with a lower --learning_rate. "
                          f"{last_checkpoint(trainer)}")
        self.recent.append(loss)

    def line(self, text, stay=True):
        """In a terminal each line overwrites the last until stay=True; a log file gets only lines
        with stay=True."""
        if not is_main():
            return
        if sys.stdout.isatty():
            columns = shutil.get_terminal_size().columns
            while len(text) >= columns and "  " in text:         # leave out the last fields
                text = text.rpartition("  ")[0].rstrip()
            print("\r" + text.ljust(self.width), end="\n" if stay else "", flush=True)
            self.width = 0 if stay else len(text)
        elif stay:
            print(text, flush=True)


def start_wandb(run, config):
    import wandb
    try:
        wandb.init(project="gpt2", name=run.out_dir, config={**asdict(run), **asdict(config)})
    except Exception as error:                                   # wandb raises its own kinds
        raise UserError(f"--wandb cannot start: {error}") from None
    return wandb


def read_metrics(out_dir):
    """The records of metrics.jsonl. A truncated line, or one that is not of numbers, is skipped."""
    path = f"{out_dir}/metrics.jsonl"
    if not os.path.exists(path):
        return []
    records = []
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError,
                                     RecursionError):
                record = json.loads(line)
                numbers = all(type(v) in (int, float) for v in record.values())
                if type(record["step"]) is int and numbers:
                    records.append(record)
    return records


def plot(out_dirs, path, over="step"):
    """Draw the losses of runs over steps or tokens: training thin, validation with dots."""
    curves = []
    for out_dir in out_dirs:
        points = {"loss": [], "val_loss": []}
        for record in read_metrics(out_dir):
            for name in points.keys() & record.keys():
                if math.isfinite(record[name]):
                    points[name].append((record[over], record[name]))
        line, dots = points.values()
        if not line and not dots:
            raise UserError(f"{out_dir}/metrics.jsonl holds no losses to draw: train first")
        label = os.path.normpath(out_dir)[-60:]
        if dots:
            label += f", best validation {min(y for _, y in dots):.4f}"
        curves.append((label, line[::len(line) // 640 + 1], dots))     # one point for a pixel
    every = [point for _, line, dots in curves for point in line + dots]
    last = max(x for x, _ in every)
    low = min(y for _, y in every)
    high = max(y for x, y in every if x >= last / 20 or last < 1000)   # cuts off a first drop
    margin = 0.05 * (high - low or 1)
    axes = (f"{over.rstrip('s')}s (thin: training, dots: validation)", "loss (nats per token)")
    draw(path, curves, axes, low - margin, high + margin)


COLORS = ("#2f6fde", "#d9822b", "#2e9e5b", "#c23b5a", "#7d55c7", "#6b7280", "#0f9ba8", "#a3762a")
SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" font-size="12"
 font-family="system-ui, sans-serif"><style>svg{{background:#fff}} text{{fill:#222}}
.grid{{stroke:#ddd}} .axis{{stroke:#222;fill:none}} polyline{{fill:none}}
@media (prefers-color-scheme:dark){{svg{{background:#14161a}} text{{fill:#ddd}}
.grid{{stroke:#333}} .axis{{stroke:#ddd}}}}</style>
<clipPath id="plot"><path d="M64,16h676v344h-676"/></clipPath>
<path class="axis" d="M64,16v340h672"/>
<text x="400" y="396" text-anchor="middle">{x_axis}</text>
<text transform="translate(16 186) rotate(-90)" text-anchor="middle">{y_axis}</text>
{content}
</svg>
"""


def draw(path, curves, axes, low, high):
    """Write an SVG. curves: (label, points of a thin line, points to mark with dots), with points
    (x, y); axes: their two names; low and high: the range of y."""
    end = max(max(x for _, line, dots in curves for x, _ in line + dots), 1)
    ranges = (end, low, high)
    content = []
    for y in ticks(low, high):
        _, py = place((0, y), *ranges)
        content.append(f'<path class="grid" d="M64,{py}h672"/>'
                       f'<text x="56" y="{py + 4}" text-anchor="end">{y:.4g}</text>')
    for x in ticks(0, end):
        px, _ = place((x, low), *ranges)
        content.append(f'<path class="grid" d="M{px},16v340"/>'
                       f'<text x="{px}" y="374" text-anchor="middle">{x:,.10g}</text>')
    for i, (label, line, dots) in enumerate(curves):
        color = COLORS[i % len(COLORS)]
        content.append('<g clip-path="url(#plot)">')
        for points, width in ((line, 1), (dots, 2)):
            corners = " ".join("{},{}".format(*place(point, *ranges)) for point in points)
            content.append(f'<polyline stroke="{color}" stroke-width="{width}" '
                           f'points="{corners}"/>')
        if len(dots) <= 100:
            content += [circle(*place(point, *ranges), color) for point in dots]
        y = 420 + 18 * i
        label = label.replace("&", "&amp;").replace("<", "&lt;")
        content.append(f'</g><path stroke="{color}" stroke-width="2" d="M64,{y}h24"/>'
                       f'{circle(76, y, color)}<text x="96" y="{y + 4}">{label}</text>')
    svg = SVG.format(height=428 + 18 * len(curves), x_axis=axes[0], y_axis=axes[1],
                     content="\n".join(content))
    with atomic_write(path) as f:
        f.write(svg.encode("utf-8", "replace"))


def place(point, end, low, high):
    """Where a point (x, y) is in the picture."""
    x, y = point
    return round(64 + 672 * x / end, 1), round(16 + 340 * (high - y) / (high - low), 1)


def circle(x, y, color):
    return f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>'


def ticks(low, high):
    """Two to ten round numbers from low to high."""
    step = 10 ** math.floor(math.log10(high - low))
    if high - low < 4 * step:
        step /= 2
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


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


# Dense FLOP/s in half precision, from the data sheets
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
              "L40S": 362e12, "L4": 121e12, "4090": 165e12, "3090": 71e12, "A10": 125e12,
              "T4": 65e12, "V100": 125e12}


def peak_flops(device, dtype):
    """What the GPU can do at best in FLOP/s, None if unknown."""
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for part, flops in PEAK_FLOPS.items():
            if part in name:
                return flops
    return None


# --------------------------------------------------------------------------------------------------
# Building: data, model, optimizers


def prepare_once(name):
    """Prepare the data set `name` unless it is there."""
    folder = f"{DATA}/{name}"
    if not os.path.exists(f"{folder}/meta.json"):
        DATASETS[name](folder)


def open_data(run):
    """-> (folder, {split: paths}, tokenizer). A small data set with a name is prepared first."""
    if run.dataset in DATASETS and run.dataset not in LARGE:
        main_first(prepare_once, run.dataset)
    folder, paths = find_data(run.dataset)
    if os.path.exists(f"{folder}/{ITEMS}"):
        if not run.eval_only:
            raise UsageError(f"--dataset={run.dataset} only compares models: add --eval_only")
        if run.eval_stride:
            raise UsageError(f"--eval_stride has no effect on {run.dataset}")
    if run.eval_only:
        del paths["train"]                                       # it may be empty
    return folder, paths, load_tokenizer(folder)


def choose_model(run, shape, checkpoint, tokenizer):
    """-> (GPT2Config, weights or None for new ones)"""
    source = run.out_dir if run.init_from == "resume" else run.init_from
    if source == "scratch":
        shape["vocab_size"] = shape["vocab_size"] or tokenizer.vocab_size
        if shape["vocab_size"] < tokenizer.vocab_size:
            raise UsageError(f"--vocab_size={shape['vocab_size']} is too small: the data has "
                             f"{tokenizer.vocab_size} different tokens")
        with usage_errors():
            return GPT2Config(**shape), None
    if checkpoint and not (run.eval_only or run.benchmark):
        trained_with = checkpoint.tokenizer
        weights = checkpoint.weights
        with usage_errors():
            config = GPT2Config(**shape)
    else:                                                        # the exported model
        if not os.path.exists(source):                           # they are downloaded
            main_first(read_pretrained, source)
            main_first(load_tokenizer, source)
        saved_config, weights, notes = read_pretrained(source)
        trained_with = load_tokenizer(source)
        with usage_errors():
            config, weights, changes = convert(saved_config, weights, shape)
        check_tokenizer(trained_with, config.vocab_size, source)
        for change in notes + changes:
            announce("changed", change)
    if trained_with.to_json() != tokenizer.to_json():
        raise UserError(f"{source} uses {trained_with.name} tokens, vocabulary "
                        f"{trained_with.vocab_size}; the data set {run.dataset} was made with "
                        f"{tokenizer.name} tokens, vocabulary {tokenizer.vocab_size}: choose or "
                        "prepare one with the model's tokenizer")
    return config, weights


def open_splits(folder, paths, config, checkpoint, run):
    """-> {split: TokenDataset}, checked to be those of the checkpoint."""
    counts = token_counts(folder)
    splits = {split: TokenDataset(paths[split], config.block_size, config.vocab_size,
                                  counts.get(split)) for split in paths}
    fingerprints = {split: data.fingerprint for split, data in splits.items()}
    check_same(f"the data in {folder} must be the same in every process", fingerprints)
    if checkpoint and not run.eval_only:
        for split, now in fingerprints.items():
            before = checkpoint.data.get(split)
            if before != now:
                raise UserError(f"the {split} data in {folder} has changed since the checkpoint in "
                                f"{run.out_dir}: it had {before}, now {now}. Restore it, or start "
                                f"another run from these weights with --init_from={run.out_dir} "
                                "--out_dir=...")
    return splits


def build_model(run, config, weights, device, dtype, compiled):
    with torch.device("meta"):                                   # no memory for the whole model
        model = GPT2(config)
    model.grad_checkpoint = run.grad_checkpoint
    if compiled:
        # Else dynamo cuts the graph of a large block in two for DDP.
        torch._dynamo.config.optimize_ddp = False
        model.cross_entropy = torch.compile(model.cross_entropy)
        for block in model.transformer.h:                        # one compilation serves all
            block.compile()
    model = shard(model, run, device, dtype)
    parameters = dict(model.named_parameters())
    values = model.initial_weights(run.seed)
    if weights is not None:
        values = weights.items()
    for name, whole in values:
        fill(parameters[name], whole)
    return model


def announce_run(run, config, splits, tokenizer, choices):
    """Print what the script chose, with the reasons. choices: {topic: text}."""
    mode = "single: not started by torchrun"
    if is_distributed():
        mode = f"{'fsdp' if run.fsdp else 'ddp'}: torchrun started {world_size()} processes"
        if run.hsdp:
            mode += f", each machine's {os.environ['LOCAL_WORLD_SIZE']} share a copy of the model"
    sizes = " and ".join(f"{data.tokens:,} {split}" for split, data in splits.items())
    choices = {**choices, "mode": mode, "data": f"{run.dataset}: {sizes} tokens, vocabulary "
               f"{tokenizer.vocab_size} ({tokenizer.name})"}
    if "train" in splits:
        batches = run.gradient_accumulation_steps
        samples = run.batch_size * batches
        choices["batch"] = (f"{run.batch_size} samples x {config.block_size} tokens x {batches} "
                            f"accumulated ({batches // world_size()} in each process) = "
                            f"{samples * config.block_size:,} tokens a step; an epoch is "
                            f"{len(splits['train']) / samples:,.1f} steps")
    with torch.device("meta"):
        parameters = GPT2(config).num_parameters()
    changes = [f"{name}={value}" for name, value in config.beyond_gpt2.items()]
    choices["model"] = (f"{parameters:,} parameters, {config.n_layer} layers, "
                        f"{', '.join(changes) or 'plain GPT-2'}")
    for topic, text in choices.items():
        announce(topic, text)


def describe_optimizer(run, typed):
    """The optimizers of a run, and why."""
    why = f"the default of {run.dataset}" if run.muon else "--muon was not given"
    if run.init_from == "resume":
        why = "as in the checkpoint"
    elif "muon" in typed:
        why = "as given"
    if run.muon:
        return f"Muon for the matrices of the blocks, AdamW for the rest: {why}"
    return f"AdamW: {why}"


# --------------------------------------------------------------------------------------------------
# Optimizers


def make_optimizers(run, config, parameters, device):
    """The optimizers of a run, each for its own parameters. The learning rate is set at each step,
    see `learning_rate`; all tensors that they keep are saved. A parameter without requires_grad has
    none: it is frozen.

    parameters: {"transformer.h.0.attn.c_attn.weight": tensor, ...}
    """
    rest = {name: p for name, p in parameters.items() if p.requires_grad}
    optimizers = []
    if run.muon:
        blocks = {name: rest.pop(name) for name, p in list(rest.items())
                  if name.startswith("transformer.h.") and p.dim() == 2}
        joined = [p for name, p in blocks.items() if name.endswith("c_attn.weight")]
        single = [p for name, p in blocks.items() if not name.endswith("c_attn.weight")]
        groups = [{"params": joined, "parts": config.qkv_sizes}, {"params": single}]
        optimizers.append(Muon(groups, run.learning_rate, run.weight_decay))
    matrices = [p for p in rest.values() if p.dim() >= 2]
    others = [p for p in rest.values() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": run.weight_decay},
              {"params": others, "weight_decay": 0.0}]
    optimizers.append(torch.optim.AdamW(groups, lr=run.learning_rate, betas=(run.beta1, run.beta2),
                                        fused=device.type in ("cpu", "cuda")))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is made orthogonal, for matrices (K. Jordan and others, 2024:
    https://kellerjordan.github.io/posts/muon). It is scaled to the usual size of AdamW's updates
    (J. Liu and others, 2025: https://arxiv.org/abs/2502.16982), so that learning rate and weight
    decay keep their meaning.

    torch.optim.Muon with adjust_lr_fn="match_rms_adamw" gives the same; but it computes in bfloat16
    on every device and every matrix by itself, in each process all of them. Here equal shapes share
    a product, and each matrix is worked on by one process, which broadcasts the result. Every
    process keeps some rows of the momentum: a DTensor, with DDP too.

    A group's "parts" are the numbers of rows of the matrices that a parameter is joined of.
    """
    MOMENTUM = 0.95
    AT_ONCE = 2**25                              # numbers in a product: 128 MB in float32

    def __init__(self, groups, lr, weight_decay):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "parts": None})
        self.owners = share_work([p for group in self.param_groups for p in group["params"]])

    @torch.no_grad()
    def step(self):
        mine = {}
        for p, owner in self.owners.items():
            whole = gathered(self.direction(p))
            if owner == rank():
                mine[p] = whole
        self.orthogonalize(mine)
        for group in self.param_groups:
            for p in group["params"]:
                update = mine.get(p)
                if update is None:
                    update = torch.empty(p.shape, device=p.device)
                broadcast(update, self.owners[p])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(own_part(update, p), alpha=group["lr"])

    def direction(self, p):
        """Nesterov's momentum: this process's rows of it."""
        grad = own_rows(p.grad)
        state = self.state[p]
        momentum = own_rows(state.get("momentum", torch.zeros_like(grad)))
        state["momentum"] = momentum.lerp(grad, 1 - self.MOMENTUM)
        return grad.lerp(state["momentum"], self.MOMENTUM)

    def orthogonalize(self, directions):
        """Replace {parameter: its direction} by updates, in place."""
        equal = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p in directions:
                    for matrix in directions[p].split(group["parts"] or len(p)):
                        equal.setdefault(matrix.shape, []).append(matrix)
        for shape, matrices in equal.items():
            scale = 0.2 * math.sqrt(max(shape))
            at_once = max(1, self.AT_ONCE // shape.numel())
            for i in range(0, len(matrices), at_once):
                batch = matrices[i:i + at_once]
                torch._foreach_copy_(batch, list(scale * orthogonal(torch.stack(batch))))


def share_work(parameters):
    """-> {parameter: the process that works on it}, the largest given away first, each to the
    process that has the least."""
    work = [0] * world_size()
    owners = {}
    for p in sorted(parameters, key=torch.numel, reverse=True):
        owners[p] = work.index(min(work))
        work[owners[p]] += p.numel() * min(p.shape)
    return owners


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
    return x.mT if tall else x


# --------------------------------------------------------------------------------------------------
# Evaluation


def share_batches(items, batch_size, progress=None):
    """Yield (a batch of this process's share of items, how many of it count). Under FSDP every
    process takes part in every forward pass: one with nothing left to do gets items[:1] and 0."""
    mine = items[rank()::world_size()]
    for start in range(0, math.ceil(len(items) / world_size()), batch_size):
        batch = mine[start:start + batch_size]
        yield (batch if len(batch) else items[:1]), len(batch)
        if progress and is_main():
            progress.show(min((start + batch_size) * world_size(), len(items)), len(items))


@torch.no_grad()
def evaluate(trainer, data, spans, progress=None):
    """Mean loss in nats over the tokens that the spans predict. The processes share the work."""
    model = trainer.model
    nats = 0.0
    tokens = 0
    model.eval()
    for rows, counting in share_batches(spans, trainer.run.batch_size, progress):
        x, y = read_spans(data, rows)
        with trainer.context:
            _, loss = model(x.to(trainer.device), y.to(trainer.device))
        count = int((y[:counting] >= 0).sum())
        nats = nats + loss.float() * count
        tokens += count
    model.train()
    if trainer.run.fsdp:
        model.reshard()                                          # forward left the root gathered
    nats, tokens = sum_over_processes([nats, tokens], trainer.device)
    if not tokens:
        raise UserError("the samples evaluated hold prompts only: raise --eval_iters")
    return nats / tokens


def read_spans(data, rows):
    """x and y (B, T) of rows of data.spans. What is not to be predicted is -1 in y; x is padded at
    its end, which a causal model does not see."""
    x = torch.zeros(len(rows), data.block_size, dtype=torch.int64)
    y = torch.full_like(x, -1)
    for i, (file, begin, first, end) in enumerate(rows):
        x[i, :end - 1 - begin] = torch.from_numpy(data.read(file, begin, end - 1).astype(np.int64))
        y[i, first - 1 - begin:end - 1 - begin] = torch.from_numpy(data.targets(file, first, end))
    return x, y


def evaluate_only(trainer, tokenizer):
    """--eval_only: print loss, perplexity exp(loss), and bits per byte: the sum of the losses
    / ln 2 / bytes of the predicted tokens' text."""
    run = trainer.run
    data = trainer.splits["val"]
    stride = run.eval_stride or data.block_size
    if stride > data.block_size:
        raise UsageError(f"--eval_stride={stride} is more than block_size={data.block_size}: "
                         "tokens in between would be left out")
    spans = data.spans(stride, run.eval_iters * run.batch_size)
    every = data.span_counts(stride).sum()
    announce("samples", f"{len(spans):,} of {every:,}, {stride} tokens apart; --eval_iters=0 takes "
                        "all. Beyond the first sample of a file, a token is given at least "
                        f"{data.block_size - stride + 1} tokens of context")
    loss = evaluate(trainer, data, spans, Progress("evaluation", "samples", 1))
    predicted = [ids[ids >= 0] for ids in (data.targets(file, first, end)
                                           for file, _, first, end in spans)]
    tokens = sum(map(len, predicted))
    lengths = tokenizer.byte_lengths()
    size = sum(int(lengths[ids].sum()) for ids in predicted)
    say(f"validation loss {loss:.4f} nats per token, of {tokens:,} tokens\n"
        f"perplexity {math.exp(min(loss, 700)):.2f} per token\n"
        f"bits per byte {loss * tokens / math.log(2) / max(size, 1):.4f}, of {size:,} bytes")


@torch.compiler.set_stance("force_eager")                        # too many shapes to compile
@torch.no_grad()
def score(trainer, data, spans, progress):
    """-> (the sum of the losses in nats, whether each is the most likely token) of the tokens that
    each of the spans predicts, both (N,). The processes share the work."""
    model = trainer.model
    lengths = spans[:, 3] - spans[:, 1] - 1
    order = np.argsort(-lengths, kind="stable")                  # similar lengths share a batch
    batch_size = trainer.run.batch_size * max(1, data.block_size // int(lengths.max()))
    scores = np.zeros((2, len(spans)))
    model.eval()
    for rows, counting in share_batches(order, batch_size, progress):
        x, y = (t[:, :lengths[rows].max()] for t in read_spans(data, spans[rows]))
        x = x.to(trainer.device)
        y = y.to(trainer.device)
        counted = y >= 0
        with trainer.context:
            logits, _ = model(x, at=counted)
        losses = F.cross_entropy(logits.float(), y[counted], reduction="none")
        nats = torch.zeros(y.shape, device=y.device).masked_scatter(counted, losses)
        missed = torch.zeros_like(counted).masked_scatter(counted, logits.argmax(1) != y[counted])
        chosen = rows[:counting]
        scores[0, chosen] = nats.sum(1)[:counting].cpu()
        scores[1, chosen] = ~missed.any(1)[:counting].cpu()
    if trainer.run.fsdp:
        model.reshard()
    return sum(gather(scores))


def evaluate_items(trainer, folder, count):
    """--eval_only on items (see `write_items` in data/prepare.py), evenly spaced ones if count is
    not 0: print what lm-evaluation-harness does. The chosen ending is the one with the lowest loss,
    or loss per character; a single ending counts if each of its tokens is the most likely one."""
    data = trainer.splits["val"]
    labels, endings = read_items(folder, data.tokens)
    chosen = np.linspace(0, len(labels) - 1, min(count or len(labels), len(labels))).astype(int)
    announce("items", f"{len(chosen):,} of {len(labels):,}: --eval_iters=N takes N of them")
    labels = labels[chosen]
    begin, first, end, characters = endings[chosen].reshape(-1, 4).T
    begin = np.maximum(begin, end - data.block_size - 1)         # the last part of a long text
    if (begin >= first).any():
        raise UserError(f"an ending of {(end - first).max()} tokens does not fit "
                        f"block_size={data.block_size}")
    spans = np.stack([np.zeros_like(begin), begin, first, end], axis=1)
    nats, exact = score(trainer, data, spans, Progress("evaluation", "endings", 1))
    if endings.shape[1] == 1:
        loss, error = mean_and_error(nats)
        say("accuracy {:.4f} ± {:.4f}".format(*mean_and_error(exact)))
        say(f"perplexity {math.exp(min(loss, 700)):.2f} ± {math.exp(min(loss, 700)) * error:.2f}")
        return
    for name, losses in (("accuracy", nats), ("length-normalised accuracy", nats / characters)):
        right = losses.reshape(len(labels), -1).argmin(axis=1) == labels
        say("{} {:.4f} ± {:.4f}".format(name, *mean_and_error(right)))


def mean_and_error(values):
    """The mean of a sample, and its standard error."""
    return values.mean(), values.std(ddof=int(len(values) > 1)) / math.sqrt(len(values))


# --------------------------------------------------------------------------------------------------
# Training


class Trainer:
    """The model, its optimizers and its data: all that a training step needs."""

    def __init__(self, run, config, model, splits, checkpoint, device, dtype):
        self.run = run
        self.config = config
        self.splits = splits
        self.masked = "train" in splits and splits["train"].masked
        self.device = device
        self.state = State()
        self.model = model
        self.parameters = dict(model.named_parameters())
        self.net = wrap(model, run.fsdp)
        self.context = contextlib.nullcontext()
        if dtype != torch.float32 and not run.fsdp:              # FSDP has its own mixed precision
            self.context = torch.autocast(device.type, dtype)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        # Created after sharding: earlier ones would keep the unsharded weights in memory.
        self.optimizers = make_optimizers(run, config, self.parameters, device)
        if checkpoint:
            self.state = checkpoint.state
            checkpoint.restore(self.optimizers, self.parameters)
            if checkpoint.scaler:                                # empty unless that was float16
                self.scaler.load_state_dict(checkpoint.scaler)
        self.saved_step = self.state.step if checkpoint else None
        self.micro_batches = run.gradient_accumulation_steps // world_size()
        self.samples_per_step = run.batch_size * run.gradient_accumulation_steps
        self.tokens_per_step = self.samples_per_step * config.block_size
        self.flops_per_step = 3 * config.flops_per_token() * self.tokens_per_step
        self.peak_flops = peak_flops(device, dtype)              # of one process, or None

    def start(self):
        """Read the first batch."""
        data = self.splits["train"]
        sampler = EndlessSampler(data, rank(), world_size(), self.run.seed, self.state.samples)
        self.batches = iter(DataLoader(data, self.run.batch_size, sampler=sampler, collate_fn=list,
                                       pin_memory=self.device.type == "cuda"))
        self.load_batch()

    def load_batch(self):
        """Read the next batch. Only CUDA may copy it in the background: MPS would read host memory
        that is freed already."""
        background = self.device.type == "cuda"
        self.batch = [t.to(self.device, non_blocking=background) for t in next(self.batches)]

    def gradients(self):
        """Forward and backward passes of the next step. Returns this process's mean loss and the
        gradient norm. The random numbers (dropout) depend on seed, step and rank alone, so that
        there is no random state to save."""
        sequence = np.random.SeedSequence([self.run.seed, self.state.step, rank()])
        torch.manual_seed(int(sequence.generate_state(1)[0]))
        total = 0.0
        counted = 0.0                                            # share of the step's targets
        for i in range(self.micro_batches):
            set_sync(self.net, last=i == self.micro_batches - 1)
            loss = self.forward()
            if self.masked:                                      # the mean over counted targets
                share = (self.batch[1] >= 0).float().mean()
                counted = counted + share / self.micro_batches
                loss = loss * share
            self.load_batch()                    # the next one, while a GPU computes on this one
            self.backward(loss)
            total = total + loss.detach()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        if self.masked:
            total = total / self.weigh(counted)
        limit = self.run.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        return total / self.micro_batches, gathered(norm)

    def weigh(self, counted):
        """Divide the gradients by the share of targets that count in the whole step, and return it:
        then each of them has the same weight, in whatever batch and process it is."""
        share, = sum_over_processes([counted / world_size()], self.device)
        share = share or 1.0                                     # none counts
        trained = [p for p in self.parameters.values() if p.requires_grad]
        torch._foreach_div_([p.grad for p in trained], share)
        return share

    def forward(self):
        with self.context:
            _, loss = self.net(*self.batch)
        return loss

    def backward(self, loss):
        self.scaler.scale(loss / self.micro_batches).backward()

    def update(self, finite=True):
        """Update the weights if the gradients are finite, and count the step. GradScaler would ask
        each optimizer for itself, but clipping spreads what is not finite to all gradients."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.run, self.state.step)
            if finite:
                self.scaler.step(optimizer)
            # DDP keeps gradients in its buckets; new ones would be a second copy.
            is_ddp = self.net is not self.model
            optimizer.zero_grad(set_to_none=not is_ddp)
        self.scaler.update()
        self.state.step += 1
        self.state.samples += self.samples_per_step


def learning_rate(run, step):
    """The rate of the step that follows `step` finished ones: warm-up, then a decay to min_lr."""
    if not run.decay_lr:
        return run.learning_rate
    if step < run.warmup_iters:
        return run.learning_rate * (step + 1) / (run.warmup_iters + 1)
    lowest = run.learning_rate / 10 if run.min_lr is None else run.min_lr
    end = run.lr_decay_iters or run.max_iters
    done = min(1.0, (step - run.warmup_iters) / max(1, end - run.warmup_iters))
    if run.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * done))
    elif run.schedule == "linear":
        left = 1 - done
    else:
        raise NotImplementedError(f"schedule={run.schedule}")
    return lowest + left * (run.learning_rate - lowest)


def changed_rate(run, checkpoint):
    """{topic: text} about a learning rate that jumps when a run is resumed with other flags."""
    saved = {name: value for name, value in checkpoint.settings.items() if name in RUN}
    before = Run(**saved)
    step = checkpoint.state.step
    old = learning_rate(before, step)
    new = learning_rate(run, step)
    if math.isclose(old, new, rel_tol=0.01):
        return {}
    changed = [f"{name}={getattr(run, name)}, was {value}" for name, value in saved.items()
               if getattr(run, name) != value and name in SCHEDULE]
    return {"rate": f"the learning rate is {new:.3g}, no longer {old:.3g}: {'; '.join(changed)}"}


class StopSignals:
    """Ctrl-C, SIGTERM and a terminal that closes let the step finish. Another signal, two seconds
    later or more, exits at once (torchrun passes a Ctrl-C on a second time right away)."""

    def __init__(self):
        self.received = 0
        self.deadline = math.inf
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)
        hangup = getattr(signal, "SIGHUP", None)                 # not on Windows
        if hangup and signal.getsignal(hangup) != signal.SIG_IGN:      # as nohup sets it
            signal.signal(hangup, self.hang_up)

    def handle(self, number, frame):
        if time.monotonic() > self.deadline:
            os._exit(128 + number)
        if is_main() and not self.received:                      # print() may be running already
            os.write(1, b"\nstopping after this step; Ctrl-C again exits at once\n")
        self.received = number
        self.deadline = min(self.deadline, time.monotonic() + 2)

    def hang_up(self, number, frame):
        """The terminal is gone: printing to it would fail before the checkpoint is saved."""
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        self.handle(signal.SIGTERM, frame)


def loop(trainer, log, tokenizer):
    """Train, evaluate and save until max_iters or a signal. Returns the exit code."""
    run = trainer.run
    state = trainer.state
    signals = StopSignals()
    exit_code = 0
    while True:
        finished = state.step >= run.max_iters
        due = finished or state.step % run.eval_interval == 0
        if due and state.evaluated_step != state.step:
            began = time.monotonic()
            evaluate_and_save(trainer, log, tokenizer)
            every = run.sample_interval
            if every and (finished or state.step % every < run.eval_interval):
                write_sample(trainer, tokenizer)
            log.since += time.monotonic() - began                # evaluation is no training time
        if finished or exit_code:
            break
        loss, norm, exit_code = train_step(trainer, signals)
        log.step(trainer, loss, norm)
        if state.step == log.first_step + 3:
            gc.collect()
            gc.freeze()                          # or Python would search all that stays, for 0.1 s
    if exit_code and trainer.saved_step != state.step:
        save_checkpoint(trainer, tokenizer, export=run.always_save_checkpoint)
    return exit_code


def evaluate_and_save(trainer, log, tokenizer):
    run = trainer.run
    state = trainer.state
    losses = {}
    for split, data in trainer.splits.items():
        spans = data.spans(data.block_size, run.eval_iters * run.batch_size)
        losses[f"{split}_loss"] = evaluate(trainer, data, spans)
    if not all(map(math.isfinite, losses.values())):
        raise not_finite(trainer, f"the evaluated loss after step {state.step}",
                         "Nothing was saved")
    state.evaluated_step = state.step
    better = losses["val_loss"] < state.best_val_loss
    if better:
        state.best_val_loss = losses["val_loss"]
        state.best_step = state.step
    log.record(trainer, **losses)
    log.line(f"--- step {state.step:,}: train loss {losses['train_loss']:.4f}, validation loss "
             f"{losses['val_loss']:.4f}{' (best)' if better else ''}")
    if run.always_save_checkpoint and state.step == log.first_step:
        return                                                   # nothing has been learned yet
    save_checkpoint(trainer, tokenizer, export=better or run.always_save_checkpoint)


def write_sample(trainer, tokenizer):
    """Print a short text by the model. Every process writes the same one, with a random generator
    of its own, as every process has to take part under FSDP."""
    generator = torch.Generator(trainer.device).manual_seed(trainer.run.seed)
    end = tokenizer.end_of_text
    prompt = sample_prompt(trainer.splits["val"], tokenizer)
    idx = torch.from_numpy(prompt.astype(np.int64))[None].to(trainer.device)
    with trainer.context, torch.compiler.set_stance("force_eager"):
        stream = trainer.model.stream(idx, 128, 0.8, top_k=200, generator=generator, stop_token=end)
        written = [token for token in map(int, stream) if token != end]
    if trainer.run.fsdp:
        trainer.model.reshard()
    text = tokenizer.decode([*prompt, *written])
    say(textwrap.indent(text.strip("\n"), "    | ", lambda line: True))


def sample_prompt(data, tokenizer):
    """The ids of the first prompt of masked data, if it has one within block_size; else of the
    tokenizer's default."""
    if data.masks[0] is not None:
        length = int(data.masks[0][:data.block_size].argmax())   # 0 if none counts
        if length:
            return data.read(0, 0, length)
    return tokenizer.encode(tokenizer.default_prompt())


def train_step(trainer, signals):
    """One step -> (mean loss, gradient norm, exit code if any process got a signal)"""
    loss, norm = trainer.gradients()
    loss, norm, interrupted, terminated = sum_over_processes(
        [loss / world_size(), norm / world_size(), signals.received == signal.SIGINT,
         signals.received == signal.SIGTERM], trainer.device)
    what = "loss" if not math.isfinite(loss) else "gradient"
    finite = math.isfinite(norm)
    skips = trainer.scaler.is_enabled()                          # and lowers its scale
    if not math.isfinite(loss) or not (finite or skips):
        raise not_finite(trainer, f"the {what} of step {trainer.state.step + 1}",
                         "The weights were not updated")
    trainer.update(finite)
    exit_code = 0
    if terminated:
        exit_code = 143
    if interrupted:
        exit_code = 130
    return loss, norm, exit_code


def not_finite(trainer, what, consequence):
    run = trainer.run
    rate = learning_rate(run, trainer.state.step)
    advice = "Start again with a lower --learning_rate"
    if trainer.saved_step is not None:
        lower = max(run.learning_rate / 2, run.min_lr or 0)
        advice = f"Resume with a lower rate: {resume_command(run)} --learning_rate={lower:g}"
    return UserError(f"{what} is not finite (learning rate {rate:.3g}). {consequence}. "
                     f"{last_checkpoint(trainer)}. {advice}")


def last_checkpoint(trainer):
    """What is left after an error, as a sentence."""
    if trainer.saved_step is None:
        return "There is no checkpoint of this run yet"
    return f"The last checkpoint is of step {trainer.saved_step}"


def benchmark(trainer, steps=10):
    """--benchmark: time `steps` steps, after two to warm up, and their parts; print means."""
    seconds = {name: [] for name in ("forward", "load_batch", "backward", "update")}
    for name in seconds:
        setattr(trainer, name, timed(getattr(trainer, name), seconds[name], trainer.device))
    for step in range(steps + 2):
        if step == 2:
            began = time.perf_counter()
            for times in seconds.values():
                times.clear()
        trainer.gradients()
        trainer.update()
    step = (time.perf_counter() - began) / steps
    peak = trainer.peak_flops
    reference = "the device's peak"
    if trainer.device.type == "cpu":
        peak = sgemm_flops()
        reference = "this CPU's sgemm"
    text = f"\n{trainer.tokens_per_step / step:,.0f} tokens per second, {step * 1e3:,.1f} ms a step"
    if peak:
        done = trainer.flops_per_step / step / world_size()
        text += f"; {done / 1e9:,.1f} GFLOP/s a process, {done / peak:.1%} of {reference}"
    say(f"{text}; peak memory {peak_memory(trainer.device) / 1e9:.2f} GB")
    for name, times in seconds.items():
        part = sum(times) / steps
        say(f"  {name:10}{part * 1e3:10.2f} ms{part / step:8.1%}")
    if trainer.run.trace:
        write_trace(trainer)


def write_trace(trainer):
    """--trace: profile one more step. The main process writes its own part of it."""
    with torch.profiler.profile() as profiler:
        trainer.gradients()
        trainer.update()
    if is_main():
        with atomic_write(trainer.run.trace) as f:
            profiler.export_chrome_trace(f.name)
        say(f"The trace is in {trainer.run.trace}")


def timed(function, times, device):
    """`function`, but each call appends its seconds, with the device's work in them, to `times`."""
    def call(*args):
        began = time.perf_counter()
        result = function(*args)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - began)
        return result
    return call


def sgemm_flops():
    """FLOP/s of this CPU in the best of a few large matrix products."""
    a = torch.randn(2048, 2048)
    times = []
    for _ in range(5):
        timed(torch.mm, times, a.device)(a, a)
    return 2 * 2048**3 / min(times)


# --------------------------------------------------------------------------------------------------
# A run


def main():
    run_main(start, OUT_OF_MEMORY, report)


def start():
    """What the command line asks for. Returns the exit code."""
    typed = parse_command_line()
    if "plot" in typed:
        return plot_only(typed)
    open_store()
    with usage_errors():
        device, why = choose_process_device(typed.get("device", Run.device))
    prepare_device(device)
    join(device, typed.get("backend"))
    try:
        code = train(typed, device, why)
    except RuntimeError as error:
        if not lost_connection(error):
            raise
        if is_main():
            raise UserError("another process of this run died; stopping") from None
        return 1
    if dist.is_initialized():
        leave(code or 0)
    return code


def leave(code):
    """End this process of a distributed run without Python's own shutdown: a thread of gloo that
    still holds a tensor would abort it (pytorch PR 179291)."""
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def plot_only(typed):
    out_dirs = [name for name in typed["plot"].split(",") if name]
    out_dirs = out_dirs or [typed.get("out_dir", Run.out_dir)]
    path = "comparison.svg" if len(out_dirs) > 1 else f"{out_dirs[0]}/loss.svg"
    plot(out_dirs, path)
    print(path)


def prepare_device(device):
    """Settings that make a step faster."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.cudnn.conv.fp32_precision = "tf32"
    if device.type == "cpu" and os.name == "posix":
        # glibc returns large freed blocks to the system and pays for their pages again in the next
        # step, 7 % of it. So: none by mmap (M_MMAP_MAX = -4), keep what is free (M_TRIM_THRESHOLD).
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt:
            mallopt(-4, 0)
            mallopt(-1, 2**31 - 1)


def train(typed, device, why_device):
    """One run, from the flags to the last checkpoint. Returns the exit code."""
    run, shape, checkpoint = resolve(typed)
    if run.hsdp:
        check_same("--hsdp needs as many processes on each machine",
                   int(os.environ["LOCAL_WORLD_SIZE"]))
    if run.dtype == "float16" and (run.fsdp or device.type != "cuda"):
        raise UsageError("--dtype=float16 needs loss scaling, which works on CUDA without FSDP: "
                         "use bfloat16 or float32")
    if run.dtype == "bfloat16" and device.type == "cpu" and not cpu_supports(torch.bfloat16):
        raise UsageError("--dtype=bfloat16: this CPU multiplies bfloat16 in software, several "
                         "times slower than float32: leave the flag out")
    dtype, why_dtype = choose_dtype(run.dtype, device, float16=not run.fsdp)
    with usage_errors():
        compiled, why_compile = choose_compile(run.compile, device)
    folder, paths, tokenizer = open_data(run)
    config, weights = choose_model(run, shape, checkpoint, tokenizer)
    splits = open_splits(folder, paths, config, checkpoint, run)
    if run.eval_only or run.benchmark:
        checkpoint = None                                        # these look at the exported model
    model = build_model(run, config, weights, device, dtype, compiled)
    trainer = Trainer(run, config, model, splits, checkpoint, device, dtype)
    choices = {"device": f"{device}: {why_device}", "dtype": f"{dtype}: {why_dtype}",
               "compile": f"{compiled}: {why_compile}"}
    if not run.eval_only:
        choices["optimizer"] = describe_optimizer(run, typed)
    if checkpoint:
        choices.update(changed_rate(run, checkpoint))
    if run.benchmark and weights is None:
        choices["weights"] = "random; --init_from=resume times the model in out_dir"
    del weights, checkpoint                                      # unmaps the file: Windows locks it
    announce_run(run, config, splits, tokenizer, choices)
    if run.eval_only and os.path.exists(f"{folder}/{ITEMS}"):
        return evaluate_items(trainer, folder, typed.get("eval_iters", 0))
    if run.eval_only:
        return evaluate_only(trainer, tokenizer)
    if trainer.saved_step is not None and trainer.state.step >= run.max_iters:
        return say(f"The run in {run.out_dir} is finished (step {trainer.state.step} of "
                   f"{run.max_iters}). Raise --max_iters to train longer.")
    trainer.start()
    if run.benchmark:
        return benchmark(trainer)
    return run_training(trainer, tokenizer)


def run_training(trainer, tokenizer):
    run = trainer.run
    state = trainer.state
    if is_main():
        make_out_dir(run.out_dir)
        trainer.lock = lock(f"{run.out_dir}/.lock")
        kept = set_aside(run.out_dir) if trainer.saved_step is None else None
        if kept:
            announce("moved", f"the run that was in {run.out_dir} to {kept}")
        if not {"tokenizer.json", "vocab.json"} & tokenizer.files().keys():
            announce("tokenizer", f"other programs will find none in {run.out_dir}: GPT-2's files "
                     "are not in tiktoken's cache. sample.py and data/prepare.py download them")
    log = Log(run, trainer.config, state.step, trainer.saved_step is not None)
    exit_code = loop(trainer, log, tokenizer)
    log.close()
    curves = draw_curves(run.out_dir) if is_main() else ""
    if exit_code:
        say(f"\nstopped at step {state.step}, saved in {run.out_dir}. Resume with\n"
            f"    {resume_command(run)}")
        return exit_code
    if not run.always_save_checkpoint and state.best_step == 0:
        say("\nThe validation loss never improved. Try a lower --learning_rate")
    took = timedelta(seconds=int(time.monotonic() - log.began))
    say(f"\nbest validation loss {state.best_val_loss:.4f} (step {state.best_step}), {took} of "
        "training\n"
        f"{curves}\n"
        f"Sample with\n    python sample.py{out_dir_flag(run)}")


def draw_curves(out_dir):
    """Draw loss.svg. Returns what to say about it: without the picture the run is still good."""
    path = f"{out_dir}/loss.svg"
    try:
        plot([out_dir], path)
    except (OSError, UserError) as error:
        return f"{path} was not drawn: {error}"
    return f"The curves are in {path}"


def make_out_dir(out_dir):
    try:
        os.makedirs(out_dir, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out_dir={out_dir} cannot be used ({error}): choose another") from None


def out_dir_flag(run):
    """ --out_dir=..., or nothing for the default."""
    if run.out_dir == Run.out_dir:
        return ""
    quoted = f'"{run.out_dir}"' if os.name == "nt" else shlex.quote(run.out_dir)
    return f" --out_dir={quoted}"


def resume_command(run):
    """The command that resumes a run with the same settings, on the same number of processes."""
    launcher = "python"
    if is_distributed():
        launcher = f"torchrun --standalone --nproc_per_node={world_size()}"
        if os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]:
            launcher = "torchrun (with the same options as before)"
    kept = ""
    for name in ("fsdp", "hsdp", "grad_checkpoint", "dtype", "device", "backend", "compile",
                 "sample_interval", "tensorboard", "wandb"):
        if getattr(run, name) != getattr(Run, name):
            kept += f" --{name}={getattr(run, name)}"
    return f"{launcher} train.py --init_from=resume{out_dir_flag(run)}{kept}"


if __name__ == "__main__":
    main()
