"""Finds a layer of the user's, FILE.py:NAME or PACKAGE.MODULE:NAME, and hashes its source.

Imports neither the layer nor torch. The hash is of the file and of all that it imports from its own folder (a file) or
its own package (a module), as far as import statements say so; other packages are not in it. Runs with the same hash
had the same layer, wherever its file was.
"""
import ast
import hashlib
import os
import re
from dataclasses import replace
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules

from command import UsageError, nearest


def is_outside(attention): return ':' in attention


def parse(attention):
    "Returns (place, name) of FILE.py:NAME or PACKAGE.MODULE:NAME; raises UsageError where it is neither."
    place, _, name = attention.rpartition(':')
    parts = [name] if is_file(place) else [name, *place.split('.')]
    if not all(part.isidentifier() for part in parts) or Path(place).name == '.py':
        raise UsageError(f'--sa {attention}: neither a layer of ours nor FILE.py:NAME nor PACKAGE.MODULE:NAME')
    return place, name


def is_file(place): return place.endswith('.py')


def find(attention, file='', source=''):
    """Returns (the layer as the record has it, its file, the hash of its source), the latter two '' of a layer of ours.

    In the record a file has no folder: my_layers.py:MyLayer. `file` and `source` are what is known already: as long as
    they belong to `attention` they stay, and nothing is read. It raises UsageError where there is no file or module.
    """
    if not is_outside(attention): return attention, '', ''
    place, name = parse(attention)
    if file and source and belongs(file, place): return attention, file, source
    there = file and belongs(file, place) and Path(file).is_file()
    found = Path(file) if there else find_file(attention, place)
    if is_file(place): attention = f'{found.name}:{name}'
    return attention, str(found), digest(attention, found)


def belongs(file, place):
    "Returns whether a file found earlier is that of `place`: a file's name without a folder, or a module."
    file = Path(file)
    if is_file(place): return file.name == place
    parts = file.parent.parts if file.stem == '__init__' else (*file.parent.parts, file.name.partition('.')[0])
    return parts[-len(place.split('.')):] == tuple(place.split('.'))


def find_file(attention, place):
    "Returns the absolute path of a file or of the file of a module; raises UsageError where there is none."
    if not is_file(place): return find_module(attention, place)
    file = Path(os.path.abspath(Path(place).expanduser()))
    if not file.is_file():
        there = sorted(f.name for f in file.parent.glob('*.py')) if file.parent.is_dir() else []
        raise UsageError(f'--sa {attention}: no such file{nearest(file.name, there)}')
    return file


def find_module(attention, place):
    "Returns the file of a module, found without importing it where Python looks, or in the working directory."
    top, *rest = place.split('.')
    try: spec = find_spec(top)
    except ValueError: spec = None  # of a module made by hand, as __main__ is in a notebook
    spec = spec or PathFinder.find_spec(top, [os.getcwd()])
    if not spec: raise UsageError(f'--sa {attention}: no module {top} here; is its package installed?')
    name = top
    for part in rest:
        folders = list(spec.submodule_search_locations or [])
        spec = PathFinder.find_spec(f'{name}.{part}', folders)
        if not spec:
            hint = nearest(part, [module.name for module in iter_modules(folders)])
            raise UsageError(f'--sa {attention}: {name} has no module {part}{hint}')
        name += f'.{part}'
    if not spec.has_location: raise UsageError(f'--sa {attention}: {name} has no file, so no layer can be found in it')
    return Path(spec.origin)


# --- what the layer is made of ---

def digest(attention, file):
    "Returns the hash of the source of a layer, 12 hexadecimal digits."
    sha = hashlib.sha256()
    try: files = sources(attention, file)
    except OSError as e: raise UsageError(f'--sa {attention}: cannot read {e.filename} ({e.strerror})') from None
    for name, content in sorted(files.items()):
        content = content.replace(b'\r\n', b'\n')
        sha.update(b'%s %d\0%s' % (name.encode(), len(content), content))
    return sha.hexdigest()[:12]


def sources(attention, file):
    """Returns {path: content} of a layer's file and of all that it imports from its folder or package.

    What these import counts too. The paths are relative to the folder that the imports start from: that of the file, or
    the one that holds the package.
    """
    file, root = Path(file), root_of(attention, file)
    place = parse(attention)[0]
    top = None if is_file(place) else place.partition('.')[0]
    found, todo = {}, [file]
    while todo:
        file = todo.pop()
        name = file.relative_to(root).as_posix()
        if name in found: continue
        found[name] = file.read_bytes()
        todo += imported(file, found[name], root, top)
    return found


def root_of(attention, file):
    "Returns the folder that the imports of a layer start from: that of its file, or the one that holds its package."
    place, file = parse(attention)[0], Path(file)
    if is_file(place): return file.parent
    depth = place.count('.') + 1 if file.stem == '__init__' else place.count('.')
    return file.parents[depth]


IMPORT = re.compile(rb'(?:^|[;:])[ \t]*(?:import[ \t]+([^\n;]+)|'
                    rb'from[ \t]+([.\w]+)[ \t]+import[ \t]*(\([^)]{0,20000}\)|(?:\\\n|[^\n;])+))', re.MULTILINE)
COMMENT, NAME = re.compile(r'#.*|\bas\s+\w+|\\\n'), re.compile(r'[\w.]+')


def by_parsing(content):
    "Yields (what stands behind `from`, or '', [names]) of the import statements in a source, wherever they stand."
    try: tree = ast.parse(content)
    except (SyntaxError, ValueError): return (yield from by_form(content))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): yield '', [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            yield '.' * node.level + (node.module or ''), [alias.name.strip('*') for alias in node.names]


def by_form(content):
    "Yields the same without parsing, and more where a text has the form of one: a package may have two thousand files."
    for plain, start, names in IMPORT.findall(content):
        yield start.decode(errors='ignore'), NAME.findall(COMMENT.sub('', (plain or names).decode(errors='ignore')))


def imported(file, content, root, top=None):
    "Returns the files in `root` (of the package `top` only, if given) that the import statements of a file name."
    here, modules = file.parent.relative_to(root).parts, set()
    for start, names in by_form(content) if top else by_parsing(content):
        level = len(start) - len(start.lstrip('.'))
        base = (here[:len(here) - level + 1] if level else ()) + tuple(filter(None, start[level:].split('.')))
        for name in names or ['']:  # from .x import *
            parts = (*base, *filter(None, name.split('.')))
            modules |= {parts[:n] for n in range(1, len(parts) + 1) if not top or parts[0] == top}
    places = [root.joinpath(*module) for module in modules]
    files = [f for place in places for f in (place.with_name(f'{place.name}.py'), place / '__init__.py')]
    return [f for f in files if f.is_file()]


# --- for another machine ---

def packed(attention, file):
    "Returns `sources` of a layer from a file; {} of any other, which a machine has or has not."
    return sources(attention, file) if is_outside(attention) and is_file(parse(attention)[0]) else {}


def unpacked(cfg, files, folder):
    "Returns `cfg` with its layer from `files` (of `packed`), written to `folder`, or as it is where its file is here."
    if not files: return cfg
    try:
        if digest(cfg.attention, cfg.attention_file) == cfg.attention_source: return cfg
    except UsageError: pass
    for name, content in files.items():
        path = Path(folder) / 'layer' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return replace(cfg, attention_file=str(Path(folder) / 'layer' / Path(cfg.attention_file).name))
