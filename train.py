"""
Train a GPT, in one process or in many.

    python train.py config/train_shakespeare_char.py --max_iters=500
    python train.py --out_dir=out-shakespeare-char --init_from=resume --max_iters=1000
    torchrun --nproc_per_node=8 train.py

Config files and --key=value override the settings below. Sample from the result with sample.py.
"""
import contextlib
import gc
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch import nn

import configurator
from configurator import Process, configure, fail, one_line_errors, run_main, setup, torchrun
from data import checkpoints, runs
from data.checkpoints import checkpoint_path
from data.dataset import divide, open_dataset
from data.huggingface import read_pretrained
from data.tokenizers import tokenizer_from_dict
from model import ACTIVATIONS, GPT, NORMS, Dropout, GPTConfig, Muon, shard
from sample import continue_text, pick_prompt

# -----------------------------------------------------------------------------
# settings; the defaults train a 10M-parameter character GPT on Shakespeare

# files
out_dir = 'out'  # folder for checkpoints and metrics
init_from = 'scratch'  # scratch | resume | auto (resume if saved) | gpt2 ... gpt2-xl | DIR
ckpt = 'ckpt.pt'  # checkpoint in out_dir to resume; supplies all settings not given
# evaluation and logging
eval_interval = 250  # updates between evaluations (each also samples and saves)
eval_iters = 200  # batches of each split in an evaluation (at most 10 of new weights); 0: all
eval_only = False  # evaluate once, write nothing and exit
log_interval = 10  # updates between log lines
always_save_checkpoint = False  # write model.pth at each evaluation, even if not best
sample_prompt = 'What is an LLM?'  # continued at every evaluation
sample_tokens = 256  # length of the continuation; 0 disables it
wandb_log = False  # also log to Weights & Biases
wandb_project = 'quill'  # project there
wandb_run_name = 'gpt'  # name of the run
# data
dataset = 'shakespeare_char'  # folder in data/
gradient_accumulation_steps = 1  # micro-batches per update, in all processes
batch_size = 64  # sequences in a micro-batch
block_size = 256  # tokens in a sequence
input_noise = 0.0  # fraction of input tokens replaced at random (regularizes)
skip_batches = 0  # updates whose data is skipped, in all; raise it to resume past bad data
# model
n_layer = 6  # blocks
n_head = 6  # attention heads
n_embd = 384  # channels
dropout = 0.0  # helps if the data is seen many times
bias = False  # biases in Linear and LayerNorm, as in GPT-2
activation = 'gelu'  # in the MLP
norm = 'layernorm'  # normalization layer
rotary = False  # rotary instead of learned positions
half_rotary = False  # rotate only half of the channels, with base 1024
qk_norm = False  # normalize queries and keys
attn_scale = 0.0  # scale of attention scores; 0: 1 / sqrt(head_dim)
embed_norm = False  # normalize the embeddings
token_shift = False  # half of the channels come from the previous position
tie_weights = True  # the output matrix is the token embedding
zero_init = False  # initialize every block as the identity
zero_head = False  # an untied output matrix starts at zero
softcap = 0.0  # smooth bound of the logits; 0 disables it
# optimizer
optimizer = 'adamw'  # muon: Muon for the matrices of the blocks, AdamW for the rest
learning_rate = 1e-3  # peak learning rate of AdamW
embed_lr = 0.0  # peak learning rate of the embeddings; 0: learning_rate
head_lr = 0.0  # peak learning rate of an untied output matrix; 0: learning_rate
muon_lr = 0.02  # peak learning rate of Muon
muon_momentum = 0.95  # momentum of Muon
max_iters = 5000  # number of updates
train_iters = 0  # updates before this launch stops (and can be resumed); 0: no limit
weight_decay = 0.1  # of matrices
beta1 = 0.9  # decay of AdamW's mean of gradients
beta2 = 0.95  # decay of AdamW's mean of squared gradients
grad_clip = 1.0  # largest gradient norm; 0 disables clipping
# learning rate
decay_lr = True  # False: constant learning rates, without warmup
lr_schedule = 'cosine'  # shape of the decay
warmup_iters = 100  # updates of linear warmup
lr_decay_iters = 0  # update at which the decay ends; 0 means max_iters
decay_frac = 0.4  # fraction of the run that decays, for lr_schedule=linear
min_lr = 1e-4  # final learning_rate; the other rates fall in proportion
# machine
seed = 1337  # of weights, batches, dropout and samples
deterministic = False  # the same bits in every run, also on a GPU (slower)
timeout_s = 1800  # abort if another process is silent for this many seconds
device = 'auto'  # auto (env TORCH_DEVICE, or the first of cuda, mps, cpu) | cuda:1 | ...
dtype = 'auto'  # of matrix products; auto is the fastest for this device
compile = 'auto'  # use torch.compile; auto: only for long runs on a GPU
backend = 'auto'  # of torch.distributed
parallel = 'ddp'  # every process holds the whole model (ddp) or a shard of it (fsdp)
activation_checkpointing = False  # recompute blocks in the backward pass: less memory, more time
peak_tflops = 0.0  # peak of one device, for mfu; 0 looks it up, or measures a CPU

def cosine(it, end):
    """Fall from 1 to 0 along half a cosine after the warmup."""
    return 0.5 + 0.5 * math.cos(math.pi * fraction_done(it, warmup_iters, end))

def linear(it, end):
    """Stay at 1, then fall in a line to 0 over the last decay_frac * end."""
    return 1 - fraction_done(it, max(warmup_iters, end * (1 - decay_frac)), end)

SCHEDULES = {'cosine': cosine, 'linear': linear}
CHOICES = {'activation': ACTIVATIONS, 'norm': NORMS, 'optimizer': ('adamw', 'muon'),
           'lr_schedule': SCHEDULES, 'parallel': ('ddp', 'fsdp'), 'compile': ('auto', True, False),
           'dtype': configurator.DTYPES, 'backend': ('auto', 'nccl', 'gloo')}
LIMITS = {(1, 1e9): 'eval_interval log_interval gradient_accumulation_steps batch_size timeout_s',
          (0, 1e9): 'eval_iters sample_tokens max_iters train_iters warmup_iters min_lr '
                    'lr_decay_iters grad_clip weight_decay skip_batches peak_tflops '
                    'embed_lr head_lr',
          (1e-99, math.inf): 'learning_rate muon_lr', (0, 2**63 - 1): 'seed',
          (0, 0.999999): 'beta1 beta2 muon_momentum input_noise', (0, 1): 'decay_frac'}
NOT_RESUMED = ('init_from', 'ckpt', 'out_dir', 'train_iters', 'eval_only')
_defaults, _given = {}, set()  # filled by configure: the defaults; the keys that the user set
MAX_OVERFLOWS = 30  # give up after this many float16 overflows in a row

# -----------------------------------------------------------------------------
# signals

# Ctrl-C, kill, a closed terminal, Slurm's --signal=USR1; Windows has the first two
SIGNALS = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1')
           if hasattr(signal, name)]


def catch_signals(process):
    """Return a list to which SIGNALS are appended; a second Ctrl-C exits at once."""
    signals, times = [], []
    # torchrun repeats the terminal's Ctrl-C, so within a second it is not a second one
    echo_s = 1 if process.world_size > 1 else 0

    def on_signal(number, frame):
        if signals and number == signal.SIGINT and time.monotonic() - times[0] > echo_s:
            os._exit(130)
        if not signals and process.is_main:
            with contextlib.suppress(OSError):  # os.write, because print must not be interrupted
                os.write(2, b'stopping after this update; Ctrl-C again quits without saving\n')
        signals.append(number)
        times.append(time.monotonic())
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, on_signal)
    return signals


class Output:
    """A standard output whose failure ends no run: what cannot be written is lost."""
    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, work, *arguments):
        try:
            work(*arguments)
        except OSError:  # a closed pipe or a full disk: nothing more goes there
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextlib.contextmanager
def guarded():
    """Survive a failing standard output; at the end, put signal handlers and output back."""
    stdout, handlers = sys.stdout, {number: signal.getsignal(number) for number in SIGNALS}
    sys.stdout = Output(stdout)
    try:
        yield
    finally:
        sys.stdout = stdout
        for number, handler in handlers.items():
            signal.signal(number, handler)

# -----------------------------------------------------------------------------
# training

@dataclass
class Progress:
    """The counters of a run, which ckpt.pt holds."""
    iter_num: int = 0  # updates done
    position: int = 0  # training sequences used or skipped
    best_val_loss: float = math.inf
    train_seconds: float = 0.0  # time spent in updates only

@guarded()
def main(argv=None):
    """Train as argv says (by default the command line)."""
    checkpoint, out_lock = read_settings(argv)
    resumed_at = checkpoint['iter_num'] if init_from == 'resume' else -1
    last_iter = max(resumed_at, min(max_iters, max(0, resumed_at) + (train_iters or max_iters)))
    # False: a signal left this step unevaluated
    evaluated = resumed_at < 0 or checkpoint.get('evaluated', True)
    if resumed_at >= last_iter and evaluated and not eval_only:
        return runs.nothing_to_do(resumed_at, max_iters)
    process = setup(
        device=device, dtype=dtype, compile=compile, backend=backend, seed=seed,
        deterministic=deterministic, timeout_s=timeout_s,
        micro_batches=max_iters * gradient_accumulation_steps)
    changed = [f'{k}={v}' for k, v in settings().items() if v != _defaults[k] or k == 'out_dir']
    process.print('settings:', *changed)

    # data
    meta, train_data, val_data = open_dataset(dataset, block_size, process)
    data_id = {'dataset': dataset, 'sha256': meta['sha256'], 'tokens': meta['tokens']}
    tokenizer = tokenizer_from_dict(meta['tokenizer'])
    prompt = pick_prompt(tokenizer, sample_prompt, sample_tokens and 'sample_prompt' in _given)

    # model and optimizers: new, from a checkpoint, or from other weights
    checkpoints.check_resume(checkpoint, data_id, tokenizer, settings(), process)
    model = make_model(checkpoint, tokenizer, process)
    globals().update({k: v for k, v in asdict(model.config).items() if k in _defaults})
    process.print(f'{n_layer} layers, {n_head} heads, {n_embd} channels, '
                  f'{model.num_params():,} parameters without position embeddings')
    learner = make_learner(model, process)
    progress = resume(learner, checkpoint) if resumed_at >= 0 else Progress()
    checkpoint = None  # frees its memory
    if eval_only:
        print_losses(learner, {'train': train_data, 'val': val_data})
        return process.close()

    # files, signals and compilation
    metrics = None
    if process.is_main:
        metrics = runs.begin(settings(), model, resumed_at, out_lock)
    signals = catch_signals(process)
    compile_forward(learner)
    peak = peak_tflops * 1e12 or configurator.peak_flops(process)
    process.print(runs.LEGEND)

    # train_seconds counts updates only, without evaluation, sampling and saving
    last_log = replace(progress)
    stop, overflows, t0 = False, 0, time.perf_counter()
    while True:
        it = progress.iter_num

        # once in a while: evaluate, sample, and save the best weights
        due = (it % eval_interval == 0 or it == last_iter) and not (evaluated and it == resumed_at)
        if due and not stop:
            t1 = time.perf_counter()
            rough = it == 0 and init_from == 'scratch'
            n = min(eval_iters or 10, 10) if rough else eval_iters
            losses = [evaluate(learner, d, n, signals) for d in (train_data, val_data)]
            stop = None in losses
        if due and not stop:
            train_loss, val_loss = losses
            if not math.isfinite(train_loss + val_loss):
                checkpoints.give_up(f'the loss is not finite at iteration {it}', out_dir)
            # random weights are never the best
            best = it > 0 or init_from not in ('scratch', 'resume')
            best = best and val_loss < progress.best_val_loss
            if best:
                progress.best_val_loss = val_loss
            process.print(f'step={it} train_loss={train_loss:.4f} val_loss={val_loss:.4f} '
                          f'best_val_loss={min(progress.best_val_loss, val_loss):.4f} '
                          f'bits_per_byte={val_data.bits_per_byte(val_loss):.4f} '
                          f'train_seconds={progress.train_seconds:.1f} '
                          f'(evaluated in {time.perf_counter() - t1:.1f} s)')
            if metrics:
                metrics.write(step=it, train_loss=train_loss, val_loss=val_loss,
                              train_seconds=progress.train_seconds)
            if sample_tokens:  # on all ranks: with fsdp each holds a shard
                generator = process.generator('sample', it, device=process.device)
                text = continue_text(model, tokenizer, prompt, sample_tokens, generator)
                process.print(f'--- sample at step {it}, after [prompt] ---\n{text}\n---')
            if best or it and always_save_checkpoint:
                save('model.pth', learner, tokenizer, iter_num=it, val_loss=val_loss)

        # save all that is needed to resume
        if stop or due and (it or it == last_iter):
            save('ckpt.pt', learner, tokenizer, **asdict(progress), data=data_id,
                 evaluated=not (due and stop),
                 optimizer=[opt.state_dict() for opt in learner.optimizers],
                 scaler=learner.scaler.state_dict())
        if due and metrics:
            metrics.plot()
        t0 = time.perf_counter() if due else t0

        # stop?
        if stop or it == last_iter:
            break

        # update the weights
        logged = it == 0 or (it + 1) % log_interval == 0
        batches = training_batches(learner, train_data, progress)
        row = update(learner, batches, lr_factor(it), signals, timed=logged)
        stop, bad = row.pop('stop'), row.pop('bad')
        overflows = overflows + 1 if bad else 0
        if bad == 'loss' or bad and not learner.scaler.is_enabled():
            checkpoints.give_up(f'the {bad} is not finite at iteration {it}', out_dir)
        if overflows == MAX_OVERFLOWS:
            checkpoints.give_up(f'{overflows} float16 overflows in a row', out_dir)
        if overflows:
            process.print(f'note: float16 overflow, update skipped ({overflows} in a row)')
        now = process.clock(wait=logged)
        progress.train_seconds += now - t0
        t0 = now
        progress.iter_num += 1
        progress.position += gradient_accumulation_steps * batch_size

        # log
        if logged:
            seconds = progress.train_seconds - last_log.train_seconds
            dt = seconds / (progress.iter_num - last_log.iter_num)
            last_log = replace(progress)
            row |= speeds(dt, learner, peak) | {'eta': (last_iter - progress.iter_num) * dt}
            process.print(runs.log_line(progress.iter_num, row, process.world_size))
            if metrics:
                metrics.write(step=progress.iter_num, **row)

    process.close()
    if stop or it < max_iters:
        reason = 'by a signal' if stop else f'after train_iters={train_iters} updates'
        process.print(f'stopped {reason} at step {it}: '
                      f'go on with --out_dir={out_dir} --init_from=resume')
    if stop:
        raise SystemExit(128 + (signals[0] if signals else signal.SIGTERM))

# -----------------------------------------------------------------------------
# settings and checks

def settings():
    """Return the present settings as a dict."""
    return {key: globals()[key] for key in _defaults}

def read_settings(argv):
    """Apply argv; return the checkpoint to start from and the lock of out_dir, each or None."""
    def resuming():
        files = [os.path.join(out_dir, name) for name in (ckpt, 'ckpt_prev.pt')]
        return init_from == 'resume' or init_from == 'auto' and any(map(os.path.exists, files))
    # on resuming, check later, with the checkpoint's settings
    configure(globals(), argv, check=lambda: [] if resuming() else check_settings())
    checkpoint = out_lock = None
    if resuming():
        path = os.path.join(out_dir, ckpt)
        if os.path.exists(path) and not eval_only and torchrun('RANK', 0) == 0:
            out_lock = runs.claim(out_dir)  # from now on, no other run replaces the checkpoint
        checkpoint = checkpoints.load_checkpoint(path)
        if 'optimizer' not in checkpoint:
            fail(f'{path} holds only weights: resume from ckpt.pt or ckpt_prev.pt')
        saved = {k: v for k, v in checkpoint['config'].items() if k not in NOT_RESUMED}
        configure(globals(), argv, saved, check=check_settings)
    elif skip_batches or ckpt != 'ckpt.pt':
        fail('--skip_batches and --ckpt are for --init_from=resume')
    elif path := checkpoint_path(init_from):  # a new run from the weights of another
        checkpoint = checkpoints.load_checkpoint(path)
        saved = {k: v for k, v in checkpoint['model_args'].items() if k != 'dropout'}
        configure(globals(), argv, saved, check=check_settings)
    if init_from == 'auto':
        globals()['init_from'] = 'resume' if checkpoint else 'scratch'
    return checkpoint, out_lock

def check_settings():
    """Return the problems that LIMITS and CHOICES do not find."""
    problems = []
    try:
        model_shape(vocab_size=1)
    except ValueError as e:
        problems += str(e).split('; ')
    if head_lr and tie_weights:
        problems.append(f'head_lr={head_lr} needs --tie_weights=False')
    if decay_lr and 0 < lr_decay_iters < warmup_iters:
        problems.append(f'lr_decay_iters={lr_decay_iters} is below warmup_iters={warmup_iters}')
    if decay_lr and min_lr > learning_rate and 'min_lr' in _given:
        problems.append(f'min_lr={min_lr} is above learning_rate={learning_rate}')
    elif decay_lr and min_lr > learning_rate:  # as far below as the default
        globals()['min_lr'] = learning_rate / 10
        if torchrun('RANK', 0) == 0:
            print(f'note: min_lr={min_lr:g}, a tenth of learning_rate={learning_rate:g}')
    return problems

def model_shape(vocab_size):
    """Return the GPTConfig of the settings; GPT-2's vocabulary is padded to a multiple of 64."""
    names = [field.name for field in fields(GPTConfig) if field.name in _defaults]
    return GPTConfig(vocab_size=50304 if vocab_size == 50257 else vocab_size,
                     **{name: globals()[name] for name in names})

# -----------------------------------------------------------------------------
# model and optimizers

def make_model(checkpoint, tokenizer, process):
    """Return a model with new or loaded weights."""
    shape = model_shape(tokenizer.vocab_size)
    if init_from == 'scratch':
        need_memory(shape, 1 if parallel == 'ddp' else process.world_size, process)
        model = GPT(shape)
    elif checkpoint:
        path = checkpoint_path(init_from) or os.path.join(out_dir, ckpt)
        model = checkpoints.load_model(path, checkpoint, dropout=dropout)
        check_weights(model.config, checkpoint['tokenizer'], tokenizer, settings(), _given)
    else:
        found, theirs, load = find_gpt2(init_from, shape, process)
        check_weights(found, theirs, tokenizer, settings(), _given)
        model = load()
    model.to(process.device)
    for p in model.parameters():  # broadcast rank 0's: other CPUs draw other numbers
        process.all_reduce(p.data.mul_(process.is_main))
    return model

@dataclass
class Learner:
    """All that an update works on."""
    model: GPT
    forward: object  # the model, or its compiled form
    optimizers: list
    params: list
    scaler: torch.amp.GradScaler  # for float16, otherwise it does nothing
    process: Process
    micro_batches: range  # this rank's micro-batches of an update
    rows: range  # this rank's sequences of a micro-batch
    sums: torch.Tensor = None  # ddp, several ranks: flat gradients, then loss and stop

def make_learner(model, process):
    """Move the model to the device, or shard it over all processes; make its optimizers."""
    if parallel == 'fsdp' and process.world_size == 1 and 'parallel' not in _given:
        globals()['parallel'] = 'ddp'
        process.print('note: --parallel=ddp, because there is only one process')
    if parallel == 'fsdp' and (process.world_size == 1 or process.dtype == torch.float16):
        fail('--parallel=fsdp needs torchrun --nproc_per_node=N, N > 1, and float32 or bfloat16: '
             'use --parallel=ddp')
    micro_batches, rows, parts = divide(gradient_accumulation_steps, batch_size, process)
    model.activation_checkpointing = activation_checkpointing
    for module in model.modules():
        if isinstance(module, Dropout):
            module.part, module.parts = rows.start // len(rows), parts
    model = shard(model, process) if parallel == 'fsdp' else model.to(process.device)
    optimizers = make_optimizers(model, process)
    params = [p for opt in optimizers for group in opt.param_groups for p in group['params']]
    scaler = torch.amp.GradScaler(process.device.type, enabled=process.dtype == torch.float16)
    learner = Learner(model, model, optimizers, params, scaler, process, micro_batches, rows)
    if process.world_size > 1 and parallel == 'ddp':
        # one all-reduce in a fixed order. DistributedDataParallel changes its buckets after its
        # first update, so a resumed run would get other bits
        sizes = [*(p.numel() for p in params), 2]
        learner.sums = torch.zeros(sum(sizes), device=process.device)
        for p, grad in zip(params, learner.sums.split(sizes)):
            p.grad = grad.view_as(p)
    return learner

def make_optimizers(model, process):
    """Return the optimizers of all parameters. Only matrices decay."""
    groups = {'embeddings': [], 'matrices': [], 'head': [], 'vectors': []}
    for name, p in model.named_parameters():
        kind = 'head' if 'lm_head' in name else 'matrices' if '.h.' in name else 'embeddings'
        groups[kind if p.dim() == 2 else 'vectors'].append(p)
    matrices = groups.pop('matrices') if optimizer == 'muon' else []
    rates = {'embeddings': embed_lr, 'head': head_lr}
    groups = [dict(params=params, peak_lr=rates.get(kind) or learning_rate,
                   weight_decay=0 if kind == 'vectors' else weight_decay)
              for kind, params in groups.items() if params]
    # fused: one pass over the parameters instead of a dozen
    optimizers = [torch.optim.AdamW(groups, learning_rate, (beta1, beta2), fused=True)]
    if matrices:
        # never float16: small entries underflow
        dtype = torch.bfloat16 if process.dtype == torch.bfloat16 else torch.float32
        optimizers.append(Muon(matrices, muon_lr, muon_momentum, weight_decay, dtype, process))
    return optimizers

def resume(learner, checkpoint):
    """Load the state of the optimizers; return the Progress of the checkpoint."""
    path, before = os.path.join(out_dir, ckpt), checkpoint['config']
    checkpoints.load_optimizers(path, checkpoint, learner.optimizers, learner.scaler)
    progress = Progress(**{f.name: checkpoint[f.name] for f in fields(Progress)})
    skipped = skip_batches - before.get('skip_batches', 0)
    progress.position += skipped * gradient_accumulation_steps * batch_size
    changed = [f', {k}={v} (was {before[k]})' for k, v in settings().items()
               if k not in NOT_RESUMED and before.get(k, v) != v]
    learner.process.print(f'resumed {path} at step {progress.iter_num}{"".join(changed)}')
    if progress.iter_num >= warmup_iters:
        rate = learning_rate * lr_factor(progress.iter_num)
        checkpoints.note_higher_rate(checkpoint, rate, learner.process)
    return progress

def compile_forward(learner):
    """Compile the forward pass with a batch of zeros, if asked to."""
    process, model = learner.process, learner.model
    if not process.compile:
        return
    t0 = process.clock()
    process.print('compiling ...')
    if parallel == 'fsdp':  # what fsdp does between blocks cannot be compiled
        model.compile_in_parts()
    else:  # no logits: as an output they cost memory and a gradient of zeros
        learner.forward = torch.compile(lambda idx, targets: (None, model(idx, targets)[1]))
    idx = torch.zeros(len(learner.rows), block_size, dtype=torch.int64, device=process.device)
    errors = (torch._dynamo.exc.TorchDynamoException,)  # no C++ compiler, say
    with one_line_errors('cannot compile, use --compile=False: ', errors), process.autocast():
        # clone: one tensor passed twice would be compiled differently
        learner.forward(idx, idx.clone())[1].backward()
    model.zero_grad(set_to_none=learner.sums is None)
    gc.collect()
    gc.freeze()  # torch's own objects stay: do not search them for garbage again
    process.print(f'compiled in {process.clock() - t0:.1f} s')

# -----------------------------------------------------------------------------
# the update

def training_batches(learner, data, progress):
    """Yield this rank's micro-batches of the next update: (dropout seed, idx, targets)."""
    process, rows = learner.process, learner.rows
    for i in learner.micro_batches:
        first = progress.position + i * batch_size + rows.start
        idx, targets = data.train_batch(first, len(rows), process, input_noise)
        dropout_seed = process.derive_seed('dropout', progress.iter_num, i)
        yield dropout_seed, process.to_device(idx), process.to_device(targets)

def update(learner, batches, factor, signals=(), timed=True):
    """Update the weights once; return a dict of what is logged.

    batches: this rank's micro-batches, each read while a GPU computes the previous one.
    factor: fraction of the peak learning rates. signals: not empty if this rank wants to stop.
    timed: synchronize between forward and backward so that their times are accurate.
    The dict also has `stop`, whether any rank wants to stop, and `bad`: what is not finite, or ''.
    If something is bad, the weights have not changed.
    """
    process, scaler, params = learner.process, learner.scaler, learner.params
    count, sharded = len(learner.micro_batches), checkpoints.is_sharded(params[0])
    # fsdp takes the mean over the ranks itself
    divisor = count if sharded else count * process.world_size
    sums = torch.zeros(2, device=process.device)  # loss, number of ranks that want to stop
    if learner.sums is not None:
        sums = learner.sums.zero_()[-2:]
    dtf = dtb = 0.0
    for i, (dropout_seed, idx, targets) in enumerate(batches):
        if sharded:  # sum gradients and free gathered blocks after the last micro-batch only
            learner.model.set_requires_gradient_sync(i == count - 1)
            learner.model.set_reshard_after_backward(i == count - 1)
        t0 = process.clock(timed)
        torch.manual_seed(dropout_seed)
        with process.autocast():
            _, loss = learner.forward(idx, targets)
        loss = loss / divisor
        sums[0] += loss.detach()
        t1 = process.clock(timed)
        scaler.scale(loss).backward()
        dtf += t1 - t0
        dtb += process.clock(timed) - t1

    # sum over all ranks; signals are read last, so one sent during this update ends the run
    sums[1] = bool(signals)
    if sharded:
        sums = process.all_reduce(sums) / process.world_size
    elif learner.sums is not None:
        process.all_reduce(learner.sums)
    for opt in learner.optimizers:
        scaler.unscale_(opt)
    norm = nn.utils.get_total_norm([p.grad for p in params])
    norm = norm.full_tensor() if sharded else norm
    # the only host sync of an untimed update, before the optimizers' kernels are queued
    loss, stop, norm_value = torch.stack([*sums, norm]).tolist()
    bad = '' if math.isfinite(norm_value) else 'gradient norm'
    bad = bad if math.isfinite(loss) else 'loss'

    # clip, and change the weights
    if grad_clip and norm_value > grad_clip:
        nn.utils.clip_grads_with_norm_(params, grad_clip, norm)
    for opt in learner.optimizers:
        for group in opt.param_groups:
            group['lr'] = group.get('peak_lr', opt.defaults['lr']) * factor
        if not bad:
            scaler.step(opt)
        if learner.sums is None:
            opt.zero_grad()
    scaler.update()
    return {'loss': loss, 'norm': norm_value, 'lr': learning_rate * factor, 'dtf': dtf, 'dtb': dtb,
            'stop': stop > 0, 'bad': bad}

def lr_factor(it):
    """Return the learning rates of update `it` (from 0), as a fraction of their peaks."""
    if not decay_lr:
        return 1.0
    if it < warmup_iters:
        return (it + 1) / (warmup_iters + 1)
    lowest = min_lr / learning_rate
    return lowest + (1 - lowest) * SCHEDULES[lr_schedule](it, lr_decay_iters or max_iters)

def fraction_done(it, start, end):
    """Return how far `it` is on its way from start (0) to end (1)."""
    return min(1.0, max(0.0, (it - start) / max(1, end - start)))

# -----------------------------------------------------------------------------
# evaluation and metrics

@torch.no_grad()
def evaluate(learner, data, n, signals=()):
    """Return the mean loss over n batches of data, the same ones every time (0: over all data).

    Returns None if a rank has received a signal.
    """
    process, model = learner.process, learner.model
    total, stop = torch.zeros(2, dtype=torch.float64), False  # sum of losses, number of tokens
    model.eval()
    for idx, targets in data.eval_batches(n, batch_size, process):
        if stop := process.any(signals):
            break
        with process.autocast():
            _, loss = model(process.to_device(idx), process.to_device(targets))
        if count := (targets >= 0).sum():
            total += torch.stack([loss.cpu().double() * count, count.double()])
    model.train()
    if stop:
        return None
    if process.world_size > 1:
        total = process.all_reduce(total.to(process.device))
    return (total[0] / total[1]).item()

def print_losses(learner, splits):
    """Print loss, perplexity and bits per byte of each split."""
    for split, data in splits.items():
        loss = evaluate(learner, data, eval_iters)
        perplexity = math.exp(loss) if loss < 700 else math.inf
        learner.process.print(f'{split}_loss={loss:.4f} perplexity={perplexity:.3f} '
                              f'bits_per_byte={data.bits_per_byte(loss):.4f}')

def speeds(dt, learner, peak):
    """Return the speeds of an update that takes dt seconds, as runs.LEGEND explains them."""
    sps, world_size = gradient_accumulation_steps * batch_size / dt, learner.process.world_size
    tps = sps * block_size
    mfu = peak and 100 * learner.model.flops_per_token() * tps / world_size / peak
    return {'dt': dt, 'sps': sps, 'sps_per_gpu': sps / world_size, 'tps': tps,
            'tps_per_gpu': tps / world_size, 'mfu': mfu}

def save(name, learner, tokenizer, **more):
    """Write weights, settings and tokenizer to out_dir/name. All ranks call this together."""
    checkpoints.write_checkpoint(os.path.join(out_dir, name), learner.process, {
        'format': checkpoints.VERSION, 'model': dict(learner.model.state_dict()),
        'model_args': asdict(learner.model.config), 'config': settings(),
        'tokenizer': tokenizer.to_dict(), **more})

# -----------------------------------------------------------------------------
# weights to start from

def find_gpt2(init_from, wanted, process):
    """Return (shape, tokenizer, load) of the GPT-2 that --init_from names.

    init_from: a name of GPT-2, or a folder with its weights. wanted: the GPTConfig of the settings;
    its dropout holds, and its block_size shortens the model. shape: the GPTConfig of the weights.
    tokenizer: as its to_dict returns it. load: a function that returns the model.
    """
    def load():
        with one_line_errors(f'--init_from={init_from}: '):
            checkpoint = read_pretrained(init_from)
        wpe = checkpoint['model']['transformer.wpe.weight']
        checkpoint['model']['transformer.wpe.weight'] = wpe[:wanted.block_size]
        return checkpoints.load_model(init_from, checkpoint, **changes)
    changes = {'block_size': wanted.block_size, 'dropout': wanted.dropout}
    with one_line_errors(f'--init_from={init_from}: '):
        found = read_pretrained(init_from, weights=False)  # the weights come later
        if wanted.block_size > found['model_args']['block_size']:
            raise ValueError(f'block_size={wanted.block_size} but the model has '
                             f'{found["model_args"]["block_size"]} positions')
        return GPTConfig(**found['model_args'] | changes), found['tokenizer'], load

def check_weights(shape, theirs, tokenizer, settings, given):
    """Fail if the settings or the data contradict loaded weights.

    shape: the GPTConfig of the weights. theirs: their tokenizer, as its to_dict returns it.
    tokenizer: of the data. given: the keys of the settings that the user gave.
    """
    source = settings['init_from']
    problems = [f'{key}={settings[key]} but the model of init_from={source} has {key}={value}'
                for key, value in asdict(shape).items() if key in given and settings[key] != value]
    if theirs != tokenizer.to_dict():
        problems.append(f'the data has a vocabulary of {tokenizer.vocab_size} other tokens than '
                        f'{source}: write it in the same tokens with python data/text/prepare.py '
                        f'--input=FILE --name=NAME --tokenizer={source}')
    if problems:
        fail(*problems)

def need_memory(shape, shards, process):
    """Fail if training a model of this GPTConfig can never fit into the memory of the device.

    shards: the number of processes that share the model.
    """
    c = shape
    tables = 1 if c.tie_weights else 2
    n = 12 * c.n_layer * c.n_embd**2 + (tables * c.vocab_size + c.block_size) * c.n_embd
    need = 16 * n / shards  # weights, gradients and two moments of AdamW, in float32
    have = configurator.total_memory(process.device)
    if need > have:
        fail(f'a model of {n / 1e6:,.0f}M parameters takes {need / 1e9:.1f} GB in training, '
             f'{process.device} has {have / 1e9:.1f} GB: use a smaller n_embd or n_layer, or '
             '--parallel=fsdp on more devices')

if __name__ == '__main__':
    run_main(main)
