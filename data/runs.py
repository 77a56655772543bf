"""
The files of a training run: out_dir, metrics, and the list of all runs.
"""
import contextlib
import json
import math
import os
import time
from pathlib import Path

from configurator import HERE, fail, first_line, one_line_errors, say
from data.files import cannot_write, lock, replace_file

import torch

RUNS_LOG = os.path.join(HERE, 'checkpoints.log')  # one out_dir a line, the latest run last

# -----------------------------------------------------------------------------
# out_dir

def claim(out_dir):
    """Make out_dir and lock it until this process ends; return the open lock file."""
    path = os.path.join(out_dir, 'run.lock')
    try:
        os.makedirs(out_dir, exist_ok=True)
        f = open(path, 'a+')
        lock(f)
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


def begin(settings, resumed_at):
    """Make out_dir ready for this run; return its Metrics. Rank 0 calls this.

    resumed_at: the step of the checkpoint that this run goes on from, or -1.
    """
    out_dir, wandb = settings['out_dir'], None
    if settings['wandb_log']:
        with one_line_errors('--wandb_log=True: pip install wandb, wandb login: ', (Exception,)):
            import wandb
            wandb.init(project=settings['wandb_project'], name=settings['wandb_run_name'],
                       config=settings)
    out_lock = claim(out_dir)
    for left in Path(out_dir).glob('*.pt*.tmp'):  # by a save that was cut off
        left.unlink()
    paths = [Path(out_dir, name) for name in ('ckpt.pt', 'ckpt_prev.pt', 'model.pth')]
    paths = [path for path in paths if path.exists()]
    if resumed_at >= 0:
        keep_newer(paths, resumed_at, settings['ckpt'])
    elif paths == [Path(out_dir, 'ckpt.pt')] and 0 <= saved_number(paths[0], 'train_seconds') < 60:
        # an earlier run without an evaluation, and not worth a copy
        paths[0].unlink()
        say(f'note: removed {paths[0]} of a run that was stopped within its first minute')
    elif paths or read_metrics(out_dir):
        steps = [saved_number(path, 'iter_num') for path in paths]
        rename_aside(Path(out_dir), max([0, *steps]))
        out_lock = claim(out_dir)
    with contextlib.suppress(OSError), open(RUNS_LOG, 'ab') as f:  # a clone may be read-only
        f.write(os.fsencode(f'{os.path.abspath(out_dir)}\n'))
    try:
        Path(out_dir, 'config.json').write_text(json.dumps(settings, indent=1))
        return Metrics(out_dir, resumed_at, wandb, out_lock)
    except OSError as e:
        cannot_write(out_dir, e)


def keep_newer(paths, resumed_at, ckpt):
    """Rename the checkpoints that are newer than `ckpt`, from which this run goes on."""
    for path in paths:
        step = saved_number(path, 'iter_num')
        if path.name == ckpt and step != resumed_at:
            fail(f'{path} was at step {resumed_at} and is at step {step} now: another run uses it')
        if path.name != ckpt and (path.name == 'ckpt.pt' or step > resumed_at):
            rename_aside(path, step)


def saved_number(path, key):
    """Return a number that the checkpoint at path holds, or -1 if it cannot be read."""
    try:
        return int(torch.load(path, map_location='cpu', weights_only=True, mmap=True)[key])
    except Exception:
        return -1


def rename_aside(path, step):
    """Add the step and the date to the name of a file or folder of an earlier run."""
    date = time.strftime('%Y%m%d-%H%M%S', time.localtime(path.stat().st_mtime))
    extension = '' if path.is_dir() else path.suffix
    stem = path.name.removesuffix(extension)
    with one_line_errors(f'{path} holds an earlier run, give another --out_dir: '):
        kept = path.with_name(f'{stem}-{step}-{date}{extension}')
        path.rename(kept)
    say(f'{path} belongs to an earlier run: renamed to {kept}. To delete it: rm -r {kept}')


def read_runs():
    """Return the out_dirs in checkpoints.log, the latest one last."""
    log = Path(RUNS_LOG)
    return os.fsdecode(log.read_bytes()).splitlines() if log.exists() else []


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
        with replace_file(self.path) as f:
            f.write(''.join(rows).encode())

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
    if not any('val_loss' in row for row in rows):
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
    best = min(losses)  # losses and steps are those of the validation now
    ax.set(xlabel='updates', ylabel='loss (nats per token)',
           title=f'{out_dir}: best val loss {best:.4f} at step {steps[losses.index(best)]}',
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
