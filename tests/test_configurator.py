"""configurator.py: settings, what the machine offers, and how a script ends."""
import importlib.util
import math
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path

import bench
import configurator
import data.hellaswag.evaluate as evaluate
import sample
import train
from configurator import (
    Process,
    apply_settings,
    configure,
    pick_device,
    read_arguments,
    run_main,
    setup,
)

import pytest
import torch
import torch.distributed as dist
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
def namespace(tmp_path, monkeypatch):
    """A script with five settings, as a module named `script`."""
    return make_module('script', tmp_path, SCRIPT, monkeypatch)


def make_module(name, folder, source, monkeypatch):
    """Write a script, and return it as a module of this name."""
    path = folder / f'{name}.py'
    path.write_text(f'"""A script."""\n{source}')
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def apply(name, argv, saved):
    """Set the settings as a script does that starts from a checkpoint."""
    return apply_settings(name, read_arguments(name, argv), saved)


def fails(capsys, function, *args, code=2, **kwargs):
    """Return the lines on stderr of a call that exits with this code; all are error lines."""
    with pytest.raises(SystemExit) as e:
        function(*args, **kwargs)
    lines = capsys.readouterr().err.splitlines()
    assert e.value.code == code and lines
    assert all(line.startswith('error: ') for line in lines), lines
    return lines


# -----------------------------------------------------------------------------
# settings

@pytest.mark.parametrize('argument, key, value', [
    ('--width=8', 'width', 8),
    ('--rate=1', 'rate', 1.0), ('--rate=1e-3', 'rate', 1e-3),
    ('--flag=true', 'flag', True), ('--flag=False', 'flag', False),
    ('--name=a=b', 'name', 'a=b'), ('--name=5', 'name', '5'), ('--name=None', 'name', 'None'),
    ('--name=', 'name', ''), ('--name=True', 'name', 'True'), ('--name=true', 'name', 'true'),
    ('--mode=False', 'mode', False), ('--mode=true', 'mode', True),
    ('--mode=fast', 'mode', 'fast'), ('--mode', 'mode', True), ('--flag', 'flag', True),
    ('--width 8', 'width', 8), ('--rate 1e-3', 'rate', 1e-3), ('--flag true', 'flag', True),
    ('--flag False', 'flag', False), ('--name c.py', 'name', 'c.py')])
def test_values_take_the_type_of_the_default(namespace, argument, key, value):
    namespace.flag = not value if key == 'flag' else False
    namespace.LIMITS = dict(width=(0, 1e99), rate=(-1, 1))
    config = configure('script', argument.split(' '))
    assert config[key] == value and type(config[key]) is type(value)
    assert getattr(namespace, key) == value


def test_a_value_may_follow_its_key_and_a_flag_alone_is_true(namespace, tmp_path):
    (tmp_path / 'c.py').write_text('rate = 3\n')
    for flag in (['--flag'], ['--flag=true'], ['--flag', 'TRUE']):
        config = configure('script', ['--width', '8', *flag, str(tmp_path / 'c.py'),
                                      '--name', '', '--mode=a', '--width', '9'])
        assert config == {'width': 9, 'rate': 3.0, 'name': '', 'flag': True, 'mode': 'a'}


@pytest.mark.parametrize('argument, words', [
    ('--width=1e3', ' must be an integer'), ('--width=True', ' must be an integer'),
    ('--width=inf', ' must be an integer'), ('--width=', ' must be an integer'),
    ('--rate=fast', ' must be a number'), ('--flag=1', 'must be True or False'),
    ('--widht=3', "did you mean 'width'"), ('--widht 3', "did you mean 'width'"),
    ('--width', 'width=True must be an integer'), ('--name', 'name=True must be a string'),
    ('--width --flag', 'width=True must be an integer'), ('--flag 1', "'1' is not --key=value"),
    ('-width=3', '--key=value'), ('nowhere.py', "'nowhere.py'"),
    ('train_shakespear_char', "did you mean 'train_shakespeare_char.py'"),
    ('a/folder/of/my/own/train_gpt.py', "did you mean 'train_gpt2.py'")])
def test_a_mistake_ends_with_exit_code_2_and_one_line(namespace, capsys, argument, words):
    line, = fails(capsys, configure, 'script', argument.split(' '))
    assert words in line
    assert namespace.width == 4


def test_values_that_are_not_allowed_are_reported_together(namespace, capsys, tmp_path):
    (tmp_path / 'c.py').write_text('rate = -2\n')
    namespace.LIMITS = dict(width=(1, 9), rate=(0, 1))
    namespace.CHOICES = dict(name=('x', 'y'))
    arguments = [str(tmp_path / 'c.py'), '--name=z', '--width=0']
    lines = fails(capsys, configure, 'script', arguments, check=lambda: ['one more'])
    assert len(lines) == 4
    for words in ('rate=-2', 'name=z', 'width=0', 'one more'):
        assert any(words in line for line in lines), words


def test_later_arguments_win_and_files_read_earlier_values(namespace, tmp_path):
    path = tmp_path / 'c.py'
    path.write_text('import math\nfrom os import path\nfrom math import pi as _pi\n'
                    '_half = width / 2\ndef f(): pass\nwidth = int(_half)\nrate = 3\n')
    config = configure('script', ['--width=20', str(path), '--rate=0.5'])
    assert config['width'] == 10 and config['rate'] == 0.5
    assert namespace._given == {'width', 'rate'}
    # a value that equals the default is given, too; Windows' editor begins files with a BOM
    path.write_text('\ufeffwidth = 4\nname = "x"\nflag = False\n', encoding='utf-8')
    assert configure('script', [str(path)])['width'] == 4
    assert namespace._given == {'width', 'name', 'flag'}
    # a second call starts from the defaults; saved settings come before arguments
    config = apply('script', ['--rate=2'], {'width': 7, 'rate': 9.0, 'gone': 1})
    assert config == {'width': 7, 'rate': 2.0, 'name': 'x', 'flag': False, 'mode': 'auto'}
    assert namespace.width == 7 and namespace._given == {'rate'}


def test_a_config_file_lies_where_the_user_stands_or_beside_the_scripts(namespace, tmp_path,
                                                                        monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'c.py').write_text('width = 5\n')
    assert configure('script', ['c.py'])['width'] == 5
    config = configure('train', ['config/train_shakespeare_char_cpu.py'])
    assert config['out_dir'] == 'out-shakespeare-char-cpu'
    configure('train', [])


@pytest.mark.parametrize('source, words', [
    ('\nrate = "x"\n', "c.py, rate='x' must be a number"),
    ('\nwidth: 3\nrate = 1\n', 'c.py, line 2 assigns nothing: write key = value'),
    ('rate = 1\nwidth == 3\n', 'c.py, line 2 assigns nothing: write key = value')])
def test_a_mistake_in_a_config_file_is_one_line(namespace, capsys, tmp_path, source, words):
    (tmp_path / 'c.py').write_text(source)
    line, = fails(capsys, configure, 'script', [str(tmp_path / 'c.py')])
    assert words in line and namespace.width == 4


def test_an_annotation_with_a_value_is_an_assignment(namespace, tmp_path):
    (tmp_path / 'c.py').write_text('width: int = 3\n')
    assert configure('script', [str(tmp_path / 'c.py')])['width'] == 3


@pytest.mark.parametrize('source, words', [
    (b'width = 3\nrate = 1/0\n', 'c.py", line 2, in <module>\n    rate = 1/0'),
    (b'\n\nwidth = (\n', 'c.py", line 3\n    width = ('), (b'name = "caf\xe9"', 'c.py", line 1')])
def test_a_fault_in_a_config_file_keeps_its_traceback(namespace, tmp_path, source, words):
    (tmp_path / 'c.py').write_bytes(source)
    with pytest.raises((ZeroDivisionError, SyntaxError)) as e:
        configure('script', [str(tmp_path / 'c.py')])
    assert words in ''.join(traceback.format_exception(e.value))


@pytest.mark.parametrize('argument, allowed', [
    ('--width=1', True), ('--width=9', True), ('--width=0', False), ('--width=10', False),
    ('--rate=0', True), ('--rate=-1e-9', False), ('--rate=1e999', False),
    ('--name=x', True), ('--name=y', True), ('--name=z', False)])
def test_limits_and_choices_are_enforced(namespace, capsys, argument, allowed):
    namespace.LIMITS = dict(width=(1, 9), rate=(0, 1e9))
    namespace.CHOICES = dict(name=('x', 'y'))
    if allowed:
        configure('script', [argument])
    else:
        line, = fails(capsys, configure, 'script', [argument])
        assert f'{argument[2:].split("=")[0]}=' in line and ' must be ' in line
    # saved settings are checked like arguments
    line, = fails(capsys, apply, 'script', [], {'name': 'z'})
    assert 'name=z must be one of x, y' in line


def test_the_settings_of_another_script_belong_to_a_script_with_a_base(
        namespace, tmp_path, capsys, monkeypatch):
    base = make_module('base', tmp_path, 'depth = 2  # how deep\nLIMITS = dict(depth=(1, 9))\n',
                       monkeypatch)
    config = configure('script', ['--depth=3', '--width=5'], base='base')
    assert config['depth'] == 3 and config['width'] == 5
    assert base.depth == 3 and namespace.width == 5
    assert not hasattr(base, 'width') and not hasattr(namespace, 'depth')
    configure('script', [], base='base')
    assert base.depth == 2 and namespace.width == 4
    line, = fails(capsys, configure, 'script', ['--depth=0'], base='base')
    assert 'depth=0 must be between 1' in line
    with pytest.raises(SystemExit):
        configure('script', ['--help'], base='base')
    assert 'how deep' in capsys.readouterr().out


def test_help_lists_every_key_with_default_comment_and_heading(namespace, capsys):
    namespace.CHOICES = {'name': ('x', 'other')}
    with pytest.raises(SystemExit) as e:
        configure('script', ['--width=5', '--help'])
    out = capsys.readouterr().out
    assert e.value.code == 0 and 'A script.' in out
    for words in ('# first group', '# second group', '--width=4', 'how wide', '--mode=auto',
                  'whether', 'x | other'):
        assert words in out
    assert out.index('# first group') < out.index('--rate')
    assert out.index('--rate') < out.index('# second group') < out.index('--name')


@pytest.mark.parametrize('name, module, base', [
    ('train.py', train, None), ('bench.py', bench, 'train'), ('sample.py', sample, None),
    ('data/hellaswag/evaluate.py', evaluate, None)])
def test_help_of_every_script_explains_every_key(project, name, module, base):
    keys = configure(module.__name__, [], base=base)
    out, err = script(project, name, '--help')
    assert not err and name in out and len(keys) >= 3
    assert not base or set(keys) > set(configure(base, []))
    for key in keys:
        assert re.search(rf'^  --{key}=.* \S', out, re.M), key


def test_importing_a_script_reads_no_arguments_and_prints_nothing(project):
    assert script(project, 'configurator.py') == ('', '')
    code = "import sys; sys.argv = ['x', '--bogus=1']\n" \
           'import train, sample, bench, model, data.hellaswag.evaluate'
    done = subprocess.run([sys.executable, '-c', code], cwd=project, capture_output=True,
                          text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_every_config_file_loads():
    names = [name for name in sorted(os.listdir(os.path.join(ROOT, 'config')))
             if name.endswith('.py')]
    assert 'train_shakespeare_char.py' in names and 'train_gpt2.py' in names
    for name in names:
        path = os.path.join(ROOT, 'config', name)
        configure('train', [path], check=train.check_settings)
        with open(path, encoding='utf-8') as f:
            lines = f.read().splitlines()
        assert len(lines) <= 40, name
        assert any(f'config/{name}' in line for line in lines[:4]), name
        # '# 30 sequences x 1,024 tokens x 16 micro-batches = 491,520 tokens per update'
        for line in lines:
            if 'micro-batches =' in line:
                sizes = [int(n) for n in re.findall(r'\d+', line.replace(',', ''))[:4]]
                assert sizes == [train.batch_size, train.block_size,
                                 train.gradient_accumulation_steps, math.prod(sizes[:3])], name
    configure('train', [])


@pytest.mark.parametrize('module, argument, words', [
    (train, '--dtype=int8', 'dtype=int8 must be one of auto, float32, bfloat16, float16'),
    (sample, '--dtype=int8', 'dtype=int8 must be one of'),
    (evaluate, '--dtype=int8', 'dtype=int8 must be one of'),
    (train, '--compile=yes', 'compile=yes must be one of'),
    (train, '--backend=mpi', 'backend=mpi must be one of')])
def test_what_no_machine_can_do_is_refused(capsys, module, argument, words):
    try:
        line, = fails(capsys, configure, module.__name__, [argument])
        assert words in line
    finally:
        configure(module.__name__, [])


# -----------------------------------------------------------------------------
# what the machine offers

@pytest.fixture
def devices(monkeypatch):
    """Pretend that this machine has two GPUs of NVIDIA and one of Apple; return their names."""
    names = ['cuda:0', 'cuda:1', 'mps', 'cpu']

    def empty(size, device):
        if device not in names:
            raise RuntimeError(f'CUDA error: invalid device {device}\nmore')
    monkeypatch.delenv('TORCH_DEVICE', raising=False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: 'cuda:0' in names)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: 'mps' in names)
    monkeypatch.setattr(torch, 'empty', empty)
    return names


def test_device_precedence(devices, monkeypatch):
    assert pick_device('auto') == torch.device('cuda:0')
    assert pick_device('auto', local_rank=1) == torch.device('cuda:1')
    assert pick_device('cuda:1') == torch.device('cuda:1')
    monkeypatch.setenv('TORCH_DEVICE', 'mps')
    assert pick_device('auto') == torch.device('mps')
    assert pick_device('cpu') == torch.device('cpu')
    monkeypatch.setenv('TORCH_DEVICE', '')
    del devices[:2]
    assert pick_device('auto') == torch.device('mps')
    del devices[:1]
    assert pick_device('auto', local_rank=1) == torch.device('cpu')


def test_a_gpu_that_is_not_there_is_refused(devices, capsys):
    for device, local_rank in (('cuda:2', 0), ('cuda', 2), ('auto', 2)):
        line, = fails(capsys, pick_device, device, local_rank)
        assert 'use --device=cpu, or fewer processes: CUDA error: invalid device cuda:2' in line


@pytest.mark.parametrize('device', ['tpu', 'cuda:x', '', 'cuda', 'cuda:7', 'mps'])
def test_torch_says_why_a_device_is_refused(capsys, device):
    if device.startswith('cuda') and torch.cuda.is_available():
        pytest.skip('needs a machine without a GPU')
    line, = fails(capsys, pick_device, device)
    assert f'device={device}: use --device=cpu' in line


def pretend(monkeypatch, files):
    """Let Path.read_text find these files only; files: a dict of paths and contents."""
    def read_text(path, *arguments, **more):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]
    monkeypatch.setattr(Path, 'read_text', read_text)


@pytest.mark.parametrize('vendor, flags, expected', [
    ('AuthenticAMD', 'fma avx512f avx512_bf16', 'bfloat16'),  # Zen 4, Zen 5
    ('AuthenticAMD', 'fma avx2', 'float32'),  # Zen 2
    ('GenuineIntel', 'avx512f avx512_bf16 amx_bf16 amx_tile', 'bfloat16'),  # Sapphire Rapids
    ('GenuineIntel', 'avx512f avx512_bf16', 'float32'),  # Cooper Lake
    ('GenuineIntel', 'avx512f', 'float32'),
    (None, '', 'float32')])  # not Linux
def test_dtype_auto_on_a_cpu_depends_on_the_processor_alone(monkeypatch, capsys, vendor, flags,
                                                            expected):
    cpuinfo = f'processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: {flags} last\n' * 2
    pretend(monkeypatch, {'/proc/cpuinfo': cpuinfo} if vendor else {})
    process = setup(device='cpu')
    assert process.dtype == getattr(torch, expected)
    assert f'dtype={expected}' in capsys.readouterr().out
    with process.autocast():  # products run in this dtype
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == process.dtype


def test_all_ranks_compute_in_the_dtype_that_rank_0_has_chosen(project):
    path = project / 'choose_dtype.py'
    path.write_text("import os, torch, configurator\n"
                    "fast = os.environ['RANK'] == '0'\n"
                    "configurator.cpu_multiplies_bfloat16 = lambda: fast\n"
                    "process = configurator.setup(device='cpu')\n"
                    "with open(f'dtype{process.rank}.txt', 'w') as f:\n"
                    "    f.write(str(process.dtype))\n"
                    "process.close()\n")
    script(project, path.name, nproc=2)
    dtypes = [(project / f'dtype{rank}.txt').read_text() for rank in (0, 1)]
    assert dtypes == ['torch.bfloat16'] * 2


V1, V2 = '5:cpu,cpuacct:/a/b\n4:memory:/a/b\n1:name=systemd:/\n', '0::/a/b\n'


@pytest.mark.parametrize('groups, files, cores, memory', [
    ('', {}, 4, 2**50),
    (V2, {}, 4, 2**50),
    (V2, {'a/b/cpu.max': 'max 100000\n', 'a/b/memory.max': 'max\n'}, 4, 2**50),
    (V2, {'a/b/cpu.max': '50000 100000\n', 'a/b/memory.max': '1000\n'}, 1, 1000),
    (V2, {'a/b/cpu.max': '150000 100000\n'}, 2, 2**50),
    (V2, {'a/b/cpu.max': '900000 100000\n', 'a/b/memory.max': f'{2**60}\n'}, 4, 2**50),
    # a parent's limit counts, and a container sees its own group as the root
    (V2, {'a/b/cpu.max': '400000 100000\n', 'a/cpu.max': '300000 100000\n',
          'a/b/memory.max': 'max\n', 'a/memory.max': '500\n'}, 3, 500),
    (V2, {'cpu.max': '200000 100000\n', 'memory.max': '700\n'}, 2, 700),
    (V1, {'cpu,cpuacct/a/b/cpu.cfs_quota_us': '-1\n',
          'cpu,cpuacct/a/b/cpu.cfs_period_us': '100000\n',
          'memory/a/b/memory.limit_in_bytes': '9223372036854771712\n'}, 4, 2**50),
    (V1, {'cpu,cpuacct/a/b/cpu.cfs_quota_us': '50000\n',
          'cpu,cpuacct/a/b/cpu.cfs_period_us': '100000\n',
          'memory/a/memory.limit_in_bytes': '3000\n'}, 1, 3000),
    (V1, {'cpu,cpuacct/cpu.cfs_quota_us': '20000\n', 'cpu,cpuacct/cpu.cfs_period_us': '10000\n',
          'memory/memory.limit_in_bytes': '4000\n'}, 2, 4000)])
def test_a_containers_limits_are_the_machines(monkeypatch, groups, files, cores, memory):
    files = {f'/sys/fs/cgroup/{name}': text for name, text in files.items()}
    pretend(monkeypatch, files | {'/proc/self/cgroup': groups})
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(os, 'sysconf', lambda name: 2**40 if 'PAGES' in name else 2**10)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 8)
    chosen = []
    monkeypatch.setattr(torch, 'set_num_threads', chosen.append)
    monkeypatch.delenv('OMP_NUM_THREADS')
    configurator.share_cores(1)
    assert chosen == [cores]
    assert configurator.total_memory(torch.device('cpu')) == memory


@pytest.mark.parametrize('omp, processes, default, threads', [
    ('', 1, 8, 3), ('', 1, 2, None),  # torch may use fewer by default, one per physical core
    ('6', 1, 6, None), ('1', 1, 1, None), ('6', 2, 6, None),  # the user's choice
    ('1', 2, 1, 1), ('1', 3, 1, 1), ('1', 8, 1, 1)])  # torchrun's
def test_threads_are_shared_unless_the_user_chose(monkeypatch, omp, processes, default, threads):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1, 2}, raising=False)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: default)
    chosen = []
    monkeypatch.setattr(torch, 'set_num_threads', chosen.append)
    monkeypatch.setenv('OMP_NUM_THREADS', omp)
    configurator.share_cores(processes)
    assert chosen == ([threads] if threads else [])


def test_random_streams_depend_on_seed_stream_and_index_alone():
    cpu = torch.device('cpu')
    a, b = (Process(cpu, torch.float32, rank=rank, world_size=4, seed=1) for rank in (0, 3))
    other = Process(cpu, torch.float32, seed=2)
    assert a.derive_seed('train', 5) == b.derive_seed('train', 5) != other.derive_seed('train', 5)
    seeds = {a.derive_seed(stream, *index) for stream in ('train', 'dropout')
             for index in ((0,), (1,), (0, 0), (0, 1), (1, 0), (10,))}
    assert len(seeds) == 12


@pytest.mark.parametrize('device, micro_batches, triton, compiled', [
    ('cuda', 5000, True, True), ('cuda', 500, True, False), ('cuda', 5000, False, False),
    ('cpu', 10**9, True, False)])
def test_only_long_runs_on_a_gpu_are_compiled(monkeypatch, device, micro_batches, triton,
                                              compiled):
    monkeypatch.setattr(configurator, 'pick_device', lambda *_: torch.device(device))
    monkeypatch.setattr(torch.cuda, 'set_device', lambda _: None)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'a GPU')
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: triton or None)
    monkeypatch.setattr(torch, 'set_float32_matmul_precision', lambda _: None)
    process = setup(dtype='float32', compile='auto', micro_batches=micro_batches)
    assert process.compile is compiled


@pytest.mark.parametrize('given, expected', [(None, '10000'), ('7', '7')])
@pytest.mark.parametrize('name', ['train', 'sample', 'bench', 'data.text.prepare',
                                  'data.hellaswag.evaluate'])
def test_the_spin_of_torchs_threads_is_set_before_torch_is_imported(
        project, name, given, expected):
    code = """import builtins, os, sys
real = builtins.__import__
def spy(name, *more):
    if name == 'torch' and name not in sys.modules:
        print(os.environ.get('GOMP_SPINCOUNT'))
    return real(name, *more)
builtins.__import__ = spy
import """ + name
    environment = {key: value for key, value in os.environ.items() if key != 'GOMP_SPINCOUNT'}
    if given:
        environment['GOMP_SPINCOUNT'] = given
    out = subprocess.run([sys.executable, '-c', code], cwd=project, env=environment, text=True,
                         stdout=subprocess.PIPE, check=True).stdout
    assert out.split()[0] == expected


# -----------------------------------------------------------------------------
# how a script ends

def raising(e):
    """Return a main() that raises e."""
    def main():
        raise e
    return main


@pytest.mark.parametrize('e, code, words', [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\nto allocate"), 1,
     'out of memory, '),
    (MemoryError(), 1, 'out of memory, '), (torch.OutOfMemoryError('x\ny'), 1, 'out of memory, '),
    (RuntimeError('[gloo/transport/tcp/pair.cc:534] Connection closed by peer\nmore'), 1,
     'another process has ended'),
    (dist.DistStoreError('wait timeout\nmore'), 1, 'another process has ended'),
    (dist.DistNetworkError('connection refused'), 1, 'another process has ended')])
def test_what_no_code_can_help_ends_in_one_line(capsys, e, code, words):
    line, = fails(capsys, run_main, raising(e), code=code)
    assert line.startswith(f'error: {words}')


def test_faults_of_the_code_keep_their_traceback_and_exits_their_code(capsys):
    for fault in (ValueError('a fault'), RuntimeError('a fault'), OSError(2, 'a fault')):
        with pytest.raises(type(fault), match='a fault'):
            run_main(raising(fault))
    for code in (0, 2, 143):
        with pytest.raises(SystemExit) as e:
            run_main(raising(SystemExit(code)))
        assert e.value.code == code
    with pytest.raises(SystemExit) as e:
        run_main(lambda: None)
    assert not e.value.code
    assert capsys.readouterr().err == ''


def run_python(project, main, **environment):
    """Run main(), given as its body, under run_main in a process of its own; return the Popen."""
    # by default, a pipe gets its data at the end, or in large blocks
    environment.setdefault('PYTHONUNBUFFERED', '')
    code = f'import atexit, os, signal, configurator\ndef main():\n    {main}\n' \
           'configurator.run_main(main)'
    return subprocess.Popen([sys.executable, '-c', code], cwd=project, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | environment)


@pytest.mark.parametrize('count', [1, 10**5])
def test_a_reader_that_leaves_is_no_error(project, count):
    process = run_python(project, f'for _ in range({count}): print("x" * 100)')
    process.stdout.close()  # as `| head` does; one line is written at the end only
    assert process.stderr.read() == '' and process.wait(60) == 0


@pytest.mark.parametrize('name', ['train.py', 'sample.py', 'bench.py', 'data/text/prepare.py'])
def test_help_to_a_reader_that_leaves_is_no_error(project, name):
    process = subprocess.Popen([sys.executable, name, '--help'], cwd=project, text=True,
                               env=os.environ | {'PYTHONUNBUFFERED': '1'},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == '' and process.wait(60) == 0


def test_a_broken_pipe_of_another_program_is_a_fault(project):
    main = 'print("first"); raise BrokenPipeError("of a side service")'
    process = run_python(project, main, PYTHONUNBUFFERED='1')
    out, err = process.communicate(timeout=60)
    assert out.startswith('first\n') and 'BrokenPipeError: of a side service' in err
    assert process.returncode == 1


@pytest.mark.parametrize('main, code, words', [
    ('print("lost"); configurator.say("lost")', 0, ''),
    # a file must not take the number of the closed output
    ('assert os.open(os.devnull, os.O_RDONLY) > 2; configurator.fail("a mistake")', 2,
     'error: a mistake\n')])
def test_a_closed_output_is_no_fault(project, main, code, words):
    source = f'import os, configurator\ndef main():\n    {main}\nconfigurator.run_main(main)'
    done = subprocess.run(['sh', '-c', '"$0" -c "$1" <&- >&-', sys.executable, source],
                          cwd=project, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, words)


def test_ctrl_c_during_the_import_of_torch_is_one_line(project, tmp_path):
    (tmp_path / 'torch.py').write_text('raise KeyboardInterrupt')
    for name in ('train.py', 'sample.py', 'data/text/prepare.py'):
        # the folder of the script comes before PYTHONPATH, and quill has no torch.py
        out, err = script(project, name, code=130, env={'PYTHONPATH': str(tmp_path)})
        assert (out, err) == ('', 'error: interrupted\n')


def test_ctrl_c_ends_a_process_in_one_line(project):
    process = run_python(project, 'os.kill(os.getpid(), signal.SIGINT)')
    assert process.communicate(timeout=60) == ('', 'error: interrupted\n')
    assert process.returncode == 130


def test_one_of_several_processes_writes_all_and_keeps_its_exit_code(project):
    main = 'atexit.register(print, "last"); print("first"); raise SystemExit(3)'
    process = run_python(project, main, WORLD_SIZE='2', RANK='0')
    assert process.communicate(timeout=60) == ('first\nlast\n', '')
    assert process.returncode == 3


def test_another_package_called_data_is_not_imported(project, tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / '__init__.py').write_text('raise RuntimeError("the wrong one")')
    for name in ('train.py', 'sample.py', 'data/text/prepare.py'):
        script(project, name, '--help', cwd=tmp_path, env={'PYTHONPATH': str(tmp_path)})


def test_only_close_names_are_suggested(namespace, capsys):
    for argument, line in (('--widht=3', "unknown key 'widht': did you mean 'width'? (--help"),
                           ('--epochs=3', "unknown key 'epochs' (--help lists all keys)")):
        found, = fails(capsys, configure, 'script', [argument])
        assert line in found


@pytest.mark.parametrize('argument, words', [
    ('{0}/code.txt', 'code.txt'), ('{0}/c.yaml', 'c.yaml'), ('-width=3', '-width=3'),
    ('width=3', 'width=3'), ('{0}', '{0}')])
def test_only_a_python_file_is_a_config_file(namespace, capsys, tmp_path, argument, words):
    for name in ('code.txt', 'c.yaml'):
        (tmp_path / name).write_text('width = 5\n')
    argument, words = argument.format(tmp_path), words.format(tmp_path)
    line, = fails(capsys, configure, 'script', [argument])
    assert words in line and 'is not --key=value, nor a config file (.py)' in line
    assert namespace.width == 4


def test_scripts_that_prepare_a_text_take_no_config_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'mycode.py').write_text('open("ran", "w")\n')
    for name in ('data.text.prepare', 'data.shakespeare_char.prepare'):
        importlib.import_module(name)
        line, = fails(capsys, configure, name, ['mycode.py'])
        assert line == "error: 'mycode.py' is not --key=value: did you mean --input=mycode.py?"
    try:
        settings = configure('data.text.prepare', ['--input', 'mycode.py', '--name', 'c'])
        assert settings['input'] == 'mycode.py' and settings['name'] == 'c'
    finally:
        configure('data.text.prepare', [])
    assert os.listdir(tmp_path) == ['mycode.py']


def test_help_shows_the_config_files_to_scripts_that_take_them(project, capsys):
    for name, usage in (('data.text.prepare', 'data/text/prepare.py'),
                        ('train', 'train.py [config.py ...]')):
        with pytest.raises(SystemExit):
            configure(name, ['--help'])
        out = capsys.readouterr().out
        assert f'usage: python {usage} [--key=value ...]\n' in out
        assert ('configs:' in out) == (name == 'train')
    names = re.search('^configs: (.*)', out, re.M)[1].split()
    assert names == sorted(name for name in os.listdir(project / 'config') if '.py' in name)


@pytest.mark.parametrize('name', ['train_shakespeare_char_cpu', 'train_shakespeare_char_cpu.py',
                                  'config/train_shakespeare_char_cpu'])
def test_a_config_file_is_found_by_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configure('train', [name])['out_dir'] == 'out-shakespeare-char-cpu'
    configure('train', [])


def test_a_variable_of_its_own_in_a_config_file_begins_with_an_underscore(namespace, capsys,
                                                                          tmp_path):
    (tmp_path / 'c.py').write_text('for i in range(3): pass\nwidth = i\n')
    line, = fails(capsys, configure, 'script', [str(tmp_path / 'c.py')])
    assert "unknown key 'i' (" in line and 'a variable of your own begins with _' in line
    (tmp_path / 'c.py').write_text('for _i in range(3): pass\nwidth = _i\n')
    assert configure('script', [str(tmp_path / 'c.py')])['width'] == 2


def test_a_tilde_is_the_home_folder_in_paths_only(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'c.py').write_text('init_from = "~/b"\n')
    config = configure('train', ['--out_dir=~/runs/a', str(tmp_path / 'c.py'),
                                     '--sample_prompt=~/x'])
    assert config['out_dir'] == f'{tmp_path}/runs/a' and config['init_from'] == f'{tmp_path}/b'
    assert config['sample_prompt'] == '~/x'
    configure('train', [])
    assert configure('sample', ['--export=~/e'])['export'] == f'{tmp_path}/e'
    configure('sample', [])


@pytest.mark.parametrize('environment', [
    {'RANK': '0'}, {'WORLD_SIZE': '2'}, {'RANK': '0', 'WORLD_SIZE': ''},
    {'RANK': 'x', 'WORLD_SIZE': '2'}, {'RANK': '0', 'WORLD_SIZE': '-2'},
    {'RANK': '0', 'WORLD_SIZE': 'two'}, {'RANK': '0', 'WORLD_SIZE': '0'},
    {'SLURM_STEP_NUM_TASKS': '4', 'SLURM_PROCID': '0'}])
def test_processes_that_do_not_know_each_other_do_not_start(monkeypatch, capsys, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    line, = fails(capsys, setup, device='cpu')
    assert 'with torchrun' in line and 'config/slurm.sh' in line


@pytest.mark.parametrize('environment', [
    {'RANK': '', 'WORLD_SIZE': '', 'LOCAL_RANK': '', 'LOCAL_WORLD_SIZE': ''},
    {'RANK': '0', 'WORLD_SIZE': '1', 'SLURM_STEP_NUM_TASKS': '2'},  # srun torchrun
    {'SLURM_NTASKS': '4', 'SLURM_STEP_NUM_TASKS': '1', 'SLURM_PROCID': '0'},  # a shell of salloc
    {'SLURM_NTASKS': '4', 'SLURM_PROCID': '0'}])  # a batch script without srun
def test_one_process_starts_alone(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    process = setup(device='cpu', dtype='float32')
    assert (process.rank, process.world_size, process.is_main) == (0, 1, True)


def test_a_world_without_an_address_is_an_error(monkeypatch, capsys):
    for name, value in (('RANK', '0'), ('WORLD_SIZE', '2')):
        monkeypatch.setenv(name, value)
    line, = fails(capsys, setup, device='cpu')
    assert 'MASTER_ADDR' in line and 'torchrun' in line


# -----------------------------------------------------------------------------
# small mistakes that no other test would notice

def test_the_users_own_config_file_comes_before_quills_of_the_same_name(tmp_path, monkeypatch):
    name = os.path.join('config', 'train_shakespeare_char_cpu.py')
    (tmp_path / 'config').mkdir()
    (tmp_path / name).write_text('n_layer = 77\n')
    monkeypatch.chdir(tmp_path)
    try:
        assert configure('train', [name])['n_layer'] == 77
    finally:
        configure('train', [])


def test_one_process_of_each_node_works_and_rank_0_is_done_before_the_others_begin(monkeypatch):
    events = []
    monkeypatch.setattr(Process, 'gather', lambda self, x: events.append('wait'))
    for rank, local_rank, allowed in ((0, 0, None), (1, 1, 0), (2, 0, 1), (3, 1, 0)):
        process = Process(torch.device('cpu'), torch.float32, rank=rank, local_rank=local_rank,
                          world_size=4)
        events.clear()
        process.once_per_node(lambda: events.append('work'))
        assert events.count('wait') == 2  # each time, all processes wait for each other
        if rank == 0:
            assert events[0] == 'work'
        else:
            assert events.count('work') == allowed and events[0] == 'wait'


@pytest.mark.parametrize('threads, expected', [('1', [4]), ('3', [])])
def test_processes_of_one_machine_share_its_cores_unless_the_user_has_chosen(
        monkeypatch, threads, expected):
    chosen = []
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(torch, 'set_num_threads', chosen.append)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    monkeypatch.setenv('OMP_NUM_THREADS', threads)  # torchrun sets 1
    setup(device='cpu', dtype='float32')
    assert chosen == expected


@pytest.mark.parametrize('supported, expected', [(True, 'bfloat16'), (False, 'float16')])
def test_a_gpu_that_only_emulates_bfloat16_computes_in_float16(monkeypatch, supported, expected):
    def is_bf16_supported(including_emulation=True):
        return including_emulation or supported
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', is_bf16_supported)
    assert configurator.pick_dtype('cuda') == expected
    assert configurator.pick_dtype('mps') == 'float32'


@pytest.mark.parametrize('deterministic', [False, True])
def test_deterministic_refuses_kernels_whose_bits_vary(monkeypatch, deterministic):
    monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG', raising=False)
    try:
        setup(device='cpu', dtype='float32', deterministic=deterministic)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert ('CUBLAS_WORKSPACE_CONFIG' in os.environ) == deterministic
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop('CUBLAS_WORKSPACE_CONFIG', None)
