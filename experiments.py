"""Says what one run is, `Config`, and what is compared, `EXPERIMENTS`.

A knob of a run is one field of `Config`: its flag, its check and its column in results/runs.csv follow from it. The
defaults are the recipe of the source, github.com/sdoria/SimpleSelfAttention (2019). This module imports neither torch
nor fastai.
"""
import ast
import math
import os
import re
import shlex
from dataclasses import asdict, dataclass, field, fields, replace
from operator import ge, gt, le, lt
from pathlib import Path

import layer_source
from command import UsageError, nearest

HERE = Path(__file__).parent


# What other files define is read from their texts: to import them would cost torch's seconds.

def expression(file, name):
    "Returns what stands behind `name =` in `file`, a path from the folder of this one, as a node of its syntax tree."
    for node in ast.parse((HERE / file).read_text(encoding='utf-8')).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name: return node.value
    raise LookupError(f'{file} has no {name}')


def literal(file, name): return ast.literal_eval(expression(file, name))
def keys_of(file, name): return [ast.literal_eval(key) for key in expression(file, name).keys]  # whatever its values


NETWORKS = literal('xresnet.py', 'ARCHS') | literal('training/arch.py', 'FASTAI_ARCHS')  # name: (expansion, blocks)
STEMS, ACTIVATIONS, POOLS = (keys_of('xresnet.py', name) for name in ('STEMS', 'ACTIVATIONS', 'POOLS'))
ATTENTION = keys_of('layers.py', 'ATTENTION')
INSTEAD_OF_ARCH = {  # names of networks in the scripts of others
    **dict.fromkeys(['presnet18', 'presnet34', 'presnet50', 'presnet101', 'presnet152', 'xresnet34_2', 'xresnet50_2'],
                    'was in fastai 1 only; take xresnet of the same depth'),
    **dict.fromkeys(['resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152'],
                    'is of torchvision and has no place for the layer; take xresnet of the same depth'),
}
INSTEAD_OF_OPT = dict.fromkeys(
    ['novograd', 'ralamb', 'over9000', 'rangervar', 'rangernovo', 'rangerlars', 'radams', 'Adams'],
    'is not in fastai; take ranger, radam, lamb or lookahead')
ROLES = 'result', 'speed', 'run'
SWITCH = [0, 1]
ADAPTIVE = ['adam', 'rms', 'ranger', 'radam', 'lamb', 'lookahead']  # optimizers that keep squared gradients


# --- one run ---

def knob(default, help, *aliases, choices=None, also=None, instead=None, least=None, above=None, most=None, below=None,
         only_with=None, role='result', for_life=None, before=None, flag=True):
    """Makes a field of Config with `least` <= value <= `most` and `above` < value < `below`.

    choices   the values there are; capitals and underscores do not matter
    also      {another name of a choice: the choice}
    instead   {a name that upstream has and this repository has not: what to take instead, and why}
    only_with (another knob, its values with which this one has an effect), for `check_effects`
    role      result: runs that differ in it are different settings, which are never pooled.
              speed: it says how the same function is computed; runs that differ in it alone repeat one another.
              run: it is of the run, and no part of the setting: its seed, its folder, what feeds it.
    for_life  whether a run that is continued must keep the value (default: every knob of the role result).
    before    the value of runs that were recorded before the knob was there (default: its default).
    flag      whether it has a flag; a knob without one follows from others.
    """
    assert role in ROLES
    if for_life is None: for_life = role == 'result'
    if before is None: before = default
    return field(default=default, metadata=dict(
        help=help, aliases=aliases, choices=choices, also=also or {}, instead=instead or {}, least=least, above=above,
        most=most, below=below, only_with=only_with, role=role, for_life=for_life, before=before, flag=flag))


@dataclass(frozen=True)
class Config:
    """Holds every knob of one run. Raises UsageError on a value that is not possible.

    Of a layer that is not ours it finds the file, reads it and hashes its source, unless both are given.
    """
    # data
    dataset: str = knob('imagenette', 'dataset; custom: the one that --data names',
                        choices=['imagenette', 'imagewoof', 'digits', 'custom'])
    split: str = knob('auto', 'v1: 500 validation images, as for all published numbers; v2: by the folders; '
                      'auto: v1, but v2 for digits, custom and --valid-pct', choices=['auto', 'v1', 'v2'])
    size: int = knob(128, 'image size in pixels', least=32, most=1024)
    source: str = knob('auto', 'archive by its short side; auto: 160 up to 128 px, 320 up to 224 px, else full',
                       choices=['auto', '160', '320', 'full'], only_with=('dataset', ['imagenette', 'imagewoof']))
    data: str = knob('', 'a local folder train|val/<class>/<image> instead of a download', role='run')
    valid_pct: float = knob(0., 'with --data: the folder is flat, <class>/<image>, and this part of each class, '
                            'such as 0.2, validates', least=0, below=1)
    skip_damaged: int = knob(0, 'with --data: leave out the images of training and validation that cannot be read, and '
                             'count them in the row',
                             choices=SWITCH, role='run')
    pct_noise: int = knob(0, 'percent of wrong training labels, from the CSV of the archive, which was made for v2: '
                          'with v1 it is about 0.7 times as many', choices=[0, 1, 5, 25, 50])
    # model
    arch: str = knob('xresnet50', "network; all but xresnet18 to 152 are fastai's own", choices=list(NETWORKS),
                     instead=INSTEAD_OF_ARCH)
    attention: str = knob('none', 'attention layer: one of ours, or FILE.py:NAME or PACKAGE.MODULE:NAME of any '
                          'callable n_channels -> module', choices=ATTENTION)
    sa_at: str = knob('1', 'where the layer stands: stages (their last block) or stage.block, such as 1,2,3,4 or 2.0')
    attention_file: str = knob('', 'file of a layer that is not ours', role='run', flag=False)
    attention_source: str = knob('', 'hash of the source of a layer that is not ours', flag=False)
    stem: str = knob('32-64-64', "channels of the stem; fastai's own is 32-32-64", choices=STEMS)
    act: str = knob('relu', 'activation', '--act-fn', choices=ACTIVATIONS,
                    also={'Swish': 'silu', 'SwishJit': 'silu', 'MishJit': 'mish'})
    pool: str = knob('avg', 'pooling in the shortcut', choices=POOLS, also={'AvgPool': 'avg', 'MaxPool': 'max'},
                     instead={'MaxBlurPool': 'is of another package (kornia); take MaxPool'})
    # training
    epochs: int = knob(5, 'epochs', '--epoch', least=1, most=10_000)
    bs: int = knob(64, 'batch size', least=2, most=65_536)
    lr: float = knob(3e-3, 'peak learning rate', above=0, most=1e30)
    schedule: str = knob('one_cycle', 'learning rate schedule', '--sched-type', choices=['one_cycle', 'flat_cos'],
                         also={'flat_and_anneal': 'flat_cos'})
    ann_start: float = knob(0.75, 'with flat_cos: the part of training after which the learning rate falls to almost 0',
                            least=0, below=1, only_with=('schedule', ['flat_cos']))
    opt: str = knob('adam', 'optimizer', choices=['sgd', *ADAPTIVE],
                    also={'RMSProp': 'rms'}, instead=INSTEAD_OF_OPT)
    mom: float = knob(0.9, 'momentum (beta1); one_cycle takes it from mom+0.05, or (1+mom)/2 if that is less, to '
                      'mom-0.05, but not below 0, and back', least=0, below=1)
    sqrmom: float = knob(0.99, 'decay of the squared gradients (beta2); sgd has none', '--alpha', least=0, below=1,
                         only_with=('opt', ADAPTIVE))
    eps: float = knob(1e-6, 'epsilon of the optimizer; sgd has none', above=0, only_with=('opt', ADAPTIVE))
    beta: float = knob(0., 'of the softplus of SAdam, in ranger and radam; 0: off', least=0,
                       only_with=('opt', ['ranger', 'radam']))
    wd: float = knob(1e-2, 'decoupled weight decay; norms and biases have none', '--weight-decay', least=0)
    label_smoothing: float = knob(0.1, 'label smoothing', least=0, below=1)
    mixup: float = knob(0., 'alpha of mixup; 0: off', least=0)
    sh: float = knob(0., 'random erasing: the largest part of the image that is erased; 0: off', least=0, most=1)
    # machine
    precision: str = knob('auto', 'auto: fp16 autocast on CUDA, and on a Mac where it works; fp32 on a CPU',
                          choices=['auto', 'fp32', 'fp16', 'bf16'])
    loader: str = knob('auto', 'workers: loader processes decode and crop; device: images are decoded once, kept and '
                       'cropped on the device; auto: device on a GPU that has room for the images',
                       choices=['auto', 'workers', 'device'], role='speed', before='workers')
    fused: int = knob(1, "adam as one kernel of torch; 0: fastai's own, the same function", choices=SWITCH,
                      only_with=('opt', ['adam']), role='speed', for_life=True, before=0)
    channels_last: int = knob(1, 'memory format of the network; 0: channels first', choices=SWITCH, role='speed')
    compile: int = knob(0, 'torch.compile of the training passes, with CUDA graphs on a GPU', choices=SWITCH,
                        role='speed')
    cuda_graphs: int = knob(0, 'on a GPU: replay the training passes as CUDA graphs, the same kernels without the time '
                            'to start each', choices=SWITCH, role='speed')
    keep_memory: int = knob(1, 'on a CPU: keep freed memory for the next step instead of giving it back to the system',
                            choices=SWITCH, role='speed', before=0)
    processes: int = knob(1, 'processes that train together, each with batches of bs: as many as accelerate launch or '
                          'torchrun starts', least=1, most=65_536)
    workers: int = knob(-1, 'loader processes; 0: none; -1: one a core, at most 8', least=-1, most=256, role='run')
    seed: int = knob(0, 'seed of the weights, the order, crops, flips and mixup', least=0, most=2**31 - 1, role='run',
                     for_life=True)
    meta: str = knob('', 'free text that is kept in the row', '--log', role='run')

    def __post_init__(self):
        outside = isinstance(self.attention, str) and layer_source.is_outside(self.attention)
        if not outside and str(self.attention).endswith('.py'):
            raise UsageError(f'--sa {self.attention}: name the layer in it, {self.attention}:NAME')
        for f in fields(self):
            of_any_name = f.name == 'attention' and outside
            meta = {**f.metadata, 'choices': None} if of_any_name else f.metadata
            self._set(f.name, _spelled(getattr(self, f.name), meta))
            _check(flag(f), getattr(self, f.name), f.type, meta)
            if f.type is float: self._set(f.name, float(getattr(self, f.name)))  # 1 and 1. are one setting
        found = layer_source.find(self.attention, self.attention_file, self.attention_source)
        for name, value in zip(('attention', 'attention_file', 'attention_source'), found): self._set(name, value)
        if self.data.startswith('~'): self._set('data', os.path.expanduser(self.data))  # no shell does so in --data=~/x
        self._check_together()
        try: self._set('sa_at', format_places(self.places, NETWORKS[self.arch][1]))
        except ValueError as e: raise UsageError(f'--sa-at {self.sa_at}: {e}') from None

    def _set(self, name, value):
        "Sets an attribute while this object is made; afterwards it is frozen."
        object.__setattr__(self, name, value)

    def _check_together(self):
        "Raises UsageError on values that are not possible together."
        if self.dataset == 'digits' and self.split == 'v1':
            raise UsageError('--split v1: digits has one split only, that of its folders (v2)')
        if self.valid_pct and not self.data: raise UsageError('--valid-pct: with --data only')
        if self.valid_pct and self.split == 'v1': raise UsageError('--valid-pct and --split v1: give one of them')
        if self.dataset == 'custom' and not self.data: raise UsageError('--dataset custom: name its folder with --data')
        if 0 < self.mixup < 1e-3: raise UsageError(f'--mixup {self.mixup}: must be 0 or at least 0.001')

    def check_effects(self):
        """Raises UsageError where a knob is set that has no effect beside the others.

        It is for command lines: a row or a model of before may have such a knob.
        """
        for f in fields(self):
            value, (other, values) = getattr(self, f.name), f.metadata['only_with'] or ('', [])
            if not other or value == f.default or getattr(self, other) in values: continue
            raise UsageError(f'{flag(f)} {value}: for --{other} {listed(values)} only, not {getattr(self, other)} '
                             f'(default {f.default})')
        if self.skip_damaged and not self.data: raise UsageError('--skip-damaged: with --data only')
        if self.attention == 'none' and self.sa_at != Config.sa_at: raise UsageError('--sa-at: with --sa only')

    @property
    def model(self): return model_name(self.arch, self.attention)

    @property
    def places(self):
        "The sorted [(stage, block)] of the layers, see `parse_places`."
        return parse_places(self.sa_at, NETWORKS[self.arch][1])


def listed(names):
    "Returns 'a, b or c'."
    *names, last = names
    return f'{", ".join(names)} or {last}' if names else last


def model_name(arch, attention):
    "Returns an arch and its attention in a word: xresnet50+simple."
    return arch if attention == 'none' else f'{arch}+{attention}'


def resolve(cfg):
    "Returns `cfg` with what follows from its other fields written out: the archive, the split, no place of no layer."
    source, split = cfg.source, cfg.split
    if source == 'auto' and cfg.dataset != 'digits' and not cfg.data:
        source = '160' if cfg.size <= 128 else '320' if cfg.size <= 224 else 'full'
    if split == 'auto': split = 'v1' if cfg.dataset in ('imagenette', 'imagewoof') and not cfg.valid_pct else 'v2'
    sa_at = Config.sa_at if cfg.attention == 'none' else cfg.sa_at
    return replace(cfg, source=source, split=split, sa_at=sa_at)


def parse_places(sa_at, blocks):
    """Returns the sorted [(stage, block)] of a setting: '1' is the last block of stage 1, '2.0' the first of stage 2.

    `blocks` are the blocks per stage. Raises ValueError on a place that does not exist, and lists those that do.
    """
    places = {}
    for stage, n in enumerate(blocks, 1):
        for block in range(n): places[f'{stage}.{block}'] = places[f'{stage}b{block}'] = stage, block
        places[str(stage)] = stage, n - 1
    try: return sorted({places[name.strip()] for name in sa_at.split(',')})
    except KeyError as e:
        stages = ', '.join(f'{s} (or {s}.0 to {s}.{n - 1})' for s, n in enumerate(blocks, 1))
        raise ValueError(f'no place {e} for attention; there are {stages}') from None


def format_places(places, blocks):
    """Returns the one setting that stands for `places`: for xresnet50, of '2,1.2' as of '1,2.3' it is '1,2'.

    Blocks 0, 10, 20 and 30 are written 3b0, 3b10: a spreadsheet would make 3 and 3.1, other places, of 3.0 and 3.10.
    """
    def name(stage, block):
        if block == blocks[stage - 1] - 1: return str(stage)
        return f'{stage}b{block}' if block % 10 == 0 else f'{stage}.{block}'
    return ','.join(name(*place) for place in places)


def as_written_now(attention, sa_at):
    "Returns the places of a layer as `resolve` leaves them: older rows have 3.0 for 3b0, and any place of `none`."
    return Config.sa_at if attention == 'none' else re.sub(r'\b(\d)\.(\d?0)\b', r'\1b\2', sa_at)


N_IMAGES = {  # (dataset, split): numbers of training and validation images of a full archive
    ('imagenette', 'v1'): (12_894, 500), ('imagenette', 'v2'): (9_469, 3_925),
    ('imagewoof', 'v1'): (12_454, 500), ('imagewoof', 'v2'): (9_025, 3_929),
}


def flag(f):
    "Returns the flag of a field: --pct-noise; of attention, --sa."
    return '--sa' if f.name == 'attention' else '--' + f.name.replace('_', '-')


def add_config_flags(ap, leave_out=(), default=None):
    "Adds a flag for each field of Config, with its aliases. `default`, if given, takes the place of all the defaults."
    for f in fields(Config):
        if f.name in leave_out or not f.metadata['flag']: continue
        ap.add_argument(flag(f), *f.metadata['aliases'], dest=f.name, **options_of(f, default))


def options_of(f, default=None):
    "Returns the options of `add_argument` for a field, with the `default` if one is given."
    text, choices = f.metadata['help'], f.metadata['choices']
    if choices and choices is not SWITCH: text += f' [{", ".join(map(str, choices))}]'
    if f.default != '' and default is None: text += f' (default {f.default})'
    metavar = 'TEXT' if f.type is str else f.type.__name__.upper()
    kind = f.type
    if f.type is str and choices: metavar, kind = 'NAME', lambda text: _spelled(text, f.metadata)
    options = dict(type=kind, default=f.default, metavar=metavar, help=text.replace('%', '%%'))
    if f.name in ('dataset', 'act'): options |= dict(default=None)  # It depends on --woof and --data, or on --arch.
    if f.name == 'attention':
        options |= dict(nargs='?', const='simple', type=lambda text: _spelled(attention_name(text), f.metadata))
    if choices is SWITCH: options |= dict(nargs='?', const=1, metavar='0|1')
    return options if default is None else options | dict(default=default)


def command_line(cfg):
    "Returns the command line that trains `cfg` once: size, epochs, and the flags of what is not the default."
    by_itself = replace(cfg, split='auto')
    values = asdict(by_itself if resolve(by_itself) == resolve(cfg) else cfg) | dict(sa_at=cfg.sa_at.replace('b', '.'))
    words = ['python', 'train_imagenette.py']
    if cfg.dataset == 'imagewoof': words.append('--woof')
    for f in sorted(fields(Config), key=lambda f: f.name in ('attention', 'sa_at')):  # these two last
        if not f.metadata['flag'] or (f.name, values[f.name]) == ('dataset', 'imagewoof'): continue
        if values[f.name] == f.default and f.name not in ('size', 'epochs'): continue
        words += [flag(f)] if (f.name, values[f.name]) == ('attention', 'simple') else [flag(f), str(values[f.name])]
    return shlex.join(words)


def attention_name(text):
    "Returns the name of an attention layer; 0 and 1 are those of 2019."
    return {'0': 'none', '1': 'simple'}.get(text, text)


LIMITS = {'least': ('at least', ge), 'above': ('above', gt), 'most': ('at most', le), 'below': ('below', lt)}
MANY = 20  # choices are too many for one line
TYPES = {int: (int, 'an integer'), float: ((int, float), 'a number'), str: (str, 'a text')}


def _plain(name):
    "Returns a name without its capitals and underscores, which do not matter."
    return str(name).lower().replace('_', '')


def _spelled(value, meta):
    "Returns the choice that a text means, as upstream spells it or with other capitals: MaxPool is max, ReLU is relu."
    choices = meta['choices']
    if not choices or not isinstance(value, str) or value in choices: return value
    names = {_plain(name): name for name in choices} | {_plain(name): choice for name, choice in meta['also'].items()}
    return names.get(_plain(value), value)


def _check(name, value, type_, meta):
    "Raises UsageError unless `value` is a `type_` within the choices and limits of its knob."
    kind, words = TYPES[type_]
    if not isinstance(value, kind) or isinstance(value, bool): raise UsageError(f'{name} {value!r}: not {words}')
    if type_ is str and not value.isprintable():
        raise UsageError(f'{name} {value!r}: has characters that cannot be printed')
    if type_ is float and not math.isfinite(value): raise UsageError(f'{name} {value}: not a finite number')
    choices = meta['choices']
    instead = {_plain(other): what for other, what in meta['instead'].items()}.get(_plain(value))
    if instead: raise UsageError(f'{name} {value}: {instead}')
    if choices and value not in choices:
        names = [str(choice) for choice in choices]
        hint = nearest(str(value), names)
        if len(names) > MANY: raise UsageError(f'{name} {value}: unknown{hint}; --help lists all {len(names)}')
        raise UsageError(f'{name} {value}: unknown; choose from {", ".join(names)}{hint}')
    for key, (words, holds) in LIMITS.items():
        limit = meta[key]
        if limit is not None and not holds(value, limit): raise UsageError(f'{name} {value}: must be {words} {limit}')


# --- what is compared ---

def knobs(**attributes):
    "Returns the names of the knobs with these attributes: knobs(role='speed')."
    return [f.name for f in fields(Config) if all(f.metadata[key] == value for key, value in attributes.items())]


SETTINGS = knobs(role='result')  # runs that agree in these, on the same images, are repetitions of one another


def setting(cfg, names=SETTINGS):
    "Returns the values of a resolved `cfg` that distinguish its setting from others."
    return tuple(getattr(cfg, name) for name in names)


@dataclass(frozen=True)
class Experiment:
    """Arms {name: Config} to be compared, how often each one runs, and what is published about them.

    runs       how often each arm runs, or {arm: how often}
    tables     the tables of published means (report.published.load_published) that the arms answer to
    contrasts  the comparisons [(base, arm)] that were named before the first run, or {(base, arm): what it asks, in a
               word or two}; without any, see `pairs`
    plan       the commit with the plan of the runs, in results/LOG.md
    complete   arms of which a seed counts only once all of them that were to run with it have done so
    expect     {arm: (published accuracy in percent, number of runs)}
    metric     of which epoch `expect` and the accuracies compared are: 'last', or 'max', the best on validation images
    hours      what all runs take on one RTX 2080 Ti of 2019, by scripts/estimate.py
    leader     the record of the leaderboard: (accuracy in percent of runs with the layer, number of runs)
    needs      what the recipe of `leader` has beyond the arms; the entry is not run under its name
    """
    claim: str
    arms: dict
    runs: int | dict
    tables: tuple = ()
    contrasts: tuple | dict = ()
    plan: str = ''
    complete: tuple = ()
    expect: dict = field(default_factory=dict)
    metric: str = 'last'
    hours: float | None = None
    leader: tuple = ()
    needs: str = ''

    @property
    def command(self):
        "The command line that trains the second arm once."
        return command_line(list(self.arms.values())[1])

    def wanted(self, arm):
        "Returns how often an arm runs."
        return self.runs[arm] if isinstance(self.runs, dict) else self.runs

    def pairs(self):
        """Returns what is compared, [(base, arm)]: the contrasts between arms that are here.

        Without any, it is the first arm with each other one, and sagan with simple, which is said to beat it.
        """
        named = [pair for pair in self.contrasts if self.arms.keys() >= set(pair)]
        if named: return named
        first, *others = self.arms
        pairs = [(first, arm) for arm in others]
        return [*pairs, ('sagan', 'simple')] if {'sagan', 'simple'} <= set(others) else pairs

    def asks(self, base, arm):
        "Returns what a contrast asks; '' where its experiment does not say."
        return self.contrasts.get((base, arm), '') if isinstance(self.contrasts, dict) else ''

    def described(self):
        """Returns the pairs [(first arm, arm)] of the arms that are in no contrast: they are shown, not tested.

        Where the first arm is in none itself, it stands beside each other arm.
        """
        pairs, (first, *others) = self.pairs(), self.arms
        tested = {arm for pair in pairs for arm in pair}
        return [(first, arm) for arm in others if not {first, arm} <= tested]

    def with_pairs(self, pairs):
        "Returns the Experiment that tests these pairs, too, in this direction, but for those that it describes."
        more = [pair for pair in pairs if pair not in self.pairs() + self.described()]
        kept = [pair for pair in self.pairs() if pair[::-1] not in more]
        return replace(self, contrasts={pair: self.asks(*pair) for pair in kept + more}) if more else self


def variant(cfg):
    "Returns the name of the attention of `cfg`, with its places where they are not the usual one: simple@1,2,3,4."
    return cfg.attention if cfg.sa_at == Config.sa_at else f'{cfg.attention}@{cfg.sa_at}'


def attentions(base, *names):
    "Returns {name: `base` with that attention layer}; simple@1,2 is simple in the stages 1 and 2."
    arms = {}
    for name in names:
        attention, _, places = name.partition('@')
        arms[name] = replace(base, attention=attention, sa_at=places or base.sa_at)
    return arms


def at_equal_time(base, epochs, *names):
    "Returns {'none': `base`} and, of fewer `epochs` as they train more slowly, {name: the same with that layer}."
    return {'none': base} | attentions(replace(base, epochs=epochs), *names)


def planned_runs(exp, seed0=0):
    """Returns [(arm, Config)] of the runs of an Experiment.

    The arms take turns, each turn with one seed, so that whatever drifts meets all arms alike.
    """
    turns = max(exp.wanted(arm) for arm in exp.arms)
    return [(arm, replace(cfg, seed=seed0 + turn)) for turn in range(turns) for arm, cfg in exp.arms.items()
            if turn < exp.wanted(arm)]


# --- the leaderboard of fastai/imagenette ---

# What the recipes of some records of the leaderboard have that is not here.
BLURRED = 'MaxBlurPool of kornia in place of every MaxPool (ducha-aiki/imagewoofv2-fastv2-maxpoolblur)'
BLURRED_BS32 = ('MaxBlurPool of kornia in place of every MaxPool, and training images without the random resized crop'
                ' (radekosmulski/imagenette-LB-entry)')
SEPARABLE = ('a network of depthwise separable convolutions with MaxBlurPool, at batches of 16'
             ' (liuyao12/imagenette_experiments, ResNet_separable.ipynb)')
TRICK = ('an xresnet50 with the "ResNet trick" and MaxBlurPool, at batches of 32'
         ' (ayasyrev/imagenette_experiments, Woof_MaxBlurPool_ResnetTrick_s256bs32.ipynb)')


def of_board(dataset, size, epochs, accuracy, n_runs, hours, needs='', bs=64):
    """Returns the Experiment of one of the 24 records, with the layer and without it.

    The arms are fastai's script of January 2020 with the flags of fastai/imagenette 2020-01-train.md. That page says
    that runs of 80 and 200 epochs had mixup, but not its alpha: 0.2 is that of the leaderboard of 2019. It validates on
    another crop than we do: at 128, 192 and 256 px it squeezes an image into a square of 152, 224 and 296 px and takes
    the centre; here the short side has size + 32.
    """
    base = Config(dataset=f'image{dataset}', split='v2', size=size, source='320' if size == 128 else 'auto',
                  epochs=epochs, bs=bs, lr=8e-3, opt='ranger', mom=0.95, schedule='flat_cos',
                  mixup=0.2 if epochs >= 80 else 0., arch='xse_resnext50', act='mish', pool='max', stem='32-32-64')
    return Experiment(claim='Every record of the leaderboard has the layer: what is it worth?',
                      arms=attentions(base, 'none', 'simple'), runs=5, leader=(accuracy, n_runs), needs=needs,
                      hours=hours)


# --- all that is compared ---

R18 = Config(dataset='imagewoof', split='v1', size=128, epochs=50, arch='xresnet18', lr=8e-3)  # of the later tables
AT_64_PX = Config(dataset='imagewoof', split='v2', size=64, epochs=5, arch='xresnet18')  # a run in minutes on two cores
RANGER = dict(lr=4e-3, opt='ranger', mom=0.95, schedule='flat_cos', ann_start=0.72, act='mish')  # of the replication
TAKEN_APART = ('none', 'simple', 'conv', 'simple_n', 'swap', 'mean', 'cov', 'sagan', 'simple_sym', 'low_rank',
               'channel', 'se')
OTHER_PLACES = ('simple@1.0', 'simple@2.0', 'simple@2', 'simple@3.0', 'simple@3', 'simple@4.0', 'simple@4')

EXPERIMENTS = {
    # the main table of the source, and its three-way table: xresnet50, the layer in the last block of stage 1
    'woof-128-5': Experiment(
        claim="The layer helps, and more than SAGAN's",
        arms=attentions(Config(dataset='imagewoof', split='v1', size=128, epochs=5),
                        'none', 'simple', 'sagan', 'simple_sym'),
        runs=12,
        expect={'none': (62.3, 12), 'simple': (65.2, 12), 'sagan': (64.0, 12)},
        hours=1.8,
        tables=('main', 'three-way'),
        contrasts=(('none', 'simple'), ('none', 'sagan'), ('none', 'simple_sym'), ('sagan', 'simple')),
        plan='e16bc79',
        complete=('none', 'simple', 'sagan'),
    ),
    'woof-256-5': Experiment(
        claim='The layer helps most where there are many positions',
        arms=attentions(Config(dataset='imagewoof', split='v1', size=256, epochs=5), 'none', 'simple'),
        runs=10,
        expect={'none': (61.9, 10), 'simple': (67.6, 10)},
        hours=2.8,
        tables=('main',),
    ),
    'woof-256-20': Experiment(
        claim='The layer still helps after 20 epochs',
        arms=attentions(Config(dataset='imagewoof', split='v1', size=256, epochs=20), 'none', 'simple'),
        runs=10,
        expect={'none': (83.9, 10), 'simple': (85.66, 10)},
        hours=11,
        tables=('main',),
    ),
    'woof-256-80': Experiment(
        claim='The layer helps little after 80 epochs',
        arms=attentions(Config(dataset='imagewoof', split='v1', size=256, epochs=80), 'none', 'simple'),
        runs=10,
        expect={'none': (89.9, 10), 'simple': (90.3, 10)},
        hours=44,
        tables=('main',),
    ),
    'woof-256-400': Experiment(
        claim='The layer reaches 91.0 % after 400 epochs; the source has no baseline for it',
        arms=attentions(Config(dataset='imagewoof', split='v1', size=256, epochs=400), 'none', 'simple'),
        runs=1,
        expect={'simple': (91.0, 1)},
        hours=22,
        tables=('main',),
    ),
    'nette-128-5': Experiment(
        claim='The layer helps a little on the easier set',
        arms=attentions(Config(dataset='imagenette', split='v1', size=128, epochs=5), 'none', 'simple'),
        runs=10,
        expect={'none': (85.5, 10), 'simple': (86.3, 10)},
        hours=0.71,
        tables=('main',),
    ),
    'nette-256-5': Experiment(
        claim='The layer helps a little on the easier set',
        arms=attentions(Config(dataset='imagenette', split='v1', size=256, epochs=5), 'none', 'simple'),
        runs=6,
        expect={'none': (84.6, 6), 'simple': (85.3, 6)},
        hours=1.7,
        tables=('main',),
    ),
    'nette-256-20': Experiment(
        claim='The layer helps a little on the easier set',
        arms=attentions(Config(dataset='imagenette', split='v1', size=256, epochs=20), 'none', 'simple'),
        runs=6,
        expect={'none': (93.6, 6), 'simple': (94.4, 6)},
        hours=6.8,
        tables=('main',),
    ),

    # the later tables of the source: xresnet18; the layer trains for fewer epochs, in about the same time
    'woof-128-50-r18': Experiment(
        claim='At equal run time simple attention beats none and SAGAN',
        arms=at_equal_time(R18, 47, 'simple', 'sagan'),
        runs=20,
        expect={'none': (84.98, 20), 'simple': (85.67, 20), 'sagan': (85.47, 20)},
        metric='max',
        hours=10,
        tables=('same run time ~50 epochs',),
    ),
    'woof-128-100-r18': Experiment(
        claim='At equal run time simple attention beats none',
        arms=at_equal_time(replace(R18, epochs=100), 94, 'simple'),
        runs=23,
        expect={'none': (85.76, 23), 'simple': (86.34, 23)},
        metric='max',
        hours=15,
        tables=('same run time ~100 epochs',),
    ),
    'woof-128-100-r18-mixup': Experiment(
        claim='With mixup, too, it beats none and SAGAN at equal run time',
        arms=at_equal_time(replace(R18, epochs=100, mixup=0.2), 94, 'simple', 'sagan'),
        runs=15,
        expect={'none': (86.36, 15), 'simple': (87.11, 15), 'sagan': (86.97, 15)},
        metric='max',
        hours=15,
        tables=('~100 epochs mixup',),
    ),
    'woof-256-50-r18-mixup': Experiment(
        claim='With mixup at 256 px there is no difference',
        arms=at_equal_time(replace(R18, size=256, mixup=0.2), 47, 'simple'),
        runs=15,
        expect={'none': (90.05, 15), 'simple': (90.02, 15)},
        metric='max',
        hours=20,
        tables=('~50 epochs 256px mixup',),
    ),
    'woof-128-50-r18-lr': Experiment(
        claim='8e-3 is the best learning rate of the baseline',
        arms={f'none lr {lr}': replace(R18, lr=lr) for lr in (0.008, 0.001, 0.003, 0.005, 0.01, 0.012, 0.014)},
        runs={'none lr 0.008': 20, 'none lr 0.001': 10, 'none lr 0.003': 30, 'none lr 0.005': 10, 'none lr 0.01': 20,
              'none lr 0.012': 20, 'none lr 0.014': 20},
        expect={'none lr 0.008': (85.0, 20), 'none lr 0.001': (82.1, 10), 'none lr 0.003': (84.5, 30),
                'none lr 0.005': (84.6, 10), 'none lr 0.01': (84.6, 20), 'none lr 0.012': (84.4, 20),
                'none lr 0.014': (84.7, 20)},
        metric='max',
        hours=22,
        tables=('lr search',),
    ),

    # the fork's runs: a layer in every stage against one
    'woof-128-5-stages': Experiment(
        claim='A layer in every stage against one',
        arms=attentions(Config(dataset='imagewoof', split='v1', size=128, epochs=5), 'simple', 'simple@1,2,3,4'),
        runs=30,
        expect={'simple': (66.04, 30), 'simple@1,2,3,4': (67.47, 30)},
        hours=2.3,
        tables=('fork',),
    ),
    'woof-256-5-stages': Experiment(
        claim='A layer in every stage against one',
        arms=attentions(Config(dataset='imagewoof', split='v1', size=256, epochs=5), 'simple', 'simple@1,2,3,4'),
        runs=30,
        expect={'simple': (67.47, 30), 'simple@1,2,3,4': (69.29, 30)},
        hours=9.5,
        tables=('fork',),
    ),
    'woof-256-20-stages': Experiment(
        claim='A layer in every stage against one',
        arms=attentions(Config(dataset='imagewoof', split='v1', size=256, epochs=20), 'simple', 'simple@1,2,3,4'),
        runs=30,
        expect={'simple': (85.26, 30), 'simple@1,2,3,4': (86.13, 30)},
        hours=38,
        tables=('fork',),
    ),
    'woof-256-80-stages': Experiment(
        claim='A layer in every stage against one',
        arms=attentions(Config(dataset='imagewoof', split='v1', size=256, epochs=80), 'simple', 'simple@1,2,3,4'),
        runs=30,
        expect={'simple': (89.48, 30), 'simple@1,2,3,4': (89.54, 30)},
        hours=150,
        tables=('fork',),
    ),
    'woof-256-400-stages': Experiment(
        claim='A layer in every stage against one',
        arms=attentions(Config(dataset='imagewoof', split='v1', size=256, epochs=400), 'simple', 'simple@1,2,3,4'),
        runs=6,
        expect={'simple': (89.1, 6), 'simple@1,2,3,4': (75.97, 6)},
        hours=150,
        tables=('fork',),
    ),
    'nette-128-5-stages': Experiment(
        claim='A layer in every stage against one',
        arms=attentions(Config(dataset='imagenette', split='v1', size=128, epochs=5), 'simple', 'simple@1,2,3,4'),
        runs=30,
        expect={'simple': (85.98, 30), 'simple@1,2,3,4': (87.23, 30)},
        hours=2.4,
        tables=('fork',),
    ),
    'nette-256-5-stages': Experiment(
        claim='A layer in every stage against one',
        arms=attentions(Config(dataset='imagenette', split='v1', size=256, epochs=5), 'simple', 'simple@1,2,3,4'),
        runs=30,
        expect={'simple': (87.91, 30), 'simple@1,2,3,4': (88.41, 30)},
        hours=9.8,
        tables=('fork',),
    ),
    'nette-256-20-stages': Experiment(
        claim='A layer in every stage against one',
        arms=attentions(Config(dataset='imagenette', split='v1', size=256, epochs=20), 'simple', 'simple@1,2,3,4'),
        runs=30,
        expect={'simple': (94.35, 30), 'simple@1,2,3,4': (94.37, 30)},
        hours=39,
        tables=('fork',),
    ),

    # an independent replication, made with full-size images; its command is in its notebook
    'woof-128-5-ranger': Experiment(
        claim='An independent replication of 2019, with Ranger and Mish: the layer helps',
        arms=attentions(Config(dataset='imagewoof', split='v1', source='full', size=128, epochs=5, **RANGER),
                        'none', 'simple'),
        runs=20,
        expect={'none': (73.65, 20), 'simple': (74.97, 20)},
        hours=1.4,
        tables=('ranger-mish',),
    ),

    # 64 px, where two CPU cores do a run in minutes; split v2
    'woof-64-5-r18': Experiment(
        claim='Nothing is published: does the layer help at 64 px, on a CPU?',
        arms=attentions(replace(AT_64_PX, precision='fp32'), 'none', 'simple', 'sagan', 'simple_sym'),
        runs={'none': 10, 'simple': 10, 'sagan': 6, 'simple_sym': 6},
        contrasts=(('none', 'simple'), ('none', 'sagan'), ('none', 'simple_sym')),
        hours=0.11,
    ),
    'woof-64-5-r18-ranger': Experiment(
        claim='Nothing is published: does the layer help in the recipe of the replication, too?',
        arms=attentions(replace(AT_64_PX, **RANGER), 'none', 'simple'),
        runs=8,
        plan='bf483c4',
        hours=0.056,
    ),
    'attention': Experiment(
        claim='Nothing is published: which part of the layer helps?',
        arms=attentions(AT_64_PX, *TAKEN_APART),
        runs=dict.fromkeys(TAKEN_APART, 14) | dict.fromkeys(('low_rank', 'channel', 'se'), 10),
        hours=0.55,
        contrasts={('none', 'conv'): 'parameters', ('conv', 'simple'): 'data dependence',
                   ('simple_n', 'simple'): 'scale', ('swap', 'simple'): 'own statistics',
                   ('mean', 'cov'): 'second order', ('se', 'simple'): 'more than a gate',
                   ('sagan', 'simple'): 'no softmax', ('simple', 'simple_sym'): 'symmetric W'},
        plan='e16bc79',
        complete=TAKEN_APART,
    ),
    'attention-size': Experiment(
        claim='Nothing is published: do the means help, or what is large?',
        arms=attentions(AT_64_PX, 'none', 'mean', 'mean_small', 'cov', 'cov_large'),
        runs=14,
        contrasts={('mean_small', 'mean'): 'large or small means',
                   ('cov', 'cov_large'): 'large or small covariances',
                   ('cov_large', 'mean'): 'means or covariances, large',
                   ('cov', 'mean_small'): 'means or covariances, small'},
        plan='e4fd0e1',
        complete=('mean', 'mean_small', 'cov', 'cov_large'),
        hours=0.24,
    ),
    'woof-64-5-r18-places': Experiment(
        claim='Other positions have been tested with worse results',
        arms=attentions(AT_64_PX, 'none', 'simple', *OTHER_PLACES),
        runs=10,
        hours=0.31,
        contrasts=tuple((place, 'simple') for place in OTHER_PLACES),
        plan='3c00eaa',
    ),
    'woof-64-5-r18-stages': Experiment(
        claim='Adding several layers has made results worse',
        arms=attentions(AT_64_PX, 'simple', 'simple@1.0,1', 'simple@1,2', 'simple@1,2,3,4'),
        runs=10,
        plan='3c00eaa',
        hours=0.14,
    ),

    # the 24 records of the leaderboard
    'board-nette-128-5': of_board('nette', 128, 5, 87.43, 5, 0.28, BLURRED_BS32, bs=32),
    'board-nette-128-20': of_board('nette', 128, 20, 91.57, 5, 1.1, BLURRED),
    'board-nette-128-80': of_board('nette', 128, 80, 93.55, 1, 4.5),
    'board-nette-128-200': of_board('nette', 128, 200, 94.24, 1, 11),
    'board-nette-192-5': of_board('nette', 192, 5, 86.76, 5, 0.63, BLURRED),
    'board-nette-192-20': of_board('nette', 192, 20, 92.5, 5, 2.5, BLURRED),
    'board-nette-192-80': of_board('nette', 192, 80, 94.5, 1, 10),
    'board-nette-192-200': of_board('nette', 192, 200, 95.03, 1, 25),
    'board-nette-256-5': of_board('nette', 256, 5, 86.85, 5, 1.1, BLURRED),
    'board-nette-256-20': of_board('nette', 256, 20, 93.53, 5, 4.5, BLURRED),
    'board-nette-256-80': of_board('nette', 256, 80, 94.9, 1, 18),
    'board-nette-256-200': of_board('nette', 256, 200, 95.11, 1, 45),
    'board-woof-128-5': of_board('woof', 128, 5, 76.61, 5, 0.27, SEPARABLE, bs=16),
    'board-woof-128-20': of_board('woof', 128, 20, 86.27, 5, 1.1, SEPARABLE, bs=16),
    'board-woof-128-80': of_board('woof', 128, 80, 87.83, 1, 4.3, SEPARABLE, bs=16),
    'board-woof-128-200': of_board('woof', 128, 200, 87.2, 1, 11),
    'board-woof-192-5': of_board('woof', 192, 5, 81.15, 5, 0.61, SEPARABLE, bs=16),
    'board-woof-192-20': of_board('woof', 192, 20, 88.37, 5, 2.4, SEPARABLE, bs=16),
    'board-woof-192-80': of_board('woof', 192, 80, 90.3, 1, 9.7, SEPARABLE, bs=16),
    'board-woof-192-200': of_board('woof', 192, 200, 89.54, 1, 24),
    'board-woof-256-5': of_board('woof', 256, 5, 78.84, 5, 1.1, TRICK, bs=32),
    'board-woof-256-20': of_board('woof', 256, 20, 88.58, 5, 4.3, TRICK, bs=32),
    'board-woof-256-80': of_board('woof', 256, 80, 90.48, 1, 17),
    'board-woof-256-200': of_board('woof', 256, 200, 90.38, 1, 43),

    # the digits of scikit-learn, which need no download
    'digits': Experiment(
        claim='Nothing is published: shows that the way from files to verdict works',
        arms=attentions(Config(dataset='digits', size=32, epochs=3, arch='xresnet18'), 'none', 'simple'),
        runs=2,
        hours=0.00032,
    ),
}
