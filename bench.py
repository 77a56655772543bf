"""
Time the update of train.py and the generation of sample.py. Writes no checkpoint.

    python bench.py config/train_shakespeare_char.py
    python bench.py config/train_shakespeare_char_cpu.py --bench_steps=100 --profile=True
    python bench.py config/train_shakespeare_char_cpu.py --compare=3
    python bench.py config/train_gpt2.py --task=sample --compare=3

All settings of train.py apply. The last line of output is one JSON object.
"""
import time

_started = time.perf_counter()

import contextlib
import copy
import json
import os
import statistics
import subprocess
import sys

import torch
from torch.nn import functional as F

import configurator
import sample
import train
from configurator import run_main, setup
from data.dataset import open_dataset
from model import GPT, CausalSelfAttention, Dropout, draw

# -----------------------------------------------------------------------------
# settings

# benchmark
task = 'speed'  # speed: updates and generation | sample: generation only
bench_steps = 10  # timed updates
bench_warmup = 2  # updates before, not timed
bench_tokens = 200  # tokens to generate; 0 disables generation
real_tokens = False  # read the dataset instead of random tokens
profile = False  # write a profiler trace of three updates to trace.json
baseline = False  # time the plain way: float32, eager, torch's dropout, unfused AdamW, no KV cache
compare = 0  # run the plain way and quill in turn, this many times each, and print the ratios

CHOICES = {'task': ('speed', 'sample')}
LIMITS = dict(bench_steps=(1, 1e9), bench_warmup=(0, 1e9), bench_tokens=(0, 1e9), compare=(0, 1e9))

def check_settings():
    problems = train.check_settings()
    if train.init_from != 'scratch':
        problems.append(f'--init_from={train.init_from}: the benchmark is of new weights')
    if (baseline or compare) and (train.rotary or train.qk_norm or train.token_shift):
        problems.append("--baseline and --compare are for GPT-2's attention: without rotary, "
                        'qk_norm and token_shift')
    if baseline and (train.dtype not in ('auto', 'float32') or train.compile is True):
        problems.append('--baseline is in float32, without --dtype and --compile')
    return problems

def main():
    if compare:
        return compare_with_baseline(sys.argv[1:])
    if baseline:
        configurator.keep_memory = lambda: None
    process = setup(
        device=train.device, dtype='float32' if baseline else train.dtype,
        compile=False if baseline else train.compile, backend=train.backend, seed=train.seed,
        deterministic=train.deterministic, timeout_s=train.timeout_s)
    data = RandomTokens(65 if train.dataset.endswith('_char') else 50257)
    if real_tokens:
        _, data, _ = open_dataset(train.dataset, train.block_size, process)
    model = GPT(train.model_shape(data.vocab_size))
    if baseline:
        make_plain(model)
    learner = train.make_learner(model, process)
    result = dict(device=str(process.device), dtype=str(process.dtype)[6:], compile=process.compile,
                  world_size=process.world_size, params=model.num_params())
    if task == 'speed':
        result |= time_updates(learner, data)
    if bench_tokens and (process.is_main or train.parallel == 'fsdp'):
        result |= time_generation(learner.model, process)
    for key, value in result.items():
        process.print(f'{key:20} {value:.6g}' if isinstance(value, float) else f'{key:20} {value}')
    process.print(json.dumps(result))
    process.close()

def time_updates(learner, data):
    """Return a dict of what was measured; data: Tokens or RandomTokens."""
    process = learner.process
    if baseline:
        for group in learner.optimizers[0].param_groups:
            group.update(fused=False, foreach=False)
    startup_seconds = time.perf_counter() - _started
    train.compile_forward(learner)
    compile_seconds = time.perf_counter() - _started - startup_seconds

    def step(it, timed=False):
        position = it * train.gradient_accumulation_steps * train.batch_size
        batches = list(train.training_batches(learner, data, train.Progress(it, position)))
        t0 = process.clock()
        row = train.update(learner, batches, factor=1.0, timed=timed)
        return process.clock() - t0, row['dtf'], row['dtb']
    result = dict(steps=bench_steps, startup_seconds=startup_seconds,
                  compile_seconds=compile_seconds, first_step_seconds=step(0)[0])
    seconds = [step(1 + i)[0] for i in range(bench_warmup + bench_steps)][bench_warmup:]
    timed = [step(10**6 + i, timed=True) for i in range(min(3, bench_steps))]
    for key, x in ('dt', seconds), ('dtf', [t[1] for t in timed]), ('dtb', [t[2] for t in timed]):
        result |= {key: statistics.median(x), f'{key}_min': min(x), f'{key}_max': max(x)}
    peak = train.peak_tflops * 1e12 or configurator.peak_flops(process)
    if profile:
        with torch.profiler.profile() as profiler:
            for it in range(3):
                step(200 + it)
        if process.is_main:
            profiler.export_chrome_trace('trace.json')
            print('wrote trace.json: open it at https://ui.perfetto.dev')
    return result | train.speeds(result['dt'], learner, peak) | dict(
        peak_tflops=(peak or 0) * process.world_size / 1e12, peak_memory_mb=peak_memory(process))

class RandomTokens:
    """Stands in for the Tokens of a dataset."""
    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def train_batch(self, first, count, process):
        shape = count, train.block_size + 1
        ids = torch.randint(self.vocab_size, shape, generator=process.generator('bench', first))
        return ids[:, :-1].clone(), ids[:, 1:].clone()

def peak_memory(process):
    """Return the peak memory in MB, of the GPU's allocator or of the process; None on Windows."""
    if process.device.type == 'cuda':
        return torch.cuda.max_memory_allocated() / 1e6
    with contextlib.suppress(ImportError):
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e6 if sys.platform == 'darwin' else peak * 1024 / 1e6

def time_generation(model, process):
    """Return the tokens per second of one sample, of ten, and of one with int8 weights.

    sample_first_1 is the time of the first repeat of one sample over that of the later repeats.
    """
    n = min(bench_tokens, train.block_size - 1)
    one, first = time_samples(model, 1, n, process)
    if baseline:  # it generates ten samples one after another, and has no int8
        return dict(sample_tps_1=one, sample_tps_1_int8=one, sample_tps_10=one)
    result = dict(sample_tps_1=one, sample_first_1=first)
    result['sample_tps_10'], _ = time_samples(model, 10, n, process)
    if process.device.type == 'cpu' and train.parallel != 'fsdp':
        result['sample_tps_1_int8'], _ = time_samples(model, 1, n, process, 'int8')
    return result

@torch.inference_mode()
def time_samples(model, num_samples, n, process, quantize=''):
    """Generate as sample.py does; return the tokens per second, and first / later repeats."""
    idx = torch.zeros(num_samples, 1, dtype=torch.int64, device=process.device)
    if not baseline and train.parallel != 'fsdp':
        model = copy.deepcopy(model)  # the next call stores the weights in another way
        name = sample.pick_dtype(process.device.type, train.dtype, quantize, num_samples)
        dtype = process.dtype if name == 'auto' else getattr(torch, name)
        sample.place_for_generation(model, process.device, dtype, quantize, num_samples)
    model.eval()
    seconds = []
    for _ in range(2 if baseline else 4):
        t0, generator = process.clock(), process.generator('sample', device=process.device)
        if baseline:
            plain_generate(model, idx, n)
        else:
            list(model.generate(idx, n, temperature=0.8, top_k=200, generator=generator))
        seconds.append(process.clock() - t0)
    later = statistics.median(seconds[1:])
    return num_samples * n / later, seconds[0] / later

# -----------------------------------------------------------------------------
# the plain way

class PlainDropout(Dropout):
    """torch's own dropout."""
    def forward(self, x):
        return F.dropout(x, self.threshold / 256, self.training)

class PlainAttention(CausalSelfAttention):
    """Attention with torch's own dropout of single weights."""
    def forward(self, x, rotation=None, cache=None):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
                   for t in self.c_attn(x).split(C, dim=2))  # (B, H, T, D)
        p = self.attn_dropout.threshold / 256 if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True, scale=self.scale)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))

def make_plain(model):
    """Give the modules of model their plain forward."""
    plain = {Dropout: PlainDropout, CausalSelfAttention: PlainAttention}
    for module in model.modules():
        module.__class__ = plain.get(type(module), module.__class__)

def plain_generate(model, idx, n):
    """Sample n tokens after idx (1, T), with a forward pass over the whole context for each."""
    for _ in range(n):
        logits, _ = model(idx[:, -model.config.block_size:])
        idx = torch.cat([idx, draw(logits[:, -1], temperature=0.8, top_k=200)[:, None]], dim=1)

def compare_with_baseline(argv):
    """Run this script with and without --baseline in turn; print the medians and their ratios."""
    results = {True: [], False: []}
    for i in range(2 * compare):
        plain = i % 2 == 0
        command = [sys.executable, os.path.abspath(__file__), *argv, '--compare=0',
                   f'--baseline={plain}', *['--dtype=float32', '--compile=False'] * plain]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(done.returncode)
        row = json.loads(done.stdout.splitlines()[-1])
        results[plain].append(row)
        print('baseline' if plain else 'quill', done.stdout.splitlines()[-1], flush=True)
    print(f'{"":20} {"baseline":>12} {"quill":>12} {"ratio":>8}')
    table = {}
    for key in ('tps', 'sample_tps_1', 'sample_tps_1_int8', 'sample_tps_10', 'peak_memory_mb',
                'dt', 'startup_seconds', 'first_step_seconds'):
        if results[True][0].get(key) and results[False][0].get(key):
            a, b = (statistics.median(r[key] for r in results[plain]) for plain in (True, False))
            table[key] = dict(baseline=a, quill=b, ratio=b / a)
            print(f'{key:20} {a:12.6g} {b:12.6g} {b / a:8.3g}')
    print(json.dumps(table))

if __name__ == '__main__':
    run_main(main, __name__, base='train', check=check_settings)
