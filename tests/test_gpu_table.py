"""tests/gpu_table.py, with the answers of a GPU that is not there."""
import json
import pathlib

import bench
import train
from configurator import configure

import gpu_table
import pytest
import torch


def test_the_table_has_every_figure_once_and_its_flags_exist(monkeypatch, capsys):
    commands = []

    def run(folder, script, *arguments):
        commands.append((folder, script, *arguments))
        if folder == 'nano':
            time = 'time per iteration: 200.0ms' if script == 'bench.py' else 'iter 9: time 100.0ms'
            return f'iter 0: loss 4.2, time 9000.0ms, mfu 1%\n{time}, MFU: 30%\n'
        configure('bench', [], base='train')
        if script == 'bench.py':
            unknown = [a for a in arguments if a.startswith('--') and a[2:].partition('=')[0]
                       not in {**vars(train), **vars(bench)}]
            assert not unknown and (pathlib.Path(folder) / arguments[0]).exists()
            return 'noise\n' + json.dumps(dict(
                tps=123456.0, mfu=41.5, sample_tps_1=400.0, sample_tps_10=3000.0))
        out = pathlib.Path(arguments[-1].removeprefix('--out_dir='))
        out.mkdir()
        rows = [dict(step=0, val_loss=4.2, train_seconds=0), dict(step=9, loss=1.2),
                dict(step=600, val_loss=1.45, train_seconds=12.3)]
        (out / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, rows)))
        return ''
    monkeypatch.setattr(gpu_table, 'run', run)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'Some GPU')
    gpu_table.main('nano')
    out = capsys.readouterr().out
    assert out.startswith('Some GPU, torch ')
    rows = [line for line in out.splitlines() if line.startswith('| ')][1:]
    assert len(rows) == len(gpu_table.ROWS) + 1
    assert rows[0] == ('| GPT-2 124M, 12 x 1024: tokens/s | 123,456 | 41.5% | 61,440 | 2.01 |')
    assert rows[2].endswith('| 123,456 | 41.5% | 163,840 | 0.75 |')
    assert 'val loss after 12 s of training | 1.4500' in out
    assert sum('--task=sample' in command for command in commands) == 1
    commands.clear()
    gpu_table.main()
    assert 'nano' not in [command[0] for command in commands]


def test_a_script_that_fails_ends_the_table(tmp_path):
    with pytest.raises(SystemExit) as e:
        gpu_table.run(tmp_path, '-c', 'raise SystemExit(3)')
    assert 'exit code 3' in str(e.value)
