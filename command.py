"""Has what all commands share: mistakes in one line, the flags of a run, exit codes, and the end by a signal.

It imports nothing else of this repository.
"""
import argparse
import gc
import os
import re
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from pathlib import Path


class UsageError(Exception):
    """Reports a mistake of the user, in one line that says what to do.

    Of several processes that train together the first one prints it, as all make the same: unless they `have_met` to
    train, each on its share of the images.
    """
    have_met = False
    is_known_to_all = False  # whether all processes raise this one, so that the first one's line is enough

    def __init__(self, message):
        message = message.rstrip().rsplit('UsageError: ')[-1]  # A loader process wraps the message in its traceback.
        super().__init__(''.join(c if c.isprintable() else repr(c)[1:-1] for c in message))

    def __str__(self): return self.args[0].rsplit(':\n\t')[-1]  # fastai puts the callback's name before the message.


class Busy(UsageError):
    "Says that another process is already training the run, or has just finished it: the command may work later."


class Stopped(KeyboardInterrupt):
    """Ends a command after Ctrl-C, SIGTERM, or SIGHUP, which comes when a terminal is closed.

    `Stopped.by` is the number of the signal that came, or 0. Every exception after a signal follows from it, since the
    signal ends the loader processes too.
    """
    by = 0


def is_stop(e):
    "Returns whether an exception follows from a signal that ends the command."
    if isinstance(e, KeyboardInterrupt) or Stopped.by: return True
    return 'killed by signal: Terminated' in str(e)  # SIGTERM ended a loader process first, and torch says so.


def nearest(name, names):
    "Returns the hint ' (did you mean ...?)' at the one of `names` that is like `name`, or ''."
    close = get_close_matches(name, names, n=1, cutoff=0.4)
    return f' (did you mean {close[0]}?)' if close else ''


class Parser(argparse.ArgumentParser):
    """Parses a command line, with underscores in a flag as good as hyphens; raises UsageError on a mistake.

    `refused` are flags that a user may expect, and why they are not there.
    """
    def __init__(self, *args, refused=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.refused = refused or {}

    def error(self, message): raise UsageError(message)

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if not unknown: return parsed
        raise self.unknown(unknown[0])

    def unknown(self, word):
        "Returns the UsageError of a word of the command line that means nothing here, with a hint at a flag like it."
        flag = word.partition('=')[0]
        if flag in self.refused: return UsageError(f'{flag}: {self.refused[flag]}')
        flags = [name for name in self._option_string_actions if name not in ('-h', '--help')]
        hint = nearest(flag, flags) if flag.startswith('-') else ''
        return UsageError(f'unknown argument {word}{hint}; see --help')

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        paths = self.paths()
        for before, arg in pairwise(['', *args]):
            if arg.startswith('--') and arg.endswith('=--'):  # Python 3.11 would take it for an empty list.
                raise UsageError(f'{arg}: expected an argument')
            if (before in paths and not arg) or (arg.endswith('=') and arg[:-1] in paths):
                what = arg or f'{before} ""'
                raise UsageError(f'{what}: an empty value; is a variable of the shell not set?')
        return super().parse_known_args([self.hyphenated(arg) for arg in args], namespace)

    def paths(self):
        "Returns the flags of paths, which take no empty value: it would mean none, or the current folder."
        return [flag for flag, action in self._option_string_actions.items()
                if action.type is Path or action.dest == 'data']

    def hyphenated(self, arg):
        "Returns a word of the command line, with hyphens if that makes it a flag: --ann_start=0.7 is --ann-start=0.7."
        flag, equals, value = arg.partition('=')
        with_hyphens = flag.replace('_', '-')
        return with_hyphens + equals + value if with_hyphens in self._option_string_actions else arg


def add_run_flags(ap):
    "Adds the flags of the commands that train: where, and what is kept."
    ap.add_argument('--gpu', type=int, metavar='N', help='GPU, of CUDA or of a Mac (default: the first, or the CPU)')
    ap.add_argument('--results', type=Path, default=Path(__file__).parent / 'results', metavar='DIR',
                    help='results directory')
    ap.add_argument('--checkpoint-every', type=int, metavar='N',
                    help='epochs between checkpoints (default 1; none in runs under a minute)')
    ap.add_argument('--no-checkpoint', dest='checkpoint_every', action='store_const', const=0,
                    help='keep no checkpoints')


def check_run_flags(args):
    "Raises UsageError on values of the flags of `add_run_flags` that are not possible."
    if (args.checkpoint_every or 0) < 0:
        raise UsageError(f'--checkpoint-every {args.checkpoint_every}: must be at least 1 (0: none)')


def is_local_rank_0():
    "Returns whether this is the first process of a run on this machine, or the only one."
    return os.environ.get('LOCAL_RANK', '0') == '0'


def say(line, file=None):
    """Prints a line of a run, to stdout or `file`.

    Where it cannot be written, as on a disk that is full, the run goes on; a reader that has gone ends it, as ever.
    """
    try: print(line, file=file, flush=True)
    except BrokenPipeError: raise
    except OSError: pass


@cache
def say_once(line, file=None):
    "Prints a line, to stdout or `file`, once in the life of the first process of a run on this machine."
    if is_local_rank_0(): say(line, file)


# --- signals ---

ENDING = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGBREAK')
          if hasattr(signal, name)]  # Windows has the first two and the last, which comes when a console is closed.
ROW_SECONDS = 90  # After a signal, runs in other processes have so long to end with their rows; SLURM gives 120.
CHILD = getattr(signal, 'SIGCHLD', None)  # Windows has none
SIGPIPE = 13  # its number where there is one


def heeded():
    """Returns those of ENDING that are not ignored.

    SIGINT is ignored in a script's background, and SIGHUP under nohup: they stay so.
    """
    return [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]


def stop_on_signals():
    "Lets the signals ENDING raise Stopped in this process; loader processes inherit the handler, and just end."
    main, Stopped.by = os.getpid(), 0

    def stop(number, frame):
        if os.getpid() != main: os._exit(0)
        Stopped.by = number
        # The signal ends the loader processes too: torch's handler would raise for each of them, and its half-made
        # iterators complain when they are deleted.
        if CHILD: signal.signal(CHILD, lambda number, frame: None)
        sys.unraisablehook = lambda unraisable: None
        raise Stopped

    for number in heeded(): signal.signal(number, stop)


@contextmanager
def restored():
    "Puts back what a command changes in the block: signal handlers, the hook, `Stopped.by`, `UsageError.have_met`."
    hook = sys.unraisablehook
    handlers = {number: signal.getsignal(number) for number in (*ENDING, CHILD) if number}
    try: yield
    finally:
        if Stopped.by: gc.collect()  # While torch's iterators are deleted, the hook keeps them silent.
        else: handlers.pop(CHILD, None)  # The handler there may be torch's, which it sets once in a process.
        for number, handler in handlers.items():
            if signal.getsignal(number) != handler: signal.signal(number, handler)
        sys.unraisablehook, Stopped.by, UsageError.have_met = hook, 0, False


@contextmanager
def undisturbed():
    "Lets the signals ENDING wait for the end of the block: they stop what comes after it."
    if threading.current_thread() is not threading.main_thread(): return (yield)  # Signals go to the main thread only.
    came = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in heeded()}
    try: yield
    except BaseException:
        if came: Stopped.by = came[0]  # The exception may hold a row, so it goes on, and the signal is only noted.
        raise
    finally:
        for number, handler in before.items(): signal.signal(number, handler)
    if came: signal.raise_signal(came[0])


# --- exit codes ---

LATER = 75  # EX_TEMPFAIL of sysexits.h


def in_a_line(e):
    "Returns what an exception says, in a line without colours."
    text = ' '.join(re.sub(r'\x1b\[[0-9;]*m', '', str(e)).split())
    return text[:200] or type(e).__name__


GPU_IS_FULL = re.compile(r'(CUDA|HIP|MPS backend) out of memory.*|(CUDA|HIP) error: out of memory|'
                         r'CU(BLAS|DNN|SOLVER|SPARSE)_STATUS_\w*ALLOC\w*_FAILED')
SHARED_MEMORY_IS_FULL = re.compile(r'unable to (?!open)[^<>]*</torch_.*')  # in /dev/shm, of a loader process
NO_MEMORY = 'DefaultCPUAllocator: ', '[Errno 12]', 'Cannot allocate memory (12)'  # 12: errno.ENOMEM


def lack_of_memory(e):
    "Returns a line on an exception that a lack of memory raised, of a GPU or of the computer, and what to do; else ''."
    text = ' '.join(str(e).split())
    of_gpu, of_loader = GPU_IS_FULL.search(text), SHARED_MEMORY_IS_FULL.search(text)
    if of_gpu or type(e).__name__ == 'OutOfMemoryError':
        what = '. '.join((of_gpu[0] if of_gpu else text).split('. ')[:2])
        if 'out of memory' not in what: what = f'out of memory ({what})'
        return f'{what}; lower --bs or --size, take --loader workers, or end what else uses the GPU'
    if of_loader: return f'{of_loader[0]}; take fewer --workers, or more shared memory (docker run --shm-size 2g)'
    if isinstance(e, MemoryError) or any(words in text for words in NO_MEMORY):
        what = text.partition('DefaultCPUAllocator: ')[2] or text or 'no memory is left'
        return f'out of memory ({what.rstrip(".")}); lower --bs or --size, or take fewer --workers'
    if text.startswith('DataLoader worker'): return f'{text} (out of memory? fewer --workers need less)'
    return ''


def shown(path, folder=os.curdir):
    "Returns a path as it is shown, from a folder on; Windows has none from one drive to another."
    try: return os.path.relpath(path, folder)
    except ValueError: return str(path)


def weights_file(file):
    "Returns where --save writes the weights of a model: woof.safetensors for woof.pt, v1.0.safetensors for v1.0."
    name = file.stem if file.suffix in ('.pt', '.pth', '.bin') else file.name
    return file.with_name(f'{name}.safetensors')


@contextmanager
def printable():
    """Lets no output of the block fail by its encoding.

    What a terminal or a log has no letter for is printed as its number, \\u2192.
    """
    streams = [(stream, stream.errors) for stream in (sys.stdout, sys.stderr) if hasattr(stream, 'reconfigure')]
    for stream, _ in streams: stream.reconfigure(errors='backslashreplace')
    try: yield
    finally:
        for stream, errors in streams:
            try: stream.reconfigure(errors=errors)  # It writes what is left.
            except ValueError: pass  # It is closed.
            except OSError: leave(stream)


def leave(stream):
    "Has Python write the rest of a stream nowhere: at its end it would fail, as the disk is full or the reader gone."
    with suppress(OSError): os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def exit_code(program, work):
    """Returns the exit code of work(), a whole command; puts back what it sets of signal handlers and of streams.

    The code is 0 when all is done, 1 after a fault, 2 after a mistake of the user, and 75 (EX_TEMPFAIL) where another
    process is training the run. After a signal it is 130 (Ctrl-C), 143 (SIGTERM), 129 (SIGHUP) or 138 (SIGUSR1), and
    after a closed pipe 141. A mistake, the death of a loader process and a lack of memory are printed in one line. Any
    other fault is raised with its traceback.
    """
    with printable(), restored():
        try: return work()
        except UsageError as e:
            who = '' if is_local_rank_0() else f'process {os.environ.get("RANK", "?")}: '
            if not who or (UsageError.have_met and not e.is_known_to_all): say(f'{program}: {who}{e}', sys.stderr)
            return LATER if isinstance(e, Busy) else 2
        except BrokenPipeError:
            leave(sys.stdout)
            return 128 + SIGPIPE
        except (KeyboardInterrupt, Exception) as e:
            if is_stop(e):
                by_exception = signal.SIGINT if isinstance(e, KeyboardInterrupt) else signal.SIGTERM
                return 128 + (Stopped.by or by_exception)
            if not (what := lack_of_memory(e)): raise
            say(f'{program}: {what}', sys.stderr)
            return 1
