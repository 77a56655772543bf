import dataclasses
import json
import os

import pytest
import torch

from conftest import TINY, script


@pytest.mark.parametrize('nproc', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_last_line_is_json_with_consistent_figures(project, tmp_path, nproc):
    out, _ = script(project, 'bench.py', 'config/train_shakespeare_char_cpu.py', *TINY, '--bench_steps=4', '--bench_tokens=10',
                    '--peak_tflops=0.001', '--real_tokens=True', *([] if nproc else ['--profile=True']), nproc=nproc, cwd=tmp_path)
    result = json.loads(out.splitlines()[-1])
    assert result['tps'] * result['dt'] == pytest.approx(4 * 32) and result['dt_min'] <= result['dt'] <= result['dt_max']
    assert 0 < result['dtf'] < result['dt'] and 0 < result['dtb'] < result['dt'] and result['world_size'] == max(1, nproc)
    assert result['peak_tflops'] == pytest.approx(0.001 * max(1, nproc)) and result['mfu'] > 0
    assert 50 < result['peak_memory_mb'] < 5000 and all(result[f'sample_tps_{n}'] > 0 for n in ('1', '10', '1_int8'))
    assert result['startup_seconds'] > 0 and result['first_step_seconds'] > 0
    if not nproc:
        assert json.load(open(tmp_path / 'trace.json'))['traceEvents']
        os.remove(tmp_path / 'trace.json')
    assert os.listdir(tmp_path) == []


def test_the_baseline_and_the_fast_step_learn_alike(project, run):
    """20 updates on the same batches without dropout: float32 with torch's own parts, and bfloat16 with ours."""
    import bench
    from model import GPT, GPTConfig
    from train import Tokens, make_optimizers, train_step
    c = dict(optimizer='adamw', weight_decay=0.1, learning_rate=1e-3, beta1=0.9, beta2=0.95)
    losses = []
    for plain in (True, False):
        own_run = dataclasses.replace(run, dtype=torch.float32 if plain else torch.bfloat16)
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=32, vocab_size=128, n_layer=2, n_head=2, n_embd=64))
        optimizers = make_optimizers(model, own_run, c)
        if plain:
            bench.make_plain(model)
            optimizers[0].param_groups[0].update(fused=False, foreach=False)
        tokens = Tokens(project / 'data/topics/train.bin', 32)
        scaler = torch.amp.GradScaler('cpu', enabled=False)
        losses.append([train_step(model, optimizers, scaler, own_run, [(0, *tokens.train_batch(8 * i, 8, run))], 1, 1.0, 1.0)[0]
                       for i in range(20)])
    assert losses[0][0] - min(losses[0]) > 1 and losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.002)


def test_an_explicit_dtype_is_the_one_that_is_sampled_in(run, monkeypatch):
    import bench
    from configurator import configure
    from model import GPT, GPTConfig
    taken, real = [], bench.place_for_generation
    monkeypatch.setattr(bench, 'place_for_generation', lambda model, device, dtype, *more: taken.append(dtype) or real(model, device, dtype, *more))
    for dtype in ('float32', 'bfloat16'):
        configure(vars(bench), [f'--dtype={dtype}'])
        bench.time_sampling(GPT(GPTConfig(block_size=16, vocab_size=65, n_layer=1, n_head=1, n_embd=16)), 1, 4, run)
    assert taken == [torch.float32, torch.bfloat16]
    configure(vars(bench), [])


def test_hellaswag_scores_equal_a_direct_computation(run):
    import bench
    from model import GPT, GPTConfig

    class Words:
        """A token for each character, as a tokenizer that needs no download."""
        def encode(self, text):
            return torch.tensor([ord(c) for c in text])
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=128, n_layer=1, n_head=1, n_embd=16))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    model.eval()
    rows = [dict(ctx='A man sits', endings=['down', 'on a bench', 'x', 'by the sea'], label=i) for i in range(4)]
    rows += [dict(ctx='The sun', endings=['sets', 'rises and sets', 'is', 'goes'], label=1)]
    expected = []
    for row in rows:
        sums, means = [], []
        for ending in row['endings']:  # token by token, each from its own context
            text, total = row['ctx'], 0.0
            for c in ' ' + ending:
                with torch.no_grad():
                    logits = model(torch.tensor([[ord(x) for x in text]]))[0][0, -1].double()
                total += logits.log_softmax(-1)[ord(c)].item()
                text += c
            sums.append(total)
            means.append(total / (len(ending) + 1))
        got = bench.score_endings(model, Words(), row['ctx'], row['endings'], run)
        assert got[0].tolist() == pytest.approx(sums, abs=1e-3) and got[1].tolist() == pytest.approx(means, abs=1e-4)
        expected.append((sums.index(max(sums)) == row['label'], means.index(max(means)) == row['label']))
    acc, acc_norm = bench.hellaswag(model, Words(), rows, run)
    assert (acc, acc_norm) == pytest.approx((sum(a for a, _ in expected) / 5, sum(b for _, b in expected) / 5))


@pytest.mark.parametrize('arguments, words', [
    (['--init_from=gpt2'], '--init_from=gpt2 is for --task=hellaswag'), (['--compare=1', '--rotary=True'], 'without rotary')])
def test_mistakes_end_with_one_line(project, arguments, words):
    _, err = script(project, 'bench.py', *arguments, code=2)
    assert err.startswith('error: ') and words in err and len(err.splitlines()) == 1
