"""
From the command line to a ready process: what all scripts share.

    run_main(main, __name__)   read the settings of a script, call main(), report common failures
    process = setup(...)       choose the device, the precision and the process group
    fail(...)                  end this process with a line `error: ...`
"""
import ast
import atexit
import builtins
import contextlib
import ctypes
import datetime
import difflib
import hashlib
import importlib.util
import math
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# torch's threads wait for each other in a loop. By default they spin so long that other work on the
# cores makes an update ten times slower. libgomp reads this number when torch is imported
os.environ.setdefault('GOMP_SPINCOUNT', '10000')

try:
    import torch
    import torch.distributed as dist
except KeyboardInterrupt:  # importing torch takes seconds
    print('error: interrupted', file=sys.stderr)
    raise SystemExit(130) from None

HERE = os.path.dirname(os.path.abspath(__file__))
DTYPES = ('auto', 'float32', 'bfloat16', 'float16')

def torchrun(name, default):
    """Return the number that torchrun has put into an environment variable; -1: it is no number."""
    value = os.environ.get(name) or str(default)
    return int(value) if value.isdecimal() else -1

# -----------------------------------------------------------------------------
# errors

def fail(*problems, code=2):
    """Print one line `error: ...` per problem and exit; 2: the user's mistake, 1: the machine's."""
    if torchrun('RANK', 0) > 0:
        # usually all ranks find the same mistake: rank 0 reports it, and torchrun ends the others
        # while they sleep here. A rank that wakes up has found a problem of its own
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    sys.stdout.flush()
    for problem in problems:
        print(f'error: {problem}', file=sys.stderr, flush=True)
    raise SystemExit(code)

def first_line(e):
    """Return the first line of an exception's message, or its name if it has no message."""
    return (str(e) or repr(e)).splitlines()[0]

def say(*words):
    """Print at once; return False if the output has gone or its disk is full: the rest is lost."""
    try:
        print(*words, flush=True)
        return True
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False

@contextlib.contextmanager
def one_line_errors(prefix='', kinds=(ValueError, OSError)):
    """Turn exceptions of these kinds into an error line that starts with prefix."""
    try:
        yield
    except kinds as e:
        fail(prefix + first_line(e))

def run_main(main, name=None, **more):
    """Call configure(name, **more), if a name is given, and main(); then exit.

    Failures that no code can help end in one line. All others keep their traceback.
    """
    for stream in ('stdin', 'stdout', 'stderr'):
        if getattr(sys, stream) is None:  # closed by `>&-`: no file may take its number
            setattr(sys, stream, open(os.devnull, 'r+'))
    sys.stdout.reconfigure(errors='backslashreplace')  # a sample may hold any character
    code = 0
    try:
        try:
            if name:
                configure(name, **more)
            main()
            sys.stdout.flush()
        except KeyboardInterrupt:
            fail('interrupted', code=130)
        except BrokenPipeError:
            # no error if the reader of our output has gone, as in `| head`
            if say():
                raise
        except (MemoryError, RuntimeError) as e:
            # on a CPU, torch has no exception of its own for this
            if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate" in str(e):
                hint = 'take a smaller model'
                if (size := main.__globals__.get('batch_size', 1)) > 1:
                    count = 2 * main.__globals__['gradient_accumulation_steps']
                    hint = f'try --batch_size={size // 2} --gradient_accumulation_steps={count}'
                fail(f'out of memory, {hint}: {first_line(e)}', code=1)
            if isinstance(e, dist.DistError) or 'gloo' in str(e):  # gloo's errors have no class
                fail('another process has ended, or has not answered within timeout_s: '
                     + first_line(e), code=1)
            raise
    except SystemExit as e:
        code = e.code
    if torchrun('WORLD_SIZE', 1) > 1:
        # leave without Python's shutdown, which may abort after using gloo (torch 2.13:
        # "terminate called without an active exception"); all work is done
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)

# -----------------------------------------------------------------------------
# settings: the public lower-case globals of a script; config files and --key=value override them

PATHS = ('out_dir', 'init_from', 'export', 'input', 'tokenizer')  # settings in which ~ is home
RULES = {bool: 'True or False', int: 'an integer', float: 'a number', str: 'a string'}

def configure(name, argv=None, base=None, check=lambda: []):
    """Override the settings of the script whose module has this name, and return all as a dict."""
    return apply_settings(name, read_arguments(name, argv, base), {}, base, check)

def read_arguments(name, argv=None, base=None):
    """Return what config files and --key=value set, as a dict.

    name: of the script's module. base: the name of another script's module, whose settings belong
    to this script too. A later argument wins, and a config file can read what came before it.
    """
    rest = sys.argv[1:] if argv is None else list(argv)
    if '--help' in rest or '-h' in rest:
        print_help(name, base)
        raise SystemExit(0)
    defaults, given = defaults_of(name, base), {}
    while rest:
        arg = rest.pop(0)
        if arg.startswith('--'):
            key, equals, value = arg[2:].partition('=')
            if not equals:  # --key value, or --key alone
                after = rest[0] if rest else '--'
                is_flag = type(defaults.get(key)) is bool
                is_value = after.lower() in ('true', 'false') if is_flag else after[:2] != '--'
                value = rest.pop(0) if is_value else True
            given[key] = convert(key, value, defaults)
        else:
            path = find_config(arg, defaults)
            for key, value in read_config(path, defaults | given).items():
                given[key] = convert(key, value, defaults, f'{path}, ')
    return given

def apply_settings(name, given, saved, base=None, check=lambda: []):
    """Set the settings of a script: defaults, then saved, then given; return all as a dict.

    saved: of a checkpoint. Fails with all problems, also those that check() returns. The script's
    global _given becomes the set of keys in given.
    """
    defaults, problems = defaults_of(name, base), []
    known = {key: convert(key, value, defaults, 'saved settings, ')
             for key, value in saved.items() if key in defaults}
    settings = defaults | known | given
    for module in modules(name, base):
        module._given = set(given)
        for key, choices in getattr(module, 'CHOICES', {}).items():
            if settings[key] not in choices:
                problems.append(f'{key}={settings[key]} must be one of '
                                + ', '.join(map(str, choices)))
        for key in module._defaults:
            setattr(module, key, settings[key])
            low, high = getattr(module, 'LIMITS', {}).get(key, (0, 1e9))
            if type(settings[key]) in (int, float) and not low <= settings[key] <= high:
                problems.append(f'{key}={settings[key]} must be between {low} and {high:g}')
    problems += check()
    if problems:
        fail(*dict.fromkeys(problems))
    return settings

def modules(name, base=None):
    """Return the modules whose settings a script has, given their names."""
    return [sys.modules[key] for key in (base, name) if key]

def defaults_of(name, base=None):
    """Return the settings of a script as its source states them."""
    defaults = {}
    for module in modules(name, base):
        if not getattr(module, '_defaults', None):  # at the first call, nothing has changed them
            module._defaults = {key: value for key, value in vars(module).items()
                                if key == key.lower() and key[0] != '_'
                                and type(value) in (int, float, bool, str)}
        defaults |= module._defaults
    return defaults

def settings_of(name):
    """Return the present settings of the script whose module has this name, as a dict."""
    return {key: getattr(sys.modules[name], key) for key in defaults_of(name)}

def convert(key, value, defaults, origin=''):
    """Return `value` in the type of the default of setting `key`, or fail.

    value: the text of a flag, or what a config file or a checkpoint holds. origin: where from.
    """
    if key not in defaults:
        rule = 'a variable of your own begins with _' if origin else '--help lists all keys'
        fail(f"{origin}unknown key '{key}'{nearest(key, defaults)} ({rule})")
    kind, given = type(defaults[key]), value
    may_be_bool = kind is bool or defaults[key] == 'auto'
    if may_be_bool and str(value).lower() in ('true', 'false'):
        return str(value).lower() == 'true'
    if isinstance(value, str) and kind is not str:
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value.strip())
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        fail(f'{origin}{key}={given!r} must be {RULES[kind]}')
    return os.path.expanduser(value) if key in PATHS else value

def nearest(word, words):
    """Return the part of an error line that suggests the nearest of the words, if one is near."""
    close = difflib.get_close_matches(word, words, n=1)
    return f": did you mean '{close[0]}'?" if close else ''

def find_config(name, defaults):
    """Return the path of a config file, given the path or the name of a file in config/."""
    if 'input' in defaults:  # the script prepares a text
        fail(f"'{name}' is not --key=value: did you mean --input={name}?")
    for folder in ('', HERE, os.path.join(HERE, 'config')):
        path = os.path.join(folder, name.removesuffix('.py') + '.py')
        if os.path.isfile(path):
            return path
    hint = nearest(os.path.basename(name), os.listdir(os.path.join(HERE, 'config')))
    fail(f"'{name}' is not --key=value, nor a config file (.py){hint}")

def read_config(path, settings):
    """Run a config file, which can read the settings; return {name: value} of what it assigns.

    Names with a leading underscore, functions and imports are the file's own business.
    """
    # as builtins, the settings can be read; what the file assigns becomes a global of its own
    names = {'__builtins__': vars(builtins) | settings, '__file__': path}
    tree = ast.parse(Path(path).read_bytes(), path)
    for node in tree.body:
        is_comparison = isinstance(node, ast.Expr) and isinstance(node.value, ast.Compare)
        if is_comparison or isinstance(node, ast.AnnAssign) and not node.value:
            fail(f'{path}, line {node.lineno} assigns nothing: write key = value')
    exec(compile(tree, path, 'exec'), names)
    return {key: value for key, value in names.items()
            if key[0] != '_' and not callable(value) and type(value) is not type(sys)}

def print_help(name, base=None):
    """Print the settings of a script as they stand in the source, with their comments."""
    defaults, script = defaults_of(name, base), sys.modules[name]
    configs = '' if 'input' in defaults else '[config.py ...] '
    print(f'{script.__doc__}\nusage: python {os.path.relpath(script.__file__, HERE)} '
          f'{configs}[--key=value ...]')
    if 'max_iters' in defaults:
        print('configs:', *sorted(path.name for path in Path(HERE, 'config').glob('*.py')))
    for module in modules(name, base):
        lines = Path(module.__file__).read_text(encoding='utf-8').splitlines()
        for heading, line in zip([''] + lines, lines):
            setting = re.match(r'(\w+) = (.*?)  # (.*)', line)
            if not setting or setting[1] not in module._defaults:
                continue
            if heading.startswith('# ') and '---' not in heading:
                print(f'\n{heading}')
            key, choices = setting[1], getattr(module, 'CHOICES', {}).get(setting[1])
            comment = setting[3] + (f': {" | ".join(map(str, choices))}' if choices else '')
            print(f'  --{key}={str(defaults[key]):<{max(1, 28 - len(key))}} {comment}')

# -----------------------------------------------------------------------------
# setup: what the machine offers

@dataclass
class Process:
    """A ready process: its device, its precision, and its place among all processes."""
    device: torch.device
    dtype: torch.dtype  # of matrix products; parameters stay in float32
    compile: bool = False
    rank: int = 0  # among all processes
    local_rank: int = 0  # among the processes of this node
    world_size: int = 1
    seed: int = 1337

    @property
    def is_main(self):
        return self.rank == 0

    def print(self, *words):
        """Print at once, on rank 0 only."""
        if self.is_main:
            say(*words)

    def autocast(self):
        """Return a context in which matrix products run in self.dtype."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def clock(self, wait=True):
        """Return the time in seconds; wait: let the device finish its queue first."""
        if wait and self.device.type != 'cpu':
            getattr(torch, self.device.type).synchronize()
        return time.perf_counter()

    def to_device(self, tensor):
        """Return a CPU tensor on the device; a GPU copies it in the background."""
        if self.device.type == 'cuda':
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def derive_seed(self, stream, *index):
        """Return a seed that depends only on the run's seed, a stream's name and an index."""
        digest = hashlib.sha256(repr((self.seed, stream, *index)).encode()).digest()
        return int.from_bytes(digest[:4], 'little')  # torch's CPU generator uses 32 bits

    def generator(self, stream, *index, device='cpu'):
        """Return a torch.Generator seeded by derive_seed."""
        return torch.Generator(device).manual_seed(self.derive_seed(stream, *index))

    def any(self, flag):
        """Return whether flag is true on any process."""
        return bool(self.all_reduce(torch.tensor(float(bool(flag)), device=self.device)))

    def all_reduce(self, tensor):
        """Sum `tensor` over all processes in place and return it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor):
        """Replace `tensor` by that of rank 0 in place and return it."""
        if self.world_size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def gather(self, x):
        """Return the list of every process's x (any object), in the order of ranks."""
        everyones = [x] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(everyones, x)
        return everyones

    def once_per_node(self, work):
        """Call work() on the first rank of each node, rank 0 first; the other ranks wait."""
        for turn in (self.is_main, self.local_rank == 0 and not self.is_main):
            if turn:
                work()
            self.gather(None)

    def close(self):
        if self.world_size > 1:
            dist.destroy_process_group()

def setup(*, device='auto', dtype='auto', compile=False, backend='auto', seed=1337,
          deterministic=False, timeout_s=1800, micro_batches=0):
    """Return the Process for these settings of train.py; 'auto' chooses for this machine."""
    rank, local_rank = torchrun('RANK', 0), torchrun('LOCAL_RANK', 0)
    world_size = torchrun('WORLD_SIZE', 1)
    given = [name for name in ('RANK', 'WORLD_SIZE') if os.environ.get(name)]
    slurm_tasks = 1 if given else torchrun('SLURM_STEP_NUM_TASKS', 1)
    if len(given) == 1 or not 0 <= rank < world_size or slurm_tasks > 1:
        fail('RANK and WORLD_SIZE do not tell which of how many processes this is: start several '
             'with torchrun (under Slurm, see config/slurm.sh), one without these variables')
    device = pick_device(device, local_rank)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TF32 for products that stay in float32
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    if compile == 'auto':
        # an estimate: on a GPU it takes a minute and saves 30 ms in each micro-batch of the run
        compile = device.type == 'cuda' and micro_batches / world_size >= 2000 \
            and importlib.util.find_spec('triton') is not None
    if device.type == 'cpu':
        share_cores(torchrun('LOCAL_WORLD_SIZE', 1))
        if not compile:
            keep_memory()  # torch.compile of torch 2.13 often crashes beside it

    if backend == 'auto':
        backend = 'nccl' if device.type == 'cuda' else 'gloo'
    if world_size > 1:
        timeout = datetime.timedelta(seconds=timeout_s)
        with one_line_errors('start the processes with torchrun: '):
            dist.init_process_group(backend, timeout=timeout,
                                    device_id=device if backend == 'nccl' else None)
    torch.manual_seed(seed)
    process = Process(device, None, compile, rank, local_rank, world_size, seed)
    if dtype == 'auto':  # rank 0 chooses for all, because CPUs may differ between nodes
        dtype = process.gather(pick_dtype(device.type))[0]
    process.dtype = getattr(torch, dtype)
    name = f'{torch.get_num_threads()} CPU threads'
    if device.type == 'cuda':
        name = torch.cuda.get_device_name()
    processes = f'{world_size} processes (backend={backend})' if world_size > 1 else '1 process'
    process.print(f'using device={device} ({name}), {dtype=!s}, {compile=!s}, {processes}')
    return process

def pick_device(device='auto', local_rank=0):
    """Return the torch.device: --device, or env TORCH_DEVICE, or the first of cuda, mps, cpu."""
    if device == 'auto':
        without_cuda = 'mps' if torch.backends.mps.is_available() else 'cpu'
        first = 'cuda' if torch.cuda.is_available() else without_cuda
        device = os.environ.get('TORCH_DEVICE') or first
    name = f'cuda:{local_rank}' if device == 'cuda' else device
    with one_line_errors(f'device={device}: use --device=cpu, or fewer processes: ',
                         (RuntimeError, AssertionError, NotImplementedError)):
        torch.empty(1, device=name)
    return torch.device(name)

def pick_dtype(kind):
    """Return the name of the fastest dtype for matrix products on this kind of device."""
    if kind == 'cuda':  # Volta and Turing only emulate bfloat16, slowly
        return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    return 'bfloat16' if kind == 'cpu' and cpu_multiplies_bfloat16() else 'float32'

# -----------------------------------------------------------------------------
# devices

# dense peak TFLOP/s of bfloat16 and float16 with float32 sums, from the vendors' datasheets;
# variants of a card, such as `RTX 4090 Laptop GPU`, are other cards
GPU_PEAK_TFLOPS = {
    'B200': 2250, 'H200': 989, 'H100': 989, 'A100': 312, 'L40S': 362, 'L4': 121, 'A10G': 70,
    'T4': 65, 'V100': 125, 'RTX 5090': 209.5, 'RTX 4090': 165.2, 'RTX 3090': 71}

def peak_flops(process):
    """Return the peak FLOP/s of one process's GPU, or None if it is unknown, as for a CPU."""
    if process.device.type == 'cuda' and process.dtype != torch.float32:
        name = torch.cuda.get_device_name(process.device)
        for key, tflops in GPU_PEAK_TFLOPS.items():
            if re.search(rf'\b{key}\b(?! (Ti|D|Laptop|NVL|PCIe)\b)', name):
                return 1e12 * tflops

def cpu_multiplies_bfloat16():
    """Return whether this CPU multiplies bfloat16 faster than float32.

    bfloat16 is many times faster with AMX, and twice as fast with AMD's avx512_bf16. It is half as
    fast with Intel's avx512_bf16 alone. A timing would give other answers on a busy machine.
    """
    words = set(read_file('/proc/cpuinfo').split())
    return 'amx_bf16' in words or {'AuthenticAMD', 'avx512_bf16'} <= words

def share_cores(processes):
    """Limit torch's threads to the cores of one process; processes: their number on this node."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    quotas = [text.split() for text in cgroup_files('cpu.max')]
    quotas += zip(cgroup_files('cpu.cfs_quota_us'), cgroup_files('cpu.cfs_period_us'))
    for quota, period in quotas:
        if quota not in ('max', '-1'):
            cores = min(cores, math.ceil(int(quota) / int(period)))
    chosen = os.environ.get('OMP_NUM_THREADS')
    if chosen == '1' and processes > 1:  # torchrun's default: share all cores instead
        torch.set_num_threads(max(1, cores // processes))
    elif not chosen and torch.get_num_threads() > cores:
        torch.set_num_threads(cores)

def keep_memory():
    """Make glibc's malloc keep freed memory, in huge pages: a third less time for an update."""
    # otherwise each large activation is mapped and faulted in again at every update
    try:
        libc, pointer = ctypes.CDLL('libc.so.6'), ctypes.c_void_p
        libc.malloc.restype = pointer
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap as well
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
    except (OSError, AttributeError):  # macOS, Windows, musl
        return
    # let the heap grow once over addresses, without memory yet, that ask for huge pages
    size = total_memory(torch.device('cpu')) // 2
    if block := libc.malloc(ctypes.c_size_t(size)):
        start = (block + 2**21 - 1) // 2**21 * 2**21
        libc.madvise(pointer(start), ctypes.c_size_t(size - 2**21), 14)  # MADV_HUGEPAGE
        libc.free(pointer(block))

def total_memory(device):
    """Return the bytes of memory of the device; of a CPU, those that this process may use."""
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, 'sysconf'):  # Windows
        return math.inf
    machine = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    limits = cgroup_files('memory.max') + cgroup_files('memory.limit_in_bytes')
    return min([machine, *(int(limit) for limit in limits if limit != 'max')])

def cgroup_files(name):
    """Return the content of each file of this name in this process' control groups, v1 and v2."""
    contents = []
    for group in read_file('/proc/self/cgroup').splitlines():  # number:controllers:/folder
        _, controllers, folder = group.split(':', 2)
        folder = Path('/sys/fs/cgroup', controllers, folder.strip('/'))
        # a parent's limit counts, too
        contents += [read_file(parent / name).strip() for parent in (folder, *folder.parents)]
    return [content for content in contents if content]

def read_file(path):
    """Return the text of a file, or '' if there is none, as outside of Linux."""
    with contextlib.suppress(OSError):
        return Path(path).read_text()
    return ''
