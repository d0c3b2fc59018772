"""What the commands share: mistakes told in one line, exit codes, the end by a signal."""
import argparse
import os
import signal
import sys

from experiments import Stopped, UsageError, is_stop


class Parser(argparse.ArgumentParser):
    "Tells a mistake in one line."
    def error(self, message): raise UsageError(message)

    def parse_known_args(self, args=None, namespace=None):
        for arg in (args := sys.argv[1:] if args is None else args):  # Python 3.11 makes an empty list of --flag=--
            if arg.startswith('--') and arg.endswith('=--'): raise UsageError(f'{arg}: expected an argument')
        return super().parse_known_args(args, namespace)


def stop_on_signals():
    "Let Ctrl-C and SIGTERM end this process by Stopped; loader workers, which inherit the handler, just end."
    main, Stopped.by = os.getpid(), 0
    def stop(number, _):
        if os.getpid() != main: os._exit(0)
        Stopped.by = number
        signal.signal(signal.SIGCHLD, lambda *_: None)  # torch's would raise for the workers that the signal ends too,
        sys.unraisablehook = lambda *_: None            # and its half-made iterators complain when they are deleted
        raise Stopped
    for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, stop)


def is_first():
    "Whether this is the first, or only, process of a run on this machine."
    return os.environ.get('LOCAL_RANK', '0') == '0'


def exit_code(program, work):
    """That of work(). 0: done; 1: a fault; 2: a mistake of the user; 130, 143, 141: Ctrl-C, SIGTERM, a closed pipe.

    A mistake is told in one line, and so is the death of a loader process; another fault by its traceback.
    """
    try: return work()
    except UsageError as e:
        if is_first(): print(f'{program}: {e}', file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest there when it ends
        return 128 + signal.SIGPIPE
    except (KeyboardInterrupt, Exception) as e:
        if is_stop(e): return 128 + (Stopped.by or (signal.SIGINT if isinstance(e, KeyboardInterrupt) else signal.SIGTERM))
        if not str(e).startswith('DataLoader worker'): raise
        print(f'{program}: {str(e).strip()} (out of memory? fewer --workers need less)', file=sys.stderr)
        return 1
