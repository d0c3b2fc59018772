"""The loop over the runs of an experiment, on a tree of a few images."""
import math
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import REPO, script
from statsmodels.stats.power import TTestIndPower

import runlog
from experiments import EXPERIMENTS
from report import compare, tables
from report.published import load_published

reproduce = script('reproduce')

TINY = ['--epochs', '1', '--bs', '6', '--workers', '0']


@pytest.fixture
def loop(tree, tmp_path, capfd):
    "Runs reproduce.py digits on the tree: (exit code, stdout, stderr)."
    def call(*argv):
        argv = ['digits', '--data', tree, *TINY, '--results', tmp_path / 'results', *argv]
        code = reproduce.main([*map(str, argv)])
        return (code or 0, *capfd.readouterr())
    return call


def rows(tmp_path): return runlog.load(tmp_path / 'results' / 'runs.csv')


@pytest.mark.slow(4)
def test_arms_take_turns_and_what_is_recorded_is_skipped(loop, tmp_path):
    code, out, err = loop('--runs', 2)
    assert code == 0, err
    df = rows(tmp_path)
    assert list(zip(df.attention, df.seed)) == [('none', 0), ('simple', 0), ('none', 1), ('simple', 1)]
    assert set(df.status) == {'ok'}
    assert '4/4  simple seed 1  0 min left' in out and out.rindex('none → simple') > out.rindex('4/4')
    assert '0 runs to do, 4 recorded' in loop('--runs', 2, '--dry-run')[1] and len(rows(tmp_path)) == 4
    assert loop('--runs', 3)[0] == 0 and rows(tmp_path).seed.tolist() == [0, 0, 1, 1, 2, 2]
    # another configuration: not recorded yet
    code, out, _ = loop('--runs', 2, '--arms', 'simple', '--seed0', 1, '--wd', 0.1)
    assert code == 0 and 'nothing to compare' in out
    assert rows(tmp_path).wd.tolist()[-2:] == [0.1, 0.1] and rows(tmp_path).seed.tolist()[-2:] == [1, 2]


@pytest.mark.full_width
@pytest.mark.slow(11)
def test_a_run_of_the_loop_is_the_run_of_a_fresh_process(loop, tree, tmp_path):
    assert loop('--runs', 2)[0] == 0
    argv = ['--dataset', 'digits', '--data', tree, *TINY, '--size', 32, '--arch', 'xresnet18', '--sa', '--seed', 1]
    command = [sys.executable, REPO / 'train_imagenette.py', *argv, '--results', tmp_path / 'fresh']
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    here, fresh = rows(tmp_path), runlog.load(tmp_path / 'fresh' / 'runs.csv').iloc[0]
    same = here[(here.attention == 'simple') & (here.seed == 1)].iloc[0]
    columns = ['valid_loss', 'accuracy', 'data_fingerprint']
    assert same[columns].equals(fresh[columns])


@pytest.mark.slow(2)
def test_a_failed_run_is_recorded_and_the_loop_goes_on(loop, tmp_path, monkeypatch):
    import training.run
    fit = training.run.fit

    def fails(learn, cfg):
        if cfg.attention == 'simple' and cfg.seed == 0: raise RuntimeError('broken')
        return fit(learn, cfg)
    monkeypatch.setattr(training.run, 'fit', fails)
    code, out, err = loop('--runs', 2)
    assert code == 1 and "simple seed 0 failed: RuntimeError('broken'); going on" in err and '1 runs failed' in err
    assert rows(tmp_path).status.tolist() == ['ok', 'failed', 'ok', 'ok']
    assert 'unfinished' in out.rpartition('4/4')[2]  # in the table, which may break the line before the word
    monkeypatch.setattr(training.run, 'fit', fit)
    # done again, and it alone
    assert loop('--runs', 2)[0] == 0 and rows(tmp_path).status.tolist() == ['ok', 'failed', 'ok', 'ok', 'ok']


@pytest.mark.slow(6)
def test_until_goes_on_in_pairs(loop, tmp_path, monkeypatch):
    def three_each(pairs, points): return points == 5 and list(map(len, pairs[0])) == [3, 3]
    monkeypatch.setattr(compare, 'narrow_enough', three_each)
    assert loop('--runs', 1, '--until', 5)[0] == 0
    df = rows(tmp_path)
    assert list(zip(df.attention, df.seed)) == [(a, s) for s in range(3) for a in ('none', 'simple')]
    monkeypatch.setattr(compare, 'narrow_enough', lambda pairs, points: list(map(len, pairs[0])) == [4, 4])
    # goes on where it was
    assert loop('--runs', 1, '--until', 5)[0] == 0 and rows(tmp_path).seed.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    code, _, err = loop('--runs', 1, '--until', 5, '--opt', 'sgd', '--lr', 1e30)  # every run diverges
    assert code == 2 and 'did not end ok; stopped' in err and rows(tmp_path).status.tolist()[8:] == ['diverged'] * 4


def test_until_ends_where_the_runs_have_no_spread(loop, monkeypatch):
    monkeypatch.setattr(compare, 'accuracies', lambda runs, metric='last': dict.fromkeys(range(10), 0.1))
    code, _, err = loop('--runs', 1, '--until', 5)
    assert code == 2 and '--until: in each arm all runs end alike; stopped' in err


@pytest.mark.parametrize('text, names', [
    ('simple@1,2,3,4,simple', ['simple@1,2,3,4', 'simple']), ('simple@1.0,1', ['simple@1.0,1']),
    ('simple@1,2,simple@1,2,3,4', ['simple@1,2', 'simple@1,2,3,4']),
])
def test_names_of_arms_may_have_commas(text, names):
    assert reproduce.arm_names(text, EXPERIMENTS['woof-64-5-r18-stages'].arms) == names


def test_fewer_arms_leave_holm_and_the_seeds_of_the_whole_experiment():
    "As the record has them: the rows of --arms are those of the report, to the last digit."
    runs, published = runlog.load(), load_published()
    for name, asked in (('woof-128-5', 'none,simple'), ('attention', 'sagan,simple'), ('attention', 'none,low_rank')):
        args, exp = reproduce.parse([name, '--plan', '--arms', asked])
        pair = tuple(asked.split(','))
        found = reproduce.so_far(args, exp)
        rows = [row for row in compare.gaps({name: EXPERIMENTS[name]}, runs, published)
                if (row['base'], row['arm']) == pair and compare.has_runs(row)]
        assert found and {(row['base'], row['arm']) for row in found} == {pair}
        assert tables.markdown(rows) == tables.markdown([row for row in found if compare.has_runs(row)])
    args, exp = reproduce.parse(['woof-64-5-r18-ranger', '--plan', '--arms', 'simple,none'])
    assert {(row['base'], row['arm'], row['tested']) for row in reproduce.so_far(args, exp)} == {
        ('simple', 'none', True)}


@pytest.fixture
def claimed(tree, tmp_path, monkeypatch):
    "Has the run of an arm of digits with seed 0, as another process would."
    import torch

    import training.run
    from training import checkpoint
    lock = checkpoint.lock
    monkeypatch.setattr(checkpoint, 'lock', lambda file, wait=0: lock(file, 0))

    def claim(arm):
        cfg = replace(EXPERIMENTS['digits'].arms[arm], data=str(tree), epochs=1, bs=6, workers=0)
        cfg = training.run.settle(cfg, torch.device('cpu'))
        return checkpoint.claim(cfg, training.run.get_dls(cfg).fingerprint, tmp_path / 'results')
    return claim


def test_until_takes_other_seeds_than_another_loop(loop, claimed, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, 'narrow_enough', lambda pairs, points: list(map(len, pairs[0])) == [1, 1])
    with claimed('none'), claimed('simple'): code, _, err = loop('--runs', 1, '--until', 5)
    assert code == 0 and err.count('this run: skipped') == 4 and rows(tmp_path).seed.tolist() == [1, 1]


def test_a_run_that_another_process_is_at_is_left_to_it(loop, claimed, tmp_path):
    with claimed('none'), claimed('simple'): code, out, _ = loop('--runs', 1)
    assert code == 0 and 'seed 0\n' in out and 'min left' not in out  # nothing to tell the time by
    with claimed('simple'): code, _, err = loop('--runs', 1)
    assert code == 0 and 'another process is already training this run: skipped' in err
    assert rows(tmp_path).attention.tolist() == ['none']
    assert loop('--runs', 1)[0] == 0 and rows(tmp_path).attention.tolist() == ['none', 'simple']
    assert not list((tmp_path / 'results' / 'checkpoints').iterdir())


@pytest.mark.slow(9)
def test_of_two_loops_each_run_is_trained_by_one(tree, spawn, tmp_path):
    argv = ['digits', '--data', tree, *TINY, '--epochs', 2, '--runs', 4, '--results', tmp_path / 'results']
    loops = [spawn(REPO / 'scripts' / 'reproduce.py', *argv) for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in loops]
    assert [process.returncode for process in loops] == [0, 0], errors
    df = rows(tmp_path)
    assert sorted(zip(df.seed, df.attention)) == [(s, a) for s in range(4) for a in ('none', 'simple')]
    assert set(df.status) == {'ok'}


def test_ctrl_c_leaves_what_is_done(tree, spawn, tmp_path):
    argv = ['digits', '--data', tree, *TINY, '--epochs', 300, '--runs', 5, '--results', tmp_path / 'results']
    process = spawn(REPO / 'scripts' / 'reproduce.py', *argv)
    while not process.stdout.readline().startswith('epoch 2'): assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert 'none → simple' in out and 'no runs' in out
    assert process.returncode == 130 and rows(tmp_path).status.tolist() == ['interrupted'] and 'Traceback' not in err


def test_list_and_plan(tmp_path, capsys):
    assert not reproduce.main(['--list', '--results', str(tmp_path)])
    out = capsys.readouterr().out
    words = ' '.join(out.split())
    for name, exp in EXPERIMENTS.items():
        assert f'\n{name} ' in '\n' + out
        hours = f'all runs: about {exp.hours:g} hours on one RTX 2080 Ti'
        assert exp.claim in words and exp.command in words and hours in words and exp.needs in words
    assert max(map(len, out.splitlines())) <= 100
    assert 'runs done / wanted: none 0/10, simple 0/10, sagan 0/6, simple_sym 0/6\n' in out
    assert all(part in out for part in ('61.9 → 67.6', '(10, 10)', '+5.7 [3.6, 7.8]')) and 'assumed recipe' in words
    assert 'record of the leaderboard, with the layer: 90.38 % (runs: 1), validated on another crop than here' in words
    assert '90.2 → 91.0' in out and '(?, 1) no baseline: other script' in words
    assert not reproduce.main(['digits', '--arms', 'none', '--plan', '--results', str(tmp_path)])
    assert not reproduce.main(['woof-128-100-r18', '--plan', '--results', str(tmp_path)])
    sd = ((0.00817**2 + 0.0074**2) / 2)**0.5
    n = math.ceil(TTestIndPower().solve_power((0.8634 - 0.8576) / sd, power=0.8, alpha=0.05))
    plan = f'published +0.6 needs {n} runs an arm; unpaired, at sd 0.8 (published), 80 % power; have 0 and 0'
    assert plan in capsys.readouterr().out


@pytest.mark.parametrize('argv, words', [
    ('board-nette-128-20 --dry-run', 'its recipe needs MaxBlurPool of kornia'),
    ('woof-128', 'did you mean woof-128-5?'), ('', 'name an experiment; --list shows them'),
    ('woof-128-5-stages --arms simple,simple@1,2', 'simple@1: no such arm; there are simple, simple@1,2,3,4'),
    ('digits --arms none,x', 'no such arm; there are none, simple'), ('digits --runs 0', 'at least 1'),
    ('digits --until 0', 'above 0'),
    ('digits --until nan', 'above 0'), ('digits --sa sagan', '--sa: the experiment has its layers'),
    ('woof-128-50-r18-lr --lr 0.003', 'two arms the same'), ('digits --arms none --until 1', 'needs two arms'),
    ('digits --seed 3', '--seed: take --seed0'), ('digits --epcohs 3', 'unknown argument --epcohs'),
    ('--source 320 woof-128', 'did you mean woof-128-5?'), ('--list --epcohs 3', 'unknown argument --epcohs'),
    ('digits --cpus-per-run 2', 'with --ray only'), ('digits --ray --cpus-per-run 0.5', 'whole cores'),
    ('digits --ray --cpus-per-run inf', 'whole cores'),
    ('digits --ray --gpu 0', '--gpu: '),
    ('digits --ray --gpus-per-run 2', 'from 0 to 1'), ('digits --seed0 2147483646 --runs 9', 'at most'),
    ('digits --runs 9999999999', '--seed 9999999998'), ('digits --size 31', 'at least 32'),
    ('digits --jobs 0', 'from 1 to 1024'), ('digits --jobs 2 --ray', 'one of them'),
    ('digits --data /no/such/folder', 'no such folder'), ('digits --gpu 99', '--gpu 99'),
])
def test_a_mistake_is_one_line_and_exit_code_2(argv, words, tmp_path, capfd):
    assert reproduce.main([*argv.split(), '--results', str(tmp_path)]) == 2
    out, err = capfd.readouterr()
    assert words in err and err.count('\n') == 1 and not out


def test_one_process_starts_the_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert reproduce.main(['digits', '--results', str(tmp_path)]) == 2
    assert 'one process starts the runs' in capsys.readouterr().err


@pytest.mark.slow(2)
def test_a_stopped_run_goes_on_by_itself_under_its_id(loop, tmp_path, monkeypatch):
    import training.measure
    before_batch = training.measure.Heed.before_batch

    def stop(self):
        if self.epoch == 1: raise KeyboardInterrupt
    monkeypatch.setattr(training.measure.Heed, 'before_batch', stop)
    argv = ['--runs', 1, '--epochs', 2, '--checkpoint-every', 1]
    assert loop(*argv)[0] == 130
    stopped = rows(tmp_path)
    monkeypatch.setattr(training.measure.Heed, 'before_batch', before_batch)
    code, out, _ = loop(*argv)
    assert code == 0 and f'{stopped.run_id[0]}: continues after epoch 1 of 2' in out
    df = rows(tmp_path)
    assert df.run_id[0] == stopped.run_id[0] and df.status.tolist() == ['ok', 'ok'] and df.resumed.tolist() == [1, 0]
