"""Draws what an attention layer looks at over an image, and how large what it adds becomes while it is trained."""
import numpy as np
from matplotlib.figure import Figure

from report.figures import GREY, INK, OURS

LETTERS = 'ABCDEFGH'  # of the positions
MARKS, STYLES = 'os^Dv<>', ['-', '--', ':', '-.']  # of the curves: they differ without colour, too


def attention(pixels, looked, i, positions, toward=False, title=''):
    """Returns the figure of image `i` of a layer: the image with the positions, their maps, and the eigenvectors of S.

    pixels     (n, size, size, 3) of the images
    looked     what training.maps.look says of the layer
    positions  [(row, column)] of the layer's positions
    toward     what the others count for a position, in place of what it counts for the others; always so of a softmax
    """
    rows, toward = (2 if looked['influence'] is not None else 1), toward or looked['softmax']
    columns = 1 + max(len(positions) if rows == 2 else 0, len(looked['shares'][i]))
    fig = Figure(figsize=(2.1 * columns, 2.3 * rows), layout='constrained')
    axes = fig.subplots(rows, columns, squeeze=False)
    for ax in axes.flat: ax.set_axis_off()
    show_image(axes[0, 0], pixels[i], looked['side'], positions if rows == 2 else [])
    axes[0, 0].set_title(title, fontsize=8)
    if rows == 2:
        for ax, letter, position in zip(axes[0, 1:], LETTERS, positions):
            show_map(fig, ax, pixels[i], influence_of(looked, i, position, toward), looked['softmax'])
            mark(ax, pixels[i], looked['side'], position, letter)
            ax.set_title(words(letter, looked['softmax'], toward), fontsize=8)
    for k, (ax, share) in enumerate(zip(axes[-1, 1:], looked['shares'][i]), 1):
        show_map(fig, ax, pixels[i], looked['eigenvectors'][i, k - 1].reshape(looked['side']), False)
        ax.set_title(f'eigenvector {k} of S: {share:.0%}', fontsize=8)
    return fig


def words(letter, softmax, toward):
    "Returns the title of the map of a position."
    if softmax: return f'what {letter} attends to'
    return f'what the others count for {letter}' if toward else f'what {letter} counts for the others'


def influence_of(looked, i, position, toward):
    "Returns the map (H, W) of one position: its row of the influence, or its column."
    height, width = looked['side']
    p = position[0] * width + position[1]
    scores = looked['influence'][i]
    return (scores[:, p] if toward else scores[p]).reshape(height, width)


def show_image(ax, pixels, side, positions):
    "Draws the image with the letters of the positions."
    ax.imshow(pixels)
    for letter, position in zip(LETTERS, positions): mark(ax, pixels, side, position, letter)


def mark(ax, pixels, side, position, letter):
    "Writes a letter at a position of the layer."
    row, column = ((p + 0.5) * n / s - 0.5 for p, n, s in zip(position, pixels.shape, side))
    ax.text(column, row, letter, ha='center', va='center', fontsize=9, weight='bold', color='black',
            bbox=dict(boxstyle='circle,pad=0.15', fc='white', ec='black', lw=0.6, alpha=0.8))


def show_map(fig, ax, pixels, values, softmax):
    """Draws values (H, W) over the image in pale grey: red is positive and blue negative.

    Those of a softmax are drawn as multiples of their mean: red is above it and blue below.
    """
    height, width = pixels.shape[:2]
    ax.imshow(pixels.mean(2), cmap='gray', vmin=-600, vmax=255)
    middle = 1 if softmax else 0
    if softmax: values = values / values.mean()
    most = np.abs(values - middle).max() or 1.
    drawn = ax.imshow(values, cmap='RdBu_r', vmin=middle - most, vmax=middle + most, alpha=0.75,
                      extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation='nearest')
    bar = fig.colorbar(drawn, ax=ax, shrink=0.7, pad=0.02)
    bar.ax.tick_params(labelsize=6)
    bar.ax.locator_params(nbins=4)
    bar.outline.set_linewidth(0.4)


def branch(curves):
    "Returns the figure of {label: a run's curve}: what the layers add beside their input, after each epoch."
    fig = Figure(figsize=(5, 3), layout='constrained')
    ax = fig.subplots()
    for x, (label, curve) in enumerate(curves.items()):
        style = dict(marker=MARKS[x % 7], color=(OURS, GREY, INK)[x % 3], ms=4)
        ax.plot(curve.epoch, 100 * curve.branch_ratio, STYLES[x % 4], label=label, **style)
    ax.set(xlabel='epoch', ylabel='what the layer adds, in % of its input', ylim=(0, None))
    ax.locator_params(axis='x', integer=True)
    ax.legend(fontsize=8)
    return fig
