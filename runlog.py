"""Keeps the record: one row per run in runs.csv, with a curve and the validation predictions beside it.

    python runlog.py merge OTHER.csv [--results DIR]     adds the rows of another machine, each once

Only this module writes runs.csv, the curves and the predictions. It replaces each file as a whole by one that has
reached the disk, and runs.csv under a lock: a reader always finds a complete file, even after a writer that was
interrupted. A row is written once and stays as it is. A run that was interrupted and continued has a row for each of
its ends, and the last one counts.
"""
import csv
import errno
import hashlib
import math
import os
import platform
import secrets
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock, SoftFileLock

from command import Parser, UsageError, exit_code, say, say_once, shown
from experiments import SETTINGS, Config, as_written_now, setting

RESULTS = Path(__file__).parent / 'results'
STATUSES = ('ok', 'diverged', 'interrupted', 'failed')
DONE = 'ok', 'diverged'  # A run that ended so needs no repetition.
CONFIG = {f.name: f.type for f in fields(Config)}
MEASURED = {  # what a run finds out; results/README.md says what each column means
    'n_train': int, 'n_val': int, 'n_skipped': int, 'accuracy': float, 'top5_accuracy': float, 'valid_loss': float,
    'train_loss': float, 'max_accuracy': float, 'max_accuracy_epoch': int, 'epochs_done': int, 'fit_seconds': float,
    'median_epoch_seconds': float, 'images_per_second': float, 'peak_memory_mb': float, 'n_parameters': int,
    'attention_parameters': int, 'attention_multiply_adds': int, 'resumed': int,
}
FRACTIONS = 'accuracy', 'top5_accuracy', 'max_accuracy'
PROVENANCE = {
    'device': str, 'python': str, 'torch': str, 'torchvision': str, 'fastai': str,
    'git_commit': str, 'git_dirty': int, 'data_fingerprint': str,
}
COLUMNS = {'run_id': str, 'status': str, 'started': str} | CONFIG | MEASURED | PROVENANCE
CURVE = ('epoch', 'train_loss', 'valid_loss', 'accuracy', 'top5_accuracy', 'seconds', 'branch_ratio')
# a fault of runs in results/, and the values of their columns: no comparison pools them with others
FAULTS = [('gradient fault', dict(git_commit='d50451d60e11e35fd60102cc644bba1e4144bcaf', cuda_graphs=1))]


def new_run(results=RESULTS):
    """Returns (run id, start time in UTC, ISO 8601) of a run that starts now; ids sort by time.

    It writes the curve of the run, still without an epoch. Only one process can create that file, so the id is unique.
    """
    while True:
        now = datetime.now(UTC)
        run_id = f'{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}'
        file = curve_file(run_id, results)
        file.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError), open(file, 'x', newline='', encoding='utf-8') as f:
            f.write(','.join(CURVE) + '\n')
            return run_id, timestamp(now)


def timestamp(time=None):
    "Returns a time (by default now) in UTC as ISO 8601."
    return (time or datetime.now(UTC)).isoformat(timespec='seconds').replace('+00:00', 'Z')


def provenance():
    "Returns the columns of PROVENANCE but those of the data and the device."
    versions = {package: version(package) for package in ('torch', 'torchvision', 'fastai')}
    return dict(python=platform.python_version(), **versions) | commit(Path(__file__).parent)


def commit(repo):
    """Returns the columns git_commit and git_dirty of the code in `repo`.

    They come from git, or in a copy without .git from its file SOURCE_COMMIT. The file holds the commit and the output
    of `git ls-tree -r` for it, so the copy is compared with the commit as git would do.
    """
    def git(*args):
        command = ['git', '-C', str(repo), *args]
        try: return subprocess.run(command, capture_output=True, check=True).stdout.decode(errors='replace').strip()
        except (OSError, subprocess.CalledProcessError): return ''
    file = repo / 'SOURCE_COMMIT'
    if file.exists() and not (repo / '.git').exists():
        number, *tree = file.read_text(encoding='utf-8').splitlines() or ['']
        code = [line for line in tree if line.endswith('.py')]
        dirty = int(any(_changed(repo, line) for line in code)) if code else None
        return dict(git_commit=number, git_dirty=dirty)
    if os.path.realpath(git('rev-parse', '--show-toplevel') or os.devnull) != os.path.realpath(repo):
        return dict(git_commit='', git_dirty=None)  # no repository, or another one around a copy of the code
    number = git('rev-parse', 'HEAD')
    changes = git('status', '--porcelain', '--untracked-files=no', '--', '*.py')
    return dict(git_commit=number, git_dirty=int(bool(changes)) if number else None)


def _changed(repo, line):
    "Returns whether a file differs from its line of `git ls-tree -r`: mode, kind and hash, a tab, path."
    description, path = line.split('\t')
    try: content = (repo / path).read_bytes()
    except OSError: return True
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest() != description.split()[2]


# --- writing ---

NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}  # what some NFS and cloud mounts answer


def take_lock(file, timeout):
    """Returns the lock of a file, taken; raises filelock.Timeout if another process holds it for `timeout` seconds.

    Where the file system has no locks, a file `.held` beside it stands for one, and a line says what that means.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # some versions of filelock fall back by themselves, and warn
        lock = FileLock(file, timeout=timeout)
        try: lock.acquire()
        except OSError as e:
            if e.errno not in NO_LOCKS: raise
            say_once(f'{Path(file).parent}: its file system has no locks; files *.held stand for them, '
                     'and after a kill -9 those that are left must be removed', sys.stderr)
            lock = SoftFileLock(f'{file}.held', timeout=timeout)
            lock.acquire()
    return lock


@contextmanager
def locked(file, timeout=60):
    "Holds the lock of a file for the block."
    lock = take_lock(file, timeout)
    try: yield
    finally: lock.release()


@contextmanager
def replacing(path, mode='w'):
    "Opens a file, of text or ('wb') of bytes, that replaces `path` as a whole when the block ends without an error."
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.name}.part')  # always the same: the next writer overwrites what kill -9 left
    options = {} if 'b' in mode else dict(newline='', encoding='utf-8')
    try:
        with open(part, mode, **options) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        _replace(part, path)
        with suppress(OSError): _sync_folder(path.parent)  # Some file systems cannot do that.
    finally:
        with suppress(OSError): part.unlink(missing_ok=True)


def _replace(part, path, patience=5):
    "Renames a file onto another; Windows refuses that for as long as somebody reads the other one."
    end = time.monotonic() + patience
    while True:
        try: return os.replace(part, path)
        except PermissionError as e:
            if not getattr(e, 'winerror', None) or time.monotonic() > end: raise
            time.sleep(0.05)


def _sync_folder(path):
    fd = os.open(path, os.O_RDONLY)
    try: os.fsync(fd)
    finally: os.close(fd)


def _write_rows(path, columns, rows):
    with replacing(path) as f:
        writer = csv.DictWriter(f, columns, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def _read_rows(path):
    """Returns the rows {column: text} of a runs file, or None if it has foreign columns; raises UsageError at damage.

    A file may be older than a knob of Config, and lack its column. Its runs then have the value that the knob has for
    runs before it.
    """
    def damage(what): return UsageError(f'{path}: {what}; mend it by hand, nothing of it was changed')
    with open(path, newline='', encoding='utf-8-sig') as f:
        reader = csv.reader(f)
        try:
            columns = next(reader, ['run_id'])
            if 'run_id' not in columns or not set(columns) <= COLUMNS.keys(): return None
            rows = []
            missing = {f.name: str(f.metadata['before']) for f in fields(Config) if f.name not in columns}
            for values in filter(None, reader):
                line = f'line {reader.line_num}'
                if values[0].startswith(('<<<<<<<', '=======', '>>>>>>>')): raise damage(f'{line}: a merge conflict')
                if len(values) != len(columns): raise damage(f'{line} has {len(values)} of {len(columns)} columns')
                rows.append(missing | dict(zip(columns, values)))
                wrong = _wrong_number(rows[-1])
                if wrong: raise damage(f'{line}: {wrong}')
        except UnicodeError as e: raise damage(f'not UTF-8 ({e})') from None
        except csv.Error as e: raise damage(f'line {reader.line_num}: {e}') from None
    if not _ends_its_line(path): raise damage('its last line has no end, it may be cut off')
    return rows


def _read_ours(path):
    "Returns the rows {column: text} of a runs file; raises UsageError if it cannot be read, is damaged or not of ours."
    try: rows = _read_rows(path)
    except OSError as e: raise UsageError(f'{path}: cannot be read ({e})') from None
    if rows is None: raise UsageError(f'{path}: not a runs file of this repository (foreign columns, or no run_id)')
    return rows


def _wrong_number(row):
    "Returns what is wrong with the first value of a row {column: text} that does not fit its column's type, or None."
    for name, text in row.items():
        kind = COLUMNS[name]
        if kind is str or not text: continue
        try: value = float(text)
        except ValueError: value = math.nan
        is_number = math.isfinite(value) and '_' not in text  # Only Python reads 1_0 as a number.
        if not is_number: return f'{name} {text!r} is not a number'
        if kind is int and not (value.is_integer() and abs(value) < 2**53): return f'{name} {text!r} is not an integer'
        if name in FRACTIONS and not 0 <= value <= 1: return f'{name} {text!r} is not a fraction from 0 to 1'
    return None


def _ends_its_line(path):
    "Returns whether the last byte of a file, if it has one, ends a line."
    with open(path, 'rb') as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(max(0, size - 1))
        return f.read() in (b'', b'\n')


def _writable(results):
    """Returns (the runs file to append to, its rows, what is wrong with each file before it).

    That is runs.csv; where it is damaged or has foreign columns, it stays as it is, and the first good runs-N.csv is
    taken.
    """
    wrong = []
    for name in ['runs.csv', *(f'runs-{n}.csv' for n in range(2, 1000))]:
        path = Path(results) / name
        try:
            rows = _read_rows(path) if path.exists() else []
            if rows is not None: return path, rows, wrong
            wrong.append(f'{path} has other columns')
        except UsageError as e: wrong.append(str(e))
    raise UsageError(f'{results}: there is no runs file with the columns of this version, and no name left for one')


def _key(row): return row['run_id'], str(row.get('resumed') or 0)


def _differ(a, b):
    "Returns whether two rows of one run and one end have different values in a column that both have."
    both = (a.keys() & b.keys()) - {'resumed'}
    return any(_text(a[name]) != _text(b[name]) for name in both)


def _text(value): return '' if value is None else str(value)


def _append(rows, results):
    """Adds those `rows` that are not there yet to the runs file.

    Returns (path, how many were added, ids of the runs whose rows differ from those that are there). Raises ValueError
    at a column or a status that does not exist.
    """
    for row in rows:
        foreign = row.keys() - COLUMNS.keys()
        if foreign: raise ValueError(f'no such columns: {sorted(map(str, foreign))}')
        if row.get('status') not in STATUSES: raise ValueError(f'no such status: {row.get("status")!r}')
    results = Path(results)
    results.mkdir(parents=True, exist_ok=True)
    with locked(results / '.runs.lock'):  # A process that hangs does not hold up this one for ever.
        path, old, wrong = _writable(results)
        known = {_key(row): row for row in old}
        new, clash = [], []
        for row in rows:
            there = known.setdefault(_key(row), row)
            if there is row: new.append(row)
            elif _differ(row, there): clash.append(row['run_id'])
        if new: _write_rows(path, COLUMNS, old + new)
    if wrong and new:
        say(f'{"; ".join(wrong)}: the row is in {path}; once that is mended, {merge_line(path)}', sys.stderr)
    return path, len(new), clash


def _refuse(path, clash):
    "Raises UsageError if there is a clash: ids of runs whose rows differ from those in the file."
    if clash: raise UsageError(f'{path}: has another row of run {", ".join(clash)}, which stays as it is')


def check(results=RESULTS):
    "Raises UsageError unless a row can be written to `results`; a run calls it before it trains."
    results = Path(results)
    try:
        results.mkdir(parents=True, exist_ok=True)
        with locked(results / '.runs.lock'):
            if (results / 'runs.csv').exists(): _read_rows(results / 'runs.csv')
            _writable(results)
            with replacing(results / '.probe') as f: f.write('a row fits')
            (results / '.probe').unlink()
    except OSError as e: raise UsageError(f'{results}: no row can be written there ({e})') from None


def append(row, results=RESULTS):
    "Adds the row {column: value} of one run to runs.csv, blank where it has no value; returns the path of the file."
    path, _, clash = _append([row], results)
    _refuse(path, clash)
    return path


def merge(other, results=RESULTS):
    """Adds the rows of another runs file, each once, with curves and predictions; returns (path, how many were new).

    A curve with more epochs, which is of a later end of the run, replaces the one that is here. Raises UsageError if
    the other file is damaged or foreign, or if its row of a run differs from the row here; all other rows are added
    then.
    """
    rows = _read_ours(other)
    try: path, new, clash = _append(rows, results)
    except ValueError as e: raise UsageError(f'{other}: {e}') from None
    alone = 0
    for run_id in dict.fromkeys(row['run_id'] for row in rows if row['run_id'] not in clash):
        files = files_of(run_id, Path(other).parent)
        write_files(files, results)
        alone += not files and not curve_file(run_id, results).exists()
    if alone: print(f'{other}: there are no curves and predictions of {alone} runs beside it')
    _refuse(path, clash)
    return path, new


def write_curve(run_id, rows, results=RESULTS):
    "Writes curves/<run_id>.csv, one row {column of CURVE: value} per epoch."
    _write_rows(curve_file(run_id, results), CURVE, rows)


def curve_file(run_id, results): return Path(results) / 'curves' / f'{run_id}.csv'


def read_curve(run_id, results=RESULTS):
    "Returns curves/<run_id>.csv as a frame with the columns CURVE; an empty one where there is none or it is damaged."
    import pandas as pd
    file = curve_file(run_id, results)
    try: return pd.read_csv(file).reindex(columns=list(CURVE)).astype(float).astype(dict(epoch=int))
    except FileNotFoundError: pass
    except (OSError, ValueError) as e:  # also what pandas raises of its own
        print(f'{file}: cannot be read as a curve ({e})', file=sys.stderr)
    return pd.DataFrame(columns=list(CURVE), dtype=float)


def write_predictions(run_id, results=RESULTS, **arrays):
    "Writes `arrays` to predictions/<run_id>.npz."
    import numpy as np
    with replacing(Path(results) / 'predictions' / f'{run_id}.npz', 'wb') as f: np.savez_compressed(f, **arrays)


def files_of(run_id, results):
    "Returns {name: bytes} of the curve and the predictions that a results folder has of a run."
    files = {name: Path(results) / name for name in (f'curves/{run_id}.csv', f'predictions/{run_id}.npz')}
    return {name: file.read_bytes() for name, file in files.items() if file.exists()}


def write_files(files, results=RESULTS):
    "Writes the `files_of` a run from elsewhere. A file that is here and not shorter stays: it is as late, or later."
    for name, content in files.items():
        here = Path(results) / name
        if here.exists() and here.stat().st_size >= len(content): continue
        with replacing(here, 'wb') as f: f.write(content)


# --- reading ---

def load(path=RESULTS / 'runs.csv'):
    "Returns runs.csv as a DataFrame with typed columns and the last row of each run; an empty one if there is no file."
    import pandas as pd
    rows = _read_ours(path) if os.path.exists(path) else []
    df = pd.DataFrame(rows, columns=list(COLUMNS), dtype=object)
    dtypes = {str: str, int: 'Int64', float: float}  # Int64 has blanks.
    for name, kind in COLUMNS.items():
        values = df[name].fillna('')
        df[name] = (values if kind is str else pd.to_numeric(values)).astype(dtypes[kind])
    df['resumed'], df['sa_at'] = df.resumed.fillna(0), list(map(as_written_now, df.attention, df.sa_at))
    say_what_waits(path, set(map(_key, rows)))
    if df.run_id.is_unique: return df
    return df.loc[sorted(df.groupby('run_id').resumed.idxmax())].reset_index(drop=True)


def say_what_waits(path, known):
    "Says which files beside runs.csv have rows that it has not (by `_key`), written while it was damaged."
    if not os.path.exists(path) or Path(path).name != 'runs.csv': return
    for other in sorted(Path(path).parent.glob('runs-*.csv')):
        try: rows = _read_rows(other) or []
        except (OSError, UsageError): continue
        n = sum(_key(row) not in known for row in rows)
        if n: say_once(f'{other}: has rows that runs.csv has not ({n}): {merge_line(other)}', sys.stderr)


def merge_line(other):
    "Returns the command that merges a runs file into the record of its folder."
    results = Path(other).parent
    where = '' if os.path.realpath(results) == os.path.realpath(RESULTS) else f' --results {shown(results)}'
    return f'python runlog.py merge {shown(other)}{where}'


def by_setting(runs, names=SETTINGS):
    "Returns {values of the columns `names`: the runs with them}."
    if runs.empty: return {}
    groups = runs.groupby(list(names), dropna=False, sort=False).indices
    return {key: runs.iloc[at] for key, at in groups.items()}


def faults(runs):
    "Returns for each run the fault in FAULTS that it has, '' where it has none."
    import pandas as pd
    found = pd.Series('', runs.index)
    for fault, columns in FAULTS:
        found[runs[list(columns)].eq(list(columns.values())).fillna(False).all(axis=1)] = fault
    return found


def of_config(runs, cfg):
    "Returns the runs without a fault whose settings are those of a settled `cfg`."
    alike = runs[SETTINGS].eq(list(setting(cfg))).fillna(False).all(axis=1)  # A blank is no value.
    return runs[alike & (faults(runs) == '')]


def recorded(runs, cfg, data_fingerprint):
    "Returns the runs of a settled `cfg` that are done, its seed included, on the data; None: on any data."
    runs = of_config(runs, cfg)
    runs = runs[(runs.seed == cfg.seed) & runs.status.isin(DONE)]
    return runs if data_fingerprint is None else runs[runs.data_fingerprint == data_fingerprint]


# --- the command ---

def parse(argv):
    "Returns the arguments of a command line; raises UsageError on a mistake."
    ap = Parser(description='Keeps the record of runs.', allow_abbrev=False)
    sub = ap.add_subparsers(dest='command', required=True)
    text = "adds the rows of another machine's runs.csv to this record, each once, with their curves and predictions"
    m = sub.add_parser('merge', help=text, description=text)
    m.add_argument('other', type=Path, help='a runs.csv, with curves/ and predictions/ beside it')
    m.add_argument('--results', type=Path, default=RESULTS, help='results directory')
    return ap.parse_args(argv)


def merge_command(argv):
    "Does what the command line asks for."
    args = parse(argv)
    try: print('{1} rows added to {0}'.format(*merge(args.other, args.results)))
    except OSError as e: raise UsageError(f'{args.results}: no row can be written there ({e})') from None


def main(argv=None): return exit_code('runlog.py', lambda: merge_command(argv))


if __name__ == '__main__': sys.exit(main())
