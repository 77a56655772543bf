"""
Train a GPT, in one process or many.

    python train.py config/train_shakespeare_char.py --max_iters=500
    python train.py config/train_shakespeare_char.py --init_from=resume --max_iters=1000
    torchrun --nproc_per_node=8 train.py

--help lists the settings below. Afterwards: python sample.py --start="What is an LLM?"
"""
import atexit
import contextlib
import dataclasses
import glob
import importlib
import inspect
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import time
import warnings
import zipfile
import zlib

import numpy as np
import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves, tree_map

from configurator import cannot_write, configure, fail, first_line, lock, lost_process, out_of_memory, peak_flops, setup, \
    torchrun
from data.common import GPT2_FILES, GPT2_NAMES, gpt2_folder, tokenizer_from_dict, tokenizer_size
from model import GPT, Dropout, GPTConfig, SkipInit

# -----------------------------------------------------------------------------
# settings; the defaults are the 10M-parameter character GPT on Shakespeare

# files
out_dir = 'out'  # for checkpoints and metrics, relative to where you stand
init_from = 'scratch'  # scratch | resume | auto: resume, where there is a checkpoint | gpt2, -medium, -large, -xl | a folder
ckpt = 'ckpt.pt'  # the file in out_dir to resume from, its settings too unless you give others; ckpt_prev.pt is one save older
# evaluation and logging
eval_interval = 250  # updates between evaluations; each also samples, and saves ckpt.pt
eval_iters = 200  # batches of each split in an evaluation, 0: the whole split
eval_only = False  # evaluate once and exit, writing nothing
log_interval = 10  # updates between log lines
checkpoint_format = 'full'  # full: ckpt.pt holds all | sharded: with fsdp, each process writes its part to shards-*/
always_save_checkpoint = False  # write model.pth at every evaluation, not only at the best val loss so far
sample_prompt = 'What is an LLM?'  # continued before training and at every evaluation
sample_tokens = 256  # length of that continuation, 0 for none
wandb_log = False  # also log to Weights & Biases (pip install wandb)
wandb_project = 'quill'  # the project there
wandb_run_name = 'gpt'  # the run's name there
tensorboard = False  # also log to out_dir/tensorboard (pip install tensorboard)
# data
dataset = 'shakespeare_char'  # a folder in data/
gradient_accumulation_steps = 1  # micro-batches in an update, over all processes together
batch_size = 64  # sequences in a micro-batch
block_size = 256  # tokens in a sequence
input_noise = 0.0  # this part of the input tokens is replaced by random ones in training: regularizes at no cost in time
skip_batches = 0  # updates whose data is jumped over, in all: raise it on resuming, to pass by a bad stretch
# model
n_layer = 6  # blocks
n_head = 6  # attention heads
n_embd = 384  # width
dropout = 0.0  # see Dropout in model.py; 0.1 or more where the data is seen many times
bias = False  # in Linear and LayerNorm; GPT-2 has True
activation = 'gelu'  # gelu | gelu_tanh | relu2
norm = 'layernorm'  # layernorm | rmsnorm
rotary = False  # rotary positions instead of learned ones
qk_norm = False  # normalize queries and keys
token_shift = False  # half of attention's and MLP's input is of the position before
tie_weights = True  # the output matrix is the token embedding
zero_init = False  # blocks start as the identity
softcap = 0.0  # soft bound of the logits, 0 for none
# optimizer
optimizer = 'adamw'  # adamw | muon: Muon for the blocks' matrices and AdamW for the rest
learning_rate = 1e-3  # the highest, of AdamW
muon_lr = 0.02  # the highest, of Muon; follows the same schedule
muon_momentum = 0.95  # of the average over past gradients
max_iters = 5000  # updates in total
train_iters = 0  # stop this process after so many updates, to be resumed; 0: run to max_iters
weight_decay = 0.1  # on matrices
beta1 = 0.9  # of AdamW's average over past gradients
beta2 = 0.95  # and over their squares
grad_clip = 1.0  # bound of the gradient's norm, 0 for none
# learning rate schedule
decay_lr = True  # False: learning_rate throughout, without warmup
lr_schedule = 'cosine'  # cosine | linear: constant, then linear over the last decay_frac
warmup_iters = 100  # linear, from learning_rate / (warmup_iters + 1)
lr_decay_iters = 0  # where the decay ends, 0: at max_iters
decay_frac = 0.4  # the part of lr_decay_iters that decays, for lr_schedule=linear
min_lr = 1e-4  # where it ends
# machine
seed = 1337  # of weights, batches, dropout and samples
deterministic = False  # the same bits in every run on a GPU as well, where some operations get slower
timeout_s = 1800  # a process that hears nothing from another for so long ends
device = 'auto'  # auto (env TORCH_DEVICE, else cuda, mps, cpu in this order) | cpu | cuda | cuda:1 | mps
dtype = 'auto'  # auto (what the device is fastest in) | float32 | bfloat16 | float16
compile = 'auto'  # torch.compile: auto (on cuda, in a run long enough to repay it) | True | False
backend = 'auto'  # of torch.distributed: auto | nccl | gloo
parallel = 'ddp'  # ddp: every process holds the whole model | fsdp: a part, for models that fit no device alone
activation_checkpointing = False  # recompute blocks in the backward pass: less memory, a third more computation
peak_tflops = 0.0  # of one device, for mfu; 0: from a table, or measured

HERE = os.path.dirname(os.path.abspath(__file__))
CHECKPOINT_VERSION = 1
MAX_OVERFLOWS = 30  # in a row: GradScaler has then halved its scale 30 times, for nothing
NOT_RESUMED = ('init_from', 'ckpt', 'out_dir', 'train_iters', 'eval_only')  # settings not taken from a checkpoint
LEGEND = """legend of the log lines:
  step     updates done                        loss         mean over the batch, nats per token
  dt       seconds per step                    dtf, dtb     of it in forward and backward
  sps      samples (sequences) per second      sps_per_gpu  the same per process
  tps      tokens per second                   tps_per_gpu  the same per process
  mfu      percent of the peak FLOP/s          lr           learning rate
  norm     of the gradient, before clipping    eta          time left, h:mm:ss"""


def check_settings(c):
    """Return what is wrong with the settings in dict c, as a list of sentences."""
    problems = []
    ranges = {
        'at least 1': (lambda v: v >= 1, 'eval_interval log_interval gradient_accumulation_steps batch_size'),
        'at least 1 and at most 1e9': (lambda v: 1 <= v <= 1e9, 'timeout_s'),
        'at least 0': (lambda v: v >= 0, 'eval_iters sample_tokens max_iters train_iters warmup_iters lr_decay_iters '
                                         'weight_decay grad_clip min_lr peak_tflops skip_batches'),
        'at least 0 and below 2**63': (lambda v: 0 <= v < 2**63, 'seed'),
        'positive': (lambda v: v > 0, 'learning_rate muon_lr'),
        'at least 0 and below 1': (lambda v: 0 <= v < 1, 'beta1 beta2 muon_momentum input_noise'),
        'above 0 and at most 1': (lambda v: 0 < v <= 1, 'decay_frac'),
    }
    for rule, (holds, keys) in ranges.items():
        problems += [f'{k}={c[k]}: {k} is {rule}' for k in keys.split() if not (holds(c[k]) and math.isfinite(c[k]))]
    choices = {'parallel': 'ddp fsdp', 'checkpoint_format': 'full sharded', 'optimizer': 'adamw muon',
               'lr_schedule': 'cosine linear', 'dtype': 'auto float32 bfloat16 float16', 'compile': 'auto True False',
               'backend': 'auto nccl gloo'}
    problems += [f'{k}={c[k]}: {k} is one of {", ".join(v.split())}' for k, v in choices.items()
                 if str(c[k]) not in v.split()]
    try:
        model_shape(c, vocab_size=1)
    except ValueError as e:
        problems += str(e).split('; ')  # it may be several
    if c['parallel'] == 'fsdp' and c['optimizer'] == 'muon':
        problems.append('optimizer=muon needs whole matrices: use --optimizer=adamw with --parallel=fsdp')
    if c['checkpoint_format'] == 'sharded' and c['parallel'] != 'fsdp':
        problems.append('checkpoint_format=sharded is for --parallel=fsdp, whose processes hold the parts')
    if c['init_from'] not in ('scratch', 'resume', 'auto', *GPT2_NAMES) and not os.path.isdir(c['init_from']):
        problems.append(f'init_from={c["init_from"]}: init_from is one of scratch, resume, auto, {", ".join(GPT2_NAMES)}, '
                        'or a folder with config.json and model.safetensors')
    if c['decay_lr'] and 0 < c['lr_decay_iters'] < c['warmup_iters']:
        problems.append(f'lr_decay_iters={c["lr_decay_iters"]} is before the end of warmup_iters={c["warmup_iters"]}')
    if c['decay_lr'] and c['min_lr'] > c['learning_rate']:
        problems.append(f'min_lr={c["min_lr"]} is above learning_rate={c["learning_rate"]}')
    return problems


def settings(argv=None):
    """Return the dict of settings from the command line, and the checkpoint to resume from, or None."""
    config, checkpoint = configure(globals(), argv), None
    path = os.path.join(out_dir, ckpt)
    if init_from == 'resume' or init_from == 'auto' and any(
            os.path.exists(os.path.join(out_dir, f)) for f in (ckpt, 'ckpt_prev.pt')):
        checkpoint = load_checkpoint(path)
        if 'optimizer' not in checkpoint:
            fail(f'{path} holds weights to sample from: resume from ckpt.pt or ckpt_prev.pt')
        saved = {k: v for k, v in checkpoint['config'].items() if k not in NOT_RESUMED}
        config = configure(globals(), argv, saved)
    elif skip_batches or ckpt != 'ckpt.pt':
        fail('--skip_batches and --ckpt are for --init_from=resume')
    if init_from == 'auto':
        config['init_from'] = globals()['init_from'] = 'resume' if checkpoint else 'scratch'
    if problems := check_settings(config):
        fail(*problems)
    return config, checkpoint


# -----------------------------------------------------------------------------
# data

def open_dataset(name, block_size, run):
    """Return (meta, train, val) of the dataset `name`: its meta.json and its Tokens.

    Prepares a missing Shakespeare; fails on any other missing dataset and on files that contradict each other.
    """
    if os.path.basename(name) != name or name in ('', '.', '..'):
        fail(f'dataset={name}: dataset is the name of a folder in data/')
    folder = os.path.join(HERE, 'data', name)
    files = [os.path.join(folder, f) for f in ('train.bin', 'val.bin', 'meta.json')]
    script = f'data/{name}/prepare.py'

    def prepare():
        if missing := [f for f in files if not os.path.exists(f)]:
            run.print(f'no {os.path.basename(missing[0])} in data/{name} yet: running {script}')
            importlib.import_module(f'data.{name}.prepare').main()
    if name in ('shakespeare_char', 'shakespeare'):
        run.once_per_node(prepare)
    missing = [f for f in files if not os.path.exists(f)]
    if not os.path.exists(os.path.join(HERE, script)):
        script = f'data/text/prepare.py --input=FILE --name={name}'
    if missing:
        fail(f'no {os.path.basename(missing[0])} in data/{name}: run python {script}')
    try:
        with open(files[2], encoding='utf-8') as f:
            meta = json.load(f)
        if tokenizer_size(meta['tokenizer']) != meta['vocab_size'] or type(meta['vocab_size']) is not int \
                or meta['dtype'] not in ('uint16', 'uint32'):
            raise ValueError('vocab_size or dtype is wrong')
        counts, sizes = ([meta[key][split] for split in ('train', 'val')] for key in ('tokens', 'bytes'))
        if not all(type(n) is int and n >= 0 for n in counts + sizes) or 'sha256' not in meta:
            raise ValueError('tokens and bytes are numbers, sha256 says of what')
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
        fail(f'{files[2]} is damaged ({type(e).__name__}: {e}): run python {script}')
    splits = [Tokens(path, block_size, meta['dtype'], meta['vocab_size']) for path in files[:2]]
    for tokens, count in zip(splits, counts):
        if tokens.n != count:
            fail(f'{tokens.path} has {tokens.n:,} tokens instead of {count:,}: run python {script}')
        tokens.check()
    return meta, *splits


class Tokens:
    """The token ids in a .bin file, read as windows of block_size + 1.

    Read rather than mapped into memory: resident memory does not grow with the file, and a file that
    shrinks under us is an error instead of a SIGBUS.
    """

    def __init__(self, path, block_size, dtype='uint16', vocab_size=2**32):
        self.path, self.block_size, self.dtype, self.vocab_size = path, block_size, np.dtype(dtype), vocab_size
        try:
            self.file = open(path, 'rb', buffering=0)
        except OSError as e:
            fail(f'{path}: {e.strerror}')
        size = os.path.getsize(path)
        if size % self.dtype.itemsize:
            fail(f'{path}: {size} bytes are no whole number of {self.dtype.itemsize}-byte tokens, prepare the dataset anew')
        self.n = size // self.dtype.itemsize
        if self.n < block_size + 1:
            fail(f'{path}: {self.n} tokens are fewer than block_size + 1 = {block_size + 1}, use --block_size')
        # a window less than fit, so that the windows of an epoch can start at any token
        self.windows_per_epoch = max(1, (self.n - 1) // block_size - 1)
        self.epoch = None

    def read(self, starts):
        """Return x and y (len(starts), block_size) int64: the windows at starts, and the same one token later."""
        ids = np.empty((len(starts), self.block_size + 1), dtype=self.dtype)
        for row, start in zip(ids, starts):
            self.file.seek(int(start) * self.dtype.itemsize)
            if self.file.readinto(row) != row.nbytes:
                fail(f'{self.path} ended at token {start}: it was cut short while in use', code=1)
        if ids.max() >= self.vocab_size:
            fail(f'{self.path}: token id {ids.max()} is outside the vocabulary of {self.vocab_size}, '
                 'prepare the dataset anew', code=1)
        return torch.from_numpy(ids[:, :-1].astype(np.int64)), torch.from_numpy(ids[:, 1:].astype(np.int64))

    def check(self):
        """Fail where an id is outside the vocabulary: among the first 100M tokens, read checks the rest in passing."""
        chunk = 1 << 20
        self.file.seek(0)
        for start in range(0, min(self.n, 100_000_000), chunk):
            ids = np.frombuffer(self.file.read(chunk * self.dtype.itemsize), self.dtype)
            if ids.max() >= self.vocab_size:
                fail(f'{self.path}: token id {ids.max()} at position {start + ids.argmax()} is outside the vocabulary of '
                     f'{self.vocab_size}, prepare the dataset anew')

    def train_batch(self, first, count, run, noise=0.0):
        """Return x and y of sequences first, ..., first + count - 1 of an endless stream of training windows.

        In an epoch the windows lie side by side, from a random offset, and are taken in random order, each
        once. Both depend on the run's seed and the epoch alone. A part `noise` of the tokens of x is replaced by random
        ones: which, depends on seed and sequence alone.
        """
        starts = []
        for sequence in range(first, first + count):
            epoch, i = divmod(sequence, self.windows_per_epoch)
            if epoch != self.epoch:
                g = run.generator('train', epoch)
                slack = self.n - 1 - self.windows_per_epoch * self.block_size
                self.epoch, self.offset = epoch, torch.randint(slack + 1, (1,), generator=g).item()
                self.order = torch.randperm(self.windows_per_epoch, generator=g)
            starts.append(self.offset + self.order[i].item() * self.block_size)
        x, y = self.read(starts)
        if noise:
            for row, sequence in zip(x, range(first, first + count)):
                g = run.generator('noise', sequence)
                replaced = torch.rand(self.block_size, generator=g) < noise
                row[replaced] = torch.randint(self.vocab_size, (self.block_size,), generator=g)[replaced]
        return x, y

    def eval_starts(self, n):
        """Return the starts of n evenly spaced windows; of all that cover the file where n is 0 or enough for that.

        All windows lie side by side but for the last, which ends with the file and so may overlap the one before.
        """
        last = self.n - 1 - self.block_size
        if n == 0 or n * self.block_size >= self.n - 1:
            return [*range(0, last, self.block_size), last]
        return [i * last // max(1, n - 1) for i in range(n)]


def divide(c, run):
    """Return this rank's share of an update under settings c: (range of micro-batches, part, parts).

    Of each of these micro-batches it takes part `part` of `parts` equal ones of the rows. Whole micro-batches
    where they divide by the processes, else groups of `parts` processes share some.
    """
    if c['parallel'] == 'fsdp' and (run.world_size == 1 or run.dtype == torch.float16):
        fail('--parallel=fsdp divides the model over the processes of torchrun --nproc_per_node=N, N > 1, in float32 or '
             'bfloat16')
    accumulation, batch_size = c['gradient_accumulation_steps'], c['batch_size']
    parts = run.world_size // math.gcd(accumulation, run.world_size)
    if batch_size % parts:
        fail(f'gradient_accumulation_steps={accumulation} micro-batches of batch_size={batch_size} sequences cannot be '
             f'divided over {run.world_size} processes: make one of them a multiple of {parts}')
    group, part = divmod(run.rank, parts)
    n = accumulation * parts // run.world_size
    return range(group * n, (group + 1) * n), part, parts


# -----------------------------------------------------------------------------
# optimization

def load_gpt2(init_from, block_size, dropout, run, tokenizer=None, kind=GPT):
    """Return the GPT-2 named by init_from, one of GPT2_NAMES or a folder, or with kind=GPTConfig its shape alone.

    A rank of each node downloads, the others wait. Fails where its vocabulary does not hold tokenizer's.
    """
    try:
        folder = init_from
        if init_from in GPT2_NAMES:
            files = GPT2_FILES if kind is GPT else GPT2_FILES[:1]
            run.once_per_node(lambda: gpt2_folder(init_from, files))
            folder = gpt2_folder(init_from, files)
        model = kind.from_pretrained(folder, block_size, dropout)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as e:
        fail(f'--init_from={init_from}: {type(e).__name__}: {e}')
    if tokenizer and model.config.vocab_size < tokenizer.vocab_size:
        fail(f'--init_from={init_from}: it has a vocabulary of {model.config.vocab_size}, not GPT-2\'s, and such a folder holds no '
             'tokenizer: use the checkpoint it was exported from')
    return model


def model_shape(c, vocab_size):
    """Return the GPTConfig that settings c describe; GPT-2's vocabulary is padded to a multiple of 64, for speed."""
    shape = {f.name: c[f.name] for f in dataclasses.fields(GPTConfig) if f.name in c}
    return GPTConfig(vocab_size=50304 if vocab_size == 50257 else vocab_size, **shape)


def place_model(model, run, c, part, parts):
    """Return model on the run's device, or divided over all processes, as settings c say.

    It is told that it sees part `part` of `parts` of the rows of each micro-batch.
    """
    model.activation_checkpointing = c['activation_checkpointing']
    for module in model.modules():
        if isinstance(module, Dropout):
            module.part, module.parts = part, parts
    return shard_model(model, run) if c['parallel'] == 'fsdp' else model.to(run.device)


def shard_model(model, run):
    """Divide the parameters of model over all processes (FSDP2): each block's, and the rest, are gathered when needed.

    In float32, or in bfloat16 with gradients summed in float32. Returns the model, moved to the run's device block by
    block; its state_dict holds DTensors.
    """
    from torch.distributed.device_mesh import init_device_mesh  # here, since they add to every start-up
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    policy = MixedPrecisionPolicy() if run.dtype == torch.float32 else \
        MixedPrecisionPolicy(param_dtype=run.dtype, reduce_dtype=torch.float32)
    mesh = init_device_mesh(run.device.type, (run.world_size,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def is_sharded(tensor):
    return hasattr(tensor, 'full_tensor')  # a DTensor


def gather_whole(x, run):
    """x, any nesting of dicts and lists, with sharded tensors made whole: on rank 0's CPU, the others get None for them.

    All processes call this together.
    """
    def gather(t):
        if not is_sharded(t):
            return t
        t = t.full_tensor()
        return t.cpu() if run.is_main else None
    return tree_map(gather, x)


def load_optimizers(optimizers, saved):
    """Give optimizers the states of a checkpoint, sharded like their parameters; rates, decays and betas stay their own."""
    def shard(t, p):
        if not is_sharded(p) or t.shape != p.shape:
            return t.clone()  # else, on a CPU, it would stay in the file it was read from, which then cannot be freed
        from torch.distributed.tensor import distribute_tensor
        return distribute_tensor(t.to(p.device), p.device_mesh, p.placements)
    for opt, old in zip(optimizers, saved):
        params = [p for group in opt.param_groups for p in group['params']]
        keys = {'momentum_buffer'} if isinstance(opt, Muon) else {'step', 'exp_avg', 'exp_avg_sq'}
        state = {}
        for i, p in enumerate(params if old['state'] else ()):  # before the first update there is none
            if {k: t.shape for k, t in old['state'][i].items()} != {k: () if k == 'step' else p.shape for k in keys}:
                raise ValueError(f'parameter {i} has other names or shapes')  # fused AdamW would write beyond a smaller one
            state[i] = {k: shard(t, p) for k, t in old['state'][i].items()}
        opt.load_state_dict({'state': state, 'param_groups': opt.state_dict()['param_groups']})


def compile_for_training(block):
    """Replace block.forward by one that is compiled in training, and as it was in evaluation and sampling."""
    eager, compiled = block.forward, torch.compile(block.forward)
    block.forward = lambda *args: (compiled if block.training else eager)(*args)


def compile_model(model, rows, run):
    """Return model, compiled if the run says so: now, on a batch thrown away, so that no step's time contains it."""
    if not run.compile:
        return model
    run.print('compiling ...')
    t0 = time.perf_counter()
    if is_sharded(next(model.parameters())):
        # fsdp's hooks on each block, and checkpoint(), cannot be part of a graph: what lies between them can
        compiled = model
        for block in model.transformer.h:
            compile_for_training(block)
    else:
        # without the logits: as an output, compiled, they would be written, and get a gradient of zeros of their size
        compiled = torch.compile(lambda idx, targets: (None, model(idx, targets)[1]))
    idx = torch.zeros(rows, model.config.block_size, dtype=torch.int64, device=run.device)
    with run.autocast():
        _, loss = compiled(idx, idx.clone())  # two tensors, as in training: else it would be compiled anew there
    loss.backward()
    model.zero_grad(set_to_none=True)
    run.sync()
    run.print(f'compiled in {time.perf_counter() - t0:.1f} s')
    return compiled


def total_peak_flops(run, peak_tflops):
    """Return the peak FLOP/s of all devices together, or None where one is not known; peak_tflops > 0 is each one's."""
    peak = peak_tflops * 1e12 or peak_flops(run) or math.nan
    peak = run.all_reduce(torch.tensor(peak, device=run.device)).item()
    return peak if math.isfinite(peak) else None


def orthogonalize(x):
    """Return x (matrices, rows, columns) with all singular values moved close to 1 (between 0.7 and 1.2, roughly).

    Five steps of the Newton-Schulz iteration and its coefficients in https://kellerjordan.github.io/posts/muon/.
    """
    wide = x if x.size(-2) <= x.size(-1) else x.mT
    wide = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=1e-7)  # no singular value is above 1
    for _ in range(5):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), wide, beta=3.4445)
    return wide if x.size(-2) <= x.size(-1) else wide.mT


class Eager:
    """For torch's optimizers: their methods without the decorators for torch.compile, whose import takes half of a start."""
    add_param_group, zero_grad, state_dict, load_state_dict = map(inspect.unwrap, (
        torch.optim.Optimizer.add_param_group, torch.optim.Optimizer.zero_grad, torch.optim.Optimizer.state_dict,
        torch.optim.Optimizer.load_state_dict))


class AdamW(Eager, torch.optim.AdamW):
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Muon(Eager, torch.optim.Muon):
    """torch's, but for where it computes: in the dtype given, all matrices of one shape in one product.

    torch.optim.Muon multiplies in bfloat16 always; where a CPU emulates it, that takes ten times as long as all the rest.
    """

    def __init__(self, params, dtype, **options):
        super().__init__(params, **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group['params']:
                by_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), params in by_shape.items():
                grads = [p.grad for p in params]
                for p in params:
                    if not self.state[p]:
                        self.state[p]['momentum_buffer'] = torch.zeros_like(p)
                averages = [self.state[p]['momentum_buffer'] for p in params]
                torch._foreach_lerp_(averages, grads, 1 - group['momentum'])
                update = torch.stack(torch._foreach_lerp(grads, averages, group['momentum']))  # Nesterov's look ahead
                update = orthogonalize(update.to(self.dtype)).float()
                torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])
                torch._foreach_add_(params, update.unbind(), alpha=-group['lr'] * max(1, rows / columns)**0.5)


def make_optimizers(model, run, c):
    """Return the optimizers that settings c name, which together update every parameter once.

    lr_max in a parameter group is its highest learning rate, which train_step multiplies with the schedule's factor.
    """
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2 and c['optimizer'] == 'muon']
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    decay, no_decay = [p for p in rest if p.dim() >= 2], [p for p in rest if p.dim() < 2]
    groups = [dict(params=decay, weight_decay=c['weight_decay']), dict(params=no_decay, weight_decay=0.0)]
    for name, params in (('decayed', decay + matrices), ('not decayed', no_decay)):
        run.print(f'{len(params)} {name} tensors, {sum(p.numel() for p in params):,} parameters')
    # fused: one pass over the parameters instead of a dozen
    optimizers = [AdamW(groups, lr=c['learning_rate'], betas=(c['beta1'], c['beta2']), fused=True)]
    if matrices:
        dtype = torch.bfloat16 if run.dtype == torch.bfloat16 else torch.float32  # in float16 small entries would vanish
        optimizers.append(Muon(matrices, dtype, lr=c['muon_lr'], momentum=c['muon_momentum'], weight_decay=c['weight_decay']))
    for opt in optimizers:
        for group in opt.param_groups:
            group['lr_max'] = group['lr']
    return optimizers


def lr_factor(it, c):
    """The learning rate of the update after `it` updates, as a part of the highest; c is the dict of settings."""
    if not c['decay_lr']:
        return 1.0
    if it < c['warmup_iters']:
        return (it + 1) / (c['warmup_iters'] + 1)
    end = c['lr_decay_iters'] or c['max_iters']
    start = c['warmup_iters'] if c['lr_schedule'] == 'cosine' else max(c['warmup_iters'], end * (1 - c['decay_frac']))
    x = min(1.0, max(0.0, (it - start) / max(1, end - start)))
    fall = 0.5 * (1 - math.cos(math.pi * x)) if c['lr_schedule'] == 'cosine' else x
    return 1 - fall * (1 - c['min_lr'] / c['learning_rate'])


class NotFinite(Exception):
    """A loss or gradient is inf or nan; the weights have not been touched."""


def train_step(model, optimizers, scaler, run, batches, count, grad_clip, factor, signals=(), timed=True):
    """Update the weights once. model is called as model(idx, targets), compiled or not.

    batches: this rank's share, an iterable of `count` micro-batches (dropout seed, idx, targets), each taken while a GPU
    still computes the one before. factor: of the highest learning rates. signals: those that came, with which this
    rank wants to leave. timed: wait for the device between the parts, so that their seconds are true.
    Returns loss (float, mean over micro-batches and ranks), norm (float, of the gradient before clipping), the
    seconds in forward and backward, and whether any rank wants to leave. Raises NotFinite on all ranks alike.
    """
    seconds = [0.0, 0.0]
    total = torch.zeros(2, device=run.device)  # loss, whether a signal came

    def clock():
        if timed:
            run.sync()
        return time.perf_counter()
    groups = [group for opt in optimizers for group in opt.param_groups]
    params = [p for group in groups for p in group['params']]
    sharded = is_sharded(params[0])
    for i, (dropout_seed, idx, targets) in enumerate(batches):
        if sharded:  # sum over the ranks, and give up the gathered parameters, after the last micro-batch only
            model.set_requires_gradient_sync(i == count - 1)
            model.set_reshard_after_backward(i == count - 1)
        t0 = clock()
        torch.manual_seed(dropout_seed)
        with run.autocast():
            _, loss = model(idx, targets)
        loss = loss / count
        total[0] += loss.detach()
        t1 = clock()
        scaler.scale(loss).backward()
        seconds[0] += t1 - t0
        seconds[1] += clock() - t1
    total[1] = bool(signals)  # as late as this, so that it is this step that a signal ends

    if sharded:
        total = run.all_reduce(total) / run.world_size
    elif run.world_size > 1:
        # one sum over all ranks per update, always in this order: DistributedDataParallel would rebuild its buckets
        # after the first update of a process, so a resumed run would add in another order
        flat = run.all_reduce(torch.cat([p.grad.flatten() for p in params] + [total])).div_(run.world_size)
        for p, grad in zip(params, flat.split([p.numel() for p in params] + [2])):
            p.grad = grad.view_as(p)
        total = flat[-2:]
    for opt in optimizers:
        scaler.unscale_(opt)
    norm = nn.utils.get_total_norm([p.grad for p in params])
    loss, leave = total.tolist()  # a GPU is waited for here, before it gets the optimizers' work, and not after
    # an overflow in float16 is no fault: the scaler skips the update and halves its scale
    norm_value = (norm.full_tensor() if sharded else norm).item()
    if not (math.isfinite(loss) and (scaler.is_enabled() or math.isfinite(norm_value))):
        raise NotFinite(f'the {"gradient norm" if math.isfinite(loss) else "loss"} is not finite')
    if grad_clip and norm_value > grad_clip:  # else it would multiply all gradients by 1
        nn.utils.clip_grads_with_norm_(params, grad_clip, norm)
    for group in groups:
        group['lr'] = group['lr_max'] * factor
    for opt in optimizers:
        if math.isfinite(norm_value):  # the scaler would look at each optimizer's gradients alone
            scaler.step(opt)
        opt.zero_grad(set_to_none=True)
    scaler.update()
    return loss, norm_value, *seconds, leave > 0


@torch.no_grad()
def evaluate(model, tokens, eval_iters, batch_size, run):
    """Return the mean loss over eval_iters batches (0: all) of Tokens; each rank computes its part of them."""
    starts = tokens.eval_starts(eval_iters * batch_size)
    batches = [starts[i:i + batch_size] for i in range(0, len(starts), batch_size)]
    total = torch.zeros(2, dtype=torch.float64)  # summed loss, number of tokens
    model.eval()
    for i in range(run.rank, len(batches) + run.rank, run.world_size):  # equally often on all ranks
        batch = batches[min(i, len(batches) - 1)]
        x, y = tokens.read(batch)
        if i >= len(batches):
            y = torch.full_like(y, -1)  # not counted, but with fsdp all ranks must compute alike
        if len(starts) > 1 and batch[-1] == starts[-1]:
            y[-1, :max(0, starts[-2] + tokens.block_size - starts[-1])] = -1  # has been counted in the window before
        count = (y >= 0).sum()
        with run.autocast():
            _, loss = model(run.to_device(x), run.to_device(y))
        if count:
            total += torch.stack([loss.cpu().double() * count, count.double()])
    model.train()
    if run.world_size > 1:
        total = run.all_reduce(total.to(run.device))
    return (total[0] / total[1]).item()


# -----------------------------------------------------------------------------
# sampling and checkpoints

def encode_prompt(tokenizer, text, device='cpu'):
    """Return text as idx (1, T); an empty text as end-of-text, or a newline where there is no such token."""
    if text:
        ids = tokenizer.encode(text)
    elif tokenizer.eot is not None:
        ids = [tokenizer.eot]
    else:
        ids = tokenizer.encode('\n') if '\n' in tokenizer.chars else [0]
    return torch.tensor(np.array(ids, dtype=np.int64), device=device)[None]


def sample_text(model, tokenizer, prompt, n, run, it):
    """Return prompt with n tokens more; changes neither the model's mode nor any random state of training."""
    model.eval()
    idx = encode_prompt(tokenizer, prompt, run.device)
    generator = run.generator('sample', it, device=run.device)
    new = model.generate(idx, n, temperature=0.8, top_k=200, generator=generator, vocab_size=tokenizer.vocab_size)
    text = prompt + tokenizer.decode([token.item() for token in new])
    model.train()
    return text


def save_checkpoint(checkpoint, path, previous=None):
    """Write a checkpoint so that path is, at every moment, either the old one or the new one, whole.

    previous: another path, which becomes a second name of the old one. Exit code 1 where the disk refuses.
    """
    temporary = f'{path}.tmp'
    try:
        with open(temporary, 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        if previous and os.path.exists(path):
            if os.path.exists(f'{previous}.tmp'):
                os.remove(f'{previous}.tmp')
            try:
                os.link(path, f'{previous}.tmp')
            except OSError:  # a file system without hard links
                shutil.copyfile(path, f'{previous}.tmp')
            os.replace(f'{previous}.tmp', previous)
        os.replace(temporary, path)
        sync_folder(os.path.dirname(path) or '.')
    except (OSError, RuntimeError) as e:
        # torch raises a RuntimeError of its own over the file's OSError
        e = e if isinstance(e, OSError) else e.__context__
        if not isinstance(e, OSError):
            raise
        if os.path.exists(temporary):
            os.remove(temporary)
        cannot_write(path, e, f', {megabytes(checkpoint)} are needed; the checkpoint before it is as it was')


def megabytes(x):
    """The size of all tensors in x, any nesting of dicts and lists, in words."""
    return f'{sum(t.nbytes for t in tree_leaves(x) if isinstance(t, torch.Tensor)) / 1e6:.1f} MB'


def sync_folder(folder):
    """Make the names in folder survive a power cut."""
    if os.name == 'posix':
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def read_checkpoint(path):
    """Return the checkpoint at path, its tensors on the CPU; ValueError says what is wrong with it.

    No code of the file is run, and nothing in it is used as a path.
    """
    if not os.path.isfile(path):
        raise ValueError('it is no file')
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load would not notice
                raise ValueError(f'{damaged} in it is damaged')
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except zipfile.BadZipFile:
        raise ValueError('it is cut short, damaged, or no checkpoint at all')
    except ValueError:
        raise
    except Exception as e:
        raise ValueError(f'torch refuses it: {first_line(e)}')
    if not isinstance(checkpoint, dict):
        raise ValueError(f'it holds a {type(checkpoint).__name__} instead of a dict')
    if not isinstance(checkpoint.get('format', 0), int) or checkpoint.get('format', 0) > CHECKPOINT_VERSION:
        raise ValueError(f'its format {checkpoint["format"]} is newer than what this quill reads ({CHECKPOINT_VERSION})')
    if 'format' not in checkpoint:
        adopt_nanogpt(checkpoint, path)
    if 'skipped' in checkpoint and isinstance(c := checkpoint.get('config'), dict):  # an earlier quill counted in updates
        with contextlib.suppress(KeyError, TypeError):
            updates = checkpoint['iter_num'] + checkpoint['skipped']
            checkpoint['position'] = updates * c['gradient_accumulation_steps'] * c['batch_size']
    needed = {'model': dict, 'model_args': dict, 'config': dict, 'tokenizer': dict, 'iter_num': int}
    if 'val_loss' in checkpoint:  # of model.pth; ckpt.pt has more
        needed['val_loss'] = float
    else:
        needed |= {'optimizer': list, 'scaler': dict, 'best_val_loss': float, 'train_seconds': float, 'data': dict,
                   'position': int}
    for key, kind in needed.items():
        if not isinstance(checkpoint.get(key), kind):
            raise ValueError(f'it has no {key}')
    if not all(isinstance(v, torch.Tensor) and v.layout == torch.strided for v in checkpoint['model'].values()):
        raise ValueError('its weights are no tensors')
    shapes = {k: v.shape for k, v in checkpoint['model'].items()}
    if 'shards' in checkpoint:
        try:
            metadata = open_shards(path, checkpoint).read_metadata().state_dict_metadata
            shapes = {k.removeprefix('model.'): v.size for k, v in metadata.items() if k.startswith('model.')}
        except Exception as e:
            raise ValueError(f'its shards cannot be read: {e}')
    try:
        if tokenizer_size(checkpoint['tokenizer']) > checkpoint['model_args']['vocab_size']:
            raise ValueError('the tokenizer is larger')
        with torch.device('meta'), SkipInit():
            if checkpoint['model_args']['n_layer'] > len(shapes):
                raise ValueError('n_layer is too large')
            expected = GPT(GPTConfig(**checkpoint['model_args'])).state_dict()
        if {k: v.shape for k, v in expected.items()} != shapes:
            raise ValueError('other names or shapes')
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as e:
        raise ValueError(f'its weights do not fit its model_args ({e})')
    return checkpoint


def shard_state(model, optimizers=()):
    """What shards hold, as tensors to write or to read into: weights, and AdamW's state by the names of the parameters."""
    state = {'model': dict(model.state_dict())}
    for adamw in optimizers:  # the only one, with fsdp
        for p in model.parameters():
            if not adamw.state[p]:  # before the first update
                adamw.state[p] = dict(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p),
                                      exp_avg_sq=torch.zeros_like(p))
        state['optimizer'] = {name: adamw.state[p] for name, p in model.named_parameters()}
    return state


def peek(path):
    """Return the checkpoint at path, unchecked and with its tensors left on disk; None where it is none or unreadable."""
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except Exception:
        return None
    return checkpoint if isinstance(checkpoint, dict) and isinstance(checkpoint.get('shards', {}), dict) else None


def saved_step(path):
    """Return after how many updates the checkpoint at path was saved, -1 where that cannot be read."""
    step = (peek(path) or {}).get('iter_num')
    return step if isinstance(step, int) else -1


def write_shards(out_dir, state, it, run):
    """Write the state, each process its part, to a new folder shards-ID; return what a checkpoint needs to find it.

    That is a dict of its ID and the CRC-32 of its files.
    """
    from torch.distributed import checkpoint as dcp  # here, since it adds to every start-up
    stamp = run.gather(time.time_ns())[0]
    folder = os.path.join(out_dir, f'shards-{it}-{stamp}')
    try:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder))
        own = {f: file_crc(os.path.join(folder, f)) for f in os.listdir(folder)
               if f.startswith(f'__{run.rank}_') or run.is_main and f == '.metadata'}
    except (OSError, dcp.api.CheckpointException) as e:
        cannot_write(folder, e, f', {megabytes(state)} are needed; the checkpoint before it is as it was')
    sync_folder(folder)
    return {'id': f'{it}-{stamp}', 'crc': {f: crc for part in run.gather(own) for f, crc in part.items()}}


def file_crc(path):
    crc = 0
    with open(path, 'rb') as f:
        while chunk := f.read(1 << 24):
            crc = zlib.crc32(chunk, crc)
    return crc


def open_shards(path, checkpoint):
    """Return a reader, for torch.distributed.checkpoint, of the shards that belong to the checkpoint at path.

    Its metadata is a pickle: only the classes that describe tensors are taken from it.
    """
    from torch.distributed import checkpoint as dcp
    shards = checkpoint['shards']
    if not re.fullmatch(r'\d+-\d+', shards['id']):
        raise ValueError('its shards have no sound name')
    folder = os.path.join(os.path.dirname(path), f'shards-{shards["id"]}')

    taken = {'torch': 'Size', 'torch.serialization': '_get_layout', 'torch.distributed.checkpoint.filesystem': '_StorageInfo',
             'torch.distributed.checkpoint.metadata': 'Metadata TensorStorageMetadata TensorProperties _MEM_FORMAT_ENCODING '
                                                      'ChunkStorageMetadata MetadataIndex StorageMeta'}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if module.startswith('pathlib'):  # where it was written, as that Python calls paths; not used
                return lambda *parts: None
            if name in taken.get(module, '').split() or module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
                return super().find_class(module, name)
            raise ValueError(f'{module}.{name} in it describes no tensor')

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args, **kwargs):
            with open(os.path.join(folder, '.metadata'), 'rb') as f:
                metadata = Unpickler(f).load()
            if {info.relative_path for info in metadata.storage_data.values()} - set(shards['crc']):
                raise ValueError(f'{folder} names files that are not its own')
            return metadata
    if missing := [f for f in shards['crc'] if not re.fullmatch(r'__\d+_\d+\.distcp|\.metadata', f)
                   or not os.path.isfile(os.path.join(folder, f))]:
        raise ValueError(f'{folder} lacks {missing[0]}')
    return Reader(folder)


def check_shards(path, checkpoint, rank=0, world_size=1):
    """Return open_shards(path, checkpoint); ValueError where one of them is damaged. Each rank looks at its part of them."""
    reader = open_shards(path, checkpoint)
    for name, crc in sorted(checkpoint['shards']['crc'].items())[rank::world_size]:
        if file_crc(os.path.join(reader.path, name)) != crc:
            raise ValueError(f'{name} in {reader.path} is damaged')
    return reader


def read_shards(path, checkpoint, model, optimizers, run):
    """Fill model and optimizers from the shards of the checkpoint at path: each process its part, however many wrote them."""
    from torch.distributed import checkpoint as dcp
    try:
        reader = check_shards(path, checkpoint, run.rank, run.world_size)
    except ValueError as e:
        fail(f'cannot use {path}: {e}; {what_to_do_without(path)}')
    run.barrier()  # not before all have found their part sound
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that it loads in one process, which is what we want
        dcp.load(shard_state(model, optimizers), storage_reader=reader, no_dist=run.world_size == 1)


def remove_shards(out_dir):
    """Remove the shards in out_dir that no checkpoint there belongs to: of a save that was cut off, or of an older step."""
    shards = {f for f in os.listdir(out_dir) if re.fullmatch(r'shards-\d+-\d+', f)}
    for name in os.listdir(out_dir) if shards else ():
        if '.pt' in name and not name.endswith('.tmp'):  # also ckpt.pt.bak
            if (checkpoint := peek(os.path.join(out_dir, name))) is None:
                return  # unreadable: what it belongs to must stay
            shards.discard(f'shards-{checkpoint.get("shards", {}).get("id")}')
    for name in shards:
        shutil.rmtree(os.path.join(out_dir, name))


def adopt_nanogpt(checkpoint, path):
    """Turn a checkpoint of nanoGPT, in place, into one of ours that lacks the optimizer's state and data identity."""
    try:
        weights = {k.removeprefix('_orig_mod.'): v for k, v in checkpoint['model'].items()}
        checkpoint['model'] = {k: v for k, v in weights.items() if not k.endswith('.attn.bias')}  # the causal mask
        checkpoint['best_val_loss'] = float(checkpoint['best_val_loss'])
        name = checkpoint['config']['dataset']
        if checkpoint['model_args']['vocab_size'] in (50257, 50304):
            checkpoint['tokenizer'] = {'kind': 'gpt2'}
        else:
            with open(os.path.join(HERE, 'data', os.path.basename(name), 'meta.json'), encoding='utf-8') as f:
                checkpoint['tokenizer'] = json.load(f)['tokenizer']
    except (KeyError, TypeError, AttributeError):
        raise ValueError('it is a checkpoint neither of quill nor of nanoGPT')
    except OSError:
        raise ValueError(f'it is nanoGPT\'s and holds no tokenizer: prepare data/{os.path.basename(name)} first')
    checkpoint.update(optimizer=[], scaler={}, train_seconds=0.0, data={}, position=0)
    if torchrun('RANK', 0) == 0:
        print(f'note: {path} is nanoGPT\'s: its weights and settings are used; it lacks the identity of its data, and its '
              'optimizer starts anew')


def load_checkpoint(path):
    """Return read_checkpoint(path), or fail: with what is wrong, and the checkpoint to use instead."""
    folder, name = os.path.split(path)
    if not os.path.exists(path):
        fail(f'no {name} in {folder or "."}: {what_to_do_without(path)}')
    try:
        return read_checkpoint(path)
    except ValueError as e:
        fail(f'cannot use {path}: {e}; {what_to_do_without(path)}')


def what_to_do_without(path):
    """Return, as the end of an error, what to do where the checkpoint at path is missing or damaged."""
    folder, name = os.path.split(path)
    if name == 'model.pth' and os.path.exists(os.path.join(folder, 'ckpt.pt')):
        return 'use --weights=last'
    if name == 'ckpt.pt' and os.path.exists(previous := os.path.join(folder, 'ckpt_prev.pt')):
        try:
            checkpoint = read_checkpoint(previous)
            if 'shards' in checkpoint:
                check_shards(previous, checkpoint)
            return f'ckpt_prev.pt is good (step {checkpoint["iter_num"]}): train.py takes it as --ckpt=ckpt_prev.pt'
        except ValueError:
            return 'ckpt_prev.pt is no good either'
    return 'train first, or give another --out_dir'


def claim(out_dir):
    """Make out_dir and take it for this process alone, or fail; returns the open lock file.

    The lock ends with the process, however it ends, so a stale one blocks nobody.
    """
    path = os.path.join(out_dir, 'run.lock')
    try:
        os.makedirs(out_dir, exist_ok=True)
        f = open(path, 'a+')
    except OSError as e:
        cannot_write(path, e, name=f'to --out_dir={out_dir}')
    try:
        if reason := lock(f):
            print(f'note: {out_dir} cannot be locked ({reason}): see to it that no second run uses it', flush=True)
        f.truncate(0)
        f.write(str(os.getpid()))
        f.flush()
    except BlockingIOError:
        f.seek(0)
        fail(f'--out_dir={out_dir} is in use by process {f.read().strip()}: give another --out_dir, or end that one')
    except OSError as e:
        cannot_write(path, e)
    return f


def check_space(out_dir, model, sharded, resumed):
    """Fail where the disk has no room for what a run saves, beyond what it resumes from.

    At most three ckpt.pt and two model.pth at a time; or four shards-*, of which model.pth has one.
    """
    n = 4 * sum(p.numel() for p in model.parameters())
    # AdamW keeps two numbers for each parameter
    need = 4 * 3 * n if sharded else 3 * 3 * n + 2 * n
    if resumed:
        own = [*(os.path.join(out_dir, f) for f in ('ckpt.pt', 'ckpt_prev.pt', 'model.pth')),
               *glob.glob(os.path.join(glob.escape(out_dir), 'shards-*', '*'))]
        need -= sum(os.path.getsize(path) for path in own if os.path.isfile(path))
    free = shutil.disk_usage(out_dir).free
    if need > free:
        fail(f'--out_dir={out_dir}: checkpoints will take {need / 1e6:.1f} MB more, {free / 1e6:.1f} MB are free', code=1)


def keep_old_run(out_dir, names, run):
    """Rename those files of an earlier run in out_dir, by iteration and time, so that a new one destroys nothing."""
    run_stamp = ''
    for name in names:
        path = os.path.join(out_dir, name)
        if not os.path.exists(path):
            continue
        stamp = time.strftime('%Y%m%d-%H%M%S', time.localtime(os.path.getmtime(path)))
        if (step := saved_step(path)) >= 0:
            stamp = f'{step}-{stamp}'
        run_stamp = run_stamp or stamp  # of ckpt.pt, which comes first
        if '.pt' not in name:  # metrics.jsonl and loss.png are of no single step
            stamp = run_stamp
        stem, extension = os.path.splitext(name)
        kept, n = f'{stem}-{stamp}{extension}', 1
        while os.path.exists(os.path.join(out_dir, kept)):
            n += 1
            kept = f'{stem}-{stamp}-{n}{extension}'
        os.rename(path, os.path.join(out_dir, kept))
        run.print(f'{out_dir} holds an earlier run: renamed {name} to {kept}')


def read_runs():
    """Return the lines of checkpoints.log: the directories of all runs, the most recent one last."""
    log = os.path.join(HERE, 'checkpoints.log')
    if not os.path.exists(log):
        return []
    with open(log, encoding='utf-8', errors='surrogateescape') as f:  # names need not be UTF-8
        return f.read().splitlines()


def remember_run(out_dir):
    """Make out_dir the last line of checkpoints.log beside this script, where sample.py looks."""
    log, line = os.path.join(HERE, 'checkpoints.log'), os.path.abspath(out_dir)
    try:
        lines = read_runs()
        with open(f'{log}.{os.getpid()}.tmp', 'w', encoding='utf-8', errors='surrogateescape') as f:
            f.write('\n'.join([other for other in lines if other != line] + [line]) + '\n')
        os.replace(f'{log}.{os.getpid()}.tmp', log)
    except OSError as e:
        print(f'note: {log} not written ({e.strerror}): sample.py will need --out_dir={out_dir}', flush=True)


def read_metrics(path):
    """Return the rows of a metrics.jsonl, without damaged lines: a run that was killed may have left half a one."""
    rows = []
    if os.path.exists(path):
        with open(path, encoding='utf-8', errors='replace') as f:
            for line in f:
                with contextlib.suppress(ValueError):
                    rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get('step'), int)]


def plot_losses(out_dir):
    """Draw out_dir/loss.png from metrics.jsonl, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = read_metrics(os.path.join(out_dir, 'metrics.jsonl'))
    ax = Figure(figsize=(8, 5), layout='constrained').subplots()
    for key, style, label in (('loss', '-', 'train, each logged batch'), ('train_loss', 'o-', 'train'), ('val_loss', 'o-', 'val')):
        points = [(r['step'], r[key]) for r in rows if key in r]
        ax.plot([p[0] for p in points], [p[1] for p in points], style, markersize=4, linewidth=1, label=label)
    ax.set(xlabel='iterations', ylabel='loss, nats per token')
    ax.legend()
    try:
        ax.figure.savefig(os.path.join(out_dir, 'loss.png'), dpi=100)
    except OSError as e:
        print(f'note: loss.png not written ({e.strerror})', flush=True)


class Metrics:
    """Where numbers go besides the terminal: out_dir/metrics.jsonl, and wandb and tensorboard where asked for."""

    def __init__(self, config, iter_num):
        self.path = os.path.join(config['out_dir'], 'metrics.jsonl')
        rows = [row for row in read_metrics(self.path) if row['step'] <= iter_num] if iter_num else []
        self.wandb, self.writer = config['wandb_log'], None
        try:
            with open(self.path + '.tmp', 'w', encoding='utf-8') as f:
                f.writelines(json.dumps(row) + '\n' for row in rows)  # a resumed run repeats what came after its checkpoint
            os.replace(self.path + '.tmp', self.path)
            self.file = open(self.path, 'a', encoding='utf-8')
        except OSError as e:
            cannot_write(self.path, e)
        if config['tensorboard']:
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(os.path.join(config['out_dir'], 'tensorboard'),
                                        purge_step=iter_num + 1 if iter_num else None)

    def write(self, **row):
        try:
            self.file.write(json.dumps(row) + '\n')
            self.file.flush()
        except OSError as e:
            cannot_write(self.path, e, '; the last checkpoint is as it was')
        if self.wandb:
            import wandb
            wandb.log(row, step=row['step'])
        if self.writer:
            for key, value in row.items():
                if value is not None:
                    self.writer.add_scalar(key, value, row['step'])


def start_wandb(config):
    import wandb
    try:
        wandb.init(project=config['wandb_project'], name=config['wandb_run_name'], config=config)
    except Exception as e:  # not logged in, say
        fail(f'--wandb_log=True: {first_line(e)}')


# -----------------------------------------------------------------------------

def main(config, checkpoint=None):
    """Train with these settings, which are this module's globals too, from a loaded checkpoint or from scratch.

    configure() has left _given there as well: the settings that arguments named.
    """
    for key, module in (('wandb_log', 'wandb'), ('tensorboard', 'torch.utils.tensorboard')):
        if config[key]:
            try:
                importlib.import_module(module)
            except ImportError:
                fail(f'{key}=True needs a package that is not installed: pip install {key.removesuffix("_log")}')
    run = setup(device, dtype, compile, backend, seed, deterministic, timeout_s,
                max_iters, gradient_accumulation_steps)
    micro_batches, part, parts = divide(config, run)
    rows = batch_size // parts

    # data
    meta, train_tokens, val_tokens = open_dataset(dataset, block_size, run)
    data = {'dataset': dataset, 'sha256': meta['sha256'], 'tokens': meta['tokens']}
    tokenizer = tokenizer_from_dict(meta['tokenizer'])
    run.print(f'{dataset}: {train_tokens.n:,} tokens to train on, {val_tokens.n:,} to validate, '
              f'vocabulary of {meta["vocab_size"]:,}')
    prompt = sample_prompt
    if sample_tokens:
        try:
            encode_prompt(tokenizer, prompt)
        except ValueError as e:
            if 'sample_prompt' in _given:
                fail(f'--sample_prompt={prompt}: {e}')
            prompt = ''
            run.print(f'note: {sample_prompt!r} cannot be written in this vocabulary, samples start from nothing')

    # model
    pretrained = init_from not in ('scratch', 'resume')
    if checkpoint:
        shape = GPTConfig(**checkpoint['model_args'] | {'dropout': dropout})
    elif pretrained:
        shape = load_gpt2(init_from, block_size, dropout, run, kind=GPTConfig)  # before gigabytes are fetched for nothing
    else:
        shape = model_shape(config, meta['vocab_size'])
    problems = [f'{k}={config[k]} but the model of init_from={init_from} has {k}={v}'
                for k, v in dataclasses.asdict(shape).items() if k in _given and config[k] != v]
    if shape.vocab_size not in (meta['vocab_size'], model_shape(config, meta['vocab_size']).vocab_size):
        problems.append(f'data/{dataset} has a vocabulary of {meta["vocab_size"]}, the model one of {shape.vocab_size}')
    if checkpoint:
        problems += [f'data/{dataset} has {k}={data[k]} but the checkpoint was trained with {k}={v}'
                     for k, v in checkpoint['data'].items() if data.get(k) != v]
        if skip_batches < checkpoint['config'].get('skip_batches', 0):
            problems.append(f'skip_batches={skip_batches} is below the {checkpoint["config"]["skip_batches"]} already jumped over')
        if checkpoint['tokenizer'] != tokenizer.to_dict():
            problems.append(f'data/{dataset} has another tokenizer than the checkpoint was trained with')
        if len(checkpoint['optimizer']) not in (0, 2 if optimizer == 'muon' else 1):  # nanoGPT's has none
            problems.append(f'optimizer={optimizer} but the checkpoint was trained with another')
    if problems:
        fail(*problems)
    steps, datas = zip(*run.gather((checkpoint['iter_num'] if checkpoint else 0, data)))
    if len(set(steps)) > 1:
        fail(f'{out_dir} holds step {", ".join(map(str, steps))} for rank 0, 1, ...: is it on a disk that all see?')
    if any(other != data for other in datas):
        fail(f'data/{dataset} has {data["tokens"]} tokens for rank {run.rank}, and not the same for others: prepare it '
             'alike on every node')
    config = config | {k: v for k, v in dataclasses.asdict(shape).items() if k in config}
    if pretrained:
        model = load_gpt2(init_from, block_size, dropout, run)
    if run.is_main and not eval_only:
        lock_file = claim(out_dir)  # held until this process ends
        if checkpoint and saved_step(os.path.join(out_dir, ckpt)) != checkpoint['iter_num']:
            fail(f'another process has saved {os.path.join(out_dir, ckpt)} while this one started: start it again', code=1)
    if not pretrained:
        model = GPT(shape)
    if checkpoint and 'shards' not in checkpoint:
        model.load_state_dict(checkpoint['model'])
    run.print(model)
    run.print(f'{model.num_params():,} parameters without position embeddings')
    model = place_model(model, run, config, part, parts)
    optimizers = make_optimizers(model, run, config)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)

    # position: of the next sequence in the stream of training windows
    iter_num, best_val_loss, train_seconds, position = 0, math.inf, 0.0, 0
    sequences = gradient_accumulation_steps * batch_size  # in an update
    if checkpoint:
        iter_num, best_val_loss, train_seconds, position = (
            checkpoint[k] for k in ('iter_num', 'best_val_loss', 'train_seconds', 'position'))
        position += (skip_batches - checkpoint['config'].get('skip_batches', 0)) * sequences
        if 'shards' in checkpoint:
            read_shards(os.path.join(out_dir, ckpt), checkpoint, model, optimizers, run)
        else:
            try:
                load_optimizers(optimizers, checkpoint['optimizer'])
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                fail(f'cannot use {os.path.join(out_dir, ckpt)}: the state of its optimizer does not fit ({e})')
        if checkpoint['scaler'] and scaler.is_enabled():
            scaler.load_state_dict(checkpoint['scaler'])
        changed = {k: (v, config[k]) for k, v in checkpoint['config'].items()
                   if k in config and k not in NOT_RESUMED and config[k] != v}
        run.print(f'resumed {os.path.join(out_dir, ckpt)} at step {iter_num}'
                  + ''.join(f', {k}={new} (was {old})' for k, (old, new) in changed.items()))
        checkpoint.clear()  # its memory is needed
    resumed_at = iter_num if init_from == 'resume' else -1
    last_iter = min(max_iters, iter_num + train_iters) if train_iters else max_iters
    if iter_num >= last_iter and resumed_at >= 0 and not eval_only:
        run.print(f'nothing to do: the run is at step {iter_num} of max_iters={max_iters}, raise --max_iters to go on')
        return run.close()

    if eval_only:
        for name, tokens in (('train', train_tokens), ('val', val_tokens)):
            loss = evaluate(model, tokens, eval_iters, batch_size, run)
            bits = loss / math.log(2) * meta['tokens'][name] / meta['bytes'][name]
            perplexity = math.exp(loss) if loss < 700 else math.inf
            run.print(f'{name}_loss={loss:.4f} perplexity={perplexity:.3f} bits_per_byte={bits:.4f}')
        return run.close()

    # files
    sharded = checkpoint_format == 'sharded'
    if run.is_main:
        remove_shards(out_dir)
        check_space(out_dir, model, sharded, init_from == 'resume')
        if wandb_log:
            start_wandb(config)
        if init_from != 'resume':
            keep_old_run(out_dir, ['ckpt.pt', 'ckpt_prev.pt', 'model.pth', 'metrics.jsonl', 'loss.png'], run)
        else:  # what is newer than the checkpoint that this run goes on from
            keep_old_run(out_dir, [f for f in ('ckpt.pt', 'ckpt_prev.pt', 'model.pth') if f != ckpt and (
                f == 'ckpt.pt' or saved_step(os.path.join(out_dir, f)) > iter_num)], run)
        metrics = Metrics(config, iter_num)
        remember_run(out_dir)

    # the first signal ends the run after the present step, a second Ctrl-C at once
    signals = []
    # torchrun passes on the Ctrl-C that the terminal has sent to all: so soon after the first it is no second one
    echo_s = 1 if run.world_size > 1 else 0

    def on_signal(signum, frame):
        if signals and signum == signal.SIGINT and time.monotonic() - signals[0][1] > echo_s:
            os._exit(130)
        signals.append((signum, time.monotonic()))
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, on_signal)

    step_model = compile_model(model, rows, run)
    peak = total_peak_flops(run, peak_tflops)
    run.print(LEGEND)

    shards = {}  # of the last step that wrote some

    def save(name, previous=None, **more):
        """Write the weights and what explains them to out_dir/name."""
        path = os.path.join(out_dir, name)
        if sharded and it not in shards:  # ckpt.pt and model.pth of one step share them
            shards.clear()
            shards[it] = write_shards(out_dir, shard_state(model, optimizers), it, run)
        weights = {'model': {}, 'shards': shards[it]} if sharded else {'model': dict(model.state_dict())}
        checkpoint = gather_whole({'format': CHECKPOINT_VERSION, **weights,
                                   'model_args': dataclasses.asdict(model.config), 'iter_num': it, 'config': config,
                                   'tokenizer': tokenizer.to_dict(), **more}, run)
        if run.is_main:
            save_checkpoint(checkpoint, path, previous)
            remove_shards(out_dir)
            run.print(f'saved {path} (step {it})')

    def batches():
        """Yield this rank's micro-batches of the present update."""
        for micro in micro_batches:
            x, y = train_tokens.train_batch(position + micro * batch_size + part * rows, rows, run, input_noise)
            yield run.derive_seed('dropout', it, micro), run.to_device(x), run.to_device(y)

    # the clock counts steps alone: t0 is when it was last started, since the step at that moment
    it, since, t0, stop, overflows = iter_num, iter_num, time.perf_counter(), False, 0
    while True:
        # evaluate, sample, save
        due = (it % eval_interval == 0 or it == last_iter) and it != resumed_at
        if due or stop:
            run.sync()
            train_seconds += time.perf_counter() - t0
        if due:
            t1 = time.perf_counter()
            train_loss, val_loss = (evaluate(model, t, eval_iters, batch_size, run) for t in (train_tokens, val_tokens))
            if not math.isfinite(train_loss + val_loss):
                fail(f'the loss is not finite at iteration {it}: the last checkpoint in {out_dir} is as it was', code=1)
            best = (it or pretrained) and val_loss < best_val_loss  # weights that were not trained are not saved as the best
            if best:
                best_val_loss = val_loss
            run.print(f'step={it} train_loss={train_loss:.4f} val_loss={val_loss:.4f} '
                      f'best_val_loss={min(best_val_loss, val_loss):.4f} train_seconds={train_seconds:.1f} '
                      f'(evaluated in {time.perf_counter() - t1:.1f} s)')
            if run.is_main:
                metrics.write(step=it, train_loss=train_loss, val_loss=val_loss, train_seconds=train_seconds)
            if sample_tokens:  # on all ranks: with fsdp each holds only a part of the model
                text = sample_text(model, tokenizer, prompt, sample_tokens, run, it)
                run.print(f'--- sample at step {it} ---\n{text}\n---')
            if best or it and always_save_checkpoint:
                save('model.pth', val_loss=val_loss)
        if due and (it or it == last_iter) or stop:
            save('ckpt.pt', previous=os.path.join(out_dir, 'ckpt_prev.pt'),
                 optimizer=[{} if sharded else opt.state_dict() for opt in optimizers], scaler=scaler.state_dict(),
                 best_val_loss=best_val_loss, train_seconds=train_seconds, data=data, position=position)
        if due:
            if run.is_main:
                plot_losses(out_dir)
            since, t0 = it, time.perf_counter()

        # stop?
        if stop or it == last_iter:
            break

        # step
        factor = lr_factor(it, config)
        logged = it == 0 or (it + 1) % log_interval == 0
        try:
            loss, norm, dtf, dtb, stop = train_step(step_model, optimizers, scaler, run, batches(), len(micro_batches), grad_clip,
                                                    factor, signals, timed=logged)
        except NotFinite as e:
            fail(f'{e} at iteration {it}: stopped before the weights changed, the last checkpoint in {out_dir} is as '
                 'it was', code=1)
        it += 1
        position += sequences
        if math.isfinite(norm):
            overflows = 0
        elif (overflows := overflows + 1) == MAX_OVERFLOWS:
            fail(f'the gradient norm is not finite in {overflows} steps in a row, until iteration {it}: the last checkpoint '
                 f'in {out_dir} is as it was', code=1)
        else:
            run.print(f'note: float16 overflow at iteration {it - 1}, step skipped ({overflows} in a row)')

        # log
        if logged:
            run.sync()
            now = time.perf_counter()
            dt = (now - t0) / (it - since)
            train_seconds += now - t0
            since, t0 = it, now
            sps = sequences / dt
            mfu = peak and 100 * model.flops_per_token() * sps * block_size / peak
            eta = (last_iter - it) * dt
            row = dict(step=it, loss=loss, dt=dt, dtf=dtf, dtb=dtb, sps=sps, sps_per_gpu=sps / run.world_size,
                       tps=sps * block_size, tps_per_gpu=sps * block_size / run.world_size, mfu=mfu,
                       lr=learning_rate * factor, norm=norm, eta=eta)
            clock = f'{int(eta) // 3600}:{int(eta) // 60 % 60:02}:{int(eta) % 60:02}'
            run.print(' '.join(f'{k}={v:.6g}' if v is not None else f'{k}=n/a' for k, v in row.items() if k != 'eta'),
                      f'eta={clock}')
            if run.is_main:
                metrics.write(**row | {'norm': norm if math.isfinite(norm) else None})  # JSON has no inf

    if run.is_main and metrics.writer:
        metrics.writer.close()  # writes what it still holds
    run.close()
    if stop:
        run.print(f'stopped by a signal at step {it}: go on with --init_from=resume')
        raise SystemExit(128 + (signals[0][0] if signals else signal.SIGTERM))
    if it < max_iters:
        run.print(f'stopped after train_iters={train_iters} at step {it} of {max_iters}: go on with --init_from=resume')


if __name__ == '__main__':
    code = 0
    try:
        try:
            main(*settings())
        except KeyboardInterrupt:  # before the loop, which handles it itself
            fail('interrupted before training began', code=130)
        except RuntimeError as e:
            if out_of_memory(e):
                fail(f'out of memory, halve batch_size and double gradient_accumulation_steps: {first_line(e)}', code=1)
            if isinstance(e, torch.distributed.DistError) or 'gloo' in str(e):  # gloo's own errors have no class
                lost_process(e)
            raise
    except SystemExit as e:
        code = e.code
    if torchrun('WORLD_SIZE', 1) > 1:
        # in one of some eighty processes that have left gloo, torch 2.13 aborts while Python ends ("terminate called without an
        # active exception"), after all is done; so leave without Python's own clean-up, but for what was asked to run at exit
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
