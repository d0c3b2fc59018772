"One run, from its Config to its row: images, loaders, learner, checkpoints, several processes, a cluster. Needs torch."
import warnings

warnings.filterwarnings('ignore', category=FutureWarning, module='torch')  # of fastai's own torch.jit.script
