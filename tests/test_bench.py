import json
import os

import pytest

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
