"""
Time the train_step of train.py and the generate of sample.py for a configuration.

    python bench.py config/train_shakespeare_char.py
    python bench.py config/train_shakespeare_char_cpu.py --bench_steps=100 --profile=True

Takes all of train.py's settings; writes no checkpoint. The last line of output is one JSON object.
"""
import time
_started = time.perf_counter()

import json
import resource
import statistics
import sys

import torch

from configurator import configure, fail, peak_flops, setup
from model import GPT
from train import *
from train import check_settings, compile_model, divide, make_optimizers, model_shape, open_dataset, \
    place_model, train_step

# -----------------------------------------------------------------------------
# settings

# benchmark
bench_steps = 10  # timed updates
bench_warmup = 2  # untimed ones before
bench_tokens = 200  # tokens to generate, 0 for none
real_tokens = False  # read batches of the dataset; False: random tokens of GPT-2's or Shakespeare's vocabulary
profile = False  # write a torch profiler trace of three updates to trace.json


def peak_memory(run):
    """Peak memory in bytes: of the GPU's allocator, else of the process."""
    if run.device.type == 'cuda':
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def time_sampling(model, batch_size, n, run):
    """Return the tokens per second of generating n tokens for each of batch_size sequences."""
    model.eval()
    idx = torch.zeros(batch_size, 1, dtype=torch.int64, device=run.device)
    seconds = []
    for repeat in range(4):
        run.sync()
        t0 = time.perf_counter()
        generator = run.generator('sample', device=run.device)
        for _ in model.generate(idx, n, temperature=0.8, top_k=200, generator=generator):
            pass
        run.sync()
        seconds.append(time.perf_counter() - t0)
    model.train()
    return batch_size * n / statistics.median(seconds[1:])


def main(config):
    run = setup(device, dtype, compile, backend, seed)
    micro_batches, part, parts = divide(gradient_accumulation_steps, batch_size, run.rank, run.world_size)
    rows = batch_size // parts
    if real_tokens:
        meta, tokens, _ = open_dataset(dataset, block_size, run)
        vocab_size = meta['vocab_size']
    else:
        vocab_size = 65 if dataset.endswith('_char') else 50257
    model = place_model(GPT(model_shape(config, vocab_size)), run, part, parts)
    optimizers = make_optimizers(model, run, config)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    t0 = time.perf_counter()
    step_model = compile_model(model, rows, run)
    compile_seconds = time.perf_counter() - t0
    startup_seconds = t0 - _started

    def step(it):
        batches = []
        for micro in micro_batches:
            if real_tokens:
                first = (it * gradient_accumulation_steps + micro) * batch_size + part * rows
                x, y = tokens.train_batch(first, rows, run)
            else:
                generator = run.generator('bench', it, micro, part)
                ids = torch.randint(vocab_size, (rows, block_size + 1), generator=generator)
                x, y = ids[:, :-1], ids[:, 1:]
            batches.append((run.derive_seed('dropout', it, micro), x.to(run.device), y.to(run.device)))
        run.sync()
        t0 = time.perf_counter()
        _, _, dtf, dtb, _ = train_step(step_model, optimizers, scaler, run, batches, grad_clip, factor=1.0)
        run.sync()
        return time.perf_counter() - t0, dtf, dtb
    first_step_seconds = step(0)[0]
    for it in range(bench_warmup):
        step(1 + it)
    times = [step(1 + bench_warmup + i) for i in range(bench_steps)]

    peak = peak_tflops * 1e12 or peak_flops(run)
    peak = peak and run.all_reduce(torch.tensor(peak, device=run.device)).item()
    dt, dtf, dtb = (statistics.median(column) for column in zip(*times))
    tps = gradient_accumulation_steps * batch_size * block_size / dt
    result = dict(device=str(run.device), dtype=str(run.dtype).removeprefix('torch.'), compile=run.compile,
                  world_size=run.world_size, params=model.num_params(), steps=bench_steps,
                  dt=dt, dt_min=min(t[0] for t in times), dt_max=max(t[0] for t in times), dtf=dtf, dtb=dtb, tps=tps,
                  mfu=peak and 100 * model.flops_per_token() * tps / peak, peak_tflops=peak and peak / 1e12,
                  peak_memory_mb=peak_memory(run) / 1e6, startup_seconds=startup_seconds,
                  compile_seconds=compile_seconds, first_step_seconds=first_step_seconds)
    if bench_tokens and run.is_main:
        for n in (1, 10):
            result[f'sample_tps_{n}'] = time_sampling(model, n, min(bench_tokens, block_size - 1), run)
    if profile:
        with torch.profiler.profile() as profiler:
            for it in range(3):
                step(100 + it)
        if run.is_main:
            profiler.export_chrome_trace('trace.json')
            print(profiler.key_averages().table(sort_by='self_cpu_time_total', row_limit=12))
            print('wrote trace.json: open it at https://ui.perfetto.dev')
    for key, value in result.items():
        run.print(f'{key:20} {value:.6g}' if isinstance(value, float) else f'{key:20} {value}')
    run.print(json.dumps(result))
    run.close()


if __name__ == '__main__':
    _config = configure(globals())
    _least = {'bench_steps': 1, 'bench_warmup': 0, 'bench_tokens': 0}
    if _problems := check_settings(_config) + [f'{k}={_config[k]}: {k} is at least {n}' for k, n in _least.items()
                                               if _config[k] < n]:
        fail(*_problems)
    main(_config)
