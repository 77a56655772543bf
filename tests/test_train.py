"""train.py: batches, updates, evaluation, whole runs, and runs in many processes."""
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import model as quill_model
import sample
import train
from configurator import Process, configure
from data.dataset import Tokens, divide
from data.tokenizers import tokenizer_from_dict
from model import GPT, GPTConfig, orthogonalize
from train import evaluate, lr_factor, make_learner, make_optimizers, update

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import TINY, metrics, same_tensors, script, snapshot, unigram_entropy


@pytest.fixture
def configured():
    """A function that sets settings of train.py; after the test they have their defaults again."""
    yield lambda *arguments: configure('train', [*arguments])
    configure('train', [])


@pytest.fixture
def tokens(tmp_path):
    """A function that returns Tokens whose 1000 ids are their own positions."""
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / 'x.bin')
    return lambda block_size=16: Tokens(str(tmp_path / 'x.bin'), block_size)


@pytest.fixture
def small_learner(configured, process):
    """A function that returns the Learner of a small model, the same one for the same settings."""
    def make(*arguments, process=process, **shape):
        configured('--learning_rate=1e-2', '--weight_decay=0.1', *arguments)
        torch.manual_seed(0)
        shape = dict(block_size=16, vocab_size=1000, n_layer=2, n_head=2, n_embd=32) | shape
        return make_learner(GPT(GPTConfig(**shape)), process)
    return make


# -----------------------------------------------------------------------------
# batches

def test_an_epoch_takes_every_window_once_at_a_random_offset(tokens, process):
    data = tokens()
    n = data.windows_per_epoch
    epochs = []
    for epoch in range(3):
        x, y = data.train_batch(epoch * n, n, process)
        assert torch.equal(y, x + 1)  # the token ids are their positions
        # a compiled model would be compiled again for another layout
        assert x.is_contiguous() and y.is_contiguous()
        starts = x[:, 0].sort().values
        assert torch.equal(starts.diff(), torch.full((n - 1,), 16))
        assert starts[-1] + 16 <= 999
        epochs.append(x[:, 0])
    assert n * 16 > 1000 - 2 * 16 - 1
    assert len({e.min().item() for e in epochs}) > 1  # another offset
    assert not torch.equal(epochs[0].argsort(), epochs[1].argsort())  # another order


def test_batches_depend_only_on_seed_and_position(tokens, process):
    a, b = tokens(), tokens()
    whole, _ = a.train_batch(100, 12, process)
    b.train_batch(500, 3, process)
    pieces = [b.train_batch(100 + i, 3, process)[0] for i in (0, 3, 6, 9)]
    assert torch.equal(torch.cat(pieces), whole)
    other = dataclasses.replace(process, seed=2)
    assert not torch.equal(tokens().train_batch(100, 12, other)[0], whole)


def resident(pid='self'):
    """Return the resident memory of a process in bytes."""
    with open(f'/proc/{pid}/statm') as f:
        return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')


linux = pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='reads /proc')


@linux
def test_a_file_of_1_gb_is_not_loaded(tmp_path, process):
    with open(tmp_path / 'x.bin', 'wb') as f:
        f.truncate(10**9)
    before = resident()
    data = Tokens(str(tmp_path / 'x.bin'), 1024, vocab_size=50257)
    data.check()
    for i in range(50):
        data.train_batch(12 * 1000 * i, 12, process)
    assert resident() - before < 100e6


@linux
@pytest.mark.slow
def test_memory_does_not_grow_over_2000_updates(project, tmp_path):
    command = [sys.executable, '-u', str(project / 'train.py'), *TINY, '--max_iters=2000',
               '--log_interval=100', '--eval_interval=500', f'--out_dir={tmp_path / "out"}']
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    sizes = {}
    for line in running.stdout:
        if line.startswith('step=') and 'dt=' in line:
            sizes[int(line[5:line.index('/')])] = resident(running.pid)
    assert running.wait() == 0 and 1900 in sizes
    assert sizes[1900] < 1.05 * sizes[600]  # both include the first evaluations and saves


def test_exactly_one_window_of_tokens_trains(tmp_path, process, capsys):
    np.arange(17, dtype=np.uint16).tofile(tmp_path / 'x.bin')
    data = Tokens(str(tmp_path / 'x.bin'), 16)
    x, y = data.train_batch(5, 2, process)
    assert x.tolist() == [list(range(16))] * 2
    assert y[0, -1] == 16
    assert data.eval_starts(0) == [0]
    with pytest.raises(SystemExit):
        Tokens(str(tmp_path / 'x.bin'), 17)
    assert 'fewer than block_size + 1' in capsys.readouterr().err


def share(micro_batches, batch_size, rank, world_size):
    """Return what divide gives to one rank of many."""
    process = Process(torch.device('cpu'), torch.float32, rank=rank, local_rank=rank,
                      world_size=world_size)
    return divide(micro_batches, batch_size, process)


@pytest.mark.parametrize('accumulation, batch_size, world_size', [
    (1, 8, 2), (4, 8, 2), (6, 4, 4), (3, 8, 8), (40, 12, 8), (1, 8, 1)])
def test_every_sequence_is_on_exactly_one_rank(accumulation, batch_size, world_size):
    seen = []
    for rank in range(world_size):
        micro_batches, rows, parts = share(accumulation, batch_size, rank, world_size)
        for i in micro_batches:
            seen += [i * batch_size + row for row in rows]
        assert len(rows) * parts == batch_size
        assert len(micro_batches) * len(rows) * world_size == accumulation * batch_size
    assert sorted(seen) == list(range(accumulation * batch_size))


def test_an_indivisible_batch_is_an_error_with_the_numbers(capsys):
    with pytest.raises(SystemExit) as e:
        share(2, 9, 0, 4)
    err = capsys.readouterr().err
    assert e.value.code == 2
    assert all(n in err for n in ('=2', '=9', '4 processes', 'multiple of 2'))


# -----------------------------------------------------------------------------
# the update

@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_one_update_changes_every_parameter(small_learner, tokens, process, optimizer):
    learner = small_learner(f'--optimizer={optimizer}', '--learning_rate=1e-3',
                            '--weight_decay=0', dropout=0.1)
    before = {k: v.clone() for k, v in learner.model.state_dict().items()}
    t0 = time.perf_counter()
    row, stop, bad = update(learner, [(1, *tokens().train_batch(0, 8, process))], 1.0)
    seconds = time.perf_counter() - t0
    for k, v in learner.model.state_dict().items():
        assert not torch.equal(v, before[k]), k
    assert abs(row['loss'] - math.log(1000)) < 0.2
    assert row['norm'] > 0 and row['dtf'] > 0 and row['dtb'] > 0
    assert row['dtf'] + row['dtb'] < seconds
    assert not stop and not bad


def test_micro_batches_equal_one_large_batch(small_learner, tokens, process):
    x, y = tokens().train_batch(0, 12, process)
    results = []
    for k in (1, 3, 12):
        learner = small_learner(f'--gradient_accumulation_steps={k}')
        row, stop, bad = update(learner, [(0, a, b) for a, b in zip(x.chunk(k), y.chunk(k))], 1.0)
        results.append((row['loss'], row['norm'], learner.model.state_dict()))
    expected_loss, expected_norm, expected = results[0]
    for loss, norm, state in results[1:]:
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)
        # AdamW's first step is lr * sign(gradient): few gradients are only rounding noise
        for k, v in state.items():
            assert ((v - expected[k]).abs() > 1e-4).float().mean() < 2e-3, k


def test_the_gradient_norm_and_clipping_equal_the_formula(small_learner, tokens, process):
    batch = [(0, *tokens().train_batch(0, 4, process))]
    model = small_learner().model
    _, loss = model(*batch[0][1:])
    loss.backward()
    squares = sum(p.grad.double().square().sum().item() for p in model.parameters())
    expected = math.sqrt(squares)
    changes = []
    for clip in (0.0, expected / 4):
        learner = small_learner(f'--grad_clip={clip}')
        learner.optimizers = [torch.optim.SGD(learner.params, lr=1.0)]
        before = learner.model.transformer.wpe.weight.detach().clone()
        row, stop, bad = update(learner, batch, factor=0.5)
        assert row['norm'] == pytest.approx(expected, rel=1e-5)
        changes.append(learner.model.transformer.wpe.weight.detach() - before)
    assert torch.allclose(changes[1] * 4, changes[0], rtol=1e-3, atol=1e-6)
    # SGD with lr = 1.0 * factor
    assert torch.allclose(changes[0], -0.5 * model.transformer.wpe.weight.grad, atol=1e-6)


def test_only_matrices_decay_and_muon_gets_those_of_the_blocks(configured, process):
    model = GPT(GPTConfig(block_size=128, vocab_size=65, n_layer=6, n_head=6, n_embd=384,
                          bias=False))
    configured('--weight_decay=0.3')
    adamw, = make_optimizers(model, process)
    counts = [(group['weight_decay'], len(group['params']),
               sum(p.numel() for p in group['params'])) for group in adamw.param_groups]
    assert counts == [(0.3, 2, 74_112), (0.3, 24, 10_616_832), (0.0, 13, 4_992)]
    assert type(adamw) is torch.optim.AdamW and adamw.defaults['fused']
    configured('--optimizer=muon', '--muon_lr=0.07')
    adamw, muon = make_optimizers(model, process)
    assert isinstance(muon, quill_model.Muon)
    assert len(muon.param_groups[0]['params']) == 24
    assert muon.defaults['lr'] == 0.07
    names = {id(p): n for n, p in model.named_parameters()}
    assert all('.h.' in names[id(p)] for p in muon.param_groups[0]['params'])
    assert sorted(len(group['params']) for group in adamw.param_groups) == [2, 13]


def test_each_learning_rate_is_its_peak_times_the_factor(small_learner, tokens, process):
    learner = small_learner('--optimizer=muon', '--learning_rate=0.01', '--muon_lr=0.07')
    for factor in (1.0, 0.25, 0.5):
        row, stop, bad = update(learner, [(0, *tokens().train_batch(0, 4, process))], factor)
        assert row['lr'] == pytest.approx(0.01 * factor)
        rates = [[group['lr'] for group in opt.param_groups] for opt in learner.optimizers]
        assert rates == [[0.01 * factor] * 2, [0.07 * factor]]


def test_embeddings_and_output_matrix_may_have_learning_rates_of_their_own(
        small_learner, tokens, process, configured, capsys):
    def rates(*args):
        learner = small_learner('--learning_rate=0.01', *args, tie_weights=False)
        update(learner, [(0, *tokens().train_batch(0, 4, process))], 0.5)
        names = {id(p): name for name, p in learner.model.named_parameters()}
        return {names[id(p)]: group['lr'] for opt in learner.optimizers
                for group in opt.param_groups for p in group['params']}
    for args in (), ('--optimizer=muon', '--muon_lr=0.01'):
        found = rates('--tie_weights=False', '--embed_lr=0.3', '--head_lr=0.2', *args)
        assert found.pop('transformer.wte.weight') == found.pop('transformer.wpe.weight') == 0.15
        assert found.pop('lm_head.weight') == 0.1
        assert set(found.values()) == {0.005} and len(found) > 10
    assert set(rates('--tie_weights=False').values()) == {0.005}
    with pytest.raises(SystemExit):
        configure('train', ['--head_lr=0.2'], check=train.check_settings)
    assert 'head_lr=0.2 needs --tie_weights=False' in capsys.readouterr().err


def polar(x):
    """Return x (..., rows, columns) with the polynomials of Muon applied to its singular values."""
    u, s, vt = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum(dim=-1, keepdim=True).sqrt() / 1.01
    for a, b, c in quill_model.POLAR_STEPS:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag_embed(s) @ vt


@pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='torch has it since 2.9')
def test_muon_equals_its_formula_and_has_torchs_momentum(process):
    shapes = [(96, 32), (32, 32), (128, 32), (32, 128), (96, 32), (32, 32)]
    torch.manual_seed(0)
    start = [torch.randn(s) for s in shapes]
    grads = [[torch.randn(s) for s in shapes] for _ in range(4)]
    grads[3][1][5] = 0  # this row's update stays what its momentum says
    lr, weight_decay = 0.02, 0.3

    expected = [t.double() for t in start]
    means = [torch.zeros(s, dtype=torch.float64) for s in shapes]
    theirs = torch.optim.Muon([torch.nn.Parameter(t.clone()) for t in start], momentum=0.9)
    for step in grads:
        for p, grad in zip(theirs.param_groups[0]['params'], step):
            p.grad = grad
        theirs.step()
        for t, mean, grad in zip(expected, means, step):
            mean.lerp_(grad.double(), 0.1)
            rows = polar(grad.double().lerp(mean, 0.9))
            rows /= rows.norm(dim=1, keepdim=True)
            t.mul_(1 - lr * weight_decay).add_(rows, alpha=-lr)

    for dtype in (torch.bfloat16, torch.float32):
        params = [torch.nn.Parameter(t.clone()) for t in start]
        ours = quill_model.Muon(params, lr, 0.9, weight_decay, dtype, process)
        for step in grads:
            for p, grad in zip(params, step):
                p.grad = grad
            ours.step()
        assert same_tensors(theirs.state_dict()['state'], ours.state_dict()['state'])
        for p, t, before in zip(params, expected, start):
            assert (p - t).abs().max() < (1e-4 if dtype == torch.float32 else 0.004)
            assert (t - before).abs().max() > 0.02


def test_muon_leaves_a_row_that_never_had_a_gradient(process):
    p = torch.nn.Parameter(torch.ones(4, 8))
    muon = quill_model.Muon([p], 0.02, 0.9, 0.0, torch.float32, process)
    p.grad = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    p.grad[2] = 0
    muon.step()
    assert torch.equal(p[2], torch.ones(8))
    lengths = (p - 1).norm(dim=1)
    assert lengths[[0, 1, 3]].tolist() == pytest.approx([0.02] * 3, rel=1e-4)


@pytest.mark.parametrize('rows', [48, 80])
def test_orthogonalize_equals_the_polynomials_of_the_singular_values(rows):
    x = torch.randn(3, rows, 80, generator=torch.Generator().manual_seed(0))
    expected = polar(x)
    assert torch.allclose(orthogonalize(x).double(), expected, atol=1e-4)
    assert torch.allclose(orthogonalize(x.mT).double(), expected.mT, atol=1e-4)


def test_the_polar_steps_are_the_best_approximations_of_one():
    """Each step has the smallest largest error on the range that the steps before have left.

    A best approximation a x + b x^3 + c x^5 of 1 reaches its largest error at four points with
    alternating signs (Remez): the ends of the range and the two extrema within.
    """
    low, high = 0.01, 1.0
    for step in quill_model.POLAR_STEPS:
        points = np.linspace(low, high, 4)
        for _ in range(50):
            system = np.stack([points, points**3, points**5, [1, -1, 1, -1]], axis=1)
            a, b, c, error = np.linalg.solve(system, np.ones(4))
            inner = np.sort(np.sqrt(np.roots([5 * c, 3 * b, a]).real))
            points = np.array([low, *inner, high])
        assert (round(a, 3), round(b, 3), round(c, 3)) == pytest.approx(step, abs=2e-3)
        low, high = 1 - abs(error), 1 + abs(error)


def test_orthogonalize_is_accurate_in_bfloat16():
    # the singular values of gradients differ by orders of magnitude
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(256, 256, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(1024, 256, generator=generator))
    x = (u * torch.logspace(0, -3, 256) @ v.T)[None]
    exact, y = orthogonalize(x), orthogonalize(x.bfloat16()).float()
    assert torch.linalg.svdvals(y).max() < 1.3
    assert torch.cosine_similarity(exact.flatten(), y.flatten(), dim=0) > 0.998


def test_sample_imports_nothing_that_only_torch_compile_needs(project, train_run, tmp_path):
    train_run('--optimizer=muon', '--rotary=True', '--max_iters=2')
    # Python prints a line on stderr for each imported module
    _, imports = script(project, 'sample.py', '--max_new_tokens=2', f'--out_dir={tmp_path / "out"}',
                        env={'PYTHONPROFILEIMPORTTIME': '1'})
    assert len(re.findall(r'\| +torch\n', imports)) == 1
    assert 'torch._dynamo' not in imports


def test_a_bad_gradient_never_reaches_the_weights(small_learner, tokens, process):
    learner = small_learner()
    before = {k: v.clone() for k, v in learner.model.state_dict().items()}
    learner.model.transformer.ln_f.weight.register_hook(lambda grad: grad * math.nan)
    row, stop, bad = update(learner, [(0, *tokens().train_batch(0, 4, process))], 1.0)
    assert bad == 'gradient norm'
    assert math.isfinite(row['loss']) and not math.isfinite(row['norm'])
    assert same_tensors(dict(learner.model.state_dict()), before)


# -----------------------------------------------------------------------------
# the schedule

def test_the_schedule_by_hand(configured):
    shape = ['--warmup_iters=4', '--max_iters=104', '--learning_rate=1e-3', '--min_lr=1e-4',
             '--decay_frac=0.5']
    configured(*shape)  # cosine is the default
    assert [lr_factor(it) for it in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert lr_factor(4) == 1
    assert lr_factor(29) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert lr_factor(54) == pytest.approx(0.55)
    assert lr_factor(104) == lr_factor(500) == pytest.approx(0.1)
    configured(*shape, '--lr_decay_iters=54')
    assert lr_factor(54) == pytest.approx(0.1)
    configured(*shape, '--lr_schedule=linear', '--max_iters=100')
    assert [lr_factor(it) for it in (4, 50, 75, 100)] == pytest.approx([1, 1, 0.55, 0.1])
    configured(*shape, '--decay_lr=False')
    assert lr_factor(0) == lr_factor(90) == 1


def test_an_added_schedule_is_accepted_used_and_listed_by_help(configured, monkeypatch, capsys):
    monkeypatch.setitem(train.SCHEDULES, 'sqrt', lambda it, end: 1 - math.sqrt(it / end))
    shape = ['--lr_schedule=sqrt', '--warmup_iters=4', '--max_iters=100', '--learning_rate=1e-3',
             '--min_lr=1e-4']
    configured(*shape)
    assert [lr_factor(it) for it in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    # from 1 down to min_lr / learning_rate
    assert [lr_factor(it) for it in (25, 64, 100)] == pytest.approx([0.55, 0.28, 0.1])
    configured(*shape, '--lr_decay_iters=400')
    assert [lr_factor(it) for it in (25, 100)] == pytest.approx([0.775, 0.55])
    with pytest.raises(SystemExit) as e:
        configured('--help')
    line = re.search('^  --lr_schedule=.*$', capsys.readouterr().out, re.M)[0]
    assert e.value.code == 0 and line.endswith(': cosine | linear | sqrt')


def test_a_schedule_of_another_name_is_refused(configured, capsys):
    with pytest.raises(SystemExit) as e:
        configured('--lr_schedule=sqrt')
    expected = 'error: lr_schedule=sqrt must be one of cosine, linear\n'
    assert e.value.code == 2 and capsys.readouterr().err == expected


# -----------------------------------------------------------------------------
# evaluation

def test_the_whole_split_is_evaluated_exactly_once(small_learner, tokens):
    learner = small_learner()
    model = learner.model
    model.eval()
    data = tokens()
    # by hand: windows side by side; the rest at the end has a full window of context
    ids = torch.arange(1000)

    def window(start):
        """Return the 16 losses of a window."""
        logits = model(ids[start:start + 16][None])[0][0]
        targets = ids[start + 1:start + 17]
        return torch.nn.functional.cross_entropy(logits, targets, reduction='none').tolist()
    losses = []
    with torch.no_grad():
        for start in range(0, 983, 16):
            losses += window(start)
        losses += window(983)[-(999 - len(losses)):]
    assert len(losses) == 999
    for eval_iters, batch_size in ((0, 7), (9, 7), (100, 64), (0, 1)):
        configure('train', [f'--eval_iters={eval_iters}', f'--batch_size={batch_size}'])
        assert evaluate(learner, data, eval_iters) == pytest.approx(np.mean(losses), abs=1e-5)
    assert model.training


def test_the_evaluation_before_training_is_short(train_run, monkeypatch, tmp_path):
    counts, real = [], Tokens.eval_batches
    monkeypatch.setattr(Tokens, 'eval_batches', lambda self, count, *more: (
        counts.append(count), real(self, count, *more))[1])
    for eval_iters, first in ((12, 10), (3, 3), (0, 10)):
        counts.clear()
        train_run(f'--eval_iters={eval_iters}', '--max_iters=1', '--batch_size=1',
                  out=tmp_path / f'out{eval_iters}')
        assert counts == [first] * 2 + [eval_iters] * 2


def test_a_min_lr_that_nobody_gave_follows_the_learning_rate(train_run, capsys):
    config = train_run('--learning_rate=3e-5', '--max_iters=2')['config']
    assert config['min_lr'] == pytest.approx(3e-6)
    settings = capsys.readouterr().out.split('settings:')[1].split('layers')[0]
    assert re.search(r' min_lr=3(\.0+5)?e-06\s', settings)
    with pytest.raises(SystemExit):
        train_run('--learning_rate=3e-5', '--min_lr=1e-4')
    assert 'min_lr=0.0001 is above learning_rate=3e-05' in capsys.readouterr().err


def test_fewer_windows_are_spread_evenly_over_the_split(tokens):
    starts = tokens().eval_starts(5)
    assert starts[0] == 0 and starts[-1] == 999 - 16
    assert set(np.diff(starts)) <= {245, 246}


def test_evaluation_and_sampling_change_no_weights(train_run, tmp_path):
    a = train_run(out=tmp_path / 'a')
    b = train_run('--eval_interval=3', '--sample_tokens=40', '--eval_iters=7', '--log_interval=2',
                  out=tmp_path / 'b')
    assert same_tensors(a['model'], b['model'])
    assert same_tensors(a['optimizer'], b['optimizer'])


# -----------------------------------------------------------------------------
# whole runs

def test_a_small_model_gets_far_below_the_unigram_entropy(train_run, tmp_path, text):
    train_run('--n_embd=64', '--batch_size=16', '--block_size=64', '--max_iters=200',
              '--eval_interval=200', '--eval_iters=15', '--dropout=0.0', '--learning_rate=3e-3',
              '--log_interval=50', '--optimizer=muon', '--rotary=True', '--qk_norm=True',
              '--zero_init=True')
    (first, last) = metrics(tmp_path / 'out')[1]
    characters = text.read_text()
    entropy = unigram_entropy(characters)
    assert abs(first['val_loss'] - math.log(len(set(characters)))) < 0.2
    assert last['val_loss'] < entropy - 1.3, (last, entropy)  # bigrams alone have -0.85


@pytest.mark.parametrize('more', [
    [], ['--optimizer=muon', '--gradient_accumulation_steps=2', '--rotary=True'],
    ['--dtype=bfloat16', '--optimizer=muon']])
def test_resume_is_bit_identical(train_run, tmp_path, more):
    whole = train_run(*more, out=tmp_path / 'whole')
    for n in (5, 3, 2):  # 10 = 5 + 3 + 2, of which steps 3 and 8 are not at an evaluation
        start = more if n == 5 else ['--init_from=resume']
        parts = train_run(f'--train_iters={n}', *start, out=tmp_path / 'parts')
    assert whole['iter_num'] == parts['iter_num'] == 10
    for key in ('model', 'optimizer', 'scaler', 'best_val_loss', 'model_args', 'tokenizer', 'data'):
        assert same_tensors(whole[key], parts[key]), key
    (a, a_eval), (b, b_eval) = metrics(tmp_path / 'whole'), metrics(tmp_path / 'parts')
    keys = ('step', 'loss', 'norm', 'lr')
    assert [[r[k] for k in keys] for r in a] == [[r[k] for k in keys] for r in b]
    a_losses, b_losses = ({r['step']: r['val_loss'] for r in rows} for rows in (a_eval, b_eval))
    assert a_losses.items() <= b_losses.items()
    assert len(b_losses) == len(b_eval)  # no step twice
    seconds = [r['train_seconds'] for r in b_eval]
    assert seconds == sorted(seconds) and seconds[0] < seconds[-1]  # counted on


def test_a_seed_decides_every_tensor(train_run, tmp_path):
    a, b, c = (train_run('--max_iters=3', f'--seed={seed}', out=tmp_path / str(i))
               for i, seed in enumerate((1, 1, 2)))
    assert same_tensors(a['model'], b['model'])
    assert not same_tensors(a['model'], c['model'])


def test_exactly_max_iters_updates_and_the_last_weights_are_evaluated_and_saved(
        train_run, tmp_path, capsys):
    checkpoint = train_run('--max_iters=7')
    logs, evals = metrics(tmp_path / 'out')
    assert [r['step'] for r in logs] == list(range(1, 8))
    assert [r['step'] for r in evals] == [0, 5, 7]
    assert checkpoint['iter_num'] == 7
    assert checkpoint['optimizer'][0]['state'][0]['step'] == 7
    assert logs[0]['lr'] > 0
    assert checkpoint['best_val_loss'] == min(r['val_loss'] for r in evals)
    out = capsys.readouterr().out
    assert [int(s) for s in re.findall(r'at step (\d+), after', out)] == [0, 5, 7]
    assert out.count('What is an LLM?') == 3
    assert out.count('sample of random weights') == out.count('random weights at step 0') == 1
    assert out.count('legend of the log lines') == 1
    assert os.path.exists(tmp_path / 'out' / 'model.pth')
    assert '--init_from=resume' not in out.split('eta=')[-1]


def test_resuming_drops_the_metrics_after_the_checkpoint(train_run, tmp_path):
    train_run('--train_iters=5')
    with open(tmp_path / 'out' / 'metrics.jsonl', 'a') as f:
        # a crash leaves rows after the checkpoint, and lines that are cut short
        f.write('{"step": 3, "l\n{"step": 6, "loss": 99}\n5\n{"step": 7, "lo')
    train_run('--init_from=resume')
    assert [r['step'] for r in metrics(tmp_path / 'out')[0]] == list(range(1, 11))


def test_settings_come_from_the_checkpoint_unless_given(train_run, tmp_path, capsys):
    train_run('--train_iters=5', '--learning_rate=0.002')
    capsys.readouterr()
    checkpoint = train_run('--init_from=resume', '--weight_decay=0.3', '--max_iters=12')
    config = checkpoint['config']
    assert (config['learning_rate'], config['weight_decay'], config['n_embd']) == (0.002, 0.3, 32)
    assert checkpoint['iter_num'] == 12
    assert checkpoint['optimizer'][0]['param_groups'][0]['weight_decay'] == 0.3
    out = capsys.readouterr().out
    assert '\n  weight_decay=0.3\n' in out and '\n  max_iters=12\n' in out
    # a finished run says so
    train_run('--init_from=resume')
    assert 'nothing to do' in capsys.readouterr().out
    # settings that contradict the checkpoint's model are refused
    with pytest.raises(SystemExit) as e:
        train_run('--init_from=resume', '--n_layer=3', '--max_iters=14')
    err = capsys.readouterr().err
    assert e.value.code == 2 and 'n_layer=3' in err and 'n_layer=2' in err


def test_starting_anew_destroys_nothing(train_run, tmp_path, capsys):
    out = tmp_path / 'out'
    train_run('--max_iters=6', '--eval_interval=3', '--learning_rate=1', '--warmup_iters=0')
    (out / 'notes.txt').write_text('not from quill')  # the whole folder is kept, with any file
    (out / 'more').mkdir()
    (out / 'more' / 'notes.txt').write_text('in a folder, too')
    before = {os.path.relpath(path, out): content for path, content in snapshot(out).items()}
    assert {'ckpt.pt', 'ckpt_prev.pt', 'model.pth', 'metrics.jsonl'} < set(before)
    capsys.readouterr()
    second = train_run('--max_iters=5', '--seed=9')
    kept = [name for name in os.listdir(tmp_path) if name != 'out']
    assert len(kept) == 1 and re.fullmatch(r'out-6-\d{8}-\d{6}', kept[0])
    notes = [line for line in capsys.readouterr().out.splitlines() if 'renamed' in line]
    earlier = tmp_path / kept[0]
    assert notes == [f'{out} belongs to an earlier run: renamed to {earlier}. '
                     f'To delete it: rm -r {earlier}']
    assert {os.path.relpath(path, earlier): content
            for path, content in snapshot(earlier).items()} == before
    # the new folder holds the new run only
    assert second['iter_num'] == 5 and not os.path.exists(out / 'notes.txt')
    assert [r['step'] for r in metrics(out)[0]] == [1, 2, 3, 4, 5]
    # an even newer run leaves both as they are
    before = snapshot(tmp_path)
    train_run('--max_iters=1')
    newest, = set(os.listdir(tmp_path)) - {'out', kept[0]}
    assert re.fullmatch(r'out-5-\d{8}-\d{6}', newest)
    after = snapshot(earlier, tmp_path / newest)
    moved = {path.replace(str(tmp_path / newest), str(out)): text for path, text in after.items()}
    assert moved == before


def test_an_out_dir_that_cannot_be_renamed_is_refused(train_run, project, tmp_path):
    train_run('--max_iters=2')

    def files():
        """Return all files but those of the lock, which holds the id of the latest process."""
        found = snapshot(tmp_path)
        return {path: text for path, text in found.items() if not path.endswith('run.lock')}
    before, log = files(), snapshot(project)
    stdout, err = script(project, 'train.py', *TINY, '--max_iters=1', '--out_dir=.',
                         cwd=tmp_path / 'out', code=2)
    assert re.fullmatch(r'error: \. holds an earlier run, give another --out_dir: .*\n', err)
    assert files() == before and snapshot(project) == log and 'renamed' not in stdout


def test_model_pth_is_the_best_and_checkpoints_need_no_pickle(train_run, tmp_path):
    # the learning rate is so high that the loss rises after some updates
    out = tmp_path / 'out'
    arguments = ['--max_iters=20', '--eval_interval=2', '--learning_rate=0.5', '--min_lr=0.5',
                 '--n_layer=1']
    last = train_run(*arguments)
    best = torch.load(out / 'model.pth', weights_only=True)
    losses = {r['step']: r['val_loss'] for r in metrics(out)[1] if r['step']}
    assert best['iter_num'] == min(losses, key=losses.get) < 20
    assert best['val_loss'] == min(losses.values())
    assert not same_tensors(best['model'], last['model'])
    assert sorted(best['model']) == sorted(GPT(GPTConfig(**best['model_args'])).state_dict())
    assert best['config']['n_embd'] == 32 and best['tokenizer']['kind'] == 'char'
    train_run(*arguments, '--always_save_checkpoint=True', out=tmp_path / 'always')
    assert torch.load(tmp_path / 'always' / 'model.pth')['iter_num'] == 20


def test_a_compiled_run_saves_plain_keys_and_the_same_losses(train_run, tmp_path, monkeypatch):
    # traced like any compiled model, as one graph, but without half a minute of code generation
    compiler = functools.partial(torch.compile, backend='aot_eager', fullgraph=True)
    monkeypatch.setattr(torch, 'compile', compiler)
    plain = train_run('--max_iters=3', out=tmp_path / 'plain')
    compiled = train_run('--max_iters=3', '--compile=True', out=tmp_path / 'compiled')
    assert plain['model'].keys() == compiled['model'].keys()
    a, b = metrics(tmp_path / 'plain')[0], metrics(tmp_path / 'compiled')[0]
    assert [r['loss'] for r in a] == pytest.approx([r['loss'] for r in b], abs=1e-3)


def test_the_arithmetic_of_the_metrics(train_run, tmp_path, capsys):
    checkpoint = train_run('--gradient_accumulation_steps=3', '--peak_tflops=0.001',
                           '--log_interval=3', '--max_iters=9', '--eval_interval=4')
    logs, evals = metrics(tmp_path / 'out')
    assert [r['step'] for r in logs] == [1, 3, 6, 9]
    with torch.device('meta'):
        shape = GPTConfig(block_size=32, vocab_size=checkpoint['model_args']['vocab_size'],
                          n_layer=2, n_head=2, n_embd=32, bias=False)
        flops = GPT(shape).flops_per_token()
    for r in logs:
        assert r['sps'] * r['dt'] == pytest.approx(12)
        assert r['tps'] == pytest.approx(r['sps'] * 32)
        assert r['sps_per_gpu'] == r['sps'] and r['tps_per_gpu'] == r['tps']
        assert r['mfu'] == pytest.approx(100 * flops * r['tps'] / 1e9)
        assert r['dtf'] + r['dtb'] <= r['dt'] * 3
        assert r['eta'] == pytest.approx((9 - r['step']) * r['dt'])
    # train_seconds is the time in updates; the last evaluation has seen all of it
    total = evals[-1]['train_seconds']
    assert logs[0]['dt'] < total and evals[0]['train_seconds'] < 0.01
    assert evals[1]['train_seconds'] < evals[2]['train_seconds']
    out = capsys.readouterr().out
    line = [s for s in out.splitlines() if s.startswith('step=3/9 loss')][0]
    keys = ('loss', 'dt', 'dtf', 'dtb', 'sps', 'tps', 'mfu', 'lr', 'norm')
    numbers = ' '.join(rf'{key}=\S+' for key in keys)
    assert re.fullmatch(rf'step=3/9 {numbers} eta=\d+:\d\d:\d\d', line)
    assert f'loss={logs[1]["loss"]:.4g} ' in line


def test_the_seconds_of_updates_exclude_evaluation_sampling_and_saving(
        train_run, tmp_path, monkeypatch):
    def slow(function):
        def call(*args, **kwargs):
            time.sleep(0.5)
            return function(*args, **kwargs)
        return call
    for name in ('evaluate', 'continue_text', 'save'):
        monkeypatch.setattr(train, name, slow(getattr(train, name)))
    train_run('--eval_interval=2', '--log_interval=2', '--max_iters=6')
    logs, evals = metrics(tmp_path / 'out')
    assert max(r['dt'] for r in logs) < 0.25
    assert evals[-1]['train_seconds'] < 1.5


def test_a_run_that_is_behind_its_checkpoint_evaluates_and_ends(project, train_run, tmp_path):
    checkpoint = train_run('--max_iters=4')
    torch.save(checkpoint | {'evaluated': False}, tmp_path / 'out' / 'ckpt.pt')
    out, _ = script(project, 'train.py', f'--out_dir={tmp_path / "out"}', '--init_from=resume',
                    '--max_iters=2')
    assert out.count('step=4/2 train_loss=') == 1 and 'step=5' not in out


def test_bits_per_byte_count_the_bytes_of_the_text(train_run, project, capsys):
    folder = project / 'data' / 'twice'
    shutil.copytree(project / 'data' / 'topics', folder)
    meta = json.loads((folder / 'meta.json').read_text())
    sizes = {k: 2 * n for k, n in meta['bytes'].items()}
    (folder / 'meta.json').write_text(json.dumps(meta | {'bytes': sizes}))
    with pytest.raises(FileNotFoundError):  # of the checkpoint, which eval_only does not write
        train_run('--eval_only=True', '--dataset=twice')
    shutil.rmtree(folder)
    out = capsys.readouterr().out
    numbers = re.findall(r'_loss=(\S+) .*bits_per_byte=(\S+)', out)
    assert len(numbers) == 2
    train_run('--max_iters=1')
    line, = re.findall(r' val_loss=(\S+) best_val_loss=\S+ bits_per_byte=(\S+)',
                       capsys.readouterr().out.split('step=1/1 train_loss')[1])
    numbers.append((2 * float(line[0]), line[1]))  # of `topics`, where a character is a byte
    for loss, bits in numbers:
        assert float(bits) == pytest.approx(float(loss) / math.log(2) / 2, abs=1e-3)


def test_mfu_is_left_out_without_a_known_peak(train_run, capsys):
    train_run('--max_iters=1')
    assert ' mfu=' not in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_checkpoint(
        train_run, tmp_path, capsys):
    train_run('--train_iters=5')
    before = (tmp_path / 'out' / 'ckpt.pt').read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        train_run('--init_from=resume', '--learning_rate=1e30', '--decay_lr=False',
                  '--grad_clip=0.0')
    err = capsys.readouterr().err
    message = r'error: the (loss|gradient norm) is not finite at iteration \d'
    assert e.value.code == 1 and re.search(message, err)
    assert (tmp_path / 'out' / 'ckpt.pt').read_bytes() == before


def test_eval_only_prints_losses_and_writes_nothing(train_run, tmp_path, capsys):
    with pytest.raises(FileNotFoundError):
        train_run('--eval_only=True')
    out = capsys.readouterr().out
    losses = re.findall(r'_loss=(4\.\d+) bits_per_byte=(\S+)', out)
    assert len(losses) == 2
    for loss, bits in losses:  # a character of this text is a byte
        assert float(bits) == pytest.approx(float(loss) / math.log(2), abs=1e-3)
    assert not os.path.exists(tmp_path / 'out')


def test_loss_png_is_drawn_if_matplotlib_is_installed(train_run, tmp_path):
    pytest.importorskip('matplotlib')
    train_run('--max_iters=5')
    assert (tmp_path / 'out' / 'loss.png').read_bytes().startswith(b'\x89PNG')


def test_a_missing_wandb_is_one_error_line(train_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'wandb', None)  # the import fails
    with pytest.raises(SystemExit) as e:
        train_run('--wandb_log=True')
    err = capsys.readouterr().err
    assert e.value.code == 2 and 'pip install wandb' in err
    assert not os.path.exists(tmp_path / 'out' / 'metrics.jsonl')


def test_a_prompt_outside_the_vocabulary_is_refused(train_run, capsys):
    with pytest.raises(SystemExit) as e:
        train_run('--sample_prompt=Größe')
    err = capsys.readouterr().err
    assert e.value.code == 2 and "'ß' 'ö'" in err and '--sample_prompt' in err


def test_mistakes_in_settings_are_reported_together_and_change_nothing(project, tmp_path):
    _, err = script(project, 'train.py', '--batch_size=0', '--dropout=1', '--n_head=5',
                    '--optimizer=sgd', '--decay_frac=2', f'--out_dir={tmp_path / "out"}', code=2)
    lines = err.splitlines()
    assert len(lines) == 5 and all(line.startswith('error: ') for line in lines)
    for words in ('batch_size=0', 'dropout=1.0', 'n_head=5', 'adamw, muon', 'decay_frac=2'):
        assert words in err
    assert not os.path.exists(tmp_path / 'out')


def test_a_missing_dataset_or_checkpoint_names_the_next_command(project, tmp_path):
    _, err = script(project, 'train.py', '--dataset=nowhere', cwd=tmp_path, code=2)
    assert err.splitlines()[-1] == (
        'error: no train.bin in data/nowhere: '
        'run python data/text/prepare.py --input=FILE --name=nowhere')
    _, err = script(project, 'train.py', '--init_from=resume', cwd=tmp_path, code=2)
    assert err.splitlines()[-1] == ('error: cannot use out/ckpt.pt: there is no such file: '
                                    'train first, or give another --out_dir')
    assert os.listdir(tmp_path) == []


def test_missing_shakespeare_is_prepared_and_said(project, train_run, text, capsys):
    tiny = project / 'data' / 'shakespeare' / 'tinyshakespeare.txt'
    tiny.write_text(text.read_text()[:5000])
    train_run('--dataset=shakespeare_char', '--max_iters=1')
    out = capsys.readouterr().out
    assert 'running data/shakespeare_char/prepare.py' in out.replace(os.sep, '/')
    for name in ('train.bin', 'val.bin', 'meta.json'):
        (project / 'data' / 'shakespeare_char' / name).unlink()  # fails if it is missing
    tiny.unlink()


def test_float16_trains_with_a_scaler_that_is_saved(train_run, tmp_path):
    whole = train_run('--dtype=float16', out=tmp_path / 'whole')
    assert whole['scaler']['scale'] > 1
    train_run('--dtype=float16', '--train_iters=5', out=tmp_path / 'parts')
    parts = train_run('--init_from=resume', out=tmp_path / 'parts')
    assert same_tensors(whole['model'], parts['model'])
    assert whole['scaler'] == parts['scaler']


def test_a_finetuned_gpt2_starts_from_its_weights(
        configured, project, tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip('transformers')
    meta = json.loads((project / 'data' / 'topics' / 'meta.json').read_text())
    config = transformers.GPT2Config(vocab_size=meta['vocab_size'], n_positions=64, n_layer=1,
                                     n_head=2, n_embd=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / 'hf')
    tokenizer_from_dict(meta['tokenizer']).save_pretrained(tmp_path / 'hf')
    monkeypatch.setattr(signal, 'signal', lambda *_: None)  # pytest keeps its handlers
    arguments = [a for a in TINY if not a.startswith(('--n_', '--dropout'))]
    arguments += [f'--init_from={tmp_path / "hf"}', '--max_iters=0', f'--out_dir={tmp_path / "ft"}']
    train.main(arguments)
    saved = torch.load(tmp_path / 'ft' / 'ckpt.pt')
    reference = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / 'hf').state_dict()
    for name, rows in (('transformer.wte.weight', meta['vocab_size']),
                       ('transformer.wpe.weight', 32)):
        assert torch.equal(saved['model'][name], reference[name][:rows])
    # model.pth is written at step 0: the loss may never get lower
    assert torch.load(tmp_path / 'ft' / 'model.pth')['iter_num'] == 0
    assert saved['model_args']['activation'] == 'gelu_tanh' and saved['config']['n_embd'] == 16
    with pytest.raises(SystemExit):
        train.main([*arguments, '--n_layer=5'])
    assert 'n_layer=5' in capsys.readouterr().err


# what a student may write by mistake: (line of model.py, the same with a mistake, the exception)
MISTAKES = [
    ('        x = self.transformer.wte(idx)', '        x = self.transformer.wte(ids)', 'NameError'),
    ('nn.Linear(inner, config.n_embd, bias=config.bias)',
     'nn.Linear(inner, config.n_embd, scale=2)', 'TypeError'),
    ('        logits = self.lm_head(self.transformer.ln_f(x))',
     '        logits = self.lm_head(self.transformer.ln_f(x).mT)', 'RuntimeError')]


@pytest.mark.parametrize('line, mistake, exception', MISTAKES)
@pytest.mark.parametrize('init_from', ['scratch', 'resume'])
def test_a_bug_in_model_py_keeps_its_traceback(
        project, train_run, tmp_path, init_from, line, mistake, exception):
    copy = tmp_path / 'quill'
    shutil.copytree(project, copy)
    source = (copy / 'model.py').read_text()
    assert line in source
    (copy / 'model.py').write_text(source.replace(line, mistake))
    train_run('--train_iters=5')
    before = snapshot(tmp_path / 'out')
    arguments = [*TINY, f'--out_dir={tmp_path / "new"}']
    if init_from == 'resume':
        arguments = [f'--out_dir={tmp_path / "out"}', '--init_from=resume']
    _, err = script(copy, 'train.py', *arguments, code=1)
    assert 'Traceback' in err and 'model.py' in err
    assert re.search(f'^{exception}: ', err, re.M) and 'error: ' not in err
    after = snapshot(tmp_path / 'out')
    assert all(after[path] == content for path, content in before.items() if '.pt' in path)


def test_a_short_speedrun_learns_faster_than_the_defaults(train_run, project, tmp_path):
    """60 updates of the speedrun's recipe, made small."""
    small = ['--n_layer=2', '--n_head=2', '--n_embd=64', '--batch_size=16', '--block_size=64',
             '--max_iters=60', '--dataset=topics', '--eval_interval=60', '--eval_iters=20',
             '--dtype=float32']
    recipe = str(project / 'config' / 'speedrun_shakespeare_char.py')
    losses = []
    for name, config in (('speedrun', [recipe]), ('defaults', ['--dropout=0.0'])):
        out = tmp_path / name
        train_run(*config, *small, f'--out_dir={out}', out=out)
        losses.append(metrics(out)[1][-1]['val_loss'])
    assert losses[0] < 2.4 < 2.9 < losses[1]


def test_sigterm_and_ctrl_c_finish_the_update_save_and_say_how_to_go_on(project, tmp_path):
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        out = tmp_path / str(code)
        command = [sys.executable, '-u', str(project / 'train.py'), *TINY, '--max_iters=100000',
                   '--eval_interval=50000', f'--out_dir={out}']
        running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in running.stdout:
            if line.startswith('step=3/'):
                running.send_signal(number)
                break
        rest = running.stdout.read()
        assert running.wait(30) == code
        assert '--init_from=resume' in rest.splitlines()[-1]
        saved = torch.load(out / 'ckpt.pt')['iter_num']
        assert saved >= 3 and f'(step {saved})' in rest


@pytest.mark.slow
def test_it_runs_from_another_directory(project, tmp_path):
    def runs():
        return (project / 'checkpoints.log').read_text().splitlines()
    here = str(tmp_path / 'here')
    script(project, 'train.py', 'config/train_shakespeare_char_cpu.py', *TINY, '--max_iters=2',
           '--out_dir=here', cwd=tmp_path)
    assert os.path.exists(tmp_path / 'here' / 'ckpt.pt')
    assert os.listdir(tmp_path) == ['here']
    assert runs()[-1] == here
    script(project, 'train.py', *TINY, '--max_iters=2', '--out_dir=here', cwd=tmp_path)
    assert runs()[-2:] == [here, here]  # the latest run last


# -----------------------------------------------------------------------------
# time: a budget of seconds, and a run that does not fall silent

@pytest.fixture
def slow(monkeypatch):
    """A function that lets update number n, from 0, take seconds(n), and all else no time."""
    def make(seconds):
        now, count, real = [0.0], [0], Tokens.train_batch

        def train_batch(self, *arguments):
            now[0] += seconds(count[0])
            count[0] += 1
            return real(self, *arguments)
        monkeypatch.setattr(time, 'perf_counter', lambda: now[0])
        monkeypatch.setattr(Tokens, 'train_batch', train_batch)
    return make


LINEAR = ['--lr_schedule=linear', '--decay_frac=1', '--warmup_iters=0', '--learning_rate=0.001',
          '--min_lr=0.0001', '--eval_interval=100']


def test_max_seconds_ends_the_run_and_the_schedule_on_any_machine(
        slow, train_run, tmp_path, capsys):
    # 2 seconds an update, and 3 from the sixth update on: the machine slows down half-way
    slow(lambda n: 2 if n < 5 else 3)
    checkpoint = train_run(*LINEAR, '--max_iters=1000', '--max_seconds=20')
    assert (checkpoint['iter_num'], checkpoint['train_seconds']) == (9, 22)
    logs, evals = metrics(tmp_path / 'out')
    used = [0, 2, 4, 6, 8, 10, 13, 16, 19]  # seconds before each update
    assert [r['lr'] for r in logs] == pytest.approx([0.001 - 0.0009 * t / 20 for t in used])
    assert [r['step'] for r in evals] == [0, 9]  # the last weights are evaluated
    assert [r['eta'] for r in logs] == pytest.approx([18, 16, 14, 12, 10, 7, 4, 1, 0])
    out = capsys.readouterr().out
    assert f'saved {tmp_path}/out/ckpt.pt (step 9)' in out and 'eta=0:00:18' in out
    assert 'init_from=resume' not in out
    train_run('--init_from=resume')
    assert 'nothing to do' in capsys.readouterr().out


def test_max_iters_ends_a_run_before_its_time_is_over(slow, train_run, tmp_path):
    slow(lambda n: 1)
    plain = train_run(*LINEAR, '--max_iters=8', out=tmp_path / 'plain')
    limited = train_run(*LINEAR, '--max_iters=8', '--max_seconds=9')
    assert limited['iter_num'] == 8
    assert same_tensors(plain['model'], limited['model'])
    assert metrics(tmp_path / 'out')[0][0]['eta'] == 7


def test_a_resumed_run_goes_on_with_the_rest_of_its_time(slow, train_run, tmp_path):
    slow(lambda n: 3)
    whole = train_run(*LINEAR, '--max_iters=100', '--max_seconds=20', out=tmp_path / 'whole')
    train_run(*LINEAR, '--max_iters=100', '--max_seconds=20', '--train_iters=4')
    parts = train_run('--init_from=resume')
    assert parts['iter_num'] == whole['iter_num'] == 7
    assert same_tensors(parts['model'], whole['model'])
    assert train_run('--init_from=resume', '--max_seconds=30')['iter_num'] == 10


@pytest.mark.slow
def test_all_processes_take_the_clock_of_rank_0(project, tmp_path):
    config = tmp_path / 'clock.py'
    config.write_text("""
import os as _os, time as _time
_real, _speed = _time.perf_counter, 1 + 50 * int(_os.environ['RANK'])
_time.perf_counter = lambda: _speed * _real()
log_interval = 1000
""")
    out, _ = script(project, 'train.py', *TINY, config, '--max_iters=1000000', '--max_seconds=3',
                    '--eval_interval=1000000', f'--out_dir={tmp_path / "out"}', nproc=2)
    assert 'done: val loss' in out
    assert 3 <= torch.load(tmp_path / 'out' / 'ckpt.pt')['train_seconds'] < 5


def test_a_line_is_logged_after_ten_seconds_without_one(slow, train_run, tmp_path):
    slow(lambda n: 4)
    train_run('--log_interval=100', '--eval_interval=100')
    assert [r['step'] for r in metrics(tmp_path / 'out')[0]] == [1, 5, 9]


def test_minutes_without_an_evaluation_bring_a_short_one_that_changes_nothing(
        slow, train_run, tmp_path, monkeypatch, capsys):
    arguments = ['--eval_interval=8', '--eval_iters=12', '--max_iters=10', '--log_interval=2']
    whole = train_run(*arguments, out=tmp_path / 'whole')
    capsys.readouterr()
    slow(lambda n: 100)
    counts, real = [], train.evaluate
    monkeypatch.setattr(train, 'evaluate', lambda learner, data, n, *more: (
        counts.append(n), real(learner, data, n, *more))[1])
    slowly = train_run(*arguments)
    out = capsys.readouterr().out
    assert counts == [10, 10] * 2 + [12, 12] * 2  # steps 0 and 4, then 8 and 10
    assert [int(n) for n in re.findall(r'at step (\d+), after', out)] == [0, 4, 8, 10]
    assert 'ckpt.pt (step 4)' in out and 'model.pth (step 4)' not in out
    keys = 'model', 'optimizer', 'best_val_loss', 'position'
    assert all(same_tensors(whole[key], slowly[key]) for key in keys)
    rows = metrics(tmp_path / 'out')[1]
    assert [r['step'] for r in rows] == [0, 8, 10]
    before = metrics(tmp_path / 'whole')[1]
    assert [r['val_loss'] for r in rows] == [r['val_loss'] for r in before]


def test_the_end_tells_the_losses_the_time_and_the_next_command(slow, train_run, tmp_path, capsys):
    slow(lambda n: 600)
    checkpoint = train_run('--max_iters=7', '--learning_rate=1', '--min_lr=1')
    last = metrics(tmp_path / 'out')[1][-1]['val_loss']
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f'done: val loss {last:.4f}, best {checkpoint["best_val_loss"]:.4f}, '
        'after 1:10:00 of training', f'to sample: python sample.py --out_dir={tmp_path / "out"}']


def test_numbers_are_logged_with_four_digits():
    row = dict.fromkeys(train.LOGGED, 0.123456) | {'tps': 123456.7, 'mfu': None, 'eta': 3725}
    line = train.log_line('40/500', row, world_size=1)
    assert line.startswith('step=40/500 loss=0.1235 dt=0.1235 ') and 'gpu' not in line
    assert ' tps=123457 lr=' in line and line.endswith(' eta=1:02:05')


# -----------------------------------------------------------------------------
# settings that depend on others, and on the machine

def test_a_warmup_that_nobody_gave_takes_a_tenth_of_the_run_at_most(train_run, tmp_path):
    def warmup(*arguments):
        # the last argument of a name wins: this is as if TINY gave no warmup
        tiny = [a for a in TINY if not a.startswith('--warmup')]
        if '--init_from=resume' not in arguments:  # two runs of one second have one name
            shutil.rmtree(tmp_path / 'out', ignore_errors=True)
        train.main([*tiny, '--eval_interval=100', f'--out_dir={tmp_path / "out"}', *arguments])
        return json.loads((tmp_path / 'out' / 'config.json').read_text())['warmup_iters']
    assert warmup('--max_iters=3') == 0
    assert warmup('--max_iters=50', '--train_iters=1') == 5
    assert warmup('--max_iters=5000', '--train_iters=1') == 100
    assert warmup('--max_iters=50', '--train_iters=1', '--lr_decay_iters=5000') == 100
    assert warmup('--max_iters=50', '--train_iters=1', '--warmup_iters=40') == 40
    assert warmup('--init_from=resume', '--max_iters=60', '--train_iters=1') == 40


def test_a_resumed_run_keeps_the_precision_that_was_chosen(
        train_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.configurator, 'pick_dtype', lambda kind: 'bfloat16')
    checkpoint = train_run('--dtype=auto', '--train_iters=2')
    saved = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert checkpoint['config']['dtype'] == saved['dtype'] == 'bfloat16'
    monkeypatch.setattr(train.configurator, 'pick_dtype', lambda kind: 'float32')
    capsys.readouterr()
    assert train_run('--init_from=resume', '--train_iters=2')['config']['dtype'] == 'bfloat16'
    out = capsys.readouterr().out
    assert 'dtype=bfloat16, ' in out
    assert out.count('note: dtype=bfloat16, as before; here, --dtype=float32 is faster') == 1
    # an older quill saved what was given
    checkpoint['config']['dtype'] = 'auto'
    torch.save(checkpoint, tmp_path / 'out' / 'ckpt.pt')
    shutil.rmtree(tmp_path / 'out' / 'ckpt_prev.pt', ignore_errors=True)
    assert train_run('--init_from=resume', '--train_iters=1')['config']['dtype'] == 'float32'
    assert 'note: dtype=' not in capsys.readouterr().out


def test_the_default_recipe_on_a_cpu_names_the_one_for_five_minutes(train_run, capsys, monkeypatch):
    def stop(*arguments):
        raise InterruptedError
    monkeypatch.setattr(train, 'open_dataset', stop)
    command = 'python train.py config/train_shakespeare_char.py --max_seconds=300'
    for arguments, count in (([], 1), (['--seed=2'], 1), (['--max_iters=9'], 0),
                             (['--max_seconds=9'], 0)):
        with pytest.raises(InterruptedError):
            train.main(['--device=cpu', '--dtype=float32', *arguments])
        assert capsys.readouterr().out.count(command) == count, arguments


# -----------------------------------------------------------------------------
# many processes

@dataclasses.dataclass
class ThreadProcess(Process):
    """One of several ranks that are threads of this process and sum tensors with each other."""
    sums: dict = None  # of all ranks: rank -> tensor
    barrier: threading.Barrier = None

    def broadcast(self, tensor):
        return tensor

    def all_reduce(self, tensor):
        self.sums[self.rank] = tensor.clone()
        self.barrier.wait(60)  # until every rank has written
        tensor.copy_(sum(self.sums[rank] for rank in range(self.world_size)))
        self.barrier.wait(60)  # until every rank has read
        return tensor


@pytest.mark.parametrize('accumulation', [1, 2])  # ranks share the rows, or the micro-batches
def test_gradients_summed_over_two_ranks_equal_those_of_one(
        small_learner, tokens, process, accumulation):
    arguments = ['--batch_size=6', f'--gradient_accumulation_steps={accumulation}']
    one = small_learner(*arguments)
    sums, barrier = {}, threading.Barrier(2)
    ranks = [small_learner(*arguments, process=ThreadProcess(
        process.device, process.dtype, rank=rank, local_rank=rank, world_size=2, seed=1,
        sums=sums, barrier=barrier)) for rank in range(2)]
    for learner in ranks:  # all gradients are views of one tensor: one sum is enough
        storage = learner.flat_grads.untyped_storage().data_ptr()
        assert len(learner.flat_grads) == sum(p.numel() for p in learner.params) + 2
        assert {p.grad.untyped_storage().data_ptr() for p in learner.params} == {storage}
    rows = {learner.process.rank: [] for learner in ranks}
    data = {learner.process.rank: tokens() for learner in ranks}

    def work(learner, position):
        rank = learner.process.rank
        progress = train.Progress(position=position)
        batches = train.training_batches(learner, data[rank], progress)
        signals = [signal.SIGTERM] if rank == 1 and position == 24 else []
        rows[rank].append(update(learner, batches, 1.0, signals))
    for position in (0, 12, 24):  # the sums of an update must not stay for the next one
        batches = train.training_batches(one, tokens(), train.Progress(position=position))
        expected, _, _ = update(one, batches, 1.0)
        threads = [threading.Thread(target=work, args=(learner, position)) for learner in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
        for rank in range(2):
            row, stop, bad = rows[rank][-1]
            assert row['loss'] == pytest.approx(expected['loss'], abs=1e-5)
            assert row['norm'] == pytest.approx(expected['norm'], rel=1e-4)
            # a signal on one rank stops both
            assert stop == (position == 24) and not bad
    assert same_tensors(*(dict(learner.model.state_dict()) for learner in ranks))
    assert {len(rank_rows) for rank_rows in rows.values()} == {3}


@pytest.mark.slow
@pytest.mark.parametrize('more, near, near_norm', [
    (['--gradient_accumulation_steps=1'], 1e-4, 1e-4),
    (['--gradient_accumulation_steps=2', '--max_iters=3'], 1e-4, 1e-4),
    (['--dtype=bfloat16'], 1e-3, 5e-3)])
def test_two_processes_equal_one(project, train_run, tmp_path, more, near, near_norm):
    one = train_run(*more, out=tmp_path / 'one')
    out, _ = script(project, 'train.py', *TINY, *more, f'--out_dir={tmp_path / "two"}', nproc=2)
    two = torch.load(tmp_path / 'two' / 'ckpt.pt')
    (a, a_eval), (b, b_eval) = metrics(tmp_path / 'one'), metrics(tmp_path / 'two')
    assert [r['loss'] for r in a] == pytest.approx([r['loss'] for r in b], abs=near)
    assert [r['norm'] for r in a] == pytest.approx([r['norm'] for r in b], abs=near_norm)
    expected = [r['val_loss'] for r in b_eval]
    assert [r['val_loss'] for r in a_eval] == pytest.approx(expected, abs=near)
    assert largest_difference(one['model'], two['model']) < 10 * near
    for line in ('legend of the log lines', 'step=1/', 'at step 0, after', 'using device=cpu'):
        assert out.count(line) == 1, line
    assert b[0]['sps_per_gpu'] * 2 == pytest.approx(b[0]['sps'])


def largest_difference(a, b):
    """Return the largest difference between tensors of the same name."""
    return max((a[k] - b[k]).abs().max().item() for k in a)


def assert_near(got, expected, losses, norms=None):
    """Assert that logged losses, and norms, of two runs differ by less than that."""
    for key, near in (('loss', losses), ('norm', norms)):
        if near:
            rows = [r[key] for r in expected]
            assert [r[key] for r in got] == pytest.approx(rows, abs=near)


MUON_STEPS = """
import sys
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from configurator import run_main, setup
from model import Muon

def main():
    process = setup(device='cpu', dtype='float32')
    torch.manual_seed(0)
    shapes = [(7, 3)] * 3 + [(2, 9)] * 5 + [(9, 3)] * 2  # uneven rows, and fewer than processes
    weights = [torch.randn(shape) for shape in shapes]
    grads = [[torch.randn(shape) for shape in shapes] for _ in range(3)]
    place = torch.clone
    if sys.argv[2] == 'sharded':
        mesh = init_device_mesh('cpu', (process.world_size,))
        place = lambda t: distribute_tensor(t, mesh, [Shard(0)])
    params = [torch.nn.Parameter(place(w)) for w in weights]
    muon = Muon(params, 0.02, 0.95, 0.1, torch.float32, process)
    for step in grads:
        for p, grad in zip(params, step):
            p.grad = place(grad)
        muon.step()
    result = params + [muon.state[p]['momentum_buffer'] for p in params]
    result = [t.full_tensor() if hasattr(t, 'full_tensor') else t.detach() for t in result]
    if process.is_main:
        torch.save([t.clone() for t in result], sys.argv[1])
    process.close()

run_main(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize('nproc', [2, 4])
@pytest.mark.parametrize('kind', ['whole', 'sharded'])
def test_muon_in_many_processes_makes_the_bits_of_one(project, tmp_path, nproc, kind):
    (tmp_path / 'steps.py').write_text(MUON_STEPS)
    env = {'PYTHONPATH': str(project), 'OMP_NUM_THREADS': '1'}
    script(project, tmp_path / 'steps.py', tmp_path / 'one.pt', 'whole', env=env)
    script(project, tmp_path / 'steps.py', tmp_path / 'many.pt', kind, nproc=nproc, env=env)
    one, many = (torch.load(tmp_path / f'{name}.pt') for name in ('one', 'many'))
    assert same_tensors(one, many) and one[0].abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize('nproc', [2, 3])
def test_each_process_orthogonalizes_its_share(project, tmp_path, nproc):
    (tmp_path / 'steps.py').write_text(MUON_STEPS.replace('def main', """
import os
import model
real = model.orthogonalize
def orthogonalize(x):
    os.write(1, f'matrices={len(x)} shape={tuple(x.shape[1:])}\\n'.encode())  # one write
    return real(x)
model.orthogonalize = orthogonalize

def main"""))
    out, _ = script(project, tmp_path / 'steps.py', tmp_path / 'x.pt', 'whole', nproc=nproc,
                    env={'PYTHONPATH': str(project)})
    counts = [int(n) for n in re.findall(r'matrices=(\d+) shape=\(2, 9\)', out)]
    assert sum(counts) == 5 * 3 and max(counts) == -(-5 // nproc)  # three steps, no work twice


@pytest.mark.slow
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_sharded_training_equals_whole_and_checkpoints_go_both_ways(
        project, train_run, tmp_path, capsys, optimizer):
    more = ['--gradient_accumulation_steps=4', '--max_iters=20', '--eval_interval=10',
            '--log_interval=1', f'--optimizer={optimizer}']
    ddp = train_run(*more, out=tmp_path / 'ddp')
    script(project, 'train.py', *TINY, *more, '--parallel=fsdp', '--train_iters=10',
           f'--out_dir={tmp_path / "fsdp"}', nproc=2)
    half = torch.load(tmp_path / 'fsdp' / 'ckpt.pt', weights_only=True)
    assert half['model'].keys() == ddp['model'].keys()
    shapes = [checkpoint['optimizer'][0]['state'][0]['exp_avg'].shape for checkpoint in (half, ddp)]
    assert shapes[0] == shapes[1]
    capsys.readouterr()
    configure('sample', [f'--out_dir={tmp_path / "fsdp"}', '--weights=last',
                             '--max_new_tokens=5', '--num_samples=1'])
    sample.main()
    configure('sample', [])
    assert 'step 10' in capsys.readouterr().out
    # fsdp -> one process, and one process -> fsdp
    shutil.copytree(tmp_path / 'fsdp', tmp_path / 'back')
    train_run('--init_from=resume', '--parallel=ddp', '--train_iters=5', out=tmp_path / 'back')
    script(project, 'train.py', '--init_from=resume', '--parallel=fsdp',
           '--activation_checkpointing=True', f'--out_dir={tmp_path / "back"}', nproc=2)
    expected, expected_evals = metrics(tmp_path / 'ddp')
    got, evals = metrics(tmp_path / 'back')
    assert_near(got, expected, losses=1e-3, norms=5e-3)
    assert evals[-1]['val_loss'] == pytest.approx(expected_evals[-1]['val_loss'], abs=1e-3)
    # parameters are gathered in bfloat16, gradients summed in float32
    script(project, 'train.py', *TINY, *more, '--parallel=fsdp', '--dtype=bfloat16',
           f'--out_dir={tmp_path / "bf16"}', nproc=2)
    assert_near(metrics(tmp_path / 'bf16')[0], expected, losses=2e-2)
    weights = torch.load(tmp_path / 'bf16' / 'ckpt.pt')['model']
    assert weights['lm_head.weight'].dtype == torch.float32


@pytest.mark.slow
def test_resume_with_fsdp_is_bit_identical(project, tmp_path):
    more = [*TINY, '--parallel=fsdp', '--eval_interval=5', '--always_save_checkpoint=True']
    script(project, 'train.py', *more, f'--out_dir={tmp_path / "whole"}', nproc=2)
    script(project, 'train.py', *more, f'--out_dir={tmp_path / "parts"}', '--train_iters=5',
           nproc=2)
    script(project, 'train.py', f'--out_dir={tmp_path / "parts"}', '--init_from=resume', nproc=2)
    whole, parts = (torch.load(tmp_path / name / 'ckpt.pt', weights_only=True)
                    for name in ('whole', 'parts'))
    assert whole['iter_num'] == parts['iter_num'] == 10
    assert same_tensors(whole['model'], parts['model'])
    assert same_tensors(whole['optimizer'], parts['optimizer'])


@pytest.mark.slow
def test_a_compiled_sharded_model_is_compiled_block_by_block(project, train_run, tmp_path):
    more = ['--gradient_accumulation_steps=2', '--max_iters=4', '--eval_interval=2',
            '--dropout=0.0', '--sample_tokens=20']
    train_run(*more, out=tmp_path / 'eager')
    expected, expected_evals = metrics(tmp_path / 'eager')
    for checkpointing in (False, True):
        name = tmp_path / str(checkpointing)
        out, err = script(
            project, 'train.py', *TINY, *more, '--parallel=fsdp', '--compile=True',
            f'--out_dir={name}', f'--activation_checkpointing={checkpointing}', nproc=2,
            env={'TORCH_LOGS': 'graph_breaks,recompiles,output_code'})
        got, evals = metrics(name)
        assert_near(got, expected, losses=1e-3)
        losses = [r['val_loss'] for r in expected_evals]
        assert [r['val_loss'] for r in evals] == pytest.approx(losses, abs=1e-3)
        assert 'compiling' in out
        assert 'Graph break' not in err and 'Recompiling' not in err
        # something was compiled, the loss included
        assert re.search(r'# Source node to ATen node mapping|def call\(', err)
        assert 'log_softmax' in err


def test_fsdp_refuses_float16_and_a_single_process(train_run, tmp_path, capsys):
    for arguments, words in ((['--dtype=float16'], 'float32 or bfloat16'),
                             ([], 'is for torchrun')):
        with pytest.raises(SystemExit) as e:
            train_run('--parallel=fsdp', *arguments)  # without torchrun
        assert e.value.code == 2 and words in capsys.readouterr().err
        assert not os.path.exists(tmp_path / 'out')


@pytest.mark.slow
@pytest.mark.parametrize('parallel, nproc', [('ddp', 1), ('fsdp', 2)])
def test_two_nodes_equal_one_process(project, train_run, tmp_path, parallel, nproc):
    # two torchrun agents that meet on the loopback interface
    more = ['--max_iters=5', '--gradient_accumulation_steps=4', '--optimizer=muon']
    one = train_run(*more, out=tmp_path / 'one')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    agents = []
    for i in range(2):
        command = [sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', f'--node_rank={i}',
                   f'--nproc_per_node={nproc}', '--rdzv_backend=c10d', '--rdzv_id=7',
                   f'--rdzv_endpoint=127.0.0.1:{port}', str(project / 'train.py'), *TINY, *more,
                   '--log_interval=1', f'--parallel={parallel}', f'--out_dir={tmp_path / "two"}']
        agents.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                       text=True))
    outputs = [agent.communicate(timeout=120) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], '\n'.join(sum(outputs, ()))
    assert sum(out.count('legend of the log lines') for out, _ in outputs) == 1
    assert_near(metrics(tmp_path / 'two')[0], metrics(tmp_path / 'one')[0], losses=1e-4)
    two = torch.load(tmp_path / 'two' / 'ckpt.pt')
    assert largest_difference(one['model'], two['model']) < 1e-3


def test_under_torchrun_a_mistake_is_printed_once(project, tmp_path):
    _, err = script(project, 'train.py', '--widht=3', nproc=2, code=1)
    assert len(re.findall('^error: ', err, re.M)) == 1
    assert 'exitcode  : 2' in err


@pytest.mark.slow
@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_all_ranks_start_from_the_weights_of_rank_0(project, tmp_path, parallel):
    # normal_ draws other numbers on another kind of CPU: a seed of each rank's own stands for that
    config = tmp_path / 'ranks.py'
    config.write_text("""
import os as _os, torch as _torch, train as _train
_real = _train.make_model
def _make_model(*arguments):
    _torch.manual_seed(int(_os.environ.get('RANK', 0)))
    return _real(*arguments)
_train.make_model = _make_model
learning_rate = 1e-9
""")
    # train.py is __main__ there, so it is called as a module here
    launcher = tmp_path / 'launch.py'
    launcher.write_text('import sys, train\nfrom configurator import run_main\n'
                        'run_main(lambda: train.main(sys.argv[1:]))\n')
    arguments = [*TINY, config, '--max_iters=2', '--eval_interval=1', '--dropout=0']
    for nproc in (0, 2):
        more = [f'--parallel={parallel}'] * bool(nproc)
        script(project, launcher, *arguments, *more, f'--out_dir={tmp_path / str(nproc)}',
               nproc=nproc, env={'PYTHONPATH': str(project)})
    one, two = (metrics(tmp_path / name)[1] for name in ('0', '2'))
    for a, b in zip(one, two):
        assert a['val_loss'] == pytest.approx(b['val_loss'], abs=1e-5)


@dataclasses.dataclass
class SendingProcess(Process):
    """Rank 0 keeps what it broadcasts in a list, from which other ranks take it."""
    sent: list = None

    def broadcast(self, tensor):
        if self.rank == 0:
            self.sent.append(tensor.clone())
        else:
            tensor.copy_(self.sent.pop(0))
        return tensor


def test_every_rank_takes_the_weights_of_rank_0(configured):
    configured('--batch_size=4')
    sent, weights = [], []
    for rank in range(2):
        process = SendingProcess(torch.device('cpu'), torch.float32, rank=rank, world_size=2,
                                 sent=sent)
        torch.manual_seed(rank)  # another kind of CPU draws other numbers from the same seed
        shape = GPTConfig(block_size=8, vocab_size=10, n_layer=1, n_head=1, n_embd=8)
        weights.append(dict(make_learner(GPT(shape), process).model.state_dict()))
    assert not sent and same_tensors(*weights)


# -----------------------------------------------------------------------------
# small mistakes that no other test would notice

def one_of_two(rank=0, dtype=torch.float32):
    """Return the Process of one of two ranks, which does not talk to the other."""
    return ThreadProcess(torch.device('cpu'), dtype, rank=rank, world_size=2, seed=1)


def test_the_speeds_of_two_processes_by_hand(small_learner):
    learner = small_learner('--batch_size=4', '--gradient_accumulation_steps=2', '--block_size=16',
                            process=one_of_two())
    row = train.speeds(0.5, learner, 1e9)  # seconds per update, and FLOP/s of one process
    assert (row['sps'], row['tps']) == (2 * 4 / 0.5, 2 * 4 * 16 / 0.5)
    assert (row['sps_per_gpu'], row['tps_per_gpu']) == (8, 128)
    assert row['mfu'] == pytest.approx(100 * 128 * learner.model.flops_per_token() / 1e9)


def test_ranks_that_share_a_micro_batch_drop_what_one_process_drops(
        small_learner, tokens, process):
    x, y = tokens().train_batch(0, 4, process)

    def loss(rows, seed, process=process):
        learner = small_learner('--batch_size=4', process=process, dropout=0.3)
        torch.manual_seed(seed)
        return learner.forward(x[rows], y[rows])[1].item()
    halves = [loss(slice(2 * rank, 2 * rank + 2), 5, one_of_two(rank)) for rank in range(2)]
    assert sum(halves) / 2 == pytest.approx(loss(slice(4), 5), abs=1e-6)
    assert abs(loss(slice(4), 5) - loss(slice(4), 6)) > 1e-4


def test_every_micro_batch_of_every_update_has_its_own_dropout(small_learner, tokens):
    learner = small_learner('--gradient_accumulation_steps=3', '--batch_size=2')
    seeds = []
    for it in range(4):
        batches = train.training_batches(learner, tokens(), train.Progress(iter_num=it))
        seeds += [seed for seed, _, _ in batches]
    assert len(set(seeds)) == len(seeds) == 12


def test_an_evaluation_drops_nothing(small_learner, tokens):
    without, with_dropout = (evaluate(small_learner('--batch_size=2', dropout=p), tokens(), 2)
                             for p in (0.0, 0.5))
    assert without == with_dropout


def test_a_linear_decay_does_not_begin_before_the_warmup_ends(configured):
    configured('--lr_schedule=linear', '--warmup_iters=50', '--max_iters=100', '--decay_frac=1',
               '--learning_rate=1e-3', '--min_lr=1e-4')
    assert lr_factor(49) == pytest.approx(50 / 51)
    assert [lr_factor(it) for it in (50, 75, 100)] == pytest.approx([1, 0.55, 0.1])


@pytest.mark.parametrize('dtype, kept', [
    (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32)])  # in float16, small entries would underflow
def test_hyperparameters_reach_their_optimizers(configured, dtype, kept):
    configured('--optimizer=muon', '--beta1=0.8', '--beta2=0.9', '--weight_decay=0.3',
               '--muon_lr=0.07', '--muon_momentum=0.6')
    model = GPT(GPTConfig(block_size=8, vocab_size=10, n_layer=1, n_head=1, n_embd=8))
    adamw, muon = make_optimizers(model, one_of_two(dtype=dtype))
    assert adamw.defaults['betas'] == (0.8, 0.9)
    assert muon.defaults == {'lr': 0.07, 'momentum': 0.6, 'weight_decay': 0.3}
    assert muon.dtype == kept


def test_an_epoch_may_begin_at_any_of_the_first_tokens_and_at_no_other(tokens, process):
    data, first = tokens(), set()
    for epoch in range(300):
        x, y = data.train_batch(epoch * data.windows_per_epoch, data.windows_per_epoch, process)
        first.add(x.min().item())
    # 61 windows of 16 take 976 of the 999 predictions; a 62nd would leave 8 places to begin
    assert data.windows_per_epoch == 61 and first == set(range(999 - 976 + 1))


@pytest.mark.parametrize('parallel, fits', [('ddp', False), ('fsdp', True)])
def test_shards_of_a_model_may_fit_where_the_whole_does_not(
        configured, monkeypatch, capsys, parallel, fits):
    configured(f'--parallel={parallel}')
    shape = GPTConfig(block_size=8, vocab_size=8, n_layer=1, n_head=1, n_embd=1024)  # 12.6M weights
    monkeypatch.setattr(train.configurator, 'total_memory', lambda device: 0.15e9)
    if fits:
        train.check_memory(shape, one_of_two())
    else:
        with pytest.raises(SystemExit, match='2'):
            train.check_memory(shape, one_of_two())
        assert 'takes 0.2 GB in training' in capsys.readouterr().err


def test_sharded_gradients_are_summed_after_the_last_micro_batch_only(
        small_learner, tokens, process):
    x, y = tokens().train_batch(0, 6, process)
    batches = [(0, *pair) for pair in zip(x.chunk(3), y.chunk(3))]
    arguments = ['--gradient_accumulation_steps=3', '--batch_size=2']
    whole = small_learner(*arguments)
    expected, _, _ = update(whole, batches, 1.0)
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        learner, summed = small_learner(*arguments), []
        learner.model = learner.forward = quill_model.shard(learner.model, process)
        learner.optimizers = make_optimizers(learner.model, process)
        learner.params = list(learner.model.parameters())

        def watched():
            for batch in batches:
                summed.append(any(p.grad is not None for p in learner.params))
                yield batch
        row, stop, bad = update(learner, watched(), 1.0)
        weights = {k: v.full_tensor() for k, v in learner.model.state_dict().items()}
    finally:
        dist.destroy_process_group()
    assert summed == [False] * 3
    assert row['norm'] == pytest.approx(expected['norm'], rel=1e-5)
    assert largest_difference(weights, whole.model.state_dict()) < 1e-5


def test_only_gpt2s_vocabulary_is_padded_for_speed(configured, process):
    configured('--n_layer=1', '--n_embd=6')
    for size, rows in ((65, 65), (50256, 50256), (50257, 50304), (50258, 50258)):
        model = train.make_model(None, types.SimpleNamespace(vocab_size=size), process)
        assert model.config.vocab_size == rows
