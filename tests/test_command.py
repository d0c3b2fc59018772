"""What all commands share: their exit codes, and what they leave of signals behind."""
import os
import signal
import sys

import pytest

import command
from command import Stopped, UsageError, exit_code, stop_on_signals

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD


def state(): return [signal.getsignal(number) for number in SIGNALS], sys.unraisablehook, Stopped.by


@pytest.fixture
def before():
    "The state of signals, put back by hand after the test, should the code under test not do so."
    handlers, hook, by = state()
    Stopped.by = 0
    yield handlers, hook, 0
    for number, handler in zip(SIGNALS, handlers): signal.signal(number, handler)
    sys.unraisablehook, Stopped.by = hook, by


def ended_by(number):
    def work():
        stop_on_signals()
        os.kill(os.getpid(), number)
    return work


def fails(error):
    def work():
        stop_on_signals()
        raise error
    return work


@pytest.mark.parametrize('work, code', [
    (lambda: stop_on_signals(), None), (fails(UsageError('no such thing')), 2),
    (ended_by(signal.SIGINT), 130), (fails(KeyboardInterrupt()), 130), (ended_by(signal.SIGTERM), 143),
    (ended_by(signal.SIGHUP), 129),
    (fails(RuntimeError('DataLoader worker (pid 7) is killed by signal: Terminated')), 143),
    (fails(RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed')), 1),
])
def test_a_command_puts_back_what_it_sets(work, code, before):
    assert exit_code('command', work) == code and state() == before


@pytest.mark.parametrize('rank, have_met, printed', [
    ('0', False, 'command: a mistake\n'), ('0', True, 'command: a mistake\n'), ('1', False, ''),
    ('1', True, 'command: process 5: a mistake\n'),
])
def test_a_mistake_is_printed_by_one_process_unless_each_has_its_own(rank, have_met, printed, monkeypatch, capsys):
    monkeypatch.setenv('LOCAL_RANK', rank)
    monkeypatch.setenv('RANK', '5')
    def work():
        UsageError.have_met = have_met
        raise UsageError('a mistake')
    assert exit_code('command', work) == 2 and capsys.readouterr().err == printed and not UsageError.have_met


def test_an_unknown_argument_has_a_hint_or_says_what_to_take():
    parser = command.Parser(refused={'--sa': 'take --attention'})
    parser.add_argument('--epochs')
    hint = r' \(did you mean --epochs\?\)'
    for argv, words in ((['--epcohs=3'], f'unknown argument --epcohs=3{hint}; see --help'),
                        (['--sa=1'], '--sa: take --attention'),
                        (['--hep'], f'unknown argument --hep({hint})?; see --help'),
                        (['epochs'], 'unknown argument epochs; see --help')):
        with pytest.raises(UsageError, match=f'^{words}$'): parser.parse_args(argv)


@pytest.mark.parametrize('argv', [['--data', ''], ['--data='], ['--runs', '2', '--data', '']])
def test_an_empty_value_is_not_taken_for_the_default(argv):
    parser = command.Parser()
    parser.add_argument('--data', default='')
    parser.add_argument('--runs')
    parser.add_argument('--meta', default='none')
    with pytest.raises(UsageError, match=r'^--data(=| ""): an empty value; is a variable of the shell not set\?$'):
        parser.parse_args(argv)
    assert parser.parse_args([]).data == '' and parser.parse_args(['--data', 'a=']).data == 'a='
    assert parser.parse_args(['--meta', '']).meta == ''


def test_a_command_that_fails_puts_back_what_it_sets(before):
    with pytest.raises(ValueError, match='broken'): exit_code('command', fails(ValueError('broken')))
    assert state() == before


def test_a_command_puts_back_how_its_output_is_encoded():
    before, seen = sys.stdout.errors, []
    exit_code('command', lambda: seen.append(sys.stdout.errors))
    assert seen == ['backslashreplace'] and sys.stdout.errors == before != seen[0]


def test_a_handler_that_is_set_once_in_a_process_stays(before):
    def as_torch_does(number, frame): pass
    exit_code('command', lambda: signal.signal(signal.SIGCHLD, as_torch_does))
    assert signal.getsignal(signal.SIGCHLD) is as_torch_does


def test_under_nohup_a_closed_terminal_ends_nothing(before):
    done = []

    def work():
        stop_on_signals()
        with command.undisturbed(): os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        done.append('all')
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert not exit_code('command', work) and done == ['all'] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_signal_in_an_undisturbed_block_stops_what_comes_after_it(before):
    done = []

    def work():
        stop_on_signals()
        with command.undisturbed():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append('block')
        done.append('after')
    assert exit_code('command', work) == 143 and done == ['block'] and state() == before


def test_a_mistake_is_printed_once_and_on_one_line(capsys, monkeypatch):
    for rank in ('0', '1'):
        monkeypatch.setenv('LOCAL_RANK', rank)
        assert exit_code('command', fails(UsageError('a\nb'))) == 2
    assert capsys.readouterr().err == 'command: a\\nb\n'
