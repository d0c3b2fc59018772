"""Opens each image of a folder of the user's once before the first step: for damage, content, what is made of it.

What was found is remembered by path, size and times, so that a folder costs its seconds once. The images of our
archives are not opened: fastdownload compares a download with its size and a checksum, and each run counts its images.
"""
import hashlib
import io
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import PIL

from command import UsageError
from training.files import labels_of
from training.host import n_threads
from training.images import KINDS, bar, inspect, why_not

LIST_FORMAT = f'images 2, Pillow {PIL.__version__}'  # another version of Pillow may read other files
BROKEN_LINK = 'a broken link'
KNOWN = {  # fingerprint of paths and content: that of paths and sizes, under which the record has the images
    '4481a93dbfa11cef': '22be7e3ebe16',  # imagenette2-160, rebuilt; so are the next: see results/README.md
    '24588b645bcab1d0': '5880ca44b220',  # imagewoof2-160
    '41ab059dd0be1515': '7a7293228448',  # imagewoof2-320
}


class Look(NamedTuple):
    """Says what is in an image: a hash of its content, what is wrong with it, and its `images.KINDS`, comma-separated.

    The content is '' where the file could not be read: a broken link, or the system failed (too many open files, no
    memory), which may go well next time.
    """
    content: str
    damage: str = ''
    kinds: str = ''


def look(file):
    "Returns the Look of a file."
    try: data = Path(file).read_bytes()
    except OSError as e:
        broken = os.path.islink(file) and not os.path.exists(file)
        return Look('', BROKEN_LINK if broken else e.strerror or str(e))
    content = hashlib.blake2b(data, digest_size=8).hexdigest()
    try: str(file).encode()
    except UnicodeError: return Look(content, 'its name is not UTF-8')
    try: return Look(content, kinds=inspect(io.BytesIO(data)))
    except MemoryError: return Look('', 'no memory to decode it')
    except Exception as e:  # what damaged files make Pillow's readers raise has no end
        of_system = getattr(e, 'errno', None)  # Pillow raises an OSError too, but without a number
        return Look('' if of_system else content, why_not(e))


def look_at_all(path, files, memory=None):
    """Returns {relative path: Look} of `files` in the folder `path`, looked at in parallel.

    `memory` is the folder of what was found before.
    """
    file = memory and Path(memory) / f'{hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16]}.json'
    known = _recall(file)
    stamps = {f: _stamp(path / f) for f in files}
    unchanged = [f for f in files if f in known and stamps[f] is not None and known[f][0] == stamps[f]]
    looks = {f: Look(*known[f][1]) for f in unchanged}
    new = [f for f in files if f not in looks]
    with ThreadPoolExecutor(n_threads()) as pool:
        looks |= zip(new, bar(pool.map(lambda f: look(path / f), new), len(new), 'opening each image once'))
    if new or len(known) > len(files): _remember(file, {f: (stamps[f], looks[f]) for f in files if looks[f].content})
    return {f: looks[f] for f in files}


def _stamp(file):
    "Returns [size, time of the content, time of the entry] of a file; None if it has none."
    try: s = os.stat(file)
    except OSError: return None
    return [s.st_size, s.st_mtime_ns, s.st_ctime_ns]


def _recall(file):
    """Returns {relative path: (stamp, Look)} that `_remember` wrote.

    It is {} if there is none, or it is damaged or of another version.
    """
    if file is None: return {}
    try:
        kept = json.loads(file.read_text(encoding='utf-8'))
        return kept['images'] if kept['format'] == LIST_FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError): return {}


def _remember(file, images):
    "Writes what `_recall` reads, as a whole or not at all; where it cannot be written, the next run looks again."
    if file is None: return
    part = file.with_name(f'.{file.name}.{os.getpid()}')
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(dict(format=LIST_FORMAT, images=images)), encoding='utf-8')
        os.replace(part, file)


def fingerprint(looks):
    """Returns 16 hexadecimal digits of the paths and the content of {path: Look}.

    Of images that the record has under the 12 digits of their paths and sizes (KNOWN), it returns those.
    """
    digest = hashlib.sha256('\n'.join(f'{f}\t{seen.content}' for f, seen in looks.items()).encode()).hexdigest()[:16]
    return KNOWN.get(digest, digest)


def sound(path, looks, skip):
    """Returns (the `looks` without damage, how many were left out).

    Raises UsageError that lists the damaged ones unless `skip`.
    """
    damaged = {f: seen.damage for f, seen in looks.items() if seen.damage}
    failed = [f for f, seen in looks.items() if seen.damage not in ('', BROKEN_LINK) and not seen.content]
    if failed and skip:
        raise UsageError(f'{path}: {failed[0]} could not be looked at ({looks[failed[0]].damage}), which is no damage; '
                         'try again')
    if damaged and not skip:
        listed = '; '.join(f'{f} ({damage})' for f, damage in damaged.items())
        raise UsageError(f'{path}: {len(damaged):,} of {len(looks):,} images cannot be read: {listed}. '
                         f'Mend or remove them, or let --skip-damaged train without them')
    kept = {f: seen for f, seen in looks.items() if f not in damaged}
    labels = labels_of(looks)
    for label in dict.fromkeys(labels[f] for f in damaged):
        if not any(labels[f] == label for f in kept):
            raise UsageError(f'{path}: no image of the class {label} can be read')
    return kept, len(damaged)


def remarks(looks, train, valid):
    "Returns lines on what is made of some of the images {path: Look}, and on those that both train and validate."
    counts = Counter(kind for seen in looks.values() for kind in seen.kinds.split(',') if kind)
    lines = [f'{counts[kind]:,} of {len(looks):,} images {words}' for kind, words in KINDS.items() if counts[kind]]
    by_content = {looks[f].content: f for f in train}
    both = [f for f in valid if looks[f].content in by_content]
    if both: lines.append(f'{len(both):,} of {len(valid):,} validation images are training images too: '
                          f'{both[0]} is {by_content[looks[both[0]].content]}')
    return lines
