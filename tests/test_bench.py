import json
import os

import pytest
import torch

from conftest import TINY, script


@pytest.mark.parametrize('nproc', [0, 2])
def test_the_last_line_is_json_with_consistent_figures(project, tmp_path, nproc):
    out, _ = script(project, 'bench.py', 'config/train_shakespeare_char_cpu.py', *TINY, '--bench_steps=4', '--bench_tokens=10',
                    '--peak_tflops=0.001', '--real_tokens=True', *([] if nproc else ['--profile=True']), nproc=nproc, cwd=tmp_path)
    result = json.loads(out.splitlines()[-1])
    assert result['tps'] * result['dt'] == pytest.approx(4 * 32) and result['dt_min'] <= result['dt'] <= result['dt_max']
    assert 0 < result['dtf'] < result['dt'] and 0 < result['dtb'] < result['dt'] and result['world_size'] == max(1, nproc)
    assert result['peak_tflops'] == pytest.approx(0.001 * max(1, nproc)) and result['mfu'] > 0
    assert 50 < result['peak_memory_mb'] < 5000 and result['sample_tps_1'] > 0 and result['sample_tps_10'] > 0
    assert result['startup_seconds'] > 0 and result['first_step_seconds'] > 0
    if not nproc:
        assert json.load(open(tmp_path / 'trace.json'))['traceEvents']
        os.remove(tmp_path / 'trace.json')
    assert os.listdir(tmp_path) == []


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
