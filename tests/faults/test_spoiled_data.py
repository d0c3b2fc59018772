"""What can happen to the images: spoiled files and folders, downloads that break off.

The command says so in one line, or trains on all of them.
"""
import errno
import hashlib
import http.server
import io
import multiprocessing as mp
import os
import shutil
import signal
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import fastdownload.core
import numpy as np
import pytest
from conftest import CLASSES, config, make_image

import runlog
from command import UsageError
from experiments import Config, resolve
from training import check, data
from training.data import get_dls

TINY = '--size', 32, '--bs', 6, '--arch', 'xresnet18', '--epochs', 1


def statuses(tmp_path): return runlog.load(tmp_path / 'results' / 'runs.csv').status.tolist()


# --- images ---

UNKNOWN = 'cannot identify image file'
UNREADABLE = ('half', 'image file is truncated'), (b'', UNKNOWN), (b'not an image', UNKNOWN)


@pytest.mark.parametrize('folder', ['train', 'val'])
@pytest.mark.parametrize('loader, content, words', [
    *((loader, *how) for loader in ('--workers 0', '--loader device') for how in UNREADABLE),
    ('--workers 1', *UNREADABLE[0]),
])
def test_an_unreadable_image_is_named_and_makes_no_result(loader, content, words, folder, tree, command, tmp_path):
    file = tree / folder / CLASSES[1] / f'{CLASSES[1]}_{folder}3.JPEG'
    file.write_bytes(file.read_bytes()[:-300] if content == 'half' else content)
    code, _, err = command('--data', tree, *TINY, *loader.split())
    named = f'1 of 36 images cannot be read: {file.relative_to(tree)} ({words}'
    assert code == 2 and err.startswith(f'train_imagenette.py: {tree}: {named}') and err.count('\n') == 1
    assert statuses(tmp_path) == []  # all are read before the run begins


@pytest.mark.parametrize('loader, content, words', [('--workers 0', *UNREADABLE[0]), ('--workers 1', *UNREADABLE[2])])
def test_an_image_that_is_spoiled_after_it_was_checked_is_named(loader, content, words, tree, command, tmp_path,
                                                                monkeypatch):
    file = tree / 'train' / CLASSES[1] / f'{CLASSES[1]}_train3.JPEG'
    look_at_all = check.look_at_all
    def then_spoilt(*args):
        looks = look_at_all(*args)
        file.write_bytes(file.read_bytes()[:-300] if content == 'half' else content)
        return looks
    monkeypatch.setattr(check, 'look_at_all', then_spoilt)
    code, _, err = command('--data', tree, *TINY, *loader.split())
    assert code == 2 and err.startswith(f'train_imagenette.py: {file}: cannot be read as an image ({words}')
    assert err.count('\n') == 1
    assert statuses(tmp_path) == ['failed']


@pytest.mark.parametrize('loader', ['--workers 0', '--workers 1', '--loader device'])
def test_images_of_a_pixel_train(loader, tree, command, tmp_path):
    for folder in ('train', 'val'):
        make_image(0, (1, 1)).save(tree / folder / CLASSES[1] / f'{CLASSES[1]}_{folder}3.JPEG')
    code, _, err = command('--data', tree, *TINY, *loader.split())
    assert code == 0 and not err and statuses(tmp_path) == ['ok']


def test_an_image_of_a_pixel_is_its_colour_everywhere(tree):
    for folder in ('train', 'val'):
        for file in (tree / folder).rglob('*.JPEG'): make_image(0, (1, 1)).save(file)
    for loader in ('workers', 'device'):
        for batches in get_dls(config(tree, loader=loader)).loaders:
            x, _ = next(iter(batches))
            assert x.shape == (6, 3, 32, 32) and np.ptp(x.numpy(), axis=(0, 2, 3)).max() == 0 and x.isfinite().all()


# --- folders ---

def empty(folder):
    for file in folder.iterdir(): file.unlink()


@pytest.mark.parametrize('spoil, words', [
    (lambda t: t.rename(t.with_name('gone')), 'no such folder'),
    (lambda t: (shutil.rmtree(t), t.touch()), 'not a folder'),
    (lambda t: (t / 'val').rename(t / 'elsewhere'), 'no folder val'),
    (lambda t: shutil.rmtree(t / 'train'), 'no folder train'),
    (lambda t: empty(t / 'val' / CLASSES[0]), f'val/{CLASSES[0]}: no images in this class folder'),
    (lambda t: empty(t / 'train' / CLASSES[0]), f'train/{CLASSES[0]}: no images in this class folder'),
    (lambda t: shutil.rmtree(t / 'val' / CLASSES[0]),
     f'class {CLASSES[0]} of the training images has none in validation'),
    (lambda t: shutil.rmtree(t / 'train' / CLASSES[0]),
     f'class {CLASSES[0]} of the validation images is not in training'),
    (lambda t: (t / 'val' / CLASSES[0]).rename(t / 'val' / 'n09'),
     'class n09 of the validation images is not in training'),
    (lambda t: [shutil.rmtree(t / f / c) for f in ('train', 'val') for c in CLASSES[1:]], 'one class only'),
    (lambda t: [shutil.rmtree(t / f / c) for f in ('train', 'val') for c in CLASSES],
     'no images in train|val/<class>/'),
    (lambda t: [f.unlink() for f in t.rglob('ILSVRC*')], 'try --split v2'),
    (lambda t: (t / 'val' / CLASSES[0] / 'gone.png').symlink_to('nowhere'), 'gone.png (a broken link)'),
    (lambda t: os.rename(t / 'val' / CLASSES[0], os.fsencode(t / 'val') + b'/\xff'), 'its name is not UTF-8'),
])
def test_folders_that_cannot_be_used_are_mistakes_before_the_run(spoil, words, tree, command, tmp_path):
    spoil(tree)
    code, out, err = command('--data', tree, *TINY, '--split', 'v1' if 'v2' in words else 'v2')
    assert code == 2 and err.startswith('train_imagenette.py: ') and words in err and err.count('\n') == 1 and not out
    assert statuses(tmp_path) == []


def test_half_an_archive_is_named_and_half_a_split_refused(tree, monkeypatch, capsys):
    monkeypatch.setattr(data, 'find_data', lambda cfg: tree)
    cfg = config(tree, dataset='imagewoof', data='')
    for counts, words in [((30, 6), ''), ((100, 6), '36 of 106 images, not the full archive')]:
        monkeypatch.setattr(data, 'N_IMAGES', {('imagewoof', 'v1'): counts})
        get_dls(cfg)
        out = capsys.readouterr().out
        assert words in out and bool(words) == bool(out)
    monkeypatch.setattr(data, 'N_IMAGES', {('imagewoof', 'v1'): (31, 5)})
    with pytest.raises(UsageError, match=r'30 \+ 6 images, expected 31 \+ 5'): get_dls(cfg)


# --- downloads ---

class Server(http.server.ThreadingHTTPServer):
    "Serves `body` whole at `url`, or what `how` says of it."
    def __init__(self, name, body):
        self.body, self.how, self.asked = body, '', 0
        super().__init__(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server_port}/{name}'


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked += 1
        body, how = self.server.body, self.server.how
        if how == 'busy': return self.send_error(503, 'Slow Down', 'Try\nagain\n' * 50)
        if how == 'other content': body = bytes(len(body))
        self.send_response(200)
        if how != 'no length': self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if how in ('breaks off', 'no length', 'falls silent') else body)
        if how == 'falls silent': time.sleep(30)

    def log_message(self, *args): pass


@pytest.fixture
def archive(tree, tmp_path, fastai_home, monkeypatch):
    "The server of an archive of the tree that stands for Imagewoof's; what is fetched goes again afterwards."
    name, buffer = f'woof-{tmp_path.name}', io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz') as tar: tar.add(tree, name)
    body = buffer.getvalue()
    server = Server(f'{name}.tgz', body)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(data, 'ARCHIVES', {('imagewoof', '160'): server.url})
    monkeypatch.setattr(data, 'N_IMAGES', {('imagewoof', 'v2'): (24, 12)})
    checks = {server.url: (len(body), hashlib.md5(body[:2**20]).hexdigest())}  # as fastdownload keeps them
    monkeypatch.setattr(fastdownload.core, 'read_checks', lambda module: checks)
    server.file, server.folder = fastai_home / 'archive' / f'{name}.tgz', fastai_home / 'data' / name
    yield server
    server.shutdown()
    server.server_close()
    shutil.rmtree(server.folder, ignore_errors=True)
    for file in server.file.parent.glob(f'{name}*'): file.unlink()


@pytest.fixture
def fetch(command, archive): return lambda: command('--woof', '--split', 'v2', *TINY, '--workers', 0)


def assert_the_same_command_works_now(fetch, archive, tmp_path):
    code, _, err = fetch()
    assert code == 0 and not err
    df = runlog.load(tmp_path / 'results' / 'runs.csv')
    assert df.status.tolist() == ['ok'] and (df.n_train[0], df.n_val[0]) == (24, 12)
    assert [p.name for p in archive.folder.parent.glob('woof-*')] == [archive.folder.name]  # nothing left beside it


@pytest.mark.parametrize('how, words', [
    ('breaks off', 'the download broke off'), ('no length', 'Downloaded file is corrupt'),
    ('other content', 'Downloaded file is corrupt'), ('busy', 'HTTP Error 503: Slow Down'),
    ('falls silent', 'timed out'),
])
def test_a_download_that_goes_wrong_is_reported_and_never_used(how, words, fetch, archive, tmp_path, monkeypatch):
    archive.how = how
    monkeypatch.setattr(data, 'SILENCE', 1)
    for asked in (1, 2):  # what the first one left does not pass for an archive
        code, _, err = fetch()
        assert code == 2 and err.startswith(f'train_imagenette.py: cannot get {archive.url} ('), err
        assert err.count('\n') == 1, err
        assert words in err and f'put the archive at {archive.file}' in err
        assert statuses(tmp_path) == [] and not archive.folder.exists() and archive.asked == asked
    archive.how = ''
    assert_the_same_command_works_now(fetch, archive, tmp_path)


def test_without_a_network_an_archive_put_by_hand_will_do(fetch, archive, tmp_path):
    archive.shutdown()
    archive.server_close()
    code, _, err = fetch()
    assert code == 2 and 'Connection refused' in err
    assert err.endswith('or name an extracted folder with --data\n') and err.count('\n') == 1
    archive.file.parent.mkdir(exist_ok=True)
    archive.file.write_bytes(archive.body[:-1])
    assert fetch()[0] == 2 and not archive.folder.exists()
    archive.file.write_bytes(archive.body)
    assert_the_same_command_works_now(fetch, archive, tmp_path)


def test_the_archive_of_each_dataset_is_asked_for(monkeypatch, fastai_home):
    asked = []
    def no_network(url, **kwargs):
        asked.append(url.rsplit('/')[-1])
        raise OSError('no route to host')
    monkeypatch.setattr(data, 'untar_data', no_network)
    for cfg in (Config(), Config(dataset='imagewoof', size=256)):
        with pytest.raises(UsageError) as e: data.find_data(resolve(cfg))
        assert f'no route to host): try again, put the archive at {fastai_home / "archive" / asked[-1]}' in str(e.value)
    assert asked == ['imagenette2-160.tgz', 'imagewoof2.tgz']


@pytest.mark.parametrize('damage, words', [
    (lambda b: b[:20_000] + bytes(1000) + b[21_000:], ' of 36 images'),
    (lambda b: b[:-3000], 'Compressed file ended before'),
    (lambda b: b'no archive', 'is not a compressed or uncompressed tar file'),
    (lambda b: b[:500], ''), (lambda b: b'', ''),
])
def test_an_archive_damaged_where_its_checksum_does_not_look_is_named(
        damage, words, fetch, archive, tmp_path, monkeypatch):
    archive.file.parent.mkdir(exist_ok=True)
    archive.file.write_bytes(damage(archive.body))
    monkeypatch.setattr(fastdownload.core, 'read_checks', lambda module: {})  # they are of the first MiB and the length
    code, _, err = fetch()
    assert code == 2 and err.startswith(f'train_imagenette.py: {archive.file}: damaged (')
    assert err.count('\n') == 1 and words in err
    assert err.endswith('remove it, and it is downloaded anew\n') and not archive.folder.exists() and archive.asked == 0
    archive.file.unlink()
    assert_the_same_command_works_now(fetch, archive, tmp_path)


def from_file(monkeypatch, n, then):
    "Let file `n` of an archive, from 0, call `then` in place of being extracted."
    files, extract = iter(range(10**6)), tarfile.TarFile.makefile

    def makefile(*args):
        if next(files) >= n: then()
        return extract(*args)
    monkeypatch.setattr(tarfile.TarFile, 'makefile', makefile)


def test_an_extraction_ended_by_kill_9_leaves_no_folder_that_passes_for_the_whole(fetch, archive, tmp_path):
    def child():
        from_file(pytest.MonkeyPatch(), 5, lambda: os.kill(os.getpid(), signal.SIGKILL))
        data.find_data(resolve(Config(dataset='imagewoof', split='v2')))
    process = mp.get_context('fork').Process(target=child, daemon=True)
    process.start()
    process.join()
    left = list(archive.folder.parent.glob('woof-*'))
    assert process.exitcode == -signal.SIGKILL and not archive.folder.exists()
    assert sum(len(list(folder.rglob('*.JPEG'))) for folder in left) == 5
    for folder in left: shutil.rmtree(folder)
    assert_the_same_command_works_now(fetch, archive, tmp_path)
    assert archive.asked == 1  # the archive was whole


def test_a_disk_full_while_extracting_is_a_mistake_in_one_line(fetch, archive, tmp_path, monkeypatch):
    def full(): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        from_file(m, 5, full)
        code, _, err = fetch()
    assert code == 2 and 'No space left on device' in err and err.count('\n') == 1 and not archive.folder.exists()
    assert_the_same_command_works_now(fetch, archive, tmp_path)


def test_an_archive_is_extracted_beside_its_place_with_a_bar(archive, monkeypatch):
    "Not in the system's temporary folder, which may be smaller."
    shown, places, extract, before = [], [], tarfile.TarFile.makefile, tempfile.tempdir

    def bar(items, n, what):
        shown.append((what, n, len(list(items))))
        return []

    def slowly(tar, info, path):
        places.append(Path(path))
        time.sleep(0.05)
        return extract(tar, info, path)
    monkeypatch.setattr(data, 'bar', bar)
    monkeypatch.setattr(data, 'COUNT_EVERY', 0.01)
    monkeypatch.setattr(tarfile.TarFile, 'makefile', slowly)
    data.find_data(resolve(Config(dataset='imagewoof', split='v2')))
    assert len(places) == 36 and all(place.is_relative_to(archive.folder.parent) for place in places)
    ((what, n, n_shown),) = shown
    assert (what, n) == ('extracting', 36) and 18 <= n_shown <= 36 and tempfile.tempdir == before


def test_two_processes_that_fetch_at_once_find_the_same_whole_folder(archive):
    with mp.get_context('fork').Pool(2) as pool:
        folders = pool.map(data.find_data, [resolve(Config(dataset='imagewoof', split='v2'))] * 2, chunksize=1)
    assert folders == [archive.folder] * 2 and len(list(Path(archive.folder).rglob('*.JPEG'))) == 36
