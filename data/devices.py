"""
What a device can do: its peak FLOP/s and its memory, and what they make worthwhile.
"""
import ctypes
import functools
import importlib.util
import math
import os
import re
import shutil
import sysconfig
import time

import torch

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
