import json
import os
import shutil
import stat
import subprocess
from dataclasses import asdict, fields
from pathlib import Path

import pandas as pd
import pytest
from conftest import REPO

import runlog
from command import UsageError
from experiments import Config, resolve


def row(run_id='a', **values):
    return dict(run_id=run_id, status='ok', dataset='imagewoof', mixup=0., accuracy=0.5) | values


def test_a_row_has_every_field_of_config_and_is_typed(tmp_path):
    assert {f.name for f in fields(Config)} < set(runlog.COLUMNS)
    runlog.append(row(lr=3e-3, n_val=500, seed=1, meta='007'), tmp_path)
    runlog.append(row('b', status='diverged', accuracy=None), tmp_path)
    df = runlog.load(tmp_path / 'runs.csv')
    assert df.lr[0] == 3e-3 and df.n_val[0] == 500 and df.meta.tolist() == ['007', ''] and df.seed[0] == 1
    assert df.accuracy[0] == 0.5 and df.accuracy.isna()[1] and df.n_val.isna()[1]


def test_no_file_is_an_empty_frame(tmp_path):
    df = runlog.load(tmp_path / 'runs.csv')
    assert df.empty and list(df) == list(runlog.COLUMNS)


def test_unknown_columns_and_statuses_are_refused(tmp_path):
    with pytest.raises(ValueError, match='no such columns'): runlog.append(row(accuracy_pct=50), tmp_path)
    with pytest.raises(ValueError, match='no such status'): runlog.append(row(status='fine'), tmp_path)
    assert not (tmp_path / 'runs.csv').exists()


def test_a_file_with_other_columns_is_left_alone(tmp_path, capsys):
    (tmp_path / 'runs.csv').write_text('run_id,acc\nold,0.1\n')
    assert runlog.append(row(), tmp_path) == tmp_path / 'runs-2.csv'
    assert 'other columns' in capsys.readouterr().err
    assert runlog.append(row('b'), tmp_path) == tmp_path / 'runs-2.csv'
    assert (tmp_path / 'runs.csv').read_text() == 'run_id,acc\nold,0.1\n'
    assert runlog.load(tmp_path / 'runs-2.csv').run_id.tolist() == ['a', 'b']


def test_rows_that_wait_in_another_file_are_said_until_they_are_merged(tmp_path, capsys):
    runlog.append(row('a'), tmp_path / 'else')
    shutil.copy(tmp_path / 'else' / 'runs.csv', tmp_path / 'runs-2.csv')
    runlog.append(row('b'), tmp_path)
    for _ in range(2): assert runlog.load(tmp_path / 'runs.csv').run_id.tolist() == ['b']
    err = capsys.readouterr().err
    said, _, line = err.partition(': python runlog.py ')
    assert said == f'{tmp_path / "runs-2.csv"}: has rows that runs.csv has not (1)' and err.count('\n') == 1
    assert not runlog.main(line.split())
    capsys.readouterr()
    assert len(runlog.load(tmp_path / 'runs.csv')) == 2 and not capsys.readouterr().err


def test_a_later_end_of_a_run_that_waits_in_another_file_is_said(tmp_path, capsys):
    for folder, end in ((tmp_path / 'else', dict(status='ok', resumed=1)), (tmp_path, dict(status='interrupted'))):
        runlog.append(row('a', **end), folder)
    shutil.copy(tmp_path / 'else' / 'runs.csv', tmp_path / 'runs-2.csv')
    runlog.load(tmp_path / 'runs.csv')
    assert 'has rows that runs.csv has not (1)' in capsys.readouterr().err


def test_runs_of_a_config_have_all_its_settings(tmp_path):
    cfg = resolve(Config(dataset='digits', precision='fp32'))
    for run_id, changes in dict(same={}, other=dict(lr=0.1), blank=dict(epochs='')).items():
        runlog.append(row(run_id) | asdict(cfg) | changes, tmp_path)
    assert runlog.of_config(runlog.load(tmp_path / 'runs.csv'), cfg).run_id.tolist() == ['same']


def test_merge_adds_each_row_once(tmp_path):
    here, there = tmp_path / 'here', tmp_path / 'there'
    runlog.append(row('a'), here)
    for run_id, accuracy in dict(a=0.5, b=0.7, c=0.7).items(): runlog.append(row(run_id, accuracy=accuracy), there)
    runlog.write_curve('b', [dict(epoch=1, accuracy=0.7)], there)
    runlog.write_predictions('b', there, logits=[[0.]])
    for n_new in (2, 0): assert runlog.merge(there / 'runs.csv', here) == (here / 'runs.csv', n_new)
    df = runlog.load(here / 'runs.csv')
    assert df.run_id.tolist() == ['a', 'b', 'c'] and df.accuracy.tolist() == [0.5, 0.7, 0.7]
    for name in ('curves/b.csv', 'predictions/b.npz'): assert (here / name).read_bytes() == (there / name).read_bytes()


def test_merge_takes_the_curve_of_a_later_end_and_none_of_a_run_it_refuses(tmp_path):
    here, there = tmp_path / 'here', tmp_path / 'there'
    curve = [dict(epoch=i, accuracy=i / 10) for i in (1, 2, 3)]
    runlog.append(row(status='interrupted', resumed=0), there)
    runlog.write_curve('a', curve[:1], there)
    runlog.merge(there / 'runs.csv', here)
    runlog.append(row(status='ok', resumed=1), there)  # it went on there
    runlog.write_curve('a', curve, there)
    for folder, accuracy in ((here, 0.6), (there, 0.7)):
        runlog.append(row('b', accuracy=accuracy), folder)
        runlog.write_curve('b', curve[:2 if folder == here else 3], folder)
    with pytest.raises(UsageError, match='another row of run b'): runlog.merge(there / 'runs.csv', here)
    assert (here / 'curves' / 'a.csv').read_bytes() == (there / 'curves' / 'a.csv').read_bytes()
    assert (here / 'curves' / 'b.csv').read_bytes() != (there / 'curves' / 'b.csv').read_bytes()
    assert sorted(runlog.load(here / 'runs.csv').status) == ['ok', 'ok']


def test_a_file_older_than_a_setting_is_read_at_its_default_and_widened(tmp_path):
    (tmp_path / 'runs.csv').write_text('run_id,status,accuracy,lr\nz,ok,0.25,0.008\n')
    old = runlog.load(tmp_path / 'runs.csv').iloc[0]
    assert (old.bs, old.lr, old.act, old.accuracy) == (64, 0.008, 'relu', 0.25)
    assert runlog.append(row(), tmp_path) == tmp_path / 'runs.csv'
    df = runlog.load(tmp_path / 'runs.csv')
    assert df.run_id.tolist() == ['z', 'a'] and df.bs[0] == 64 and df.lr[0] == 0.008 and df.n_val.isna().all()


@pytest.mark.parametrize('text', [
    None, 'name,acc\na,1\n', 'run_id,acc\na,1\n', 'run_id,accuracy\na,1\n', 'run_id,status\na,ok,1\n', 'run_id\n\xe9',
])
def test_merge_of_a_foreign_file_is_refused(text, tmp_path, capsys):
    if text: (tmp_path / 'foreign.csv').write_text(text, encoding='latin-1')
    assert runlog.main(['merge', str(tmp_path / 'foreign.csv'), '--results', str(tmp_path)]) == 2
    assert capsys.readouterr().err.count('\n') == 1 and not (tmp_path / 'runs.csv').exists()


def test_the_same_id_twice_is_one_row_and_another_row_of_that_id_is_refused(tmp_path):
    for _ in range(2): runlog.append(row(), tmp_path)
    with pytest.raises(UsageError, match='has another row of run a, which stays as it is'):
        runlog.append(row(accuracy=0.6), tmp_path)
    (tmp_path / 'twice.csv').write_text('run_id,status,accuracy\nb,ok,0.1\nb,ok,0.2\nc,ok,0.3\n')
    runlog.write_curve('c', [dict(epoch=1)], tmp_path / 'there')
    (tmp_path / 'twice.csv').rename(tmp_path / 'there' / 'twice.csv')
    with pytest.raises(UsageError, match='another row of run b'):
        runlog.merge(tmp_path / 'there' / 'twice.csv', tmp_path)
    assert runlog.load(tmp_path / 'runs.csv').accuracy.tolist() == [0.5, 0.1, 0.3]
    assert (tmp_path / 'curves' / 'c.csv').exists()  # of the rows that were added


def test_a_run_that_was_continued_keeps_the_rows_of_its_ends_and_counts_by_the_last(tmp_path):
    first_end, last_end = row('a', status='interrupted', resumed=0, accuracy=None), row('a', resumed=2, accuracy=0.8)
    for r in (first_end, row('b', resumed=0), last_end): runlog.append(r, tmp_path)
    with open(tmp_path / 'runs.csv') as f:
        assert [line.split(',')[:2] for line in f][1:] == [['a', 'interrupted'], ['b', 'ok'], ['a', 'ok']]
    df = runlog.load(tmp_path / 'runs.csv')
    assert df.run_id.tolist() == ['b', 'a'] and df.accuracy.tolist() == [0.5, 0.8] and df.resumed.tolist() == [0, 2]


@pytest.mark.parametrize('content', [b'run_id\n\xe9\n', b'run_id\n' + b'"' + b'x' * 200_000])
def test_a_results_folder_that_cannot_take_a_row_is_refused_before_the_run(content, tmp_path):
    runlog.check(tmp_path / 'new')
    assert sorted(p.name for p in (tmp_path / 'new').iterdir()) == ['.runs.lock']
    (tmp_path / 'runs.csv').write_bytes(content)
    with pytest.raises(UsageError, match='mend it by hand'): runlog.check(tmp_path)
    with pytest.raises(UsageError, match='no row can be written'): runlog.check(tmp_path / 'runs.csv')


def test_a_full_disk_keeps_the_file(tmp_path, monkeypatch):
    runlog.append(row(), tmp_path)
    before = (tmp_path / 'runs.csv').read_bytes()
    def full(fd): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space'): runlog.append(row('b'), tmp_path)
    assert (tmp_path / 'runs.csv').read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.runs.lock', 'runs.csv']


def test_what_a_kill_left_behind_goes_with_the_next_row(tmp_path):
    (tmp_path / '.runs.csv.part').write_text('run_id,sta')
    runlog.append(row(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.runs.lock', 'runs.csv']
    assert len(runlog.load(tmp_path / 'runs.csv')) == 1


def test_the_file_and_then_its_folder_reach_the_disk(tmp_path, monkeypatch):
    synced = []  # (whether it is a folder, whether runs.csv is in its place)
    def fsync(fd): synced.append((stat.S_ISDIR(os.fstat(fd).st_mode), (tmp_path / 'runs.csv').exists()))
    monkeypatch.setattr(os, 'fsync', fsync)
    runlog.append(row(), tmp_path)
    assert synced == [(False, False), (True, True)]


def test_run_ids_are_unique_and_sort_by_time(tmp_path):
    ids = [runlog.new_run(tmp_path)[0] for _ in range(100)]
    assert len(set(ids)) == 100 and runlog.new_run(tmp_path)[1].endswith('Z')
    assert [i[:16] for i in ids] == sorted(i[:16] for i in ids)


def test_an_id_is_given_once(tmp_path, monkeypatch):
    tokens = iter('aabb')
    monkeypatch.setattr(runlog.secrets, 'token_hex', lambda n: next(tokens))
    ids = [runlog.new_run(tmp_path)[0][-1] for _ in range(2)]
    assert ids == ['a', 'b'] and len(list((tmp_path / 'curves').iterdir())) == 2


@pytest.mark.parametrize('name', ['accuracy', 'top5_accuracy', 'max_accuracy'])
def test_an_accuracy_in_percent_is_refused(name, tmp_path):
    runlog.append(row(**{name: 1.}), tmp_path)
    assert runlog.load(tmp_path / 'runs.csv')[name].tolist() == [1.]
    for wrong in ('53.1', '-0.1', '1.0001'):
        (tmp_path / 'other.csv').write_text(f'run_id,status,{name}\nb,ok,{wrong}\n')
        with pytest.raises(UsageError, match=f"line 2: {name} '{wrong}' is not a fraction from 0 to 1"):
            runlog.load(tmp_path / 'other.csv')
        with pytest.raises(UsageError, match='not a fraction'): runlog.merge(tmp_path / 'other.csv', tmp_path)
    assert len(runlog.load(tmp_path / 'runs.csv')) == 1


def test_the_committed_record_loads():
    df = runlog.load()
    assert df.run_id.is_unique and set(df.status) <= set(runlog.STATUSES)
    assert df.accuracy[df.status != 'ok'].isna().all() and df.accuracy[df.status == 'ok'].between(0, 1).all()
    for run_id in df.run_id[df.epochs_done > 0]: assert (runlog.RESULTS / 'curves' / f'{run_id}.csv').exists()


def test_all_runs_whose_backward_pass_was_recorded_under_autocast_are_known_as_such():
    runs = runlog.load()
    recorded = runs[(runs.cuda_graphs == 1) & (runs.started < '2026-11-26T17:22')]  # when that was mended
    assert len(recorded) >= 84 and set(runlog.faults(recorded)) == {'gradient fault'}
    assert set(runlog.faults(runs.drop(recorded.index))) == {''}


def test_what_is_committed_names_no_folder_of_a_machine():
    "A row has the path of the user's images and layer: in a record that others get, it is one they can have."
    for file in (runlog.RESULTS / 'runs.csv', REPO / 'notebooks' / 'trial' / 'runs.csv'):
        paths = pd.read_csv(file, dtype=str, keep_default_na=False)[['data', 'attention_file']].to_numpy().flatten()
        assert not any(Path(path).is_absolute() for path in paths), file
    (plan,) = (REPO / 'notebooks' / 'trial' / 'trials').glob('*.json')
    for cfg in json.loads(plan.read_text(encoding='utf-8'))['arms'].values():
        assert not any(Path(cfg[name]).is_absolute() for name in ('data', 'attention_file'))


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    "A git checkout of one Python file and one text."
    for name in ('GIT_DIR', 'GIT_WORK_TREE', 'GIT_INDEX_FILE'): monkeypatch.delenv(name, raising=False)
    repo = tmp_path / 'checkout'
    repo.mkdir()
    (repo / 'code.py').write_text('x = 1\n')
    (repo / 'notes.md').write_text('one\n')
    for args in ('init -q', 'add .', '-c user.name=n -c user.email=e@example.com commit -qm first'):
        subprocess.run(['git', '-C', str(repo), *args.split()], check=True)
    return repo


def source_commit(repo):
    return subprocess.check_output('git rev-parse HEAD; git ls-tree -r HEAD', shell=True, cwd=repo, text=True)


def test_a_copy_without_git_knows_its_commit_and_whether_it_is_changed(checkout, tmp_path):
    number = source_commit(checkout).split()[0]
    assert runlog.commit(checkout) == dict(git_commit=number, git_dirty=0)
    copy = tmp_path / 'copy'
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns('.git'))
    assert runlog.commit(copy) == dict(git_commit='', git_dirty=None)
    (copy / 'SOURCE_COMMIT').write_text(source_commit(checkout))
    assert runlog.commit(copy) == dict(git_commit=number, git_dirty=0)
    (copy / 'notes.md').write_text('two\n')
    assert runlog.commit(copy)['git_dirty'] == 0, 'only Python files count'
    (copy / 'code.py').write_text('x = 2\n')
    assert runlog.commit(copy) == dict(git_commit=number, git_dirty=1)
    (copy / 'code.py').unlink()
    assert runlog.commit(copy)['git_dirty'] == 1


@pytest.mark.parametrize('text', ['', 'a,b\n1,2\n', 'epoch,accuracy\n1,x\n'])
def test_a_damaged_curve_is_an_empty_one_and_a_line(text, tmp_path, capsys):
    runlog.write_curve('r', [dict(epoch=1, accuracy=0.5)], tmp_path)
    assert runlog.read_curve('r', tmp_path).accuracy.tolist() == [0.5]
    runlog.curve_file('r', tmp_path).write_text(text)
    empty, absent = runlog.read_curve('r', tmp_path), runlog.read_curve('s', tmp_path)
    assert list(empty) == list(absent) == list(runlog.CURVE) and len(empty) == len(absent) == 0
    assert capsys.readouterr().err.count('r.csv: cannot be read as a curve') == 1


def test_rows_without_their_curves_are_said(tmp_path, capsys):
    row = dict(run_id='r', status='ok', started='t', seed=0)
    runlog.append(row, tmp_path / 'one')
    runlog.merge(tmp_path / 'one' / 'runs.csv', tmp_path / 'two')
    assert 'there are no curves and predictions of 1 runs beside it' in capsys.readouterr().out
    runlog.write_curve('r', [dict(epoch=1)], tmp_path / 'one')
    runlog.merge(tmp_path / 'one' / 'runs.csv', tmp_path / 'two')
    assert not capsys.readouterr().out and runlog.curve_file('r', tmp_path / 'two').exists()


def test_a_copy_inside_another_repository_has_not_its_commit(checkout):
    inside = checkout / 'vendor' / 'copy'
    inside.mkdir(parents=True)
    (inside / 'code.py').write_text('x = 1\n')
    assert runlog.commit(inside) == dict(git_commit='', git_dirty=None)


def test_of_git_and_the_file_git_counts(checkout):
    (checkout / 'SOURCE_COMMIT').write_text('0' * 40 + '\n')
    assert runlog.commit(checkout) == dict(git_commit=source_commit(checkout).split()[0], git_dirty=0)


@pytest.mark.parametrize('text, number', [('', ''), ('a' * 40 + '\n', 'a' * 40)])
def test_a_commit_without_its_files_does_not_tell_whether_the_copy_is_changed(text, number, tmp_path):
    (tmp_path / 'SOURCE_COMMIT').write_text(text)
    assert runlog.commit(tmp_path) == dict(git_commit=number, git_dirty=None)
