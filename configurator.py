"""
From the command line to a ready process. Three things that every script shares:

configure(globals())  overrides a script's settings, its public module globals:
    python train.py config/train_shakespeare_char.py --batch_size=32 --compile=False
setup(...)            picks device, dtype and process group, and returns them as a Run
fail(...)             ends the process with one clear line
"""
import ast
import contextlib
import ctypes
import datetime
import difflib
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import sys
import time
import traceback
import uuid
from dataclasses import dataclass

import torch
import torch.distributed as dist


def torchrun(name, default):
    """Return the number that torchrun says in the environment variable `name`; default without it."""
    return int(os.environ.get(name, default))


def fail(*problems, code=2):
    """Print one `error: ` line per problem on stderr and exit; 2 is the user's mistake, 1 the machine's.

    Under torchrun all ranks find the same mistake. Rank 0 speaks; torchrun then ends the others while
    they wait here. One that is still alive after the wait has found something that rank 0 has not.
    """
    prefix = ''
    if rank := torchrun('RANK', 0):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
        prefix = f'rank {rank}: '
    sys.stdout.flush()
    for problem in problems:
        print(f'error: {prefix}{problem}', file=sys.stderr, flush=True)
    raise SystemExit(code)


def first_line(e):
    """The first line of what the exception e says, or its name where it says nothing."""
    return (str(e) or repr(e)).splitlines()[0]


def cannot_write(path, e, more='', name=''):
    """fail, as the machine's fault, with the exception e that came of writing path, and the space that is left there.

    name: what to call it, instead of path.
    """
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    reason = getattr(e, 'strerror', None) or first_line(e)
    fail(f'cannot write {name or path} ({reason}): {shutil.disk_usage(folder).free / 1e6:.1f} MB are free{more}', code=1)


def lock(file):
    """Take file, an open one, for this process alone until it is closed; BlockingIOError where another process has it.

    Returns why that is impossible here, None where it is done.
    """
    try:
        import fcntl  # not on Windows
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError as e:
        return str(e)
    except BlockingIOError:
        raise
    except OSError as e:
        return e.strerror


def lost_process(e):
    """fail, as the machine's fault, with the exception e that came of waiting for another process."""
    fail(f'another process has ended, or has not answered within timeout_s: {first_line(e)}', code=1)


def out_of_memory(e):
    """Whether the exception e says that; on a CPU it has no class of its own."""
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(e)


def excepthook(kind, value, trace):
    """Python's own, but without a traceback for Ctrl-C, too little memory, and a reader of our output that has left."""
    if out_of_memory(value):
        print(f'error: out of memory: {first_line(value)}', file=sys.stderr)
    elif issubclass(kind, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where what is still to be written goes
    elif kind is not KeyboardInterrupt:
        sys.__excepthook__(kind, value, trace)


# -----------------------------------------------------------------------------
# configure: settings are module globals, overridden by config files and --key=value

BOOLS = {'True': True, 'true': True, 'False': False, 'false': False}


def is_key(name, value):
    return not name.startswith('_') and not name.isupper() and type(value) in (int, float, bool, str)


def convert(key, value, default):
    """Return `value` as the type of `default`; a str `value` is taken as text. ValueError says the rule."""
    kind, given = type(default), value
    if isinstance(value, str):  # from the command line, or quoted in a file
        if kind is bool or default == 'auto':
            value = BOOLS.get(value, value)
        elif kind is not str:
            for parse in (kind, float):  # an int not through float, which is exact only up to 2**53
                with contextlib.suppress(ValueError):
                    value = parse(value)
                    break
    with contextlib.suppress(OverflowError):
        if kind is int and type(value) is float and value.is_integer() or kind is float and type(value) is int:
            value = kind(value)
    if (type(value) is kind or default == 'auto' and type(value) is bool) and not (kind is int and abs(value) > 2**63):
        return value
    rule = {bool: 'True or False', int: 'an integer of at most 64 bits', float: 'a number', str: 'a string'}[kind]
    raise ValueError(f'{key}={given!r}: {key} is {rule}')


def configure(namespace, argv=None, saved=None):
    """Override the settings in `namespace` (a script's globals()) and return all of them as a dict.

    A setting, or key, is a public lower-case global of type int, float, bool or str. Arguments are taken in
    order and a later one wins: a config file (plain Python that assigns keys, and can read their present
    values) or `--key=value`. Values keep the default's type. `saved` holds settings, of a checkpoint, say,
    that apply before all arguments. Every problem is reported, then the process exits with code 2. The names that
    arguments gave a value to are left in the namespace as `_given`.
    """
    sys.excepthook = excepthook
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='backslashreplace')  # no terminal is too old for a character in a sample
    argv = sys.argv[1:] if argv is None else argv
    script = namespace['__file__']
    # a second call starts from the defaults again
    defaults = namespace.setdefault('_defaults', {k: v for k, v in namespace.items() if is_key(k, v)})
    config = dict(defaults)
    if '--help' in argv or '-h' in argv:
        print_help(script, defaults)
        raise SystemExit(0)

    problems = []
    for key, value in (saved or {}).items():
        if key in defaults:
            try:
                config[key] = convert(key, value, defaults[key])
            except ValueError as e:
                problems.append(f'saved settings: {e}')
    given = set()

    def override(key, value, origin):
        if key not in defaults:
            nearest = difflib.get_close_matches(key, defaults, n=1, cutoff=0)[0]
            problems.append(f"{origin}unknown key '{key}': did you mean '{nearest}'? (--help lists all keys)")
            return
        try:
            config[key] = convert(key, value, defaults[key])
            given.add(key)
        except ValueError as e:
            problems.append(f'{origin}{e}')

    for arg in argv:
        if arg.startswith('-'):
            key, equals, text = arg.removeprefix('--').partition('=')
            if not arg.startswith('--') or not equals:
                problems.append(f"'{arg}': write settings as --key=value")
            else:
                override(key, text, '')
            continue
        # a config file: where the user stands, else beside the script
        path = arg if os.path.isfile(arg) else os.path.join(os.path.dirname(os.path.abspath(script)), arg)
        if not os.path.isfile(path):
            problems.append(f"no config file '{arg}' (settings are written --key=value)")
            continue
        scratch = dict(config, __file__=path, __name__='config')
        try:
            with open(path, encoding='utf-8-sig') as f:
                tree = ast.parse(f.read(), path)
            exec(compile(tree, path, 'exec'), scratch)
        except (Exception, SystemExit) as e:
            lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
            line = lines[0] if lines else getattr(e, 'lineno', None)
            problems.append(f'{arg}{f", line {line}" if line else ""}: {type(e).__name__}: {e}')
            continue
        assigned = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        for key, value in scratch.items():
            # what the file imports, and functions in it, are its own business
            private = key.startswith('_') or callable(value) or type(value) is type(sys)
            if key in assigned and not private or key in defaults and value is not config[key]:
                override(key, value, f'{arg}: ')
    if problems:
        fail(*problems)
    namespace.update(config, _given=given)
    return config


def print_help(script, defaults):
    """Print every key with its default and the comment beside it, under the headings of the source."""
    print((ast.get_docstring(ast.parse(open(script, encoding='utf-8').read())) or '') + '\n')
    print(f'usage: python {os.path.basename(script)} [config.py ...] [--key=value ...]')

    def print_file(path):
        with open(path, encoding='utf-8') as f:
            source = f.read()
        lines = source.split('\n')
        for node in ast.parse(source).body:
            if isinstance(node, ast.ImportFrom) and node.names[0].name == '*':  # bench.py has train.py's keys too
                print_file(os.path.join(os.path.dirname(path), node.module + '.py'))
            if not isinstance(node, ast.Assign) or getattr(node.targets[0], 'id', None) not in defaults:
                continue
            above = lines[node.lineno - 2]
            if above.startswith('# ') and '----' not in above:
                print(f'\n{above}')
            key = node.targets[0].id
            comment = lines[node.end_lineno - 1][node.end_col_offset:].strip().removeprefix('#').strip()
            print(f'  --{key}={defaults[key]!s:<{max(1, 28 - len(key))}} {comment}')
    print_file(os.path.abspath(script))


# -----------------------------------------------------------------------------
# setup: what the machine gives

@dataclass
class Run:
    """A ready process: where it computes, in what precision, and which of how many it is."""
    device: torch.device
    dtype: torch.dtype  # of the matrix products; parameters stay in float32
    compile: bool
    rank: int  # among all processes
    local_rank: int  # among those of this node
    world_size: int
    seed: int

    @property
    def is_main(self):
        return self.rank == 0

    def print(self, *args):
        """Print on rank 0 only, at once."""
        if self.is_main:
            print(*args, flush=True)

    def autocast(self):
        """A context in which matrix products run in `dtype`."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def sync(self):
        """Wait for the device, where it works asynchronously; a clock read before is too early."""
        if self.device.type == 'cuda':
            torch.cuda.synchronize()
        elif self.device.type == 'mps':
            torch.mps.synchronize()

    def to_device(self, tensor):
        """tensor, of the CPU, on the run's device; a GPU fetches it by itself, from memory that is pinned for that."""
        if self.device.type == 'cuda':
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def derive_seed(self, stream, *index):
        """A seed that depends on the run's seed, the name of a stream and an index within it, only.

        Streams ('train', 'dropout', 'sample', ...) never share random numbers, and nothing has to be
        saved to repeat them.
        """
        digest = hashlib.sha256(repr((self.seed, stream, *index)).encode()).digest()
        return int.from_bytes(digest[:4], 'little')  # torch's CPU generator uses 32 bits of a seed

    def generator(self, stream, *index, device='cpu'):
        """A torch.Generator seeded by derive_seed."""
        return torch.Generator(device).manual_seed(self.derive_seed(stream, *index))

    def all_reduce(self, tensor):
        """Sum `tensor` over all processes, in place; with gloo, exit code 1 where one of them is gone or hangs.

        With nccl, which returns before it has summed, it is nccl's own watchdog that then ends the process.
        """
        if self.world_size > 1:
            try:
                dist.all_reduce(tensor)
            except RuntimeError as e:
                lost_process(e)
        return tensor

    def gather(self, x):
        """Return what each process gives as x, anything, in the order of their ranks."""
        everyones = [x] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(everyones, x)
        return everyones

    def barrier(self):
        """Wait until all processes are here."""
        self.all_reduce(torch.zeros(1, device=self.device)).item()  # .item() waits on a GPU too

    def once_per_node(self, work):
        """Call work on rank 0, then on the first rank of each node, which may not share rank 0's disk; the others wait."""
        for turn in (self.is_main, self.local_rank == 0):
            if turn:
                work()
            self.barrier()

    def close(self):
        if self.world_size > 1:
            dist.destroy_process_group()


def pick_device(device):
    """--device > env TORCH_DEVICE > cuda > mps > cpu."""
    origin = f'--device={device}'
    if device == 'auto' and os.environ.get('TORCH_DEVICE'):
        device = os.environ['TORCH_DEVICE']
        origin = f'TORCH_DEVICE={device}'
    if device == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    if not re.fullmatch(r'cpu|mps|cuda(:\d+)?', str(device)):
        fail(f'{origin}: device is one of auto, cpu, cuda, cuda:N, mps')
    if device.startswith('cuda') and not torch.cuda.is_available():
        fail(f'{origin}: torch sees no CUDA device here, use --device=cpu')
    if ':' in device and int(device[5:]) >= torch.cuda.device_count():
        fail(f'{origin}: this machine has {torch.cuda.device_count()} CUDA device(s)')
    if device == 'mps' and not torch.backends.mps.is_available():
        fail(f'{origin}: torch sees no MPS device here, use --device=cpu')
    return device


def product_flops(n, dtype, device='cpu', sync=lambda: None, seconds=0.0):
    """Return the FLOP/s of a product of two (n, n) matrices: the best of five, or of more, to fill so many seconds.

    sync waits for the device.
    """
    x = torch.randn(n, n, device=device, dtype=dtype)
    layer = torch.nn.Linear(n, n, bias=False, device=device, dtype=dtype)
    times, end = [], time.perf_counter() + seconds
    with torch.no_grad():
        while len(times) < 5 or time.perf_counter() < end:
            sync()
            t0 = time.perf_counter()
            layer(x)
            sync()
            times.append(time.perf_counter() - t0)
    return 2 * n**3 / min(times)


@functools.cache
def cpu_multiplies_bfloat16():
    """Whether this processor multiplies bfloat16 faster than float32.

    With AMX many times as fast, by AMD's avx512_bf16 twice, by Intel's, where a virtual machine hides AMX, half as fast: so
    avx512_bf16 without AMX is timed, which takes 20 ms.
    """
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() \
        and product_flops(512, torch.bfloat16) > product_flops(512, torch.float32)


def keep_memory():
    """Make glibc's malloc keep what is freed, in huge pages, instead of returning it; nothing happens elsewhere.

    By default each large activation is mapped anew from the system and faulted in page by page, at every step: a
    third of a step's time. Here large blocks come from the heap, whose top is never given back; and the heap is extended
    once, by addresses without memory, that ask for huge pages.
    """
    try:
        libc = ctypes.CDLL('libc.so.6')
        libc.gnu_get_libc_version
        libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        size = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') // 2
    except (OSError, AttributeError, ValueError):  # macOS, Windows, musl
        return
    libc.mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
    libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
    block = libc.malloc(size)
    if block:
        start = (block + 2**21 - 1) // 2**21 * 2**21
        libc.madvise(start, size - 2**21, 14)  # MADV_HUGEPAGE
        libc.free(block)


def fresh_store(rank, world_size, timeout):
    """Return a store for init_process_group that holds nothing yet.

    When torchrun restarts its workers, they get the store of the attempt before, addresses of the dead included, and
    whoever reads those first, connects to nobody. So rank 0 deals out a new prefix to the ranks that ask now.
    """
    store, _, _ = next(dist.rendezvous('env://', rank, world_size, timeout=timeout))
    token = uuid.uuid4().hex
    if rank == 0:
        for other in range(1, world_size):
            store.delete_key(f'ask/{other}')  # may be of the attempt before; a living rank asks again
        for other in range(1, world_size):
            store.set(f'answer/{store.get(f"ask/{other}").decode()}', token)
    else:
        deadline = time.monotonic() + timeout.total_seconds()
        while not store.check([f'answer/{token}']):
            if time.monotonic() > deadline:
                fail('rank 0 has not appeared within timeout_s', code=1)
            store.set(f'ask/{rank}', token)
            time.sleep(0.05)
        token = store.get(f'answer/{token}').decode()
    return dist.PrefixStore(token, store)


def worth_compiling(kind, micro_batches):
    """Whether torch.compile saves more time than it takes, on this kind of device, in so many micro-batches of one process.

    On a CPU it takes half a minute or more and gains little (what was tried, at the top of bench.py). On a GPU it takes about
    a minute and saves some 30 ms a micro-batch, a rule of thumb; it needs triton there, a GPU that triton knows, and a C compiler.
    """
    return kind == 'cuda' and micro_batches >= 2000 and importlib.util.find_spec('triton') is not None \
        and torch.cuda.get_device_capability() >= (7, 0) \
        and bool(os.environ.get('CC') or shutil.which('gcc') or shutil.which('clang'))


def setup(device='auto', dtype='auto', compile='auto', backend='auto', seed=1337, deterministic=False, timeout_s=1800,
          updates=float('inf'), accumulation=1):
    """Return the Run for these settings, after one printed line that says what is used.

    device: auto | cpu | cuda | cuda:N | mps. dtype: auto | float32 | bfloat16 | float16.
    compile: auto | True | False. backend of torch.distributed: auto | nccl | gloo.
    deterministic: the same bits from the same work on a GPU too. timeout_s: how long one process waits for another.
    updates, accumulation: how many the whole run has, of how many micro-batches each, on which compile='auto' depends.
    'auto' chooses for the machine; anything else is done, or refused with exit code 2. One process, or one of
    many under torchrun.
    """
    rank, local_rank = torchrun('RANK', 0), torchrun('LOCAL_RANK', 0)
    world_size, local_world_size = torchrun('WORLD_SIZE', 1), torchrun('LOCAL_WORLD_SIZE', 1)
    device = pick_device(device)
    kind = device.split(':')[0]

    if world_size > 1:
        if kind == 'mps' or ':' in device:
            fail(f'device={device} is for one process: under torchrun use --device=cuda or --device=cpu')
        if kind == 'cuda':
            if local_rank >= torch.cuda.device_count():
                fail(f'{local_world_size} processes on this node but {torch.cuda.device_count()} CUDA device(s): '
                     'start fewer (--nproc_per_node) or use --device=cpu')
            device = f'cuda:{local_rank}'
        if backend == 'auto':
            backend = 'nccl' if kind == 'cuda' else 'gloo'
        if backend == 'nccl' and kind != 'cuda':
            fail('backend=nccl needs CUDA devices, use --backend=gloo')
    device = torch.device('cuda:0' if device == 'cuda' else device)
    if kind == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TF32 for what stays in float32
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    if kind == 'cpu' and local_world_size > 1 and os.environ.get('OMP_NUM_THREADS') == '1' and hasattr(os, 'sched_getaffinity'):
        # torchrun's own default is one thread a process; share all cores instead
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))

    if dtype == 'auto':
        if kind == 'cuda':
            # including_emulation=False: Volta and Turing can only emulate bfloat16, slowly
            dtype = 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
        elif kind == 'cpu' and cpu_multiplies_bfloat16():
            dtype = 'bfloat16'
        else:
            dtype = 'float32'
    if dtype not in ('float32', 'bfloat16', 'float16'):
        fail(f'dtype={dtype}: dtype is one of auto, float32, bfloat16, float16')
    if dtype == 'bfloat16' and kind == 'cuda' and not torch.cuda.is_bf16_supported():
        fail(f'dtype=bfloat16: {torch.cuda.get_device_name()} does not support it, use --dtype=float16')
    if compile not in ('auto', True, False):
        fail(f'compile={compile}: compile is one of auto, True, False')
    if compile == 'auto':
        compile = worth_compiling(kind, updates * max(1, accumulation / world_size))
    if kind == 'cpu' and not compile:
        # with it, torch 2.13 crashes in two of three first compilations, where AOTAutogradCache pickles its entry
        keep_memory()

    if world_size > 1:
        timeout = datetime.timedelta(seconds=timeout_s)
        dist.init_process_group(backend, store=fresh_store(rank, world_size, timeout), rank=rank, world_size=world_size,
                                timeout=timeout, device_id=device if backend == 'nccl' else None)
    torch.manual_seed(seed)
    run = Run(device, getattr(torch, dtype), compile, rank, local_rank, world_size, seed)
    if kind == 'cpu':  # what rank 0 has found to be fastest: nodes may differ, gradients must not
        run.dtype = getattr(torch, run.gather(dtype)[0])
    name = torch.cuda.get_device_name() if kind == 'cuda' else \
        f'{torch.get_num_threads()} thread{"s" * (torch.get_num_threads() > 1)}' if kind == 'cpu' else 'Apple GPU'
    run.print(f'using device={device} ({name}), dtype={dtype}, compile={compile}, '
              + (f'{world_size} processes (backend={backend})' if world_size > 1 else '1 process'))
    return run


# dense peak TFLOP/s from the vendors' datasheets: (bfloat16 and float16, float32 with TF32 where there is TF32);
# the first name that occurs in the device's name counts
GPU_PEAK_TFLOPS = {
    'GB200': (2500, 1250), 'B200': (2250, 1125), 'H100 PCIe': (756, 378), 'H100 NVL': (835, 417.5),
    'H100': (989, 494.5), 'H200': (989, 494.5), 'GH200': (989, 494.5), 'A100': (312, 156), 'A40': (149.7, 74.8),
    'A10G': (70, 35), 'L40S': (362, 183), 'L4': (121, 60), 'V100': (125, 15.7), 'T4': (65, 8.1),
    'RTX 4090': (165.2, 82.6), 'RTX 3090': (71, 35.6), 'A6000': (154.8, 77.4),
}


def peak_flops(run):
    """Peak FLOP/s of one process's device in run.dtype, or None where it is not known.

    A GPU's is from the table above; a CPU's, and MPS's, is what one large matrix product reaches here, in half a
    second: a virtual machine may compute half as fast for longer than a few of them take.
    """
    if run.device.type == 'cuda':
        name = torch.cuda.get_device_name(run.device)
        for key, (half, single) in GPU_PEAK_TFLOPS.items():
            if re.search(rf'\b{key}\b(?! (Ti|SUPER|D|Laptop|NVL)\b)', name):
                return 1e12 * (single if run.dtype == torch.float32 else half)
        return None
    return product_flops(1536, run.dtype, run.device, run.sync, seconds=0.5)
