"""What holds on a CUDA device: python -m pytest -m gpu. Skipped on machines without one."""
import json
import os

import pytest
import torch
from conftest import TINY, metrics, same_tensors, script

import sample
from configurator import configure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]
PLAIN = ['--dropout=0.0', '--learning_rate=1e-3', '--max_iters=20', '--eval_interval=10',
         '--compile=False']


def losses(out):
    return [r['loss'] for r in metrics(out)[0]]


@pytest.mark.parametrize('choice, error', [
    ('--dtype=float32', 0.01), ('--dtype=bfloat16', 0.05), ('--dtype=float16', 0.05),
    ('--optimizer=muon', 0.05), ('--compile=True', 0.05)])
def test_training_follows_the_cpu(train_run, tmp_path, choice, error):
    optimizer = [choice] if 'muon' in choice else []
    train_run(*PLAIN, '--device=cpu', '--dtype=float32', *optimizer, out=tmp_path / 'cpu')
    checkpoint = train_run(*PLAIN, '--device=cuda', '--dtype=bfloat16', choice,
                           out=tmp_path / 'gpu')
    cpu, gpu = losses(tmp_path / 'cpu'), losses(tmp_path / 'gpu')
    assert gpu == pytest.approx(cpu, abs=error)
    assert gpu != cpu  # so the GPU has computed them
    assert bool(checkpoint['scaler']) == (choice == '--dtype=float16')


@pytest.mark.parametrize('more', [
    ['--dtype=bfloat16'], ['--dtype=float16'], ['--dtype=bfloat16', '--compile=True']])
def test_deterministic_runs_resume_to_the_same_bits(train_run, tmp_path, more):
    # with dropout
    more = ['--device=cuda', '--deterministic=True', '--eval_interval=5', '--compile=False', *more]
    straight = train_run(*more, out=tmp_path / 'straight')
    train_run(*more, '--train_iters=5', out=tmp_path / 'parts')
    parts = train_run('--init_from=resume', out=tmp_path / 'parts')
    torch.use_deterministic_algorithms(False)
    for key in ('model', 'optimizer', 'scaler'):
        assert same_tensors(straight[key], parts[key]), key


def test_a_checkpoint_moves_between_cpu_and_gpu(train_run, tmp_path, capsys):
    more = [*PLAIN, '--dtype=float32']
    moved = tmp_path / 'moved'
    train_run(*more, '--device=cpu', out=tmp_path / 'cpu')
    train_run(*more, '--device=cuda', '--train_iters=7', out=moved)
    train_run('--init_from=resume', '--device=cpu', '--train_iters=7', out=moved)
    checkpoint = train_run('--init_from=resume', '--device=cuda', out=moved)
    assert losses(moved) == pytest.approx(losses(tmp_path / 'cpu'), abs=0.01)
    assert checkpoint['iter_num'] == 20
    texts = []
    for device in ('cpu', 'cuda'):
        capsys.readouterr()
        configure(vars(sample), [
            f'--out_dir={moved}', f'--device={device}', '--dtype=float32', '--temperature=0',
            '--num_samples=1', '--max_new_tokens=20'])
        sample.main()
        texts.append(capsys.readouterr().out.split('\n', 2)[2].rsplit('\n', 2)[0])
    assert texts[0] == texts[1] and len(texts[0]) >= 20


def test_peak_memory_and_speed_are_reported(project, tmp_path):
    out, _ = script(project, 'bench.py', *TINY, '--device=cuda', '--bench_steps=4',
                    '--bench_tokens=10', cwd=tmp_path)
    result = json.loads(out.splitlines()[-1])
    assert result['device'].startswith('cuda') and 0 < result['peak_memory_mb'] < 5000
    assert result['sample_tps_1'] > 0 and 'sample_tps_1_int8' not in result  # int8 is for CPUs
    assert os.listdir(tmp_path) == []
