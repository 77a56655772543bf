"""
Time the update of train.py and the generation of sample.py. Writes no checkpoint.

    python bench.py config/train_shakespeare_char.py
    python bench.py config/train_shakespeare_char_cpu.py --bench_steps=100 --profile=True
    python bench.py config/train_gpt2.py --task=sample

All settings of train.py apply. The last line of output is one JSON object.
"""
import time

_started = time.perf_counter()

import copy
import json
import statistics
import sys

import configurator
import sample
import train
from configurator import run_main, setup
from data.dataset import open_dataset
from model import GPT

import torch

# -----------------------------------------------------------------------------
# settings

# benchmark
task = 'speed'  # speed: updates and generation | sample: generation only
bench_steps = 10  # timed updates
bench_warmup = 2  # updates before, not timed
bench_tokens = 200  # tokens to generate; 0 disables generation
real_tokens = False  # read the dataset instead of random tokens
profile = False  # write a profiler trace of three updates to trace.json

CHOICES = {'task': ('speed', 'sample'), 'init_from': ('scratch',)}
LIMITS = dict(bench_steps=(1, 1e9), bench_warmup=(0, 1e9), bench_tokens=(0, 1e9))

def main():
    process = setup(
        device=train.device, dtype=train.dtype, compile=train.compile, backend=train.backend,
        seed=train.seed, deterministic=train.deterministic, timeout_s=train.timeout_s)
    data = RandomTokens(65 if train.dataset.endswith('_char') else 50257)
    if real_tokens:
        _, data, _ = open_dataset(train.dataset, train.block_size, process)
    learner = train.make_learner(GPT(train.model_shape(data.vocab_size)), process)
    result = dict(device=str(process.device), dtype=str(process.dtype)[6:], compile=process.compile,
                  world_size=process.world_size, params=learner.model.num_params())
    if task == 'speed':
        result |= time_updates(learner, data)
    if bench_tokens and (process.is_main or train.parallel == 'fsdp'):
        for num_samples in (1, 10):
            result |= time_generation(learner.model, num_samples, process)
    for key, value in result.items():
        process.print(f'{key:20} {value:.6g}' if isinstance(value, float) else f'{key:20} {value}')
    process.print(json.dumps(result))
    process.close()

class RandomTokens:
    """Stands in for the Tokens of a dataset."""
    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def train_batch(self, first, count, process):
        shape = count, train.block_size + 1
        ids = torch.randint(self.vocab_size, shape, generator=process.generator('bench', first))
        return ids[:, :-1].clone(), ids[:, 1:].clone()

def time_updates(learner, data):
    """Return a dict of what was measured; data: Tokens or RandomTokens."""
    process = learner.process
    startup_seconds = time.perf_counter() - _started
    train.compile_forward(learner)
    compile_seconds = time.perf_counter() - _started - startup_seconds

    def step(it, timed=False):
        position = it * train.gradient_accumulation_steps * train.batch_size
        batches = list(train.training_batches(learner, data, train.Progress(it, position)))
        t0 = process.clock()
        row, _, _ = train.update(learner, batches, factor=1.0, timed=timed)
        return process.clock() - t0, row['dtf'], row['dtb']
    first_step_seconds, _, _ = step(0)
    for it in range(bench_warmup):
        step(1 + it)
    dt, _, _ = zip(*[step(1000 + it) for it in range(bench_steps)])
    # in updates of their own, because a GPU waits between forward and backward to time them
    _, dtf, dtb = zip(*[step(2000 + it, timed=True) for it in range(min(3, bench_steps))])
    if profile:
        with torch.profiler.profile() as profiler:
            for it in range(3):
                step(3000 + it)
        if process.is_main:
            profiler.export_chrome_trace('trace.json')
            print('wrote trace.json: open it at https://ui.perfetto.dev')
    result = dict(steps=bench_steps, startup_seconds=startup_seconds,
                  compile_seconds=compile_seconds, first_step_seconds=first_step_seconds)
    for key, seconds in ('dt', dt), ('dtf', dtf), ('dtb', dtb):
        result |= {key: statistics.median(seconds), f'{key}_min': min(seconds),
                   f'{key}_max': max(seconds)}
    peak = train.peak_tflops * 1e12 or configurator.peak_flops(process)
    return result | train.speeds(result['dt'], learner, peak) | dict(
        peak_tflops=(peak or 0) * process.world_size / 1e12, peak_memory_mb=peak_memory(process))

def peak_memory(process):
    """Return the peak memory in MB, of the GPU's allocator or of the process."""
    if process.device.type == 'cuda':
        return torch.cuda.max_memory_allocated() / 1e6
    import resource  # not on Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == 'darwin' else peak * 1024 / 1e6

@torch.inference_mode()
def time_generation(model, num_samples, process):
    """Generate four times as sample.py does; return a dict of what was measured.

    sample_tps_N: tokens per second of N samples. sample_first_N: the time of the first repeat over
    the median of the later ones.
    """
    if train.parallel != 'fsdp':
        model = copy.deepcopy(model)  # the next call may store the weights in another way
        name = sample.pick_dtype(process.device.type, train.dtype, num_samples)
        dtype = process.dtype if name == 'auto' else getattr(torch, name)
        sample.place_for_generation(model, process.device, dtype)
    model.eval()
    idx = torch.zeros(num_samples, 1, dtype=torch.int64, device=process.device)
    n = min(bench_tokens, train.block_size - 1)
    seconds = []
    for _ in range(4):
        t0, generator = process.clock(), process.generator('sample', device=process.device)
        list(model.generate(idx, n, temperature=0.8, top_k=200, generator=generator))
        seconds.append(process.clock() - t0)
    later = statistics.median(seconds[1:])
    return {f'sample_tps_{num_samples}': num_samples * n / later,
            f'sample_first_{num_samples}': seconds[0] / later}

if __name__ == '__main__':
    run_main(main, __name__, base='train', check=train.check_settings)
