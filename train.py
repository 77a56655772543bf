"""
Train a GPT, in one process or in many.

    python train.py config/train_shakespeare_char.py --max_seconds=300
    python train.py --out_dir=out-shakespeare-char --init_from=resume --max_seconds=600
    torchrun --nproc_per_node=8 train.py config/train_gpt2.py

Config files and --key=value override the settings below. Sample from the result with sample.py.
"""
import contextlib
import gc
import math
import os
import signal
import threading
import time
from dataclasses import asdict, dataclass, fields, replace

import configurator
from configurator import Process, fail, one_line_errors, run_main, say, setup
from data import checkpoints, runs
from data.dataset import divide, open_dataset
from data.tokenizers import tokenizer_from_dict
from model import ACTIVATIONS, GPT, NORMS, Dropout, GPTConfig, Muon, is_sharded, shard
from sample import continue_text, pick_prompt

import torch
from torch import nn

# -----------------------------------------------------------------------------
# settings; the defaults train a 10M-parameter character GPT on Shakespeare

# files
out_dir = 'out'  # folder for checkpoints and metrics
init_from = 'scratch'  # scratch | resume | auto (resume if saved) | gpt2 ... | DIR | OWNER/NAME
ckpt = 'ckpt.pt'  # file in out_dir to resume from, with its settings, unless you give others
# evaluation and logging
eval_interval = 250  # updates between evaluations (each also samples and saves)
eval_iters = 200  # batches per split in an evaluation; 0 means all
eval_only = False  # evaluate once, write nothing and exit
log_interval = 10  # updates between log lines; a line also comes after ten seconds without one
always_save_checkpoint = False  # write model.pth at each evaluation, even if not best
sample_prompt = 'What is an LLM?'  # continued at every evaluation
sample_tokens = 256  # length of the continuation; 0 disables it
wandb_log = False  # also log to Weights & Biases
wandb_project = 'quill'  # project there
wandb_run_name = 'gpt'  # name of the run
# data
dataset = 'shakespeare_char'  # folder in data/
gradient_accumulation_steps = 1  # micro-batches per update, those of all processes together
batch_size = 64  # sequences in a micro-batch
block_size = 256  # tokens in a sequence
skip_batches = 0  # updates whose data is skipped, in the whole run; raise it to pass bad data
# model
n_layer = 6  # blocks
n_head = 6  # attention heads
n_kv_head = 0  # heads of keys and values (grouped-query attention); 0 means n_head
head_dim = 0  # channels of a head; 0 means n_embd / n_head
n_embd = 384  # channels
n_inner = 0  # channels inside the MLP; 0 means 4 * n_embd, or 8/3 * n_embd for swiglu
dropout = 0.0  # helps if the data is seen many times
bias = False  # biases in Linear and LayerNorm, as in GPT-2
activation = 'gelu'  # in the MLP
norm = 'layernorm'  # normalization layer
norm_eps = 1e-5  # epsilon of the norms
rotary = False  # rotary instead of learned positions
rope_base = 10000.0  # base of the wavelengths of rotary positions
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
max_seconds = 0.0  # seconds of training after which a run ends, before max_iters; 0: no limit
train_iters = 0  # updates before this launch stops (and can be resumed); 0: no limit
weight_decay = 0.1  # applies to matrices only, embeddings included
beta1 = 0.9  # decay of AdamW's mean of gradients
beta2 = 0.95  # decay of AdamW's mean of squared gradients
grad_clip = 1.0  # largest gradient norm; 0 disables clipping
# learning rate
decay_lr = True  # False: constant learning rates, without warmup
lr_schedule = 'cosine'  # shape of the decay
warmup_iters = 100  # updates of linear warmup; unless given, at most a tenth of the run
lr_decay_iters = 0  # update at which the decay ends; 0 means max_iters
decay_frac = 0.4  # fraction of the run in which the rate decays; not for cosine
min_lr = 1e-4  # final learning_rate; the other rates fall in proportion
# machine
seed = 1337  # for weights, batches, dropout and samples
deterministic = False  # the same bits in every run, also on a GPU (slower)
timeout_s = 1800  # abort if another process is silent for this many seconds
device = 'auto'  # auto (env TORCH_DEVICE, or the first of cuda, mps, cpu) | cuda:1 | ...
dtype = 'auto'  # precision of matrix products; auto is the fastest for this device
compile = 'auto'  # use torch.compile; auto: only for long runs on a GPU
backend = 'auto'  # backend of torch.distributed
parallel = 'ddp'  # every process holds the whole model (ddp) or a shard of it (fsdp)
activation_checkpointing = False  # recompute blocks in the backward pass: less memory, more time
peak_tflops = 0.0  # peak of one device, for mfu; 0 looks up a GPU

def cosine(it, end):
    """Fall from 1 to 0 along half a cosine after the warmup."""
    return 0.5 + 0.5 * math.cos(math.pi * fraction_done(it, warmup_iters, end))

def linear(it, end):
    """Stay at 1, then fall in a line to 0 over the last decay_frac * end."""
    return 1 - fraction_done(it, max(warmup_iters, end * (1 - decay_frac)), end)

SCHEDULES = {'cosine': cosine, 'linear': linear}
CHOICES = dict(
    activation=ACTIVATIONS, norm=NORMS, optimizer=('adamw', 'muon'), lr_schedule=SCHEDULES,
    parallel=('ddp', 'fsdp'), compile=('auto', True, False), dtype=configurator.DTYPES,
    backend=('auto', 'nccl', 'gloo'))
AT_LEAST_1, BELOW_ONE = (1, 1e9), (0, 0.999999)
LIMITS = dict(  # all other numbers: at least 0
    eval_interval=AT_LEAST_1, log_interval=AT_LEAST_1, gradient_accumulation_steps=AT_LEAST_1,
    batch_size=AT_LEAST_1, timeout_s=AT_LEAST_1, learning_rate=(1e-99, math.inf),
    muon_lr=(1e-99, math.inf), seed=(0, 2**63 - 1), beta1=BELOW_ONE, beta2=BELOW_ONE,
    muon_momentum=BELOW_ONE, decay_frac=(0, 1))
NOT_RESUMED = ('init_from', 'ckpt', 'out_dir', 'train_iters', 'eval_only')
_given = set()  # the keys that the user set, filled by configurator.py

LEGEND = """legend of the log lines:
  step     updates done / of all               loss         mean over the batch, nats per token
  dt       seconds per update (mean)           dtf, dtb     forward, backward (last update)
  sps      sequences per second                tps          tokens per second
  sps_per_gpu, tps_per_gpu: the same per process
  mfu      percent of the peak FLOP/s          lr           learning rate of AdamW
  norm     gradient norm before clipping       eta          time left, h:mm:ss
legend of the evaluations:
  train_loss, val_loss: mean loss on the texts for training and for validation
  best_val_loss: the lowest so far             bits_per_byte: val_loss in bits, per byte of text
  train_seconds: time spent in updates"""
LOGGED = 'loss dt dtf dtb sps sps_per_gpu tps tps_per_gpu mfu lr norm'.split()

# -----------------------------------------------------------------------------
# signals that end a run: Ctrl-C, kill, a closed terminal, Slurm's --signal=USR1

SIGNALS = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1')
           if hasattr(signal, name)]  # Windows has the first two

@contextlib.contextmanager
def catch_signals(process):
    """Collect signals in a dict, with the time of each; a second Ctrl-C exits at once."""
    signals, before = {}, {}
    # torchrun repeats a Ctrl-C of the terminal at once: this repetition does not count
    echo_s = 1 if process.world_size > 1 else 0

    def on_signal(number, frame):
        now = time.monotonic()
        if number == signal.SIGINT and now - min(signals.values(), default=now) > echo_s:
            os._exit(130)
        if not signals and process.is_main:
            with contextlib.suppress(OSError):  # os.write, because print must not be interrupted
                os.write(2, b'stopping after this update; Ctrl-C again quits without saving\n')
        signals.setdefault(number, now)

    if threading.current_thread() is threading.main_thread():  # Python allows it there only
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup makes it ignored
                before[number] = signal.signal(number, on_signal)
    try:
        yield signals
    finally:
        for number, handler in before.items():
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

def main(argv=None):
    """Train as argv says (by default the command line)."""
    checkpoint = read_settings(argv)  # None for a new model; of another model, weights only
    resuming = init_from == 'resume'
    progress = Progress(position=skip_batches * gradient_accumulation_steps * batch_size)
    if resuming:
        progress = Progress(**{f.name: checkpoint[f.name] for f in fields(Progress)})
    resumed_at = progress.iter_num if resuming else -1
    last_iter = min(max_iters, progress.iter_num + (train_iters or max_iters))
    # False if a signal broke off an evaluation at this step, which is still to be done
    evaluated = resuming and checkpoint.get('evaluated', True)
    if is_over(progress, last_iter) and evaluated and not eval_only:
        return say(f'nothing to do: the run ended at step {resumed_at}, '
                   'raise --max_iters or --max_seconds to go on')
    process = setup(
        device=device, dtype=dtype, compile=compile, backend=backend, seed=seed,
        deterministic=deterministic, timeout_s=timeout_s,
        micro_batches=max_iters * gradient_accumulation_steps)
    complete_settings(process)
    defaults = configurator.defaults_of(__name__)
    changed = [f'{k}={v}' for k, v in settings().items() if v != defaults[k] or k == 'out_dir']
    process.print('\n  '.join(['settings:', *changed]))

    # data
    meta, train_data, val_data = open_dataset(dataset, block_size, process)
    data_id = {'dataset': dataset, 'sha256': meta['sha256'], 'tokens': meta['tokens']}
    tokenizer = tokenizer_from_dict(meta['tokenizer'])
    prompt = pick_prompt(tokenizer, sample_prompt, sample_tokens and 'sample_prompt' in _given)

    # model and optimizers: new, from a checkpoint, or from other weights
    check_start(checkpoint, data_id, tokenizer, process)
    model = make_model(checkpoint, tokenizer, process)
    process.print(f'{model.num_params():,} parameters without position embeddings')
    learner = make_learner(model, process)
    if resuming:
        resume(learner, checkpoint, progress)
    checkpoint = None  # frees its memory
    if eval_only:
        for split, data in (('train', train_data), ('val', val_data)):
            loss = evaluate(learner, data, eval_iters)
            process.print(f'{split}_loss={loss:.4f} bits_per_byte={data.bits_per_byte(loss):.4f}')
        return process.close()
    windows = len(val_data.eval_starts(eval_iters * batch_size))
    evaluated_on = f'{meta["sha256"][:8]}-{val_data.n}-{windows}x{block_size}'
    # bench.py compares the losses of runs that were evaluated on the same windows
    config = settings() | {'evaluated_on': evaluated_on}
    metrics = runs.begin(config, resumed_at) if process.is_main else None

    with catch_signals(process) as signals:
        compile_forward(learner)
        peak = peak_tflops * 1e12 or configurator.peak_flops(process)
        process.print(LEGEND)

        # train_seconds counts updates only, without evaluation, sampling and saving
        last_log = replace(progress)
        stop, overflows = False, 0
        t0 = evaluated_at = time.perf_counter()
        while True:
            # an evaluation is due at eval_interval and at the end; after 300 seconds without one, a
            # short one shows how it goes
            it, over = progress.iter_num, is_over(progress, last_iter)
            regular = it % eval_interval == 0 or over
            overdue = it % log_interval == 0 and process.any(t0 - evaluated_at > 300)
            eval_due = (regular or overdue) and not (it == resumed_at and evaluated)

            # once in a while: evaluate, sample, and save the best weights
            if eval_due:
                random_weights = it == 0 and init_from in ('scratch', 'resume')
                rough = random_weights or not regular
                n = min(eval_iters or 10, 10) if rough else eval_iters
                train_loss = evaluate(learner, train_data, n, signals)
                val_loss = evaluate(learner, val_data, n, signals)
                stop = train_loss is None or val_loss is None  # a signal
            if eval_due and not stop:
                if not math.isfinite(train_loss + val_loss):
                    fail(f'the loss is not finite at iteration {it}: weights not saved', code=1)
                is_best = not rough and val_loss < progress.best_val_loss
                if is_best:
                    progress.best_val_loss = val_loss
                row = dict(train_loss=train_loss, val_loss=val_loss,
                           best_val_loss=min(progress.best_val_loss, val_loss),
                           bits_per_byte=val_data.bits_per_byte(val_loss),
                           train_seconds=progress.train_seconds)
                numbers = format_numbers(row, digits=5)
                process.print(f'step={it}/{last_iter} {numbers} ({n or "all"} batches)')
                if metrics and regular:
                    metrics.write(step=it, **row)
                    metrics.plot()
                if sample_tokens:  # on all ranks: with fsdp each holds a shard
                    generator = process.generator('sample', it, device=process.device)
                    text = continue_text(model, tokenizer, prompt, sample_tokens, generator)
                    origin = 'random weights' if random_weights else 'the model'
                    process.print(f'--- sample of {origin} at step {it}, after [prompt] ---\n'
                                  f'{text}\n---')
                if is_best or it and always_save_checkpoint:
                    save('model.pth', learner, tokenizer, iter_num=it, val_loss=val_loss)

            # save all that is needed to resume
            if stop or eval_due and (it > 0 or over):
                save('ckpt.pt', learner, tokenizer, **asdict(progress), data=data_id,
                     evaluated=not (eval_due and stop),
                     optimizer=[opt.state_dict() for opt in learner.optimizers],
                     scaler=learner.scaler.state_dict())
            if eval_due:
                t0 = evaluated_at = time.perf_counter()

            # stop?
            if stop or over:
                break

            # update the weights
            since_log_s = progress.train_seconds - last_log.train_seconds
            log_due = it == 0 or (it + 1) % log_interval == 0 or since_log_s > 10
            batches = training_batches(learner, train_data, progress)
            schedule_step = it
            if max_seconds:  # whichever is nearer to its end: the updates or the time
                schedule_step = max(it, max_iters * progress.train_seconds / max_seconds)
            factor = lr_factor(schedule_step)
            row, stop, bad = update(learner, batches, factor, signals, timed=log_due)
            if bad == 'loss' or bad and not learner.scaler.is_enabled():
                fail(f'the {bad} is not finite at iteration {it}: weights not changed', code=1)
            overflows = overflows + 1 if bad else 0
            if overflows == 30:
                fail('30 float16 overflows in a row: weights not changed', code=1)
            if overflows:
                process.print(f'note: float16 overflow, update skipped ({overflows} in a row)')
            now = process.clock(wait=log_due)
            progress.train_seconds += now - t0
            t0 = now
            progress.iter_num += 1
            progress.position += gradient_accumulation_steps * batch_size
            if max_seconds:  # rank 0's clock decides for all
                progress.train_seconds = process.gather(progress.train_seconds)[0]

            # log
            if log_due:
                seconds = progress.train_seconds - last_log.train_seconds
                dt = seconds / (progress.iter_num - last_log.iter_num)
                last_log = replace(progress)
                eta = (last_iter - progress.iter_num) * dt
                if max_seconds:
                    eta = min(eta, max(0, max_seconds - progress.train_seconds))
                row |= speeds(dt, learner, peak) | {'eta': eta}
                process.print(log_line(f'{progress.iter_num}/{last_iter}', row, process.world_size))
                if metrics:
                    metrics.write(step=progress.iter_num, **row)

        process.close()
        if not stop:
            process.print(f'done: val loss {val_loss:.4f}, best {progress.best_val_loss:.4f}, '
                          f'after {format_time(progress.train_seconds)} of training\n'
                          f'to sample: python sample.py --out_dir={out_dir}')
        if stop or not is_over(progress, max_iters):
            process.print(f'stopped at step {it}, to go on: --out_dir={out_dir} --init_from=resume')
        if stop:
            raise SystemExit(128 + next(iter(signals), signal.SIGTERM))

def is_over(progress, last_iter):
    """Return whether the run has done its last update or used its time."""
    return progress.iter_num >= last_iter or 0 < max_seconds <= progress.train_seconds

# -----------------------------------------------------------------------------
# settings and checks

def settings():
    """Return the present settings as a dict."""
    return configurator.settings_of(__name__)

def read_settings(argv):
    """Set the settings; return the checkpoint or the weights that the run starts from, or None.

    Defaults come first; the checkpoint's settings, or the model_args of the weights, override them;
    argv overrides both.
    """
    given = configurator.read_arguments(__name__, argv)
    wanted = configurator.defaults_of(__name__) | given
    source, folder = wanted['init_from'], wanted['out_dir']
    checkpoint, saved = None, {}
    if source == 'auto':
        names = [os.path.join(folder, name) for name in (wanted['ckpt'], 'ckpt_prev.pt')]
        source = 'resume' if any(map(os.path.exists, names)) else 'scratch'
        given['init_from'] = source
    if source == 'resume':
        source = os.path.join(folder, wanted['ckpt'])
        with checkpoints.usable(source):
            checkpoint = checkpoints.read_checkpoint(source)
        if 'optimizer' not in checkpoint:
            fail(f'{source} holds only weights: resume from ckpt.pt or ckpt_prev.pt')
        saved = checkpoint['config'] | checkpoint['model_args']
        saved = {k: v for k, v in saved.items() if k not in NOT_RESUMED}
    elif source != 'scratch':
        with checkpoints.usable(source):
            checkpoint = checkpoints.read_weights(source)
        saved = {k: v for k, v in checkpoint['model_args'].items() if k != 'dropout'}
    configurator.apply_settings(__name__, given, saved, check=check_settings)
    return checkpoint

def complete_settings(process):
    """Set what depends on other settings or on the machine, unless the user gave it."""
    global dtype, min_lr, warmup_iters
    fastest = configurator.pick_dtype(process.device.type)
    if init_from == 'resume' and dtype not in ('auto', fastest) and 'dtype' not in _given:
        process.print(f'note: dtype={dtype}, as before; here, --dtype={fastest} is faster')
    dtype = str(process.dtype).removeprefix('torch.')
    if decay_lr and min_lr > learning_rate:
        min_lr = learning_rate / 10  # the default ratio
    if init_from != 'resume' and 'warmup_iters' not in _given:
        warmup_iters = min(warmup_iters, (lr_decay_iters or max_iters) // 10)
    if process.device.type == 'cpu' and not {'max_iters', 'max_seconds', 'init_from'} & _given:
        process.print(f'note: {max_iters} updates may take many hours on a CPU. Five minutes: '
                      'python train.py config/train_shakespeare_char.py --max_seconds=300')

def check_settings():
    """Return the problems that LIMITS and CHOICES cannot express."""
    problems = [] if out_dir else ['out_dir is empty: give the name of a folder']
    try:
        model_config(vocab_size=1)
    except ValueError as e:
        problems += str(e).split('; ')
    if head_lr and tie_weights:
        problems.append(f'head_lr={head_lr} needs --tie_weights=False')
    if decay_lr and min_lr > learning_rate and 'min_lr' in _given:
        problems.append(f'min_lr={min_lr} is above learning_rate={learning_rate}')
    return problems

def model_config(vocab_size):
    """Return the GPTConfig of the settings; GPT-2's vocabulary is padded to a multiple of 64."""
    shape = {k: v for k, v in settings().items() if k in GPTConfig.__annotations__}
    return GPTConfig(vocab_size=50304 if vocab_size == 50257 else vocab_size, **shape)

def check_start(checkpoint, data_id, tokenizer, process):
    """Fail if settings or data contradict the checkpoint, or if ranks disagree about its step."""
    resuming = init_from == 'resume'
    steps = process.gather(checkpoint['iter_num'] if resuming else 0)
    if len(set(steps)) > 1:
        fail(f'ranks resume at steps {steps}: do all see the same {out_dir}?')
    if checkpoint is None:
        return
    problems, present = [], settings()
    source = out_dir if resuming else init_from
    for key, value in checkpoint['model_args'].items():
        may_change = key == 'dropout' or key == 'block_size' and block_size < value and not resuming
        if key in _given and present[key] != value and not may_change:
            problems.append(f'{key}={present[key]} but the model of {source} has {key}={value}')
    if checkpoint['tokenizer'] != tokenizer.to_dict():
        problems.append(f'data/{dataset} is in other tokens than {source}: prepare it with '
                        f'data/text/prepare.py --input=FILE --name=NAME --tokenizer={source}')
    if resuming and not eval_only:  # evaluation takes any data in the same tokens
        saved = checkpoint['data']
        if saved and any(saved[key] != data_id[key] for key in ('sha256', 'tokens')):
            problems.append(f'data/{dataset} is not the text that the checkpoint was trained on: '
                            f'resume with --dataset={saved["dataset"]}')
    if problems:
        fail(*problems)

# -----------------------------------------------------------------------------
# model and optimizers

def make_model(checkpoint, tokenizer, process):
    """Return a model on the CPU, with the weights of the checkpoint or new ones."""
    if checkpoint:
        path = os.path.join(out_dir, ckpt) if init_from == 'resume' else init_from
        with checkpoints.usable(path):
            return checkpoints.load_model(checkpoint, dropout=dropout, block_size=block_size)
    config = model_config(tokenizer.vocab_size)
    check_memory(config, process)
    return GPT(config)

def check_memory(config, process):
    """Fail if weights, gradients and optimizer of this GPTConfig exceed the device's memory."""
    with torch.device('meta'):  # shapes without memory
        n = GPT(config).num_params(non_embedding=False)
    shards = process.world_size if parallel == 'fsdp' else 1
    need = 16 * n / shards  # weights, gradients and two moments of AdamW, in float32
    have = configurator.total_memory(process.device)
    if need > have:
        fail(f'a model of {n / 1e6:,.0f}M parameters takes {need / 1e9:.1f} GB in training, '
             f'{process.device} has {have / 1e9:.1f} GB')

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
    # with ddp and several ranks: one vector of all gradients, then the loss, and whether to stop
    flat_grads: torch.Tensor = None

def make_learner(model, process):
    """Give all processes the same weights, or each a shard of them, and make the optimizers."""
    if parallel == 'fsdp' and (process.world_size == 1 or process.dtype == torch.float16):
        fail('--parallel=fsdp is for torchrun, and float32 or bfloat16: use --parallel=ddp')
    micro_batches, rows, parts = divide(gradient_accumulation_steps, batch_size, process)
    model.activation_checkpointing = activation_checkpointing
    for module in model.modules():
        if isinstance(module, Dropout):
            module.part, module.parts = rows.start // len(rows), parts
    model.to(process.device)
    for p in model.parameters():  # on another CPU, the same seed may give other random numbers
        process.broadcast(p.data)
    if parallel == 'fsdp':
        model = shard(model, process)
    optimizers = make_optimizers(model, process)
    params = [p for opt in optimizers for group in opt.param_groups for p in group['params']]
    scaler = torch.amp.GradScaler(process.device.type, enabled=process.dtype == torch.float16)
    learner = Learner(model, model, optimizers, params, scaler, process, micro_batches, rows)
    if process.world_size > 1 and parallel == 'ddp':
        # one all-reduce, instead of DistributedDataParallel, which regroups its buckets after the
        # first update: a resumed run would round differently
        sizes = [*(p.numel() for p in params), 2]
        learner.flat_grads = torch.zeros(sum(sizes), device=process.device)
        for p, grad in zip(params, learner.flat_grads.split(sizes)):
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

def resume(learner, checkpoint, progress):
    """Load the state of the optimizers, and skip the data that skip_batches adds."""
    path = os.path.join(out_dir, ckpt)
    with checkpoints.usable(path):
        for opt, saved in zip(learner.optimizers, checkpoint['optimizer']):
            checkpoints.load_optimizer(opt, saved)
    if checkpoint['scaler']:
        learner.scaler.load_state_dict(checkpoint['scaler'])
    skipped = skip_batches - checkpoint['config'].get('skip_batches', 0)
    progress.position += skipped * gradient_accumulation_steps * batch_size
    learner.process.print(f'resumed {path} at step {progress.iter_num}')

def compile_forward(learner):
    """Compile the forward pass with a batch of zeros, if asked to."""
    process, model = learner.process, learner.model
    if not process.compile:
        return
    process.print('compiling ...')
    if parallel == 'fsdp':  # torch.compile cannot compile FSDP's work between the blocks
        model.compile_in_parts()
    else:  # only the loss: returned logits would cost memory and get a gradient of zeros
        learner.forward = torch.compile(lambda idx, targets: (None, model(idx, targets)[1]))
    idx = torch.zeros(len(learner.rows), block_size, dtype=torch.int64, device=process.device)
    errors = (torch._dynamo.exc.TorchDynamoException,)  # no C compiler, say
    with one_line_errors('cannot compile, use --compile=False: ', errors), process.autocast():
        # clone: one tensor passed twice would be compiled differently
        learner.forward(idx, idx.clone())[1].backward()
    model.zero_grad(set_to_none=learner.flat_grads is None)
    gc.collect()
    gc.freeze()  # torch's own objects stay: do not search them for garbage again

# -----------------------------------------------------------------------------
# the update

def training_batches(learner, data, progress):
    """Yield this rank's micro-batches of the next update: (dropout seed, idx, targets)."""
    process, rows = learner.process, learner.rows
    for i in learner.micro_batches:
        first = progress.position + i * batch_size + rows.start
        idx, targets = data.train_batch(first, len(rows), process)
        dropout_seed = process.derive_seed('dropout', progress.iter_num, i)
        yield dropout_seed, process.to_device(idx), process.to_device(targets)

def update(learner, batches, factor, signals=(), timed=True):
    """Update the weights once; return (row, stop, bad).

    batches: this rank's micro-batches, each read while a GPU computes the previous one.
    factor: fraction of the peak learning rates. signals: not empty if this rank wants to stop.
    timed: synchronize between forward and backward so that their times are accurate. Ranks may
    differ in it, because each has its own clock.
    row: a dict of what is logged. stop: whether any rank wants to stop. bad: 'loss' or 'gradient
    norm' if it is not finite, or ''; if something is bad, the weights have not changed.
    """
    process, scaler, params = learner.process, learner.scaler, learner.params
    count, sharded = len(learner.micro_batches), is_sharded(params[0])
    # fsdp takes the mean over the ranks itself
    divisor = count if sharded else count * process.world_size
    sums = torch.zeros(2, device=process.device)  # loss, number of ranks that want to stop
    if learner.flat_grads is not None:
        sums = learner.flat_grads.zero_()[-2:]
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
    elif learner.flat_grads is not None:
        process.all_reduce(learner.flat_grads)
    for opt in learner.optimizers:
        scaler.unscale_(opt)
    norm = nn.utils.get_total_norm([p.grad for p in params])
    norm = norm.full_tensor() if sharded else norm
    # the only host sync of an untimed update; the host does not wait for the optimizers' work below
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
        if learner.flat_grads is None:
            opt.zero_grad()
    scaler.update()
    row = {'loss': loss, 'norm': norm_value, 'lr': learning_rate * factor, 'dtf': dtf, 'dtb': dtb}
    return row, stop > 0, bad

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
    """Return the mean loss over n batches of data (0: all), or None if a rank got a signal."""
    process, model = learner.process, learner.model
    total = torch.zeros(2, dtype=torch.float64)  # sum of losses, number of tokens
    model.eval()
    for idx, targets in data.eval_batches(n, batch_size, process):
        if process.any(signals):
            return None
        with process.autocast():
            _, loss = model(process.to_device(idx), process.to_device(targets))
        if count := (targets >= 0).sum():
            total += torch.stack([loss.cpu().double() * count, count.double()])
    model.train()
    if process.world_size > 1:
        total = process.all_reduce(total.to(process.device))
    return (total[0] / total[1]).item()

def speeds(dt, learner, peak):
    """Return the speeds of an update that takes dt seconds, as LEGEND explains them."""
    sps, world_size = gradient_accumulation_steps * batch_size / dt, learner.process.world_size
    tps = sps * block_size
    flops = learner.model.flops_per_token() * tps / world_size
    return {'dt': dt, 'sps': sps, 'sps_per_gpu': sps / world_size, 'tps': tps,
            'tps_per_gpu': tps / world_size, 'mfu': 100 * flops / peak if peak else None}

def log_line(step, row, world_size):
    """Return the log line of an update, as LEGEND explains it; row: its numbers."""
    names = [name for name in LOGGED if world_size > 1 or not name.endswith('per_gpu')]
    numbers = format_numbers({name: row[name] for name in names}, digits=4)
    return f'step={step} {numbers} eta={format_time(row["eta"])}'

def format_numbers(row, digits):
    """Return the numbers of row as `name=number`; None is left out."""
    return ' '.join(f'{name}={x:.{digits}g}' if x < 1000 else f'{name}={x:.0f}'
                    for name, x in row.items() if x is not None)

def format_time(seconds):
    """Return a time as h:mm:ss."""
    return f'{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}'

def save(name, learner, tokenizer, **more):
    """Write weights, settings and tokenizer to out_dir/name. All ranks call this together."""
    checkpoints.write_checkpoint(os.path.join(out_dir, name), learner.process, {
        'format': checkpoints.VERSION, 'model': dict(learner.model.state_dict()),
        'model_args': asdict(learner.model.config), 'config': settings(),
        'tokenizer': tokenizer.to_dict(), **more})

if __name__ == '__main__':
    run_main(main)
