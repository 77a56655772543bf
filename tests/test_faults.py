"""
Faults on purpose: signals, kills, full disks, damaged files, hanging processes. The README's table of promises names
these tests. `python -m pytest -m slow` runs the long versions.
"""
import errno
import gc
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile

import numpy as np
import pytest
import torch

import sample
import train
from conftest import TINY, metrics, same_tensors, script, snapshot
from configurator import Run, configure
from data import common
from model import GPT, GPTConfig

FAST = [*TINY, '--eval_iters=1', '--eval_interval=3', '--sample_tokens=0', '--max_iters=12']


def start(project, *arguments, nproc=0, torchrun=(), **more):
    """Start train.py of the project copy; returns the Popen with its stdout as text."""
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={nproc}', *torchrun] if nproc else []
    return subprocess.Popen([sys.executable, '-u', *launcher, str(project / 'train.py'), *arguments], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def wait_for(process, pattern):
    """Read the process's stdout up to the line that matches, and return all that was read."""
    seen = ''
    for line in process.stdout:
        seen += line
        if re.search(pattern, line):
            return seen
    raise AssertionError(f'no {pattern} in\n{seen}\n{process.stderr.read()}')


def equal_runs(a, b):
    return all(same_tensors(a[k], b[k]) for k in ('model', 'optimizer', 'scaler', 'iter_num', 'best_val_loss', 'position'))


def load(out, name='ckpt.pt'):
    return torch.load(os.path.join(out, name), weights_only=True)


# ---- exactness

@pytest.fixture(scope='module')
def four(project, tmp_path_factory):
    """A folder with `whole`, a run of 4 processes, and `half`, its first 6 updates as a run of their own."""
    folder = tmp_path_factory.mktemp('four')
    more = ['--gradient_accumulation_steps=2', '--optimizer=muon', '--log_interval=1']
    script(project, 'train.py', *FAST, *more, f'--out_dir={folder / "whole"}', nproc=4)
    script(project, 'train.py', *FAST, *more, f'--out_dir={folder / "half"}', '--train_iters=6', nproc=4)
    return folder


@pytest.mark.slow
def test_resume_in_four_processes_is_bit_identical(project, four, tmp_path):
    shutil.copytree(four / 'half', tmp_path / 'out')
    script(project, 'train.py', '--init_from=resume', f'--out_dir={tmp_path / "out"}', nproc=4)
    assert equal_runs(load(tmp_path / 'out'), load(four / 'whole'))
    assert [r['loss'] for r in metrics(tmp_path / 'out')[0]] == [r['loss'] for r in metrics(four / 'whole')[0]]


@pytest.mark.slow
def test_another_number_of_processes_continues_the_same_losses(project, four, train_run, tmp_path):
    shutil.copytree(four / 'half', tmp_path / 'out')
    expected = [r['loss'] for r in metrics(four / 'whole')[0]]
    train_run('--init_from=resume', '--train_iters=3')  # 4 -> 1
    script(project, 'train.py', '--init_from=resume', f'--out_dir={tmp_path / "out"}', nproc=2)  # 1 -> 2
    assert [r['loss'] for r in metrics(tmp_path / 'out')[0]] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('nproc', [0, 2, 4])
@pytest.mark.parametrize('more', [['--optimizer=adamw', '--gradient_accumulation_steps=4'], ['--optimizer=muon']])
def test_stopped_anywhere_is_bit_identical(project, tmp_path, nproc, more):
    script(project, 'train.py', *FAST, *more, f'--out_dir={tmp_path / "whole"}', nproc=nproc)
    script(project, 'train.py', *FAST, *more, f'--out_dir={tmp_path / "parts"}', '--train_iters=5', nproc=nproc)
    script(project, 'train.py', '--init_from=resume', f'--out_dir={tmp_path / "parts"}', '--train_iters=2', nproc=nproc)
    script(project, 'train.py', '--init_from=resume', f'--out_dir={tmp_path / "parts"}', nproc=nproc)
    assert same_tensors(load(tmp_path / 'whole')['model'], load(tmp_path / 'parts')['model'])
    assert same_tensors(load(tmp_path / 'whole')['optimizer'], load(tmp_path / 'parts')['optimizer'])


# ---- crashes

def kill_and_resume(project, tmp_path, train_run, kills, seed):
    """Kill a run at random moments, resume it each time; at the end it must equal the one that was left alone."""
    rng = random.Random(seed)
    arguments = [*FAST, '--max_iters=60', '--eval_interval=2', '--log_interval=1']
    whole = train_run(*arguments, out=tmp_path / 'whole')
    out = tmp_path / 'killed'
    announced = 0
    for i in range(kills):
        process = start(project, *arguments, '--init_from=auto', f'--out_dir={out}')
        # at the latest the last kill comes after a save, however slow the machine
        seen = wait_for(process, r'^saved \S+ckpt.pt|nothing to do' if i == kills - 1 else r'^step=\d+ loss|nothing to do')
        time.sleep(rng.uniform(0, 0.25))
        process.kill()
        seen += process.communicate()[0]
        assert os.path.exists(out / 'ckpt.pt') or not announced
        saved = [int(n) for n in re.findall(r'^saved \S+ckpt.pt \(step (\d+)\)$', seen, re.M)]
        announced = max([announced, *saved])
        if announced:
            assert train.read_checkpoint(str(out / 'ckpt.pt'))['iter_num'] >= announced
    train_run(*arguments, '--init_from=auto', out=out)
    assert equal_runs(load(out), whole) and announced
    rows = [{k: v for k, v in r.items() if k in ('step', 'loss', 'val_loss')} for part in metrics(out) for r in part]
    assert rows == [{k: v for k, v in r.items() if k in ('step', 'loss', 'val_loss')}
                    for part in metrics(tmp_path / 'whole') for r in part]


@pytest.mark.slow
def test_kill_9_loses_nothing_that_was_announced(project, tmp_path, train_run):
    kill_and_resume(project, tmp_path, train_run, kills=3, seed=1)


@pytest.mark.slow
def test_kill_9_at_50_random_moments(project, tmp_path, train_run):
    kill_and_resume(project, tmp_path, train_run, kills=50, seed=2)


def test_the_previous_checkpoint_is_kept(train_run, tmp_path):
    out = tmp_path / 'out'
    train_run(*FAST, '--max_iters=9')
    assert (load(out)['iter_num'], load(out, 'ckpt_prev.pt')['iter_num']) == (9, 6)
    assert not [f for f in os.listdir(out) if f.endswith('.tmp')]


def test_a_full_disk_ends_with_exit_code_1_and_the_old_checkpoint(project, train_run, tmp_path):
    out = tmp_path / 'out'
    train_run(*FAST, '--train_iters=3')
    before = snapshot(out)
    limit = os.path.getsize(out / 'ckpt.pt') // 2
    process = start(project, '--init_from=resume', f'--out_dir={out}',
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    err = process.communicate()[1]
    last = err.splitlines()[-1]
    assert process.returncode == 1 and 'Traceback' not in err
    assert re.match(rf'error: cannot write {out}/model.pth|error: cannot write {out}/ckpt.pt', last)
    assert 'File too large' in last and re.search(r'[\d.]+ MB are free, [\d.]+ MB are needed', last)
    after = snapshot(out)
    assert all(after[f] == before[f] for f in before if f.endswith(('ckpt.pt', 'ckpt_prev.pt')))
    assert not [f for f in after if f.endswith('.tmp')] and load(out)['iter_num'] == 3


def test_space_and_permission_are_checked_before_training(project, train_run, tmp_path, monkeypatch, capsys):
    (tmp_path / 'file').write_text('')
    with pytest.raises(SystemExit) as e:
        train_run(out=tmp_path / 'file' / 'out')
    err = capsys.readouterr().err
    assert e.value.code == 1 and err.splitlines()[-1].startswith(f'error: cannot write to --out_dir={tmp_path}/file/out')
    assert '(Not a directory)' in err and re.search(r': \d+\.\d MB are free', err)
    monkeypatch.setattr(train.shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))
    with pytest.raises(SystemExit) as e:
        train_run()
    captured = capsys.readouterr()
    assert e.value.code == 1 and '0.0 MB are free' in captured.err and 'step=' not in captured.out


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
@pytest.mark.parametrize('name', ['run.lock', 'metrics.jsonl.tmp'])
def test_a_disk_that_is_full_from_the_start_is_one_line(train_run, tmp_path, capsys, name):
    train_run(*FAST, '--train_iters=3')
    before = (tmp_path / 'out' / 'ckpt.pt').read_bytes()
    if os.path.exists(tmp_path / 'out' / name):
        os.remove(tmp_path / 'out' / name)
    os.symlink('/dev/full', tmp_path / 'out' / name)
    with pytest.raises(SystemExit) as e:
        train_run('--init_from=resume')
    err = capsys.readouterr().err
    assert e.value.code == 1 and re.search(rf'error: cannot write {tmp_path}/out/[a-z.]+ \(.*\): [\d.]+ MB are free', err)
    assert (tmp_path / 'out' / 'ckpt.pt').read_bytes() == before


def test_shards_of_a_save_that_was_cut_off_are_removed_before_space_is_counted(train_run, tmp_path, monkeypatch):
    (tmp_path / 'out' / 'shards-3-1').mkdir(parents=True)
    (tmp_path / 'out' / 'shards-mine').mkdir()
    (tmp_path / 'out' / 'shards-2-1').mkdir()
    torch.save({'shards': {'id': '2-1'}}, tmp_path / 'out' / 'ckpt.pt.bak')
    found = []
    monkeypatch.setattr(train, 'check_space', lambda out_dir, *_: found.extend(f for f in os.listdir(out_dir) if 'shards' in f))
    train_run(*FAST, '--max_iters=1')
    assert sorted(found) == ['shards-2-1', 'shards-mine']


def test_wandb_and_tensorboard_get_every_row(train_run, tmp_path, monkeypatch):
    rows, scalars, purged = [], [], []

    class Writer:
        def __init__(self, folder, purge_step):
            purged.append(purge_step)

        def add_scalar(self, key, value, step):
            scalars.append((key, value, step))

        def close(self):
            scalars.append('closed')
    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=lambda **k: rows.append(k), log=lambda row, step: rows.append(row)))
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', types.SimpleNamespace(SummaryWriter=Writer))
    train_run(*FAST, '--max_iters=6', '--train_iters=3', '--wandb_log=True', '--wandb_project=p', '--tensorboard=True')
    train_run('--init_from=resume')
    written = [row for part in metrics(tmp_path / 'out') for row in part]
    starts = [row for row in rows if 'project' in row]
    assert [row['project'] for row in starts] == ['p', 'p'] and starts[0]['config']['n_embd'] == 32
    assert sorted((r for r in rows if 'project' not in r), key=str) == sorted(written, key=str)
    assert {(k, v, r['step']) for r in written for k, v in r.items() if v is not None} == {s for s in scalars if s != 'closed'}
    assert purged == [None, 4] and scalars.count('closed') == 2


def test_without_hard_links_the_previous_checkpoint_is_a_copy(train_run, tmp_path, monkeypatch):
    def link(*args):
        raise OSError(errno.EPERM, 'Operation not permitted')
    monkeypatch.setattr(os, 'link', link)
    train_run(*FAST, '--max_iters=6')
    out = tmp_path / 'out'
    assert load(out, 'ckpt_prev.pt')['iter_num'] == 3 and load(out, 'ckpt.pt')['iter_num'] == 6
    assert not [f for f in os.listdir(out) if f.endswith('.tmp')]


def test_a_wandb_that_does_not_start_changes_nothing(train_run, tmp_path, monkeypatch, capsys):
    train_run(*FAST, '--max_iters=3')
    before = snapshot(tmp_path / 'out')

    def init(**_):
        raise RuntimeError('api_key not configured\nmore')
    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init))
    with pytest.raises(SystemExit) as e:
        train_run(*FAST, '--wandb_log=True')
    assert e.value.code == 2 and capsys.readouterr().err == 'error: --wandb_log=True: api_key not configured\n'
    assert snapshot(tmp_path / 'out') == before


def test_the_space_a_run_needs_counts_what_it_resumes_from_alone(tmp_path, monkeypatch, capsys):
    model = torch.nn.Linear(1000, 1, bias=False)  # 4,000 bytes
    for folder in ('shards-1-1', 'another-run'):
        (tmp_path / folder).mkdir()
    for name in ('ckpt.pt', 'shards-1-1/__0_0.distcp', 'ckpt-1-2.pt', 'another-run/ckpt.pt'):
        (tmp_path / name).write_bytes(bytes(5000))
    for sharded, resumed, need in ((False, False, 44_000), (False, True, 34_000), (True, False, 48_000), (True, True, 38_000)):
        for free in (need - 1, need):
            monkeypatch.setattr(train.shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(0, 0, free))
            if free == need:
                train.check_space(str(tmp_path), model, sharded, resumed)
            else:
                with pytest.raises(SystemExit):
                    train.check_space(str(tmp_path), model, sharded, resumed)
    assert 'checkpoints will take 0.0 MB more' in capsys.readouterr().err


@pytest.mark.slow
def test_sigterm_during_an_evaluation_loses_nothing(project, tmp_path, train_run):
    out = tmp_path / 'out'
    process = start(project, *FAST, '--eval_iters=150', '--batch_size=1', '--eval_interval=4', f'--out_dir={out}')
    wait_for(process, '^step=4 loss')  # an evaluation of all windows, one by one, is next
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and 'step=4 train_loss' in rest and load(out)['iter_num'] == 5
    whole = train_run(*FAST, '--eval_iters=150', '--batch_size=1', '--eval_interval=4', out=tmp_path / 'whole')
    assert equal_runs(train_run('--init_from=resume'), whole)


@pytest.mark.parametrize('moment', ['save_checkpoint', 'compile_model'])
def test_sigterm_during_a_save_or_the_compilation_loses_nothing(train_run, tmp_path, monkeypatch, moment):
    whole = train_run(*FAST, out=tmp_path / 'whole')
    real, sent = getattr(train, moment), []

    def interrupted(*arguments):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return real(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(train, moment, interrupted)
        with pytest.raises(SystemExit, match='143'):
            train_run(*FAST)
    gc.collect()  # what holds the lock
    assert load(tmp_path / 'out')['iter_num'] == {'save_checkpoint': 4, 'compile_model': 1}[moment]
    assert equal_runs(train_run('--init_from=resume'), whole)


def test_a_signal_within_a_step_ends_that_step(train_run, tmp_path, monkeypatch):
    real = train.Tokens.train_batch
    monkeypatch.setattr(train.Tokens, 'train_batch', lambda self, first, *a: (
        os.kill(os.getpid(), signal.SIGTERM) if first == 8 else None, real(self, first, *a))[1])
    with pytest.raises(SystemExit):
        train_run(*FAST)
    assert load(tmp_path / 'out')['iter_num'] == 3


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_at_once(project, tmp_path):
    out = tmp_path / 'out'
    process = start(project, *FAST, '--eval_iters=0', '--batch_size=1', '--eval_interval=2', '--max_iters=1000', f'--out_dir={out}')
    wait_for(process, '^step=4 loss')  # an evaluation of some seconds is next: the step after it is not yet to come
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=10)
    assert process.returncode == 130 and 'stopped by a signal' not in rest and train.read_checkpoint(str(out / 'ckpt.pt'))['iter_num'] >= 2


@pytest.mark.slow
def test_under_torchrun_all_ranks_leave_on_the_same_step(project, tmp_path):
    out = tmp_path / 'out'
    process = start(project, *FAST, '--max_iters=100000', '--eval_interval=50000', f'--out_dir={out}', nproc=2)
    wait_for(process, '^step=5 ')
    process.send_signal(signal.SIGTERM)
    rest, err = process.communicate(timeout=60)
    n = load(out)['iter_num']
    assert n >= 5 and rest.count(f'stopped by a signal at step {n}') == 1 and 'Connection' not in err


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_rank_was_killed(project, tmp_path):
    out, arguments = tmp_path / 'out', [*FAST, '--max_iters=40', '--eval_interval=5', '--init_from=auto']
    process = start(project, *arguments, f'--out_dir={out}', nproc=2, torchrun=['--max-restarts=3'])
    wait_for(process, '^saved .*ckpt.pt')
    ranks = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert 'resumed' in rest and load(out)['iter_num'] == 40
    script(project, 'train.py', *arguments, f'--out_dir={tmp_path / "whole"}', nproc=2)
    assert equal_runs(load(out), load(tmp_path / 'whole'))


@pytest.mark.slow
@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_a_hanging_rank_ends_the_others_within_timeout_s(project, tmp_path, parallel):
    process = start(project, *FAST, '--max_iters=100000', '--eval_interval=50000', '--timeout_s=5', f'--out_dir={tmp_path / "out"}',
                    f'--parallel={parallel}', nproc=2)
    wait_for(process, '^step=5 ')
    ranks = sorted(map(int, subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()))
    os.kill(ranks[-1], signal.SIGSTOP)
    t0 = time.monotonic()
    while (subprocess.run(['ps', '-o', 'stat=', '-p', str(ranks[0])], capture_output=True, text=True).stdout[:1] not in ('', 'Z')
           and time.monotonic() - t0 < 30):  # gone or a zombie, asked in one step: it may be reaped at any moment
        time.sleep(0.1)
    assert time.monotonic() - t0 < 15
    os.kill(ranks[-1], signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert 'has not answered within timeout_s' in err and 'RuntimeError' not in err


def test_two_runs_in_one_out_dir(project, train_run, tmp_path, capsys):
    out = tmp_path / 'out'
    first = start(project, *FAST, '--max_iters=100000', '--eval_interval=50000', f'--out_dir={out}')
    wait_for(first, '^step=1 ')
    before = {k: v for k, v in snapshot(out).items() if 'metrics' not in k}
    with pytest.raises(SystemExit) as e:
        train_run()
    assert e.value.code == 2 and f'in use by process {first.pid}:' in capsys.readouterr().err
    assert {k: v for k, v in snapshot(out).items() if 'metrics' not in k} == before
    first.kill()  # leaves its lock file behind, which must not block
    first.communicate()
    assert (out / 'run.lock').read_text() == str(first.pid)
    assert train_run('--max_iters=1')['iter_num'] == 1


# ---- numbers

def test_a_bad_number_on_any_rank_stops_all_ranks_before_the_weights_change():
    class Pair(Run):
        """Rank 0 of two, the other of which has a nan somewhere in its gradients, or its loss."""
        where = 0

        def all_reduce(self, tensor):
            other = tensor.clone()
            other[self.where] = torch.nan
            return tensor.add_(other)
    for where, words in ((5, 'gradient norm'), (-2, 'loss')):
        run = Pair(torch.device('cpu'), torch.float32, False, 0, 0, 2, 1)
        run.where = where
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=8, vocab_size=10, n_layer=1, n_head=1, n_embd=8))
        before = {k: v.clone() for k, v in model.state_dict().items()}
        optimizers = train.make_optimizers(model, run, configure(vars(train), []))
        x = torch.randint(10, (2, 8))
        with pytest.raises(train.NotFinite, match=words):
            train.train_step(model, optimizers, torch.amp.GradScaler('cpu', enabled=False), run, [(0, x, x)], 1, 1.0, 1.0)
        assert same_tensors(dict(model.state_dict()), before)


def test_float16_overflows_are_skipped_and_many_in_a_row_are_fatal(train_run, tmp_path, monkeypatch, capsys):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, 'GradScaler', lambda *a, **k: scaler(*a, **k, init_scale=2.0**24))
    train_run('--dtype=float16', '--max_iters=20')
    out = capsys.readouterr().out
    n = out.count('float16 overflow')
    assert 1 <= n < 15 and '(1 in a row)' in out
    monkeypatch.setattr(torch.amp, 'GradScaler', lambda *a, **k: scaler(*a, **k, init_scale=2.0**100))
    with pytest.raises(SystemExit) as e:
        train_run('--dtype=float16', '--max_iters=100', '--eval_interval=100')
    assert e.value.code == 1 and 'not finite in 30 steps in a row' in capsys.readouterr().err


def test_a_bad_stretch_of_data_can_be_skipped_from_the_previous_checkpoint(train_run, tmp_path, capsys):
    out = tmp_path / 'out'
    last = train_run(*FAST, '--max_iters=9')
    best = load(out, 'model.pth')
    assert best['iter_num'] == 9
    resumed = train_run('--init_from=resume', '--ckpt=ckpt_prev.pt', '--skip_batches=5', '--train_iters=2')
    text = capsys.readouterr().out
    assert 'resumed' in text and 'ckpt_prev.pt at step 6, ' in text and 'skip_batches=5 (was 0)' in text
    kept = [f for f in os.listdir(out) if re.fullmatch(r'ckpt-9-.*\.pt', f)]
    assert len(kept) == 1 and same_tensors(load(out, kept[0])['model'], last['model'])
    kept = [f for f in os.listdir(out) if re.fullmatch(r'model-9-.*\.pth', f)]  # which what comes now could have replaced
    assert len(kept) == 1 and load(out, kept[0])['val_loss'] == best['val_loss']
    assert resumed['iter_num'] == 8 and resumed['position'] == (8 + 5) * 4 and load(out, 'ckpt_prev.pt')['iter_num'] == 6
    with pytest.raises(SystemExit) as e:
        train_run('--init_from=resume', '--skip_batches=4')
    assert e.value.code == 2 and 'skip_batches=4 is below the 5 already jumped over' in capsys.readouterr().err
    # and stays so, also where torchrun starts the same command again
    assert train_run('--init_from=resume', '--skip_batches=5', '--train_iters=1')['position'] == (9 + 5) * 4
    # the batches are those of updates 11 and 12 of a run that skips nothing
    seen = []
    real = train.Tokens.train_batch
    original, train.Tokens.train_batch = real, lambda self, first, *a: seen.append(first) or real(self, first, *a)
    try:
        train_run('--init_from=resume', '--train_iters=1', '--max_iters=20')
    finally:
        train.Tokens.train_batch = original
    assert seen == [(9 + 5) * 4]


def test_going_back_to_an_older_checkpoint_renames_all_that_is_newer(train_run, tmp_path):
    out = tmp_path / 'out'
    train_run(*FAST, '--train_iters=3')
    shutil.copy(out / 'ckpt.pt', out / 'good.pt')
    train_run('--init_from=resume')
    assert load(out, 'ckpt_prev.pt')['iter_num'] == 9
    train_run('--init_from=resume', '--ckpt=good.pt', '--train_iters=3')
    train_run('--init_from=resume', '--train_iters=3')  # the second save would have replaced ckpt_prev.pt
    assert [load(out, f)['iter_num'] for f in ('ckpt.pt', 'ckpt_prev.pt')] == [9, 6]
    kept = [f for f in os.listdir(out) if re.fullmatch(r'ckpt(_prev)?-(9|12)-.*\.pt', f)]
    assert sorted(load(out, f)['iter_num'] for f in kept) == [9, 12]


def test_auto_does_not_start_anew_where_only_the_previous_checkpoint_is_left(train_run, tmp_path, capsys):
    out = tmp_path / 'out'
    train_run(*FAST, '--train_iters=6')
    os.remove(out / 'ckpt.pt')
    before = snapshot(out)
    for way in ('auto', 'resume'):
        with pytest.raises(SystemExit) as e:
            train_run(f'--init_from={way}')
        err = capsys.readouterr().err
        assert e.value.code == 2 and 'no ckpt.pt in' in err and 'ckpt_prev.pt is good (step 3): train.py takes it as --ckpt=ckpt_prev.pt' in err
    assert snapshot(out) == before
    assert train_run(*FAST, '--init_from=auto', '--ckpt=ckpt_prev.pt')['iter_num'] == 12


def test_a_checkpoint_that_another_process_replaces_meanwhile_is_not_gone_on_from(train_run, tmp_path, capsys):
    out = tmp_path / 'out'
    train_run(*FAST, '--train_iters=6')
    config, checkpoint = train.settings([f'--out_dir={out}', '--init_from=resume'])
    os.replace(out / 'ckpt_prev.pt', out / 'ckpt.pt')
    with pytest.raises(SystemExit) as e:
        train.main(config, checkpoint)
    assert e.value.code == 1 and 'while this one started: start it again' in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists('/proc/self/maps'), reason='reads /proc')
def test_a_resumed_run_lets_go_of_the_file_it_came_from(train_run, tmp_path, monkeypatch):
    train_run(*FAST, '--train_iters=3')
    evaluate, held = train.evaluate, []
    monkeypatch.setattr(train, 'evaluate', lambda *a: held.append('ckpt' in open('/proc/self/maps').read()) or evaluate(*a))
    train_run('--init_from=resume', '--train_iters=3')
    assert held == [False, False]


def test_a_checkpoint_that_counts_skipped_updates_goes_on_at_the_same_place(train_run, tmp_path):
    path = tmp_path / 'out' / 'ckpt.pt'
    whole = train_run(*FAST, out=tmp_path / 'whole')
    checkpoint = train_run(*FAST, '--train_iters=6')
    assert checkpoint.pop('position') == 24
    torch.save(checkpoint | {'skipped': 0}, path)
    assert equal_runs(train_run('--init_from=resume'), whole)
    torch.save(checkpoint | {'skipped': 'x'}, path)
    with pytest.raises(ValueError, match='no position'):
        train.read_checkpoint(str(path))


def test_another_batch_size_on_resuming_neither_repeats_nor_skips_data(train_run, tmp_path, monkeypatch):
    train_run(*FAST, '--train_iters=3')
    seen, real = [], train.Tokens.train_batch
    monkeypatch.setattr(train.Tokens, 'train_batch', lambda self, first, *a: seen.append(first) or real(self, first, *a))
    train_run('--init_from=resume', '--batch_size=8', '--train_iters=2')
    assert seen == [12, 20]  # behind 3 updates of 4


# ---- files

class Evil:
    def __reduce__(self):
        return os.system, (f'touch {Evil.path}',)


def damaged(path, kind, tmp_path):
    """Replace the checkpoint at path by one that is no good in some way; return a word of the error."""
    checkpoint = torch.load(path, weights_only=True)
    size = os.path.getsize(path)
    if kind == 'truncated':
        os.truncate(path, size * 2 // 3)
    elif kind == 'empty':
        os.truncate(path, 0)
    elif kind == 'text':
        open(path, 'w').write('not a checkpoint\n' * 100)
    elif kind == 'directory':
        os.remove(path)
        os.mkdir(path)
        return 'no file'
    elif kind == 'flipped':
        body = bytearray(open(path, 'rb').read())
        body[size // 2] ^= 4
        open(path, 'wb').write(body)
        return 'damaged'
    elif kind == 'pickle':
        Evil.path = tmp_path / 'executed'
        torch.save({**checkpoint, 'evil': Evil()}, path)
        return 'torch refuses it'
    elif kind == 'plain pickle':
        Evil.path = tmp_path / 'executed'
        pickle.dump(Evil(), open(path, 'wb'))
    elif kind == 'list':
        torch.save([checkpoint], path)
        return 'a list instead of a dict'
    elif kind == 'newer':
        torch.save(checkpoint | {'format': 99}, path)
        return 'format 99 is newer'
    elif kind == 'no optimizer':
        del checkpoint['optimizer']
        torch.save(checkpoint, path)
        return 'no optimizer'
    elif kind == 'no format':
        torch.save({'weights': torch.zeros(3)}, path)
        return 'neither of quill nor of nanoGPT'
    elif kind == 'shape':
        torch.save(checkpoint | {'model_args': checkpoint['model_args'] | {'n_embd': 64}}, path)
        return 'do not fit'
    elif kind == 'huge':
        torch.save(checkpoint | {'model_args': checkpoint['model_args'] | {'n_layer': 10**9}}, path)
        return 'do not fit'
    elif kind == 'no tensors':
        torch.save(checkpoint | {'model': {name: 1 for name in checkpoint['model']}}, path)
        return 'no tensors'
    elif kind == 'path':
        torch.save(checkpoint | {'config': checkpoint['config'] | {'dataset': '../../etc'}}, path)
        return 'dataset is the name of a folder in data/'
    elif kind == 'type':
        torch.save(checkpoint | {'config': checkpoint['config'] | {'batch_size': 'many'}}, path)
        return 'batch_size is an integer'
    return 'cut short, damaged, or no checkpoint'


@pytest.mark.parametrize('kind', ['truncated', 'empty', 'text', 'directory', 'flipped', 'pickle', 'plain pickle', 'list', 'newer',
                                  'no optimizer', 'no format', 'shape', 'huge', 'no tensors', 'path', 'type'])
def test_a_bad_checkpoint_is_refused_and_the_previous_one_named(train_run, tmp_path, capsys, kind):
    out = tmp_path / 'out'
    train_run(*FAST, '--max_iters=6')
    words = damaged(str(out / 'ckpt.pt'), kind, tmp_path)
    capsys.readouterr()
    before = snapshot(out)
    with pytest.raises(SystemExit) as e:
        train_run('--init_from=resume', '--max_iters=9')
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and err.splitlines()[-1].startswith('error: ')
    if kind not in ('path', 'type'):
        assert 'ckpt_prev.pt is good (step 3): train.py takes it as --ckpt=ckpt_prev.pt' in err
    assert snapshot(out) == before and not (tmp_path / 'executed').exists()


def flips(out, n, seed):
    path = str(out / 'ckpt.pt')
    with zipfile.ZipFile(path) as archive:
        spans = [(i.header_offset + 30 + len(i.filename), i.file_size) for i in archive.infolist() if '/data/' in i.filename]
    body, rng = open(path, 'rb').read(), random.Random(seed)
    with open(path, 'rb') as f:  # where each tensor's bytes really begin: behind a header with padding
        spans = [(start + int.from_bytes(body[start - len_name - 2:start - len_name], 'little'), size)
                 for (start, size), len_name in zip(spans, [len(i.filename) for i in archive.infolist() if '/data/' in i.filename])]
    for _ in range(n):
        start, size = rng.choice(spans)
        at = start + rng.randrange(size)
        flipped = bytearray(body)
        flipped[at] ^= 1 << rng.randrange(8)
        open(path, 'wb').write(flipped)
        with pytest.raises(ValueError, match='damaged'):
            train.read_checkpoint(path)
    open(path, 'wb').write(body)
    train.read_checkpoint(path)


@pytest.mark.parametrize('optimizer, damage', [
    ('adamw', lambda opt: opt.pop('state')), ('adamw', lambda opt: opt['state'].pop(0)),
    ('adamw', lambda opt: opt['state'][0].pop('exp_avg')), ('adamw', lambda opt: opt['state'][0].update(exp_avg=torch.zeros(3))),
    ('adamw', lambda opt: opt['state'][1].update(step=torch.zeros(2))), ('adamw', lambda opt: opt['state'][0].update(exp_avg=3.0)),
    ('muon', lambda opt: opt['state'][0].update(momentum_buffer=torch.zeros(3))), ('muon', lambda opt: opt['state'].pop(2))])
def test_an_optimizer_state_of_another_shape_is_refused(train_run, tmp_path, capsys, optimizer, damage):
    checkpoint = train_run(*FAST, '--max_iters=3', f'--optimizer={optimizer}')
    damage(checkpoint['optimizer'][-1])
    torch.save(checkpoint, tmp_path / 'out' / 'ckpt.pt')
    with pytest.raises(SystemExit) as e:
        train_run('--init_from=resume', '--max_iters=6')
    assert e.value.code == 2 and 'the state of its optimizer does not fit' in capsys.readouterr().err


@pytest.mark.parametrize('more', [['--max_iters=1'], ['--max_iters=4', '--eval_interval=1'], ['--max_iters=3', '--sample_tokens=0']])
def test_weights_whose_loss_is_not_finite_are_not_saved(train_run, tmp_path, capsys, more):
    with pytest.raises(SystemExit) as e:
        train_run(*FAST, '--learning_rate=1e30', '--min_lr=0', '--grad_clip=0', '--decay_lr=False', '--eval_interval=1', *more)
    assert e.value.code == 1 and 'loss is not finite at iteration 1: ' in capsys.readouterr().err
    assert not [f for f in os.listdir(tmp_path / 'out') if '.pt' in f]
    rows = (tmp_path / 'out' / 'metrics.jsonl').read_text()
    assert 'NaN' not in rows and [r['step'] for r in metrics(tmp_path / 'out')[1]] == [0]


def test_the_best_are_the_best_of_the_trained_weights(train_run, tmp_path):
    train_run(*FAST, '--learning_rate=1', '--min_lr=1', '--warmup_iters=0', '--max_iters=6', '--eval_interval=2')
    evals = metrics(tmp_path / 'out')[1]
    best = min(evals[1:], key=lambda r: r['val_loss'])
    assert best['val_loss'] > evals[0]['val_loss']  # never as good as before training
    saved = torch.load(tmp_path / 'out' / 'model.pth', weights_only=True)
    assert (saved['iter_num'], saved['val_loss']) == (best['step'], best['val_loss'])


def test_an_error_of_torch_without_words_is_named(train_run, tmp_path, monkeypatch):
    train_run(*FAST, '--max_iters=3')

    def load(*args, **kwargs):
        raise EOFError
    monkeypatch.setattr(torch, 'load', load)
    with pytest.raises(ValueError, match='torch refuses it: EOFError'):
        train.read_checkpoint(str(tmp_path / 'out' / 'ckpt.pt'))


@pytest.mark.parametrize('damage, words', [
    (lambda c: c.update(val_loss='x'), 'no val_loss'), (lambda c: c['model_args'].update(n_head=2.0), 'n_head=2.0 is no int'),
    (lambda c: c['model'].update({'lm_head.weight': c['model']['lm_head.weight'].to_sparse()}), 'weights are no tensors')])
def test_values_of_another_type_in_a_checkpoint_are_refused(train_run, tmp_path, damage, words):
    train_run(*FAST, '--max_iters=3')
    checkpoint = load(tmp_path / 'out', 'model.pth')
    damage(checkpoint)
    torch.save(checkpoint, tmp_path / 'out' / 'model.pth')
    with pytest.raises(ValueError, match=words):
        train.read_checkpoint(str(tmp_path / 'out' / 'model.pth'))


def test_a_flipped_bit_in_a_tensor_is_found(train_run, tmp_path):
    train_run(*FAST, '--max_iters=3')
    flips(tmp_path / 'out', 20, seed=1)


@pytest.mark.slow
def test_200_flipped_bits_are_200_found(train_run, tmp_path):
    train_run(*FAST, '--max_iters=3')
    flips(tmp_path / 'out', 200, seed=2)


def test_a_checkpoint_of_nanogpt_loads_for_resume_and_sampling(train_run, project, tmp_path, capsys):
    out = tmp_path / 'out'
    ours = train_run(*FAST, '--max_iters=3')
    shape = {k: ours['model_args'][k] for k in ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')}
    theirs = {'model': {f'_orig_mod.{k}': v for k, v in ours['model'].items()}, 'optimizer': {'state': {}, 'param_groups': []},
              'model_args': shape, 'iter_num': 3, 'best_val_loss': torch.tensor(3.5),
              'config': {'dataset': 'topics', 'batch_size': 4, 'block_size': 32, 'learning_rate': 1e-3, 'max_iters': 5,
                         'eval_iters': 1, 'dtype': 'float32', 'compile': False, 'device': 'cpu', 'backend': 'nccl'}}
    theirs['model']['_orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 32, 32)  # its mask, without flash attention
    for f in os.listdir(out):
        os.remove(out / f)
    torch.save(theirs, out / 'ckpt.pt')
    capsys.readouterr()
    configure(vars(sample), [f'--out_dir={out}', '--weights=last', '--max_new_tokens=5', '--num_samples=1'])
    sample.main()
    assert 'step 3' in capsys.readouterr().out
    resumed = train_run('--init_from=resume', '--sample_tokens=0')
    text = capsys.readouterr().out
    assert resumed['iter_num'] == 5 and resumed['format'] == 1 and "is nanoGPT's" in text and 'optimizer starts anew' in text


@pytest.mark.parametrize('kind, words', [
    ('missing', 'no val.bin in data/broken'), ('empty', '0 tokens are fewer'), ('odd', 'no whole number'),
    ('short', 'fewer than block_size + 1 = 33'), ('cut', 'instead of'), ('ids', 'outside the vocabulary of 92'),
    ('no meta', 'no meta.json'), ('bad meta', 'meta.json is damaged'), ('half meta', 'meta.json is damaged'),
    ('text for a tokenizer', 'meta.json is damaged'), ('text for a count', 'meta.json is damaged'),
    ('broken number', 'meta.json is damaged'), ('folder', 'Is a directory'), ('slash', 'dataset is the name of a folder in data/'),
    ('outside', 'dataset is the name of a folder in data/')])
def test_bad_data_is_an_error_before_the_model_is_built(project, train_run, tmp_path, capsys, kind, words, monkeypatch):
    folder = project / 'data' / 'broken'
    shutil.copytree(project / 'data' / 'topics', folder)
    monkeypatch.setattr(train, 'GPT', None)  # building a model would fail with a TypeError
    try:
        ids = np.fromfile(folder / 'train.bin', dtype=np.uint16)
        if kind == 'missing':
            (folder / 'val.bin').unlink()
        elif kind == 'empty':
            os.truncate(folder / 'train.bin', 0)
        elif kind == 'odd':
            os.truncate(folder / 'train.bin', 1001)
        elif kind == 'short':
            os.truncate(folder / 'val.bin', 64)
        elif kind == 'cut':
            os.truncate(folder / 'train.bin', 100_000)
        elif kind == 'ids':
            ids[77_777] = 92
            ids.tofile(folder / 'train.bin')
        elif kind == 'no meta':
            (folder / 'meta.json').unlink()
        elif kind == 'bad meta':
            (folder / 'meta.json').write_text('{"tokenizer": ')
        elif kind == 'half meta':
            meta = json.load(open(folder / 'meta.json'))
            del meta['dtype']
            json.dump(meta, open(folder / 'meta.json', 'w'))
        elif kind.startswith('text for'):
            meta = json.load(open(folder / 'meta.json'))
            meta |= {'tokenizer': 'char'} if 'tokenizer' in kind else {'tokens': {'train': '9', 'val': '9'}}
            json.dump(meta, open(folder / 'meta.json', 'w'))
        elif kind == 'broken number':
            meta = json.load(open(folder / 'meta.json'))
            json.dump(meta | {'vocab_size': float(meta['vocab_size'])}, open(folder / 'meta.json', 'w'))
        elif kind == 'folder':
            (folder / 'train.bin').unlink()
            (folder / 'train.bin').mkdir()
        before = snapshot(project / 'data')
        t0 = time.monotonic()
        with pytest.raises(SystemExit) as e:
            train_run('--dataset=' + {'outside': '../topics', 'slash': 'topics/'}.get(kind, 'broken'))
        err = capsys.readouterr().err
        assert e.value.code == 2 and words in err and err.splitlines()[-1].startswith('error: ') and time.monotonic() - t0 < 10
        assert snapshot(project / 'data') == before and not os.path.exists(tmp_path / 'out')
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
def test_data_cut_short_while_training_is_exit_code_1(project, tmp_path, train_run):
    folder, out = project / 'data' / 'shrinking', tmp_path / 'out'
    shutil.copytree(project / 'data' / 'topics', folder)
    process = start(project, *FAST, '--dataset=shrinking', '--max_iters=100000', f'--out_dir={out}')
    wait_for(process, '^saved .*ckpt.pt')
    os.truncate(folder / 'train.bin', 500)
    err = process.communicate(timeout=60)[1]
    shutil.rmtree(folder)
    assert process.returncode == 1 and 'cut short while in use' in err.splitlines()[-1] and 'Traceback' not in err
    assert train.read_checkpoint(str(out / 'ckpt.pt'))['iter_num'] >= 3


def test_resume_refuses_other_data(train_run, project, tmp_path, capsys):
    train_run(*FAST, '--max_iters=3')
    folder = project / 'data' / 'other'
    shutil.copytree(project / 'data' / 'topics', folder)
    meta = json.load(open(folder / 'meta.json'))
    alphabet = meta['tokenizer']['chars']
    before = snapshot(tmp_path / 'out')
    for change, words in (({'sha256': 'f' * 64}, 'the checkpoint was trained with sha256'),
                          ({'tokenizer': {'kind': 'char', 'chars': alphabet[:-1] + 'é'}}, 'another tokenizer than')):
        json.dump(meta | change, open(folder / 'meta.json', 'w'))
        with pytest.raises(SystemExit) as e:
            train_run('--init_from=resume', '--dataset=other')
        err = capsys.readouterr().err
        assert e.value.code == 2 and words in err and snapshot(tmp_path / 'out') == before
    shutil.rmtree(folder)


def test_resume_refuses_another_optimizer_and_weights_alone(train_run, tmp_path, capsys):
    train_run(*FAST, '--max_iters=3')
    before = snapshot(tmp_path / 'out')
    for argument, words in (('--optimizer=muon', 'optimizer=muon but'), ('--ckpt=model.pth', 'holds weights to sample from')):
        with pytest.raises(SystemExit) as e:
            train_run('--init_from=resume', '--max_iters=6', argument)
        assert e.value.code == 2 and words in capsys.readouterr().err and snapshot(tmp_path / 'out') == before


def test_user_mistakes_change_nothing(project, train_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    before = snapshot(project)
    for arguments in (['--init_from=resume'], ['--device=cuda'], ['--batch_size=-1', '--top_k=3'], ['config/none.py'],
                      ['--init_from=gpt3'], ['--skip_batches=3'], [f'--seed={2**64}'], ['--backend=tcp'],
                      ['--compile=maybe'], ['--min_lr=1'], ['--lr_decay_iters=1'], ['--timeout_s=1e14'], ['--dtype=int4'], ['--parallel=tensor']):
        t0 = time.monotonic()
        with pytest.raises(SystemExit) as e:
            train_run(*arguments)
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.splitlines()[-1].startswith('error: ') and time.monotonic() - t0 < 10
    assert snapshot(project) == before and os.listdir(tmp_path) == []


@pytest.mark.slow
def test_out_of_memory_is_one_line(project, tmp_path):
    _, err = script(project, 'train.py', *TINY, '--n_embd=4000000', f'--out_dir={tmp_path / "out"}', code=1)
    assert err.splitlines()[-1].startswith('error: out of memory, halve batch_size') and 'Traceback' not in err


@pytest.mark.slow
def test_ranks_with_different_data_are_refused(project, tmp_path, text):
    (tmp_path / 'others.txt').write_text(text.read_text()[:100_000])
    common.write_dataset('others', str(tmp_path / 'others.txt'), 'char')
    (tmp_path / 'two.py').write_text('import os\ndataset = ["topics", "others"][int(os.environ["RANK"])]\n')
    _, err = script(project, 'train.py', *[a for a in TINY if 'dataset' not in a], str(tmp_path / 'two.py'),
                    f'--out_dir={tmp_path / "out"}', nproc=2, code=1)
    assert 'and not the same for others: prepare it alike' in err and not (tmp_path / 'out').exists()


def test_a_user_mistake_in_a_real_process_is_one_line(project, tmp_path):
    _, err = script(project, 'train.py', *TINY, '--device=cuda', cwd=tmp_path, code=2, env={'CUDA_VISIBLE_DEVICES': ''})
    assert err.splitlines()[-1].startswith('error: ') and 'Traceback' not in err and os.listdir(tmp_path) == []
