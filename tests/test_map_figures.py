"""The figures of what an attention layer looks at, as far as they need no torch."""
import numpy as np
import pandas as pd

from report import maps as drawn


def test_the_map_of_a_position_is_its_row_or_its_column():
    scores = np.arange(36.).reshape(1, 6, 6)
    looked = dict(side=(2, 3), influence=scores)
    assert drawn.influence_of(looked, 0, (1, 0), toward=False).tolist() == scores[0, 3].reshape(2, 3).tolist()
    assert drawn.influence_of(looked, 0, (1, 0), toward=True).tolist() == scores[0, :, 3].reshape(2, 3).tolist()


def test_the_size_of_the_branch_is_drawn_in_percent():
    curve = pd.DataFrame(dict(epoch=[1, 2], branch_ratio=[0.01, 0.25]))
    (line,) = drawn.branch(dict(simple=curve)).axes[0].lines
    assert line.get_ydata().tolist() == [1., 25.]
