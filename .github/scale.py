"""
What a training step on many GPUs needs, computed without them: one process of 1 to 512 runs
train.py's own step on fake tensors, which have a shape and no numbers, in a fake process group.

    python .github/scale.py                        # OpenAI's four sizes: 20 minutes on a CPU
    python .github/scale.py gpt2-xl --muon         # one of them, with Muon
    python .github/scale.py gpt2 --whole           # runs every layer: 5 to 20 times as long

All blocks are alike, so unless --whole is given the step is run with 3 and with 5 of them, and the
figures continue the line. Micro-batches of 1 x 1,024 tokens, two of them a step; bfloat16, weights
in float32; 8 processes a machine. Seen are the tensors of PyTorch. Not seen are CUDA itself, the
buffers of nccl, what CUDA's allocator leaves unused, the workspaces of its kernels, and what
--compile changes. Muon's update is taken in float32, where a GPU has bfloat16.

Columns, in GB: the weights, gradients and optimizer state of a process; what a forward pass adds
(activations; on one device and in DDP the weights in bfloat16; in FSDP the gathered embeddings);
the peak of a step; both again with --grad_checkpoint; what a process sends in a step, by collective
(in a ring: an all-reduce of n bytes sends 2 n (N - 1) / N).
"""
import collections
import os
import sys
import weakref
from dataclasses import replace
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch._guards import active_fake_mode  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.distributed._tools.fake_collectives import (  # noqa: E402
    CollectiveOp,
    collective_ops,
    sync_ops,
)
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.nn.parallel import distributed as ddp  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import model as model_py  # noqa: E402
import train  # noqa: E402
from model import GPT2, SIZES, GPT2Config  # noqa: E402

MACHINE = 8                                                      # processes of one
MODES = {"single": [1], "DDP": [8, 64, 512], "FSDP": [8, 64, 512], "HSDP": [64, 512]}
CARDS = {"24 GB": 24e9, "80 GB": 80e9, "141 GB": 141e9}
USABLE = 0.9                                                     # the rest for what is not seen


class Watch(TorchDispatchMode):
    """Counts the bytes of all living tensors, and those that collectives send."""

    def __init__(self):
        super().__init__()
        self.held = 0
        self.peak = 0
        self.sizes = {}                                          # of storages, by id
        self.sent = collections.Counter()

    def __enter__(self):
        self.mode = active_fake_mode()
        self.resize = torch.UntypedStorage.resize_               # how FSDP frees gathered weights

        def resize_(storage, size):
            self.resize(storage, size)
            self.note(storage)
        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented                                # its local tensors come next
        result = function(*args, **(kwargs or {}))
        if function.name() == "_c10d_functional::wait_tensor":
            result = args[0]                                     # as it is; the fake one is new
        if active_fake_mode() is not self.mode:                  # DTensor computes a shape
            return result
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        self.count(function, result, args, kwargs)
        return result

    def note(self, storage):
        key = storage._cdata
        if key not in self.sizes:
            weakref.finalize(storage, self.forget, key)
        before = self.sizes.get(key, 0)
        self.sizes[key] = storage.nbytes()
        self.held += self.sizes[key] - before
        self.peak = max(self.peak, self.held)

    def forget(self, key):
        self.held -= self.sizes.pop(key)

    def count(self, function, result, args, kwargs):
        """Add what a process sends if `function` is a collective."""
        if function not in collective_ops - sync_ops:
            return
        processes = CollectiveOp.get_process_group(function, args).size()
        size = CollectiveOp.get_comm_tensor_size(function, result, args, kwargs)
        name = function.name().partition("::")[2].strip("_")
        times = 2 if "reduce" in name and "scatter" not in name else 1
        self.sent[name] += times * size * (processes - 1) // processes


def sum_bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def simulate(mode, processes, config, dtype=torch.float32, **flags):
    """Run two steps of process 0 -> {what: bytes}, of the second one. mode: a key of MODES."""
    local = min(processes, MACHINE)
    if mode != "single":
        os.environ.update(RANK="0", WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(local))
        dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    run = train.Run(**{"batch_size": 1, "gradient_accumulation_steps": 2 * processes,
                       "fsdp": mode in ("FSDP", "HSDP"), "hsdp": mode == "HSDP", **flags})
    device = torch.device("cpu")
    if run.fsdp:
        train.device_mesh(device.type, run.hsdp)                 # needs real numbers
    elif mode == "DDP":
        train.device_mesh(device.type)                           # Muon's
    try:
        # Constructed, DDP compares real numbers.
        with (mock.patch.multiple(ddp, _verify_param_shape_across_processes=mock.DEFAULT,
                                  _sync_module_states=mock.DEFAULT),
              FakeTensorMode(), Watch() as watch):
            trainer = Trainer(run, config, device, dtype)
            return trainer.measure(watch)
    finally:
        if mode != "single":
            dist.destroy_process_group()
            train.device_mesh.cache_clear()
            for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
                del os.environ[name]


class Trainer(train.Trainer):
    """train.py's, without data."""

    def __init__(self, run, config, device, dtype):
        if run.fsdp:
            with torch.device("meta"):
                model = GPT2(config)
            model = train.shard(model, run, device, dtype)
        else:
            model = GPT2(config)
        model.grad_checkpoint = run.grad_checkpoint
        super().__init__(run, config, model, {}, None, device, dtype)
        if self.net is not model:
            self.net.register_comm_hook(None, all_reduce)
            self.net.reducer = Reducer(self.net.reducer)
        self.load_batch()

    def load_batch(self):
        shape = (self.run.batch_size, self.config.block_size)
        self.batch = [torch.zeros(shape, dtype=torch.int64) for _ in range(2)]

    def forward(self):
        before = self.watch.held
        loss = super().forward()
        self.added = self.watch.held - before
        return loss

    def measure(self, watch):
        self.watch = watch
        self.gradients()                                         # makes the optimizer's state
        self.update()
        watch.peak = 0
        watch.sent.clear()
        self.gradients()
        gradients = sum_local(p.grad for p in self.parameters.values())
        self.update()
        state = [t for optimizer in self.optimizers for held in optimizer.state.values()
                 for t in held.values()]
        return {"weights": sum_local(self.parameters.values()), "gradients": gradients,
                "optimizer": sum_local(state), "forward": self.added, "peak": watch.peak,
                "sent": dict(watch.sent)}


class Reducer:
    """DDP's own, but its buckets stay in the first order: to change it reads real numbers."""

    def __init__(self, reducer):
        self.reducer = reducer

    def __getattr__(self, name):
        return getattr(self.reducer, name)

    def _rebuild_buckets(self):
        return False


def all_reduce(state, bucket):
    """What DDP does with a bucket of gradients. Its own result would be real."""
    dist.all_reduce(bucket.buffer())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def sum_local(tensors):
    return sum_bytes([t.to_local() if hasattr(t, "to_local") else t for t in tensors])


def on_a_line(whole, mode, processes, config, *args, **flags):
    """simulate, from runs with 3 and 5 layers unless `whole`."""
    if whole:
        return simulate(mode, processes, config, *args, **flags)
    few, more = (simulate(mode, processes, replace(config, n_layer=n), *args, **flags)
                 for n in (3, 5))

    def continued(a, b):
        return a + (b - a) // 2 * (config.n_layer - 3)
    found = {name: continued(few[name], more[name]) for name in few.keys() - {"sent"}}
    found["sent"] = {name: continued(few["sent"][name], size)
                     for name, size in more["sent"].items()}
    return found


def show(size, mode, processes, found, checkpointed):
    sent = "; ".join(f"{name} {size / 1e9:.2f}" for name, size in found["sent"].items()
                     if size > 1e6)
    columns = [found[name] for name in ("weights", "gradients", "optimizer", "forward", "peak")]
    columns += [checkpointed["forward"], checkpointed["peak"]]
    print(f"| {size} | {mode} | {processes} | " + " | ".join(f"{n / 1e9:.2f}" for n in columns)
          + f" | {sent or '-'} |", flush=True)


def table(head):
    print("\n| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|", flush=True)


def main():
    sizes = [name for name in sys.argv[1:] if name in SIZES] or list(SIZES)
    muon = "--muon" in sys.argv[1:]
    whole = "--whole" in sys.argv[1:]
    if set(sys.argv[1:]) - {*SIZES, "--muon", "--whole"}:
        sys.exit(__doc__)
    # PyTorch without CUDA computes no gradients of fake tensors on a GPU: they are on the CPU.
    model_py.on_cpu = lambda tensor: False
    largest = {}
    table(["size", "mode", "processes", "weights", "gradients", "optimizer", "forward", "peak",
           "forward, grad_checkpoint", "peak, grad_checkpoint", "sent a step"])
    for size in sizes:
        config = GPT2Config(**SIZES[size])
        for mode, counts in MODES.items():
            for processes in counts:
                both = [on_a_line(whole, mode, processes, config, torch.bfloat16, muon=muon,
                                  grad_checkpoint=on) for on in (False, True)]
                show(size, mode, processes, *both)
                for card, capacity in CARDS.items():
                    for note, found in zip(("", " with grad_checkpoint"), both, strict=True):
                        if found["peak"] <= USABLE * capacity:
                            fits = largest.setdefault((mode, processes), {})
                            if not fits.get(card, "").startswith(size + " "):
                                fits[card] = f"{size} ({found['peak'] / 1e9:.1f} GB{note})"
    table(["what fits where", *CARDS])
    for (mode, processes), fits in largest.items():
        print(f"| {mode}, {processes} | " + " | ".join(fits.get(card, "none") for card in CARDS)
              + " |")


if __name__ == "__main__":
    main()
