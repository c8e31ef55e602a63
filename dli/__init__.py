"Dynamic Label Injection for imbalanced multi-class defect segmentation. The names below are the public ones; each is documented in its notebook."
__version__ = "0.1.0"

from dli.benchmark import read_folds, score
from dli.blending import cut_paste, poisson_blend
from dli.data import Samples, load_dataset, magnetic_tiles, split_samples, synthetic_tiles
from dli.injection import DonorPool, DonorTransform, DynamicLabelInjection, InjectionPlan, show_batch
from dli.losses import make_loss
from dli.metrics import compare, count_batch, counts_table, scores, summarize
from dli.models import lightweight_unet
from dli.training import METHODS, PRESETS, RunConfig, run
