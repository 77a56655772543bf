"""What holds on a CUDA device: python -m pytest -m gpu. Skipped on machines without one."""
import json
import os
import time
import warnings

import sample
import train
from configurator import configure, setup
from model import GPT, GPTConfig
from sample import place_for_generation

import pytest
import torch
from conftest import TINY, metrics, same_tensors, script

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]
PLAIN = ['--dropout=0.0', '--learning_rate=1e-3', '--max_iters=20', '--eval_interval=10',
         '--compile=False']
MODERN = ['--optimizer=muon', '--rotary=True', '--qk_norm=True', '--activation=relu2',
          '--norm=rmsnorm', '--token_shift=True', '--tie_weights=False', '--softcap=15',
          '--half_rotary=True', '--attn_scale=0.12', '--embed_norm=True', '--head_lr=4e-3']


@pytest.fixture(autouse=True)
def as_before():
    """Restore what setup and generation switch for the whole process."""
    precision = torch.get_float32_matmul_precision()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(precision)
    torch.compiler.reset()  # after eight models of one function, it runs the next ones uncompiled
    configure('train', [])


def losses(out):
    return [r['loss'] for r in metrics(out)[0]]


@pytest.mark.parametrize('shape', [[], MODERN])
@pytest.mark.parametrize('choices', [
    ['--dtype=float32'], ['--dtype=bfloat16'], ['--dtype=float16'], ['--compile=True'],
    ['--compile=True', '--activation_checkpointing=True']])
def test_training_follows_the_cpu(train_run, tmp_path, shape, choices):
    train_run(*PLAIN, '--device=cpu', '--dtype=float32', *shape, out=tmp_path / 'cpu')
    checkpoint = train_run(*PLAIN, '--device=cuda', '--dtype=bfloat16', *shape, *choices,
                           out=tmp_path / 'gpu')
    cpu, gpu = losses(tmp_path / 'cpu'), losses(tmp_path / 'gpu')
    # in such runs on a CPU, the losses in bfloat16 and float32 differ by 0.0004
    assert gpu == pytest.approx(cpu, abs=0.005)
    assert gpu != cpu  # so the GPU has computed them
    assert bool(checkpoint['scaler']) == ('--dtype=float16' in choices)


@pytest.mark.parametrize('checkpointing', [False, True])
def test_compiled_dropout_drops_as_much_as_eager(train_run, tmp_path, checkpointing):
    more = ['--device=cuda', '--dropout=0.2', '--learning_rate=1e-3', '--max_iters=20',
            f'--activation_checkpointing={checkpointing}']
    for compiled in (False, True):
        train_run(*more, f'--compile={compiled}', out=tmp_path / str(compiled))
    # the masks differ, so the losses of single updates do, too
    eager, compiled = (sum(losses(tmp_path / name)) / 20 for name in ('False', 'True'))
    assert compiled == pytest.approx(eager, abs=0.05)


class RandomTokens:
    """Stands in for the Tokens of a dataset."""
    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def train_batch(self, first, count, process):
        shape = count, train.block_size
        return torch.randint(self.vocab_size, shape), torch.randint(self.vocab_size, shape)


def learner_on_the_gpu(*arguments):
    """Return a Learner of a tiny model on the GPU, and random data for it."""
    configure('train', [*TINY, '--device=cuda', '--dtype=bfloat16', *arguments])
    process = setup(device='cuda', dtype='bfloat16')
    data = RandomTokens(65)
    return train.make_learner(GPT(train.model_config(65)), process), data


@pytest.mark.parametrize('more', [[], ['--optimizer=muon'], ['--grad_clip=0']])
def test_an_untimed_update_waits_for_the_gpu_once(more):
    learner, data = learner_on_the_gpu(*more)

    def update():
        batches = train.training_batches(learner, data, train.Progress())
        return train.update(learner, batches, 1.0, timed=False)
    update()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            update()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert len([w for w in caught if 'synchroniz' in str(w.message)]) == 1


def test_the_first_sample_takes_at_most_three_times_as_long_as_the_second():
    device = torch.device('cuda')
    model = GPT(GPTConfig(block_size=512, vocab_size=65, n_layer=4, n_head=4, n_embd=256))
    place_for_generation(model, device, torch.bfloat16)
    idx, seconds = torch.zeros(1, 1, dtype=torch.int64, device=device), []
    list(model.generate(idx, 4))  # loads the kernels
    for _ in range(2):
        t0 = time.perf_counter()
        list(model.generate(idx, 300))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - t0)
    assert seconds[0] < 3 * seconds[1]


def test_a_compiled_update_holds_the_logits_about_once(train_run, tmp_path):
    torch.cuda.reset_peak_memory_stats()
    train_run('--device=cuda', '--dtype=bfloat16', '--compile=True', '--batch_size=4',
              '--block_size=1024', '--max_iters=2', '--dropout=0', '--eval_interval=100')
    small = torch.cuda.max_memory_allocated()
    configure('train', [*TINY, '--device=cuda', '--batch_size=4', '--block_size=1024',
                            '--dropout=0', '--compile=True'])
    learner = train.make_learner(GPT(train.model_config(50257)), setup(
        device='cuda', dtype='bfloat16', compile=True))
    train.compile_forward(learner)
    torch.cuda.reset_peak_memory_stats()
    data = RandomTokens(50257)
    train.update(learner, train.training_batches(learner, data, train.Progress()), 1.0)
    logits = 4 * 1024 * 50304
    # in bfloat16, their gradient in bfloat16, and one copy of either in float32
    assert torch.cuda.max_memory_allocated() - small < 8 * logits


def test_out_of_memory_is_one_line(project, tmp_path):
    _, err = script(project, 'train.py', *TINY, '--device=cuda', '--batch_size=200000',
                    '--n_embd=512', '--sample_tokens=0', f'--out_dir={tmp_path / "out"}', code=1)
    assert err.splitlines()[-1].startswith('error: out of memory, try --batch_size=')
    assert 'Traceback' not in err


def test_fsdp_and_muon_on_one_rank_with_nccl_follow_one_process(project, train_run, tmp_path):
    more = [*PLAIN, '--device=cuda', '--dtype=float32', '--optimizer=muon']
    train_run(*more, out=tmp_path / 'one')
    # one process takes ddp, so the layers are sharded by hand
    launcher = tmp_path / 'sharded.py'
    launcher.write_text('''
import sys, train, model
from configurator import run_main
import torch, torch.distributed as dist
real = train.make_learner
def make_learner(gpt, process):
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    return real(model.shard(gpt.to(process.device), process), process)
train.make_learner = make_learner
run_main(lambda: train.main(sys.argv[1:]))
''')
    script(project, launcher, *TINY, *more, f'--out_dir={tmp_path / "fsdp"}',
           env={'PYTHONPATH': str(project)})
    assert losses(tmp_path / 'fsdp') == pytest.approx(losses(tmp_path / 'one'), abs=0.005)


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
        configure('sample', [
            f'--out_dir={moved}', f'--device={device}', '--dtype=float32', '--temperature=0',
            '--num_samples=1', '--max_new_tokens=20'])
        sample.main()
        texts.append(capsys.readouterr().out.split('\n', 2)[2].rsplit('\n', 2)[0])
    assert texts[0] == texts[1] and len(texts[0]) >= 20


def test_peak_memory_and_speed_are_reported(project, tmp_path):
    out, _ = script(project, 'bench.py', *TINY, '--device=cuda', '--bench_steps=4',
                    '--bench_tokens=10', cwd=tmp_path)
    result = json.loads(out.splitlines()[-1])
    assert result['device'].startswith('cuda') and 0 < result['gpu_memory_mb'] < 5000
    assert result['sample_tps_1'] > 0 and result['sample_tps_10'] > 0
    assert os.listdir(tmp_path) == []
