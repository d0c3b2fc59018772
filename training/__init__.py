"""Trains runs, each from its Config to its row; needs torch. The modules, in the order of the data's way:

others       what differs in the command lines of other scripts

files        which images a folder has, their splits and their labels
check        opens each image of a user's folder once, for damage and content
images       reads an image, crops and resizes it
readers      reads images from files, in loader processes
data         makes the DataLoaders of a Config; downloads archives

arch         builds every network by its name
layer        finds the attention layer of a run, tries one from outside, counts its cost

machine      knows the device, and what `auto` means there
host         knows the cores and the memory that a container leaves to this process
distributed  lets several processes train one run

learner      makes the recipe of a Config into a fastai Learner
measure      measures losses, accuracies, seconds and memory of the fit
branch       measures what the attention layers add to their input
checkpoint   keeps the state of a run, and finds it again
trackers     shows a run in other tools while it trains
run          trains one run and writes its row
export       writes a trained model for other tools

loop         trains the runs of an experiment, one by one
jobs         does so side by side on this machine
cluster      does so on Ray

maps         shows what the attention layers of a trained model look at
timing       measures steps and layers side by side
benchmarks   measures ours beside fastai's own
"""
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
# Of the first backward pass of a process on a GPU: torch makes the context by itself, as the line goes on to say.
warnings.filterwarnings('ignore', message='Attempting to run cuBLAS, but there was no current CUDA context')
