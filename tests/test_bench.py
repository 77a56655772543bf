"""bench.py: its figures, and what it says about runs."""
import json
import os
import random
import re
import shutil
import sys

import bench
import sample
import train
from configurator import configure
from data import build
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
    out, _ = script(
        project, 'bench.py', 'config/train_shakespeare_char_cpu.py', *TINY, '--bench_steps=4',
        '--bench_tokens=10', '--peak_tflops=0.001', nproc=nproc, cwd=tmp_path)
    result, processes = json.loads(out.splitlines()[-1]), max(1, nproc)
    vocab_size = json.loads((project / 'data' / 'topics' / 'meta.json').read_text())['vocab_size']
    assert result['world_size'] == processes
    assert result['params'] == 2 * 12 * 32**2 + vocab_size * 32 + 5 * 32
    assert result['tps'] * result['dt'] == pytest.approx(4 * 32)
    # PaLM's formula: 6 N + 12 L C T FLOPs per token
    flops = (6 * result['params'] + 12 * 2 * 32 * 32) * result['tps']
    assert result['mfu'] == pytest.approx(100 * flops / (0.001e12 * processes))
    assert all(result[f'sample_tps_{which}'] > 0 for which in ('1', '10'))
    assert os.listdir(tmp_path) == []


def test_as_many_updates_as_asked_for_are_timed(process, monkeypatch):
    bench_settings(*TINY, '--bench_steps=5')
    learner = train.make_learner(tiny_gpt(), process)
    times = [0, 9, 10, 19, 20, 29]  # three updates that are not counted
    for i, seconds in enumerate((1, 5, 2, 4, 9)):
        times += [100 * i, 100 * i + seconds]
    monkeypatch.setattr(type(process), 'clock', lambda self, wait=True: times.pop(0))
    monkeypatch.setattr(train, 'update', lambda *arguments, **more: None)
    monkeypatch.setattr(bench.configurator, 'peak_flops', lambda process: None)
    result = bench.time_updates(learner)
    assert result['dt'] == 4 and not times


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
        assert result['sample_tps_1'] > 0
    assert taken == [torch.float32, torch.bfloat16]


def test_the_first_repeat_of_a_sample_is_not_counted(process, monkeypatch):
    bench_settings('--dtype=float32', '--bench_tokens=4')
    # 6 s for the first repeat; 2, 1 and 3 s for the later ones
    times = [0, 6, 10, 12, 20, 21, 30, 33]
    monkeypatch.setattr(type(process), 'clock', lambda self: times.pop(0))
    assert bench.time_generation(tiny_gpt(), 10, process) == dict(sample_tps_10=10 * 4 / 2)


@pytest.mark.parametrize('arguments, words', [
    (['--init_from=gpt2'], 'init_from=gpt2 must be one of scratch'),
    (['--task=hellaswag'], 'task=hellaswag must be one of speed, sample, runs'),
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


# -----------------------------------------------------------------------------
# comparing runs

def write_run(folder, loss, step=20, max_iters=20, **settings):
    """Write what a run of train.py leaves, with evaluations at 0, step / 2 and step updates."""
    folder.mkdir()
    config = configure('train', []) | dict(out_dir=str(folder), max_iters=max_iters)
    config |= {'evaluated_on': '00000000-1000-4x256'} | settings
    (folder / 'config.json').write_text(json.dumps(config))
    rows = [{'step': i, 'val_loss': value, 'bits_per_byte': value / 2, 'train_seconds': i / 4}
            for i, value in ((0, 4.2), (step // 2, loss + 1), (step, loss))]
    rows.insert(2, {'step': step - 1, 'loss': 9.9, 'dt': 0.25})
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))


def write_runs(folder, name, losses, **settings):
    for seed, loss in enumerate(losses):
        write_run(folder / f'{name}-{seed}', loss, seed=seed, **settings)


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    """A function that compares runs in tmp_path and returns the lines printed."""
    monkeypatch.chdir(tmp_path)

    def go(patterns):
        bench_settings('--task=runs', f'--runs={patterns}')
        capsys.readouterr()
        bench.main()
        return capsys.readouterr().out.splitlines()
    return go


# two-sided 95% quantiles of Student's t, from its tables, and from scipy for the fraction
@pytest.mark.parametrize('degrees, t', [
    (1, 12.7062), (2, 4.3027), (2.5, 3.5747), (4, 2.7764), (10, 2.2281), (30, 2.0423),
    (1e5, 1.9600)])
def test_quantiles_are_those_of_the_tables(degrees, t):
    assert bench.t_quantile(degrees) == pytest.approx(t, abs=1e-4)


def test_the_interval_is_that_of_student_s_sleep_data():
    # R: t.test(extra ~ group, data = sleep) gives -3.3654832 to 0.2054832 for the first minus the
    # second; with 2.2 hours more in the second group, zero is outside
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    assert bench.verdict(first, second).startswith('shows no difference: +1.5800 ± 1.7855, some ')
    assert bench.verdict(first, [x + 2.2 for x in second]) == 'is higher by 3.7800 ± 1.7855'
    assert bench.verdict([x + 2.2 for x in second], first) == 'is lower by 3.7800 ± 1.7855'


def verdicts(n, difference, spread=0.004):
    """Compare 200 pairs of groups of n seeds whose means differ; return the verdicts."""
    rng = random.Random(1)
    return [bench.verdict([rng.gauss(1.45, spread) for _ in range(n)],
                          [rng.gauss(1.45 + difference, spread) for _ in range(n)])
            for _ in range(200)]


def test_two_groups_of_the_same_runs_are_seldom_found_different():
    found = [words for words in verdicts(3, difference=0) if 'no difference' not in words]
    assert len(found) <= 12  # 6%


def test_the_number_of_seeds_that_is_advised_shows_the_difference_in_four_of_five_trials():
    words = bench.verdict([1.446, 1.450, 1.454], [1.447, 1.451, 1.455])  # they spread by 0.004
    seeds = int(re.search(r'some (\d+) seeds would show 0.005$', words)[1])
    found = [words for words in verdicts(seeds, difference=-0.005) if 'is lower by' in words]
    assert 0.7 < len(found) / 200 < 0.9


def test_a_table_has_a_line_a_group_and_words_for_each_beside_the_first(tmp_path, compare):
    write_runs(tmp_path, 'out-a', [1.45, 1.46, 1.47], learning_rate=1e-3, wandb_run_name='a')
    write_runs(tmp_path, 'out-b', [1.40, 1.41, 1.42], learning_rate=2e-3)
    write_runs(tmp_path, 'out-c', [1.45], learning_rate=3e-3)
    header, a, b, c, beside, *words, wrote = compare('out-*')
    assert header.split() == 'seeds val loss std best bits/byte updates seconds group'.split()
    assert a.split() == ['3', '1.4600', '0.0100', '1.4500', '0.7300', '20', '5.0', 'out-*',
                         'learning_rate=0.001']
    assert b.split()[:4] == ['3', '1.4100', '0.0100', '1.4000']
    assert c.split()[:4] == ['1', '1.4500', 'nan', '1.4500']
    assert beside.startswith('val_loss beside out-* learning_rate=0.001, with 95% intervals')
    # 2.7764 * 0.01 * sqrt(2 / 3)
    assert words[0] == 'out-* learning_rate=0.002 is lower by 0.0500 ± 0.0227'
    assert words[1] == ('out-* learning_rate=0.003 has no interval: '
                        'it takes two seeds in each group')
    assert len(words) == 2 and wrote == 'wrote runs.png'


def test_runs_of_two_patterns_are_two_groups_although_their_settings_are_the_same(
        tmp_path, compare):
    write_runs(tmp_path, 'before', [1.45, 1.46])
    write_runs(tmp_path, 'after', [1.45, 1.46])
    lines = compare('before-*,after-*,*-1')  # a folder belongs to the first pattern
    assert [line.split()[-1] for line in lines[1:3]] == ['before-*', 'after-*']
    assert lines[4].startswith('after-* shows no difference: +0.0000 ± ') and len(lines) == 6


def test_losses_that_are_measured_in_different_ways_are_compared_in_bits_per_byte(
        tmp_path, compare):
    write_runs(tmp_path, 'out-a', [1.45, 1.46, 1.47])
    write_runs(tmp_path, 'out-b', [1.45, 1.46, 1.47], evaluated_on='11111111-1000-4x256')
    note, _, _, _, beside, words, _ = compare('out-*')
    assert note == 'note: val losses on different texts, tokens or windows are not compared'
    assert beside.startswith('bits_per_byte beside out-*')
    assert 'shows no difference: +0.0000 ± 0.0113' in words  # half of that of the losses


def test_train_records_what_its_runs_are_evaluated_on(train_run, text, tmp_path, compare):
    def train_on(characters, out, *more):
        (tmp_path / 'text.txt').write_text(text.read_text()[:characters])
        build.write_dataset('short', str(tmp_path / 'text.txt'), 'char')
        train_run('--dataset=short', '--max_iters=1', *more, out=tmp_path / out)

    def notes():
        return [line for line in compare('?') if line.startswith('note: val losses on different')]
    train_on(4000, 'a', '--eval_iters=0')
    train_on(4000, 'b', '--eval_iters=50', '--batch_size=8')
    assert not notes()  # both read the whole validation split
    train_on(4000, 'c', '--eval_iters=1')
    assert notes()
    shutil.rmtree(tmp_path / 'c')
    train_on(4010, 'c', '--eval_iters=0')  # another text under the same name
    assert notes()


def test_runs_that_cannot_be_compared_are_named(tmp_path, compare, capsys):
    write_runs(tmp_path, 'out', [1.45, 1.46])
    write_run(tmp_path / 'out-2', 1.2, step=10, seed=2)
    write_run(tmp_path / 'out-3', 1.2, seed=1)
    (tmp_path / 'out-4').mkdir()
    write_run(tmp_path / 'out-5', 1.2)
    (tmp_path / 'out-5' / 'metrics.jsonl').unlink()
    write_run(tmp_path / 'out-6', 1.2)
    (tmp_path / 'out-6' / 'config.json').write_text('{"seed": ')
    *notes, header, group, wrote = compare('out-*,other')
    for line, (folder, reason) in zip(notes, [
            ('out-2', 'unfinished, at step 10 of 20'), ('out-4', 'out-4/config.json'),
            ('out-5', 'unfinished, at step 0'), ('out-6', 'Expecting value'),
            ('other', 'No such file'), ('out-3', 'out-* has seed=1 already')], strict=True):
        assert line.startswith(f'note: {folder} is left out: ') and reason in line
    assert group.split()[:2] == ['2', '1.4550']


def test_without_a_finished_run_there_is_one_error_line(tmp_path, compare, capsys):
    write_run(tmp_path / 'out-2', 1.2, step=10)
    with pytest.raises(SystemExit) as e:
        compare('out-*')
    assert e.value.code == 2
    assert capsys.readouterr().err == 'error: --runs=out-*: there is no finished run\n'
    assert os.listdir(tmp_path) == ['out-2']


def test_a_run_whose_time_is_over_is_finished(tmp_path, compare):
    write_run(tmp_path / 'out-1', 1.45, step=20, max_iters=500, max_seconds=5.0)  # 0.25 s an update
    write_run(tmp_path / 'out-2', 1.45, step=16, max_iters=500, max_seconds=5.0, seed=2)
    note, _, group, _ = compare('out-*')
    assert note.startswith('note: out-2 is left out: unfinished') and group.split()[0] == '1'


def test_the_picture_has_a_colour_a_group_and_a_line_a_run(tmp_path, compare, monkeypatch):
    figure = pytest.importorskip('matplotlib.figure').Figure
    drawn, savefig = [], figure.savefig

    def spy(self, *arguments, **more):
        drawn.append(self)
        savefig(self, *arguments, **more)
    monkeypatch.setattr(figure, 'savefig', spy)
    write_runs(tmp_path, 'a', [1.45, 1.46])
    write_runs(tmp_path, 'b', [1.40])
    compare('a*,b*')
    assert (tmp_path / 'runs.png').read_bytes().startswith(b'\x89PNG')
    for ax, x in zip(drawn[0].axes, ([10, 20], [2.5, 5.0]), strict=True):
        lines = ax.get_lines()
        assert [list(line.get_xdata()) for line in lines] == [x] * 3
        losses = [list(line.get_ydata()) for line in lines]
        assert losses == [[2.45, 1.45], [2.46, 1.46], [2.4, 1.4]]
        assert lines[0].get_color() == lines[1].get_color() != lines[2].get_color()
        assert ax.get_ylim()[1] == 2.46  # the first third of two evaluations is none of them
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == ['a*', 'b*']


def test_without_matplotlib_an_error_follows_the_table(tmp_path, compare, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    write_runs(tmp_path, 'a', [1.45, 1.46])
    with pytest.raises(SystemExit) as e:
        compare('a*')
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out.splitlines()[-1].endswith(' a*')
    assert err.startswith('error: no runs.png: pip install matplotlib: ')
    assert not os.path.exists('runs.png')


def test_the_updates_are_counted_and_the_first_are_not_timed(process, monkeypatch):
    bench_settings('--bench_steps=4', '--peak_tflops=1', '--n_embd=8', '--n_layer=1', '--n_head=1',
                   '--batch_size=2', '--block_size=8')
    shape = GPTConfig(block_size=8, vocab_size=65, n_layer=1, n_head=1, n_embd=8)
    learner, now, updates = train.make_learner(GPT(shape), process), 0.0, []

    def update(learner, batches, factor, timed):
        nonlocal now
        updates.append(timed)
        now += 100 if len(updates) <= 3 else len(updates)  # seconds
        return {}, False, ''
    monkeypatch.setattr(train, 'update', update)
    monkeypatch.setattr(type(process), 'clock', lambda self, wait=True: now)
    result = bench.time_updates(learner)
    assert updates == [False] * (3 + 4)
    assert (result['dt'], result['sps']) == (5.5, 2 / 5.5)
