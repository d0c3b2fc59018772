"""Finds what this process may use of the computer, as systems and containers limit it, and keeps or frees memory.

A container sees all cores and all memory of the computer that it is on. What it has of them stands in the files of its
control group, of version 2 or 1, and in those of the groups above it.
"""
import ctypes
import math
import os
import sys
from contextlib import suppress
from pathlib import Path

import psutil

GROUPS, OWN = Path('/sys/fs/cgroup'), Path('/proc/self/cgroup')  # of Linux
NO_LIMIT = 2**60  # bytes: version 1 writes a number near 2**63 where there is no limit


def n_cores():
    "Returns the number of cores that this process may use, at least 1."
    return max(1, math.ceil(min(visible_cores(), core_limit())))


def n_threads():
    "Returns the number of threads that read files and decode images: a few more than cores, as some wait for a file."
    return min(32, n_cores() + 4)


def visible_cores():
    "Returns the number of cores that this process can run on, of which a container may have less time than there is."
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def core_limit(root=GROUPS, own=OWN):
    "Returns how many cores' time the control groups of this process give it; inf where they set no limit."
    limits = [math.inf]
    for folder in groups('cpu', root, own):
        quota, period = words(folder / 'cpu.max') or words(folder / 'cpu.cfs_quota_us', 'cpu.cfs_period_us') or (-1, 1)
        if quota > 0 and period > 0: limits.append(quota / period)
    return min(limits)


def memory_limit(root=GROUPS, own=OWN):
    "Returns the bytes of memory that the control groups of this process give it; inf where they set no limit."
    limits = [math.inf]
    for folder in groups('memory', root, own):
        limit, *_ = words(folder / 'memory.max') or words(folder / 'memory.limit_in_bytes') or (-1,)
        if 0 < limit < NO_LIMIT: limits.append(limit)
    return min(limits)


def memory_bytes():
    "Returns the bytes of memory that this process and its loader processes may use."
    return int(min(psutil.virtual_memory().total, memory_limit()))


def groups(controller, root=GROUPS, own=OWN):
    """Returns the folders of the control groups of this process for a controller, and of those above them.

    A line of `own` is number:controllers:path, the controllers blank in version 2. In a container the path is often
    that of the computer outside, and only the folder at the top is there.
    """
    try: lines = own.read_text(encoding='utf-8').splitlines()
    except OSError: return []
    found = []
    for line in lines:
        _, controllers, path = line.split(':', 2)
        if controllers and controller not in controllers.split(','): continue
        for top in {root / controllers, root / controller} if controllers else {root, root / 'unified'}:
            folder = top / path.strip('/')
            found += [folder, *(above for above in folder.parents if above.is_relative_to(top))]
    return [folder for folder in dict.fromkeys(found) if folder.is_dir()]


def words(file, *beside):
    "Returns the numbers in a small file, and in those `beside` it, -1 for `max`; None where they cannot be read."
    try:
        text = ' '.join(f.read_text(encoding='utf-8') for f in (file, *map(file.with_name, beside)))
        return [-1 if word == 'max' else int(word) for word in text.split()]
    except (OSError, ValueError): return None


# --- freed memory ---

def keep_memory(on=True):
    """Lets glibc keep freed memory for as long as the process lives, or give it back; without glibc nothing happens.

    By itself, glibc gives blocks above 32 MiB back to the system at once, and trims the rest. A training step takes
    the same blocks each time, and so gets them page by page again.
    """
    mallopt = of_libc('mallopt')
    if not mallopt: return
    m_trim_threshold, m_mmap_threshold, m_mmap_max = -1, -3, -4  # from malloc.h
    mallopt(m_mmap_max, 0 if on else 65_536)
    mallopt(m_trim_threshold, 2**31 - 1 if on else 2**26)
    if not on: mallopt(m_mmap_threshold, 2**25)  # glibc's own, which adapts, arrives there with blocks of this size.


def trim_memory():
    """Gives all freed memory that glibc keeps back to the system.

    A process that is forked without that holds a copy of it as soon as this one writes there again.
    """
    trim = of_libc('malloc_trim')
    if trim: trim(0)


def of_libc(name):
    "Returns a function of Linux's C library; None elsewhere, or where that library has none of this name."
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == 'linux' else None


# --- what this process has used ---

def reset_peak():
    "Lets `peak_bytes` start from here, where Linux lets a process do so."
    with suppress(OSError): Path('/proc/self/clear_refs').write_text('5', encoding='utf-8')


def peak_bytes():
    "Returns the most memory that was resident in this process, without its loader processes."
    with suppress(OSError, StopIteration):
        lines = Path('/proc/self/status').read_text(encoding='utf-8').splitlines()
        peak = next(line for line in lines if line.startswith('VmHWM'))  # VmHWM:   123456 kB
        return int(peak.split()[1]) * 2**10
    info = psutil.Process().memory_info()
    if hasattr(info, 'peak_wset'): return info.peak_wset  # Windows
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 2**10)
