import functools
import json
import math
import os
import pathlib
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import train
from conftest import TINY, metrics, same_tensors, script, unigram_entropy
from configurator import Run, configure
from data import common
from model import GPT, GPTConfig
from train import Tokens, divide, evaluate, lr_factor, make_optimizers, train_step


@pytest.fixture
def tokens(tmp_path):
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / 'x.bin')
    return lambda block_size=16: Tokens(str(tmp_path / 'x.bin'), block_size)


def small_model(run, **more):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**dict(block_size=16, vocab_size=1000, n_layer=2, n_head=2, n_embd=32) | more))
    settings = train.__dict__ | dict(learning_rate=1e-2, weight_decay=0.1)
    return model, make_optimizers(model, run, settings)


def step(model, optimizers, run, batches, grad_clip=1.0, factor=1.0):
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    return train_step(model, optimizers, scaler, run, batches, len(batches), grad_clip, factor)


# ---- batches

def test_an_epoch_takes_every_window_once_at_a_random_offset(tokens, run):
    data = tokens()
    n = data.windows_per_epoch
    epochs = []
    for epoch in range(3):
        x, y = data.train_batch(epoch * n, n, run)
        assert torch.equal(y, x + 1)  # the token ids are their positions
        assert x.is_contiguous() and y.is_contiguous()  # else a compiled model would be compiled anew
        starts = x[:, 0].sort().values
        assert torch.equal(starts.diff(), torch.full((n - 1,), 16)) and starts[-1] + 16 <= 999
        epochs.append(x[:, 0])
    assert n * 16 > 1000 - 2 * 16 - 1
    assert len({e.min().item() for e in epochs}) > 1  # another offset
    assert not torch.equal(epochs[0].argsort(), epochs[1].argsort())  # another order


def test_batches_depend_on_seed_and_position_alone(tokens, run):
    a, b = tokens(), tokens()
    whole, _ = a.train_batch(100, 12, run)
    b.train_batch(500, 3, run)
    assert torch.equal(torch.cat([b.train_batch(100 + i, 3, run)[0] for i in (0, 3, 6, 9)]), whole)
    other = Run(run.device, run.dtype, False, 0, 0, 1, seed=2)
    assert not torch.equal(tokens().train_batch(100, 12, other)[0], whole)


def test_input_noise_replaces_its_part_of_x_alone(tokens, run):
    clean, noisy = tokens(), tokens()
    noisy.vocab_size = 1000
    x, y = clean.train_batch(0, 180, run)
    x_noisy, y_noisy = noisy.train_batch(0, 180, run, 0.1)
    assert torch.equal(y_noisy, y) and 0.08 < (x_noisy != x).float().mean() < 0.12
    ids = x_noisy[x_noisy != x]
    assert ids.min() < 50 and ids.max() > 950 and len(ids.unique()) > 150  # any token
    assert torch.equal(torch.cat([noisy.train_batch(i, 60, run, 0.1)[0] for i in (0, 60, 120)]), x_noisy)


def resident(pid='self'):
    """Resident memory of a process in bytes."""
    with open(f'/proc/{pid}/statm') as f:
        return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')


linux = pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='reads /proc')


@linux
def test_a_file_of_1_gb_is_not_loaded(tmp_path, run):
    with open(tmp_path / 'x.bin', 'wb') as f:
        f.truncate(10**9)
    before = resident()
    data = Tokens(str(tmp_path / 'x.bin'), 1024, vocab_size=50257)
    data.check()
    for i in range(50):
        data.train_batch(12 * 1000 * i, 12, run)
    assert resident() - before < 100e6


@linux
@pytest.mark.slow
def test_memory_does_not_grow_over_2000_updates(project, tmp_path):
    process = subprocess.Popen([sys.executable, '-u', str(project / 'train.py'), *TINY, '--max_iters=2000', '--log_interval=100',
                                '--eval_interval=500', f'--out_dir={tmp_path / "out"}'], stdout=subprocess.PIPE, text=True)
    sizes = {}
    for line in process.stdout:
        if line.startswith('step=') and 'dt=' in line:
            sizes[int(line[5:line.index(' ')])] = resident(process.pid)
    assert process.wait() == 0 and 1900 in sizes
    assert sizes[1900] < 1.05 * sizes[600]  # the first evaluations and saves are in both


def test_exactly_one_window_of_tokens_trains(tmp_path, run, capsys):
    np.arange(17, dtype=np.uint16).tofile(tmp_path / 'x.bin')
    data = Tokens(str(tmp_path / 'x.bin'), 16)
    x, y = data.train_batch(5, 2, run)
    assert x.tolist() == [list(range(16))] * 2 and y[0, -1] == 16 and data.eval_starts(0) == [0]
    with pytest.raises(SystemExit):
        Tokens(str(tmp_path / 'x.bin'), 17)
    assert 'fewer than block_size + 1' in capsys.readouterr().err


def share(accumulation, batch, rank, world):
    run = Run(torch.device('cpu'), torch.float32, False, rank, rank, world, seed=1)
    return divide(dict(gradient_accumulation_steps=accumulation, batch_size=batch, parallel='ddp'), run)


@pytest.mark.parametrize('accumulation, batch, world', [(1, 8, 2), (4, 8, 2), (6, 4, 4), (3, 8, 8), (40, 12, 8), (1, 8, 1)])
def test_every_sequence_is_on_exactly_one_rank(accumulation, batch, world):
    seen = []
    for rank in range(world):
        micro_batches, part, parts = share(accumulation, batch, rank, world)
        rows = batch // parts
        for micro in micro_batches:
            seen += [micro * batch + part * rows + row for row in range(rows)]
        assert len(micro_batches) * rows * world == accumulation * batch
    assert sorted(seen) == list(range(accumulation * batch))


def test_an_indivisible_batch_is_an_error_with_the_numbers(capsys):
    with pytest.raises(SystemExit) as e:
        share(2, 9, 0, 4)
    err = capsys.readouterr().err
    assert e.value.code == 2 and all(n in err for n in ('=2', '=9', '4 processes', 'multiple of 2'))


# ---- the step

def test_one_step_changes_every_parameter(run, tokens):
    for optimizer in ('adamw', 'muon'):
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=16, vocab_size=1000, n_layer=2, n_head=2, n_embd=32, dropout=0.1))
        optimizers = make_optimizers(model, run, train.__dict__ | dict(optimizer=optimizer, weight_decay=0.0))
        before = {k: v.clone() for k, v in model.state_dict().items()}
        loss, norm, dtf, dtb, stop = step(model, optimizers, run, [(1, *tokens().train_batch(0, 8, run))])
        for k, v in model.state_dict().items():
            assert not torch.equal(v, before[k]), k
        assert abs(loss - math.log(1000)) < 0.2 and norm > 0 and dtf > 0 and dtb > 0 and not stop


def test_micro_batches_equal_one_large_batch(run, tokens):
    x, y = tokens().train_batch(0, 12, run)
    results = []
    for k in (1, 3, 12):
        model, optimizers = small_model(run)
        loss, norm, *_ = step(model, optimizers, run, [(0, a, b) for a, b in zip(x.chunk(k), y.chunk(k))])
        results.append((loss, norm, model.state_dict()))
    for loss, norm, state in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-5) and norm == pytest.approx(results[0][1], rel=1e-4)
        # AdamW's first step is lr * sign(gradient): compare where the gradient is not rounding noise
        for k, v in state.items():
            assert ((v - results[0][2][k]).abs() > 1e-4).float().mean() < 2e-3, k


def test_the_gradient_norm_and_clipping_equal_the_formula(run, tokens):
    batch = [(0, *tokens().train_batch(0, 4, run))]
    model, _ = small_model(run)
    _, loss = model(*batch[0][1:])
    loss.backward()
    expected = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    deltas = []
    for clip in (0.0, expected / 4):
        model, _ = small_model(run)
        before = model.transformer.wpe.weight.detach().clone()
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        sgd.param_groups[0]['lr_max'] = 1.0
        _, norm, *_ = step(model, [sgd], run, batch, grad_clip=clip, factor=0.5)
        assert norm == pytest.approx(expected, rel=1e-5)
        deltas.append(model.transformer.wpe.weight.detach() - before)
    assert torch.allclose(deltas[1] * 4, deltas[0], rtol=1e-3, atol=1e-6)


def test_weight_decay_is_on_matrices_only_and_muon_gets_the_blocks(run):
    model = GPT(GPTConfig(block_size=128, vocab_size=65, n_layer=6, n_head=6, n_embd=384, bias=False))
    adamw, = make_optimizers(model, run, train.__dict__ | dict(weight_decay=0.3))
    counts = [(g['weight_decay'], len(g['params']), sum(p.numel() for p in g['params'])) for g in adamw.param_groups]
    assert counts == [(0.3, 26, 10_690_944), (0.0, 13, 4_992)] and adamw.defaults['fused']
    adamw, muon = make_optimizers(model, run, train.__dict__ | dict(optimizer='muon', muon_lr=0.07))
    assert isinstance(muon, torch.optim.Muon) and len(muon.param_groups[0]['params']) == 24
    assert muon.param_groups[0]['lr_max'] == 0.07
    names = {id(p): n for n, p in model.named_parameters()}
    assert all('.h.' in names[id(p)] for p in muon.param_groups[0]['params'])
    assert sorted(len(g['params']) for g in adamw.param_groups) == [2, 13]


def test_muon_equals_torchs_and_orthogonalizes_as_the_polynomial_of_the_singular_values():
    shapes = [(96, 32), (32, 32), (128, 32), (32, 128), (96, 32), (32, 32)]
    torch.manual_seed(0)
    start = [torch.randn(s) for s in shapes]
    results = []
    for make in (torch.optim.Muon, lambda p, **kw: train.Muon(p, torch.bfloat16, **kw),
                 lambda p, **kw: train.Muon(p, torch.float32, **kw)):
        params = [torch.nn.Parameter(t.clone()) for t in start]
        muon = make(params, lr=0.02, momentum=0.9, weight_decay=0.3)
        for i in range(4):
            for j, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * i + j))
            muon.step()
        results.append(([p.detach() for p in params], muon.state_dict()['state']))
    (theirs, their_state), *others = results
    for ours, our_state in others:
        assert same_tensors(their_state, our_state)
        for a, b, c in zip(theirs, ours, start):
            assert (a - b).abs().max() < 0.002 and (a - c).abs().max() > 0.02

    x = torch.randn(3, 48, 80)
    u, s, vt = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum(dim=1, keepdim=True).sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    expected = u @ torch.diag_embed(s) @ vt
    assert torch.allclose(train.orthogonalize(x).double(), expected, atol=1e-4)
    assert torch.allclose(train.orthogonalize(x.mT).double(), expected.mT, atol=1e-4)


def test_adamw_equals_torchs():
    runs = []
    for kind in (train.AdamW, torch.optim.AdamW):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
        optimizer = kind([weight], lr=0.1, weight_decay=0.1, fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            weight.square().sum().backward()
            optimizer.step()
        runs.append((weight.data, optimizer.state_dict()))
    assert same_tensors(*runs) and not runs[0][0].requires_grad


def test_no_start_imports_what_only_torch_compile_needs(project, tmp_path):
    imports = ''
    for command in (['train.py', *TINY, '--optimizer=muon', '--rotary=True', '--max_iters=1'],
                    ['train.py', '--init_from=resume', '--max_iters=2'],
                    ['sample.py', '--max_new_tokens=2']):
        # a line on stderr for each module
        imports += script(project, *command, f'--out_dir={tmp_path}', env={'PYTHONPROFILEIMPORTTIME': '1'})[1]
    assert imports.count('| torch\n') == 3 and 'torch._dynamo' not in imports


def test_the_schedule_by_hand():
    c = dict(warmup_iters=4, max_iters=104, lr_decay_iters=0, decay_lr=True, lr_schedule='cosine', learning_rate=1e-3,
             min_lr=1e-4, decay_frac=0.5)
    assert [lr_factor(it, c) for it in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert lr_factor(4, c) == 1 and lr_factor(54, c) == pytest.approx(0.55) and lr_factor(104, c) == pytest.approx(0.1)
    assert lr_factor(29, c) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert lr_factor(500, c) == pytest.approx(0.1)
    assert lr_factor(54, c | dict(lr_decay_iters=54)) == pytest.approx(0.1)
    linear = c | dict(lr_schedule='linear', max_iters=100)
    assert [lr_factor(it, linear) for it in (4, 50, 75, 100)] == pytest.approx([1, 1, 0.55, 0.1])
    assert lr_factor(0, c | dict(decay_lr=False)) == lr_factor(90, c | dict(decay_lr=False)) == 1


# ---- evaluation

def test_the_whole_split_is_evaluated_exactly_once(run, tokens):
    model, _ = small_model(run)
    model.eval()
    data = tokens()
    # by hand: windows side by side; the rest at the end sees a full window of context
    ids = torch.arange(1000)
    losses = []
    with torch.no_grad():
        for start in range(0, 983, 16):
            logits = model(ids[start:start + 16][None])[0][0]
            losses += torch.nn.functional.cross_entropy(logits, ids[start + 1:start + 17], reduction='none').tolist()
        logits = model(ids[983:999][None])[0][0]
        last = torch.nn.functional.cross_entropy(logits, ids[984:1000], reduction='none').tolist()
    losses += last[-(999 - len(losses)):]
    assert len(losses) == 999
    for eval_iters, batch_size in ((0, 7), (9, 7), (100, 64), (0, 1)):
        assert evaluate(model, data, eval_iters, batch_size, run) == pytest.approx(np.mean(losses), abs=1e-5)
    assert model.training


def test_fewer_windows_are_spread_evenly_over_the_split(tokens):
    starts = tokens().eval_starts(5)
    assert starts[0] == 0 and starts[-1] == 999 - 16 and set(np.diff(starts)) <= {245, 246}


def test_evaluation_and_sampling_change_no_training_loss(train_run, tmp_path):
    a = train_run(out=tmp_path / 'a')
    b = train_run('--eval_interval=3', '--sample_tokens=40', '--eval_iters=7', '--log_interval=2', out=tmp_path / 'b')
    assert same_tensors(a['model'], b['model']) and same_tensors(a['optimizer'], b['optimizer'])


# ---- whole runs

def test_a_small_model_gets_far_below_the_unigram_entropy(train_run, tmp_path, text):
    out = tmp_path / 'learn'
    train_run('--n_embd=64', '--batch_size=16', '--block_size=64', '--max_iters=200', '--eval_interval=200', '--eval_iters=15',
              '--dropout=0.0', '--learning_rate=3e-3', '--log_interval=50', '--optimizer=muon', '--rotary=True',
              '--qk_norm=True', '--zero_init=True', out=out)
    (first, last) = metrics(out)[1]
    entropy = unigram_entropy(text.read_text())
    assert abs(first['val_loss'] - math.log(len(set(text.read_text())))) < 0.2
    assert last['val_loss'] < entropy - 0.9, (last, entropy)


@pytest.mark.parametrize('more', [[], ['--optimizer=muon', '--gradient_accumulation_steps=2', '--rotary=True'],
                                  ['--dtype=bfloat16', '--optimizer=muon']])
def test_resume_is_bit_identical(train_run, tmp_path, more):
    whole = train_run(*more, out=tmp_path / 'whole')
    for n in (5, 3, 2):  # 10 = 5 + 3 + 2, 3 and 8 not at an evaluation
        parts = train_run(f'--train_iters={n}', *(more if n == 5 else ['--init_from=resume']), out=tmp_path / 'parts')
    assert whole['iter_num'] == parts['iter_num'] == 10
    for key in ('model', 'optimizer', 'scaler', 'best_val_loss', 'model_args', 'tokenizer', 'data'):
        assert same_tensors(whole[key], parts[key]), key
    (a, a_eval), (b, b_eval) = metrics(tmp_path / 'whole'), metrics(tmp_path / 'parts')
    assert [(r['step'], r['loss'], r['norm'], r['lr']) for r in a] == [(r['step'], r['loss'], r['norm'], r['lr']) for r in b]
    assert {r['step']: r['val_loss'] for r in a_eval}.items() <= {r['step']: r['val_loss'] for r in b_eval}.items()
    assert len({r['step'] for r in b_eval}) == len(b_eval)  # nothing twice
    seconds = [r['train_seconds'] for r in b_eval]
    assert seconds == sorted(seconds) and seconds[0] < seconds[-1]  # counted on


def test_the_same_command_twice_gives_the_same_tensors_and_another_seed_others(train_run, tmp_path):
    a, b, c = (train_run('--max_iters=3', f'--seed={s}', out=tmp_path / str(i)) for i, s in enumerate((1, 1, 2)))
    assert same_tensors(a['model'], b['model']) and not same_tensors(a['model'], c['model'])


def test_exactly_max_iters_updates_and_the_last_weights_are_evaluated_and_saved(train_run, tmp_path, capsys):
    out = tmp_path / 'out'
    checkpoint = train_run('--max_iters=7')
    logs, evals = metrics(out)
    assert [r['step'] for r in logs] == list(range(1, 8)) and [r['step'] for r in evals] == [0, 5, 7]
    assert checkpoint['iter_num'] == 7 and checkpoint['optimizer'][0]['state'][0]['step'] == 7
    assert logs[0]['lr'] > 0
    assert checkpoint['best_val_loss'] == min(r['val_loss'] for r in evals)
    text = capsys.readouterr().out
    assert [int(s) for s in re.findall(r'sample at step (\d+)', text)] == [0, 5, 7]
    assert text.count('What is an LLM?') == 3 and text.count('legend of the log lines') == 1
    assert os.path.exists(out / 'model.pth') and '--init_from=resume' not in text.split('eta=')[-1]


def test_resuming_drops_the_metrics_past_the_checkpoint(train_run, tmp_path):
    train_run('--train_iters=5')
    with open(tmp_path / 'out' / 'metrics.jsonl', 'a') as f:
        f.write('{"step": 3, "l\n{"step": 6, "loss": 99}\n5\n{"step": 7, "lo')  # a crash: past the checkpoint, and cut short
    train_run('--init_from=resume')
    assert [r['step'] for r in metrics(tmp_path / 'out')[0]] == list(range(1, 11))


def test_settings_come_from_the_checkpoint_unless_given(train_run, tmp_path, capsys):
    train_run('--train_iters=5', '--learning_rate=0.002')
    capsys.readouterr()
    checkpoint = train_run('--init_from=resume', '--weight_decay=0.3', '--max_iters=12')
    config = checkpoint['config']
    assert (config['learning_rate'], config['weight_decay'], config['n_embd'], checkpoint['iter_num']) == (0.002, 0.3, 32, 12)
    assert checkpoint['optimizer'][0]['param_groups'][0]['weight_decay'] == 0.3
    out = capsys.readouterr().out
    assert 'weight_decay=0.3 (was 0.1)' in out and 'max_iters=12 (was 10)' in out
    # what contradicts the checkpoint's model is refused
    with pytest.raises(SystemExit) as e:
        train_run('--init_from=resume', '--n_layer=3')
    err = capsys.readouterr().err
    assert e.value.code == 2 and 'n_layer=3' in err and 'n_layer=2' in err
    # a finished run says so
    train_run('--init_from=resume')
    assert 'nothing to do' in capsys.readouterr().out


def test_starting_anew_destroys_nothing(train_run, tmp_path, capsys):
    first = train_run('--max_iters=5')
    train_run('--max_iters=5', '--seed=9')
    kept = [f for f in os.listdir(tmp_path / 'out') if re.fullmatch(r'ckpt-5-\d{8}-\d{6}\.pt', f)]
    assert len(kept) == 1 and f'renamed ckpt.pt to {kept[0]}' in capsys.readouterr().out
    assert same_tensors(torch.load(tmp_path / 'out' / kept[0])['model'], first['model'])
    assert any(re.fullmatch(r'model-5-.*\.pth', f) for f in os.listdir(tmp_path / 'out'))
    # each by its own step
    train_run('--max_iters=6', '--eval_interval=3', '--learning_rate=1', '--warmup_iters=0', out=tmp_path / 'two')
    best = torch.load(tmp_path / 'two' / 'model.pth')['iter_num']
    train_run('--max_iters=3', out=tmp_path / 'two')
    kept = ' '.join(os.listdir(tmp_path / 'two'))
    assert re.search(r'\bckpt-6-', kept) and re.search(r'\bckpt_prev-3-', kept) and re.search(rf'\bmodel-{best}-', kept)
    assert re.search(r'\bmetrics-6-.*\.jsonl', kept)


def test_model_pth_is_the_best_and_checkpoints_need_no_pickle(train_run, tmp_path):
    # so high a rate that it gets worse after some updates
    out = tmp_path / 'out'
    last = train_run('--max_iters=20', '--eval_interval=2', '--learning_rate=0.5', '--min_lr=0.5', '--n_layer=1')
    best = torch.load(out / 'model.pth', weights_only=True)
    losses = {r['step']: r['val_loss'] for r in metrics(out)[1] if r['step']}
    assert best['iter_num'] == min(losses, key=losses.get) < 20 and best['val_loss'] == min(losses.values())
    assert not same_tensors(best['model'], last['model'])
    assert sorted(best['model']) == sorted(GPT(GPTConfig(**best['model_args'])).state_dict())
    assert best['config']['n_embd'] == 32 and best['tokenizer']['kind'] == 'char'
    train_run('--max_iters=20', '--eval_interval=2', '--learning_rate=0.5', '--min_lr=0.5', '--n_layer=1',
              '--always_save_checkpoint=True', out=tmp_path / 'always')
    assert torch.load(tmp_path / 'always' / 'model.pth')['iter_num'] == 20


def test_a_compiled_run_saves_plain_keys_and_the_same_losses(train_run, tmp_path, monkeypatch):
    # traced like any compiled model, as one graph, but without half a minute of code generation
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='aot_eager', fullgraph=True))
    plain = train_run('--max_iters=3', '--dropout=0.2', out=tmp_path / 'plain')
    compiled = train_run('--max_iters=3', '--compile=True', '--dropout=0.2', out=tmp_path / 'compiled')
    assert plain['model'].keys() == compiled['model'].keys()
    a, b = metrics(tmp_path / 'plain')[0], metrics(tmp_path / 'compiled')[0]
    assert [r['loss'] for r in a] == pytest.approx([r['loss'] for r in b], abs=1e-3)


def test_the_arithmetic_of_the_metrics(train_run, tmp_path, capsys):
    train_run('--gradient_accumulation_steps=3', '--peak_tflops=0.001', '--log_interval=3', '--max_iters=9', '--eval_interval=4')
    logs, evals = metrics(tmp_path / 'out')
    assert [r['step'] for r in logs] == [1, 3, 6, 9]
    with torch.device('meta'):
        flops = GPT(GPTConfig(block_size=32, vocab_size=torch.load(tmp_path / 'out' / 'ckpt.pt')['model_args']['vocab_size'],
                              n_layer=2, n_head=2, n_embd=32, bias=False)).flops_per_token()
    for r in logs:
        assert r['sps'] * r['dt'] == pytest.approx(12) and r['tps'] == pytest.approx(r['sps'] * 32)
        assert r['sps_per_gpu'] == r['sps'] and r['tps_per_gpu'] == r['tps']
        assert r['mfu'] == pytest.approx(100 * flops * r['tps'] / 1e9) and r['dtf'] + r['dtb'] <= r['dt'] * 3
        assert r['eta'] == pytest.approx((9 - r['step']) * r['dt'])
    # the time in steps, without evaluation: the last evaluation has seen all of it
    total = evals[-1]['train_seconds']
    assert logs[0]['dt'] < total and evals[0]['train_seconds'] < 0.01 and evals[1]['train_seconds'] < evals[2]['train_seconds']
    line = [s for s in capsys.readouterr().out.splitlines() if s.startswith('step=3 loss')][0]
    assert re.fullmatch(r'step=3 loss=\S+ dt=\S+ dtf=\S+ dtb=\S+ sps=\S+ sps_per_gpu=\S+ tps=\S+ tps_per_gpu=\S+ mfu=\S+ '
                        r'lr=\S+ norm=\S+ eta=\d+:\d\d:\d\d', line)
    assert f'loss={logs[1]["loss"]:.6g} ' in line


def test_the_seconds_of_steps_are_without_evaluation_sampling_and_saving(train_run, tmp_path, monkeypatch):
    for name in ('evaluate', 'sample_text', 'save_checkpoint'):
        real = getattr(train, name)
        monkeypatch.setattr(train, name, lambda *a, real=real: (time.sleep(0.5), real(*a))[1])
    train_run('--eval_interval=2', '--log_interval=2', '--max_iters=6')
    logs, evals = metrics(tmp_path / 'out')
    assert max(r['dt'] for r in logs) < 0.25 and evals[-1]['train_seconds'] < 1.5


def test_bits_per_byte_count_the_bytes_of_the_text(train_run, project, capsys):
    folder = project / 'data' / 'twice'
    shutil.copytree(project / 'data' / 'topics', folder)
    meta = json.load(open(folder / 'meta.json'))
    json.dump(meta | {'bytes': {k: 2 * n for k, n in meta['bytes'].items()}}, open(folder / 'meta.json', 'w'))
    with pytest.raises(FileNotFoundError):
        train_run('--eval_only=True', '--dataset=twice')
    shutil.rmtree(folder)
    for loss, bits in re.findall(r'_loss=(\S+) .*bits_per_byte=(\S+)', capsys.readouterr().out):
        assert float(bits) == pytest.approx(float(loss) / math.log(2) / 2, abs=1e-3)


def test_an_unknown_gpu_prints_mfu_na(train_run, monkeypatch, capsys):
    monkeypatch.setattr(train, 'peak_flops', lambda run: None)
    train_run('--max_iters=1')
    assert 'mfu=n/a' in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_checkpoint(train_run, tmp_path, capsys):
    train_run('--train_iters=5')
    before = (tmp_path / 'out' / 'ckpt.pt').read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        train_run('--init_from=resume', '--learning_rate=1e30', '--decay_lr=False', '--grad_clip=0.0')
    err = capsys.readouterr().err
    assert e.value.code == 1 and re.search(r'error: the (loss|gradient norm) is not finite at iteration \d', err)
    assert (tmp_path / 'out' / 'ckpt.pt').read_bytes() == before


def test_a_bad_gradient_never_reaches_the_weights(run, tokens):
    model, optimizers = small_model(run)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.transformer.ln_f.weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(train.NotFinite, match='gradient norm'):
        step(model, optimizers, run, [(0, *tokens().train_batch(0, 4, run))])
    assert same_tensors(dict(model.state_dict()), before)


def test_eval_only_prints_losses_and_writes_nothing(train_run, tmp_path, capsys):
    with pytest.raises(FileNotFoundError):
        train_run('--eval_only=True')
    out = capsys.readouterr().out
    losses = re.findall(r'_loss=(4\.\d+) perplexity=(\S+) bits_per_byte=(\S+)', out)
    assert len(losses) == 2
    for loss, perplexity, bits in losses:  # a character of this text is a byte
        assert float(perplexity) == pytest.approx(math.exp(float(loss)), rel=1e-3)
        assert float(bits) == pytest.approx(float(loss) / math.log(2), abs=1e-3)
    assert not os.path.exists(tmp_path / 'out')


def test_a_loss_beyond_every_perplexity_is_printed(train_run, capsys, monkeypatch):
    monkeypatch.setattr(train, 'evaluate', lambda *a: 1e4)
    with pytest.raises(FileNotFoundError):
        train_run('--eval_only=True')
    assert 'val_loss=10000.0000 perplexity=inf' in capsys.readouterr().out


def test_loss_png_is_drawn_where_matplotlib_is(train_run, tmp_path):
    pytest.importorskip('matplotlib')
    train_run('--max_iters=5')
    assert (tmp_path / 'out' / 'loss.png').read_bytes().startswith(b'\x89PNG')


def test_missing_optional_packages_name_their_install(train_run, monkeypatch, capsys):
    import builtins
    real = builtins.__import__

    def importer(name, *args, **kwargs):
        if name.split('.')[0] in ('wandb', 'tensorboard'):
            raise ImportError(name)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, '__import__', importer)
    monkeypatch.setattr(train.importlib, 'import_module', lambda name: importer(name.replace('torch.utils.', '')))
    for key, package in (('wandb_log', 'wandb'), ('tensorboard', 'tensorboard')):
        with pytest.raises(SystemExit) as e:
            train_run(f'--{key}=True')
        assert e.value.code == 2 and f'pip install {package}' in capsys.readouterr().err


def test_a_prompt_outside_the_vocabulary(train_run, capsys):
    with pytest.raises(SystemExit) as e:
        train_run('--sample_prompt=Größe')
    err = capsys.readouterr().err
    assert e.value.code == 2 and "'ß' 'ö'" in err and '--sample_prompt' in err


def test_mistakes_in_settings_are_reported_together_and_change_nothing(project, tmp_path):
    _, err = script(project, 'train.py', '--batch_size=0', '--dropout=1', '--n_head=5', '--optimizer=sgd', '--decay_frac=nan',
                    f'--out_dir={tmp_path / "out"}', code=2)
    lines = err.splitlines()
    assert len(lines) == 5 and all(line.startswith('error: ') for line in lines) and not os.path.exists(tmp_path / 'out')
    for words in ('batch_size=0', 'dropout=1.0', 'n_head=5', 'adamw, muon', 'decay_frac=nan'):
        assert words in err


def test_a_missing_dataset_or_checkpoint_names_the_next_command(project, tmp_path):
    _, err = script(project, 'train.py', '--dataset=nowhere', cwd=tmp_path, code=2)
    assert err.splitlines()[-1] == ('error: no train.bin in data/nowhere: '
                                    'run python data/text/prepare.py --input=FILE --name=nowhere')
    _, err = script(project, 'train.py', '--init_from=resume', cwd=tmp_path, code=2)
    assert err.splitlines()[-1].startswith('error: no ckpt.pt in out')
    assert os.listdir(tmp_path) == []


def test_missing_shakespeare_is_prepared_and_said(project, train_run, monkeypatch, text, capsys):
    (project / 'data' / 'shakespeare').mkdir(exist_ok=True)
    tiny = project / 'data' / 'shakespeare' / 'tinyshakespeare.txt'
    tiny.write_text(text.read_text()[:5000])
    import data.shakespeare_char.prepare as prepare
    monkeypatch.setattr(prepare, 'write_dataset', common.write_dataset)
    train_run('--dataset=shakespeare_char', '--max_iters=1')
    out = capsys.readouterr().out
    assert 'running data/shakespeare_char/prepare.py' in out.replace(os.sep, '/')
    assert (project / 'data' / 'shakespeare_char' / 'train.bin').exists()
    for name in ('train.bin', 'val.bin', 'meta.json'):
        (project / 'data' / 'shakespeare_char' / name).unlink()
    tiny.unlink()


# ---- many processes

@pytest.mark.slow
def test_two_processes_equal_one(project, train_run, tmp_path):
    # how near losses, and norms, are
    for i, (more, near, norms) in enumerate(((['--gradient_accumulation_steps=1'], 1e-4, 1e-4),
                                             (['--gradient_accumulation_steps=2', '--max_iters=3'], 1e-4, 1e-4),
                                             (['--dtype=bfloat16'], 1e-3, 5e-3))):
        one = train_run(*more, out=tmp_path / f'one{i}')
        out, err = script(project, 'train.py', *TINY, *more, f'--out_dir={tmp_path / f"two{i}"}', nproc=2)
        a, b = metrics(tmp_path / f'one{i}'), metrics(tmp_path / f'two{i}')
        assert [r['loss'] for r in a[0]] == pytest.approx([r['loss'] for r in b[0]], abs=near)
        assert [r['norm'] for r in a[0]] == pytest.approx([r['norm'] for r in b[0]], abs=norms)
        assert [r['val_loss'] for r in a[1]] == pytest.approx([r['val_loss'] for r in b[1]], abs=near)
        two = torch.load(tmp_path / f'two{i}' / 'ckpt.pt')
        assert max((one['model'][k] - two['model'][k]).abs().max().item() for k in one['model']) < 10 * near
        for line in ('legend of the log lines', 'step=1 loss', 'sample at step 0', 'using device=cpu'):
            assert out.count(line) == 1, line
        assert b[0][0]['sps_per_gpu'] * 2 == pytest.approx(b[0][0]['sps'])


@pytest.mark.slow
def test_sharded_training_equals_whole_and_checkpoints_go_both_ways(project, train_run, tmp_path):
    more = ['--gradient_accumulation_steps=4', '--max_iters=20', '--eval_interval=10', '--log_interval=1']
    ddp = train_run(*more, out=tmp_path / 'ddp')
    script(project, 'train.py', *TINY, *more, '--parallel=fsdp', '--train_iters=10', f'--out_dir={tmp_path / "fsdp"}', nproc=2)
    half = torch.load(tmp_path / 'fsdp' / 'ckpt.pt', weights_only=True)
    assert half['model'].keys() == ddp['model'].keys() and half['optimizer'][0]['state'][0]['exp_avg'].shape == \
        ddp['optimizer'][0]['state'][0]['exp_avg'].shape
    # fsdp -> one process, and one process -> fsdp
    shutil.copytree(tmp_path / 'fsdp', tmp_path / 'back')
    train_run('--init_from=resume', '--parallel=ddp', '--train_iters=5', out=tmp_path / 'back')
    script(project, 'train.py', '--init_from=resume', '--parallel=fsdp', '--activation_checkpointing=True',
           f'--out_dir={tmp_path / "back"}', nproc=2)
    expected = metrics(tmp_path / 'ddp')
    got = metrics(tmp_path / 'back')
    assert [r['loss'] for r in got[0]] == pytest.approx([r['loss'] for r in expected[0]], abs=1e-3)
    assert [r['norm'] for r in got[0]] == pytest.approx([r['norm'] for r in expected[0]], abs=5e-3)
    assert got[1][-1]['val_loss'] == pytest.approx(expected[1][-1]['val_loss'], abs=1e-3)
    # parameters in bfloat16, gradients summed in float32
    script(project, 'train.py', *TINY, *more, '--parallel=fsdp', '--dtype=bfloat16', f'--out_dir={tmp_path / "bf16"}', nproc=2)
    got = metrics(tmp_path / 'bf16')
    assert [r['loss'] for r in got[0]] == pytest.approx([r['loss'] for r in expected[0]], abs=2e-2)
    assert torch.load(tmp_path / 'bf16' / 'ckpt.pt')['model']['lm_head.weight'].dtype == torch.float32


def test_a_short_speedrun_learns_faster_than_the_defaults(train_run, tmp_path):
    """60 updates of the speedrun's recipe, made small."""
    small = ['--n_layer=2', '--n_head=2', '--n_embd=64', '--batch_size=16', '--block_size=64', '--max_iters=60', '--dataset=topics',
             '--eval_interval=60', '--eval_iters=20', '--dtype=float32']
    recipe = os.path.join(train.HERE, 'config', 'speedrun_shakespeare_char.py')
    losses = []
    for name, config in (('speedrun', [recipe]), ('defaults', ['--dropout=0.0'])):
        train_run(*config, *small, f'--out_dir={tmp_path / name}', out=tmp_path / name)
        losses.append(metrics(tmp_path / name)[1][-1]['val_loss'])
    assert losses[0] < 2.6 < 3.0 < losses[1]


@pytest.mark.slow
def test_a_compiled_sharded_model_is_compiled_block_by_block(project, train_run, tmp_path):
    more = ['--gradient_accumulation_steps=2', '--max_iters=4', '--eval_interval=2', '--dropout=0.0', '--sample_tokens=20']
    train_run(*more, out=tmp_path / 'eager')
    for i, checkpointing in enumerate((False, True)):
        out, err = script(project, 'train.py', *TINY, *more, '--parallel=fsdp', '--compile=True', f'--out_dir={tmp_path / str(i)}',
                          f'--activation_checkpointing={checkpointing}', nproc=2, env={'TORCH_LOGS': 'graph_breaks,recompiles,output_code'})
        for a, b in zip(metrics(tmp_path / 'eager'), metrics(tmp_path / str(i))):
            key = 'loss' if 'loss' in a[0] else 'val_loss'
            assert [r[key] for r in a] == pytest.approx([r[key] for r in b], abs=1e-3)
        assert 'compiled in' in out and 'Graph break' not in err and 'Recompiling' not in err
        assert re.search(r'# Source node to ATen node mapping|def call\(', err)  # something was


@pytest.mark.slow
def test_a_sharded_checkpoint_is_read_by_any_number_of_processes(project, train_run, tmp_path, capsys, monkeypatch):
    import sample
    from train import load_checkpoint, read_checkpoint
    more = ['--gradient_accumulation_steps=4', '--max_iters=20', '--eval_interval=5', '--log_interval=1']
    train_run(*more, out=tmp_path / 'ddp')
    out = tmp_path / 'sharded'
    script(project, 'train.py', *TINY, *more, '--parallel=fsdp', '--checkpoint_format=sharded', '--train_iters=10',
           f'--out_dir={out}', nproc=2)
    shards = sorted(f for f in os.listdir(out) if f.startswith('shards-'))
    assert [s.split('-')[1] for s in shards] == ['10', '5']  # of ckpt.pt and ckpt_prev.pt, which is all
    assert sorted(os.listdir(out / shards[0])) == ['.metadata', '__0_0.distcp', '__1_0.distcp']
    assert os.path.getsize(out / 'ckpt.pt') < 20_000
    # sampling from it, and going on in one process
    configure(vars(sample), [f'--out_dir={out}', '--weights=last', '--max_new_tokens=5', '--num_samples=1'])
    sample.main()
    assert 'step 10' in capsys.readouterr().out
    shutil.copytree(out, tmp_path / 'on')
    train_run('--init_from=resume', '--parallel=ddp', '--checkpoint_format=full', out=tmp_path / 'on')
    expected, got = metrics(tmp_path / 'ddp'), metrics(tmp_path / 'on')
    assert [r['loss'] for r in got[0]] == pytest.approx([r['loss'] for r in expected[0]], abs=1e-3)
    assert [r['norm'] for r in got[0]] == pytest.approx([r['norm'] for r in expected[0]], abs=5e-3)

    # damage, and code in the metadata
    data, metadata = out / shards[0] / '__1_0.distcp', out / shards[0] / '.metadata'
    content, description = bytearray(data.read_bytes()), metadata.read_bytes()
    with monkeypatch.context() as m:  # as Python 3.13 calls the paths in it
        m.setitem(sys.modules, 'pathlib._local', pathlib)
        m.setattr(pathlib.PosixPath, '__module__', 'pathlib._local')
        elsewhere = pickle.dumps(pickle.loads(description))
    assert b'pathlib._local' in elsewhere
    metadata.write_bytes(elsewhere)
    read_checkpoint(str(out / 'ckpt.pt'))
    metadata.write_bytes(description)
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(SystemExit) as e:
        sample.main()
    assert e.value.code == 2 and '__1_0.distcp' in (err := capsys.readouterr().err) and 'ckpt_prev.pt is good (step 5)' in err
    before = out / shards[1] / '__1_0.distcp'
    good = before.read_bytes()
    before.write_bytes(bytes(content))
    with pytest.raises(SystemExit):
        sample.main()
    assert 'ckpt_prev.pt is no good either' in capsys.readouterr().err
    before.write_bytes(good)
    metadata.write_bytes(pickle.dumps(Bomb(str(tmp_path / 'exploded'))))
    with pytest.raises(ValueError, match='describes no tensor'):
        read_checkpoint(str(out / 'ckpt.pt'))
    with pytest.raises(SystemExit) as e:
        load_checkpoint(str(out / 'ckpt.pt'))
    assert e.value.code == 2 and 'ckpt_prev.pt is good (step 5)' in capsys.readouterr().err
    assert not os.path.exists(tmp_path / 'exploded')
    metadata.write_bytes(description.replace(b'__1_0.distcp', b'__7_0.distcp'))
    with pytest.raises(ValueError, match='not its own'):
        read_checkpoint(str(out / 'ckpt.pt'))
    data.unlink()
    with pytest.raises(ValueError, match='lacks'):
        read_checkpoint(str(out / 'ckpt.pt'))


class Bomb:
    """Unpickled carelessly, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.slow
def test_sharded_and_full_checkpoints_resume_to_the_same_bits(project, tmp_path):
    more = [*TINY, '--parallel=fsdp', '--eval_interval=5', '--always_save_checkpoint=True']
    script(project, 'train.py', *more, f'--out_dir={tmp_path / "straight"}', nproc=2)
    script(project, 'train.py', *more, f'--out_dir={tmp_path / "parts"}', '--checkpoint_format=sharded', '--train_iters=5', nproc=2)
    script(project, 'train.py', f'--out_dir={tmp_path / "parts"}', '--init_from=resume', '--checkpoint_format=full', nproc=2)
    straight, parts = (torch.load(tmp_path / d / 'ckpt.pt', weights_only=True) for d in ('straight', 'parts'))
    assert same_tensors(straight['model'], parts['model']) and same_tensors(straight['optimizer'], parts['optimizer'])


def test_fsdp_refuses_muon_and_a_single_process(train_run, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        train_run('--optimizer=muon', '--parallel=fsdp')
    assert e.value.code == 2 and 'muon needs whole matrices' in capsys.readouterr().err
    with pytest.raises(SystemExit) as e:
        train_run('--parallel=fsdp')  # without torchrun
    assert e.value.code == 2 and 'torchrun --nproc_per_node=N' in capsys.readouterr().err and not os.path.exists(tmp_path / 'out')


@pytest.mark.slow
def test_two_nodes_equal_one_process(project, train_run, tmp_path):
    # two torchrun agents that meet on the loopback interface
    one = train_run('--max_iters=5', out=tmp_path / 'one')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    agents = [subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', f'--node_rank={i}',
                                '--nproc_per_node=1', '--rdzv_backend=c10d', f'--rdzv_endpoint=127.0.0.1:{port}', '--rdzv_id=7',
                                str(project / 'train.py'), *TINY, '--max_iters=5', f'--out_dir={tmp_path / "two"}'],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(2)]
    outputs = [agent.communicate(timeout=120) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert sum(out.count('legend of the log lines') for out, _ in outputs) == 1
    a, b = metrics(tmp_path / 'one'), metrics(tmp_path / 'two')
    assert [r['loss'] for r in a[0]] == pytest.approx([r['loss'] for r in b[0]], abs=1e-4)
    two = torch.load(tmp_path / 'two' / 'ckpt.pt')
    assert max((one['model'][k] - two['model'][k]).abs().max().item() for k in one['model']) < 1e-3


def test_under_torchrun_a_mistake_is_printed_once(project, tmp_path):
    _, err = script(project, 'train.py', '--widht=3', nproc=2, code=1)
    assert len(re.findall('^error: ', err, re.M)) == 1 and 'exitcode  : 2' in err


def test_sigterm_and_ctrl_c_finish_the_step_save_and_say_how_to_go_on(project, tmp_path):
    for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = subprocess.Popen([sys.executable, '-u', str(project / 'train.py'), *TINY, '--max_iters=100000',
                                    '--eval_interval=50000', f'--out_dir={tmp_path / str(code)}'], stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith('step=3 '):
                process.send_signal(signum)
                break
        rest = process.stdout.read()
        assert process.wait(30) == code and '--init_from=resume' in rest.splitlines()[-1]
        saved = torch.load(tmp_path / str(code) / 'ckpt.pt')['iter_num']
        assert saved >= 3 and f'(step {saved})' in rest


@pytest.mark.slow
def test_it_runs_from_another_directory(project, tmp_path):
    out, _ = script(project, 'train.py', 'config/train_shakespeare_char_cpu.py', *TINY, '--max_iters=2', '--out_dir=here', cwd=tmp_path)
    assert os.path.exists(tmp_path / 'here' / 'ckpt.pt') and os.listdir(tmp_path) == ['here']
    assert str(tmp_path / 'here') == (project / 'checkpoints.log').read_text().splitlines()[-1]
    script(project, 'train.py', *TINY, '--max_iters=2', '--out_dir=here', cwd=tmp_path)
    assert (project / 'checkpoints.log').read_text().splitlines().count(str(tmp_path / 'here')) == 1


def test_float16_trains_with_a_scaler_that_is_saved(train_run, tmp_path):
    whole = train_run('--dtype=float16', out=tmp_path / 'whole')
    assert whole['scaler']['scale'] > 1
    train_run('--dtype=float16', '--train_iters=5', out=tmp_path / 'parts')
    parts = train_run('--init_from=resume', out=tmp_path / 'parts')
    assert same_tensors(whole['model'], parts['model']) and whole['scaler'] == parts['scaler']


def test_a_finetuned_gpt2_starts_from_its_weights(train_run, tmp_path, capsys):
    transformers = pytest.importorskip('transformers')
    vocab = json.load(open(os.path.join(train.HERE, 'data', 'topics', 'meta.json')))['vocab_size']
    config = transformers.GPT2Config(vocab_size=vocab, n_positions=64, n_layer=1, n_head=2, n_embd=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / 'hf')
    arguments = [a for a in TINY if not a.startswith(('--n_', '--dropout'))]
    configure(vars(train), [])
    handlers = arguments + [f'--init_from={tmp_path / "hf"}', '--max_iters=0', f'--out_dir={tmp_path / "ft"}']
    train.main(configure(vars(train), handlers))
    saved = torch.load(tmp_path / 'ft' / 'ckpt.pt')
    reference = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / 'hf').state_dict()
    assert torch.equal(saved['model']['transformer.wte.weight'], reference['transformer.wte.weight'])
    assert torch.equal(saved['model']['transformer.wpe.weight'], reference['transformer.wpe.weight'][:32])
    assert torch.load(tmp_path / 'ft' / 'model.pth')['iter_num'] == 0  # it may never get better
    assert saved['model_args']['activation'] == 'gelu_tanh' and saved['config']['n_embd'] == 16
    with pytest.raises(SystemExit):
        train.main(configure(vars(train), handlers + ['--n_layer=5']))
    assert 'n_layer=5' in capsys.readouterr().err
