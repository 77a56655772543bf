"""
The files of a training run: out_dir, metrics, and the list of all runs.
"""
import contextlib
import json
import math
import os
import pathlib
import re
import time

from configurator import HERE, fail, first_line, say
from data.files import cannot_write, lock, need_space, replace_file, write_atomic

import torch

RUNS_LOG = os.path.join(HERE, 'checkpoints.log')  # one out_dir a line, the latest run last

# -----------------------------------------------------------------------------
# out_dir

def claim(out_dir):
    """Make out_dir and lock it for this process; return the open lock file.

    The lock ends with the process, however it ends.
    """
    path = os.path.join(out_dir, 'run.lock')
    try:
        os.makedirs(out_dir, exist_ok=True)
        f = open(path, 'a+')
        if reason := lock(f):
            say(f'note: {out_dir} cannot be locked ({reason}): '
                'make sure that no other run uses it')
        f.truncate(0)
        f.write(str(os.getpid()))
        f.flush()
    except BlockingIOError:
        f.seek(0)
        fail(f'--out_dir={out_dir} is in use by process {f.read().strip()}: '
             'give another --out_dir, or end that process')
    except OSError as e:
        cannot_write(path, e)
    return f


def begin(settings, model, resumed_at):
    """Make out_dir ready for this run; return its Metrics. Rank 0 calls this.

    settings: those of train.py. resumed_at: the step of the checkpoint that this run goes on from,
    or -1.
    """
    out_dir, wandb = settings['out_dir'], None
    if settings['wandb_log']:
        wandb = start_wandb(settings['wandb_project'], settings['wandb_run_name'], settings)
    out_lock = claim(out_dir)
    paths = [os.path.join(out_dir, name) for name in ('ckpt.pt', 'ckpt_prev.pt', 'model.pth')]
    newest, *_ = paths
    paths = [path for path in paths if os.path.exists(path)]
    for name in os.listdir(out_dir):  # left by a save that was cut off
        if re.fullmatch(r'(ckpt|ckpt_prev|model)\.\w+(\.\d+)?\.tmp', name):
            os.remove(os.path.join(out_dir, name))
    # at most three ckpt.pt (weights, and two moments of AdamW) and two model.pth at a time
    need = (3 * 3 + 2) * 4 * sum(p.numel() for p in model.parameters())
    if resumed_at >= 0:  # the run's own checkpoints will be replaced
        need -= sum(map(os.path.getsize, paths))
    need_space(out_dir, need, 'checkpoints will take')
    if resumed_at >= 0:
        keep_newer(paths, resumed_at, settings['ckpt'])
    elif paths == [newest] and 0 <= saved_number(newest, 'train_seconds') < 60:
        # an earlier run without an evaluation, and not worth a copy
        os.remove(newest)
        say(f'note: removed {newest} of a run that was stopped within its first minute')
    elif paths or read_metrics(out_dir):
        rename_aside(out_dir, max([0, *(saved_number(path, 'iter_num') for path in paths)]))
        out_lock = claim(out_dir)
    write_atomic(os.path.join(out_dir, 'config.json'), [json.dumps(settings, indent=1).encode()])
    remember_run(out_dir)
    return Metrics(out_dir, resumed_at, wandb, out_lock)


def keep_newer(paths, resumed_at, ckpt):
    """Rename the checkpoints that are newer than `ckpt`, from which this run goes on."""
    for path in paths:
        name, step = os.path.basename(path), saved_number(path, 'iter_num')
        if name == ckpt and step != resumed_at:
            fail(f'{path} was at step {resumed_at} and is at step {step} now: another run has gone '
                 'on with it')
        if name != ckpt and (name == 'ckpt.pt' or step > resumed_at):
            rename_aside(path, step)


def saved_number(path, key):
    """Return a number that the checkpoint at path holds, or -1 if it cannot be read."""
    try:
        number = torch.load(path, map_location='cpu', weights_only=True, mmap=True)[key]
    except Exception:
        return -1
    return number if isinstance(number, (int, float)) else -1


def rename_aside(path, step):
    """Add the step and the date to the name of a file or folder of an earlier run."""
    date = time.strftime('%Y%m%d-%H%M%S', time.localtime(os.path.getmtime(path)))
    stem, extension = os.path.splitext(path.rstrip('/' + os.sep))
    if os.path.isdir(path):
        stem, extension = stem + extension, ''
    kept = f'{stem}-{step}-{date}'
    while os.path.exists(kept + extension):
        kept += '-2'
    kept += extension
    real = os.path.realpath(path)
    try:
        if any(pathlib.Path(d).is_relative_to(real) for d in (os.path.realpath('.'), HERE)):
            raise OSError(0, 'it is or holds the current folder, or quill itself')
        os.rename(path, kept)
    except OSError as e:
        fail(f'{path} holds an earlier run and cannot be renamed ({e.strerror}): '
             'give another --out_dir')
    say(f'{path} belongs to an earlier run: renamed to {kept}. To delete it: rm -r {kept}')


def read_runs():
    """Return the out_dirs in checkpoints.log, the latest one last."""
    if not os.path.exists(RUNS_LOG):
        return []
    with open(RUNS_LOG, encoding='utf-8', errors='surrogateescape') as f:  # any file name
        return f.read().splitlines()


def remember_run(out_dir):
    """Make out_dir the last line of checkpoints.log, from which sample.py takes its default."""
    line = os.path.abspath(out_dir)
    lines = [run for run in read_runs() if run != line] + [line]
    try:
        with replace_file(RUNS_LOG) as f:
            f.write(''.join(f'{run}\n' for run in lines).encode(errors='surrogateescape'))
    except OSError as e:
        print(f'note: {RUNS_LOG} not written ({e.strerror}): sample.py needs --out_dir={out_dir}')


# -----------------------------------------------------------------------------
# metrics

class Metrics:
    """Writes rows of numbers to metrics.jsonl and to wandb, and draws loss.png.

    step: of the checkpoint that the run goes on from, or -1. Later rows will come again and are
    dropped. wandb: the module, or None. out_lock: stays locked until this process ends.
    """

    def __init__(self, out_dir, step, wandb=None, out_lock=None):
        self.out_dir, self.wandb, self.out_lock = out_dir, wandb, out_lock
        self.failed = set()  # the services that are switched off
        self.path = os.path.join(out_dir, 'metrics.jsonl')
        rows = [json.dumps(row) + '\n' for row in read_metrics(out_dir) if row['step'] <= step]
        write_atomic(self.path, [''.join(rows).encode()])

    def write(self, **row):
        # JSON has no inf and nan
        row = {k: v if v is None or math.isfinite(v) else None for k, v in row.items()}
        try:
            os.makedirs(self.out_dir, exist_ok=True)  # somebody may have deleted it
            with open(self.path, 'a', encoding='utf-8') as f:
                f.write(json.dumps(row) + '\n')
        except OSError as e:
            cannot_write(self.path, e)
        if self.wandb:
            self.attempt('wandb', self.wandb.log, row, step=row['step'])

    def plot(self):
        """Draw loss.png if matplotlib is installed."""
        self.attempt('loss.png', draw_losses, self.out_dir)

    def attempt(self, name, service, *args, **more):
        """Call a service that training does not need; if it fails, say so and switch it off."""
        if name in self.failed:
            return
        try:
            service(*args, **more)
        except Exception as e:  # whatever it is, training goes on
            self.failed.add(name)
            say(f'note: {name} is switched off: {first_line(e)}')


def draw_losses(out_dir):
    """Draw the losses in metrics.jsonl as loss.png; ImportError if matplotlib is not installed."""
    from matplotlib.figure import Figure
    rows = [row for row in read_metrics(out_dir) if row['step'] > 0]  # no random weights
    if not rows:
        return
    ax = Figure(figsize=(8, 5), layout='constrained').subplots()
    shown = []
    for key, label, style in (('loss', 'batch: text of one update', '-'),
                              ('train_loss', 'train: more text for training', 'o-'),
                              ('val_loss', 'val: text for validation', 'o-')):
        steps = [row['step'] for row in rows if row.get(key)]
        losses = [row[key] for row in rows if row.get(key)]
        ax.plot(steps, losses, style, markersize=4, linewidth=1, label=label)
        # the loss falls steeply in the first tenth of the run: leave most of that out
        shown += losses[len(losses) // 10:]
    title = out_dir
    if losses:  # of the validation
        best = min(losses)
        title += f': best val loss {best:.4f} at step {steps[losses.index(best)]}'
    ax.set(xlabel='updates', ylabel='loss (nats per token)', title=title,
           ylim=(min(shown) - 0.05, max(shown) + 0.05))
    ax.legend()
    ax.figure.savefig(os.path.join(out_dir, 'loss.png'), dpi=100)


def read_metrics(out_dir):
    """Return the rows of metrics.jsonl, without lines that a crash has damaged."""
    rows, path = [], os.path.join(out_dir, 'metrics.jsonl')
    if os.path.exists(path):
        with open(path, encoding='utf-8', errors='replace') as f:
            for line in f:
                with contextlib.suppress(ValueError):
                    rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get('step'), int)]


def start_wandb(project, name, config):
    """Return the module wandb, logging a run of this name."""
    try:
        import wandb
        wandb.init(project=project, name=name, config=config)
        return wandb
    except Exception as e:  # not installed, or not logged in, for example
        fail(f'--wandb_log=True: {first_line(e)} (pip install wandb; wandb login)')
