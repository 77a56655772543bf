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
import functools
import hashlib
import importlib.util
import math
import os
import re
import shutil
import signal
import sys
import sysconfig
import time
import traceback
import uuid
from dataclasses import dataclass
from pathlib import Path

# torch's threads wait for each other in a loop. By default they spin so long that other work on the
# cores makes an update ten times slower. libgomp reads this number when torch is imported
os.environ.setdefault('GOMP_SPINCOUNT', '10000')

import torch
import torch.distributed as dist

HERE = os.path.dirname(os.path.abspath(__file__))
DTYPES = ('auto', 'float32', 'bfloat16', 'float16')

def torchrun(name, default):
    """Return the number that torchrun has put into an environment variable."""
    return int(os.environ.get(name, default))

# -----------------------------------------------------------------------------
# errors

def fail(*problems, code=2):
    """Print one line `error: ...` per problem and exit; 2: the user's mistake, 1: the machine's."""
    prefix = ''
    if rank := torchrun('RANK', 0):
        # usually all ranks find the same mistake: rank 0 reports it, and torchrun ends the others
        # while they sleep here. A rank that wakes up has found a problem of its own
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
        prefix = f'rank {rank}: '
    sys.stdout.flush()
    for problem in problems:
        print(f'error: {prefix}{problem}', file=sys.stderr, flush=True)
    raise SystemExit(code)

def first_line(e):
    """Return the first line of an exception's message, or its name if it has no message."""
    return (str(e) or repr(e)).splitlines()[0]

def say(*words):
    """Print at once. When the output has gone or its disk is full, what follows is lost."""
    try:
        print(*words, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

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
    code = 0
    try:
        try:
            if name:
                configure(name, **more)
            main()
            sys.stdout.flush()
        except KeyboardInterrupt:
            fail('interrupted', code=130)
        except BrokenPipeError:  # the reader of our output has gone, as in `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (MemoryError, RuntimeError) as e:
            # on a CPU, torch has no exception of its own for this
            if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate" in str(e):
                fail('out of memory: halve batch_size and double gradient_accumulation_steps, or '
                     'take a smaller model: ' + first_line(e), code=1)
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
    """Override the settings of the script whose module has this name, and return all as a dict.

    The order is: defaults, then argv. Scripts that apply a checkpoint's settings in between call
    read_arguments and apply_settings themselves; see there.
    """
    given, problems = read_arguments(name, argv, base)
    return apply_settings(name, given, {}, base, check, problems)

def read_arguments(name, argv=None, base=None):
    """Return what config files and --key=value set, as a dict, and a list of problems.

    name: of the script's module. base: the name of another script's module, whose settings belong
    to this script too. A later argument wins, and a config file can read what came before it.
    """
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='backslashreplace')  # a sample may hold any character
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print_help(name, base)
        raise SystemExit(0)
    defaults, given, problems = defaults_of(name, base), {}, []
    # the scripts in data/ take no config files
    configs = not Path(sys.modules[name].__file__).resolve().is_relative_to(Path(HERE, 'data'))
    for arg in argv:  # first the form of all, because a config file is code, which runs
        if not re.match('--.+?=', arg) and not (configs and find_config(arg)):
            problems.append(f"'{arg}' is not --key=value" + ', nor a config file (.py)' * configs)
    if problems:
        fail(*problems)
    for arg in argv:
        key, equals, text = arg.removeprefix('--').partition('=')
        origin, pairs = '', {key: text}
        if not equals:
            origin = f'{arg}, '
            try:
                pairs = read_config(find_config(arg), defaults | given)
            except ValueError as e:
                problems.append(f'{arg}, {e}')
                continue
        for key, value in pairs.items():
            try:
                given[key] = convert(key, value, defaults)
            except ValueError as e:
                hint = ': begin a helper variable with _' if origin and key not in defaults else ''
                problems.append(f'{origin}{e}{hint}')
    return given, problems

def apply_settings(name, given, saved, base=None, check=lambda: [], problems=()):
    """Set the settings of a script: defaults, then saved, then given; return all as a dict.

    saved: of a checkpoint. Fails with all problems, also those that check() returns. The script's
    global _given becomes the set of keys in given.
    """
    defaults, problems = defaults_of(name, base), list(problems)
    settings = dict(defaults)
    for key, value in saved.items():
        if key in defaults:
            try:
                settings[key] = convert(key, value, defaults)
            except ValueError as e:
                problems.append(f'saved settings, {e}')
    settings |= given
    for module in modules(name, base):
        for key in module._defaults:
            setattr(module, key, settings[key])
        module._given = set(given)
        for key, choices in getattr(module, 'CHOICES', {}).items():
            if settings[key] not in choices:
                problems.append(f'{key}={settings[key]} must be one of '
                                + ', '.join(map(str, choices)))
        for key, (low, high) in getattr(module, 'LIMITS', {}).items():
            if not low <= settings[key] <= high:
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

def convert(key, value, defaults):
    """Return `value` in the type of the default of setting `key`; ValueError states the rule.

    value: the text of a flag, or what a config file or a checkpoint holds.
    """
    if key not in defaults:
        close = difflib.get_close_matches(key, defaults, n=1)
        hint = f": did you mean '{close[0]}'?" if close else ''
        raise ValueError(f"unknown key '{key}'{hint} (--help lists all keys)")
    kind, given = type(defaults[key]), value
    if hasattr(value, 'item'):  # a scalar of numpy or torch
        value = value.item()
    if isinstance(value, str) and value.lower() in ('true', 'false') \
            and (kind is bool or defaults[key] == 'auto'):
        return value.lower() == 'true'
    if isinstance(value, str) and kind is not str:
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value.strip())
    with contextlib.suppress(OverflowError):  # beyond the range of float
        if kind is int and type(value) is float and value == int(value):
            value = int(value)
        if kind is float and type(value) is int:
            value = float(value)
    fits = type(value) is kind or type(value) is bool and defaults[key] == 'auto'
    if not fits or kind is int and abs(value) > 2**63:
        raise ValueError(f'{key}={given!r} must be {RULES[kind]}')
    return os.path.expanduser(value) if key in PATHS else value

def find_config(name):
    """Return the path of a config file, or None: its path, or the name of a file in config/."""
    folders = ('', HERE, os.path.join(HERE, 'config'))
    paths = [os.path.join(folder, name + end) for folder in folders for end in ('', '.py')]
    return next((path for path in paths if path.endswith('.py') and os.path.isfile(path)), None)

def read_config(path, settings):
    """Run a config file, which can read the settings; return {name: value} of what it assigns.

    ValueError names the line of a mistake. Names with a leading underscore, functions and imports
    are the file's own business.
    """
    # as builtins, the settings can be read; what the file assigns becomes a global of its own
    names = {'__builtins__': vars(builtins) | settings, '__file__': path}
    try:
        exec(compile(Path(path).read_text(encoding='utf-8-sig'), path, 'exec'), names)
    except (Exception, SystemExit) as e:
        frames = traceback.extract_tb(e.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        line = lines[0] if lines else getattr(e, 'lineno', None)
        where = f'line {line}: ' if line else ''
        raise ValueError(f'{where}{type(e).__name__}: {e}') from e
    assigned = {key: value for key, value in names.items() if key[0] != '_'
                and not callable(value) and type(value) is not type(sys)}
    if not assigned:
        raise ValueError('it assigns no setting: is it a config file?')
    return assigned

def print_help(name, base=None):
    """Print the settings of a script as they stand in the source, with their comments."""
    defaults, script = defaults_of(name, base), sys.modules[name]
    path = os.path.relpath(script.__file__, HERE)
    configs = '' if path.startswith('data') else '[config.py ...] '
    print(f'{script.__doc__}\nusage: python {path} {configs}[--key=value ...]')
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
        if self.world_size > 1:
            flag = self.all_reduce(torch.tensor(float(bool(flag)), device=self.device))
        return bool(flag)

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
        for turn in (self.is_main, self.local_rank == 0):
            if turn:
                work()
            self.gather(None)

    def close(self):
        if self.world_size > 1:
            dist.destroy_process_group()

def setup(*, device='auto', dtype='auto', compile=False, backend='auto', seed=1337,
          deterministic=False, timeout_s=1800, micro_batches=0):
    """Return the Process for these settings of train.py; 'auto' chooses for this machine.

    micro_batches: those of the whole run, for compile='auto'.
    """
    rank, local_rank = torchrun('RANK', 0), torchrun('LOCAL_RANK', 0)
    world_size, local_world_size = torchrun('WORLD_SIZE', 1), torchrun('LOCAL_WORLD_SIZE', 1)
    if world_size > 1 and not {'RANK', 'MASTER_ADDR', 'MASTER_PORT'} <= set(os.environ):
        fail(f'WORLD_SIZE={world_size}, but RANK, MASTER_ADDR or MASTER_PORT is missing: '
             'start the processes with torchrun')
    device = pick_device(device, local_rank)
    if backend == 'auto':
        backend = 'nccl' if device.type == 'cuda' else 'gloo'
    if backend == 'nccl' and device.type != 'cuda' and world_size > 1:
        fail('backend=nccl needs CUDA devices: use --backend=gloo')
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TF32 for products that stay in float32
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    if device.type == 'cpu' and local_world_size > 1:
        if os.environ.get('OMP_NUM_THREADS') == '1':  # torchrun's default: share all cores instead
            torch.set_num_threads(max(1, cores // local_world_size))
        if local_world_size > cores and rank == 0:
            print(f'note: {local_world_size} processes share {cores} cores, which is slow: '
                  f'use --nproc_per_node={cores} or less', flush=True)
    if compile == 'auto':
        compile = worth_compiling(device.type, micro_batches / world_size)
    if device.type == 'cpu' and not compile:
        keep_memory()  # torch.compile of torch 2.13 often crashes beside it

    if world_size > 1:
        timeout = datetime.timedelta(seconds=timeout_s)
        store = fresh_store(rank, world_size, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size,
                                timeout=timeout, device_id=device if backend == 'nccl' else None)
    torch.manual_seed(seed)
    process = Process(device, None, compile, rank, local_rank, world_size, seed)
    if dtype == 'auto':  # rank 0 chooses for all, because CPUs may differ between nodes
        dtype = process.gather(pick_dtype(device.type))[0]
    process.dtype = getattr(torch, dtype)
    name = torch.cuda.get_device_name() if device.type == 'cuda' else \
        f'{torch.get_num_threads()} CPU threads'
    processes = f'{world_size} processes (backend={backend})' if world_size > 1 else '1 process'
    process.print(f'using device={device} ({name}), {dtype=!s}, {compile=!s}, {processes}')
    return process

def pick_device(device='auto', local_rank=0):
    """Return the torch.device: --device, or env TORCH_DEVICE, or the first of cuda, mps, cpu."""
    available = {'cuda': torch.cuda.is_available, 'mps': torch.backends.mps.is_available,
                 'cpu': lambda: True}
    if device == 'auto':
        first = next(kind for kind in available if available[kind]())
        device = os.environ.get('TORCH_DEVICE') or first
    kind, colon, index = device.partition(':')
    index = int(index or local_rank) if re.fullmatch(r'cpu|mps|cuda(:\d+)?', device) else -1
    if index < 0:
        fail(f'device={device}: device is one of auto, cpu, cuda, cuda:N, mps')
    if not available[kind]():
        fail(f'device={device}: torch sees no such device here: use --device=cpu')
    if torchrun('WORLD_SIZE', 1) > 1 and (kind == 'mps' or colon):
        fail(f'device={device} is for one process: under torchrun use --device=cuda or cpu')
    if kind == 'cuda' and index >= torch.cuda.device_count():
        fail(f'device={device}: this machine has {torch.cuda.device_count()} CUDA device(s): '
             'start fewer processes, or use --device=cpu')
    return torch.device(f'cuda:{index}' if kind == 'cuda' else kind)

def pick_dtype(kind):
    """Return the name of the fastest dtype for matrix products on this kind of device."""
    if kind == 'cuda':  # Volta and Turing only emulate bfloat16, slowly
        return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    return 'bfloat16' if kind == 'cpu' and cpu_multiplies_bfloat16() else 'float32'

def fresh_store(rank, world_size, timeout):
    """Return an empty store for init_process_group.

    torchrun's store still holds the addresses of processes that died before a restart. So rank 0
    gives a new key prefix to each rank that asks now.
    """
    store, _, _ = next(dist.rendezvous('env://', rank, world_size, timeout=timeout))
    token = uuid.uuid4().hex
    if rank == 0:
        for other in range(1, world_size):
            store.delete_key(f'ask/{other}')  # of the previous attempt; a living rank asks again
        for other in range(1, world_size):
            store.set(f'answer/{store.get(f"ask/{other}").decode()}', token)
        return dist.PrefixStore(token, store)
    deadline = time.monotonic() + timeout.total_seconds()
    while not store.check([f'answer/{token}']):
        if time.monotonic() > deadline:
            fail('rank 0 has not appeared within timeout_s', code=1)
        store.set(f'ask/{rank}', token)
        time.sleep(0.05)
    return dist.PrefixStore(store.get(f'answer/{token}').decode(), store)

# -----------------------------------------------------------------------------
# devices

# dense peak TFLOP/s from the vendors' datasheets: (bfloat16 and float16 with float32 sums, float32
# or TF32); the first name that occurs in the name of the device counts
GPU_PEAK_TFLOPS = {
    'GB200': (2500, 1250), 'B200': (2250, 1125), 'H100 PCIe': (756, 378),
    'H100 NVL': (835, 417.5), 'H100': (989, 494.5), 'H200': (989, 494.5), 'GH200': (989, 494.5),
    'H200 NVL': (989, 494.5), 'A100': (312, 156), 'A40': (149.7, 74.8), 'A10': (125, 62.5),
    'A10G': (70, 35), 'L40': (181, 90.5), 'L40S': (362, 183), 'L4': (121, 60),
    'V100': (125, 15.7), 'T4': (65, 8.1), 'A6000': (154.8, 77.4), 'MI300X': (1307.4, 653.7),
    'RTX 5090': (209.5, 104.8), 'RTX 5080': (112.6, 56.3), 'RTX 4090': (165.2, 82.6),
    'RTX 4080': (97.5, 48.7), 'RTX 4070': (58.3, 29.15), 'RTX 3090': (71, 35.6),
    'RTX 3080': (59.5, 29.8), 'RTX 3060': (25.5, 12.7),
}


def peak_flops(process):
    """Return the peak FLOP/s of one process's device, or None if it is unknown."""
    if process.device.type != 'cuda':  # measure half a second: a virtual machine may pause
        return product_flops(1536, process.dtype, process.device, process.clock, seconds=0.5)
    name = torch.cuda.get_device_name(process.device)
    for key, (half, single) in GPU_PEAK_TFLOPS.items():
        if re.search(rf'\b{key}\b(?! (Ti|SUPER|D|Laptop|NVL)\b)', name):
            return 1e12 * (single if process.dtype == torch.float32 else half)


def product_flops(n, dtype, device='cpu', clock=time.perf_counter, seconds=0.0):
    """Return the FLOP/s of the fastest product of two (n, n) matrices in `seconds` or more."""
    x, y = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times, end = [], clock() + seconds
    while len(times) < 5 or clock() < end:
        t0 = clock()
        torch.nn.functional.linear(x, y)
        times.append(clock() - t0)
    return 2 * n**3 / min(times)


@functools.cache
def cpu_multiplies_bfloat16():
    """Return whether this CPU multiplies bfloat16 faster than float32.

    bfloat16 is many times faster than float32 with AMX, twice as fast on AMD's avx512_bf16, and
    half as fast on Intel's avx512_bf16 without AMX, so that case is timed (20 ms).
    """
    amx = getattr(torch.cpu, '_is_amx_tile_supported', bool)  # private: a torch may lack both
    bf16 = getattr(torch.cpu, '_is_avx512_bf16_supported', lambda: True)
    return amx() or \
        bf16() and product_flops(512, torch.bfloat16) > product_flops(512, torch.float32)


def keep_memory():
    """Make glibc's malloc keep freed memory, in huge pages: a third less time for an update."""
    # otherwise each large activation is mapped and faulted in again at every update
    try:
        libc, pointer = ctypes.CDLL('libc.so.6'), ctypes.c_void_p
        libc.malloc.restype = pointer
        size = total_memory(torch.device('cpu')) // 2
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap as well
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
    except (OSError, AttributeError, ValueError):  # macOS, Windows, musl
        return
    # let the heap grow once over addresses, without memory yet, that ask for huge pages
    if block := libc.malloc(ctypes.c_size_t(size)):
        start = (block + 2**21 - 1) // 2**21 * 2**21
        libc.madvise(pointer(start), ctypes.c_size_t(size - 2**21), 14)  # MADV_HUGEPAGE
        libc.free(pointer(block))


def worth_compiling(kind, micro_batches):
    """Return whether torch.compile saves more time than it takes, on one device."""
    # an estimate: on a GPU it takes a minute and saves 30 ms a micro-batch; on a CPU it gains
    # nothing. It needs triton, a GPU that triton supports, a C compiler and Python's headers
    return kind == 'cuda' and micro_batches >= 2000 \
        and importlib.util.find_spec('triton') is not None \
        and torch.cuda.get_device_capability() >= (7, 0) \
        and any(map(shutil.which, ('cc', 'gcc', 'clang'))) \
        and os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h'))


def total_memory(device):
    """Return the bytes of memory of the device."""
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == 'mps':
        return torch.mps.recommended_max_memory()
    if not hasattr(os, 'sysconf'):  # Windows
        return math.inf
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
