"""The record: one row per run in runs.csv, a curve and the validation predictions beside it.

    python runlog.py merge OTHER.csv [--results DIR]     add the rows of another machine, each once

Only this module writes into the results folder. runs.csv is replaced as a whole, under a lock, by a file that has
already reached the disk: readers and interrupted writers always leave a complete one.
"""
import csv
import os
import platform
import secrets
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

from experiments import Config, UsageError, fields

RESULTS = Path(__file__).parent / 'results'
STATUSES = ('ok', 'diverged', 'interrupted', 'failed')
CONFIG = {f.name: f.type for f in fields(Config)}
MEASURED = {  # what a run found out; results/README.md says what each column means
    'n_train': int, 'n_val': int, 'accuracy': float, 'top5_accuracy': float, 'valid_loss': float, 'train_loss': float,
    'max_accuracy': float, 'max_accuracy_epoch': int, 'epochs_done': int, 'fit_seconds': float, 'median_epoch_seconds': float,
    'images_per_second': float, 'peak_memory_mb': float, 'n_parameters': int,
}
PROVENANCE = {
    'device': str, 'python': str, 'torch': str, 'torchvision': str, 'fastai': str,
    'git_commit': str, 'git_dirty': int, 'data_fingerprint': str,
}
COLUMNS = {'run_id': str, 'status': str, 'started': str} | CONFIG | MEASURED | PROVENANCE
BEFORE = dict(loader='workers', fused=0, channels_last=1, compile=0, keep_memory=0)  # how runs went before there were these columns
CURVE = ('epoch', 'train_loss', 'valid_loss', 'accuracy', 'top5_accuracy', 'seconds')


def new_run():
    "(run id, start time in UTC, ISO 8601) of a run that starts now; ids sort by time."
    now = datetime.now(UTC)
    return f'{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}', now.isoformat(timespec='seconds').replace('+00:00', 'Z')


def provenance():
    "What the code and the machine were: the columns of PROVENANCE but for the data and the device."
    def git(*args):
        command = ['git', '-C', str(Path(__file__).parent), *args]
        try: return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError): return ''
    commit = git('rev-parse', 'HEAD')
    dirty = int(bool(git('status', '--porcelain', '--untracked-files=no', '--', '*.py'))) if commit else None
    versions = {package: version(package) for package in ('torch', 'torchvision', 'fastai')}
    return dict(python=platform.python_version(), **versions, git_commit=commit, git_dirty=dirty)


# --- writing ---

@contextmanager
def _replacing(path):
    "A text file that takes the place of `path` when the block ends well: `path` is always old or new, never half."
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.name}.part')  # one name, so that what a kill -9 leaves is overwritten; runs.csv has its lock
    try:
        with open(part, 'w', newline='', encoding='utf-8') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
        with suppress(OSError): _sync_folder(path.parent)  # not all file systems can
    finally: part.unlink(missing_ok=True)


def _sync_folder(path):
    fd = os.open(path, os.O_RDONLY)
    try: os.fsync(fd)
    finally: os.close(fd)


def _write_rows(path, columns, rows):
    with _replacing(path) as f:
        writer = csv.DictWriter(f, columns, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def _read_rows(path):
    """The rows {column: text} of a runs file; None if it has columns that are not ours.

    A setting that the file lacks, because it is older than the setting, is as in BEFORE or at its default: that is what ran.
    """
    with open(path, newline='', encoding='utf-8') as f:
        reader = csv.DictReader(f)
        columns = reader.fieldnames or ['run_id']
        if 'run_id' not in columns or not set(columns) <= COLUMNS.keys(): return None
        missing = {name: str(BEFORE.get(name, getattr(Config, name))) for name in CONFIG if name not in columns}
        return [missing | row for row in reader]


def _writable(results):
    "(runs file to append to, its rows): runs.csv, or where that has foreign columns, the first runs-N.csv that has ours."
    for name in ['runs.csv', *(f'runs-{n}.csv' for n in range(2, 1000))]:
        path = Path(results) / name
        rows = _read_rows(path) if path.exists() else []
        if rows is not None: return path, rows
    raise UsageError(f'{results}: no runs file with our columns, and no name left for one')


def _append(rows, results):
    "Add those `rows` whose id is not there yet; returns (path, how many were added)."
    for row in rows:
        if row.keys() - COLUMNS.keys(): raise ValueError(f'no such columns: {sorted(map(str, row.keys() - COLUMNS.keys()))}')
        if row.get('status') not in STATUSES: raise ValueError(f'no such status: {row.get("status")!r}')
    results = Path(results)
    results.mkdir(parents=True, exist_ok=True)
    with FileLock(results / '.runs.lock'):
        path, old = _writable(results)
        known = {row['run_id'] for row in old}
        new = {row['run_id']: row for row in reversed(rows) if row['run_id'] not in known}  # of one id twice the first
        if new: _write_rows(path, COLUMNS, old + list(reversed(new.values())))
    if path.name != 'runs.csv':
        print(f'{results / "runs.csv"} has other columns and was left alone: the row is in {path}', file=sys.stderr)
    return path, len(new)


def check(results=RESULTS):
    "Raise UsageError unless a row can be written to `results`: asked before a run, not after it."
    results = Path(results)
    try:
        results.mkdir(parents=True, exist_ok=True)
        with FileLock(results / '.runs.lock', timeout=60):
            _writable(results)
            with _replacing(results / '.probe') as f: f.write('a row fits')
            (results / '.probe').unlink()
    except (OSError, UnicodeError, csv.Error) as e: raise UsageError(f'{results}: no row can be written there ({e})') from None


def append(row, results=RESULTS):
    "Add the row {column: value} of one run (blank where it has no value) to runs.csv; returns the path written to."
    return _append([row], results)[0]


def merge(other, results=RESULTS):
    "Add the rows of another runs file, each id once, with their curves and predictions; returns (path, how many were new)."
    try: rows = _read_rows(other)
    except (OSError, UnicodeError, csv.Error) as e: raise UsageError(f'{other}: cannot be read ({e})') from None
    if rows is None: raise UsageError(f'{other}: not a runs file of this repository (foreign columns, or no run_id)')
    try: path, new = _append(rows, results)
    except ValueError as e: raise UsageError(f'{other}: {e}') from None
    for name in [name for row in rows for name in (f'curves/{row["run_id"]}.csv', f'predictions/{row["run_id"]}.npz')]:
        there, here = Path(other).parent / name, Path(results) / name
        if there.exists() and not here.exists():
            here.parent.mkdir(exist_ok=True)
            shutil.copyfile(there, here)
    return path, new


def write_curve(run_id, rows, results=RESULTS):
    "curves/<run_id>.csv: one row {column of CURVE: value} per epoch."
    _write_rows(Path(results) / 'curves' / f'{run_id}.csv', CURVE, rows)


def write_predictions(run_id, results=RESULTS, **arrays):
    "predictions/<run_id>.npz with `arrays`; kept out of git."
    import numpy as np
    path = Path(results) / 'predictions' / f'{run_id}.npz'
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)


# --- reading ---

def load(path=RESULTS / 'runs.csv'):
    "runs.csv as a DataFrame with typed columns; an empty one if there is no file."
    import pandas as pd
    rows = _read_rows(path) if Path(path).exists() else []
    if rows is None: raise UsageError(f'{path}: not a runs file of this repository (foreign columns, or no run_id)')
    df = pd.DataFrame(rows, columns=list(COLUMNS), dtype=object)
    for name, kind in COLUMNS.items():
        values = df[name].fillna('')
        df[name] = values.astype(str) if kind is str else pd.to_numeric(values).astype({int: 'Int64', float: float}[kind])
    return df


def main(argv=None):
    import argparse
    ap = argparse.ArgumentParser(description='Merge run files.', allow_abbrev=False)
    sub = ap.add_subparsers(dest='command', required=True)
    m = sub.add_parser('merge', help='add the rows of OTHER.csv to runs.csv, each once')
    m.add_argument('other', type=Path)
    m.add_argument('--results', type=Path, default=RESULTS, help='results directory')
    args = ap.parse_args(argv)
    try: print('{1} rows added to {0}'.format(*merge(args.other, args.results)))
    except (UsageError, OSError) as e:
        print(f'runlog.py: {e}', file=sys.stderr)
        return 2


if __name__ == '__main__': sys.exit(main())
