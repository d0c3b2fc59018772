"""scripts/on_gpu.sh, with a stand-in for python that writes down what it is called with."""
import os
import shutil
import subprocess

import pytest
from conftest import REPO


@pytest.fixture
def on_gpu(tmp_path):
    """Returns a function that runs the script: (exit code, stdout, stderr, the calls of python but for the first).

    `codes` are the exit codes of the calls that begin so; `python` is what the stand-in does in each call.
    """
    def run(*argv, codes=(), python='', **variables):
        script, fake, log = tmp_path / 'scripts' / 'on_gpu.sh', tmp_path / '.venv' / 'bin' / 'python', tmp_path / 'log'
        for file in (script, fake): file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / 'scripts' / 'on_gpu.sh', script)
        cases = ''.join(f'"{start}"*) exit {code};; ' for start, code in dict(codes).items())
        fake.write_text(f'#!/bin/bash\necho "$*" >> {log}\n{python}\ncase "$*" in {cases} *) exit 0;; esac\n')
        fake.chmod(0o755)
        log.touch()
        env = {key: value for key, value in os.environ.items() if key not in ('PYTHON', 'JOBS')} | variables
        done = subprocess.run(['bash', str(script), *argv], env=env, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr, log.read_text().splitlines()[1:]
    return run


def test_the_first_steps_are_the_tests_some_accuracy_and_a_step(on_gpu):
    code, out, err, calls = on_gpu('there')
    assert code == 0 and not err
    assert calls[:3] == ['-m pytest -k cuda',
                         'scripts/reproduce.py woof-128-5 --arms none,simple --runs 2 --cuda-graphs --jobs 1'
                         ' --results there',
                         'scripts/benchmark.py step --results there/cuda']
    steps = [line for line in out.splitlines() if line.startswith(('== -m', '== scripts'))]
    assert len(steps) == len(calls) and all(line.endswith(('min on an H200)', '(not measured yet)')) for line in steps)
    first_minutes = [int(line.split('(about ')[1].split()[0]) for line in steps[:4]]
    assert sum(first_minutes) <= 10


def test_runs_side_by_side_where_asked_for(on_gpu):
    calls = [call for call in on_gpu(JOBS='3')[3] if 'reproduce.py' in call]
    assert calls and all(' --jobs 3 ' in call for call in calls)


def test_256_px_are_announced_as_without_a_verdict(on_gpu):
    _, out, _, _ = on_gpu()
    before, _, after = out.partition('no verdict')
    assert '--size 256' not in before and 'woof-256' not in before and after.count('--source 320') == 4


def test_a_benchmark_that_has_its_file_is_not_done_again(on_gpu, tmp_path):
    (tmp_path / 'there' / 'cuda' / 'benchmarks').mkdir(parents=True)
    (tmp_path / 'there' / 'cuda' / 'benchmarks' / 'step.csv').touch()
    calls = on_gpu('there')[3]
    assert 'scripts/benchmark.py loader --results there/cuda' in calls
    assert not any('benchmark.py step' in call for call in calls)


def test_what_fails_is_reported_and_the_rest_goes_on(on_gpu):
    code, _, err, calls = on_gpu(codes={'-m pytest': 1})
    assert code == 1 and 'failed with exit code 1: -m pytest -k cuda' in err and len(calls) > 10


@pytest.mark.parametrize('number', [129, 130, 138, 143])
def test_a_signal_ends_it(number, on_gpu):
    code, _, _, calls = on_gpu(codes={'scripts/reproduce.py woof-128-5': number})
    assert code == number and len(calls) == 2


def test_it_ends_when_the_minutes_are_over(on_gpu):
    "A step is stopped by SIGTERM, and none follows."
    waits = 'if [[ $1 == -m ]]; then sleep 300 & trap "kill %1; exit 143" TERM; wait; fi'
    code, _, err, calls = on_gpu('results', '1', python=waits, SECONDS='57')  # where bash starts to count
    assert code == 124 and calls == ['-m pytest -k cuda'] and '1 minutes are over; call it again' in err


@pytest.mark.parametrize('minutes', ['ten', '0', '1.5'])
def test_minutes_are_a_whole_number(minutes, on_gpu):
    code, out, err, calls = on_gpu('there', minutes)
    assert (code, out, calls) == (2, '', []) and err.startswith('usage: scripts/on_gpu.sh')


def test_without_a_gpu_it_says_so(on_gpu):
    code, _, err, calls = on_gpu(codes={'-c import torch': 1})
    assert (code, err, calls) == (2, 'on_gpu.sh: no CUDA device\n', [])
