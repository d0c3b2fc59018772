"One run, from its Config to its row: images, loaders, learner, checkpoints, several processes, a cluster. Needs torch."
import os
import tempfile
import warnings
from pathlib import Path


def go_without_home():
    """Gives the libraries that write into a home folder one below the temporary folder, if none can be written.

    So it is in a container whose user id has no home: matplotlib prints three lines at each start, torch.compile fails.
    """
    if os.access(os.path.expanduser('~'), os.W_OK): return
    uid = str(os.getuid()) if hasattr(os, 'getuid') else 'user'
    folder = Path(tempfile.gettempdir()) / f'simple-self-attention-{uid}'
    os.environ.setdefault('USER', uid)  # torch asks for the name of the user
    for name in ('MPLCONFIGDIR', 'TORCHINDUCTOR_CACHE_DIR', 'TRITON_CACHE_DIR'):
        os.environ.setdefault(name, str(folder / name.partition('_')[0].removesuffix('CONFIGDIR').lower()))

go_without_home()
warnings.filterwarnings('ignore', category=FutureWarning, module='torch')  # of fastai's own torch.jit.script
