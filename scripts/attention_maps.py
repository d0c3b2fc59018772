#!/usr/bin/env python
"""Draws what the attention layer of a trained model looks at, over images.

    python train_imagenette.py --woof --size 128 --sa --save model.pt
    python scripts/attention_maps.py model.pt dog.jpg cat.jpg          writes model-maps/dog.png, model-maps/cat.png
    python scripts/attention_maps.py model.pt dog.jpg --at 0.3,0.5     a position, in parts of height and width

With x (C, N) the layer's input, each figure shows, for chosen positions, the row of x^T W x: what the position counts
for every other one, red for more and blue for less (--toward: its column, what every other one counts for it). Of sagan
it shows the softmax of the position. Below are the first eigenvectors u of S = x x^T, as images u^T x. The command
prints how large what the layer adds is beside its input, and draws that after each epoch where the run's curve is in
--results.
"""
import argparse
import sys
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import runlog
from command import Parser, UsageError, exit_code, nearest
from report import figures
from report import maps as drawn

POSITIONS = [(0.5, 0.5), (0.25, 0.25), (0.75, 0.75)]  # of height and width


def position(text):
    "Returns (row, column) of '0.3,0.5', parts of height and width."
    try: row, column = map(float, text.split(','))
    except ValueError: raise argparse.ArgumentTypeError(f'{text!r}: not two numbers such as 0.3,0.5') from None
    if not (0 <= row <= 1 and 0 <= column <= 1): raise argparse.ArgumentTypeError(f'{text!r}: must be from 0 to 1')
    return row, column


def parse(argv):
    "Returns the arguments of a command line; raises UsageError on a mistake."
    ap = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    ap.add_argument('model', type=Path, help='a file that train_imagenette.py --save wrote')
    ap.add_argument('images', type=Path, nargs='+', help='image files')
    ap.add_argument('--at', type=position, action='append', metavar='ROW,COLUMN', help='a position (default: three)')
    ap.add_argument('--toward', action='store_true', help='draw what the other positions count for these')
    ap.add_argument('--layer', metavar='NAME', help='draw only the layer of that name (default: all layers)')
    ap.add_argument('--out', type=Path, metavar='DIR', help='folder for the figures (default: MODEL-maps)')
    ap.add_argument('--results', type=Path, default=runlog.RESULTS, metavar='DIR', help="where the run's curve is")
    args = ap.parse_args(argv)
    args.at = args.at or POSITIONS
    if len(args.at) > len(drawn.LETTERS): raise UsageError(f'--at: at most {len(drawn.LETTERS)} positions')
    args.out = args.out or args.model.with_name(f'{args.model.stem}-maps')
    return args


def draw_maps(argv):
    "Does what the command line asks for."
    args = parse(argv)
    from training import maps, run  # torch and fastai take seconds: not before the command line is known to be good
    saved = run.read_model(args.model)
    model, _ = run.built(args.model, saved)
    pixels, batch = maps.load_images(args.images, saved['config']['size'])
    looked = chosen(maps.look(model, batch), args)
    for name, layer in looked.items():
        print(f'{name}: adds {"nothing" if not layer["ratio"] else format(layer["ratio"], ".2%")} of its input')
        if layer['influence'] is None: print(f'{name}: does not relate positions to each other; drawn is S alone')
        for i, title in enumerate(titles(args.images)):
            figure = drawn.attention(pixels, layer, i, places(args.at, layer['side']), args.toward, title)
            save(figure, args.out / (title + (f'-{name}' if len(looked) > 1 else '')))
    draw_epochs(saved, args)


def draw_epochs(saved, args):
    "Draws what the layers add after each epoch, where the curve of the model's run has it."
    epochs = runlog.read_curve(saved.get('run_id', ''), args.results)
    if epochs.branch_ratio.isna().all(): return
    save(drawn.branch({saved['config']['attention']: epochs}), args.out / 'epochs')


def chosen(looked, args):
    "Returns the layers to draw."
    if not looked: raise UsageError(f'{args.model}: has no attention layer')
    if args.layer is None: return looked
    if args.layer not in looked:
        hint = nearest(args.layer, list(looked))
        raise UsageError(f'--layer {args.layer}: there are {", ".join(looked)}{hint}')
    return {args.layer: looked[args.layer]}


def titles(files):
    "Returns a name for each image, its file's without the suffix: of a second dog.jpg, dog-2."
    names = ['epochs']  # that of the other figure
    for stem in (file.stem for file in files):
        names.append(next(name for n in count(1) if (name := stem if n == 1 else f'{stem}-{n}') not in names))
    return names[1:]


def places(parts, side):
    "Returns [(row, column)] of the layer's positions at these parts of height and width."
    return [tuple(min(int(part * n), n - 1) for part, n in zip(position, side)) for position in parts]


def save(figure, path):
    "Writes a figure and prints where it is."
    try: figures.save(figure, path)
    except OSError as e: raise UsageError(f'{path}.png: cannot be written ({e.strerror or e})') from None
    print(f'-> {path}.png')


def main(argv=None): return exit_code('attention_maps.py', lambda: draw_maps(argv))


if __name__ == '__main__': sys.exit(main())
