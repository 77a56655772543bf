"""
Faults on purpose: signals, kills, full disks, damaged files, processes that hang.

`python -m pytest -m slow -n 0` runs the tests that start many processes. The promises of quill, as
what happens, what holds then, and the tests (of this file, or of the file in parentheses):

A run is stopped after any update and resumed.
    The weights, the optimizer and the scaler get the same bits as without the stop, in 1, 2 and 4
    processes.
    test_resume_in_four_processes_is_bit_identical, test_stopped_anywhere_is_bit_identical
The same command is started twice.
    Both runs give the same bits.
    test_a_seed_decides_every_tensor (test_train.py)
eval_interval, sample_tokens or log_interval is another one.
    The weights are the same.
    test_evaluation_and_sampling_change_no_weights (test_train.py)
A run is resumed with another batch_size.
    It goes on behind the last sequence that it has read.
    test_another_batch_size_on_resuming_neither_repeats_nor_skips_data
A run is resumed with more or fewer processes.
    It reads the same batches and draws the same dropout masks; its losses stay within 1e-4.
    test_another_number_of_processes_continues_the_same_losses
A run of an earlier version of quill (commit e866279) is resumed.
    It ends with the same weights as with that version, within 1e-6.
    test_a_checkpoint_of_e866279_resumes_to_the_same_weights
ckpt.pt is missing, ckpt_prev.pt exists.
    An error names ckpt_prev.pt. --init_from=auto does not start from scratch.
    test_auto_does_not_start_anew_where_only_the_previous_checkpoint_is_left
A process is killed with kill -9 at any moment.
    Every checkpoint that was announced as saved exists and loads.
    test_kill_9_loses_nothing_that_was_announced, test_kill_9_at_50_random_moments
A rank is killed with kill -9, under torchrun --max-restarts=3 and with --init_from=auto.
    The run goes on by itself and ends with the same bits as an undisturbed run.
    test_torchrun_restarts_a_run_whose_rank_was_killed
A process gets SIGTERM, or Ctrl-C.
    It finishes the update, saves, and exits with code 143 or 130; all ranks after the same update.
    Within an evaluation it does so at once, and the resumed run evaluates again.
    test_sigterm_during_an_evaluation_ends_it_and_loses_nothing
    test_a_signal_of_one_rank_ends_the_evaluation_of_all
    test_sigterm_during_a_save_or_the_compilation_loses_nothing
    test_under_torchrun_all_ranks_leave_on_the_same_step
The output goes away or its disk is full; then SIGTERM, SIGHUP or SIGUSR1.
    Training goes on and metrics.jsonl gets every line. The signal ends the run with its save.
    Signals that were ignored at the start stay ignored.
    test_an_output_that_goes_away_ends_no_run_and_a_signal_saves_it
    test_a_run_whose_output_is_on_a_full_disk_ends_well
    test_a_signal_that_was_ignored_stays_ignored
A process gets a second Ctrl-C.
    It exits at once; the last checkpoint remains.
    test_a_second_ctrl_c_leaves_at_once
A rank hangs.
    The other ranks exit within timeout_s.
    test_a_hanging_rank_ends_the_others_within_timeout_s
The disk is full, a limit on file sizes is reached, or out_dir is not writable.
    Exit code 1, and an error with the path. The last checkpoint still loads. Permission is also
    checked before training.
    test_a_full_disk_ends_with_exit_code_1_and_the_old_checkpoint
    test_permission_is_checked_before_training
Two runs use one out_dir.
    The second run stops, and its error names the process of the first run.
    test_two_runs_in_one_out_dir, test_resuming_a_run_that_another_process_goes_on_with_is_refused
The loss or the gradient norm is not finite, on any rank.
    All ranks stop before the weights change, with exit code 1. Weights are not saved either if
    their evaluation is not finite.
    test_a_bad_number_on_any_rank_stops_all_ranks_before_the_weights_change
    test_a_bad_number_ends_the_run_with_exit_code_1
    test_weights_whose_loss_is_not_finite_are_not_saved
Gradients overflow in float16.
    The update is skipped and counted; 30 overflows in a row end the run.
    test_float16_overflows_are_skipped_and_many_in_a_row_are_fatal
A stretch of the data is bad.
    --init_from=resume --ckpt=ckpt_prev.pt --skip_batches=100 skips it. A newer ckpt.pt or
    model.pth is renamed.
    test_a_bad_stretch_of_data_can_be_skipped_from_the_previous_checkpoint
A checkpoint is cut short, has one flipped bit, is of another kind, or is malicious.
    It is refused, no code in it is run, and the error names ckpt_prev.pt.
    test_a_bad_checkpoint_is_refused_and_the_previous_one_named, test_200_flipped_bits_are_200_found
A checkpoint is nanoGPT's.
    sample.py and train.py take it; train.py says what it lacks.
    test_a_checkpoint_of_nanogpt_loads_for_resume_and_sampling
Data is missing, cut short, of an odd length, or outside the vocabulary.
    An error comes before the model is built. During training, the exit code is 1.
    test_bad_data_is_an_error_before_the_model_is_built
    test_data_cut_short_while_training_is_exit_code_1
The data differs between nodes.
    The run is refused before training.
    test_ranks_with_different_data_are_refused
A model can never fit into memory.
    One line says so, and nothing on the disk has changed.
    test_a_model_that_can_never_fit_is_refused_with_its_size
Weights are trained further on data in other tokens.
    The run is refused; the error names the command that writes a text in the right tokens.
    test_weights_of_another_alphabet_or_shape_are_refused
    test_an_export_is_not_trained_on_another_alphabet_of_the_same_size (test_tokenizers.py)
A download fails, stalls, is slow, redirects, or delivers other bytes.
    A bad file never gets its final name.
    test_a_failed_download_leaves_no_file_and_says_why (test_data.py)
"""
import errno
import gc
import glob
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import zipfile

import sample
import train
from configurator import Process, configure
from data import build, runs
from data.checkpoints import VERSION, read_checkpoint
from data.dataset import Tokens
from model import GPT
from train import SIGNALS

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, metrics, same_tensors, script, snapshot

OLD = os.path.join(ROOT, 'tests', 'data')  # files that quill wrote at commit e866279

# with peak_tflops, the log lines have an mfu
FAST = [*TINY, '--eval_iters=1', '--eval_interval=3', '--sample_tokens=0', '--max_iters=12',
        '--peak_tflops=1']


@pytest.fixture
def fails(train_run, capsys):
    """A function that runs train.main, which must exit with `code`, and returns its stderr."""
    def go(*arguments, code=2, **more):
        capsys.readouterr()
        exit_code = None
        try:
            train_run(*arguments, **more)
        except SystemExit as e:
            exit_code = e.code
        gc.collect()  # closes the lock file
        err = capsys.readouterr().err
        assert exit_code == code, err
        assert code > 2 or err.splitlines()[-1].startswith('error: ')
        return err
    return go


@pytest.fixture
def read_at(monkeypatch):
    """The list of the first sequences of all training batches that are read."""
    seen, real = [], Tokens.train_batch

    def train_batch(self, first, *more):
        seen.append(first)
        return real(self, first, *more)
    monkeypatch.setattr(Tokens, 'train_batch', train_batch)
    return seen


def start(project, *arguments, nproc=0, torchrun=(), **more):
    """Start train.py of the project copy; returns the Popen with its stdout as text."""
    command = [sys.executable, '-u']
    if nproc:
        command += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={nproc}']
    command += [*torchrun, str(project / 'train.py'), *arguments]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            **more)


def wait_for(child, pattern):
    """Read the child's stdout up to the line that matches, and return all that was read."""
    seen = ''
    for line in child.stdout:
        seen += line
        if re.search(pattern, line):
            return seen
    raise AssertionError(f'no {pattern} in\n{seen}\n{child.stderr.read()}')


def ranks_of(child):
    """Return the process ids of torchrun's ranks, the oldest first."""
    found = subprocess.run(['pgrep', '-P', str(child.pid)], capture_output=True, text=True)
    return sorted(map(int, found.stdout.split()))


def equal_runs(a, b):
    keys = ('model', 'optimizer', 'scaler', 'iter_num', 'best_val_loss', 'position')
    return all(same_tensors(a[k], b[k]) for k in keys)


def load(out, name='ckpt.pt'):
    return torch.load(os.path.join(out, name), weights_only=True)


def no_temporary_files(out):
    return not [f for f in os.listdir(out) if f.endswith('.tmp')]


def losses(out):
    return [row['loss'] for row in metrics(out)[0]]


def test_every_test_that_the_table_above_names_exists():
    named = re.findall(r'\b(test_\w+)\b(?!\.py)(?: \((test_\w+\.py)\))?', __doc__)
    defined = {}
    for path in glob.glob(os.path.join(ROOT, 'tests', 'test_*.py')):
        with open(path, encoding='utf-8') as f:
            defined[os.path.basename(path)] = re.findall(r'^def (test_\w+)', f.read(), re.M)
    assert len(named) > 30
    missing = [name for name, file in named if name not in defined[file or 'test_faults.py']]
    assert not missing


# ---- exactness

@pytest.fixture(scope='module')
def four(project, tmp_path_factory):
    """A folder with `whole`, a run of 4 processes, and `half`, a run of its first 6 updates."""
    folder = tmp_path_factory.mktemp('four')
    more = [*FAST, '--gradient_accumulation_steps=2', '--optimizer=muon', '--log_interval=1']
    script(project, 'train.py', *more, f'--out_dir={folder / "whole"}', nproc=4)
    script(project, 'train.py', *more, f'--out_dir={folder / "half"}', '--train_iters=6', nproc=4)
    return folder


@pytest.mark.slow
def test_resume_in_four_processes_is_bit_identical(project, four, tmp_path):
    out = tmp_path / 'out'
    shutil.copytree(four / 'half', out)
    script(project, 'train.py', '--init_from=resume', f'--out_dir={out}', nproc=4)
    assert equal_runs(load(out), load(four / 'whole'))
    assert losses(out) == losses(four / 'whole')


@pytest.mark.slow
def test_another_number_of_processes_continues_the_same_losses(project, four, train_run, tmp_path):
    out = tmp_path / 'out'
    shutil.copytree(four / 'half', out)
    train_run('--init_from=resume', '--train_iters=3')  # 4 -> 1
    script(project, 'train.py', '--init_from=resume', f'--out_dir={out}', nproc=2)  # 1 -> 2
    assert losses(out) == pytest.approx(losses(four / 'whole'), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('nproc', [0, 2, 4])
@pytest.mark.parametrize('more', [['--optimizer=adamw', '--gradient_accumulation_steps=4'],
                                  ['--optimizer=muon']])
def test_stopped_anywhere_is_bit_identical(project, tmp_path, nproc, more):
    def run(name, *arguments):
        script(project, 'train.py', f'--out_dir={tmp_path / name}', *arguments, nproc=nproc)
    run('whole', *FAST, *more)
    run('parts', *FAST, *more, '--train_iters=5')
    run('parts', '--init_from=resume', '--train_iters=2')
    run('parts', '--init_from=resume')
    assert same_tensors(load(tmp_path / 'whole')['model'], load(tmp_path / 'parts')['model'])
    assert same_tensors(load(tmp_path / 'whole')['optimizer'],
                        load(tmp_path / 'parts')['optimizer'])


def test_a_checkpoint_of_e866279_resumes_to_the_same_weights(
        project, train_run, tmp_path, capsys):
    """tests/data holds ckpt.pt after 3 updates of a run, and model.pth after all 6 updates.

    Both were written by quill at commit e866279. With the same CPU kernels and one thread, the
    weights are the same bits; another CPU rounds differently.
    """
    lines = [f'{i} times {j} is {i * j}' for i in range(1, 17) for j in range(1, 17)]
    (tmp_path / 'times.txt').write_bytes('\n'.join(lines).encode())
    tokenizer = load(OLD, 'ckpt_e866279.pt')['tokenizer']  # without an end-of-text token
    build.write_dataset('times', str(tmp_path / 'times.txt'), tokenizer)
    out = tmp_path / 'out'
    out.mkdir()
    shutil.copy(os.path.join(OLD, 'ckpt_e866279.pt'), out / 'ckpt.pt')
    before, expected = load(out)['model'], load(OLD, 'model_e866279.pth')
    resumed = train_run('--init_from=resume')
    shutil.rmtree(project / 'data' / 'times')
    assert resumed['iter_num'] == expected['iter_num'] == 6
    assert resumed['best_val_loss'] == pytest.approx(expected['val_loss'], abs=1e-6)
    assert resumed['model'].keys() == expected['model'].keys()
    for name, tensor in expected['model'].items():
        torch.testing.assert_close(resumed['model'][name], tensor, rtol=0, atol=1e-6)
        assert (before[name] - tensor).abs().max() > 1e-4  # the three updates change every tensor

    # sample.py reads the weights that both versions saved, and writes the same text
    texts = []
    for name in ('this quill', 'e866279'):
        if name == 'e866279':
            shutil.copy(os.path.join(OLD, 'model_e866279.pth'), out / 'model.pth')
        configure('sample', [f'--out_dir={out}', '--num_samples=1', '--max_new_tokens=40'])
        capsys.readouterr()
        sample.main()
        text = capsys.readouterr().out
        assert f'step 6, best val loss {expected["val_loss"]:.4f}' in text, name
        texts.append(text.splitlines()[2:-1])
    assert texts[0] == texts[1]


# ---- crashes

def kill_and_resume(project, tmp_path, train_run, kills, seed):
    """Kill a run at random moments and resume it each time.

    At the end the run must equal the run that nobody killed.
    """
    rng = random.Random(seed)
    arguments = [*FAST, '--max_iters=60', '--eval_interval=2', '--log_interval=1']
    whole = train_run(*arguments, out=tmp_path / 'whole')
    out = tmp_path / 'killed'
    announced = 0
    for i in range(kills):
        child = start(project, *arguments, '--init_from=auto', f'--out_dir={out}')
        # the last kill comes after a save, however slow the machine is
        event = r'saved \S+ckpt.pt' if i == kills - 1 else r'step=\d+/\d+ loss'
        seen = wait_for(child, rf'^{event}|nothing to do')
        time.sleep(rng.uniform(0, 0.25))
        child.kill()
        seen += child.communicate()[0]
        assert os.path.exists(out / 'ckpt.pt') or not announced
        saved = [int(n) for n in re.findall(r'^saved \S+ckpt.pt \(step (\d+)\)$', seen, re.M)]
        announced = max([announced, *saved])
        if announced:
            assert read_checkpoint(str(out / 'ckpt.pt'))['iter_num'] >= announced
    train_run(*arguments, '--init_from=auto', out=out)
    assert equal_runs(load(out), whole) and announced

    def numbers(out):  # without the times
        return [{k: v for k, v in row.items() if k in ('step', 'loss', 'val_loss')}
                for part in metrics(out) for row in part]
    assert numbers(out) == numbers(tmp_path / 'whole')


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
    assert no_temporary_files(out)


def test_a_full_disk_ends_with_exit_code_1_and_the_old_checkpoint(project, train_run, tmp_path):
    out = tmp_path / 'out'
    train_run(*FAST, '--train_iters=3')
    before = snapshot(out)
    limit = os.path.getsize(out / 'ckpt.pt') // 2
    child = start(project, '--init_from=resume', f'--out_dir={out}',
                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    err = child.communicate()[1]
    last = err.splitlines()[-1]
    assert child.returncode == 1 and 'Traceback' not in err
    assert re.match(rf'error: cannot write {out}/(model.pth|ckpt.pt) \(File too large\)', last)
    after = snapshot(out)
    for name in before:
        assert after[name] == before[name] or not name.endswith(('ckpt.pt', 'ckpt_prev.pt'))
    assert no_temporary_files(out) and load(out)['iter_num'] == 3


def test_permission_is_checked_before_training(fails, tmp_path, monkeypatch):
    for part in ('evaluate', 'update'):
        monkeypatch.setattr(train, part, None)  # training would fail with a TypeError
    (tmp_path / 'file').write_text('')
    err = fails(out=tmp_path / 'file' / 'out', code=1)
    assert err.splitlines()[-1].startswith(
        f'error: cannot write {tmp_path}/file/out/run.lock (Not a directory)')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
@pytest.mark.parametrize('named, written', [
    ('/run.lock', 'run.lock'), ('', 'config.json'), ('', 'metrics.jsonl.PID.tmp')])
def test_a_disk_that_is_full_from_the_start_is_one_line(
        train_run, fails, tmp_path, named, written):
    out = tmp_path / 'out'
    train_run(*FAST, '--train_iters=3')
    before = (out / 'ckpt.pt').read_bytes()
    written = out / written.replace('PID', str(os.getpid()))
    written.unlink(missing_ok=True)
    written.symlink_to('/dev/full')
    err = fails('--init_from=resume', code=1)
    assert re.fullmatch(rf'error: cannot write {out}{named} \(.*\).*\n', err)
    assert (out / 'ckpt.pt').read_bytes() == before


def test_wandb_gets_every_row(train_run, tmp_path, monkeypatch):
    starts, rows = [], []

    def log(row, step):
        assert step == row['step']
        rows.append(row)
    wandb = types.SimpleNamespace(init=lambda **settings: starts.append(settings), log=log)
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    train_run(*FAST, '--max_iters=6', '--train_iters=3', '--wandb_log=True', '--wandb_project=p')
    train_run('--init_from=resume')
    written = [row for part in metrics(tmp_path / 'out') for row in part]
    assert [settings['project'] for settings in starts] == ['p', 'p']
    assert starts[0]['config']['n_embd'] == 32
    assert len(rows) > 6 and sorted(rows, key=str) == sorted(written, key=str)


def test_without_hard_links_the_previous_checkpoint_is_a_copy(train_run, tmp_path, monkeypatch):
    def link(*args):
        raise OSError(errno.EPERM, 'Operation not permitted')
    monkeypatch.setattr(os, 'link', link)
    train_run(*FAST, '--max_iters=6')
    out = tmp_path / 'out'
    assert load(out, 'ckpt_prev.pt')['iter_num'] == 3 and load(out, 'ckpt.pt')['iter_num'] == 6
    assert no_temporary_files(out)


@pytest.mark.skipif(not os.path.exists('/proc/self/fd'), reason='reads /proc')
def test_a_wandb_that_does_not_start_changes_nothing(train_run, fails, tmp_path, monkeypatch):
    train_run(*FAST, '--max_iters=3')
    before = snapshot(tmp_path / 'out')

    def init(**_):
        raise RuntimeError('api_key not configured\nmore')
    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init))
    err = fails(*FAST, '--wandb_log=True')
    assert re.fullmatch(r'error: --wandb_log=True: .*api_key not configured.*\n', err)
    assert snapshot(tmp_path / 'out') == before and os.listdir(tmp_path) == ['out']


@pytest.mark.parametrize('first_loss, step', [(-8, 0), (0, 3), (4, 3), (8, 6)])
def test_sigterm_during_an_evaluation_ends_it_and_loses_nothing(
        train_run, fails, tmp_path, monkeypatch, capsys, first_loss, step):
    whole = train_run(*FAST, '--max_iters=6', '--eval_iters=4', out=tmp_path / 'whole')
    real, seen = Tokens.eval_batches, []

    def eval_batches(self, *arguments):  # four batches of each split at steps 0, 3 and 6
        for batch in real(self, *arguments):
            seen.append(1)
            if len(seen) == 8 + first_loss + 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch
    with monkeypatch.context() as patch:
        patch.setattr(Tokens, 'eval_batches', eval_batches)
        fails(*FAST, '--max_iters=6', '--eval_iters=4', code=143)
    assert len(seen) <= 8 + first_loss + 2  # no batch more, and one of the validation split
    assert load(tmp_path / 'out')['iter_num'] == step
    assert not load(tmp_path / 'out')['evaluated']
    assert equal_runs(train_run('--init_from=resume'), whole)
    assert [row['step'] for row in metrics(tmp_path / 'out')[1]] == [0, 3, 6]
    assert 'model.pth (step 0)' not in capsys.readouterr().out  # of random weights


@pytest.mark.slow
def test_a_signal_of_one_rank_ends_the_evaluation_of_all(project, tmp_path):
    config = tmp_path / 'one.py'
    config.write_text("""
import os as _os, signal as _signal
from data.dataset import Tokens as _Tokens
_real, _seen = _Tokens.eval_batches, []
def _eval_batches(self, *arguments):
    for batch in _real(self, *arguments):
        _seen.append(1)
        if len(_seen) == 15 and _os.environ['RANK'] == '1':
            _os.kill(_os.getpid(), _signal.SIGTERM)
        yield batch
_Tokens.eval_batches = _eval_batches
batch_size = 2
""")
    out = tmp_path / 'out'
    script(project, 'train.py', *FAST, config, '--eval_iters=20', '--max_iters=6',
           f'--out_dir={out}', nproc=2, code=1)  # torchrun's code
    assert load(out)['iter_num'] == 3 and not load(out)['evaluated']
    script(project, 'train.py', '--init_from=resume', f'--out_dir={out}', nproc=2)
    assert [row['step'] for row in metrics(out)[1]] == [0, 3, 6]


@pytest.mark.parametrize('module, moment, step', [(torch, 'save', 4),
                                                  (train, 'compile_forward', 0)])
def test_sigterm_during_a_save_or_the_compilation_loses_nothing(
        train_run, fails, tmp_path, monkeypatch, module, moment, step):
    whole = train_run(*FAST, out=tmp_path / 'whole')
    real, sent = getattr(module, moment), []

    def interrupted(*arguments):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return real(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(module, moment, interrupted)
        fails(*FAST, code=143)
    assert load(tmp_path / 'out')['iter_num'] == step
    assert equal_runs(train_run('--init_from=resume'), whole)


def test_a_signal_within_an_update_ends_that_update(fails, tmp_path, monkeypatch):
    real = Tokens.train_batch

    def train_batch(self, first, *more):
        if first == 8:  # the third batch of 4
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, first, *more)
    monkeypatch.setattr(Tokens, 'train_batch', train_batch)
    fails(*FAST, code=143)
    assert load(tmp_path / 'out')['iter_num'] == 3


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_at_once(project, train_run, tmp_path):
    out = tmp_path / 'out'
    train_run(*FAST, '--max_iters=2')
    child = start(project, '--init_from=resume', '--sample_tokens=100000', '--max_iters=1000',
                  f'--out_dir={out}')
    wait_for(child, r'^step=3/\d+ train_loss')  # next comes a sample that takes some minutes
    child.send_signal(signal.SIGINT)
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    rest, _ = child.communicate(timeout=10)
    assert child.returncode == 130 and 'stopped at step' not in rest
    assert read_checkpoint(str(out / 'ckpt.pt'))['iter_num'] >= 2


@pytest.mark.slow
def test_under_torchrun_all_ranks_leave_on_the_same_step(project, tmp_path):
    out = tmp_path / 'out'
    child = start(project, *FAST, '--max_iters=100000', '--eval_interval=50000',
                  f'--out_dir={out}', nproc=2)
    wait_for(child, '^step=5/')
    child.send_signal(signal.SIGTERM)
    rest, err = child.communicate(timeout=60)
    n = load(out)['iter_num']
    assert n >= 5 and rest.count(f'stopped at step {n}, to go on: ') == 1
    assert 'Connection' not in err


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_rank_was_killed(project, tmp_path):
    out = tmp_path / 'out'
    arguments = [*FAST, '--max_iters=40', '--eval_interval=5', '--init_from=auto']
    child = start(project, *arguments, f'--out_dir={out}', nproc=2, torchrun=['--max-restarts=3'])
    wait_for(child, '^saved .*ckpt.pt')
    os.kill(ranks_of(child)[-1], signal.SIGKILL)
    rest, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert 'resumed' in rest and load(out)['iter_num'] == 40
    script(project, 'train.py', *arguments, f'--out_dir={tmp_path / "whole"}', nproc=2)
    assert equal_runs(load(out), load(tmp_path / 'whole'))


@pytest.mark.slow
def test_torchrun_restarts_a_run_on_two_nodes(project, tmp_path):
    # two torchrun agents that meet on the loopback interface, as the README says
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    out = tmp_path / 'out'
    arguments = [*FAST, '--max_iters=40', '--eval_interval=5', '--init_from=auto']
    command = [sys.executable, '-u', '-m', 'torch.distributed.run', '--nnodes=2',
               '--nproc_per_node=1', '--max-restarts=3', '--rdzv_id=7', '--rdzv_backend=c10d',
               f'--rdzv_endpoint=127.0.0.1:{port}', str(project / 'train.py'), *arguments,
               '--timeout_s=20', f'--out_dir={out}']
    env = os.environ | {'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}
    with open(tmp_path / 'log', 'w') as log:
        nodes = [subprocess.Popen(command, stdout=log, stderr=log, env=env) for _ in range(2)]
        while 'saved' not in (tmp_path / 'log').read_text():
            time.sleep(0.1)
        os.kill(ranks_of(nodes[1])[0], signal.SIGKILL)
        codes = [node.wait(timeout=120) for node in nodes]
    text = (tmp_path / 'log').read_text()
    assert codes == [0, 0], text
    assert 'resumed' in text and load(out)['iter_num'] == 40
    script(project, 'train.py', *arguments, f'--out_dir={tmp_path / "whole"}', nproc=2)
    assert equal_runs(load(out), load(tmp_path / 'whole'))


@pytest.mark.slow
@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_a_hanging_rank_ends_the_others_within_timeout_s(project, tmp_path, parallel):
    child = start(project, *FAST, '--max_iters=100000', '--eval_interval=50000', '--timeout_s=5',
                  f'--out_dir={tmp_path / "out"}', f'--parallel={parallel}', nproc=2)
    wait_for(child, '^step=5/')
    first, last = ranks_of(child)

    def ended():  # gone or a zombie, asked in one step: it may be reaped at any moment
        state = subprocess.run(['ps', '-o', 'stat=', '-p', str(first)], capture_output=True)
        return state.stdout[:1] in (b'', b'Z')
    os.kill(last, signal.SIGSTOP)
    t0 = time.monotonic()
    while not ended() and time.monotonic() - t0 < 30:
        time.sleep(0.1)
    assert time.monotonic() - t0 < 15
    os.kill(last, signal.SIGCONT)
    _, err = child.communicate(timeout=60)
    assert 'another process has ended, or has not answered within timeout_s' in err
    assert 'RuntimeError' not in err


def test_two_runs_in_one_out_dir(project, train_run, fails, tmp_path):
    out = tmp_path / 'out'
    first = start(project, *FAST, '--max_iters=100000', '--eval_interval=50000',
                  f'--out_dir={out}')
    wait_for(first, '^step=1/')

    def files():
        return {k: v for k, v in snapshot(tmp_path).items() if 'metrics' not in k}
    before = files()
    assert f'in use by process {first.pid}:' in fails()
    assert files() == before
    first.kill()  # leaves its lock file behind, which must not block
    first.communicate()
    assert (out / 'run.lock').read_text() == str(first.pid)
    assert train_run('--max_iters=1')['iter_num'] == 1


def test_resuming_a_run_that_another_process_goes_on_with_is_refused(
        train_run, fails, tmp_path, monkeypatch):
    out = tmp_path / 'out'
    train_run(*FAST, '--train_iters=3')
    before = snapshot(out)
    code = ('import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); '
            'print("locked", flush=True); input()')
    child = subprocess.Popen([sys.executable, '-c', code, str(out / 'run.lock')], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    wait_for(child, 'locked')
    for way in ('resume', 'auto'):
        assert f'in use by process {os.getpid()}:' in fails(f'--init_from={way}')
    assert snapshot(out) == before
    child.communicate('\n')

    # another run that has gone on after this one has read the checkpoint, and before it locks
    real = runs.claim

    def claim(out_dir):
        torch.save(load(out) | {'iter_num': 4}, out / 'ckpt.pt')
        return real(out_dir)
    with monkeypatch.context() as patch:
        patch.setattr(runs, 'claim', claim)
        assert 'was at step 3 and is at step 4 now' in fails('--init_from=resume')
    torch.save(load(out) | {'iter_num': 3}, out / 'ckpt.pt')
    assert train_run('--init_from=resume')['iter_num'] == 12


# ---- numbers

class Pair(Process):
    """Rank 0 of two. `where`: the index of a nan in what the other rank adds, or None."""
    where = None

    def all_reduce(self, tensor):
        other = tensor.clone()
        if self.where is not None:
            other[self.where] = torch.nan
        return tensor.add_(other)

    def broadcast(self, tensor):
        return tensor


@pytest.mark.parametrize('where, bad', [(5, 'gradient norm'), (-2, 'loss'), (None, '')])
def test_a_bad_number_on_any_rank_stops_all_ranks_before_the_weights_change(where, bad):
    configure('train', ['--n_layer=1', '--n_head=1', '--n_embd=8', '--block_size=8',
                            '--batch_size=4'])
    process = Pair(torch.device('cpu'), torch.float32, world_size=2, seed=1)
    process.where = where
    torch.manual_seed(0)
    learner = train.make_learner(GPT(train.model_config(10)), process)
    before = {k: v.clone() for k, v in learner.model.state_dict().items()}
    idx = torch.randint(10, (2, 8))
    _, _, found = train.update(learner, [(0, idx, idx)], 1.0)
    configure('train', [])
    assert found == bad
    assert same_tensors(dict(learner.model.state_dict()), before) == bool(bad)
    assert all(opt.state_dict()['state'] for opt in learner.optimizers) == (not bad)


@pytest.mark.parametrize('bad', ['loss', 'gradient norm'])
def test_a_bad_number_ends_the_run_with_exit_code_1(fails, tmp_path, monkeypatch, bad):
    real = train.update

    def update(learner, *more, **options):
        row, stop, found = real(learner, *more, **options)
        third = learner.optimizers[0].state_dict()['state'][0]['step'] == 3
        return row, stop, bad if third else found
    monkeypatch.setattr(train, 'update', update)
    err = fails(*FAST, '--eval_interval=2', code=1)
    assert err == f'error: the {bad} is not finite at iteration 2: weights not changed\n'
    assert load(tmp_path / 'out')['iter_num'] == 2


def test_float16_overflows_are_skipped_and_many_in_a_row_are_fatal(
        train_run, fails, monkeypatch, capsys):
    real = torch.amp.GradScaler

    def start_at(scale):
        monkeypatch.setattr(torch.amp, 'GradScaler',
                            lambda *a, **more: real(*a, **more, init_scale=scale))
    start_at(2.0**24)
    train_run('--dtype=float16', '--max_iters=20')
    out = capsys.readouterr().out
    assert 1 <= out.count('float16 overflow') < 15 and '(1 in a row)' in out
    start_at(2.0**100)
    err = fails('--dtype=float16', '--max_iters=100', '--eval_interval=100', code=1)
    assert 'error: 30 float16 overflows in a row: weights not changed\n' in err


def test_a_bad_stretch_of_data_can_be_skipped_from_the_previous_checkpoint(
        train_run, fails, tmp_path, capsys, read_at):
    out = tmp_path / 'out'
    last = train_run(*FAST, '--max_iters=9')
    best = load(out, 'model.pth')
    assert best['iter_num'] == 9
    resumed = train_run('--init_from=resume', '--ckpt=ckpt_prev.pt', '--skip_batches=5',
                        '--train_iters=2')
    text = capsys.readouterr().out
    assert f'resumed {out}/ckpt_prev.pt at step 6\n' in text
    kept = [f for f in os.listdir(out) if re.fullmatch(r'ckpt-9-.*\.pt', f)]
    assert len(kept) == 1 and same_tensors(load(out, kept[0])['model'], last['model'])
    # the new updates could have replaced this file
    kept = [f for f in os.listdir(out) if re.fullmatch(r'model-9-.*\.pth', f)]
    assert len(kept) == 1 and load(out, kept[0])['val_loss'] == best['val_loss']
    assert resumed['iter_num'] == 8 and resumed['position'] == (8 + 5) * 4
    assert load(out, 'ckpt_prev.pt')['iter_num'] == 6
    # the number is a total: torchrun may start the same command again
    again = train_run('--init_from=resume', '--skip_batches=5', '--train_iters=1')
    assert again['position'] == (9 + 5) * 4
    # the next batch is that of update 15 of a run that skips nothing
    read_at.clear()
    train_run('--init_from=resume', '--train_iters=1', '--max_iters=20')
    assert read_at == [(9 + 5) * 4]


def test_going_back_to_an_older_checkpoint_renames_all_that_is_newer(train_run, tmp_path):
    out = tmp_path / 'out'
    train_run(*FAST, '--train_iters=3')
    shutil.copy(out / 'ckpt.pt', out / 'good.pt')
    train_run('--init_from=resume')
    assert load(out, 'ckpt_prev.pt')['iter_num'] == 9
    train_run('--init_from=resume', '--ckpt=good.pt', '--train_iters=3')
    # the second save would have replaced the old ckpt_prev.pt
    train_run('--init_from=resume', '--train_iters=3')
    assert [load(out, f)['iter_num'] for f in ('ckpt.pt', 'ckpt_prev.pt')] == [9, 6]
    kept = [f for f in os.listdir(out) if re.fullmatch(r'ckpt(_prev)?-(9|12)-.*\.pt', f)]
    assert sorted(load(out, f)['iter_num'] for f in kept) == [9, 12]


def test_auto_does_not_start_anew_where_only_the_previous_checkpoint_is_left(
        train_run, fails, tmp_path):
    out = tmp_path / 'out'
    train_run(*FAST, '--train_iters=6')
    os.remove(out / 'ckpt.pt')
    before = snapshot(tmp_path)
    for way in ('auto', 'resume'):
        err = fails(f'--init_from={way}')
        assert f'cannot use {out}/ckpt.pt: there is no such file' in err
        assert 'the checkpoint before it is there: --ckpt=ckpt_prev.pt' in err
    assert snapshot(tmp_path) == before
    assert train_run(*FAST, '--init_from=auto', '--ckpt=ckpt_prev.pt')['iter_num'] == 12


@pytest.mark.skipif(not os.path.exists('/proc/self/maps'), reason='reads /proc')
def test_a_resumed_run_lets_go_of_the_file_it_came_from(train_run, tmp_path, monkeypatch):
    train_run(*FAST, '--train_iters=3')
    real, held = train.evaluate, []

    def evaluate(*arguments):
        with open('/proc/self/maps') as f:
            # with the folder: garbage of earlier tests may still map other checkpoints
            held.append(f'{tmp_path}/out/ckpt.pt' in f.read())
        return real(*arguments)
    monkeypatch.setattr(train, 'evaluate', evaluate)
    train_run('--init_from=resume', '--train_iters=3')
    assert held == [False, False]


def test_another_batch_size_on_resuming_neither_repeats_nor_skips_data(train_run, read_at):
    train_run(*FAST, '--train_iters=3')
    read_at.clear()
    train_run('--init_from=resume', '--batch_size=8', '--train_iters=2')
    assert read_at == [12, 20]  # after 3 updates of 4 sequences


# ---- files

class Evil:
    """What runs a command when pickle reads it."""

    def __reduce__(self):
        return os.system, (f'touch {Evil.path}',)


# kind of damage: (keys of the checkpoint that are replaced, words of the error)
CHANGES = {
    'newer': ({'format': VERSION + 1}, f'its format is {VERSION + 1}: '),
    'no number': ({'format': '1'}, "its format is '1': "),
    'shape': ({'model_args': {'n_embd': 64}}, 'do not fit'),
    'huge': ({'model_args': {'n_layer': 10**9}}, 'too few weights for n_layer=1000000000'),
    'no integer': ({'model_args': {'n_head': 2.0}}, 'n_head=2.0 must be an integer'),
    'path': ({'config': {'dataset': '../../etc'}}, 'dataset is the name of a folder in data/'),
    'type': ({'config': {'batch_size': 'many'}}, "batch_size='many' must be an integer"),
}


def damage(path, kind, tmp_path):
    """Damage the checkpoint at path in some way; return a word of the error."""
    checkpoint = torch.load(path, weights_only=True)
    size = os.path.getsize(path)
    if kind in CHANGES:
        changes, words = CHANGES[kind]
        for key, value in changes.items():
            nested = key in ('model_args', 'config')
            checkpoint[key] = checkpoint[key] | value if nested else value
        torch.save(checkpoint, path)
        return words
    if kind == 'truncated':
        os.truncate(path, size * 2 // 3)
    elif kind == 'empty':
        os.truncate(path, 0)
    elif kind == 'text':
        with open(path, 'w') as f:
            f.write('not a checkpoint\n' * 100)
    elif kind == 'directory':
        os.remove(path)
        os.mkdir(path)
        return 'there is no such file'
    elif kind == 'flipped':
        with open(path, 'rb') as f:
            body = bytearray(f.read())
        weights = checkpoint['model']['lm_head.weight'].numpy().tobytes()
        body[body.index(weights) + 99] ^= 4
        with open(path, 'wb') as f:
            f.write(body)
        return 'damaged'
    elif kind == 'pickle':
        Evil.path = tmp_path / 'executed'
        torch.save({**checkpoint, 'evil': Evil()}, path)
        return 'torch refuses it'
    elif kind == 'plain pickle':
        Evil.path = tmp_path / 'executed'
        with open(path, 'wb') as f:
            pickle.dump(Evil(), f)
    elif kind == 'list':
        torch.save([checkpoint], path)
        return 'neither of quill nor of nanoGPT'
    elif kind == 'no format':
        torch.save({'weights': torch.zeros(3)}, path)
        return 'neither of quill nor of nanoGPT'
    elif kind == 'no tensors':
        torch.save(checkpoint | {'model': {name: 1 for name in checkpoint['model']}}, path)
        return 'do not fit'
    elif kind == 'sparse':
        weights = {name: t.to_sparse() for name, t in checkpoint['model'].items()}
        torch.save(checkpoint | {'model': weights}, path)
        return 'do not fit'
    return 'cut short, damaged, or no checkpoint'


@pytest.mark.parametrize('kind', [
    'truncated', 'empty', 'text', 'directory', 'flipped', 'pickle', 'plain pickle', 'list',
    'no format', 'no tensors', 'sparse', *CHANGES])
def test_a_bad_checkpoint_is_refused_and_the_previous_one_named(train_run, fails, tmp_path, kind):
    out = tmp_path / 'out'
    train_run(*FAST, '--max_iters=6')
    words = damage(str(out / 'ckpt.pt'), kind, tmp_path)
    before = snapshot(tmp_path)
    err = fails('--init_from=resume', '--max_iters=9')
    assert words in err and err.count('\n') == 1
    if kind not in ('path', 'type', 'no integer'):
        assert err.endswith('; the checkpoint before it is there: --ckpt=ckpt_prev.pt\n')
    assert snapshot(tmp_path) == before and not (tmp_path / 'executed').exists()


def flip_bits(out, n, seed):
    """Flip one bit of a tensor in ckpt.pt, n times: each must be found."""
    path = str(out / 'ckpt.pt')
    with open(path, 'rb') as f:
        body = f.read()
    spans = []
    with zipfile.ZipFile(path) as archive:
        for item in archive.infolist():
            if '/data/' in item.filename:
                # a header, the name and some padding come before the bytes of the tensor; two
                # bytes of the header give the length of the padding
                name = item.header_offset + 30
                padding = int.from_bytes(body[name - 2:name], 'little')
                spans.append((name + len(item.filename) + padding, item.file_size))

    def write(content):
        with open(path, 'wb') as f:
            f.write(content)
    rng = random.Random(seed)
    for _ in range(n):
        first, size = rng.choice(spans)
        flipped = bytearray(body)
        flipped[first + rng.randrange(size)] ^= 1 << rng.randrange(8)
        write(flipped)
        with pytest.raises(ValueError, match='damaged'):
            read_checkpoint(path)
    write(body)
    read_checkpoint(path)


def test_a_flipped_bit_in_a_tensor_is_found(train_run, tmp_path):
    train_run(*FAST, '--max_iters=3')
    flip_bits(tmp_path / 'out', 20, seed=1)


@pytest.mark.slow
def test_200_flipped_bits_are_200_found(train_run, tmp_path):
    train_run(*FAST, '--max_iters=3')
    flip_bits(tmp_path / 'out', 200, seed=2)


@pytest.mark.parametrize('optimizer, harm', [
    ('adamw', lambda saved: saved['state'].pop(0)),
    ('adamw', lambda saved: saved['state'][0].update(exp_avg=torch.zeros(3))),
    ('muon', lambda saved: saved['state'][0].update(momentum_buffer=torch.zeros(3))),
    ('muon', lambda saved: saved['state'].pop(2))])
def test_an_optimizer_state_of_another_shape_is_refused(
        train_run, fails, tmp_path, optimizer, harm):
    checkpoint = train_run(*FAST, '--max_iters=3', f'--optimizer={optimizer}')
    harm(checkpoint['optimizer'][-1])
    torch.save(checkpoint, tmp_path / 'out' / 'ckpt.pt')
    err = fails('--init_from=resume', '--max_iters=6')
    assert re.search('state of its optimizer', err)


@pytest.mark.parametrize('more', [['--max_iters=1'], ['--max_iters=4'],
                                  ['--max_iters=3', '--always_save_checkpoint=True']])
def test_weights_whose_loss_is_not_finite_are_not_saved(fails, tmp_path, more):
    out = tmp_path / 'out'
    err = fails(*FAST, '--learning_rate=1e30', '--min_lr=0', '--grad_clip=0', '--decay_lr=False',
                '--eval_interval=1', *more, code=1)
    assert 'loss is not finite at iteration 1: ' in err
    assert not [f for f in os.listdir(out) if '.pt' in f]
    rows = (out / 'metrics.jsonl').read_text()
    assert 'NaN' not in rows and [r['step'] for r in metrics(out)[1]] == [0]


def test_the_best_are_the_best_of_the_trained_weights(train_run, tmp_path):
    train_run(*FAST, '--learning_rate=1', '--min_lr=1', '--warmup_iters=0', '--max_iters=6',
              '--eval_interval=2')
    evals = metrics(tmp_path / 'out')[1]
    best = min(evals[1:], key=lambda r: r['val_loss'])
    assert best['val_loss'] > evals[0]['val_loss']  # random weights are better in this run
    saved = load(tmp_path / 'out', 'model.pth')
    assert (saved['iter_num'], saved['val_loss']) == (best['step'], best['val_loss'])


def test_an_error_of_torch_without_words_is_named(train_run, tmp_path, monkeypatch):
    train_run(*FAST, '--max_iters=3')

    def load(*args, **kwargs):
        raise EOFError
    monkeypatch.setattr(torch, 'load', load)
    with pytest.raises(ValueError, match='torch refuses it: EOFError'):
        read_checkpoint(str(tmp_path / 'out' / 'ckpt.pt'))


@pytest.mark.parametrize('change, words', [
    (lambda c: c.pop('config'), 'it has no config'), (lambda c: c.pop('model'), 'it has no model'),
    (lambda c: c['model_args'].update(n_head=2.0), 'n_head=2.0 must be an integer'),
    (lambda c: c['model_args'].update(vocab_size=91), 'its tokenizer has more tokens'),
    (lambda c: c['model'].update({'lm_head.weight': c['model']['lm_head.weight'].to_sparse()}),
     'its weights do not fit its model_args')])
def test_values_of_another_type_in_a_checkpoint_are_refused_by_sample(
        train_run, tmp_path, capsys, change, words):
    out = tmp_path / 'out'
    train_run(*FAST, '--max_iters=3')
    checkpoint = load(out, 'model.pth')
    change(checkpoint)
    torch.save(checkpoint, out / 'model.pth')
    configure('sample', [f'--out_dir={out}'])
    with pytest.raises(SystemExit, match='2'):
        sample.main()
    err = capsys.readouterr().err
    assert words in err and err.startswith(f'error: cannot use {out}/model.pth: ')
    assert err.count('\n') == 1


def test_a_checkpoint_of_nanogpt_loads_for_resume_and_sampling(train_run, tmp_path, capsys):
    out = tmp_path / 'out'
    ours = train_run(*FAST, '--max_iters=3')
    names = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
    weights = {f'_orig_mod.{name}': tensor for name, tensor in ours['model'].items()}
    # the causal mask, which nanoGPT saves if it has no flash attention
    weights['_orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 32, 32)
    config = {'dataset': 'topics', 'batch_size': 4, 'block_size': 32, 'learning_rate': 1e-3,
              'max_iters': 5, 'eval_iters': 1, 'dtype': 'float32', 'compile': False,
              'device': 'cpu', 'backend': 'nccl'}
    theirs = {'model': weights, 'optimizer': {'state': {}, 'param_groups': []},
              'model_args': {name: ours['model_args'][name] for name in names},
              'iter_num': 3, 'best_val_loss': torch.tensor(3.5), 'config': config}
    for f in os.listdir(out):
        os.remove(out / f)
    torch.save(theirs, out / 'ckpt.pt')
    capsys.readouterr()
    configure('sample', [f'--out_dir={out}', '--weights=last', '--max_new_tokens=5',
                             '--num_samples=1'])
    sample.main()
    assert 'step 3' in capsys.readouterr().out
    resumed = train_run('--init_from=resume', '--sample_tokens=0')
    text = capsys.readouterr().out
    assert resumed['iter_num'] == 5 and resumed['format'] == 1
    assert "is nanoGPT's" in text and 'optimizer starts anew' in text


def change_meta(folder, change):
    """Apply the function change to the dict in meta.json."""
    meta = json.loads((folder / 'meta.json').read_text())
    change(meta)
    (folder / 'meta.json').write_text(json.dumps(meta))


def bad_id(folder):
    ids = np.fromfile(folder / 'train.bin', dtype=np.uint16)
    ids[77_777] = 93
    ids.tofile(folder / 'train.bin')


def train_bin_as_folder(folder):
    (folder / 'train.bin').unlink()
    (folder / 'train.bin').mkdir()


# kind: (what is done to the folder of the dataset, words of the error)
BAD_DATA = {
    'missing': (lambda d: (d / 'val.bin').unlink(), 'no val.bin in data/broken'),
    'empty': (lambda d: os.truncate(d / 'train.bin', 0), '0 tokens are fewer'),
    'odd': (lambda d: os.truncate(d / 'train.bin', 1001), '500 tokens instead of'),
    'short': (lambda d: os.truncate(d / 'val.bin', 64), 'fewer than block_size + 1 = 33'),
    'cut': (lambda d: os.truncate(d / 'train.bin', 100_000), 'instead of'),
    'ids': (bad_id, 'outside the vocabulary of 93'),
    'bad meta': (lambda d: (d / 'meta.json').write_text('{"tokenizer": '),
                 'meta.json is damaged'),
    'half meta': (lambda d: change_meta(d, lambda m: m.pop('dtype')), 'meta.json is damaged'),
    'text for a tokenizer': (lambda d: change_meta(d, lambda m: m.update(tokenizer='char')),
                             'meta.json is damaged'),
    'text for a count': (lambda d: change_meta(d, lambda m: m['tokens'].update(train='9')),
                         'meta.json is damaged'),
    'broken number': (lambda d: change_meta(d, lambda m: m.update(vocab_size=92.0)),
                      'meta.json is damaged'),
    'folder': (train_bin_as_folder, 'Is a directory'),
}


@pytest.fixture
def broken(project):
    """The folder of a dataset `broken`, a copy of `topics` which a test may damage."""
    folder = project / 'data' / 'broken'
    shutil.copytree(project / 'data' / 'topics', folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize('kind', BAD_DATA)
def test_bad_data_is_an_error_before_the_model_is_built(
        project, broken, fails, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(train, 'GPT', None)  # building a model would fail with a TypeError
    harm, words = BAD_DATA[kind]
    harm(broken)
    before = snapshot(project / 'data')
    t0 = time.monotonic()
    assert words in fails('--dataset=broken')
    assert time.monotonic() - t0 < 10
    assert snapshot(project / 'data') == before and not os.path.exists(tmp_path / 'out')


@pytest.mark.parametrize('name', ['topics/', '../topics', '/tmp', '..', '.'])
def test_a_dataset_outside_data_is_refused(project, fails, tmp_path, name):
    before = snapshot(project / 'data')
    assert f'dataset={name}: dataset is the name of a folder in data/' in fails(f'--dataset={name}')
    assert snapshot(project / 'data') == before and not os.path.exists(tmp_path / 'out')


@pytest.mark.slow
def test_data_cut_short_while_training_is_exit_code_1(project, broken, tmp_path):
    out = tmp_path / 'out'
    child = start(project, *FAST, '--dataset=broken', '--max_iters=100000', f'--out_dir={out}')
    wait_for(child, '^saved .*ckpt.pt')
    os.truncate(broken / 'train.bin', 500)
    err = child.communicate(timeout=60)[1]
    assert child.returncode == 1 and 'Traceback' not in err
    assert 'cut short while in use' in err.splitlines()[-1]
    assert read_checkpoint(str(out / 'ckpt.pt'))['iter_num'] >= 3


def test_resume_refuses_other_data(train_run, fails, broken, tmp_path):
    train_run(*FAST, '--max_iters=3')
    before = snapshot(tmp_path)
    meta = json.loads((broken / 'meta.json').read_text())
    other = meta['tokenizer'] | {'chars': meta['tokenizer']['chars'][:-1] + 'é'}
    for change, words in (({'sha256': 'f' * 64}, 'is not the text that the checkpoint was'),
                          ({'tokens': {'train': 100, 'val': 100}}, 'is not the text that'),
                          ({'tokenizer': other}, 'is in other tokens than')):
        (broken / 'meta.json').write_text(json.dumps(meta | change))
        for split in meta['tokens'] if 'tokens' in change else ():
            os.truncate(broken / f'{split}.bin', 200)
        assert words in fails('--init_from=resume', '--max_iters=6', '--dataset=broken')
        assert snapshot(tmp_path) == before
        shutil.rmtree(broken)
        shutil.copytree(broken.parent / 'topics', broken)


def test_data_is_known_by_its_content_and_not_by_its_name(train_run, broken, tmp_path):
    """A renamed dataset resumes; another text in the same tokens can be evaluated."""
    train_run(*FAST, '--train_iters=3')
    assert train_run('--init_from=resume', '--train_iters=3', '--dataset=broken')['iter_num'] == 6
    before = snapshot(tmp_path)
    meta = json.loads((broken / 'meta.json').read_text())
    (broken / 'meta.json').write_text(json.dumps(meta | {'sha256': 'f' * 64}))
    train_run('--init_from=resume', '--eval_only=True', '--dataset=broken')
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGHUP, 129),
                                          (signal.SIGUSR1, 138)])
def test_an_output_that_goes_away_ends_no_run_and_a_signal_saves_it(project, tmp_path, number,
                                                                    code):
    out = tmp_path / 'out'
    child = start(project, *FAST, '--max_iters=100000', '--eval_interval=50000',
                  '--peak_tflops=1', f'--out_dir={out}')
    wait_for(child, '^step=3/')
    child.stdout.close()  # as if `tee` or `head` had ended
    seen = len(metrics(out)[0])
    deadline = time.monotonic() + 30
    while len(metrics(out)[0]) < seen + 20 and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(number)
    err = child.stderr.read()
    assert child.wait(60) == code and 'Traceback' not in err and 'BrokenPipe' not in err
    assert err.count('stopping after this update; Ctrl-C again quits without saving') == 1
    assert load(out)['iter_num'] == metrics(out)[0][-1]['step'] >= seen + 20


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_a_run_whose_output_is_on_a_full_disk_ends_well(project, tmp_path):
    with open('/dev/full', 'w') as full:
        done = subprocess.run(
            [sys.executable, str(project / 'train.py'), *FAST, '--max_iters=3',
             '--peak_tflops=1', f'--out_dir={tmp_path / "out"}'],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == '' and load(tmp_path / 'out')['iter_num'] == 3


def test_a_signal_that_was_ignored_stays_ignored(project, tmp_path):
    child = start(project, *FAST, '--max_iters=100000', '--eval_interval=50000',
                  '--peak_tflops=1', f'--out_dir={tmp_path / "out"}',
                  preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for(child, '^step=3/')
    child.send_signal(signal.SIGHUP)
    wait_for(child, r'^step=\d*50/')
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    assert child.returncode == 143


def test_main_puts_signal_handlers_and_output_back(tmp_path):
    before = [signal.getsignal(number) for number in SIGNALS], sys.stdout
    train.main([*FAST, '--max_iters=1', '--peak_tflops=1', f'--out_dir={tmp_path / "out"}'])
    assert ([signal.getsignal(number) for number in SIGNALS], sys.stdout) == before


def test_what_a_cut_off_save_has_left_is_removed(train_run, tmp_path):
    (tmp_path / 'out').mkdir()
    for name in ('ckpt.pt.123.tmp', 'model.pth.99.tmp', 'ckpt_prev.pt.tmp', 'mine.tmp'):
        (tmp_path / 'out' / name).write_bytes(b'half')
    train_run(*FAST, '--max_iters=3')
    assert [f for f in os.listdir(tmp_path / 'out') if 'tmp' in f] == ['mine.tmp']


def test_a_deleted_out_dir_is_made_again(train_run, tmp_path, monkeypatch):
    out, real, calls = tmp_path / 'out', train.evaluate, []

    def evaluate(*arguments):
        calls.append(1)
        if len(calls) == 3:  # in the evaluation after the first save
            shutil.rmtree(out)
        return real(*arguments)
    monkeypatch.setattr(train, 'evaluate', evaluate)
    assert train_run(*FAST, '--max_iters=6')['iter_num'] == 6
    assert load(out, 'model.pth')['iter_num'] and metrics(out)[1][-1]['step'] == 6


def test_resume_refuses_another_optimizer_and_weights_alone(train_run, fails, tmp_path):
    train_run(*FAST, '--max_iters=3')
    before = snapshot(tmp_path)
    for argument, words in (('--optimizer=muon', 'resume with its --optimizer'),
                            ('--ckpt=model.pth', 'holds only weights')):
        assert words in fails('--init_from=resume', '--max_iters=6', argument)
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize('arguments', [
    ['--init_from=resume'], ['--device=cuda'], ['--batch_size=-1', '--top_k=3'],
    ['config/none.py'], ['--init_from=gpt3'], [f'--seed={2**64}'],
    ['--backend=tcp'], ['--compile=maybe'], ['--min_lr=1'],
    ['--timeout_s=100000000000000'], ['--dtype=int4'], ['--parallel=tensor']])
def test_user_mistakes_change_nothing(project, fails, tmp_path, monkeypatch, arguments):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    before = snapshot(project)
    t0 = time.monotonic()
    fails(*arguments)
    assert time.monotonic() - t0 < 10
    assert snapshot(project) == before and os.listdir(tmp_path) == []


@pytest.mark.slow
def test_out_of_memory_is_one_line(project, tmp_path):
    config = tmp_path / 'little.py'
    config.write_text('import resource\nn_embd = 5000\n'
                      'resource.setrlimit(resource.RLIMIT_AS, (5 * 10**9, 5 * 10**9))\n')
    _, err = script(project, 'train.py', *TINY, config, f'--out_dir={tmp_path / "out"}', code=1)
    assert err.splitlines()[-1].startswith('error: out of memory, try --batch_size=')
    assert 'Traceback' not in err


@pytest.mark.slow
def test_ranks_with_different_data_are_refused(project, tmp_path, text):
    (tmp_path / 'others.txt').write_text(text.read_text()[:100_000])
    build.write_dataset('others', str(tmp_path / 'others.txt'), 'char')
    config = tmp_path / 'two.py'
    config.write_text('import os\ndataset = ["topics", "others"][int(os.environ["RANK"])]\n')
    tiny = [a for a in TINY if 'dataset' not in a]
    _, err = script(project, 'train.py', *tiny, str(config), f'--out_dir={tmp_path / "out"}',
                    nproc=2, code=1)
    assert 'and not the same for others: prepare it alike' in err
    assert not (tmp_path / 'out').exists()


def test_a_user_mistake_in_a_real_process_is_one_line(project, tmp_path):
    _, err = script(project, 'train.py', *TINY, '--device=cuda', cwd=tmp_path, code=2,
                    env={'CUDA_VISIBLE_DEVICES': ''})
    assert err.splitlines()[-1].startswith('error: ') and 'Traceback' not in err
    assert os.listdir(tmp_path) == []


def test_a_model_that_can_never_fit_is_refused_with_its_size(fails, tmp_path, monkeypatch, text):
    monkeypatch.setattr('configurator.total_memory', lambda device: 10**9)
    # weights of the blocks, the embeddings and the head; 16 bytes each in training
    n = 12 * 2 * 2048**2 + (2 * len(set(text.read_text())) + 32) * 2048
    err = fails('--n_embd=2048', '--tie_weights=False')
    assert f'a model of {n / 1e6:.0f}M parameters takes {16 * n / 1e9:.1f} GB' in err
    assert 'cpu has 1.0 GB' in err and os.listdir(tmp_path) == []


def test_a_finished_run_says_so_before_anything_else(train_run, tmp_path, capsys):
    train_run(*FAST, '--max_iters=3')
    capsys.readouterr()
    before = snapshot(tmp_path)
    train_run('--init_from=resume')
    assert re.fullmatch('nothing to do: the run ended at step 3, .*\n', capsys.readouterr().out)
    assert snapshot(tmp_path) == before


def test_settings_are_printed_and_written_so_that_runs_can_be_told_apart(
        train_run, tmp_path, capsys):
    train_run(*FAST, '--max_iters=3', '--weight_decay=0.25')
    lines = re.search('^settings:(.*(\n  .*)*)', capsys.readouterr().out, re.M)[0].splitlines()
    assert len(lines) > 1 and len(lines[0]) < 80
    line = ' '.join(lines).split()
    assert 'weight_decay=0.25' in line and f'out_dir={tmp_path / "out"}' in line
    assert not [word for word in line if word.startswith('beta1')]  # a default
    saved = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert re.fullmatch(r'[0-9a-f]{8}-\d+-4x32', saved.pop('evaluated_on'))  # a batch of 4 windows
    assert saved == load(tmp_path / 'out')['config'] and saved['weight_decay'] == 0.25


def test_one_note_says_why_there_is_no_plot(train_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    train_run(*FAST, '--max_iters=6')
    assert capsys.readouterr().out.count('note: loss.png is switched off: ') == 1


@pytest.mark.parametrize('name', ['out', 'out/model.pth', 'out/ckpt.pt'])
def test_a_run_starts_from_the_weights_of_another(train_run, tmp_path, capsys, name):
    modern = '--rotary=True', '--qk_norm=True', '--activation=relu2', '--tie_weights=False'
    first = train_run(*FAST, *modern, '--max_iters=30', '--learning_rate=0.01')
    capsys.readouterr()
    small = [a for a in FAST if not re.match('--(n_|block)', a)]
    train.main([*small, '--max_iters=3', f'--init_from={tmp_path / name}', '--learning_rate=1e-9',
                f'--out_dir={tmp_path / "next"}'])
    gc.collect()
    second = load(tmp_path / 'next')
    assert second['model_args'] == first['model_args'] and second['iter_num'] == 3
    for key, tensor in load(tmp_path / 'out', name[4:] or 'model.pth')['model'].items():
        torch.testing.assert_close(second['model'][key], tensor, atol=1e-6, rtol=1e-6)
    assert f'init_from={tmp_path / name}' in capsys.readouterr().out


def test_weights_of_another_alphabet_or_shape_are_refused(train_run, fails, tmp_path, text):
    train_run(*FAST, '--max_iters=3')
    source = f'--init_from={tmp_path / "out"}'
    other = text.read_text().replace("'", '\u2019')
    (tmp_path / 'other.txt').write_text(other, encoding='utf-8')
    build.write_dataset('other', str(tmp_path / 'other.txt'), 'char')
    err = fails(*FAST, source, '--dataset=other', out=tmp_path / 'next')
    assert 'other tokens than' in err and f'--tokenizer={tmp_path / "out"}' in err
    assert 'n_layer=3 but the model' in fails(*FAST, source, '--n_layer=3', out=tmp_path / 'next')
    assert not (tmp_path / 'next').exists()


def test_a_run_with_fsdp_goes_on_in_one_process_if_told_to(train_run, fails, tmp_path):
    checkpoint = train_run(*FAST, '--max_iters=3')
    checkpoint['config']['parallel'] = 'fsdp'
    torch.save(checkpoint, tmp_path / 'out' / 'ckpt.pt')
    assert 'use --parallel=ddp' in fails('--init_from=resume', '--max_iters=6')
    resumed = train_run('--init_from=resume', '--max_iters=6', '--parallel=ddp')
    assert resumed['config']['parallel'] == 'ddp'


# ---- small mistakes that no other test would notice

@pytest.mark.parametrize('world_size, seconds, exits', [
    (1, 0.1, [130]), (2, 0.1, []), (2, 0.9, []), (2, 1.1, [130])])
def test_a_second_ctrl_c_exits_but_torchruns_echo_of_the_first_does_not(
        monkeypatch, world_size, seconds, exits):
    process = Process(torch.device('cpu'), torch.float32, world_size=world_size)
    codes, now = [], 5.0
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # xdist's processes ignore it
    try:
        with monkeypatch.context() as patch, train.catch_signals(process) as caught:
            patch.setattr(time, 'monotonic', lambda: now)
            patch.setattr(os, '_exit', codes.append)
            signal.raise_signal(signal.SIGINT)
            now += seconds
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(caught) == [signal.SIGINT] and codes == exits


def test_a_new_run_skips_data_too(train_run, read_at):
    assert train_run(*FAST, '--skip_batches=3', '--train_iters=2')['position'] == (3 + 2) * 4
    assert read_at == [12, 16]
    resumed = train_run('--init_from=resume', '--skip_batches=4', '--train_iters=1')
    assert resumed['position'] == (4 + 3) * 4 and read_at[2:] == [24]


def test_the_position_in_the_data_counts_every_micro_batch(train_run, read_at):
    train_run(*FAST, '--gradient_accumulation_steps=2', '--train_iters=3')
    assert read_at == [0, 4, 8, 12, 16, 20]
    read_at.clear()
    resumed = train_run('--init_from=resume', '--train_iters=1', '--skip_batches=5')
    assert read_at == [(3 + 5) * 8, (3 + 5) * 8 + 4] and resumed['position'] == (4 + 5) * 8


def test_ranks_that_resume_at_different_steps_are_refused(train_run, fails, tmp_path, monkeypatch):
    train_run(*FAST, '--train_iters=3')
    before = snapshot(tmp_path)
    # as if rank 1 saw another folder of this name, whose run has gone on
    monkeypatch.setattr(Process, 'gather', lambda self, x: [x, 6] if x == 3 else [x])
    assert 'ranks resume at steps [3, 6]: do all see the same' in fails('--init_from=resume')
    assert snapshot(tmp_path) == before


def test_rows_of_metrics_are_json_also_after_an_overflow(tmp_path):
    rows = runs.Metrics(str(tmp_path), -1)
    rows.write(step=1, norm=float('inf'), loss=float('nan'), mfu=None, dt=0.5)
    with open(rows.path, encoding='utf-8') as f:
        row = json.loads(f.read(), parse_constant=pytest.fail)  # it is called for NaN and Infinity
    assert row == {'step': 1, 'norm': None, 'loss': None, 'mfu': None, 'dt': 0.5}


def test_resuming_renames_nothing_that_is_as_old_as_the_checkpoint(train_run, tmp_path):
    train_run(*FAST, '--train_iters=6')
    before = set(os.listdir(tmp_path / 'out'))
    train_run('--init_from=resume', '--train_iters=1')
    assert set(os.listdir(tmp_path / 'out')) == before


def test_weights_are_not_trained_on_longer_sequences_than_before(train_run, fails, tmp_path):
    train_run(*FAST, '--rotary=True', '--max_iters=3')  # rotary would take any length in silence
    err = fails(f'--init_from={tmp_path / "out"}', '--block_size=64', out=tmp_path / 'next')
    assert 'block_size=64 but the model' in err and not (tmp_path / 'next').exists()


@pytest.fixture
def interrupted(fails, monkeypatch):
    """A function that runs train.main and ends it by a signal in its third update."""
    def go(*arguments, **more):
        real = Tokens.train_batch

        def train_batch(self, first, *rest):
            if first == 8:  # the third batch of 4
                os.kill(os.getpid(), signal.SIGTERM)
            return real(self, first, *rest)
        with monkeypatch.context() as patch:
            patch.setattr(Tokens, 'train_batch', train_batch)
            fails(*FAST, '--eval_interval=100', *arguments, code=143, **more)
    return go


def test_a_run_stopped_before_its_first_evaluation_can_be_sampled(
        interrupted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, 'RUNS_LOG', str(tmp_path / 'runs.log'))
    interrupted()
    out = tmp_path / 'out'
    (tmp_path / 'empty').mkdir()
    with open(runs.RUNS_LOG, 'a') as f:
        f.write(f'{tmp_path / "empty"}\n')  # a run that has saved nothing
    for arguments in ([], [f'--out_dir={out}'], [f'--init_from={out}']):
        configure('sample', [*arguments, '--max_new_tokens=3', '--num_samples=1'])
        capsys.readouterr()
        sample.main()
        text = capsys.readouterr().out
        assert f'last weights: {out}/ckpt.pt, step 3' in text
    configure('sample', [])


def test_a_run_of_a_few_updates_without_an_evaluation_leaves_no_copy(
        interrupted, train_run, tmp_path, capsys):
    out = tmp_path / 'out'

    def copies(**changes):
        """Interrupt a run, change its checkpoint, start anew; return the names of the copies."""
        interrupted()
        checkpoint = load(out) | changes
        torch.save({k: v for k, v in checkpoint.items() if v is not None}, out / 'ckpt.pt')
        train_run(*FAST, '--max_iters=2')
        kept = [name for name in os.listdir(tmp_path) if name != 'out']
        for name in ('out', *kept):
            shutil.rmtree(tmp_path / name)
        return kept
    assert copies() == []
    assert f'note: removed {out}/ckpt.pt of a run' in capsys.readouterr().out
    assert len(copies(train_seconds=3600.0)) == 1  # an hour of work
    assert len(copies(train_seconds=None)) == 1  # nanoGPT's, for example


def test_metrics_of_trained_weights_are_kept_without_their_checkpoints(train_run, tmp_path):
    out = tmp_path / 'out'
    train_run(*FAST, '--max_iters=3')
    for name in ('ckpt.pt', 'model.pth'):
        (out / name).unlink()
    before = (out / 'metrics.jsonl').read_bytes()
    train_run(*FAST, '--max_iters=2')
    kept, = [name for name in os.listdir(tmp_path) if name != 'out']
    assert (tmp_path / kept / 'metrics.jsonl').read_bytes() == before


def test_what_fails_beside_the_training_is_noted_once_and_switched_off(
        train_run, tmp_path, monkeypatch, capsys):
    def log(row, step):
        calls.append(step)
        raise BrokenPipeError(errno.EPIPE, 'Broken pipe')

    def draw_losses(out_dir):
        calls.append('plot')
        raise RuntimeError('latex was not found\non this machine')
    calls = []
    wandb = types.SimpleNamespace(init=lambda **settings: None, log=log)
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    monkeypatch.setattr(runs, 'draw_losses', draw_losses)
    assert train_run(*FAST, '--max_iters=6', '--wandb_log=True')['iter_num'] == 6
    out = capsys.readouterr().out
    assert calls == [0, 'plot']
    assert 'note: wandb is switched off: [Errno 32] Broken pipe\n' in out
    assert 'note: loss.png is switched off: latex was not found\n' in out
    assert [row['step'] for row in metrics(tmp_path / 'out')[1]] == [0, 3, 6]


def test_loss_png_shows_what_a_reader_wants_to_know(tmp_path, monkeypatch):
    figure = pytest.importorskip('matplotlib.figure')
    drawn = []
    monkeypatch.setattr(figure.Figure, 'savefig', lambda self, *a, **more: drawn.append(self))
    out = str(tmp_path)
    rows = [{'step': 0, 'train_loss': 9.0, 'val_loss': 9.0}, {'step': 1, 'loss': 8.0}]
    rows += [{'step': step, 'loss': 2.0 + 1 / step} for step in range(2, 21)]
    rows += [{'step': 10, 'train_loss': 2.0, 'val_loss': 2.2},
             {'step': 20, 'train_loss': 1.9, 'val_loss': 2.5}, {'step': 21, 'loss': None}]

    def write(count):
        text = '\n'.join(json.dumps(row) for row in rows[:count])
        (tmp_path / 'metrics.jsonl').write_text(text)
        runs.draw_losses(out)
    write(1)
    assert not drawn  # random weights alone make no picture
    write(len(rows))
    ax, = drawn[0].axes
    assert ax.get_title() == f'{out}: best val loss 2.2000 at step 10'
    words = [line.get_label().split(':')[0] for line in ax.lines]
    assert words == ['batch', 'train', 'val']
    assert [list(line.get_xdata()) for line in ax.lines] == [
        list(range(1, 21)), [10, 20], [10, 20]]
    bottom, top = ax.get_ylim()
    assert 1.5 < bottom < 1.9 and 2.5 < top < 4  # the steep fall at the beginning is cut off


def test_main_runs_in_a_thread_without_signals(tmp_path):
    failures = []

    def work():
        try:
            train.main([*FAST, '--max_iters=2', f'--out_dir={tmp_path / "out"}'])
        except BaseException as e:
            failures.append(e)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    gc.collect()
    assert not failures and load(tmp_path / 'out')['iter_num'] == 2


def test_an_empty_out_dir_is_refused_before_anything_is_computed(fails, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, 'setup', None)  # would fail with a TypeError
    assert 'out_dir is empty' in fails('--out_dir=')
    assert os.listdir(tmp_path) == []
