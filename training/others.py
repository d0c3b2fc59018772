"""Knows the command lines of other scripts: of the source (2019), of its replication, and of fastai (2019 and 2020).

They run here. What differs is said where one of them is given.
"""
from dataclasses import fields
from itertools import pairwise

from experiments import Config, flag

IN_2019 = """Command lines of 2019 (--woof 1 --sa 1 --epoch 5 --sched_type flat_and_anneal) still run. What differs:
  - --lr and --bs are 3e-3 and 64 by default, as in the documented results; in that script they were 1e-3 and 256.
  - --sym 1 makes W symmetric; there it had no effect.
  - A loss that is not finite ends the run, as diverged; there the step was skipped, and training went on.
  - fastai's own script multiplied --lr by --bs / 256 and by the number of GPUs. Here --lr stays as it is, as in the
    source's script on one GPU; --scale-lr multiplies it by the number of processes.
  - The replication with Mish had --arch mxresnet50 (here also --act mish) and full-size images, --source full.
"""

REFUSED = {  # flags of the scripts of others that have no meaning here
    '--debias': 'adam corrects its averages always, as torch does; leave it out',
    '--decay': 'the momentum of sgd adds gradients up, as torch does, and that of adam averages them; leave it out',
    '--pretrained': 'every network is trained from scratch here; leave it out',
    '--repro': 'every run is reproducible here; --seed N says which one it is',
    '--blurpool': 'MaxBlurPool is of another package (kornia); leave it out, and take --pool MaxPool',
}
SWITCHES_OF_2019 = {'--woof', '--sa', '--sym', '--dump', '--lrfinder'}
NAMES_OF_2019 = {'--epoch', '--run', '--sched_type'}
DEFAULTS_OF_2019 = {'--lr': 0.001, '--bs': 256}
FLAGS_OF_FASTAI_IN_2019 = {'--gpu', '--woof', '--lr', '--size', '--alpha', '--mom', '--eps', '--epochs', '--epoch',
                           '--bs', '--mixup', '--opt', '--arch', '--dump'}  # those of its own script
NAMES_OF_LESSW2020 = {'--run', '--sched_type'}  # The replication with Mish has them, and so has the fork.
DEFAULTS_OF_LESSW2020 = {'--arch': 'mxresnet50', '--source': 'full'}
SWITCHES_OF_2020 = {'--fp16'}
NAMES_OF_2020 = {'--act_fn', 'MaxPool', 'AvgPool'}  # fastai's script, up to fastai 2.8.12
DEFAULTS_OF_2020 = {'--lr': 0.01, '--opt': 'ranger', '--act': 'mish', '--schedule': 'flat_cos', '--split': 'v2',
                    '--source': '320', '--stem': '32-32-64', '--precision': 'fp32'}


def notes_on_others(argv, args):
    "Returns what a reader of a command line of 2019 or 2020 must know: in which of its flags this command differs."
    words = [part for word in argv for part in word.split('=', 1)]
    if is_of_2020(words): notes = notes_on_2020(words, args)
    else: notes = notes_on_2019(words, args) if is_of_2019(words) else []
    if args.sym and args.attention == 'none': notes.append('--sym does nothing without --sa')
    elif args.sym: notes.append('--sym 1 makes W symmetric; in 2019 it had no effect')
    return notes


def notes_on_2020(words, args):
    "Returns the note on a command line of 2020, if its script had other defaults for what it leaves out."
    defaults = not_given(DEFAULTS_OF_2020, words)
    if args.size > 128: defaults.pop('--source', None)  # It took the archive that is taken here.
    if '--fp16' in words: defaults.pop('--precision', None)
    return [f"in fastai's script of 2020 the default was {compared(defaults)}"] if defaults else []


def notes_on_2019(words, args):
    "Returns the notes on a command line of 2019: other defaults, and what only one of its several scripts did."
    notes, defaults = [], not_given(DEFAULTS_OF_2019, words)
    if defaults: notes.append(f'in 2019 the default was {compared(defaults)}, as in the documented results')
    if may_be_of_fastai(words) and is_given('--bs', words) and args.bs != 256:
        lr = args.lr if is_given('--lr', words) else DEFAULTS_OF_2019['--lr']
        notes.append("fastai's own script of 2019 multiplied --lr by --bs/256: "
                     f'its line on one GPU is --lr {lr * args.bs / 256:g} here')
    defaults = not_given(DEFAULTS_OF_LESSW2020, words)
    if args.size > 224: defaults.pop('--source', None)  # Full-size images are taken here, too.
    if NAMES_OF_LESSW2020 & set(words) and ('--arch' in defaults or (defaults and 'mxresnet50' in words)):
        notes.append(f"in lessw2020's script the default was {compared(defaults)}")
    return notes


def not_given(defaults, words):
    "Returns those of another script's defaults whose knobs the words of a command line do not give."
    return {name: value for name, value in defaults.items() if not is_given(name, words)}


def compared(defaults):
    "Returns the other script's defaults in words, then ours."
    here = {name: getattr(Config, name[2:]) for name in defaults}
    then, now = (' '.join(f'{name} {value}' for name, value in values.items()) for values in (defaults, here))
    return f'{then}; here it is {now}'


def is_given(name, words):
    "Returns whether the words of a command line give a knob, by its flag or one of its aliases."
    names = {name} | {alias for f in fields(Config) if flag(f) == name for alias in f.metadata['aliases']}
    return bool(names & {word.replace('_', '-') for word in words})


def is_of_2020(words):
    "Returns whether a command line is written as for fastai's script of 2020 to 2.8.12: --act_fn, or --fp16 1."
    return bool(NAMES_OF_2020 & set(words)) or has_value(SWITCHES_OF_2020, words)


def is_of_2019(words):
    """Returns whether a command line is written as for the script of 2019.

    There each switch was followed by 0 or 1 (--sa 1), and some flags had another name. Command lines of today have
    neither, so that only those who bring one of 2019 read what has changed.
    """
    return bool(NAMES_OF_2019 & set(words)) or has_value(SWITCHES_OF_2019, words)


def may_be_of_fastai(words):
    "Returns whether fastai's own script of 2019 understood the flags of a command line: the source's has more."
    return {word for word in words if word.startswith('--')} <= FLAGS_OF_FASTAI_IN_2019


def has_value(switches, words):
    "Returns whether one of these switches is followed by 0 or 1, as nobody needs to write it today."
    return any(word in switches and value in ('0', '1') for word, value in pairwise(words))
