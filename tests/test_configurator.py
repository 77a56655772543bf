import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import configurator
from configurator import Run, configure, setup
from conftest import ROOT, script

SCRIPT = '''
# first group
width = 4  # how wide
rate = 0.1  # how fast
# second group
name = 'x'  # what it is called
flag = False  # whether
mode = 'auto'  # auto | True | False
'''


@pytest.fixture
def namespace(tmp_path):
    path = tmp_path / 'script.py'
    path.write_text('"""A script."""' + SCRIPT)
    namespace = {'__file__': str(path)}
    exec(SCRIPT, namespace)
    return namespace


@pytest.mark.parametrize('argument, key, value', [
    ('--width=8', 'width', 8), ('--width=1e3', 'width', 1000), ('--width=9007199254740993', 'width', 9007199254740993),
    ('--rate=1', 'rate', 1.0), ('--rate=1e-3', 'rate', 1e-3), ('--flag=true', 'flag', True), ('--flag=False', 'flag', False),
    ('--name=a=b', 'name', 'a=b'), ('--name=5', 'name', '5'), ('--name=None', 'name', 'None'), ('--name=', 'name', ''),
    ('--name=True', 'name', 'True'), ('--mode=False', 'mode', False), ('--mode=fast', 'mode', 'fast')])
def test_values_take_the_type_of_the_default(namespace, argument, key, value):
    config = configure(namespace, [argument])
    assert config[key] == value and type(config[key]) is type(value)
    assert namespace[key] == value


@pytest.mark.parametrize('argument, words', [
    ('--width=1.5', 'width is an integer'), ('--width=True', 'width is an integer'), ('--rate=fast', 'rate is a number'),
    ('--flag=1', 'flag is True or False'), ('--widht=3', "did you mean 'width'"), ('--width', '--key=value'),
    ('-width=3', '--key=value'), ('nowhere.py', "no config file 'nowhere.py'"), ('--width=inf', 'width is an integer'), ('--width=1e30', 'width is an integer'),
    ('--width=' + '1' * 400, 'width is an integer')])
def test_a_mistake_ends_with_exit_code_2_and_one_line(namespace, capsys, argument, words):
    with pytest.raises(SystemExit) as e:
        configure(namespace, [argument])
    assert e.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith('error: ') and words in lines[0]
    assert namespace['width'] == 4  # and changes nothing


def test_all_problems_are_reported_together(namespace, capsys, tmp_path):
    (tmp_path / 'c.py').write_text('widht = 5\nrate = "x"\n')
    with pytest.raises(SystemExit):
        configure(namespace, [str(tmp_path / 'c.py'), '--flag=2', '--nmae=z'])
    err = capsys.readouterr().err
    assert err.count('error: ') == 4 and all(w in err for w in ('widht', 'rate', 'flag', 'nmae'))


def test_later_arguments_win_and_files_read_earlier_values(namespace, tmp_path):
    (tmp_path / 'c.py').write_text('import math\nfrom os import path, environ\nfrom math import pi\n_half = width / 2\ndef f(): pass\n'
                                   'width = int(_half)\nrate = 3\n')
    config = configure(namespace, ['--width=20', str(tmp_path / 'c.py'), '--rate=0.5'])
    assert config['width'] == 10 and config['rate'] == 0.5 and namespace['_given'] == {'width', 'rate'}
    # a value that was the default's is given as well, in a file as Windows' editor writes it
    (tmp_path / 'c.py').write_text('\ufeffwidth = 4\nname = "x"\nflag = False\n', encoding='utf-8')
    assert configure(namespace, [str(tmp_path / 'c.py')])['width'] == 4 and namespace['_given'] == {'width', 'name', 'flag'}
    # a second call starts from the defaults; saved settings come before arguments
    assert configure(namespace, ['--rate=2'], saved={'width': 7, 'rate': 9.0, 'gone': 1}) == \
        {'width': 7, 'rate': 2.0, 'name': 'x', 'flag': False, 'mode': 'auto'}


def test_an_error_in_a_config_file_names_file_and_line(namespace, capsys, tmp_path):
    for source, line, words in (('width = 3\nrate = 1/0\n', 2, 'ZeroDivisionError'), ('\n\nwidth = (\n', 3, 'SyntaxError')):
        (tmp_path / 'bad.py').write_text(source)
        with pytest.raises(SystemExit) as e:
            configure(namespace, [str(tmp_path / 'bad.py')])
        err = capsys.readouterr().err
        assert e.value.code == 2 and f'line {line}' in err and words in err and 'Traceback' not in err
    for source, words in ((b'# caf\xe9', 'UnicodeDecodeError'), (b'width = 3\0', 'null bytes'), (b'raise SystemExit', ', line 1: SystemExit'),
                          (b'rate = 10**400', 'rate is a number')):
        (tmp_path / 'bad.py').write_bytes(source)
        with pytest.raises(SystemExit) as e:
            configure(namespace, [str(tmp_path / 'bad.py')])
        err = capsys.readouterr().err
        assert e.value.code == 2 and len(err.splitlines()) == 1 and words in err and 'line None' not in err


def test_help_lists_every_key_with_default_comment_and_heading(namespace, capsys):
    with pytest.raises(SystemExit) as e:
        configure(namespace, ['--help'])
    out = capsys.readouterr().out
    assert e.value.code == 0 and 'A script.' in out
    for words in ('# first group', '# second group', '--width=4', 'how wide', '--mode=auto', 'whether'):
        assert words in out
    assert out.index('# first group') < out.index('--rate') < out.index('# second group') < out.index('--name')


def test_help_of_every_script_explains_every_key(project):
    import train
    for name, keys in (('train.py', configure(vars(train), [])),
                       ('sample.py', ['start', 'top_p']), ('bench.py', ['bench_steps', 'n_layer'])):
        out, err = script(project, name, '--help')
        assert not err
        for key in keys:
            assert f'--{key}=' in out, key


def test_importing_a_script_reads_no_arguments_and_prints_nothing(project):
    out, err = script(project, '../' + os.path.basename(project) + '/configurator.py')
    code = "import sys; sys.argv = ['x', '--bogus=1']; import train, sample, bench, model"
    done = subprocess.run([sys.executable, '-c', code], cwd=project, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_device_precedence(monkeypatch):
    monkeypatch.delenv('TORCH_DEVICE', raising=False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert configurator.pick_device('auto') == 'mps'
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert configurator.pick_device('auto') == 'cuda'
    monkeypatch.setenv('TORCH_DEVICE', 'mps')
    assert configurator.pick_device('auto') == 'mps'
    assert configurator.pick_device('cpu') == 'cpu'


@pytest.mark.parametrize('settings, words', [
    (dict(device='tpu'), 'device is one of'), (dict(device='cuda'), '--device=cpu'), (dict(dtype='int8'), 'dtype is one of'),
    (dict(compile='yes'), 'compile is one of')])
def test_setup_refuses_what_it_cannot_do(monkeypatch, capsys, settings, words):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit) as e:
        setup(**settings)
    assert e.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize('amx, bf16, ratio, expected', [
    (False, False, 0.5, 'float32'), (True, False, 2, 'bfloat16'), (False, True, 0.5, 'bfloat16'), (False, True, 2, 'float32')])
def test_dtype_auto_is_bfloat16_where_the_cpu_is_fast_at_it(monkeypatch, capsys, amx, bf16, ratio, expected):
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx)
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: bf16)
    monkeypatch.setattr(configurator, 'product_flops', lambda n, dtype: {torch.float32: 1, torch.bfloat16: 1 / ratio}[dtype])
    monkeypatch.setattr(configurator, 'cpu_multiplies_bfloat16', configurator.cpu_multiplies_bfloat16.__wrapped__)
    run = setup(device='cpu')
    assert run.dtype == getattr(torch, expected) and f'dtype={expected}' in capsys.readouterr().out
    with run.autocast():  # and it is what is computed in
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == run.dtype


def test_all_ranks_compute_in_the_dtype_that_rank_0_has_chosen(project):
    path = project / 'choose_dtype.py'
    path.write_text("import os, torch, configurator\n"
                    "torch.cpu._is_amx_tile_supported = lambda: os.environ['RANK'] == '0'\n"
                    "torch.cpu._is_avx512_bf16_supported = lambda: False\n"
                    "run = configurator.setup(device='cpu')\n"
                    "open(f'dtype{run.rank}.txt', 'w').write(str(run.dtype))\n"
                    "run.close()\n")
    script(project, path.name, nproc=2)
    assert [(project / f'dtype{rank}.txt').read_text() for rank in (0, 1)] == ['torch.bfloat16'] * 2


def test_random_streams_depend_on_seed_stream_and_index_alone():
    a, b = (Run(torch.device('cpu'), torch.float32, False, rank, 0, 4, seed=1) for rank in (0, 3))
    assert a.derive_seed('train', 5) == b.derive_seed('train', 5)
    seeds = {a.derive_seed(s, *i) for s in ('train', 'dropout') for i in ((0,), (1,), (0, 0), (0, 1), (1, 0), (10,))}
    assert len(seeds) == 12


def test_the_peak_is_measured_for_longer_than_a_machine_is_slow(run, monkeypatch):
    now = 0.0

    def sync():  # after the product, and before it
        nonlocal now
        now += 0.03 if now < 0.36 else 0.01
    monkeypatch.setattr(configurator, 'time', SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(Run, 'sync', lambda self: sync())
    assert configurator.peak_flops(run) == pytest.approx(2 * 1536**3 / 0.01)


def test_gpu_peaks_are_found_by_name(monkeypatch):
    run = Run(torch.device('cuda'), torch.bfloat16, False, 0, 0, 1, 1)
    for name, peak in (('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA H100 PCIe', 756e12), ('NVIDIA A100-SXM4-40GB', 312e12),
                       ('NVIDIA L40S', 362e12), ('NVIDIA GeForce RTX 3090', 71e12), ('NVIDIA GeForce RTX 3090 Ti', None), ('NVIDIA H200 NVL', None),
                       ('NVIDIA GeForce RTX 4090 Laptop GPU', None), ('NVIDIA L4', 121e12), ('Tesla T4', 65e12), ('NVIDIA Mystery 9', None)):
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda *_: name)
        assert configurator.peak_flops(run) == peak, name


def test_every_config_file_loads():
    import train
    files = sorted(os.listdir(os.path.join(ROOT, 'config')))
    assert 'train_shakespeare_char.py' in files and 'train_gpt2.py' in files
    for name in files:
        if not name.endswith('.py'):
            continue
        path = os.path.join(ROOT, 'config', name)
        config = configure(vars(train), [path])
        assert train.check_settings(config) == [], name
        lines = open(path).read().splitlines()
        assert len(lines) <= 40 and any(f'config/{name}' in line for line in lines[:4]), name
    configure(vars(train), [])


def test_short_runs_and_cpus_are_not_compiled(monkeypatch):
    import importlib.util
    from configurator import worth_compiling
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: object())
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: (8, 0))
    monkeypatch.setattr(shutil, 'which', lambda name: f'/usr/bin/{name}')
    assert worth_compiling('cuda', 5000) and not worth_compiling('cuda', 500)
    assert not worth_compiling('cpu', 10**9) and not worth_compiling('mps', 10**9)
    for module, name, value in ((importlib.util, 'find_spec', None), (torch.cuda, 'get_device_capability', (6, 1)), (shutil, 'which', None)):
        with monkeypatch.context() as m:  # without triton, with a GPU that it does not know, without a C compiler
            m.setattr(module, name, lambda *args: value)
            m.delenv('CC', raising=False)
            assert not worth_compiling('cuda', 5000)


def test_a_reader_that_leaves_and_too_little_memory_are_no_tracebacks(capsys):
    for e in (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\nto allocate"), MemoryError(), torch.OutOfMemoryError('x')):
        configurator.excepthook(type(e), e, None)
        err = capsys.readouterr().err
        assert err.startswith('error: out of memory: ') and len(err.splitlines()) == 1
    configurator.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == ''
    configurator.excepthook(ValueError, ValueError('a fault'), None)
    assert 'ValueError: a fault' in capsys.readouterr().err
    # in a process of its own, with a pipe that nobody reads
    code = 'import sys, configurator; sys.excepthook = configurator.excepthook\nfor _ in range(10**5): print("x" * 100)'
    process = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b'' and process.wait(60)
