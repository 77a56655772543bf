"""
Measure the table of GPU figures for the README, in less than ten minutes on one GPU.

    python tests/gpu_table.py
    python tests/gpu_table.py ../nanoGPT

The second command also measures nanoGPT, in its folder, where data/shakespeare_char is prepared.
"""
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
UPDATE = ['--gradient_accumulation_steps=1', '--bench_tokens=0']
# (name, arguments of bench.py, column of the result, script and arguments of nanoGPT or None)
ROWS = [
    ('GPT-2 124M, 12 x 1024: tokens/s',
     ['config/train_gpt2.py', '--batch_size=12', '--compile=True', *UPDATE], 'tps',
     ['bench.py', '--batch_size=12', '--real_data=False']),
    ('GPT-2 124M, 32 x 1024: tokens/s',
     ['config/train_gpt2.py', '--batch_size=32', '--compile=True', *UPDATE], 'tps',
     ['bench.py', '--batch_size=32', '--real_data=False']),
    ('Shakespeare model, 64 x 256, eager: tokens/s',
     ['config/nanogpt_shakespeare_char.py', '--compile=False', *UPDATE], 'tps',
     ['train.py', 'config/train_shakespeare_char.py', '--compile=False']),
    ('Shakespeare model, 64 x 256, compiled: tokens/s',
     ['config/nanogpt_shakespeare_char.py', '--compile=True', *UPDATE], 'tps',
     ['train.py', 'config/train_shakespeare_char.py', '--compile=True']),
    ("one sample of GPT-2 124M's shape: tokens/s",
     ['config/train_gpt2.py', '--task=sample'], 'sample_tps_1', None),
    ("ten samples of GPT-2 124M's shape: tokens/s",
     ['config/train_gpt2.py', '--task=sample'], 'sample_tps_10', None),
]


def run(folder, *command):
    """Run a Python script in a folder and return its standard output."""
    done = subprocess.run([sys.executable, *command], cwd=folder, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f'error: {" ".join(command)} ended with exit code {done.returncode}')
    return done.stdout


def quill(arguments):
    """Return what bench.py measures, as a dict."""
    return json.loads(run(ROOT, 'bench.py', *arguments).splitlines()[-1])


def nanogpt(folder, command):
    """Return the tokens per second that a script of nanoGPT prints as the time of an iteration."""
    size = 1024 * int(command[1].partition('=')[2]) if command[0] == 'bench.py' else 64 * 256
    if command[0] == 'train.py':
        command = [*command, '--max_iters=100', '--log_interval=10', '--eval_iters=1',
                   f'--out_dir={tempfile.mkdtemp()}']
    times = re.findall(r'time (?:per iteration: )?([\d.]+)ms', run(folder, *command))
    return size / (float(times[-1]) / 1000)


def speedrun():
    """Return (val loss, seconds of training) of the Shakespeare speedrun."""
    with tempfile.TemporaryDirectory() as folder:
        run(ROOT, 'train.py', 'config/speedrun_shakespeare_char.py', f'--out_dir={folder}/out')
        rows = pathlib.Path(folder, 'out', 'metrics.jsonl').read_text().splitlines()
    last = [row for row in map(json.loads, rows) if 'val_loss' in row][-1]
    return last['val_loss'], last['train_seconds']


def main(theirs=None):
    if not torch.cuda.is_available():
        sys.exit('error: this measures a GPU, and torch sees none here')
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}\n')
    print('| measured | quill | MFU | nanoGPT | ratio |\n|---|---|---|---|---|')
    results = {}  # two rows may come from one run
    for name, arguments, key, command in ROWS:
        if tuple(arguments) not in results:
            results[tuple(arguments)] = quill(arguments)
        result = results[tuple(arguments)]
        mfu = f'{result["mfu"]:.1f}%' if result.get('mfu') else ''
        cells = ['', '']
        if theirs and command:
            other = nanogpt(theirs, command)
            cells = [f'{other:,.0f}', f'{result[key] / other:.2f}']
        print(f'| {name} | {result[key]:,.0f} | {mfu} | {cells[0]} | {cells[1]} |', flush=True)
    loss, seconds = speedrun()
    print(f'| speedrun: val loss after {seconds:.0f} s of training | {loss:.4f} | | | |')


if __name__ == '__main__':
    main(*sys.argv[1:])
