"""bench.py: its figures."""
import json
import os
import resource
import shutil

import bench
import sample
import train
from configurator import configure
from model import GPT, GPTConfig

import pytest
import torch
from conftest import TINY, script


@pytest.fixture(autouse=True)
def defaults():
    """Restore the default settings, which are module globals."""
    yield
    configure('bench', [], base='train')


def bench_settings(*arguments):
    configure('bench', arguments, base='train', check=train.check_settings)


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
    assert all(result[f'sample_tps_{which}'] > 0 for which in ('1', '10'))
    assert result['sample_first_1'] > 0
    assert result['startup_seconds'] > 0 and result['first_step_seconds'] > 0
    if not nproc:
        with open(tmp_path / 'trace.json') as f:
            assert json.load(f)['traceEvents']
        os.remove(tmp_path / 'trace.json')
    assert os.listdir(tmp_path) == []


def test_peak_memory_is_that_of_the_process(process):
    peak = bench.peak_memory(process)
    assert 0 <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6 - peak < 100


def tiny_gpt():
    return GPT(GPTConfig(block_size=16, vocab_size=65, n_layer=1, n_head=1, n_embd=16))


def test_an_explicit_dtype_is_the_dtype_of_generation(process, monkeypatch):
    taken, place_for_generation = [], sample.place_for_generation

    def spy(model, device, dtype):
        taken.append(dtype)
        return place_for_generation(model, device, dtype)
    monkeypatch.setattr(sample, 'place_for_generation', spy)
    for dtype in ('float32', 'bfloat16'):
        bench_settings(f'--dtype={dtype}')
        result = bench.time_generation(tiny_gpt(), 1, process)
        assert result['sample_tps_1'] > 0 and result['sample_first_1'] > 0
    assert taken == [torch.float32, torch.bfloat16]


def test_a_slow_first_repeat_of_a_sample_is_shown(process, monkeypatch):
    bench_settings('--dtype=float32', '--bench_tokens=4')
    # 6 s for the first repeat; 2, 1 and 3 s for the later ones
    times = [0, 6, 10, 12, 20, 21, 30, 33]
    monkeypatch.setattr(type(process), 'clock', lambda self: times.pop(0))
    result = bench.time_generation(tiny_gpt(), 10, process)
    assert result == dict(sample_tps_10=10 * 4 / 2, sample_first_10=6 / 2)


@pytest.mark.parametrize('arguments, words', [
    (['--init_from=gpt2'], 'init_from=gpt2 must be one of scratch'),
    (['--task=hellaswag'], 'task=hellaswag must be one of speed, sample'),
    (['--bench_steps=0'], 'bench_steps=0 must be'), (['--n_embd=385'], 'n_embd=385')])
def test_mistakes_end_with_one_line(capsys, arguments, words):
    with pytest.raises(SystemExit) as e:
        bench_settings(*arguments)
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err
    assert err.startswith('error: ') and len(err.splitlines()) == 1


def test_a_mistake_on_the_command_line_ends_with_one_line(project):
    out, err = script(project, 'bench.py', '--init_from=gpt2', code=2)
    assert not out
    assert err.startswith('error: ') and 'init_from=gpt2 must be one of' in err
    assert len(err.splitlines()) == 1


# what somebody who edits model.py may get wrong: a name, a keyword, a shape
BUGS = {
    'NameError: ': '''
    def forward(self, x):
        return self.c_proj(self.activation(hidden))''',
    'TypeError: ': '''
    def __init__(self, config):
        super().__init__(config)
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, biases=False)''',
    'RuntimeError: ': '''
    def forward(self, x):
        return self.c_fc(x) @ self.c_fc(x)'''}


@pytest.mark.parametrize('name', ['sample.py', 'bench.py'])
@pytest.mark.parametrize('bug', BUGS)
def test_a_bug_in_model_py_keeps_its_traceback(project, train_run, tmp_path, name, bug):
    arguments = [*TINY, '--bench_steps=1']
    if name == 'sample.py':
        train_run('--max_iters=1')
        arguments = [f'--out_dir={tmp_path / "out"}']
    copy = shutil.copytree(project, tmp_path / 'edited')
    with open(copy / 'model.py', 'a') as f:
        f.write(f'\nclass MLP(MLP):\n{BUGS[bug]}\n')
    _, err = script(copy, name, *arguments, '--device=cpu', '--dtype=float32', code=1)
    assert err.startswith('Traceback') and f'{copy}/model.py", line' in err
    assert err.splitlines()[-1].startswith(bug)
