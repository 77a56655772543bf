"""bench.py: its figures, and that the plain way learns what quill learns."""
import dataclasses
import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from conftest import TINY, script

import bench
import sample
import train
from configurator import configure
from data.dataset import Tokens
from model import GPT, GPTConfig


@pytest.fixture(autouse=True)
def defaults():
    """Restore the default settings, which are module globals."""
    yield
    configure('bench', [], base='train')


def bench_settings(*arguments):
    configure('bench', arguments, base='train', check=bench.check_settings)


@pytest.mark.parametrize('nproc', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_last_line_is_json_with_consistent_figures(project, tmp_path, nproc):
    profile = [] if nproc else ['--profile=True']
    out, _ = script(
        project, 'bench.py', 'config/train_shakespeare_char_cpu.py', *TINY, '--bench_steps=4',
        '--bench_tokens=10', '--peak_tflops=0.001', '--real_tokens=True', *profile,
        nproc=nproc, cwd=tmp_path)
    result, processes = json.loads(out.splitlines()[-1]), max(1, nproc)
    assert result['world_size'] == processes and result['steps'] == 4
    assert result['tps'] * result['dt'] == pytest.approx(4 * 32)
    assert result['dt_min'] <= result['dt'] <= result['dt_max']
    # other updates than those of dt; that the parts fit into an update is tested in test_train.py
    assert 0 < result['dtf_min'] and 0 < result['dtb_min']
    assert result['peak_tflops'] == pytest.approx(0.001 * processes)
    # PaLM's formula: 6 N + 12 L C T FLOPs per token
    flops = (6 * result['params'] + 12 * 2 * 32 * 32) * result['tps']
    assert result['mfu'] == pytest.approx(100 * flops / (0.001e12 * processes))
    assert 50 < result['peak_memory_mb'] < 5000
    assert all(result[f'sample_tps_{which}'] > 0 for which in ('1', '10', '1_int8'))
    assert result['startup_seconds'] > 0 and result['first_step_seconds'] > 0
    if not nproc:
        with open(tmp_path / 'trace.json') as f:
            assert json.load(f)['traceEvents']
        os.remove(tmp_path / 'trace.json')
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_the_plain_way_runs_and_is_compared(project, tmp_path):
    out, _ = script(project, 'bench.py', *TINY, '--dtype=auto', '--compare=1', '--bench_steps=2',
                    '--bench_tokens=4', cwd=tmp_path)
    table = json.loads(out.splitlines()[-1])
    for key in ('tps', 'dt', 'sample_tps_1', 'sample_tps_10', 'sample_tps_1_int8',
                'peak_memory_mb', 'startup_seconds', 'first_step_seconds'):
        row = table[key]
        assert row['baseline'] > 0 and row['ratio'] == row['quill'] / row['baseline'], key
    assert os.listdir(tmp_path) == []


def test_the_plain_way_and_quill_learn_alike(project, process):
    """20 updates on the same batches without dropout, in float32 with torch's parts, and ours."""
    tokens = Tokens(project / 'data' / 'topics' / 'train.bin', 32)
    batches = [(0, *tokens.train_batch(8 * i, 8, process)) for i in range(20)]
    bench_settings('--batch_size=8', '--block_size=32', '--learning_rate=1e-3')
    losses = {}
    for plain in (True, False):
        torch.manual_seed(0)
        shape = dict(block_size=32, vocab_size=128, n_layer=2, n_head=2, n_embd=64,
                     attn_scale=20.0, embed_norm=True)
        model = GPT(GPTConfig(**shape))
        own = dataclasses.replace(process, dtype=torch.float32 if plain else torch.bfloat16)
        learner = train.make_learner(model, own)
        if plain:
            bench.make_plain(model)
            for group in learner.optimizers[0].param_groups:
                group.update(fused=False, foreach=False)
        losses[plain] = [train.update(learner, [batch], factor=1.0)['loss'] for batch in batches]
    assert losses[True][0] - min(losses[True]) > 1 and losses[True] != losses[False]
    assert losses[False] == pytest.approx(losses[True], rel=0.002)


def test_without_the_module_resource_there_is_no_peak_memory(process, monkeypatch, capsys):
    peak = bench.peak_memory(process)
    assert 0 <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6 - peak < 100
    monkeypatch.setitem(sys.modules, 'resource', None)  # as on Windows
    assert bench.peak_memory(process) is None
    row = json.dumps({'tps': 2.0, 'peak_memory_mb': None})
    monkeypatch.setattr(bench, 'compare', 2)
    monkeypatch.setattr(bench.subprocess, 'run', lambda command, **_: (
        subprocess.CompletedProcess(command, 0, row + '\n', '')))
    bench.compare_with_baseline([])
    table = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert table == {'tps': {'baseline': 2.0, 'quill': 2.0, 'ratio': 1.0}}


def test_an_explicit_dtype_is_the_dtype_of_generation(process, monkeypatch):
    taken, place_for_generation = [], sample.place_for_generation

    def spy(model, device, dtype, *more):
        taken.append(dtype)
        return place_for_generation(model, device, dtype, *more)
    monkeypatch.setattr(sample, 'place_for_generation', spy)
    for dtype in ('float32', 'bfloat16'):
        bench_settings(f'--dtype={dtype}')
        model = GPT(GPTConfig(block_size=16, vocab_size=65, n_layer=1, n_head=1, n_embd=16))
        tps, first = bench.time_samples(model, 1, 4, process)
        assert tps > 0 and first > 0
    assert taken == [torch.float32, torch.bfloat16]


def test_a_slow_first_repeat_of_a_sample_is_shown(process, monkeypatch):
    bench_settings('--dtype=float32')
    model = GPT(GPTConfig(block_size=16, vocab_size=65, n_layer=1, n_head=1, n_embd=16))
    # 6 s for the first repeat; 2, 1 and 3 s for the later ones
    times = [0, 6, 10, 12, 20, 21, 30, 33]
    monkeypatch.setattr(type(process), 'clock', lambda self: times.pop(0))
    assert bench.time_samples(model, 1, 4, process) == (4 / 2, 6 / 2)
    monkeypatch.setattr(bench, 'time_samples', lambda model, samples, *more: (samples, 3.0))
    result = bench.time_generation(model, process)
    assert result == dict(sample_tps_1=1, sample_first_1=3.0, sample_tps_10=10,
                          sample_tps_1_int8=1)


@pytest.mark.parametrize('arguments, words', [
    (['--init_from=gpt2'], '--init_from=gpt2: the benchmark is of new weights'),
    (['--compare=1', '--rotary=True'], 'without rotary'),
    (['--baseline=True', '--qk_norm=True'], 'without rotary, qk_norm'),
    (['--baseline=True', '--dtype=bfloat16'], '--baseline is in float32'),
    (['--task=hellaswag'], 'task is one of speed, sample'),
    (['--bench_steps=0'], 'bench_steps is'), (['--n_embd=385'], 'n_embd=385')])
def test_mistakes_end_with_one_line(capsys, arguments, words):
    with pytest.raises(SystemExit) as e:
        bench_settings(*arguments)
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err
    assert err.startswith('error: ') and len(err.splitlines()) == 1


def test_a_mistake_on_the_command_line_ends_with_one_line(project):
    out, err = script(project, 'bench.py', '--compare=1', '--rotary=True', code=2)
    assert not out
    assert err.startswith('error: ') and 'without rotary' in err and len(err.splitlines()) == 1
