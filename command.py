"""What all commands share: mistakes in one line, exit codes, and the end by a signal. Imports nothing else of this repository."""
import argparse
import os
import signal
import sys
import threading
from contextlib import contextmanager
from difflib import get_close_matches
from functools import lru_cache


class UsageError(Exception):
    "A mistake of the user, in one line that says what to do."
    def __init__(self, message):
        message = message.rstrip().rsplit('UsageError: ')[-1]  # a loader process wraps it in its traceback
        super().__init__(''.join(c if c.isprintable() else repr(c)[1:-1] for c in message))

    def __str__(self): return self.args[0].rsplit(':\n\t')[-1]  # fastai puts the name of the callback before it


class Busy(UsageError):
    "Another process is already training the run."


class Stopped(KeyboardInterrupt):
    """The end by Ctrl-C or SIGTERM.

    `Stopped.by` is the number of the signal that came, 0 before one does. Every exception after a signal follows from it:
    the signal ends the loader processes too.
    """
    by = 0


def is_stop(e):
    "Returns whether an exception means Ctrl-C or SIGTERM, also where torch first reports that SIGTERM ended a loader process."
    return isinstance(e, KeyboardInterrupt) or Stopped.by > 0 or 'killed by signal: Terminated' in str(e)


def nearest(name, names):
    "Returns a hint at the name that was meant, ' (did you mean ...?)', or ''."
    close = get_close_matches(name, names, n=1, cutoff=0.4)
    return f' (did you mean {close[0]}?)' if close else ''


class Parser(argparse.ArgumentParser):
    "An ArgumentParser that raises UsageError on a mistake."
    def error(self, message): raise UsageError(message)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        for arg in args:  # Python 3.11 makes an empty list of --flag=--
            if arg.startswith('--') and arg.endswith('=--'): raise UsageError(f'{arg}: expected an argument')
        return super().parse_known_args(args, namespace)


def is_first_process():
    "Returns whether this is the first, or only, process of a run on this machine."
    return os.environ.get('LOCAL_RANK', '0') == '0'


@lru_cache
def say_once(line):
    "Prints a line, once in the life of the first process of a run on this machine."
    if is_first_process(): print(line, flush=True)


# --- signals ---

ENDING = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1') if hasattr(signal, name)]  # Windows has two


def heeded():
    "Returns those of ENDING that are not ignored, as SIGINT is in a script's background and SIGHUP under nohup: they stay so."
    return [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]


def stop_on_signals():
    "Lets Ctrl-C and SIGTERM end this process by Stopped; loader processes, which inherit the handler, just end."
    main, Stopped.by = os.getpid(), 0

    def stop(number, _):
        if os.getpid() != main: os._exit(0)
        Stopped.by = number
        signal.signal(signal.SIGCHLD, lambda *_: None)  # torch's would raise for the loader processes that the signal ends too,
        sys.unraisablehook = lambda *_: None            # and its half-made iterators complain when they are deleted
        raise Stopped

    for number in heeded(): signal.signal(number, stop)


@contextmanager
def restored():
    "Puts back the signal handlers and the hook that the block sets."
    hook, handlers = sys.unraisablehook, {number: signal.getsignal(number) for number in (*ENDING, signal.SIGCHLD)}
    try: yield
    finally:
        if not Stopped.by: del handlers[signal.SIGCHLD]  # no signal came: it is torch's, which is set once for good
        sys.unraisablehook = hook
        for number, handler in handlers.items(): signal.signal(number, handler)


@contextmanager
def undisturbed():
    "Lets Ctrl-C and SIGTERM wait for the end of the block: they stop what comes after it."
    if threading.current_thread() is not threading.main_thread(): return (yield)
    came = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in heeded()}
    try: yield
    except BaseException:  # it may hold a row: it goes on, and the signal is only noted
        if came: Stopped.by = came[0]
        raise
    finally:
        for number, handler in before.items(): signal.signal(number, handler)
    if came: signal.raise_signal(came[0])


# --- exit codes ---

def print_anything():
    "Lets no output fail by its encoding: what a terminal or a log has no letter for is printed as its number, \\u2192."
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'): stream.reconfigure(errors='backslashreplace')


def exit_code(program, work):
    """Returns the exit code of work(), a whole command; the signal handlers that it sets are put back.

    0: done; 1: a fault; 2: a mistake of the user; 130, 143, 141: Ctrl-C, SIGTERM, a closed pipe.
    A mistake and the death of a loader process are printed in one line; any other fault is raised with its traceback.
    """
    print_anything()
    with restored():
        try: return work()
        except UsageError as e:
            if is_first_process(): print(f'{program}: {e}', file=sys.stderr)
            return 2
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest there when it ends
            return 128 + signal.SIGPIPE
        except (KeyboardInterrupt, Exception) as e:
            if is_stop(e): return 128 + (Stopped.by or (signal.SIGINT if isinstance(e, KeyboardInterrupt) else signal.SIGTERM))
            if not str(e).startswith('DataLoader worker'): raise
            print(f'{program}: {str(e).strip()} (out of memory? fewer --workers need less)', file=sys.stderr)
            return 1
