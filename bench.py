"""
Time the update of train.py and the generation of sample.py, or compare finished runs.

    python bench.py config/train_shakespeare_char.py
    python bench.py config/train_gpt2.py --task=sample
    python bench.py --task=runs --runs="out-a*,out-b*"

All settings of train.py apply. The last line of a timing is one JSON object.
"""
import copy
import glob
import json
import math
import statistics
from pathlib import Path

import configurator
import sample
import train
from configurator import fail, one_line_errors, run_main, setup
from data.dataset import missing_file, read_meta
from data.runs import read_metrics
from model import GPT

import numpy as np
import torch

# -----------------------------------------------------------------------------
# settings

# benchmark
task = 'speed'  # speed: updates and generation | sample: generation only | runs: compare runs
bench_steps = 10  # timed updates
bench_tokens = 200  # tokens to generate; 0 disables generation
runs = 'out*'  # folders of the runs to compare: patterns, with commas between them

CHOICES = {'task': ('speed', 'sample', 'runs'), 'init_from': ('scratch',)}
LIMITS = dict(bench_steps=(1, 1e9))  # all other numbers: at least 0

def main():
    if task == 'runs':
        return compare_runs()
    process = setup(
        device=train.device, dtype=train.dtype, compile=train.compile, backend=train.backend,
        seed=train.seed, deterministic=train.deterministic, timeout_s=train.timeout_s)
    vocab_size = 65 if train.dataset.endswith('_char') else 50257
    if not missing_file(train.dataset):
        vocab_size = read_meta(train.dataset)['vocab_size']
    learner = train.make_learner(GPT(train.model_config(vocab_size)), process)
    result = dict(device=str(process.device), dtype=str(process.dtype)[6:], compile=process.compile,
                  world_size=process.world_size, params=learner.model.num_params())
    if task == 'speed':
        result |= time_updates(learner)
    if bench_tokens and process.is_main and train.parallel == 'ddp':
        for num_samples in (1, 10):
            result |= time_generation(learner.model, num_samples, process)
    process.print(json.dumps(result))
    process.close()

# -----------------------------------------------------------------------------
# timing

def time_updates(learner):
    """Return a dict of what was measured, with random tokens."""
    process = learner.process
    train.compile_forward(learner)
    shape = len(learner.rows), train.block_size
    vocab_size = learner.model.config.vocab_size
    idx, targets = (process.to_device(torch.randint(vocab_size, shape)) for _ in range(2))
    batches = [(0, idx, targets)] * len(learner.micro_batches)
    seconds = []
    for _ in range(3 + bench_steps):
        t0 = process.clock()
        train.update(learner, batches, factor=1.0, timed=False)
        seconds.append(process.clock() - t0)
    dt = statistics.median(seconds[3:])  # the first ones include what torch prepares only once
    peak = train.peak_tflops * 1e12 or configurator.peak_flops(process)
    return train.speeds(dt, learner, peak) | {
        'gpu_memory_mb': torch.cuda.max_memory_allocated() / 1e6}  # 0 on a CPU

@torch.inference_mode()
def time_generation(model, num_samples, process):
    """Generate as sample.py does; return {'sample_tps_N': tokens per second of N samples}."""
    model = copy.deepcopy(model).eval()  # the next call may store the weights in another way
    name = sample.pick_dtype(process.device.type, train.dtype, num_samples)
    dtype = process.dtype if name == 'auto' else getattr(torch, name)
    sample.place_for_generation(model, process.device, dtype)
    idx = torch.zeros(num_samples, 1, dtype=torch.int64, device=process.device)
    n = min(bench_tokens, train.block_size - 1)
    seconds = []
    for _ in range(4):
        t0 = process.clock()
        list(model.generate(idx, n, temperature=0.8, top_k=200))
        seconds.append(process.clock() - t0)
    # the first time includes what torch prepares only once
    return {f'sample_tps_{num_samples}': num_samples * n / statistics.median(seconds[1:])}

# -----------------------------------------------------------------------------
# comparing runs

NAMES = ('seed', 'out_dir', 'wandb_run_name')  # settings in which the runs of a group may differ
SMALL = 0.005  # a difference of losses that is worth more seeds

def compare_runs():
    """Print a table of groups of runs, and how they differ from the first group; draw runs.png."""
    groups = find_groups()
    first, *others = groups
    key = 'val_loss'
    if len({run.get('evaluated_on', run['out_dir']) for run in sum(groups.values(), [])}) > 1:
        key = 'bits_per_byte'
        print('note: val losses on different texts, tokens or windows are not compared')
    print('seeds  val loss     std    best  bits/byte  updates  seconds  group')
    for name, group in groups.items():
        losses = column(group, 'val_loss')
        std = statistics.stdev(losses) if len(losses) > 1 else math.nan
        bits, updates, seconds = (statistics.mean(column(group, figure)) for figure in
                                  ('bits_per_byte', 'step', 'train_seconds'))
        print(f'{len(group):5}  {statistics.mean(losses):8.4f}  {std:6.4f}  {min(losses):6.4f}  '
              f'{bits:9.4f}  {updates:7.0f}  {seconds:7.1f}  {name}')
    if others:
        print(f'{key} beside {first}, with 95% intervals (by chance, 1 in 20 is wrong):')
    for name in others:
        print(name, verdict(column(groups[first], key), column(groups[name], key)))
    draw_groups(groups, key)

def find_groups():
    """Return {name: list of finished runs}; the runs of a group differ in NAMES only.

    A name is the pattern of the folders, because code may have changed between two patterns, and
    the settings in which runs differ. A seed counts once in a group.
    """
    found = {}
    for pattern in runs.split(','):
        for folder in sorted(glob.glob(pattern)) or [pattern]:
            try:
                found.setdefault(folder, (pattern, read_run(folder)))
            except (OSError, ValueError) as e:
                print(f'note: {folder} is left out: {e}')
    if not found:
        fail(f'--runs={runs}: there is no finished run')
    keys = dict.fromkeys(key for _, run in found.values() for key in run)
    differing = [key for key in keys if key not in (*NAMES, 'rows')
                 and len({run.get(key) for _, run in found.values()}) > 1]
    groups = {}
    for folder, (pattern, run) in found.items():
        name = ' '.join([pattern] + [f'{key}={run.get(key)}' for key in differing])
        group = groups.setdefault(name, [])
        if run['seed'] in [other['seed'] for other in group]:
            print(f'note: {folder} is left out: {name} has seed={run["seed"]} already')
        else:
            group.append(run)
    return groups

def read_run(folder):
    """Return a finished run as a dict: its settings, and the rows of its evaluations."""
    run = json.loads(Path(folder, 'config.json').read_text(encoding='utf-8'))
    rows = [row for row in read_metrics(folder) if 'val_loss' in row and row['step'] > 0]
    step, seconds = (rows[-1]['step'], rows[-1]['train_seconds']) if rows else (0, 0)
    time_is_over = 0 < run.get('max_seconds', 0) <= seconds
    if step < run['max_iters'] and not time_is_over:
        raise ValueError(f'unfinished, at step {step} of {run["max_iters"]}')
    return run | {'rows': rows}

def column(group, key):
    """Return a figure of the last evaluation of each run."""
    return [run['rows'][-1][key] for run in group]

def verdict(first, other):
    """Return in words whether the losses `other` are lower or higher than `first` in the mean.

    The interval is Welch's (1947), which does not assume equal variances.
    """
    m, n = len(first), len(other)
    if min(len(set(first)), len(set(other))) < 2:
        return 'has no interval: it takes two seeds in each group'
    difference = statistics.mean(other) - statistics.mean(first)
    a, b = statistics.variance(first) / m, statistics.variance(other) / n
    degrees = (a + b)**2 / (a**2 / (m - 1) + b**2 / (n - 1))
    interval = t_quantile(degrees) * math.sqrt(a + b)
    if abs(difference) > interval:
        word = 'lower' if difference < 0 else 'higher'
        return f'is {word} by {abs(difference):.4f} ± {interval:.4f}'
    # with so many seeds in each group, 4 of 5 comparisons show a difference of SMALL
    seeds = math.ceil(1 + (1.96 + 0.84)**2 * (a * m + b * n) / SMALL**2)
    return (f'shows no difference: {difference:+.4f} ± {interval:.4f}, '
            f'some {seeds} seeds would show {SMALL}')

def t_quantile(degrees, p=0.975):
    """Return the t below which a fraction p of Student's t distribution lies."""
    # t = sqrt(degrees) * tan(angle), and the density of angle is cos(angle)**(degrees - 1)
    edges = np.linspace(-np.pi / 2, np.pi / 2, 100_001)
    below = np.cumsum(np.cos((edges[1:] + edges[:-1]) / 2)**(degrees - 1))
    return math.sqrt(degrees) * math.tan(np.interp(p * below[-1], below, edges[1:]))

def draw_groups(groups, key):
    """Draw runs.png: val_loss or bits_per_byte over updates and over seconds, a colour a group."""
    with one_line_errors('no runs.png: pip install matplotlib: ', (ImportError,)):
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    left, right = Figure(figsize=(12, 6), layout='constrained').subplots(1, 2, sharey=True)
    later = []
    for i, (name, group) in enumerate(groups.items()):
        color = colormaps['turbo']((i + 0.5) / len(groups))
        for run in group:
            losses = [row[key] for row in run['rows']]
            later += losses[len(losses) // 3:]
            for ax, x in ((left, 'step'), (right, 'train_seconds')):
                ax.plot([row[x] for row in run['rows']], losses, 'o-', color=color, markersize=3,
                        linewidth=1, label=name)
            name = None  # once in the legend
    # the steep first third of a run may lie above the picture: the rest becomes larger
    left.set(xlabel='updates', ylabel=key, ylim=(None, max(later)))
    right.set(xlabel='seconds of training')
    left.legend()
    left.figure.savefig('runs.png', dpi=100)
    print('wrote runs.png')

if __name__ == '__main__':
    run_main(main, __name__, base='train', check=train.check_settings)
